//! `forkd images`: the hub's packages, or the local snapshots.

use std::process::ExitCode;

use crate::cli::ImagesArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::runtime::runtime;
use crate::units::show_size;
use forkd_engine::chain::plain;
use forkd_engine::hub::listing::{self, HubListing, ListedPackage};

/// Lists.
pub fn run(args: &ImagesArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let Some(hub) = &args.hub else { return super::snapshots::run(output) };
    let from_env = std::env::var("FORKD_HUB_URL").ok();
    let hub = hub.as_deref().or(from_env.as_deref());
    let paths = environment::paths()?;
    let listing = listing::packages(&paths, hub);
    let report = runtime().map_err(CommandError::Runtime)?.block_on(listing)?;
    output.report(&report, show);
    Ok(ExitCode::SUCCESS)
}

fn show(report: &HubListing) -> String {
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
fn described(package: &ListedPackage) -> String {
    match package.recipe_path.as_ref().filter(|_| !package.hosted) {
        Some(recipe) => format!("{} (build it: forkd build {})", plain(&package.description), plain(recipe)),
        None => plain(&package.description),
    }
}
