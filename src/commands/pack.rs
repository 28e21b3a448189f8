//! `forkd pack`: a local snapshot into one file.

use std::process::ExitCode;

use crate::cli::PackArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::interrupt;
use crate::output::Output;
use crate::runtime::runtime;
use crate::units::{show_share, show_size};
use forkd_engine::build::pack::{Compression, PackReport, PackRequest, pack};
use forkd_engine::build::pack_base::BaseRequest;
use forkd_engine::target::{Target, shown_name};

/// Packs.
pub fn run(args: &PackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let runtime = args.delta.then(runtime).transpose().map_err(CommandError::Runtime)?;
    let base = runtime.as_ref().map(|runtime| BaseRequest {
        named: args
            .base
            .as_ref()
            .map(|name| (Target::parse(&paths, name, args.hub.hub.as_deref()), shown_name(name))),
        cache: args.cache.options(),
        runtime: runtime.handle().clone(),
    });
    let request = PackRequest {
        tag: args.tag.clone(),
        out: args.out.clone(),
        force: args.force,
        description: args.description.clone(),
        base_image: args.base_image.clone(),
        compression: Compression { chunk_bytes: args.chunk, level: args.level },
        base,
    };
    let report = pack(&paths, &request, interrupt::watch, output)?;
    output.report(&report, |report| format!("packed {}", line(report, &args.tag)));
    Ok(ExitCode::SUCCESS)
}

/// A new pack, for people; without the verb.
pub(super) fn line(report: &PackReport, what: &str) -> String {
    let zero = show_share(report.chunks - report.stored_chunks - report.base_chunks, report.chunks);
    let in_bases = match report.bases.first() {
        None => String::new(),
        Some(base) => format!(
            "\na delta of the pack with index sha256 {base}: {} of the chunks are there{}",
            show_share(report.base_chunks, report.chunks),
            match report.bases.len() {
                1 => String::new(),
                packs => format!(", and in {} more packs", packs - 1),
            }
        ),
    };
    format!(
        "{what} as {}: {} of {} ({zero} of the chunks are zero), sha256 {}{in_bases}",
        report.path.display(),
        show_size(report.size_bytes),
        show_size(report.plain_bytes),
        report.sha256
    )
}
