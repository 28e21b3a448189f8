//! Local snapshots: one directory a tag, with the files that a pack carries.
//!
//! | file | what |
//! |---|---|
//! | `manifest.toml` | what it is and what a host needs (`forkd_fs::manifest`) |
//! | `snapshot.json` | [`MachineConfiguration`] |
//! | `vmstate` | CPU and device state (`forkd_vmm::vmstate`) |
//! | `trace` | pages touched by a first restore (`forkd_fs::trace`) |
//! | `hotset` | those pages themselves, in the trace's order |
//! | `memory.bin` | guest RAM, sparse |
//! | `rootfs.erofs` | root disk |
//! | `.console` | what its machine printed while it was built; not in packs, as all names that start with a dot |
//!
//! A snapshot of a child has a difference in place of `memory.bin` (`lineage.rs`).
//!
//! A snapshot comes into being in a temporary directory beside its final place and is renamed, so a tag is either
//! whole or absent.

use crate::local::paths::{Paths, PathsError};
use crate::local::work_dir::{self, WorkDir};
use forkd_fs::manifest::MAX_MANIFEST_LEN;
use forkd_vmm::arch::VCPUS_MAX;
use forkd_vmm::devices::virtio::block::SCRATCH_MIB_MAX;
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::memory::{MemoryError, MemoryLayout};
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

pub use forkd_fs::format::{
    HOTSET, MANIFEST, MEMORY, ROOTFS as ROOT_DISK, SNAPSHOT as CONFIGURATION, TRACE, VMSTATE,
};

/// The console of the machine while it was built, where `forkd logs --tag` finds it. No pack has a member of such a name.
pub const CONSOLE: &str = ".console";
/// How directories of unfinished snapshots are named; no tag starts with a dot.
const DRAFT_PREFIX: &str = ".draft-";
/// Version of [`MachineConfiguration`].
const FORMAT: u32 = 1;
/// Longest `snapshot.json`, bytes.
pub const CONFIGURATION_MAX: usize = 64 * 1024;

/// What is said of a pack or snapshot of the predecessor that is to be forked.
pub const FOREIGN_MACHINE: &str =
    "it holds the state of a Firecracker machine, which this forkd cannot restore";

/// `snapshot.json`: the machine that the snapshot is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfiguration {
    /// Version of this file's layout.
    pub format: u32,
    /// Sizes of its memory.
    #[serde(flatten)]
    pub layout: MemoryLayout,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Kind of KVM it was made on, and needs.
    pub kvm_kind: KvmKind,
    /// Size of each copy's scratch disk, MiB; 0 for none.
    #[serde(default)]
    pub scratch_mib: u32,
}

/// A snapshot cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Directories.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// No such tag.
    #[error("there is no local snapshot `{tag}`")]
    Unknown {
        /// The tag.
        tag: String,
    },
    /// The tag is taken.
    #[error("there is a local snapshot `{tag}` already")]
    Exists {
        /// The tag.
        tag: String,
    },
    /// A file of it.
    #[error("{operation} {} failed", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `snapshot.json` cannot be read.
    #[error("snapshot.json is not a machine configuration")]
    Configuration(#[source] serde_json::Error),
    /// `snapshot.json` is of another version or too long.
    #[error("snapshot.json has format {found}; this forkd reads format {FORMAT}")]
    Format {
        /// Its format.
        found: u32,
    },
    /// `.lineage.json` cannot be read.
    #[error("{} does not say what the snapshot is based on", path.display())]
    Lineage {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// `.lineage.json` is of another version.
    #[error("{} has format {found}, which this forkd does not read", path.display())]
    LineageFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Its base has a machine of other sizes.
    #[error("the base of {} is of another machine", dir.display())]
    OtherMachine {
        /// The snapshot.
        dir: PathBuf,
    },
    /// Impossible sizes.
    #[error("snapshot.json describes an impossible machine")]
    Layout(#[from] MemoryError),
    /// A number of vCPUs that no machine has.
    #[error("{vcpus} vCPUs are not possible: a machine has 1 to {VCPUS_MAX}")]
    Vcpus {
        /// What was asked for, or what the snapshot says.
        vcpus: u32,
    },
    /// A scratch disk that no machine has.
    #[error("a scratch disk of {mib} MiB is not possible: it has at most {SCRATCH_MIB_MAX} MiB")]
    Scratch {
        /// What was asked for, or what the snapshot says.
        mib: u32,
    },
    /// The host is of the other kind.
    #[error("the snapshot needs {} KVM, but this host's is {}", needs.name(), has.name())]
    Host {
        /// What it was made on.
        needs: KvmKind,
        /// What is here.
        has: KvmKind,
    },
}

impl MachineConfiguration {
    /// A configuration for this version of forkd.
    pub fn new(layout: MemoryLayout, vcpus: u8, kvm_kind: KvmKind, scratch_mib: u32) -> MachineConfiguration {
        MachineConfiguration { format: FORMAT, layout, vcpus: vcpus.into(), kvm_kind, scratch_mib }
    }

    /// Reads `snapshot.json`, which may be hostile.
    pub fn parse(bytes: &[u8]) -> Result<MachineConfiguration, SnapshotError> {
        #[derive(Deserialize)]
        struct Probe {
            format: u32,
        }
        let bytes = &bytes[..bytes.len().min(CONFIGURATION_MAX)];
        let probe: Probe = serde_json::from_slice(bytes).map_err(SnapshotError::Configuration)?;
        if probe.format != FORMAT {
            return Err(SnapshotError::Format { found: probe.format });
        }
        let parsed: MachineConfiguration =
            serde_json::from_slice(bytes).map_err(SnapshotError::Configuration)?;
        parsed.check()?;
        Ok(parsed)
    }

    /// Refuses a format or a machine that there is not, wherever the configuration came from.
    pub fn check(&self) -> Result<(), SnapshotError> {
        if self.format != FORMAT {
            return Err(SnapshotError::Format { found: self.format });
        }
        self.layout.check()?;
        check_vcpus(self.vcpus)?;
        check_scratch(self.scratch_mib)?;
        Ok(())
    }

    /// Refuses a host that cannot run it.
    pub fn check_host(&self, host: KvmKind) -> Result<(), SnapshotError> {
        if self.kvm_kind == host {
            Ok(())
        } else {
            Err(SnapshotError::Host { needs: self.kvm_kind, has: host })
        }
    }
}

/// The number of vCPUs, if a machine can have as many.
pub fn check_vcpus(vcpus: u32) -> Result<u8, SnapshotError> {
    u8::try_from(vcpus)
        .ok()
        .filter(|count| (1..=VCPUS_MAX).contains(count))
        .ok_or(SnapshotError::Vcpus { vcpus })
}

/// The size of a scratch disk in MiB, if a machine can have one of it.
pub fn check_scratch(mib: u32) -> Result<u32, SnapshotError> {
    if mib <= SCRATCH_MIB_MAX { Ok(mib) } else { Err(SnapshotError::Scratch { mib }) }
}

/// Turns an I/O error into one that names the file.
pub fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::File { operation, path, source }
}

/// The first `limit` bytes of a file, which may be as long as whoever made it wants.
pub fn read_at_most(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The manifest in a snapshot's directory, as it is; one byte too long where it is longer than any may be.
pub fn manifest_bytes(dir: &Path) -> io::Result<Vec<u8>> {
    read_at_most(&dir.join(MANIFEST), MAX_MANIFEST_LEN + 1)
}

/// A snapshot in use: whoever replaces or removes its tag meanwhile leaves these files alone.
#[derive(Debug)]
pub struct LockedSnapshot {
    /// Locked, shared with others who use it.
    dir: File,
}

impl LockedSnapshot {
    /// Holds the snapshot of a tag.
    pub fn find(paths: &Paths, tag: &str) -> Result<LockedSnapshot, SnapshotError> {
        let dir = paths.snapshot(tag)?;
        let unknown = || SnapshotError::Unknown { tag: tag.to_owned() };
        // One that is being removed when it is opened is empty when it can be locked; its successor is there then.
        for _ in 0..8 {
            match LockedSnapshot::open(&dir) {
                Ok(held) if held.path().join(CONFIGURATION).exists() => return Ok(held),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(unknown()),
                Err(error) => return Err(file_error("opening", &dir)(error)),
            }
        }
        Err(unknown())
    }

    /// Holds a snapshot that is no tag's.
    pub fn open(dir: &Path) -> io::Result<LockedSnapshot> {
        let dir = File::open(dir)?;
        rustix::fs::flock(&dir, FlockOperation::LockShared)?;
        Ok(LockedSnapshot { dir })
    }

    /// Where its files are, whatever happens to its name.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd()))
    }
}

/// Removes a snapshot's directory: its name at once, its files when nobody holds them. What is still held goes with
/// [`remove_dead_drafts`].
pub fn remove(paths: &Paths, dir: &Path) -> Result<(), SnapshotError> {
    let grave = tempfile::Builder::new().prefix(DRAFT_PREFIX).tempdir_in(paths.snapshots());
    let grave = grave.map_err(file_error("removing", dir))?.keep();
    fs::rename(dir, &grave).map_err(file_error("removing", dir))?;
    work_dir::remove_unless_held(&grave).map(drop).map_err(file_error("removing", &grave))
}

/// A snapshot in the making; gone again unless published.
#[derive(Debug)]
pub struct SnapshotDraft {
    dir: WorkDir,
    target: PathBuf,
    tag: String,
}

impl SnapshotDraft {
    /// An empty, locked directory beside the tag's place. Without `force` the tag must be free.
    pub fn create(paths: &Paths, tag: &str, force: bool) -> Result<SnapshotDraft, SnapshotError> {
        let target = paths.snapshot(tag)?;
        if !force && target.exists() {
            return Err(SnapshotError::Exists { tag: tag.to_owned() });
        }
        let parent = paths.snapshots();
        fs::create_dir_all(&parent).map_err(file_error("creating", &parent))?;
        let dir = WorkDir::create(&parent, DRAFT_PREFIX);
        let dir = dir.map_err(file_error("creating a directory in", &parent))?;
        Ok(SnapshotDraft { dir, target, tag: tag.to_owned() })
    }

    /// Where its files are to be put.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Puts it in its place. An old snapshot of the tag is replaced if `force`.
    pub fn publish(self, force: bool) -> Result<PathBuf, SnapshotError> {
        let SnapshotDraft { dir, target, tag } = self;
        if target.exists() && !force {
            return Err(SnapshotError::Exists { tag });
        }
        let (staged, _lock) = dir.keep();
        let rename = |flags| rustix::fs::renameat_with(CWD, &staged, CWD, &target, flags);
        let placed = match rename(RenameFlags::NOREPLACE) {
            // The old snapshot then lies in the staging place, and goes.
            Err(Errno::EXIST) if force => rename(RenameFlags::EXCHANGE),
            placed => placed,
        };
        match placed {
            // Nothing, or the old snapshot; one that is in use goes with the next cleanup.
            Ok(()) => drop(work_dir::remove_unless_held(&staged)),
            Err(_) => drop(fs::remove_dir_all(&staged)),
        }
        match placed {
            Ok(()) => Ok(target),
            Err(Errno::EXIST) => Err(SnapshotError::Exists { tag }),
            Err(errno) => Err(file_error("publishing", &target)(errno.into())),
        }
    }
}

/// Removes drafts whose makers are dead, and what was replaced or removed while others used it; returns their paths.
pub fn remove_dead_drafts(paths: &Paths) -> Result<Vec<PathBuf>, SnapshotError> {
    let parent = paths.snapshots();
    work_dir::remove_dead(&parent, DRAFT_PREFIX).map_err(file_error("cleaning", &parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(dir: &Path) -> Paths {
        Paths { data: dir.join("data"), cache: dir.join("cache"), runtime: dir.join("run") }
    }

    #[test]
    fn drafts_appear_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let draft = SnapshotDraft::create(&paths, "t", false).unwrap();
        fs::write(draft.path().join(CONFIGURATION), "one").unwrap();
        assert!(matches!(LockedSnapshot::find(&paths, "t"), Err(SnapshotError::Unknown { .. })));
        draft.publish(false).unwrap();
        assert!(LockedSnapshot::find(&paths, "t").is_ok());
        assert!(matches!(SnapshotDraft::create(&paths, "t", false), Err(SnapshotError::Exists { .. })));
        let again = SnapshotDraft::create(&paths, "t", true).unwrap();
        fs::write(again.path().join(CONFIGURATION), "two").unwrap();
        let published = again.publish(true).unwrap();
        assert_eq!(fs::read_to_string(published.join(CONFIGURATION)).unwrap(), "two");
        let unfinished = SnapshotDraft::create(&paths, "u", false).unwrap();
        assert!(remove_dead_drafts(&paths).unwrap().is_empty(), "its maker lives");
        drop(unfinished);
        fs::create_dir(paths.snapshots().join(".draft-dead")).unwrap();
        assert_eq!(remove_dead_drafts(&paths).unwrap().len(), 1);
        assert_eq!(fs::read_dir(paths.snapshots()).unwrap().count(), 1, "nothing but the snapshot is left");
    }

    #[test]
    fn what_is_held_outlives_its_tag() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let publish = |text: &str| {
            let draft = SnapshotDraft::create(&paths, "t", true).unwrap();
            fs::write(draft.path().join(CONFIGURATION), text).unwrap();
            draft.publish(true).unwrap();
        };
        publish("one");
        let (held, again) =
            (LockedSnapshot::find(&paths, "t").unwrap(), LockedSnapshot::find(&paths, "t").unwrap());
        publish("two");
        let read = |held: &LockedSnapshot| fs::read_to_string(held.path().join(CONFIGURATION)).unwrap();
        assert_eq!(read(&held), "one");
        drop(held);
        assert!(remove_dead_drafts(&paths).unwrap().is_empty(), "somebody else holds it");
        assert_eq!(read(&again), "one");
        drop(again);
        assert_eq!(remove_dead_drafts(&paths).unwrap().len(), 1);
        let held = LockedSnapshot::find(&paths, "t").unwrap();
        remove(&paths, &paths.snapshot("t").unwrap()).unwrap();
        assert_eq!(read(&held), "two");
        assert!(matches!(LockedSnapshot::find(&paths, "t"), Err(SnapshotError::Unknown { .. })));
        drop(held);
        assert_eq!(remove_dead_drafts(&paths).unwrap().len(), 1);
        assert_eq!(fs::read_dir(paths.snapshots()).unwrap().count(), 0);
    }

    #[test]
    fn configurations_are_checked() {
        let layout = MemoryLayout::new(512, 1).unwrap();
        let good = MachineConfiguration::new(layout, 8, KvmKind::Pvm, 100);
        let text = serde_json::to_string(&good).unwrap();
        assert_eq!(MachineConfiguration::parse(text.as_bytes()).unwrap(), good);
        assert!(good.check_host(KvmKind::Hardware).is_err());
        let huge = text.replace("512", "99999999999");
        assert!(matches!(MachineConfiguration::parse(huge.as_bytes()), Err(SnapshotError::Layout(_))));
        let crowded = text.replace("\"vcpus\":8", "\"vcpus\":9");
        assert!(matches!(
            MachineConfiguration::parse(crowded.as_bytes()),
            Err(SnapshotError::Vcpus { vcpus: 9 })
        ));
        let vast = text.replace("\"scratch_mib\":100", "\"scratch_mib\":65537");
        assert!(matches!(
            MachineConfiguration::parse(vast.as_bytes()),
            Err(SnapshotError::Scratch { mib: 65537 })
        ));
        let older = text.replace(",\"scratch_mib\":100", "");
        assert_eq!(MachineConfiguration::parse(older.as_bytes()).unwrap().scratch_mib, 0);
        let newer = text.replace("\"format\":1", "\"format\":2");
        assert!(matches!(
            MachineConfiguration::parse(newer.as_bytes()),
            Err(SnapshotError::Format { found: 2 })
        ));
        assert!(MachineConfiguration::parse(b"{}").is_err());
    }
}
