//! Rows of the error table for what runs machines: build, snapshot, fork, and what is done with children.

use super::{Row, packs};
use crate::commands::build::BuildCommandError;
use crate::commands::children::ChildrenError;
use crate::commands::fork::ForkCommandError;
use crate::commands::trace::TraceCommandError;
use crate::commands::warm::WarmCommandError;
use forkd_engine::build::machine::BuildError;
use forkd_engine::fork::source::SourceError;
use forkd_engine::fork::supervisor::ForkError;
use forkd_engine::fork::template::TemplateError;
use forkd_engine::fork::warm::{AddressError, WarmError};
use forkd_engine::local::host::HostError;
use forkd_engine::local::run_dir::RunDirError;
use forkd_engine::network::wire::NetworkError;
use forkd_vmm::kvm::KvmError;
use forkd_vmm::pager::PagerError;
use forkd_vmm::uffd::UffdError;

const DOCTOR: &str = "run `forkd doctor`: it says what this host lacks";

const END_SILENT: &str = "end it with `kill -9 PID` (`ss -xlp` shows whose socket it is); forks of its image go on. Then run `forkd cleanup`";

pub(super) fn fork(error: &ForkCommandError) -> Row {
    let row = Row::failed("fork", "");
    match error {
        ForkCommandError::Kvm(error) => kvm(error),
        ForkCommandError::Spawn(_) | ForkCommandError::Detach(_) => {
            row.hint("check the limits on processes and memory (ulimit -u, ulimit -v)")
        }
        ForkCommandError::Source(error) => source(error),
        ForkCommandError::Template { source, .. } => template(source),
        ForkCommandError::Download { .. } => row.hint("run it again: what was fetched is kept"),
        ForkCommandError::Fork(ForkError::Pager(error)) => pager(error),
        ForkCommandError::Fork(ForkError::NoLimit { .. }) => {
            row.hint("`forkd doctor` says what is missing; without the option there is no limit")
        }
        ForkCommandError::Fork(ForkError::Paths(error)) => super::describe_paths(error),
        ForkCommandError::Picture(_) => picture(),
        ForkCommandError::Variables(_) => Row::usage("give the children their environment", ""),
        ForkCommandError::Fork(ForkError::Network(error)) => network(error),
        ForkCommandError::Fork(_) => row.hint("`forkd cleanup` removes what dead forks left"),
    }
}

pub(super) fn warm(error: &WarmCommandError) -> Row {
    let row = Row::failed("keep the image in memory", "");
    match error {
        WarmCommandError::Warm(WarmError::Paths(error)) => super::describe_paths(error),
        WarmCommandError::Warm(WarmError::Foreign { .. }) => {
            row.hint("set XDG_RUNTIME_DIR to a directory of your own")
        }
        WarmCommandError::Warm(WarmError::Silent { .. }) => row.hint(END_SILENT),
        WarmCommandError::Unanswered { .. } => {
            Row::failed("ask every warm image's process", "").hint(END_SILENT)
        }
        WarmCommandError::Warm(_) => row.hint("`forkd cleanup` removes what dead processes left"),
        WarmCommandError::Detach(_) => {
            row.hint("check the limits on processes and memory (ulimit -u, ulimit -v)")
        }
        WarmCommandError::Source(SourceError::NoSuchPath { .. })
        | WarmCommandError::Address(AddressError::Source(SourceError::NoSuchPath { .. })) => row,
        WarmCommandError::Source(error) | WarmCommandError::Address(AddressError::Source(error)) => {
            source(error)
        }
        WarmCommandError::Template { source, .. } => template(source),
        WarmCommandError::Download { .. } => row.hint("run it again: what was fetched is kept"),
        WarmCommandError::Incomplete { .. } => row.hint("check the free memory of this host"),
        WarmCommandError::Address(AddressError::NotFixed { .. }) => {
            Row::usage("keep the image in memory", "")
        }
        WarmCommandError::NotWarm { .. } => row.hint("`forkd warm --list` shows what is"),
    }
}

pub(super) fn picture() -> Row {
    Row::failed("draw the picture", "").hint("name a file in a directory that exists and can be written to")
}

pub(super) fn kvm(error: &KvmError) -> Row {
    let row = Row::failed("use KVM", "");
    match error {
        KvmError::Open(errno) if errno.errno() == rustix::io::Errno::NOENT.raw_os_error() => row.hint(
            "load the kvm module of this CPU (kvm_intel or kvm_amd), or switch virtualisation on in the firmware; \
             in a virtual machine ask for nested virtualisation",
        ),
        KvmError::Open(errno) if errno.errno() == rustix::io::Errno::ACCESS.raw_os_error() => {
            row.hint("run as root, or join the group that owns /dev/kvm (often `kvm`)")
        }
        _ => row.hint(DOCTOR),
    }
}

fn pager(error: &PagerError) -> Row {
    let row = Row::failed("serve memory lazily", "");
    match error {
        PagerError::Uffd(UffdError::Unavailable(_)) => {
            row.hint("run as root, or give this user access to /dev/userfaultfd; --eager does without")
        }
        _ => row,
    }
}

fn network(error: &NetworkError) -> Row {
    let row = Row::failed("make a network for a child", "");
    match error {
        NetworkError::Full { .. } => row,
        NetworkError::Io { .. } | NetworkError::Netlink(_) => {
            row.hint("run as root, and load the kernel module `tun`; `--net none` does without")
        }
    }
}

fn source(error: &SourceError) -> Row {
    match error {
        SourceError::Reference(error) => packs::reference(error),
        SourceError::NoSuchPath { .. } => Row::failed("fork", ""),
        SourceError::Registry(error) => packs::registry(error),
        SourceError::Open(error) => packs::open(error),
        SourceError::Snapshot(error) => packs::snapshot(error),
    }
}

fn template(error: &TemplateError) -> Row {
    let row = Row::failed("fork", "");
    match error {
        TemplateError::Snapshot(error) => packs::snapshot(error),
        TemplateError::Pager(error) => pager(error),
        TemplateError::Read(error) => packs::read(error),
        TemplateError::Foreign => {
            row.hint("its files can be mounted and unpacked; to fork it, build it again with this forkd")
        }
        TemplateError::Trace(_) | TemplateError::Size { .. } => {
            row.hint("the pack was built wrong; ask its publisher")
        }
        TemplateError::Host(HostError::Kvm(error)) => kvm(error),
        TemplateError::Host(HostError::Features { .. } | HostError::Vendor { .. }) => {
            row.hint("fork it on a host with such a CPU, or build it again on this one")
        }
        TemplateError::Memory(_) => row.hint("check the free memory of this host"),
    }
}

pub(super) fn build(error: &BuildCommandError) -> Row {
    let row = Row::failed("build", "");
    match error {
        BuildCommandError::Recipe(error) => super::describe_recipe(error),
        BuildCommandError::Kvm(error) => kvm(error),
        BuildCommandError::Spawn(_) => {
            row.hint("check the limits on processes and memory (ulimit -u, ulimit -v)")
        }
        BuildCommandError::Snapshot(error) => packs::snapshot(error),
        BuildCommandError::RunDir(RunDirError::Paths(error)) => super::describe_paths(error),
        BuildCommandError::RunDir(_) => row,
        BuildCommandError::Build { source, console, .. } => row.console(console).hint(match source {
            BuildError::NotReady { .. } => "mend the recipe's warm command; nothing was kept",
            BuildError::Probe { .. } => "mend the recipe's probe or its warm command; nothing was kept",
            BuildError::Timeout { .. } => {
                "raise the recipe's readiness timeout if the guest is merely slow; nothing was kept"
            }
            _ => "nothing was kept",
        }),
    }
}

pub(super) fn trace(error: &TraceCommandError) -> Row {
    const WHAT: &str = "record the working set";
    let row = Row::failed(WHAT, "");
    match error {
        TraceCommandError::NoProbe { .. } | TraceCommandError::RecipeWithoutProbe { .. } => {
            row.hint("say what forks are asked with --eval CODE, or name a recipe that does with --recipe")
        }
        TraceCommandError::Foreign => template(&TemplateError::Foreign),
        TraceCommandError::Replaced { .. } => row.hint("run it again: it was left as it is now"),
        TraceCommandError::Build(BuildCommandError::Build { console, .. }) => {
            row.console(console).hint("the working set that was there is kept")
        }
        TraceCommandError::Build(error) => Row { what: WHAT, ..build(error) },
        TraceCommandError::Host(error) => match error {
            HostError::Kvm(error) => kvm(error),
            HostError::Features { .. } | HostError::Vendor { .. } => {
                row.hint("record it on a host with such a CPU")
            }
        },
        TraceCommandError::Snapshot(error) => packs::snapshot(error),
        TraceCommandError::Registry(error) => packs::registry(error),
        TraceCommandError::Open(error) => packs::open(error),
        TraceCommandError::Read(error) => packs::read(error),
        TraceCommandError::Pack(error) => Row { what: WHAT, ..packs::pack(error) },
        TraceCommandError::Workspace(error) => packs::workspace(row, error),
        TraceCommandError::RunDir(RunDirError::Paths(error)) => super::describe_paths(error),
        TraceCommandError::RunDir(_) | TraceCommandError::Unpack(_) | TraceCommandError::Interrupted(_) => {
            row
        }
    }
}

pub(super) fn children(error: &ChildrenError) -> Row {
    let row = Row::failed("ask the child", "");
    match error {
        ChildrenError::RunDir(error) => run_dir(error),
        ChildrenError::Memory { .. } => row.hint("looking into a child's process takes root"),
        ChildrenError::NoImage { .. } => {
            row.hint("was it started by another version of forkd? Look at it with that one")
        }
        ChildrenError::Console { .. } | ChildrenError::Code { .. } => row,
        ChildrenError::NoConsole { .. } => Row::failed("show the console", "").hint(
            "only `forkd build` and `snapshot` of this version keep it; packs do not carry it: see the machine's own with `forkd logs ID`",
        ),
        ChildrenError::Snapshot(error) => packs::snapshot(error),
        ChildrenError::Agent { .. } => {
            row.hint("`forkd ps` says whether it is stalled, `forkd logs` shows its console")
        }
        ChildrenError::Environment { .. } => Row::usage("run the command", ""),
    }
}

pub(super) fn run_dir(error: &RunDirError) -> Row {
    let row = Row::failed("look at running children", "");
    match error {
        RunDirError::Paths(error) => super::describe_paths(error),
        RunDirError::UnknownChild { .. } => {
            Row::failed("find the child", "").hint("`forkd ps` lists those that run")
        }
        RunDirError::Dead { .. } => row.hint("`forkd cleanup` removes what it left"),
        RunDirError::File { .. } | RunDirError::Malformed { .. } | RunDirError::Cgroup(_) => row,
    }
}
