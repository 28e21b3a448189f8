//! `forkd repack`: a pack of any format version into one of this version.

use std::process::ExitCode;

use super::pack::line;
use crate::cli::RepackArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::interrupt;
use crate::output::Output;
use crate::runtime::runtime;
use forkd_engine::build::pack::Compression;
use forkd_engine::build::repack::{RepackRequest, repack};
use forkd_engine::target::Target;

/// Repacks.
pub fn run(args: &RepackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let request = RepackRequest {
        target: Target::parse(&paths, &args.target, args.hub.hub.as_deref()),
        name: args.target.clone(),
        out: args.out.clone(),
        force: args.force,
        compression: Compression { chunk_bytes: Some(args.chunk), level: args.level },
        cache: args.cache.options(),
    };
    let runtime = runtime().map_err(CommandError::Runtime)?;
    let report = repack(&paths, &request, runtime.handle(), &interrupt::watch(), output)?;
    for note in &report.notes {
        output.note(format!("note: {note}"));
    }
    output.report(&report, |report| {
        line(&report.pack, &format!("repacked {} (v{})", report.source, report.source_format))
    });
    Ok(ExitCode::SUCCESS)
}
