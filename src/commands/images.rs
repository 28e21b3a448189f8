//! `forkd images`: the hub's packages, or the local snapshots.

use std::process::ExitCode;

use serde::Serialize;

use crate::cli::ImagesArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::runtime::runtime;
use crate::units::show_size;
use forkd_engine::chain::plain;
use forkd_engine::hub::client;
use forkd_engine::hub::registry::PackageVersion;

/// What `forkd images --hub --json` prints.
#[derive(Debug, Serialize)]
struct Report {
    hub: String,
    packages: Vec<Package>,
}

#[derive(Debug, Serialize)]
struct Package {
    name: String,
    description: String,
    versions: Vec<String>,
    memory_mib: Option<u64>,
    size_bytes: Option<u64>,
    created_at: Option<String>,
    /// Whether its pack can be had; otherwise it has to be built from its recipe.
    hosted: bool,
    recipe_path: Option<String>,
}

/// Lists.
pub fn run(args: &ImagesArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let Some(hub) = &args.hub else { return super::snapshots::run(output) };
    let from_env = std::env::var("FORKD_HUB_URL").ok();
    let hub = hub.as_deref().or(from_env.as_deref());
    let paths = environment::paths()?;
    let catalogue = runtime().map_err(CommandError::Runtime)?.block_on(client::catalogue(
        &paths,
        hub,
        &client::http_client(&paths),
    ))?;
    let packages = catalogue.registry().packages.iter().map(|(name, package)| {
        let latest = package.newest();
        Package {
            name: name.clone(),
            description: package.description.clone(),
            versions: package.versions.keys().cloned().collect(),
            memory_mib: latest.and_then(|version| version.memory_mib),
            size_bytes: latest.and_then(|version| version.size_bytes),
            created_at: latest.and_then(|version| version.created_at.clone()),
            hosted: latest.is_some_and(PackageVersion::is_hosted),
            recipe_path: latest.and_then(|version| version.recipe_path.clone()),
        }
    });
    let report = Report { hub: catalogue.location(), packages: packages.collect() };
    output.report(&report, show);
    Ok(ExitCode::SUCCESS)
}

fn show(report: &Report) -> String {
    if report.packages.is_empty() {
        return format!("{} lists no packages", report.hub);
    }
    let heading = ["NAME", "VERSIONS", ">MEMORY", ">PACK SIZE", "DESCRIPTION"].map(str::to_owned).to_vec();
    let mut rows = vec![heading];
    for package in &report.packages {
        rows.push(vec![
            plain(&package.name),
            plain(&package.versions.join(" ")),
            package.memory_mib.map_or_else(|| "-".to_owned(), |mib| format!("{mib} MiB")),
            package.size_bytes.map_or_else(|| "-".to_owned(), show_size),
            described(package),
        ]);
    }
    table(&rows)
}

/// What it is, and for what is hosted nowhere how to get it.
fn described(package: &Package) -> String {
    match package.recipe_path.as_ref().filter(|_| !package.hosted) {
        Some(recipe) => format!("{} (build it: forkd build {})", plain(&package.description), plain(recipe)),
        None => plain(&package.description),
    }
}
