//! Arguments of the commands that deal with packs, hubs, mounts and the cache.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use forkd_engine::hub::release::Repository;

use super::shared::{CacheArgs, HubSource};
use crate::units;

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
    /// Plain bytes per chunk: a power of two from 64 KiB to 4 MiB [default: 256KiB, or that of a delta's base]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    pub chunk: Option<u64>,
    /// zstd level
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    pub level: i32,
    /// Replace FILE when it exists
    #[arg(long)]
    pub force: bool,
    /// Hold only the chunks that a base does not have; the pack is of no use without the base
    #[arg(long)]
    pub delta: bool,
    /// The base: a pack's file, an http(s):// URL, or a name of the hub (owner/name[@version]) [default: of a child's
    /// snapshot, the pack that its fork was of]
    #[arg(long, value_name = "FILE|URL|REF", requires = "delta")]
    pub base: Option<String>,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
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
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
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

/// `forkd diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// What has changed: a local snapshot's tag, a pack's file, an http(s):// URL, or a name of the hub
    #[arg(value_name = "TAG|FILE|URL|REF")]
    pub target: String,
    /// What it was before, named likewise [default: the base of a delta]
    #[arg(value_name = "BASE")]
    pub base: Option<String>,
    /// Draw it chunk by chunk, as an SVG picture
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// `forkd hub`.
#[derive(Debug, Subcommand)]
pub enum HubVerb {
    /// Copy a pack into a hub folder and enter it in its registry.json
    ///
    /// With --github nothing is copied: the entry names the asset of a release, and the command that makes the release
    /// and uploads the pack is printed, not run.
    Publish(PublishArgs),
    /// Write what a hub offers as one HTML file for people
    Page(PageArgs),
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
    /// The repository on GitHub whose release will hold the pack; DIR is then where the repository's registry.json is
    #[arg(long, value_name = "OWNER/REPO")]
    pub github: Option<Repository>,
}

/// `forkd hub page`.
#[derive(Debug, Args)]
pub struct PageArgs {
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The file to write; it is replaced when it exists
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The page's title
    #[arg(long, value_name = "TEXT", default_value = "forkd hub")]
    pub title: String,
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

/// `forkd cache`.
#[derive(Debug, Subcommand)]
pub enum CacheVerb {
    /// Show what the cache holds, and of which packs
    Ls,
    /// Read and check every chunk; damaged ones are put aside and will be fetched again
    Verify,
    /// Remove damaged and unfinished files, the longest unused chunks until the limits hold, and root disks and layers that
    /// no build has used for 30 days
    Gc(CacheGcArgs),
}

/// `forkd cache gc`.
#[derive(Debug, Args)]
pub struct CacheGcArgs {
    /// The limits.
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Remove every chunk, root disk and layer
    #[arg(long)]
    pub all: bool,
}
