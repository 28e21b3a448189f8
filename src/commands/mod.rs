//! One file per subcommand. Each exposes `run(args, output)`; [`dispatch`] is the only caller.
//!
//! Dispatch happens in a process with a single thread. A command that needs tokio asks [`runtime`] for it.

use std::process::ExitCode;

use crate::cli::{HubVerb, KernelVerb, Verb};
use crate::error::CommandError;
use crate::output::Output;

pub mod completions;
pub mod kernel;

/// Runs the command. The exit code is 0 unless the command has one of its own to pass on (`forkd exec`).
pub fn dispatch(verb: Verb, output: &Output) -> Result<ExitCode, CommandError> {
    match verb {
        Verb::Completions(args) => completions::run(&args, output),
        Verb::Doctor => Err(CommandError::NotBuilt("doctor")),
        Verb::Kernel(KernelVerb::Build(args)) => kernel::build(&args, output),
        Verb::Kernel(KernelVerb::Path) => kernel::path(output),
        Verb::Build(_) => Err(CommandError::NotBuilt("build")),
        Verb::Snapshot(_) => Err(CommandError::NotBuilt("snapshot")),
        Verb::Snapshots => Err(CommandError::NotBuilt("snapshots")),
        Verb::Rmi(_) => Err(CommandError::NotBuilt("rmi")),
        Verb::Pack(_) => Err(CommandError::NotBuilt("pack")),
        Verb::Unpack(_) => Err(CommandError::NotBuilt("unpack")),
        Verb::Inspect(_) => Err(CommandError::NotBuilt("inspect")),
        Verb::Hub(HubVerb::Publish(_)) => Err(CommandError::NotBuilt("hub publish")),
        Verb::Hub(HubVerb::Serve(_)) => Err(CommandError::NotBuilt("hub serve")),
        Verb::Pull(_) => Err(CommandError::NotBuilt("pull")),
        Verb::Images(_) => Err(CommandError::NotBuilt("images")),
        Verb::Mount(_) => Err(CommandError::NotBuilt("mount")),
        Verb::Umount(_) => Err(CommandError::NotBuilt("umount")),
        Verb::Fork(_) => Err(CommandError::NotBuilt("fork")),
        Verb::Ps => Err(CommandError::NotBuilt("ps")),
        Verb::Exec(_) => Err(CommandError::NotBuilt("exec")),
        Verb::Eval(_) => Err(CommandError::NotBuilt("eval")),
        Verb::Logs(_) => Err(CommandError::NotBuilt("logs")),
        Verb::Kill(_) => Err(CommandError::NotBuilt("kill")),
        Verb::Cleanup => Err(CommandError::NotBuilt("cleanup")),
    }
}

/// A tokio runtime for a command that does I/O; its threads start here and end with it.
pub fn runtime() -> Result<tokio::runtime::Runtime, CommandError> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(CommandError::Runtime)
}
