//! `forkd pull`: a pack of the hub, whole, into a local snapshot.

use std::process::ExitCode;

use super::unpack::line;
use crate::cli::PullArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::runtime;
use forkd_engine::build::pull::{PullRequest, pull};
use forkd_engine::reference::Reference;

/// Pulls.
pub fn run(args: &PullArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let reference: Reference = args.reference.parse()?;
    let request = PullRequest {
        reference: reference.clone(),
        hub: args.hub.hub.clone(),
        tag: args.tag.clone(),
        force: args.force,
        cache: args.cache.options(),
    };
    let unpacked = runtime().map_err(CommandError::Runtime)?.block_on(pull(&paths, &request, output))?;
    output.report(&unpacked, |unpacked| format!("pulled {reference} as {}", line(unpacked)));
    Ok(ExitCode::SUCCESS)
}
