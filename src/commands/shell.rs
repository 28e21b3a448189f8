//! `forkd shell`: a user's shell in a child, on our terminal.

use crate::cli::ShellArgs;
use crate::commands::exec::{attach, our_tty, request};
use crate::failure::CommandError;
use crate::output::Output;
use crate::terminal;
use forkd_abi::protocol::ExecRequest;
use std::process::ExitCode;

/// `forkd shell`: exits as the shell did. Without a terminal of our own it reads commands as from a file.
pub fn run(args: &ShellArgs, output: &Output) -> Result<ExitCode, CommandError> {
    if output.is_json() {
        return Err(CommandError::NoTerminal { why: "a shell prints no document" });
    }
    let request = ExecRequest {
        argv: args.command.clone(),
        stdin: true,
        tty: terminal::is_stdin().then(our_tty),
        login: true,
        ..request(&args.how)?
    };
    attach(&args.id, request, None, output)
}
