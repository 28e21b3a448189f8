//! One file per subcommand. Each exposes `run(args, output)`; [`dispatch`] is the only caller, but for [`fork::EarlyZygote`].
//!
//! Dispatch happens in a process with a single thread. A command that needs tokio asks [`runtime`] for it.

use std::process::ExitCode;

use crate::cli::{CacheVerb, HubVerb, KernelVerb, Verb};
use crate::failure::CommandError;
use crate::output::Output;

pub mod build;
mod cache;
pub mod children;
mod cleanup;
pub mod completions;
mod doctor;
pub mod fork;
pub mod hub_publish;
pub mod hub_serve;
pub mod images;
pub mod inspect;
pub mod kernel;
pub mod mount;
pub mod pack;
pub mod pull;
pub mod repack;
pub mod snapshots;
pub mod trace;
pub mod umount;
pub mod unpack;
pub mod warm;

/// Runs the command, for which `early` was begun. The exit code is 0 unless the command has one of its own to pass on (`forkd exec`).
pub fn dispatch(
    verb: Verb,
    early: Option<fork::EarlyZygote>,
    output: &Output,
) -> Result<ExitCode, CommandError> {
    match verb {
        Verb::Completions(args) => completions::run(&args, output),
        Verb::Doctor => doctor::run(output),
        Verb::Kernel(KernelVerb::Build(args)) => kernel::build(&args, output),
        Verb::Kernel(KernelVerb::Path) => kernel::path(output),
        Verb::Build(args) => build::build(&args, output),
        Verb::Snapshot(args) => build::snapshot(&args, output),
        Verb::Snapshots => snapshots::run(output),
        Verb::Rmi(args) => snapshots::remove(&args, output),
        Verb::Pack(args) => pack::run(&args, output),
        Verb::Unpack(args) => unpack::run(&args, output),
        Verb::Repack(args) => repack::run(&args, output),
        Verb::Inspect(args) => inspect::run(&args, output),
        Verb::Hub(HubVerb::Publish(args)) => hub_publish::run(&args, output),
        Verb::Hub(HubVerb::Serve(args)) => hub_serve::run(&args, output),
        Verb::Pull(args) => pull::run(&args, output),
        Verb::Images(args) => images::run(&args, output),
        Verb::Mount(args) => mount::run(&args, output),
        Verb::Umount(args) => umount::run(&args, output),
        Verb::Cache(CacheVerb::Ls) => cache::ls(output),
        Verb::Cache(CacheVerb::Verify) => cache::verify(output),
        Verb::Cache(CacheVerb::Gc(args)) => cache::gc(&args, output),
        Verb::Trace(args) => trace::run(&args, output),
        Verb::Fork(args) => fork::run(&args, early.unwrap_or_default(), output),
        Verb::Warm(args) => warm::run(&args, output),
        Verb::Ps => children::ps(output),
        Verb::Exec(args) => children::exec(&args, output),
        Verb::Eval(args) => children::eval(&args, output),
        Verb::Logs(args) => children::logs(&args, output),
        Verb::Kill(args) => children::kill(&args, output),
        Verb::Cleanup => cleanup::run(output),
    }
}
