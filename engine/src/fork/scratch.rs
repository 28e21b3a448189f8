//! Scratch disks: one sparse file a machine, without a name, in forkd's cache directory (the run directory is often in
//! memory, and a scratch disk is there for what memory does not hold). The file is gone when its machine is, however that
//! ends.

use crate::local::snapshots::{SnapshotError, file_error};
use crate::local::sparse::copy_data;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::Path;

/// Where scratch disks lie and how large they are.
#[derive(Debug, Clone, Copy)]
pub struct Scratch<'a> {
    /// forkd's cache directory.
    pub dir: &'a Path,
    /// Size, MiB; 0 for none.
    pub mib: u32,
}

impl Scratch<'_> {
    /// Size, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.mib) << 20
    }

    /// A new, empty disk, if machines have one.
    pub fn create(&self) -> Result<Option<File>, SnapshotError> {
        if self.mib == 0 {
            return Ok(None);
        }
        fs::create_dir_all(self.dir).map_err(file_error("creating", self.dir))?;
        let failed = file_error("creating a scratch disk in", self.dir);
        let created =
            tempfile::tempfile_in(self.dir).and_then(|file| file.set_len(self.bytes()).map(|()| file));
        created.map(Some).map_err(failed)
    }

    /// What a disk of these holds now, on another. Nobody writes to it meanwhile.
    pub fn copy(&self, disk: &File) -> Result<Option<File>, SnapshotError> {
        let Some(copy) = self.create()? else { return Ok(None) };
        // Where the file system can, both have the same blocks until one writes.
        if rustix::fs::ioctl_ficlone(&copy, disk).is_err() {
            let failed = file_error("copying a scratch disk in", self.dir);
            copy_data(disk, &copy, self.bytes(), &|_| ()).map_err(failed)?;
        }
        Ok(Some(copy))
    }

    /// Whether anything was ever written to a disk and not discarded since.
    pub fn is_written(&self, disk: &File) -> Result<bool, SnapshotError> {
        match rustix::fs::seek(disk, SeekFrom::Data(0)) {
            Ok(_) => Ok(true),
            // No data.
            Err(Errno::NXIO) => Ok(false),
            Err(errno) => Err(file_error("reading a scratch disk in", self.dir)(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn disks_have_no_name_take_no_room_and_know_when_they_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("cache");
        let scratch = Scratch { dir: &below, mib: 64 };
        let disk = scratch.create().unwrap().unwrap();
        assert_eq!(fs::read_dir(&below).unwrap().count(), 0);
        let metadata = disk.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (64 << 20, 0));
        assert!(!scratch.is_written(&disk).unwrap());
        disk.write_all_at(b"x", 40 << 20).unwrap();
        assert!(scratch.is_written(&disk).unwrap());
        let copy = scratch.copy(&disk).unwrap().unwrap();
        disk.write_all_at(b"y", 40 << 20).unwrap();
        let (mut byte, metadata) = ([0], copy.metadata().unwrap());
        copy.read_exact_at(&mut byte, 40 << 20).unwrap();
        assert_eq!((&byte, metadata.len()), (b"x", 64 << 20));
        assert!(metadata.blocks() * 512 <= 1 << 20, "{} blocks", metadata.blocks());
        assert!(Scratch { dir: &below, mib: 0 }.create().unwrap().is_none());
    }
}
