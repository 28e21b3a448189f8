//! PID 1's work before it becomes the agent: from a read-only root disk to an ordinary, writable Linux.
//!
//! The root disk (EROFS on virtio-pmem, read straight from the image's memory) becomes the lower layer of an overlay
//! whose upper layer is a tmpfs. The layer's tmpfs stays mounted on the old root, out of every path's reach.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use forkd_abi::protocol::MachineFile;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};
use thiserror::Error;

use super::sys;

/// Written by the recipe's build.
pub const MACHINE_FILE: &str = "/forkd/warm.json";
/// Longest machine file read, in bytes.
const MACHINE_FILE_MAX: u64 = 1 << 20;

/// A step of the start that failed; there is no going on from any.
#[derive(Debug, Error)]
pub enum InitError {
    /// A mount, or moving into the new root.
    #[error("{what} {target}: {source}")]
    Mount {
        /// "mount", "move the root to".
        what: &'static str,
        /// Where.
        target: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The machine file.
    #[error("{path}: {source}")]
    MachineFile {
        /// Its path.
        path: String,
        /// Why it cannot be used.
        source: io::Error,
    },
}

/// Mounts everything and moves into the writable root.
pub fn set_up_root() -> Result<(), InitError> {
    let nothing = MountFlags::empty();
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    let locked = quiet | MountFlags::NOEXEC;

    on("tmpfs", "/run", nothing, Some(c"mode=0755"))?;
    for dir in ["/run/upper", "/run/work", "/run/root"] {
        fs::create_dir(dir).map_err(|source| InitError::Mount { what: "create", target: "/run", source })?;
    }
    on("overlay", "/run/root", nothing, Some(c"lowerdir=/,upperdir=/run/upper,workdir=/run/work"))?;
    // The kernel mounts devtmpfs by itself (CONFIG_DEVTMPFS_MOUNT); it may have been built without.
    let dev = mount_move("/dev", "/run/root/dev");
    let moving = |target| {
        move |errno: Errno| InitError::Mount { what: "move the root to", target, source: errno.into() }
    };
    chdir("/run/root").map_err(moving("/run/root"))?;
    mount_move(".", "/").map_err(moving("/"))?;
    chroot(".").map_err(moving("/"))?;
    chdir("/").map_err(moving("/"))?;

    if dev.is_err() {
        on("devtmpfs", "/dev", MountFlags::NOSUID, Some(c"mode=0755"))?;
    }
    on("proc", "/proc", locked, None)?;
    on("sysfs", "/sys", locked, None)?;
    on("tmpfs", "/run", quiet, Some(c"mode=0755"))?;
    on("tmpfs", "/tmp", quiet, Some(c"mode=1777"))?;
    for dir in ["/dev/pts", "/dev/shm"] {
        // devtmpfs starts without them; a root disk with its own /dev may have them.
        let _ = fs::create_dir(dir);
    }
    on("devpts", "/dev/pts", MountFlags::NOSUID | MountFlags::NOEXEC, Some(c"mode=0620,ptmxmode=0666"))?;
    on("tmpfs", "/dev/shm", quiet, Some(c"mode=1777"))?;
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    for (to, link) in links {
        let _ = symlink(to, link);
    }
    if let Err(error) = sys::loopback_up() {
        eprintln!("forkd-agent: the loopback interface stays down: {error}");
    }
    Ok(())
}

fn on(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: Option<&CStr>,
) -> Result<(), InitError> {
    mount(kind, target, kind, flags, data).map_err(|errno| InitError::Mount {
        what: "mount",
        target,
        source: errno.into(),
    })
}

/// Reads the machine file; a machine without one has no warm worker.
pub fn read_machine_file(path: &Path) -> Result<MachineFile, InitError> {
    let failed = |source| InitError::MachineFile { path: path.display().to_string(), source };
    let len = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(MachineFile::default()),
        result => result.map_err(failed)?.len(),
    };
    if len > MACHINE_FILE_MAX {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "longer than 1 MiB")));
    }
    let text = fs::read(path).map_err(failed)?;
    serde_json::from_slice(&text)
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error.to_string())))
}
