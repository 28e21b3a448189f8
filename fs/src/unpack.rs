//! Unpacking a v3 pack into plain files through the verified index.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::digest::Digest;
use crate::format::{DEFAULT_CHUNK_SIZE, MANIFEST};
use crate::index::{ChunkId, FileId};
use crate::manifest::Manifest;
use crate::scan::scan;
use crate::source::Priority;
use crate::store::{ChunkData, FetchProgress, ReadError, Store};

/// Why a pack could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The pack could not be read.
    #[error("cannot read the pack {location}")]
    Read {
        /// URL or path of the pack.
        location: String,
        /// Why.
        #[source]
        source: Box<ReadError>,
    },
    /// Manifest and index do not tell of the same files.
    #[error("the manifest and the index of {location} disagree about {name}")]
    Mismatch {
        /// URL or path of the pack.
        location: String,
        /// The file.
        name: String,
    },
    /// An output file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// An output file is not what the manifest lists.
    #[error("{name} of {location} has sha256 {found}, its manifest says {expected}")]
    Digest {
        /// URL or path of the pack.
        location: String,
        /// The file.
        name: String,
        /// What the manifest says.
        expected: Digest,
        /// What was written.
        found: Digest,
    },
}

/// A file being written.
struct Output {
    path: PathBuf,
    file: File,
    /// What the manifest says it hashes to; the manifest itself is vouched for by the index alone.
    expected: Option<Digest>,
}

/// Writes every file of the pack into the existing directory `dest`, in which none of them may exist, with holes for
/// zeros. Each is checked against the manifest and on disk when this returns; the caller renames `dest` into place, or
/// removes it after an error. `on_progress` is called as chunks arrive.
pub async fn unpack(
    store: &Arc<Store>,
    dest: &Path,
    on_progress: &(dyn Fn(FetchProgress) + Send + Sync),
) -> Result<Arc<Manifest>, UnpackError> {
    let unreadable =
        |error| UnpackError::Read { location: store.location().to_owned(), source: Box::new(error) };
    let manifest = store.manifest().await.map_err(unreadable)?;
    let outputs = create(store, &manifest, dest)?;
    let failure = Mutex::new(None);
    let write = |id: ChunkId, data: ChunkData| {
        let ChunkData::Data(plain) = data else { return };
        let output = &outputs[id.file.0 as usize];
        let offset = u64::from(id.chunk) * u64::from(store.index().chunk_size());
        if let Err(source) = output.file.write_all_at(&plain, offset) {
            let path = output.path.clone();
            failure.lock().expect("no panics while held").get_or_insert(UnpackError::Write { path, source });
        }
        on_progress(store.progress());
    };
    // Short batches, so that a full disk ends it soon.
    let stored: Vec<ChunkId> = store
        .index()
        .files()
        .flat_map(|(file, _)| store.index().stored_chunks(file).map(|(id, _)| id))
        .collect();
    for batch in stored.chunks(4096) {
        store.fetch(&[batch.to_vec()], Priority::Prefetch, &write).await.map_err(unreadable)?;
        if let Some(error) = failure.lock().expect("no panics while held").take() {
            return Err(error);
        }
    }
    check(store, outputs).await?;
    Ok(manifest)
}

/// Creates the output files at full length, all hole, after checking that the manifest lists exactly the pack's files.
fn create(store: &Store, manifest: &Manifest, dest: &Path) -> Result<Vec<Output>, UnpackError> {
    let index = store.index();
    let mismatch =
        |name: &str| UnpackError::Mismatch { location: store.location().to_owned(), name: name.to_owned() };
    if let Some(file) = manifest.files.iter().find(|file| index.file(&file.path).is_none()) {
        return Err(mismatch(&file.path));
    }
    let output = |(_, entry): (FileId, &crate::index::FileEntry)| {
        let listed = manifest.file(&entry.name);
        if entry.name != MANIFEST && listed.is_none_or(|file| file.size != entry.size) {
            return Err(mismatch(&entry.name));
        }
        // A plain file name: the index has no others.
        let path = dest.join(&entry.name);
        let made = File::create_new(&path).and_then(|file| file.set_len(entry.size).map(|()| file));
        match made {
            Ok(file) => Ok(Output { path, file, expected: listed.map(|file| file.sha256) }),
            Err(source) => Err(UnpackError::Write { path, source }),
        }
    };
    index.files().map(output).collect()
}

/// Reads back and syncs every file, side by side.
async fn check(store: &Store, outputs: Vec<Output>) -> Result<(), UnpackError> {
    let check_one = |output: Output| {
        tokio::task::spawn_blocking(move || {
            let reopened = File::open(&output.path).and_then(|file| scan(&file, DEFAULT_CHUNK_SIZE, &|_| ()));
            let found = reopened.and_then(|scan| output.file.sync_data().map(|()| scan.digest));
            (output, found)
        })
    };
    let running: Vec<_> = outputs.into_iter().map(check_one).collect();
    for checked in running {
        let stopped = |_| {
            let (location, source) = (store.location().to_owned(), Box::new(ReadError::Stopped));
            UnpackError::Read { location, source }
        };
        let (Output { path, expected, .. }, found) = checked.await.map_err(stopped)?;
        let found = found.map_err(|source| UnpackError::Write { path: path.clone(), source })?;
        if let Some(expected) = expected.filter(|&expected| expected != found) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(UnpackError::Digest { location: store.location().to_owned(), name, expected, found });
        }
    }
    Ok(())
}
