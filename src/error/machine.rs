//! Rows for what runs machines: fork, warm, and what is done with children.

use super::packs;
use super::row::{self, Row};
use forkd_engine::cleanup::CleanupError;
use forkd_engine::fork::agent::ClientError;
use forkd_engine::fork::child_snapshot::ChildSnapshotError;
use forkd_engine::fork::children::ChildrenError;
use forkd_engine::fork::copy::{CopyError, UnpackError};
use forkd_engine::fork::forward::ForwardError;
use forkd_engine::fork::forward::publish::PublishError;
use forkd_engine::fork::run::ForkError;
use forkd_engine::fork::supervisor::StartError;
use forkd_engine::fork::template::TemplateError;
use forkd_engine::fork::warm::hold::HoldError;
use forkd_engine::fork::warm::{WarmError, WarmKeyError};
use forkd_engine::local::host::HostError;
use forkd_engine::local::run_dir::RunDirError;
use forkd_engine::network::wire::NetworkError;
use forkd_engine::target::TargetError;
use forkd_vmm::kvm::KvmError;
use forkd_vmm::pager::PagerError;
use forkd_vmm::uffd::UffdError;

const DOCTOR: &str = "run `forkd doctor`: it says what this host lacks";

const END_SILENT: &str = "end it with `kill -9 PID` (`ss -xlp` shows whose socket it is); forks of its image go on. Then run `forkd cleanup`";

const OUTDATED: &str = "build the machine again with this forkd, and fork that";

pub(super) fn fork(error: &ForkError) -> Row {
    let row = Row::failed("fork", "");
    match error {
        ForkError::Kvm(error) => kvm(error),
        ForkError::Runtime(_) => row::threads(),
        ForkError::Target(error) => target(error),
        ForkError::Template { source, .. } => template(source),
        ForkError::Download { .. } => row.hint("run it again: what was fetched is kept"),
        ForkError::Start(StartError::Pager(error)) => pager(error),
        ForkError::Start(StartError::NoLimit { .. }) => {
            row.hint("`forkd doctor` says what is missing; without the option there is no limit")
        }
        ForkError::Start(StartError::Paths(error)) => row::paths(error),
        ForkError::Start(StartError::Network(error)) => network(error),
        ForkError::Start(StartError::Publish(PublishError::Listen(_))) => listen(),
        ForkError::Start(StartError::Publish(PublishError::Thread(_))) => row::threads(),
        ForkError::Start(_) => row.hint("`forkd cleanup` removes what dead forks left"),
    }
}

pub(super) fn warm(error: &HoldError) -> Row {
    const WHAT: &str = "keep the image in memory";
    let row = Row::failed(WHAT, "");
    match error {
        HoldError::Warm(WarmError::Paths(error)) => row::paths(error),
        HoldError::Warm(WarmError::Foreign { .. }) => {
            row.hint("set XDG_RUNTIME_DIR to a directory of your own")
        }
        HoldError::Warm(WarmError::Silent { .. }) => row.hint(END_SILENT),
        HoldError::Unanswered { .. } => Row::failed("ask every warm image's process", "").hint(END_SILENT),
        HoldError::Warm(_) => row.hint("`forkd cleanup` removes what dead processes left"),
        HoldError::Target(TargetError::NoSuchPath { .. })
        | HoldError::Key(WarmKeyError::Target(TargetError::NoSuchPath { .. })) => row,
        HoldError::Target(error) | HoldError::Key(WarmKeyError::Target(error)) => target(error),
        HoldError::Template { source, .. } => template(source),
        HoldError::Download { .. } => row.hint("run it again: what was fetched is kept"),
        HoldError::Incomplete { .. } => row.hint("check the free memory of this host"),
        HoldError::Key(WarmKeyError::NotFixed { .. }) => Row::usage(WHAT, ""),
        HoldError::NotWarm { .. } => row.hint("`forkd warm --list` shows what is"),
    }
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
            row.hint("run as root, and load the kernel module `tun`; `--net nat` and `--net none` do without")
        }
    }
}

fn target(error: &TargetError) -> Row {
    match error {
        TargetError::Reference(error) => packs::reference(error),
        TargetError::NoSuchPath { .. } => Row::failed("fork", ""),
        TargetError::Registry(error) => packs::registry(error),
        TargetError::Open(error) => packs::open(error),
        TargetError::Snapshot(error) => packs::snapshot(error),
    }
}

pub(super) fn template(error: &TemplateError) -> Row {
    let row = Row::failed("fork", "");
    match error {
        TemplateError::Snapshot(error) => packs::snapshot(error),
        TemplateError::Pager(error) => pager(error),
        TemplateError::Read(error) => packs::read(error),
        TemplateError::Base(error) => packs::open(&error.source),
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

pub(super) fn children(error: &ChildrenError) -> Row {
    let row = Row::failed("ask the child", "");
    match error {
        ChildrenError::RunDir(error) => row::run_dir(error),
        ChildrenError::Paused { .. } => row.hint("`forkd resume ID` lets it go on"),
        ChildrenError::Memory { .. } => row.hint("looking into a child's process takes root"),
        ChildrenError::NoImage { .. } => {
            row.hint("was it started by another version of forkd? Look at it with that one")
        }
        ChildrenError::Console { .. } | ChildrenError::Code { .. } => row,
        ChildrenError::NoGateway { .. } => Row::failed("look at the network", "")
            .hint("`forkd ps --json` shows what network it has; fork with --net nat for a way out"),
        ChildrenError::NoConsole { .. } => Row::failed("show the console", "").hint(
            "only `forkd build` and `snapshot` of this version keep it; packs do not carry it: see the machine's own with `forkd logs ID`",
        ),
        ChildrenError::Snapshot(error) => packs::snapshot(error),
        ChildrenError::Agent { source: ClientError::NotStarted { code, .. }, .. } => {
            Row { exit: *code, ..Row::failed("run the command", "") }
        }
        ChildrenError::Agent { source: ClientError::Outdated, .. } => row.hint(OUTDATED),
        ChildrenError::Agent { source: ClientError::Agent { .. }, .. } => row,
        ChildrenError::Agent { .. } => {
            row.hint("`forkd ps` says whether it is stalled, `forkd logs` shows its console")
        }
    }
}

pub(super) fn child_snapshot(error: &ChildSnapshotError) -> Row {
    let row = Row::failed("take the snapshot", "");
    match error {
        ChildSnapshotError::Children(ChildrenError::RunDir(RunDirError::Refused { .. })) => {
            row.hint("nothing was kept, and the child is as it was")
        }
        ChildSnapshotError::Children(error) => children(error),
        ChildSnapshotError::Snapshot(error) => packs::snapshot(error),
        ChildSnapshotError::Interrupted(_) => row,
    }
}

pub(super) fn forward(error: &ForwardError) -> Row {
    match error {
        ForwardError::Children(error) => children(error),
        ForwardError::Listen(_) => listen(),
        ForwardError::Process { .. } => {
            Row::failed("watch", "").hint("`forkd ps` says whether the child lives")
        }
    }
}

/// A port of the host cannot be had.
fn listen() -> Row {
    Row::failed("listen", "").hint("name another LOCAL port, or none: then any free one is taken and printed")
}

pub(super) fn copy(error: &CopyError) -> Row {
    let row = Row::failed("copy", "");
    match error {
        CopyError::Client(ClientError::Outdated) => row.hint(OUTDATED),
        CopyError::Unpack(UnpackError::Name { .. } | UnpackError::Kind { .. }) => {
            row.hint("what came before it was copied; `forkd cp ID:/PATH -` shows the archive as it is")
        }
        CopyError::Name { .. } => {
            row.hint("give the directory that it is in, or the archive: `tar -c NAME | forkd cp - ID:/DIR`")
        }
        _ => row,
    }
}

pub(super) fn cleanup(error: &CleanupError) -> Row {
    match error {
        CleanupError::Paths(error) => row::paths(error),
        CleanupError::RunDir(error) => row::run_dir(error),
        CleanupError::Mounts(error) => packs::mounts(error),
        CleanupError::Snapshot(error) => packs::snapshot(error),
    }
}
