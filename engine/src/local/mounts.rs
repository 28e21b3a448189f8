//! The mounts of `forkd mount`: what the kernel says is mounted, and the records their daemons leave.
//!
//! A mount is one of ours when its source in /proc/self/mountinfo starts with [`SOURCE_PREFIX`]. Its daemon's record in
//! the run directory tells the hub and the process; a record without a mount is stale and goes. A mount whose daemon
//! died answers every call with ENOTCONN: [`clear_dead`] detaches it.

use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use serde::{Deserialize, Serialize};

use crate::local::paths::{Paths, PathsError};
use crate::reference::Reference;

/// How the source of our mounts starts in /proc/self/mountinfo; the hub's address follows.
pub const SOURCE_PREFIX: &str = "forkd:";

/// What the daemon of a mount says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The daemon's process id.
    pub pid: u32,
    /// URL or absolute path of the registry.
    pub hub: String,
}

/// Why a mount cannot be made, found or taken away.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The mountpoint does not exist or is not a directory.
    #[error("{}", path.display())]
    Mountpoint {
        /// What was given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something lies in the mountpoint and would be hidden.
    #[error("{} is not empty", path.display())]
    NotEmpty {
        /// The mountpoint.
        path: PathBuf,
    },
    /// A hub is mounted there already.
    #[error("{} is in use: {source_name} is mounted there", path.display())]
    InUse {
        /// The mountpoint.
        path: PathBuf,
        /// The mount's source.
        source_name: String,
    },
    /// Nothing of ours is mounted there.
    #[error("no hub is mounted on {}", path.display())]
    NotMounted {
        /// What was given.
        path: PathBuf,
    },
    /// Files in it are open.
    #[error("{} is busy: files in it are open, or a process works in it", path.display())]
    Busy {
        /// The mountpoint.
        path: PathBuf,
    },
    /// Unmounting failed.
    #[error("{} cannot be unmounted", path.display())]
    Unmount {
        /// The mountpoint.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel's list of mounts cannot be read.
    #[error("/proc/self/mountinfo")]
    MountInfo(#[source] io::Error),
    /// The run directory.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// A record cannot be written.
    #[error("{}", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One mount of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubMount {
    /// Where.
    pub mountpoint: PathBuf,
    /// Its source: [`SOURCE_PREFIX`] and the hub.
    pub source: String,
}

impl HubMount {
    /// Whether its daemon is gone.
    pub fn is_dead(&self) -> bool {
        // Not stat: the kernel answers that from its cache for a while.
        let answer = rustix::fs::statfs(&self.mountpoint);
        answer.is_err_and(|error| matches!(error, Errno::NOTCONN | Errno::CONNABORTED))
    }
}

/// Every mount of ours, in the order they were made.
pub fn list() -> Result<Vec<HubMount>, MountsError> {
    let text = std::fs::read("/proc/self/mountinfo").map_err(MountsError::MountInfo)?;
    Ok(text.split(|&b| b == b'\n').filter_map(parse_line).collect())
}

/// `36 35 98:0 /root /mountpoint options [optional fields] - type source options`, proc_pid_mountinfo(5).
fn parse_line(line: &[u8]) -> Option<HubMount> {
    let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
    let dash = fields.iter().position(|&field| field == b"-")?;
    let source = String::from_utf8(unescape(fields.get(dash + 2)?)).ok()?;
    let mountpoint = mountpoint(line)?;
    source.starts_with(SOURCE_PREFIX).then_some(HubMount { mountpoint, source })
}

/// Spaces, tabs, newlines and backslashes are octal in mountinfo.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after
            .first_chunk::<3>()
            .filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal {
            Some(digits) => {
                out.push(
                    digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')),
                );
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

/// The mountpoint as mountinfo spells it. Works on a dead mount too, because the mountpoint itself is not touched.
fn resolve(path: &Path) -> Result<PathBuf, MountsError> {
    let failed = |source| MountsError::Mountpoint { path: path.to_owned(), source };
    let absolute = std::path::absolute(path).map_err(failed)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => {
            let place = parent.canonicalize().map_err(failed)?.join(name);
            // A link to a mountpoint means the mountpoint, when it can be followed.
            Ok(place.canonicalize().unwrap_or(place))
        }
        _ => Ok(absolute),
    }
}

/// The mount of ours on `path`.
pub fn find(path: &Path) -> Result<HubMount, MountsError> {
    let mountpoint = resolve(path)?;
    // The last one is on top.
    let found = list()?.into_iter().rev().find(|mount| mount.mountpoint == mountpoint);
    found.ok_or_else(|| MountsError::NotMounted { path: path.to_owned() })
}

/// Checks that a hub can be mounted on `path`, after clearing dead mounts of ours off it; returns its resolved form.
pub fn check_mountpoint(paths: &Paths, path: &Path) -> Result<PathBuf, MountsError> {
    let mountpoint = resolve(path)?;
    while let Ok(mount) = find(&mountpoint) {
        if !mount.is_dead() {
            // Unless the watcher of a killed daemon detached it between the two looks.
            if find(&mountpoint).is_ok_and(|again| again == mount) {
                return Err(MountsError::InUse { path: path.to_owned(), source_name: mount.source });
            }
            continue;
        }
        detach(&mountpoint)?;
        remove_record(paths, &mountpoint);
    }
    let failed = |source| MountsError::Mountpoint { path: path.to_owned(), source };
    let mut entries = std::fs::read_dir(&mountpoint).map_err(failed)?;
    if entries.next().is_some() {
        return Err(MountsError::NotEmpty { path: path.to_owned() });
    }
    Ok(mountpoint)
}

/// Unmounts; with `lazy` even when files are open.
pub fn take_down(paths: &Paths, path: &Path, lazy: bool) -> Result<HubMount, MountsError> {
    let mount = find(path)?;
    if lazy || mount.is_dead() {
        detach(&mount.mountpoint)?
    } else {
        unmount_now(&mount.mountpoint)?
    };
    remove_record(paths, &mount.mountpoint);
    Ok(mount)
}

/// Detaches every mount of ours whose daemon is gone, and removes records that have no mount. Returns the mountpoints.
pub fn clear_dead(paths: &Paths) -> Result<Vec<PathBuf>, MountsError> {
    let (dead, alive): (Vec<_>, Vec<_>) = list()?.into_iter().partition(HubMount::is_dead);
    for mount in &dead {
        detach(&mount.mountpoint)?;
        remove_record(paths, &mount.mountpoint);
    }
    for record in records(paths) {
        if !alive.iter().any(|mount| mount.mountpoint == record.mountpoint) {
            remove_record(paths, &record.mountpoint);
        }
    }
    Ok(dead.into_iter().map(|mount| mount.mountpoint).collect())
}

fn unmount_now(mountpoint: &Path) -> Result<(), MountsError> {
    match unmount(mountpoint, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(MountsError::Busy { path: mountpoint.to_owned() }),
        Err(Errno::PERM) => fusermount(mountpoint, &["-u"]),
        Err(error) => Err(MountsError::Unmount { path: mountpoint.to_owned(), source: error.into() }),
    }
}

/// Takes the mount out of the file system now; it ends when its last user is gone.
pub fn detach(mountpoint: &Path) -> Result<(), MountsError> {
    match unmount(mountpoint, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
        // Nothing is mounted there any more: somebody else was faster.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(Errno::PERM) => fusermount(mountpoint, &["-u", "-z"]),
        Err(error) => Err(MountsError::Unmount { path: mountpoint.to_owned(), source: error.into() }),
    }
}

/// Takes everything that is mounted in `dir` out of the file system, whoever mounted it.
pub fn detach_below(dir: &Path) -> io::Result<()> {
    // Its last component is not followed: a link there would lead to other people's mounts.
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = parent.canonicalize()?.join(name);
    if !dir.symlink_metadata()?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let text = std::fs::read("/proc/self/mountinfo")?;
    let points = text.split(|&b| b == b'\n').filter_map(mountpoint);
    let mut below: Vec<_> = points.filter(|point| *point != dir && point.starts_with(&dir)).collect();
    // What lies on top of another comes after it.
    below.reverse();
    for point in below {
        match unmount(&point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Where a line of mountinfo has its mount.
fn mountpoint(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|&b| b == b' ').nth(4)?;
    Some(PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
}

/// Users other than root unmount through the set-uid helper.
fn fusermount(mountpoint: &Path, flags: &[&str]) -> Result<(), MountsError> {
    let failed = |source| MountsError::Unmount { path: mountpoint.to_owned(), source };
    let output =
        Command::new("fusermount3").args(flags).arg("--").arg(mountpoint).output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if said.contains("busy") {
        return Err(MountsError::Busy { path: mountpoint.to_owned() });
    }
    Err(failed(io::Error::other(said)))
}

fn record_path(paths: &Paths, mountpoint: &Path, extension: &str) -> PathBuf {
    let digest = forkd_fs::digest::Digest::of(mountpoint.as_os_str().as_bytes()).to_string();
    paths.mounts().join(format!("{}.{extension}", &digest[..16]))
}

/// Where the daemon of a mount logs.
pub fn log_path(paths: &Paths, mountpoint: &Path) -> Result<PathBuf, MountsError> {
    paths.create_runtime(Path::new("mounts"))?;
    Ok(record_path(paths, mountpoint, "log"))
}

/// Writes the record of a mount.
pub fn write_record(paths: &Paths, record: &MountRecord) -> Result<(), MountsError> {
    paths.create_runtime(Path::new("mounts"))?;
    let path = record_path(paths, &record.mountpoint, "json");
    let failed = |source| MountsError::Record { path: path.clone(), source };
    let text = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
    let partial = path.with_extension("json.new");
    std::fs::write(&partial, text).and_then(|()| std::fs::rename(&partial, &path)).map_err(failed)
}

/// Whether the mount on `mountpoint` is recorded as that process's: after a lazy unmount another daemon may have mounted
/// there, whose mount and record are not to be touched.
pub fn is_ours(paths: &Paths, mountpoint: &Path, pid: u32) -> bool {
    let text = std::fs::read(record_path(paths, mountpoint, "json")).unwrap_or_default();
    serde_json::from_slice(&text).is_ok_and(|record: MountRecord| record.pid == pid)
}

/// Removes a mount's record and log; it is no error when there are none.
pub fn remove_record(paths: &Paths, mountpoint: &Path) {
    for extension in ["json", "log"] {
        let _ = std::fs::remove_file(record_path(paths, mountpoint, extension));
    }
}

/// Every record that can be read.
pub fn records(paths: &Paths) -> Vec<MountRecord> {
    let Ok(entries) = std::fs::read_dir(paths.mounts()) else { return Vec::new() };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok())
        .collect()
}

/// For a path inside one of our mounts at or below `OWNER/NAME/VERSION`: the hub, and what that version refers to.
pub fn pack_behind(paths: &Paths, path: &Path) -> Option<(String, Reference)> {
    let absolute = std::path::absolute(path).ok()?;
    let record = records(paths).into_iter().find(|record| absolute.starts_with(&record.mountpoint))?;
    let inside = absolute.strip_prefix(&record.mountpoint).ok()?;
    let mut names = inside.iter().map(|name| name.to_str());
    let (owner, name, version) = (names.next()??, names.next()??, names.next()??);
    Some((record.hub, format!("{owner}/{name}@{version}").parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read_with_their_escapes() {
        let line = br"40 27 0:35 / /mnt/with\040space ro,nosuid shared:5 master:1 - fuse forkd:http://h/registry.json ro,user_id=0";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.mountpoint, Path::new("/mnt/with space"));
        assert_eq!(mount.source, "forkd:http://h/registry.json");
        assert_eq!(parse_line(b"40 27 0:35 / /mnt ro - ext4 /dev/sda1 rw"), None);
        assert_eq!(parse_line(b""), None);
        assert_eq!(unescape(br"a\134b\x"), br"a\b\x");
    }

    #[test]
    fn records_tell_the_pack_behind_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let paths =
            Paths { data: dir.path().into(), cache: dir.path().into(), runtime: dir.path().join("run") };
        let record =
            MountRecord { mountpoint: "/mnt/hub".into(), pid: 1, hub: "http://h/registry.json".into() };
        write_record(&paths, &record).unwrap();
        let behind =
            |path: &str| pack_behind(&paths, Path::new(path)).map(|(_, reference)| reference.to_string());
        assert_eq!(behind("/mnt/hub/o/n/v1").as_deref(), Some("o/n@v1"));
        assert_eq!(behind("/mnt/hub/o/n/v1/memory.bin").as_deref(), Some("o/n@v1"));
        assert_eq!(behind("/mnt/hub/o/n"), None);
        assert_eq!(behind("/mnt/other/o/n/v1"), None);
        remove_record(&paths, &record.mountpoint);
        assert_eq!(records(&paths), []);
    }

    #[test]
    fn mountpoints_must_be_empty_directories() {
        let dir = tempfile::tempdir().unwrap();
        let paths =
            Paths { data: dir.path().into(), cache: dir.path().into(), runtime: dir.path().join("run") };
        let check = |path: &Path| check_mountpoint(&paths, path);
        assert!(matches!(check(&dir.path().join("missing")), Err(MountsError::Mountpoint { .. })));
        std::fs::write(dir.path().join("file"), b"").unwrap();
        assert!(matches!(check(&dir.path().join("file")), Err(MountsError::Mountpoint { .. })));
        assert!(matches!(check(dir.path()), Err(MountsError::NotEmpty { .. })));
        std::fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(check(&dir.path().join("empty")).is_ok());
        assert!(matches!(find(dir.path()), Err(MountsError::NotMounted { .. })));
    }
}
