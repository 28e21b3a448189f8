//! Recipes: what a warmed machine is made of, read from `recipe.toml` and believed only after checking.
//!
//! ```text
//! RECIPE/recipe.toml     name, [base] suite and packages, [[files]], memory_mib, vcpus, scratch_mib, second_console,
//!                        [warm], [readiness], [probe]
//! RECIPE/...             files the recipe puts into the machine
//! ```
//!
//! This file reads and checks; [`root_disk`] makes the root disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use forkd_abi::generation::HOSTNAME_MAX;
use forkd_abi::protocol::{MachineFile, WarmCommand};
use serde::Deserialize;

use crate::build::tools::ToolError;
use crate::local::snapshots::{check_scratch, check_vcpus};

mod apt_sources;
mod root_disk;
mod tree;

pub use self::root_disk::{agent_binary, remove_dead, root_disk};

/// The file that makes a folder a recipe.
pub const RECIPE_FILE: &str = "recipe.toml";
/// Longest recipe.toml, in bytes.
const RECIPE_MAX: u64 = 1 << 20;
/// Longest probe, in bytes: it must fit a frame of the agent's protocol.
const PROBE_MAX: usize = 256 << 10;
/// Most packages and most files a recipe may name.
const ENTRIES_MAX: usize = 1000;
/// Guest memory a recipe may ask for, in MiB.
const MEMORY_MIB: std::ops::RangeInclusive<u32> = 64..=16_384;
/// How long a warm command may be given, in seconds.
const TIMEOUT_S: std::ops::RangeInclusive<u32> = 1..=3600;
/// Where a recipe's files may not go: the agent's own folder, and what is mounted over at boot.
const RESERVED: [&str; 6] = ["/forkd", "/proc", "/sys", "/dev", "/run", "/tmp"];

/// Why a recipe cannot be used, or its root disk not be made.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// There is no recipe there.
    #[error("{} is no recipe: it has no {RECIPE_FILE}", path.display())]
    NotARecipe {
        /// The folder.
        path: PathBuf,
    },
    /// recipe.toml is not the TOML expected.
    #[error("{}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that makes no sense.
    #[error("{}: {field}: {why}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The key.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A file of the recipe, of the cache, or of the tree being built.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Making a root disk takes root: it has files of every owner.
    #[error("making a root disk needs root")]
    NotRoot,
    /// Programs the build needs are absent, and we may not install them.
    #[error("the build needs packages that are not installed: {}", packages.join(" "))]
    Missing {
        /// Debian's names for them.
        packages: Vec<String>,
    },
    /// The agent's program is nowhere to be found.
    #[error("the guest's agent is in none of: {}", list(searched))]
    NoAgent {
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// The agent's program cannot run as the first process of a machine.
    #[error("{} cannot be the guest's first process: {why}", path.display())]
    BadAgent {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A program failed.
    #[error("{step}")]
    Tool {
        /// What was being done.
        step: &'static str,
        /// The program's failure, with its last words.
        #[source]
        source: ToolError,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A recipe that has been read and checked.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Its name: a tag, and the host name of its machines.
    pub name: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// The distribution's part of the root disk.
    pub base: RecipeBase,
    /// Files of the recipe's own.
    #[serde(default)]
    pub files: Vec<RecipeFile>,
    /// Guest RAM in MiB.
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
    /// Processors, 1 to 8.
    #[serde(default = "default_vcpus")]
    pub vcpus: u32,
    /// Size of each copy's empty scratch disk in MiB; none unless given.
    #[serde(default)]
    pub scratch_mib: u32,
    /// Machines have a second console, /dev/hvc0, cheaper to print to than the serial port.
    #[serde(default)]
    pub second_console: bool,
    /// The warm worker.
    #[serde(default)]
    pub warm: Option<Warm>,
    /// When the warm worker counts as failed.
    #[serde(default)]
    pub readiness: Readiness,
    /// Proof that it is warm.
    #[serde(default)]
    pub probe: Option<Probe>,
    /// The folder it was read from.
    #[serde(skip)]
    directory: PathBuf,
}

/// What the distribution provides.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeBase {
    /// Debian's name for a release: "bookworm".
    pub suite: String,
    /// Packages beside the essential ones.
    #[serde(default)]
    pub packages: Vec<String>,
}

/// A file from the recipe's folder.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeFile {
    /// Path in the recipe's folder.
    pub from: PathBuf,
    /// Absolute path in the machine.
    pub to: PathBuf,
    /// Whether it may be executed; as in the folder when absent.
    #[serde(default)]
    pub executable: Option<bool>,
}

/// The warm worker's command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to its environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Its working directory.
    #[serde(default)]
    pub cwd: Option<String>,
}

/// How long the warm worker may take.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Readiness {
    /// Seconds until it must have printed `{"ready":true}`.
    pub timeout_s: u32,
}

impl Default for Readiness {
    fn default() -> Self {
        Self { timeout_s: 120 }
    }
}

/// Code that must succeed in the warm worker before the snapshot is taken.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// In the worker's language.
    pub code: String,
    /// What it must answer, letter by letter.
    #[serde(default)]
    pub expect: Option<String>,
}

const fn default_memory_mib() -> u32 {
    512
}

const fn default_vcpus() -> u32 {
    1
}

impl Recipe {
    /// Reads and checks a recipe: its folder, or the recipe.toml in it.
    ///
    /// # Errors
    /// [`RecipeError::NotARecipe`], [`RecipeError::Syntax`], [`RecipeError::Invalid`], [`RecipeError::File`].
    pub fn load(path: &Path) -> Result<Self, RecipeError> {
        let file = if path.is_dir() { path.join(RECIPE_FILE) } else { path.to_owned() };
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => RecipeError::NotARecipe { path: path.to_owned() },
            _ => RecipeError::File { path: file.clone(), source },
        };
        let mut text = String::new();
        File::open(&file)
            .and_then(|opened| opened.take(RECIPE_MAX + 1).read_to_string(&mut text))
            .map_err(failed)?;
        let invalid = |field, why| RecipeError::Invalid { path: file.clone(), field, why };
        if text.len() as u64 > RECIPE_MAX {
            return Err(invalid(RECIPE_FILE, format!("longer than {RECIPE_MAX} bytes")));
        }
        let mut recipe: Self = toml::from_str(&text)
            .map_err(|source| RecipeError::Syntax { path: file.clone(), source: Box::new(source) })?;
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        recipe.directory = fs::canonicalize(parent).map_err(failed)?;
        recipe.check().map_err(|(field, why)| invalid(field, why))?;
        Ok(recipe)
    }

    /// How long the warm worker may take to be ready.
    #[must_use]
    pub fn ready_timeout(&self) -> Duration {
        Duration::from_secs(self.readiness.timeout_s.into())
    }

    /// What PID 1 reads at boot.
    #[must_use]
    pub fn machine_file(&self) -> MachineFile {
        MachineFile {
            warm: self.warm.as_ref().map(|warm| WarmCommand {
                argv: warm.argv.clone(),
                env: warm.env.clone(),
                cwd: warm.cwd.clone(),
            }),
            hostname: Some(self.name.clone()),
        }
    }

    /// The first thing that is wrong: the key, and why.
    fn check(&self) -> Result<(), (&'static str, String)> {
        check_name(&self.name).map_err(|why| ("name", why))?;
        if self.description.len() > 1000 || self.description.contains(char::is_control) {
            return Err(("description", "not one line of at most 1000 bytes".to_owned()));
        }
        self.base.check()?;
        if self.files.len() > ENTRIES_MAX {
            return Err(("files", format!("more than {ENTRIES_MAX}")));
        }
        for file in &self.files {
            file.check(&self.directory)?;
        }
        if !MEMORY_MIB.contains(&self.memory_mib) {
            let (least, most) = MEMORY_MIB.into_inner();
            return Err(("memory_mib", format!("{} is not between {least} and {most}", self.memory_mib)));
        }
        if let Err(error) = check_vcpus(self.vcpus) {
            return Err(("vcpus", error.to_string()));
        }
        if let Err(error) = check_scratch(self.scratch_mib) {
            return Err(("scratch_mib", error.to_string()));
        }
        if !TIMEOUT_S.contains(&self.readiness.timeout_s) {
            let (least, most) = TIMEOUT_S.into_inner();
            let why = format!("{} is not between {least} and {most}", self.readiness.timeout_s);
            return Err(("readiness.timeout_s", why));
        }
        match (&self.warm, &self.probe) {
            (None, Some(_)) => Err(("probe", "there is no [warm] command to answer it".to_owned())),
            (Some(warm), probe) => {
                warm.check()?;
                probe.as_ref().map_or(Ok(()), Probe::check)
            }
            (None, None) => Ok(()),
        }
    }
}

/// A tag and a host name at once.
fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    // Host names of forks are this one and a number.
    let fits = (1..=HOSTNAME_MAX - 12).contains(&name.len());
    if fits && name.bytes().all(plain) && !name.starts_with('-') && !name.ends_with('-') {
        Ok(())
    } else {
        Err(format!("{name:?} is not 1 to {} of a-z 0-9 -, with - only inside", HOSTNAME_MAX - 12))
    }
}

impl RecipeBase {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let word = |text: &str, extra: &str| {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || extra.contains(c);
            (1..=100).contains(&text.len())
                && text.starts_with(|c: char| c.is_ascii_alphanumeric())
                && text.chars().all(plain)
        };
        if !word(&self.suite, "-") {
            return Err(("base.suite", format!("{:?} is no name of a release", self.suite)));
        }
        if self.packages.len() > ENTRIES_MAX {
            return Err(("base.packages", format!("more than {ENTRIES_MAX}")));
        }
        match self.packages.iter().find(|package| !word(package, "+-.")) {
            Some(package) => Err(("base.packages", format!("{package:?} is no name of a package"))),
            None => Ok(()),
        }
    }
}

impl RecipeFile {
    fn check(&self, directory: &Path) -> Result<(), (&'static str, String)> {
        let from = |why: String| Err(("files.from", why));
        let shown = self.from.display();
        let plain = self.from.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || self.from.as_os_str().is_empty() {
            return from(format!("{shown:?} is not a path below the recipe's folder"));
        }
        match fs::canonicalize(directory.join(&self.from)) {
            Err(error) => return from(format!("{shown:?}: {error}")),
            Ok(path) if !path.starts_with(directory) => {
                return from(format!("{shown:?} is a link that leads out of the recipe's folder"));
            }
            Ok(path) if !path.is_file() => return from(format!("{shown:?} is not a regular file")),
            Ok(_) => {}
        }
        let to = |why: &str| Err(("files.to", format!("{:?} {why}", self.to.display())));
        let mut parts = self.to.components();
        let absolute = parts.next() == Some(Component::RootDir);
        let mut names = 0;
        for part in parts {
            if !matches!(part, Component::Normal(_)) {
                return to("is not a plain absolute path");
            }
            names += 1;
        }
        let text = self.to.to_str().unwrap_or("\0");
        if !absolute
            || names == 0
            || text.ends_with('/')
            || text.contains(char::is_control)
            || text.len() > 4000
        {
            return to("is not a plain absolute path of a file");
        }
        match RESERVED.iter().find(|reserved| self.to.starts_with(reserved)) {
            Some(reserved) => to(&format!("is in {reserved}, which is not the recipe's")),
            None => Ok(()),
        }
    }
}

impl Warm {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let nul = |text: &str| text.contains('\0');
        if self.argv.first().is_none_or(String::is_empty) || self.argv.iter().any(|arg| nul(arg)) {
            return Err(("warm.argv", "not a program and its arguments".to_owned()));
        }
        let bad = |key: &str| key.is_empty() || key.contains('=') || nul(key);
        if let Some(key) = self.env.iter().find(|(key, value)| bad(key) || nul(value)).map(|(key, _)| key) {
            return Err(("warm.env", format!("{key:?} cannot be set")));
        }
        match &self.cwd {
            Some(cwd) if !cwd.starts_with('/') || nul(cwd) => {
                Err(("warm.cwd", format!("{cwd:?} is not absolute")))
            }
            _ => Ok(()),
        }
    }
}

impl Probe {
    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.code.trim().is_empty() || self.code.len() > PROBE_MAX {
            return Err(("probe.code", format!("not 1 to {PROBE_MAX} bytes of code")));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
