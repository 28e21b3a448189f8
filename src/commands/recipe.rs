//! `forkd recipe check`: whether recipes make sense, without building them.

use std::process::ExitCode;

use crate::cli::RecipeCheckArgs;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::build::recipe::Recipe;
use forkd_engine::build::snapshot::SnapshotBuildError;
use serde::Serialize;

/// A recipe that makes sense.
#[derive(Debug, Serialize)]
struct CheckedRecipe {
    name: String,
    description: String,
    suite: String,
    memory_mib: u32,
    services: Vec<String>,
    probes: usize,
}

/// Ends at the first recipe that does not.
pub fn check(args: &RecipeCheckArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let mut checked = Vec::new();
    for path in &args.recipes {
        let recipe = Recipe::load(path).map_err(SnapshotBuildError::from)?;
        checked.push(CheckedRecipe {
            suite: recipe.suite().to_owned(),
            memory_mib: recipe.memory_mib,
            services: recipe.service.iter().map(|service| service.name.clone()).collect(),
            probes: recipe.probe.len(),
            description: recipe.description,
            name: recipe.name,
        });
    }
    output.report(&checked, |checked| {
        checked.iter().map(|recipe| format!("{}: good\n", recipe.name)).collect()
    });
    Ok(ExitCode::SUCCESS)
}
