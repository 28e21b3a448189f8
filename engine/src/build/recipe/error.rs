//! Why a recipe cannot be used, or its root disk not be made.

use std::io;
use std::path::{Path, PathBuf};

use super::format::RECIPE_FILE;
use crate::build::tools::ToolError;

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
    #[error("{}{}: {key}: {why}", path.display(), place(*line))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where in it, counted from 1; `None` for what is not there.
        line: Option<usize>,
        /// The key, with the tables that it is in: "warm.argv".
        key: String,
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
    /// The root disk lacks what a step takes.
    #[error("{step}: {why}")]
    Lacks {
        /// What was being done.
        step: String,
        /// What is missing.
        why: String,
    },
    /// A program failed.
    #[error("{step}")]
    Tool {
        /// What was being done.
        step: String,
        /// The program's failure, with its last words.
        #[source]
        source: ToolError,
    },
}

impl RecipeError {
    /// Of a file.
    pub(super) fn file(path: &Path) -> impl FnOnce(io::Error) -> RecipeError + use<> {
        let path = path.to_owned();
        move |source| RecipeError::File { path, source }
    }

    /// Of a program.
    pub(super) fn tool(step: impl Into<String>) -> impl FnOnce(ToolError) -> RecipeError {
        let step = step.into();
        move |source| RecipeError::Tool { step, source }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn place(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(":{line}"))
}
