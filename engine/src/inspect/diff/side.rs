//! One of the two that are compared: a pack, or a local snapshot's directory.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use forkd_fs::digest::Digest;
use forkd_fs::format::{self, MANIFEST};
use forkd_fs::index::{ChunkId, FileId};
use forkd_fs::store::{ReadError, Store};

use crate::local::snapshots::LockedSnapshot;

/// A file of it.
#[derive(Debug, Clone)]
pub(super) struct SideFile {
    pub(super) name: String,
    /// Bytes.
    pub(super) size: u64,
    bytes: FileBytes,
}

#[derive(Debug, Clone)]
enum FileBytes {
    Pack(Arc<Store>, FileId),
    Directory(Arc<File>, PathBuf),
}

/// What is known of a chunk without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// It is all zeros, or past the end of its file.
    Zero,
    /// The digest of its frame.
    Frame(Digest),
    /// Nothing.
    Nothing,
}

/// A file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SideError {
    /// Of a pack.
    #[error(transparent)]
    Pack(#[from] ReadError),
    /// Of a snapshot's directory.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The files of a pack, all but the manifest, which lists the others.
pub(super) fn of_pack(store: &Arc<Store>) -> Vec<SideFile> {
    let files = store.index().files().filter(|(_, entry)| entry.name != MANIFEST);
    files
        .map(|(id, entry)| SideFile {
            name: entry.name.clone(),
            size: entry.size,
            bytes: FileBytes::Pack(store.clone(), id),
        })
        .collect()
}

/// The files of a snapshot that a pack of it would have, all but the manifest.
pub(super) fn of_directory(snapshot: &LockedSnapshot) -> Result<Vec<SideFile>, SideError> {
    let dir = snapshot.path();
    let failed = |path: PathBuf| move |source| SideError::File { path, source };
    let mut files = Vec::new();
    for entry in fs::read_dir(&dir).map_err(failed(dir.clone()))? {
        let entry = entry.map_err(failed(dir.clone()))?;
        let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        if name == MANIFEST || !format::is_plain_name(&name) {
            continue;
        }
        let file = File::open(&path).map_err(failed(path.clone()))?;
        let metadata = file.metadata().map_err(failed(path.clone()))?;
        if metadata.is_file() {
            let bytes = FileBytes::Directory(Arc::new(file), path);
            files.push(SideFile { name, size: metadata.len(), bytes });
        }
    }
    Ok(files)
}

impl SideFile {
    /// What is known of chunk number `chunk`, where chunks have `chunk_size` bytes.
    pub(super) fn known(&self, chunk: u32, chunk_size: u32) -> Known {
        if format::chunk_len(self.size, chunk_size, chunk) == 0 {
            return Known::Zero;
        }
        match &self.bytes {
            FileBytes::Pack(store, file) if store.index().chunk_size() == chunk_size => {
                let record = store.index().record(ChunkId { file: *file, chunk });
                record.map_or(Known::Zero, |record| Known::Frame(record.digest))
            }
            FileBytes::Pack(..) | FileBytes::Directory(..) => Known::Nothing,
        }
    }

    /// A chunk's bytes; those past the end of the file are zeros.
    pub(super) async fn read(&self, chunk: u32, chunk_size: u32) -> Result<Bytes, SideError> {
        let (offset, len) =
            (u64::from(chunk) * u64::from(chunk_size), format::chunk_len(self.size, chunk_size, chunk));
        let bytes = match &self.bytes {
            _ if len == 0 => Bytes::new(),
            FileBytes::Pack(store, file) => store.read(*file, offset, len.into()).await?,
            FileBytes::Directory(file, path) => {
                let (file, path) = (file.clone(), path.clone());
                let read = tokio::task::spawn_blocking(move || {
                    let mut bytes = vec![0; len as usize];
                    file.read_exact_at(&mut bytes, offset).map(|()| Bytes::from(bytes))
                });
                let read = read.await.unwrap_or_else(|_| Err(io::Error::other("forkd is stopping")));
                read.map_err(|source| SideError::File { path, source })?
            }
        };
        if bytes.len() == chunk_size as usize {
            return Ok(bytes);
        }
        let mut whole = bytes.to_vec();
        whole.resize(chunk_size as usize, 0);
        Ok(whole.into())
    }
}
