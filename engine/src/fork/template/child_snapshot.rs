//! Saving a moment of a child as a local snapshot, which stores what differs from what the child's fork was of.
//!
//! The base of a fork of a local snapshot is that snapshot's files, which are linked: links to files on disk cost nothing
//! and outlive the base's tag. Where they cannot be linked (their tag is gone, or they lie on another file system), all of
//! the memory is stored. The base of a fork of a pack is the pack, by its index's digest.

use super::{IMAGE_FILES, Images, Template, images_of};
use crate::local::lineage::{self, Base, BasePack, Lineage};
use crate::local::snapshots::{self, SnapshotError, file_error};
use crate::local::whole_memory;
use forkd_fs::digest::Hasher;
use forkd_fs::manifest::Manifest;
use forkd_fs::trace::{Trace, TraceError};
use forkd_vmm::memory::{Delta, ImageId};
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, linkat};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

/// What a template was opened from.
#[derive(Debug, Default)]
pub(super) struct Provenance {
    /// What it was called, as far as that is settled.
    name: String,
    manifest: Option<Manifest>,
    /// What it is a difference from itself.
    base: Option<Base>,
    /// The pages of a first restore, where there is a file of them.
    trace: Option<File>,
    /// The images on disk, in their order, where those that are mapped are in memory.
    on_disk: Vec<OwnedFd>,
}

/// What another process that holds the images says of them.
#[derive(Debug, Serialize, Deserialize)]
pub struct ResidentProvenance {
    manifest: Manifest,
    base: Base,
}

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

impl Provenance {
    pub(super) fn of_snapshot(
        manifest: Option<Manifest>,
        lineage: Option<Lineage>,
        trace: Option<File>,
    ) -> Option<Provenance> {
        let base = lineage.and_then(|lineage| lineage.base);
        Some(Provenance { manifest, base, trace, ..Provenance::default() })
    }

    pub(super) fn of_pack(manifest: Manifest) -> Provenance {
        Provenance { manifest: Some(manifest), ..Provenance::default() }
    }

    pub(super) fn of_resident(said: ResidentProvenance, on_disk: Vec<OwnedFd>) -> Provenance {
        let ResidentProvenance { manifest, base } = said;
        Provenance { manifest: Some(manifest), base: Some(base), on_disk, ..Provenance::default() }
    }

    /// The images' files are about to be replaced by others in memory.
    pub(super) fn keep_on_disk(&mut self, file: OwnedFd) {
        self.on_disk.push(file);
    }
}

impl Template {
    /// The same, which people call `name`.
    pub fn called(mut self, name: &str) -> Template {
        self.provenance.get_or_insert_default().name = name.to_owned();
        self
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
