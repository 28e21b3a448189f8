//! Reading a recipe, and the one that it extends.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use forkd_abi::protocol::MachineFile;

use super::check::{Fault, check};
use super::error::RecipeError;
use super::format::{RECIPE_FILE, Recipe};
use super::place::KeyPath;

/// Longest recipe.toml, in bytes.
const RECIPE_MAX: u64 = 1 << 20;
/// Longest machine file, in bytes: the agent reads no longer one.
const MACHINE_FILE_MAX: usize = 1 << 20;
/// Most recipes that extend each other.
const ANCESTORS_MAX: usize = 8;

impl Recipe {
    /// Reads and checks a recipe: its folder, or the recipe.toml in it. So is the recipe that it extends.
    ///
    /// # Errors
    /// [`RecipeError::NotARecipe`], [`RecipeError::Syntax`], [`RecipeError::Invalid`], [`RecipeError::File`].
    pub fn load(path: &Path) -> Result<Self, RecipeError> {
        load(path, ANCESTORS_MAX)
    }

    /// This recipe, the one that it extends, and so on.
    pub(super) fn lineage(&self) -> impl Iterator<Item = &Recipe> {
        std::iter::successors(Some(self), |recipe| recipe.parent.as_deref())
    }

    /// The distribution's release, whichever recipe names it.
    #[must_use]
    pub fn suite(&self) -> &str {
        self.lineage().find_map(|recipe| recipe.base.suite.as_deref()).unwrap_or_default()
    }

    /// How long all services and the warm worker may take to be ready.
    #[must_use]
    pub fn ready_timeout(&self) -> Duration {
        let services = self.service.iter().map(|service| u64::from(service.timeout_s)).sum::<u64>();
        Duration::from_secs(services + u64::from(self.readiness.timeout_s))
    }

    /// What PID 1 reads at boot.
    #[must_use]
    pub fn machine_file(&self) -> MachineFile {
        MachineFile {
            warm: self.warm.clone(),
            hostname: Some(self.name.clone()),
            env: self.env.clone(),
            services: self.service.clone(),
        }
    }

    /// The machine file's text.
    pub(super) fn machine_file_text(&self) -> String {
        // A structure of strings always has a JSON form.
        serde_json::to_string(&self.machine_file()).unwrap_or_default()
    }
}

fn load(path: &Path, ancestors: usize) -> Result<Recipe, RecipeError> {
    let file = if path.is_dir() { path.join(RECIPE_FILE) } else { path.to_owned() };
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => RecipeError::NotARecipe { path: path.to_owned() },
        _ => RecipeError::File { path: file.clone(), source },
    };
    let mut text = String::new();
    File::open(&file)
        .and_then(|opened| opened.take(RECIPE_MAX + 1).read_to_string(&mut text))
        .map_err(failed)?;
    let invalid = |Fault { key, why }: Fault| {
        let (line, key) = (key.line(&text), key.to_string());
        RecipeError::Invalid { path: file.clone(), line, key, why }
    };
    let fault = |key: &'static str, why: String| invalid(Fault { key: KeyPath::of(key), why });
    if text.len() as u64 > RECIPE_MAX {
        let why = format!("longer than {RECIPE_MAX} bytes");
        return Err(RecipeError::Invalid { path: file, line: None, key: RECIPE_FILE.to_owned(), why });
    }
    let mut recipe: Recipe = toml::from_str(&text)
        .map_err(|source| RecipeError::Syntax { path: file.clone(), source: Box::new(source) })?;
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    recipe.directory = fs::canonicalize(parent).map_err(failed)?;
    check(&recipe).map_err(invalid)?;
    if recipe.machine_file_text().len() > MACHINE_FILE_MAX {
        return Err(fault(
            "service",
            format!("what the machine is to start takes more than {MACHINE_FILE_MAX} bytes"),
        ));
    }
    if let Some(extended) = &recipe.base.recipe {
        if ancestors == 0 {
            return Err(fault("base.recipe", "recipes extend each other without end".to_owned()));
        }
        recipe.parent = Some(Box::new(load(&recipe.directory.join(extended), ancestors - 1)?));
    }
    Ok(recipe)
}
