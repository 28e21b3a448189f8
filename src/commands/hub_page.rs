//! `forkd hub page`: a hub's registry as one HTML file.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::PageArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::runtime;
use forkd_engine::hub::{client, page};
use forkd_engine::picture::svg;

/// What `forkd hub page --json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    hub: String,
    file: &'a Path,
    packages: usize,
}

/// Reads the registry and writes the page, in place of one that is there by a rename.
pub fn run(args: &PageArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let http = client::http_client(&paths);
    let catalogue = runtime().map_err(CommandError::Runtime)?.block_on(client::catalogue(
        &paths,
        args.hub.hub.as_deref(),
        &http,
    ))?;
    svg::put(&args.out, &page::render(catalogue.registry(), &args.title)).map_err(CommandError::Page)?;
    let packages = catalogue.registry().packages.len();
    let report = Report { hub: catalogue.location(), file: &args.out, packages };
    output
        .report(&report, |report| format!("wrote {} (packages: {})", report.file.display(), report.packages));
    Ok(ExitCode::SUCCESS)
}
