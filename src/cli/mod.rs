//! The command line: every verb and flag. Nothing else uses clap.
//!
//! Commands receive the plain structs below; they never see clap's types.
#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets that are no links")]

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

mod builds;
mod copies;
mod daemon;
mod doors;
mod network;
mod packs;
mod ports;
mod shared;

pub use builds::{
    BuildArgs, KernelBuildArgs, KernelVerb, RecipeCheckArgs, RecipeVerb, RmiArgs, SnapshotArgs, TraceArgs,
};
pub use copies::{BranchArgs, EvalArgs, ForkArgs, KillArgs, LogsArgs, WarmArgs};
pub use daemon::DaemonArgs;
pub use doors::{CommandArgs, CpArgs, ExecArgs, ShellArgs};
pub use network::{NetArgs, NetworkArgs};
pub use packs::{
    CacheGcArgs, CacheVerb, DiffArgs, HubVerb, ImagesArgs, InspectArgs, MountArgs, PackArgs, PageArgs,
    PublishArgs, PullArgs, RepackArgs, ServeArgs, UmountArgs, UnpackArgs,
};
pub use ports::{ChildrenArgs, ForwardArgs, PauseArgs};
pub use shared::{CacheArgs, HubSource};

/// A parsed command line.
#[derive(Debug, Parser)]
#[command(
    name = "forkd",
    version,
    about = "Starts copies of already-running Linux machines from packs it has not finished downloading",
    after_long_help = "Examples:\n  \
        forkd mount /mnt/forkd --hub http://127.0.0.1:8717/\n  \
        forkd fork deeplethe/python-numpy -n 3 --eval 'numpy.zeros(5).tolist()'\n  \
        forkd inspect deeplethe/python-numpy\n\n\
        Exit status: 0 done, 1 failed, 2 wrong usage.\n\n\
        Environment: FORKD_HUB_URL (the hub), FORKD_LOG (log filter), NO_COLOR (plain log lines), XDG_DATA_HOME, XDG_CACHE_HOME, \
        XDG_RUNTIME_DIR (where snapshots, chunks and run state live).",
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
pub struct Invocation {
    /// Print one JSON document on stdout instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more to stderr (repeat for debug and trace)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Every verb.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Check this machine: KVM, userfaultfd, FUSE, kernel source, disk space
    Doctor,
    /// Build the guest kernel, or say where it is
    #[command(subcommand)]
    Kernel(KernelVerb),
    /// Build a recipe: root disk, boot, warm up, probe, snapshot
    Build(BuildArgs),
    /// Check a recipe without building it
    #[command(subcommand)]
    Recipe(RecipeVerb),
    /// Keep a running child as a local snapshot, or boot a root disk and snapshot it, without a recipe
    Snapshot(SnapshotArgs),
    /// List local snapshots
    Snapshots,
    /// Remove local snapshots
    Rmi(RmiArgs),
    /// Pack a local snapshot into one file
    Pack(PackArgs),
    /// Unpack a pack into a local snapshot
    Unpack(UnpackArgs),
    /// Turn a pack of any format version into one of this version
    Repack(RepackArgs),
    /// Record anew which pages a fork touches, which are fetched first
    Trace(TraceArgs),
    /// Show what is in a pack without downloading it
    Inspect(InspectArgs),
    /// Compare two machines: what differs of memory, saved state and disks
    Diff(DiffArgs),
    /// Publish packs and serve them
    #[command(subcommand)]
    Hub(HubVerb),
    /// Download a pack completely into a local snapshot
    Pull(PullArgs),
    /// List the packages of the hub and the local snapshots
    Images(ImagesArgs),
    /// Mount the hub's packs as files, read on demand
    Mount(MountArgs),
    /// Unmount what `forkd mount` mounted
    Umount(UmountArgs),
    /// Look after the chunk cache
    #[command(subcommand)]
    Cache(CacheVerb),
    /// Start copies of a snapshot
    Fork(Box<ForkArgs>),
    /// Start children that go on from where a running child is, which goes on itself
    Branch(BranchArgs),
    /// Keep a snapshot's image in memory, so that forks of it start at once
    Warm(WarmArgs),
    /// List running children
    Ps,
    /// Draw what comes from what: packs and snapshots, forks, children, branches, snapshots of children
    Tree,
    /// Run a command in a running child
    Exec(ExecArgs),
    /// Open a shell in a running child
    Shell(ShellArgs),
    /// Copy files into a running child or out of it
    Cp(CpArgs),
    /// Evaluate code in a running child's warm worker
    Eval(EvalArgs),
    /// Show what a child of `--net nat` sent, received and was refused
    Net(NetworkArgs),
    /// Reach TCP ports of children from this host; they need no network for it
    Forward(ForwardArgs),
    /// Stop children where they stand: they keep their memory and take no processor time
    Pause(PauseArgs),
    /// Let paused children go on
    Resume(ChildrenArgs),
    /// Print a child's console, or a snapshot's: what its machine printed while it was built
    Logs(LogsArgs),
    /// Stop running children
    Kill(KillArgs),
    /// Serve sandboxes over REST: a daemon for programs that want many of them
    Serve(Box<DaemonArgs>),
    /// Remove what dead processes left: mounts, sockets, temporary files and directories
    Cleanup,
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// `forkd completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// bash, zsh, fish, elvish or powershell
    pub shell: clap_complete::Shell,
}

/// Why parsing ended without a command to run: help was asked for, or the usage was wrong.
#[derive(Debug)]
pub struct Stop(clap::Error);

impl Stop {
    /// Prints the help (stdout, exit 0) or the complaint (stderr, exit 2).
    pub fn print(&self) -> ExitCode {
        let _ = self.0.print();
        ExitCode::from(u8::try_from(self.0.exit_code()).unwrap_or(2))
    }
}

/// Parses a command line, the program's name first.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, Stop> {
    let invocation = Invocation::try_parse_from(arguments).map_err(Stop)?;
    match &invocation.verb {
        Verb::Forward(forward) => match forward.lacks() {
            Some(what) => Err(wrong_usage("forward", what)),
            None => Ok(invocation),
        },
        _ => Ok(invocation),
    }
}

/// What clap would say, had it seen what is missing.
fn wrong_usage(verb: &str, what: &str) -> Stop {
    let mut command = Invocation::command();
    command.build();
    let kind = ErrorKind::MissingRequiredArgument;
    Stop(match command.find_subcommand_mut(verb) {
        Some(verb) => verb.error(kind, what),
        None => command.error(kind, what),
    })
}

/// The completion script for a shell.
pub fn completion_script(arguments: &CompletionsArgs) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Invocation::command(), "forkd", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> Result<Invocation, Stop> {
        parse(std::iter::once("forkd").chain(line.iter().copied()).map(OsString::from))
    }

    #[test]
    fn the_definition_is_consistent() {
        Invocation::command().debug_assert();
    }

    #[test]
    fn fork_takes_a_reference_or_a_tag_and_eval_or_exec() {
        let invocation = parsed(&["fork", "o/n", "-n", "3", "--exec", "--", "ls", "-l"]).unwrap();
        let Verb::Fork(fork) = invocation.verb else { panic!("not fork") };
        assert_eq!((fork.count, fork.command), (3, vec!["ls".to_owned(), "-l".to_owned()]));
        for bad in [
            &["fork"][..],
            &["fork", "o/n", "--tag", "t"],
            &["fork", "o/n", "-n", "0"],
            &["fork", "o/n", "-n", "10000"],
            &["fork", "o/n", "--exec"],
            &["fork", "o/n", "--env", "A"],
            &["fork", "o/n", "--vary", "=a,b"],
            &["fork", "o/n", "--net", "everything"],
            &["fork", "o/n", "--eval", "1", "--exec", "--", "ls"],
            &["kill"],
            &["kill", "--all", "a"],
            &["logs"],
            &["logs", "a-1", "--tag", "t"],
            &["fork", "o/n", "--net", "nat", "--allow", "10.0.0.1/8"],
            &["fork", "o/n", "--net", "nat", "--dns", "a"],
            &["fork", "o/n", "--net", "nat", "--net-rate", "fast"],
            &["net"],
            &["fork", "o/n", "--publish", "53/udp"],
            &["fork", "o/n", "--on-timeout", "pause"],
            &["fork", "o/n", "--timeout", "5"],
            &["forward", "a1b2c3-1"],
            &["forward", "a1b2c3-1", "a1b2c3-2"],
            &["forward", "80", "81"],
            &["forward", "a1b2c3-1", "53/udp"],
            &["pause"],
            &["resume", "--all", "a1b2c3"],
            &["snapshot", "--tag", "t"],
            &["snapshot", "--tag", "t", "--kernel", "k"],
            &["snapshot", "--tag", "t", "--child", "a-1", "--kernel", "k", "--rootfs", "r"],
            &["snapshot", "--child", "a-1"],
            &["serve", "--listen", "unix:"],
            &["serve", "--listen", "localhost"],
            &["serve", "--tls-cert", "c.pem"],
            &["serve", "--max-sandboxes", "0"],
        ] {
            assert!(parsed(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn forward_tells_children_from_ports() {
        let Verb::Forward(forward) =
            parsed(&["forward", "a1b2c3-1", "123456", "80", "5432:15432"]).unwrap().verb
        else {
            panic!("not forward")
        };
        assert_eq!(forward.names(), ["a1b2c3-1", "123456"]);
        let ports: Vec<_> = forward.ports().iter().map(|map| (map.guest, map.local)).collect();
        assert_eq!(ports, [(80, 0), (5432, 15432)]);
    }

    #[test]
    fn images_takes_hub_with_and_without_a_value() {
        let hub = |line: &[&str]| match parsed(line).unwrap().verb {
            Verb::Images(images) => images.hub,
            other => panic!("not images: {other:?}"),
        };
        assert_eq!(hub(&["images"]), None);
        assert_eq!(hub(&["images", "--hub"]), Some(None));
        assert_eq!(hub(&["images", "--hub", "/srv"]), Some(Some("/srv".to_owned())));
    }
}
