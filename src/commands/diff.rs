//! `forkd diff`: what differs between two machines.

use std::process::ExitCode;

use crate::cli::DiffArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::runtime::runtime;
use crate::units::show_size;
use forkd_engine::chain::plain;
use forkd_engine::inspect::diff::{DiffReport, DiffRequest, RegionDiff, diff};
use forkd_engine::local::paths::Paths;
use forkd_engine::picture::svg::check_place;
use forkd_engine::target::{Target, shown_name};

/// Compares.
pub fn run(args: &DiffArgs, output: &Output) -> Result<ExitCode, CommandError> {
    args.svg.as_deref().map(check_place).transpose()?;
    let paths = environment::paths()?;
    let (target, name) = named(&paths, &args.target, args);
    let request = DiffRequest {
        target,
        name,
        base: args.base.as_deref().map(|base| named(&paths, base, args)),
        svg: args.svg.clone(),
        cache: args.cache.options(),
    };
    let runtime = runtime().map_err(CommandError::Runtime)?;
    let report = runtime.block_on(diff(&paths, &request, output))?;
    output.report(&report, show);
    Ok(ExitCode::SUCCESS)
}

/// A local snapshot where there is one of that tag, or else what the other commands take it for.
fn named(paths: &Paths, text: &str, args: &DiffArgs) -> (Target, String) {
    let is_tag = paths.snapshot(text).is_ok_and(|dir| dir.is_dir());
    let tag = is_tag.then_some(text);
    (Target::of(paths, tag, Some(text), args.hub.hub.as_deref()), shown_name(text))
}

fn show(report: &DiffReport) -> String {
    let mut rows = vec![
        ["FILE", ">SIZE", ">CHUNKS", ">DIFFER", ">PAGES", ">DIFFER", ">BYTES DIFFER"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(report.regions.iter().map(row));
    let against = format!("{} against {}", plain(&report.target), plain(&report.base));
    format!("{against}, chunks of {}\n{}", show_size(report.chunk_bytes.into()), table(&rows))
}

fn row(region: &RegionDiff) -> Vec<String> {
    let size = match (region.size, region.base_size) {
        (Some(size), Some(base)) if size != base => format!("{} (was {})", show_size(size), show_size(base)),
        (Some(size), Some(_)) => show_size(size),
        (Some(size), None) => format!("{} (new)", show_size(size)),
        (None, base) => format!("gone (was {})", show_size(base.unwrap_or(0))),
    };
    vec![
        plain(&region.file),
        size,
        region.chunks.to_string(),
        region.chunks_differing.to_string(),
        region.pages.to_string(),
        region.pages_differing.to_string(),
        show_size(region.bytes_differing),
    ]
}
