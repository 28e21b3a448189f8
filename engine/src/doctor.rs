//! What this machine has of what forkd needs, and how to mend what it lacks.

use crate::build::{kernel, recipe, tools};
use crate::chain::chain;
use crate::local::paths::Paths;
use crate::picture::sizes::show_size;
use forkd_vmm::cgroup::Groups;
use forkd_vmm::jail::{self, Isolation};
use forkd_vmm::kvm::{Hypervisor, KvmKind};
use forkd_vmm::uffd::Uffd;
use serde::Serialize;
use std::path::Path;

/// Free space below which a build or a full pull is likely to fail, bytes.
const SPACE_WANTED: u64 = 6 << 30;
/// Programs that `forkd build` runs, and the Debian package of each.
const BUILD_TOOLS: [(&str, &str); 2] = [("mmdebstrap", "mmdebstrap"), ("mkfs.erofs", "erofs-utils")];

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All that is needed.
    Pass,
    /// Something works less well, or not for everybody.
    Warn,
    /// Forking or mounting cannot work.
    Fail,
}

/// One thing that was looked at, as `forkd doctor --json` shows it.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What is there, or is not.
    pub found: String,
    /// What helps.
    pub mend: Option<String>,
}

impl Check {
    fn pass(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Pass, found: found.into(), mend: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Warn, found: found.into(), mend: Some(mend.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Check {
        Check { verdict: Verdict::Fail, ..Check::warn(name, found, mend) }
    }
}

/// Looks at this machine.
pub fn checks(paths: &Paths) -> Vec<Check> {
    let mut checks = vec![kvm(), userfaultfd(), jail(), limits(), fuse(), guest_kernel(paths), agent()];
    checks.extend(BUILD_TOOLS.map(|(program, package)| build_tool(program, package)));
    checks.push(space("data", &paths.data));
    checks.push(space("cache", &paths.cache));
    checks
}

fn kvm() -> Check {
    let kind = KvmKind::detect();
    let mend =
        "load kvm_intel or kvm_amd, switch virtualisation on in the firmware, and open /dev/kvm to this user";
    match Hypervisor::open(kind) {
        Ok(_) if kind == KvmKind::Pvm => {
            let found = "kvm_pvm: works without VMX or SVM; guest kernel code is emulated and slow";
            Check::pass("kvm", found)
        }
        Ok(_) => Check::pass("kvm", "hardware virtualisation"),
        Err(error) => Check::fail("kvm", chain(&error), mend),
    }
}

fn userfaultfd() -> Check {
    match Uffd::new() {
        Ok(_) => Check::pass("userfaultfd", "works, for faults of KVM too"),
        Err(error) => Check::fail(
            "userfaultfd",
            chain(&error),
            "run as root or open /dev/userfaultfd to this user; without it only `forkd fork --eager` and --tag work",
        ),
    }
}

fn jail() -> Check {
    let name = "jail";
    match jail::try_out() {
        Ok(Isolation::Privileged) => {
            Check::pass(name, "each child: own user, namespaces, system call filter")
        }
        Ok(Isolation::UserNamespace) => {
            Check::pass(name, "each child: own namespaces and system call filter, in a user namespace")
        }
        Ok(Isolation::None) => Check::warn(
            name,
            "children have a system call filter and no namespaces",
            "run as root, or allow user namespaces (sysctl user.max_user_namespaces, \
             kernel.apparmor_restrict_unprivileged_userns)",
        ),
        Err(error) => Check::fail(name, chain(&error), "run as root on Linux 5.10 or later"),
    }
}

fn limits() -> Check {
    let name = "cgroup limits";
    let mend = "children have no limits but their guest's size; boot with cgroup version 2 (on systemd: \
                systemd.unified_cgroup_hierarchy=1), or run forkd by \
                `systemd-run --user --scope -p Delegate=yes forkd ...`";
    match Groups::find() {
        Ok(groups) => {
            let found = format!("{} below {}", groups.controllers().join(", "), groups.path().display());
            if groups.controllers().len() == Groups::ALL {
                Check::pass(name, found)
            } else {
                Check::warn(name, found, mend)
            }
        }
        Err(error) => Check::warn(name, chain(&error), mend),
    }
}

fn fuse() -> Check {
    match std::fs::File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Check::pass("fuse", "/dev/fuse opens"),
        Err(error) => Check::fail(
            "fuse",
            format!("/dev/fuse: {error}"),
            "load the fuse module; without it only `forkd mount` fails",
        ),
    }
}

fn guest_kernel(paths: &Paths) -> Check {
    match kernel::find(paths) {
        Ok(kernel) => Check::pass("guest kernel", kernel.path.display().to_string()),
        Err(error) => {
            Check::warn("guest kernel", chain(&error), "`forkd kernel build` makes one; only builds need it")
        }
    }
}

fn agent() -> Check {
    match recipe::agent_binary() {
        Ok(path) => Check::pass("guest agent", path.display().to_string()),
        Err(error) => {
            Check::warn("guest agent", chain(&error), "`make build` makes it; only `forkd build` needs it")
        }
    }
}

fn build_tool(program: &'static str, package: &str) -> Check {
    match tools::find(program) {
        Some(path) => Check::pass(program, path.display().to_string()),
        None => {
            let mend = format!("apt-get install {package}; `forkd build` does it when run as root");
            Check::warn(program, "not installed", mend)
        }
    }
}

fn space(name: &'static str, dir: &Path) -> Check {
    let existing = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            let found = format!("{} free at {}", show_size(free), existing.display());
            if free >= SPACE_WANTED {
                Check::pass(name, found)
            } else {
                let variable = if name == "cache" { "XDG_CACHE_HOME" } else { "XDG_DATA_HOME" };
                Check::warn(name, found, format!("free some space, or set {variable} to a larger disk"))
            }
        }
        Err(errno) => Check::warn(name, format!("{}: {errno}", existing.display()), "make it readable"),
    }
}
