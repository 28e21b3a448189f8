//! One file per subcommand. Each exposes `run(args, output)`; [`dispatch`] is the only caller.
//!
//! Dispatch happens in a process with a single thread. A command that needs tokio asks `crate::runtime` for it.

use std::process::ExitCode;

use crate::cli::{CacheVerb, HubVerb, KernelVerb, RecipeVerb, Verb};
use crate::early_zygote::EarlyZygote;
use crate::failure::CommandError;
use crate::output::Output;

mod branch;
mod build;
mod cache;
mod cleanup;
mod completions;
mod cp;
mod diff;
mod doctor;
mod eval;
mod exec;
mod fork;
mod fork_text;
mod forward;
mod hub_page;
mod hub_publish;
mod hub_serve;
mod images;
mod inspect;
mod kernel;
mod kill;
mod logs;
mod mount;
mod net;
mod pack;
mod pause;
mod ps;
mod pull;
mod recipe;
mod repack;
mod serve;
mod shell;
mod snapshots;
mod trace;
mod tree;
mod umount;
mod unit;
mod unpack;
mod warm;

/// Runs the command, for which `early` was begun. The exit code is 0 unless the command has one of its own to pass on (`forkd exec`).
pub fn dispatch(verb: Verb, early: Option<EarlyZygote>, output: &Output) -> Result<ExitCode, CommandError> {
    match verb {
        Verb::Completions(args) => completions::run(&args, output),
        Verb::Doctor => doctor::run(output),
        Verb::Kernel(KernelVerb::Build(args)) => kernel::build(&args, output),
        Verb::Kernel(KernelVerb::Path) => kernel::path(output),
        Verb::Build(args) => build::build(&args, output),
        Verb::Recipe(RecipeVerb::Check(args)) => recipe::check(&args, output),
        Verb::Snapshot(args) => build::snapshot(&args, output),
        Verb::Snapshots => snapshots::run(output),
        Verb::Rmi(args) => snapshots::remove(&args, output),
        Verb::Pack(args) => pack::run(&args, output),
        Verb::Unpack(args) => unpack::run(&args, output),
        Verb::Repack(args) => repack::run(&args, output),
        Verb::Inspect(args) => inspect::run(&args, output),
        Verb::Diff(args) => diff::run(&args, output),
        Verb::Hub(HubVerb::Page(args)) => hub_page::run(&args, output),
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
        Verb::Branch(args) => branch::run(&args, output),
        Verb::Warm(args) => warm::run(&args, output),
        Verb::Ps => ps::run(output),
        Verb::Tree => tree::run(output),
        Verb::Exec(args) => exec::run(&args, output),
        Verb::Cp(args) => cp::run(&args, output),
        Verb::Shell(args) => shell::run(&args, output),
        Verb::Eval(args) => eval::run(&args, output),
        Verb::Net(args) => net::run(&args, output),
        Verb::Forward(args) => forward::run(&args, output),
        Verb::Pause(args) => pause::pause(&args, output),
        Verb::Resume(args) => pause::resume(&args, output),
        Verb::Logs(args) => logs::run(&args, output),
        Verb::Kill(args) => kill::run(&args, output),
        Verb::Serve(args) => serve::run(&args, output),
        Verb::Cleanup => cleanup::run(output),
    }
}
