//! Arguments of the commands that make kernels, snapshots and traces.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::shared::{CacheArgs, HubSource};

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

/// `forkd recipe`.
#[derive(Debug, Subcommand)]
pub enum RecipeVerb {
    /// Say whether recipes make sense, with the line and the key of what does not
    Check(RecipeCheckArgs),
}

/// `forkd recipe check`.
#[derive(Debug, Args)]
pub struct RecipeCheckArgs {
    /// Recipes: folders with recipe.toml, or those files
    #[arg(required = true, value_name = "RECIPE")]
    pub recipes: Vec<PathBuf>,
}

/// `forkd snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// The snapshot's name
    #[arg(long)]
    pub tag: String,
    /// A running child, as `forkd ps` names it: what it has changed is kept, and it goes on
    #[arg(long, value_name = "ID")]
    pub child: Option<String>,
    /// The guest kernel: a vmlinux, or a bzImage as distributions ship it
    #[arg(long, value_name = "FILE", required_unless_present = "child", conflicts_with = "child")]
    pub kernel: Option<PathBuf>,
    /// An initramfs for it, whose /init makes the root disk (/dev/pmem0) the root and executes /forkd/agent
    ///
    /// Kernels whose drivers are modules need one; the kernel of `forkd kernel build` does not.
    #[arg(long, value_name = "FILE", conflicts_with = "child")]
    pub initrd: Option<PathBuf>,
    /// The root disk, an EROFS image
    #[arg(long, value_name = "FILE", required_unless_present = "child", conflicts_with = "child")]
    pub rootfs: Option<PathBuf>,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, visible_alias = "mem-size-mib", conflicts_with = "child",
          value_parser = clap::value_parser!(u32).range(64..=16_384))]
    pub memory: u32,
    /// Guest CPUs
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "child",
          value_parser = clap::value_parser!(u32).range(1..=8))]
    pub vcpus: u32,
    /// Size of each copy's empty scratch disk (/dev/vda) in MiB; 0 for none
    #[arg(long, value_name = "MIB", default_value_t = 0, conflicts_with = "child",
          value_parser = clap::value_parser!(u32).range(0..=65_536))]
    pub scratch: u32,
    /// Give the machine a second console, /dev/hvc0, with the serial port's output
    #[arg(long, conflicts_with = "child")]
    pub second_console: bool,
    /// The command to start before the snapshot; it prints {"ready":true} when warm
    #[arg(long, value_name = "CMD", conflicts_with = "child")]
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
