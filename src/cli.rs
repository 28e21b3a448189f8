//! The command line: every verb and flag of DESIGN section 9. The only file that uses clap.
//!
//! Commands receive the plain structs below; they never see clap's types.
#![allow(rustdoc::broken_intra_doc_links, reason = "help texts have brackets that are no links")]

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use forkd_fs::cache::CacheOptions;

use crate::units;

mod copies;

pub use copies::{EvalArgs, ExecArgs, ForkArgs, KillArgs, LogsArgs, WarmArgs};

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
    /// Boot a root disk and snapshot it, without a recipe
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
    Fork(ForkArgs),
    /// Keep a snapshot's image in memory, so that forks of it start at once
    Warm(WarmArgs),
    /// List running children
    Ps,
    /// Run a command in a running child
    Exec(ExecArgs),
    /// Evaluate code in a running child's warm worker
    Eval(EvalArgs),
    /// Print a child's console, or a snapshot's: what its machine printed while it was built
    Logs(LogsArgs),
    /// Stop running children
    Kill(KillArgs),
    /// Remove what dead processes left: mounts, sockets, temporary files and directories
    Cleanup,
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// Which hub to ask.
#[derive(Debug, Clone, Args)]
pub struct HubSource {
    /// The hub: URL (http, https, file) or path of a registry.json or of its folder
    ///
    /// Without it, ./registry.json in the working directory is used when there is one.
    #[arg(long, value_name = "URL", env = "FORKD_HUB_URL")]
    pub hub: Option<String>,
}

/// How much disk the chunk cache may take.
#[derive(Debug, Clone, Args)]
pub struct CacheArgs {
    /// The most the chunk cache may hold on disk
    #[arg(long, value_name = "SIZE", default_value = "10GiB", value_parser = units::parse_size)]
    pub cache_size: u64,
    /// Disk space the cache leaves to others; it shrinks rather than take it [default: 5% of the disk, 1GiB at most]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    pub cache_reserve: Option<u64>,
}

impl CacheArgs {
    /// As the cache takes them.
    pub fn options(&self) -> CacheOptions {
        CacheOptions { max_bytes: self.cache_size, min_free_bytes: self.cache_reserve }
    }
}

/// `forkd cache`.
#[derive(Debug, Subcommand)]
pub enum CacheVerb {
    /// Show what the cache holds, and of which packs
    Ls,
    /// Read and check every chunk; damaged ones are put aside and will be fetched again
    Verify,
    /// Remove damaged and unfinished files, and the longest unused chunks until the limits hold
    Gc(CacheGcArgs),
}

/// `forkd cache gc`.
#[derive(Debug, Args)]
pub struct CacheGcArgs {
    /// The limits.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Remove every chunk
    #[arg(long)]
    pub all: bool,
}

/// `forkd kernel`.
#[derive(Debug, Subcommand)]
pub enum KernelVerb {
    /// Build vmlinux from the distribution's kernel source; cached by configuration and source
    Build(KernelBuildArgs),
    /// Print the path of the kernel that was built
    Path,
}

/// `forkd kernel build`.
#[derive(Debug, Args)]
pub struct KernelBuildArgs {
    /// An unpacked kernel source tree to use instead of the distribution's package
    #[arg(long, value_name = "DIR")]
    pub source: Option<PathBuf>,
    /// Compiler processes at a time [default: the number of CPUs]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub jobs: Option<u32>,
    /// Build even when a kernel of this configuration is cached
    #[arg(long)]
    pub force: bool,
}

/// `forkd build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The recipe: a folder with recipe.toml, or that file
    pub recipe: PathBuf,
    /// The snapshot's name [default: the recipe's name]
    #[arg(long)]
    pub tag: Option<String>,
    /// A guest kernel (vmlinux) to use instead of the one `forkd kernel build` made
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Replace a snapshot of that name
    #[arg(long)]
    pub force: bool,
}

/// `forkd snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The snapshot's name
    #[arg(long)]
    pub tag: String,
    /// The guest kernel: a vmlinux, or a bzImage as distributions ship it
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// An initramfs for it, whose /init makes the root disk (/dev/pmem0) the root and executes /forkd/agent
    ///
    /// Kernels whose drivers are modules need one; the kernel of `forkd kernel build` does not.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The root disk, an EROFS image
    #[arg(long, value_name = "FILE")]
    pub rootfs: PathBuf,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, visible_alias = "mem-size-mib",
          value_parser = clap::value_parser!(u32).range(64..=16_384))]
    pub memory: u32,
    /// Guest CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub vcpus: u32,
    /// Size of each copy's empty scratch disk (/dev/vda) in MiB; 0 for none
    #[arg(long, value_name = "MIB", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=65_536))]
    pub scratch: u32,
    /// Give the machine a second console, /dev/hvc0, with the serial port's output
    #[arg(long)]
    pub second_console: bool,
    /// The command to start before the snapshot; it prints {"ready":true} when warm
    #[arg(long, value_name = "CMD")]
    pub warm: Option<String>,
    /// Replace a snapshot of that name
    #[arg(long)]
    pub force: bool,
}

/// `forkd rmi`.
#[derive(Debug, Args)]
pub struct RmiArgs {
    /// The snapshots to remove
    #[arg(required = true, value_name = "TAG")]
    pub tags: Vec<String>,
}

/// `forkd pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// The local snapshot to pack
    #[arg(long)]
    pub tag: String,
    /// The pack to write, by convention NAME.forkd-snapshot.tar.zst
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// One line about what it is, shown by `forkd images`
    #[arg(long, default_value = "")]
    pub description: String,
    /// What the root disk was made from, for the record
    #[arg(long, value_name = "NAME", default_value = "")]
    pub base_image: String,
    /// Plain bytes per chunk: a power of two from 64 KiB to 4 MiB
    #[arg(long, value_name = "SIZE", default_value = "256KiB", value_parser = units::parse_size)]
    pub chunk: u64,
    /// zstd level
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    pub level: i32,
    /// Replace FILE when it exists
    #[arg(long)]
    pub force: bool,
}

/// `forkd unpack`.
#[derive(Debug, Args)]
pub struct UnpackArgs {
    /// The pack, of any format version
    pub file: PathBuf,
    /// The snapshot's name [default: the one in the pack's manifest]
    #[arg(long)]
    pub tag: Option<String>,
    /// Replace a snapshot of that name
    #[arg(long)]
    pub force: bool,
}

/// `forkd repack`.
#[derive(Debug, Args)]
pub struct RepackArgs {
    /// A pack of any format version: a file, an http(s):// URL, or a name of the hub (owner/name[@version])
    #[arg(value_name = "FILE|URL|REF")]
    pub target: String,
    /// The pack to write, by convention NAME.forkd-snapshot.tar.zst
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Plain bytes per chunk: a power of two from 64 KiB to 4 MiB
    #[arg(long, value_name = "SIZE", default_value = "256KiB", value_parser = units::parse_size)]
    pub chunk: u64,
    /// zstd level
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    pub level: i32,
    /// Replace FILE when it exists
    #[arg(long)]
    pub force: bool,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// `forkd trace`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["target", "tag"]))]
pub struct TraceArgs {
    /// A pack, of which --out becomes a copy with the new working set: a file, an http(s):// URL, or a name of the hub
    #[arg(value_name = "FILE|URL|REF", requires = "out")]
    pub target: Option<String>,
    /// A local snapshot, whose working set is replaced
    #[arg(long)]
    pub tag: Option<String>,
    /// What forks are asked while it is recorded [default: the probe that the snapshot was built with]
    #[arg(long, value_name = "CODE", conflicts_with = "recipe")]
    pub eval: Option<String>,
    /// Take the probe of this recipe: a folder with recipe.toml, or that file
    #[arg(long, value_name = "RECIPE")]
    pub recipe: Option<PathBuf>,
    /// The new pack, by convention NAME.forkd-snapshot.tar.zst
    #[arg(short, long, value_name = "FILE", conflicts_with = "tag")]
    pub out: Option<PathBuf>,
    /// zstd level of the new pack
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    pub level: i32,
    /// Replace the new pack's file when it exists
    #[arg(long)]
    pub force: bool,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// `forkd inspect`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["target", "child"]))]
pub struct InspectArgs {
    /// A pack: a file, an http(s):// URL, or a name of the hub (owner/name[@version])
    #[arg(value_name = "FILE|URL|REF")]
    pub target: Option<String>,
    /// A running child instead, as `forkd ps` names it: what of its memory is its own
    #[arg(long, value_name = "ID")]
    pub child: Option<String>,
    /// Draw the images chunk by chunk, as an SVG picture: zero, working set, fetched; of a child what is dirty
    #[arg(long, value_name = "FILE")]
    pub heatmap: Option<PathBuf>,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
}

/// `forkd hub`.
#[derive(Debug, Subcommand)]
pub enum HubVerb {
    /// Copy a pack into a hub folder and enter it in its registry.json
    Publish(PublishArgs),
    /// Serve a hub folder over HTTP with byte ranges
    ///
    /// Only registry.json and packs are served. --rtt delays the first answer on a connection by one round trip for
    /// the handshake, and every request by one more; --bandwidth is one link shared by all connections.
    Serve(ServeArgs),
}

/// `forkd hub publish`.
#[derive(Debug, Args)]
pub struct PublishArgs {
    /// The pack to publish
    pub pack: PathBuf,
    /// The hub's folder; created when missing
    #[arg(long, value_name = "DIR")]
    pub hub: PathBuf,
    /// The package: owner/name
    #[arg(long, value_name = "OWNER/NAME")]
    pub name: String,
    /// The version [default: the next vN]; a published version is never rewritten
    #[arg(long, value_name = "VERSION")]
    pub version: Option<String>,
    /// The recipe that produced it, for the record
    #[arg(long, value_name = "PATH")]
    pub recipe_path: Option<String>,
}

/// `forkd hub serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The hub's folder
    pub dir: PathBuf,
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8717")]
    pub listen: std::net::SocketAddr,
    /// Simulated round-trip time
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = units::parse_duration)]
    pub rtt: Duration,
    /// Simulated bandwidth of the link all connections share, bytes per second [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = units::parse_rate)]
    pub bandwidth: Option<u64>,
    /// Append one line per request to this file
    #[arg(long, value_name = "FILE")]
    pub access_log: Option<PathBuf>,
}

/// `forkd pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The package: owner/name[@version]
    #[arg(value_name = "REF")]
    pub reference: String,
    /// The snapshot's name [default: the package's name]
    #[arg(long)]
    pub tag: Option<String>,
    /// Replace a snapshot of that name
    #[arg(long)]
    pub force: bool,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// `forkd images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// List the hub's packages instead of the local snapshots; takes the hub as `forkd mount` does
    #[arg(long, value_name = "URL", num_args = 0..=1, require_equals = false)]
    pub hub: Option<Option<String>>,
}

/// `forkd mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// The mountpoint: an empty directory
    pub dir: PathBuf,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// How long a read may be retried before the reader gets an I/O error
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::parse_duration)]
    pub deadline: Duration,
    /// How often to look for new versions in the registry; 0 never looks again
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_duration)]
    pub refresh: Duration,
    /// Stay in the foreground and log to stderr
    #[arg(long)]
    pub foreground: bool,
    /// Set by `forkd mount` on the daemon it starts: report on the inherited stdout pipe.
    #[arg(long, hide = true)]
    pub daemon: bool,
}

/// `forkd umount`.
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// The mountpoint
    pub dir: PathBuf,
    /// Detach now even when files are open; they stay readable until closed
    #[arg(long)]
    pub lazy: bool,
    /// Set by `forkd mount` on the watcher it starts: wait until stdin ends, then detach the mount if it is dead.
    #[arg(long, hide = true, conflicts_with = "lazy")]
    pub watch: bool,
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
    Invocation::try_parse_from(arguments).map_err(Stop)
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
        ] {
            assert!(parsed(bad).is_err(), "{bad:?} was taken");
        }
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
