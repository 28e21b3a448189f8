//! Rows for what makes kernels, snapshots and traces.

use super::machine::{kvm, template};
use super::packs;
use super::row::{self, LIMITS, Row};
use forkd_engine::build::kernel::KernelError;
use forkd_engine::build::machine::BuildError;
use forkd_engine::build::recipe::RecipeError;
use forkd_engine::build::snapshot::SnapshotBuildError;
use forkd_engine::build::trace::RetraceError;
use forkd_engine::fork::template::TemplateError;
use forkd_engine::local::host::HostError;
use forkd_engine::local::run_dir::RunDirError;

fn recipe(error: &RecipeError) -> Row {
    let row = Row::failed("build the root disk", "");
    match error {
        RecipeError::NotARecipe { .. } => {
            Row::usage("read the recipe", "").hint("give a folder with a recipe.toml, such as recipes/python-numpy")
        }
        RecipeError::Syntax { .. } | RecipeError::Invalid { .. } => {
            Row::usage("read the recipe", "").hint("docs/RECIPES.md explains every key")
        }
        RecipeError::NotRoot => row.hint("run it with sudo, or give a root disk to `forkd snapshot --rootfs`"),
        RecipeError::Missing { packages } => row.hint(format!("as root: apt-get install {}", packages.join(" "))),
        RecipeError::NoAgent { .. } | RecipeError::BadAgent { .. } => row.hint(
            "build it with `make agent` (a static program for x86_64-unknown-linux-gnu), or name one in FORKD_AGENT",
        ),
        RecipeError::Lacks { .. } => row.hint("mend the recipe; what was finished before is kept"),
        RecipeError::Tool { .. } => row.hint("what was finished before is kept: a second build goes on from there"),
        RecipeError::File { .. } => row,
    }
}

pub(super) fn kernel(error: &KernelError) -> Row {
    let row = Row::failed("provide a guest kernel", "");
    match error {
        KernelError::NotBuilt { .. } => {
            row.hint("run `forkd kernel build` (about 5 minutes), or give one with --kernel FILE")
        }
        KernelError::Missing { packages } => {
            row.hint(format!("as root: apt-get install {}", packages.join(" ")))
        }
        KernelError::NoSource { .. } => {
            row.hint("as root: apt-get install linux-source-6.12, or give a source tree with --source DIR")
        }
        KernelError::NotASource { .. } => Row::usage("provide a guest kernel", "")
            .hint("give the top of an unpacked kernel source: it has Makefile, Kconfig and arch/"),
        KernelError::Space { .. } => row.hint("free some space, or set XDG_CACHE_HOME to a larger disk"),
        KernelError::Options { .. } => row.hint("use the source of Linux 6.12 or later"),
        KernelError::Tool { .. } | KernelError::Build { .. } | KernelError::File { .. } => row,
    }
}

pub(super) fn build(error: &SnapshotBuildError) -> Row {
    let row = Row::failed("build", "");
    match error {
        SnapshotBuildError::Kernel(error) => kernel(error),
        SnapshotBuildError::Recipe(error) => recipe(error),
        SnapshotBuildError::Kvm(error) => kvm(error),
        SnapshotBuildError::Spawn(_) => row.hint(LIMITS),
        SnapshotBuildError::Snapshot(error) => packs::snapshot(error),
        SnapshotBuildError::RunDir(RunDirError::Paths(error)) => row::paths(error),
        SnapshotBuildError::RunDir(_) => row,
        SnapshotBuildError::Build { source, console, .. } => row.console(console).hint(match source {
            BuildError::NotReady { .. } => "mend the recipe's service or warm command; nothing was kept",
            BuildError::Rehearsal { .. } => "mend the recipe's [rehearse] or what it asks; nothing was kept",
            BuildError::Probe { .. } => "mend the recipe's probe or its warm command; nothing was kept",
            BuildError::Timeout { .. } => {
                "raise the recipe's readiness timeout if the guest is merely slow; nothing was kept"
            }
            _ => "nothing was kept",
        }),
    }
}

pub(super) fn trace(error: &RetraceError) -> Row {
    const WHAT: &str = "record the working set";
    let row = Row::failed(WHAT, "");
    match error {
        RetraceError::NoProbe { .. } | RetraceError::RecipeWithoutProbe { .. } => {
            row.hint("say what forks are asked with --eval CODE, or name a recipe that does with --recipe")
        }
        RetraceError::Foreign => template(&TemplateError::Foreign),
        RetraceError::Replaced { .. } => row.hint("run it again: it was left as it is now"),
        RetraceError::Build(SnapshotBuildError::Build { console, .. }) => {
            row.console(console).hint("the working set that was there is kept")
        }
        RetraceError::Build(error) => Row { what: WHAT, ..build(error) },
        RetraceError::Host(error) => match error {
            HostError::Kvm(error) => kvm(error),
            HostError::Features { .. } | HostError::Vendor { .. } => {
                row.hint("record it on a host with such a CPU")
            }
        },
        RetraceError::Snapshot(error) => packs::snapshot(error),
        RetraceError::Registry(error) => packs::registry(error),
        RetraceError::Open(error) => packs::open(error),
        RetraceError::Read(error) => packs::read(error),
        RetraceError::Whole(error) => packs::whole(row, error),
        RetraceError::Pack(error) => Row { what: WHAT, ..packs::pack(error) },
        RetraceError::Workspace(error) => packs::workspace(row, error),
        RetraceError::RunDir(RunDirError::Paths(error)) => row::paths(error),
        RetraceError::RunDir(_) | RetraceError::Unpack(_) | RetraceError::Interrupted(_) => row,
    }
}
