//! Saving a moment of a child as a local snapshot, which stores what differs from what the child's fork was of.
//!
//! The base of a fork of a local snapshot is that snapshot's files, which are linked: links to files on disk cost nothing
//! and outlive the base's tag. Where they cannot be linked (their tag is gone, or they lie on another file system), all of
//! the memory is stored. The base of a fork of a pack is the pack, by its index's digest.

use super::provenance::{Provenance, ResidentProvenance};
use super::{IMAGE_FILES, Images, Template, images_of};
use crate::local::lineage::{self, Base, BasePack, Lineage};
use crate::local::snapshots::{self, SnapshotError, file_error};
use crate::local::whole_memory;
use forkd_fs::digest::Hasher;
use forkd_fs::trace::{Trace, TraceError};
use forkd_vmm::memory::{Delta, ImageId};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, linkat};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

/// A moment of a child cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveChildError {
    /// A file of the snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Its trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Nobody knows what the machine needs.
    #[error("what it was forked from has no manifest that can be read")]
    NoManifest,
}

/// A child's moment.
#[derive(Debug, Clone, Copy)]
pub struct SavedChild<'a> {
    /// The child.
    pub child: &'a str,
    /// Its state.
    pub vmstate: BorrowedFd<'a>,
    /// What its memory has in place of what the image has.
    pub delta: &'a Delta,
}

impl Template {
    /// The same, which people call `name`.
    pub fn called(mut self, name: &str) -> Template {
        self.provenance.get_or_insert_default().name = name.to_owned();
        self
    }

    /// What people call it, where it was opened by a name.
    pub fn name(&self) -> Option<&str> {
        let provenance = self.provenance.as_ref();
        provenance.map(|provenance| &*provenance.name).filter(|name| !name.is_empty())
    }

    /// What is said of it to a process that is handed its images, and their files on disk.
    pub(super) fn resident_provenance(&self) -> Option<(ResidentProvenance, &[OwnedFd])> {
        let provenance = self.provenance.as_ref()?;
        let (manifest, base) = (provenance.manifest.clone()?, self.base(provenance).ok()?);
        Some((ResidentProvenance { manifest, base }, &provenance.on_disk))
    }

    /// Writes the snapshot `tag` of a child into an empty directory. Returns what it is a difference from; `None` where all
    /// of it is stored.
    pub fn save_child(
        &self,
        SavedChild { child, vmstate, delta }: SavedChild<'_>,
        tag: &str,
        into: &Path,
    ) -> Result<Option<Base>, SaveChildError> {
        let provenance = self.provenance.as_ref().ok_or(SaveChildError::NoManifest)?;
        let mut manifest = provenance.manifest.clone().ok_or(SaveChildError::NoManifest)?;
        let base = self.base(provenance)?;
        // What a pack has can be had again; files have to be at hand.
        let base = (base.pack.is_some() || self.link_images(into)?).then_some(base);
        match &base {
            Some(_) => {
                let (path, ram_bytes) = (into.join(lineage::DELTA), self.configuration.layout.ram_bytes());
                let failed = || file_error("writing", &path);
                let file = File::create_new(&path).map_err(failed())?;
                delta.write_to(&file, ram_bytes, &|_| ()).map_err(failed())?;
            }
            None => self.copy_images(delta, into)?,
        }
        let (path, state) = (into.join(snapshots::VMSTATE), owned(vmstate, "the vmstate")?);
        write_with(&path, |to| copy_all(&state, to))?;
        let write = |name: &str, bytes: &[u8]| {
            let path = into.join(name);
            fs::write(&path, bytes).map_err(file_error("writing", &path))
        };
        let configuration = serde_json::to_vec_pretty(&self.configuration);
        write(snapshots::CONFIGURATION, &configuration.map_err(SnapshotError::Configuration)?)?;
        // Near enough: the child was a fork itself. `forkd trace` makes a better one.
        write(snapshots::TRACE, &self.trace_bytes(provenance)?)?;
        tag.clone_into(&mut manifest.tag);
        manifest.created_at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        env!("CARGO_PKG_VERSION").clone_into(&mut manifest.forkd_version);
        manifest.requires.vmstate_version = forkd_vmm::vmstate::VERSION;
        // The pack's files are not this one's.
        manifest.files.clear();
        write(snapshots::MANIFEST, manifest.to_toml().as_bytes())?;
        Lineage::new(child, &provenance.name, base.clone()).write(into)?;
        Ok(base)
    }

    fn base(&self, provenance: &Provenance) -> Result<Base, SnapshotError> {
        if let Some(base) = &provenance.base {
            return Ok(base.clone());
        }
        let pack = match &self.images {
            Images::Lazy { pages, .. } => {
                let store = &pages.store;
                let pack = BasePack::new(store.origin(), store.index().pack_size(), store.index_pin());
                Some(pack.map_err(file_error("naming", Path::new(store.location())))?)
            }
            Images::Local { .. } | Images::Served { .. } => None,
        };
        let (mut digest, state) = (Hasher::new(), owned(self.vmstate(), "the vmstate")?);
        let hashed = read_all(&state, |bytes| {
            digest.update(bytes);
            Ok(())
        });
        hashed.map_err(file_error("reading", Path::new(snapshots::VMSTATE)))?;
        Ok(Base { name: provenance.name.clone(), vmstate_sha256: digest.finish(), pack })
    }

    /// Links the base's files into a snapshot. Returns whether that is possible.
    fn link_images(&self, into: &Path) -> Result<bool, SnapshotError> {
        let on_disk = self.provenance.as_ref().map_or(&[][..], |provenance| &provenance.on_disk);
        let files = match &self.images {
            Images::Local { files } if on_disk.is_empty() => files,
            Images::Local { .. } => on_disk,
            Images::Lazy { .. } | Images::Served { .. } => return Ok(false),
        };
        let base = into.join(lineage::BASE);
        fs::create_dir(&base).map_err(file_error("creating", &base))?;
        let linked = images_of(&self.configuration).zip(files).try_for_each(|(id, file)| {
            let dir = if id == ImageId::Ram { &base } else { into };
            link(file, &dir.join(IMAGE_FILES[id.index()]))
        });
        let Err(error) = linked else { return Ok(true) };
        tracing::debug!(%error, "the base's files cannot be linked: all of the memory is stored");
        fs::remove_dir_all(&base).map_err(file_error("removing", &base))?;
        Ok(false)
    }

    /// All of the machine, by itself.
    fn copy_images(&self, delta: &Delta, into: &Path) -> Result<(), SnapshotError> {
        for (id, file) in images_of(&self.configuration).zip(self.images()) {
            let bytes = self.configuration.layout.image_bytes(id);
            let (path, image) = (into.join(IMAGE_FILES[id.index()]), owned(file, "an image")?);
            let delta = Some(delta).filter(|_| id == ImageId::Ram);
            write_with(&path, |to| whole_memory::write(&image, delta, bytes, to, &|_| ()))?;
        }
        Ok(())
    }

    fn trace_bytes(&self, provenance: &Provenance) -> Result<Vec<u8>, SaveChildError> {
        let none = || Ok(Trace { regions: Vec::new() }.encode()?);
        match (&self.images, &provenance.trace) {
            (Images::Lazy { trace, .. }, _) => Ok(trace.encode()?),
            (_, None) => none(),
            (_, Some(file)) => {
                let mut bytes = Vec::new();
                let read = read_all(file, |piece| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                });
                read.map_err(file_error("reading", Path::new(snapshots::TRACE)))?;
                Ok(bytes)
            }
        }
    }
}

fn link(file: &OwnedFd, to: &Path) -> io::Result<()> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, &from, CWD, to, AtFlags::SYMLINK_FOLLOW)?)
}

fn owned(file: BorrowedFd<'_>, what: &str) -> Result<File, SnapshotError> {
    let owned = file.try_clone_to_owned().map_err(file_error("opening", Path::new(what)))?;
    Ok(owned.into())
}

fn write_with(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), SnapshotError> {
    File::create_new(path).and_then(|file| write(&file)).map_err(file_error("writing", path))
}

fn copy_all(from: &File, to: &File) -> io::Result<()> {
    let mut at = 0;
    read_all(from, |piece| {
        to.write_all_at(piece, at)?;
        at += piece.len() as u64;
        Ok(())
    })
}

/// Reads a small file from its start, wherever others who share the descriptor stand in it.
fn read_all(file: &File, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let (mut buffer, mut at) = (vec![0; 64 << 10], 0);
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(()),
            read => {
                each(&buffer[..read])?;
                at += read as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::snapshots::MachineConfiguration;
    use forkd_fs::digest::Digest;
    use forkd_fs::format::PACK_VERSION;
    use forkd_fs::manifest::{self, Manifest, Requires};
    use forkd_vmm::kvm::KvmKind;
    use forkd_vmm::memory::{MemoryLayout, PAGE_BYTES as PAGE, create_image};
    use rustix::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    const RAM: u64 = 64 << 20;

    /// A snapshot with `byte` in page 5 of its memory.
    fn write_snapshot(dir: &Path, byte: u8) {
        let layout = MemoryLayout::new(64, PAGE).unwrap();
        let configuration = MachineConfiguration::new(layout, 1, KvmKind::Pvm, 0);
        let manifest = Manifest {
            forkd_pack_version: PACK_VERSION,
            tag: "t".to_owned(),
            description: "described".to_owned(),
            base_image: String::new(),
            created_at: String::new(),
            forkd_version: String::new(),
            requires: Requires {
                memory_mib: 64,
                vcpus: 1,
                kvm_kind: manifest::KvmKind::Pvm,
                kernel: String::new(),
                vmstate_version: 1,
                cpu_features: Vec::new(),
                cpu_vendor: String::new(),
            },
            files: Vec::new(),
            probe: None,
        };
        fs::create_dir_all(dir).unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
        write(snapshots::CONFIGURATION, &serde_json::to_vec(&configuration).unwrap());
        write(snapshots::MANIFEST, manifest.to_toml().as_bytes());
        write(snapshots::VMSTATE, b"state");
        let disk = File::create(dir.join(snapshots::ROOT_DISK)).unwrap();
        disk.set_len(layout.root_disk_bytes).unwrap();
        disk.write_all_at(&[7; PAGE as usize], 0).unwrap();
        let memory = File::create(dir.join(snapshots::MEMORY)).unwrap();
        memory.set_len(RAM).unwrap();
        memory.write_all_at(&[byte; PAGE as usize], 5 * PAGE).unwrap();
    }

    fn open(dir: &Path) -> Template {
        Template::open_local(dir, KvmKind::Pvm).unwrap()
    }

    /// What `page` of the memory is, byte for byte, in a delta.
    fn delta(page: u64, byte: u8) -> Delta {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
        let table = [page * PAGE, (page + 1) * PAGE].map(u64::to_le_bytes).concat();
        file.write_all_at(&table, RAM).unwrap();
        Delta::open(file.into(), RAM).unwrap()
    }

    fn save(template: &Template, delta: &Delta, into: &Path) -> Option<Base> {
        let vmstate = create_image("state", 3).unwrap();
        rustix::io::pwrite(&vmstate, b"new", 0).unwrap();
        fs::create_dir_all(into).unwrap();
        let child = SavedChild { child: "a-1", vmstate: vmstate.as_fd(), delta };
        template.save_child(child, "kept", into).unwrap()
    }

    fn byte_of(file: impl rustix::fd::AsFd, page: u64) -> u8 {
        let mut byte = [0];
        rustix::io::pread(file, &mut byte, page * PAGE).unwrap();
        byte[0]
    }

    #[test]
    fn a_childs_snapshot_is_what_differs_and_outlives_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let (base, kept, again) = (dir.path().join("t"), dir.path().join("kept"), dir.path().join("again"));
        write_snapshot(&base, 50);
        let saved = save(&open(&base).called("t"), &delta(9, 90), &kept).unwrap();
        assert_eq!((&*saved.name, saved.vmstate_sha256), ("t", Digest::of(b"state")));
        assert!(!kept.join(snapshots::MEMORY).exists());
        assert!(fs::metadata(kept.join(lineage::DELTA)).unwrap().blocks() * 512 <= 4 * PAGE);
        let manifest = Manifest::parse(&fs::read(kept.join(snapshots::MANIFEST)).unwrap()).unwrap();
        assert_eq!((&*manifest.tag, &*manifest.description), ("kept", "described"));
        assert_eq!(fs::read(kept.join(snapshots::VMSTATE)).unwrap(), b"new");

        // Another of the base's name is not its base.
        fs::remove_dir_all(&base).unwrap();
        write_snapshot(&base, 51);
        let template = open(&kept).called("kept");
        let (image, own) = (template.images()[0], template.delta().unwrap());
        assert_eq!((byte_of(image, 5), byte_of(image, 9), byte_of(own.file(), 9)), (50, 0, 90));

        // A snapshot of a child of its has the same base.
        let next = save(&template, &delta(9, 91), &again).unwrap();
        assert_eq!(next, saved);
        let lineage = Lineage::read(&again).unwrap().unwrap();
        assert_eq!((&*lineage.forked_from, &*lineage.child), ("kept", "a-1"));
        fs::remove_dir_all(&kept).unwrap();
        let template = open(&again);
        assert_eq!(
            (byte_of(template.images()[0], 5), byte_of(template.delta().unwrap().file(), 9)),
            (50, 91)
        );
    }

    #[test]
    fn all_is_stored_where_the_base_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (base, whole) = (dir.path().join("t"), dir.path().join("whole"));
        write_snapshot(&base, 50);
        let template = open(&base).called("t");
        fs::remove_dir_all(&base).unwrap();
        assert_eq!(save(&template, &delta(9, 90), &whole), None);
        assert!(!whole.join(lineage::BASE).exists() && !whole.join(lineage::DELTA).exists());
        let template = open(&whole);
        let image = template.images()[0];
        assert!(template.delta().is_none());
        assert_eq!((byte_of(image, 5), byte_of(image, 9), byte_of(template.images()[1], 0)), (50, 90, 7));
        assert!(fs::metadata(whole.join(snapshots::MEMORY)).unwrap().blocks() * 512 <= 8 * PAGE);
    }

    #[test]
    fn what_is_held_in_memory_has_the_same_base_and_the_same_difference() {
        let dir = tempfile::tempdir().unwrap();
        let (base, kept, again) = (dir.path().join("t"), dir.path().join("kept"), dir.path().join("again"));
        write_snapshot(&base, 50);
        let saved = save(&open(&base).called("t"), &delta(9, 90), &kept);
        let held = open(&kept).into_memory().unwrap();
        let (said, files) = held.resident().unwrap();
        let template = Template::from_resident(said, files, KvmKind::Pvm).unwrap().called("kept");
        let image = template.images()[0];
        assert_eq!((byte_of(image, 5), byte_of(template.delta().unwrap().file(), 9)), (50, 90));
        assert_eq!(save(&template, &delta(9, 91), &again), saved);
        assert!(again.join(lineage::BASE).join(snapshots::MEMORY).exists());
    }

    #[test]
    fn nothing_can_be_kept_of_what_nobody_describes() {
        let template = crate::fork::template::empty_template();
        let child = SavedChild { child: "a-1", vmstate: template.vmstate(), delta: &delta(9, 90) };
        let refused = template.save_child(child, "kept", Path::new("/nowhere"));
        assert!(matches!(refused, Err(SaveChildError::NoManifest)), "{refused:?}");
    }
}
