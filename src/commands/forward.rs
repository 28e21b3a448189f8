//! `forkd forward`: ports of children on this host, until Ctrl-C or until the children are over.

use crate::cli::ForwardArgs;
use crate::detach::{Detached, split};
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::{end_on_signal, local_runtime};
use forkd_engine::fork::forward::{Forward, ForwardedPort};
use serde::Serialize;
use std::net::SocketAddr;
use std::process::ExitCode;

#[derive(Debug, Serialize)]
struct Report {
    /// Process id of what forwards; to be ended with SIGTERM.
    pid: u32,
    forwards: Vec<ForwardedPort>,
}

/// Runs the command.
pub fn run(args: &ForwardArgs, output: &Output) -> Result<ExitCode, CommandError> {
    // No thread was started yet.
    let detached =
        match args.detach.then(split).transpose().map_err(CommandError::detaching("forward ports"))? {
            Some(Detached::Foreground(exit)) => return Ok(exit),
            Some(Detached::Background(handover)) => Some(handover),
            None => None,
        };
    let forward = Forward::open(&environment::paths()?, &args.names(), &args.ports(), args.address)?;
    let runtime = local_runtime().map_err(CommandError::Runtime)?;
    // Nothing is left of it: connections end with the process.
    end_on_signal(&runtime, || {});
    let report = Report { pid: std::process::id(), forwards: forward.ports() };
    output.report(&report, |report| show(report, args.detach));
    if detached.is_some_and(|handover| !handover.finish(0)) {
        return Ok(ExitCode::FAILURE);
    }
    runtime.block_on(forward.serve()).map_err(CommandError::Runtime)?;
    output.note("the children are over");
    Ok(ExitCode::SUCCESS)
}

fn show(report: &Report, detached: bool) -> String {
    let line = |port: &ForwardedPort| {
        format!("{} -> {}:{}\n", SocketAddr::new(port.address, port.local), port.id, port.guest)
    };
    let mut text: String = report.forwards.iter().map(line).collect();
    if detached {
        text.push_str(&format!("forwarding in process {}\n", report.pid));
    }
    text
}
