//! `forkd pack`: a local snapshot into one file.

use std::process::ExitCode;

use crate::cli::PackArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::interrupt;
use crate::output::Output;
use crate::units::{show_share, show_size};
use forkd_engine::build::pack::{Compression, PackReport, PackRequest, pack};

/// Packs.
pub fn run(args: &PackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let request = PackRequest {
        tag: args.tag.clone(),
        out: args.out.clone(),
        force: args.force,
        description: args.description.clone(),
        base_image: args.base_image.clone(),
        compression: Compression { chunk_bytes: args.chunk, level: args.level },
    };
    let report = pack(&environment::paths()?, &request, interrupt::watch, output)?;
    output.report(&report, |report| format!("packed {}", line(report, &args.tag)));
    Ok(ExitCode::SUCCESS)
}

/// A new pack, for people; without the verb.
pub(super) fn line(report: &PackReport, what: &str) -> String {
    format!(
        "{what} as {}: {} of {} ({} of the chunks are zero), sha256 {}",
        report.path.display(),
        show_size(report.size_bytes),
        show_size(report.plain_bytes),
        show_share(report.chunks - report.stored_chunks, report.chunks),
        report.sha256
    )
}
