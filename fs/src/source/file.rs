//! Packs in local files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;

use super::counters::TransferCounters;
use super::priority::Priority;
use crate::observe::{Observer, Watched};

/// Bytes handed over at a time.
const PIECE: u64 = 512 << 10;

/// A local file, held open.
#[derive(Debug, Clone)]
pub struct FileSource(Arc<Shared>, Option<Arc<dyn Observer>>);

#[derive(Debug)]
struct Shared {
    file: File,
    path: String,
    size: u64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// Why a local file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a device or the like.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// A read failed or met the end of the file, which was cut since it was opened.
    #[error("cannot read {len} bytes at {offset} of {path}")]
    Read {
        /// The file.
        path: String,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl FileSource {
    /// Opens a file for reading.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(FileError::NotAFile { path: path.to_owned() });
        }
        let (path, size) = (path.display().to_string(), metadata.len());
        let (requests, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Self(Arc::new(Shared { file, path, size, requests, bytes }), None))
    }

    /// The same, with somebody who hears of its reads.
    pub fn observed_by(self, observer: Option<Arc<dyn Observer>>) -> Self {
        Self(self.0, observer)
    }

    /// Its size when it was opened, in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Its path, for messages.
    pub fn path(&self) -> &str {
        &self.0.path
    }

    pub(super) fn counters(&self) -> TransferCounters {
        TransferCounters { requests: self.0.requests.load(Relaxed), bytes: self.0.bytes.load(Relaxed) }
    }

    pub(super) fn stream_at(&self, offset: u64, len: u64, priority: Priority) -> FileBody {
        self.0.requests.fetch_add(1, Relaxed);
        let watched = Watched::start(self.1.as_ref(), priority);
        FileBody { shared: self.0.clone(), next: offset, end: offset + len, watched }
    }
}

/// A range of a local file on its way.
#[derive(Debug)]
pub struct FileBody {
    shared: Arc<Shared>,
    next: u64,
    end: u64,
    watched: Option<Watched>,
}

impl FileBody {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, FileError> {
        let (offset, len) = (self.next, (self.end - self.next).min(PIECE));
        if len == 0 {
            return Ok(None);
        }
        let shared = self.shared.clone();
        let read = move || {
            let mut piece = vec![0; len as usize];
            shared.file.read_exact_at(&mut piece, offset).map(|()| piece)
        };
        let piece = tokio::task::spawn_blocking(read).await.map_err(io::Error::other).and_then(|read| read);
        let failed = |source| FileError::Read { path: self.shared.path.clone(), offset, len, source };
        let piece = piece.map_err(failed)?;
        self.next += len;
        self.shared.bytes.fetch_add(len, Relaxed);
        if let Some(watched) = &mut self.watched {
            watched.arrived(len);
        }
        if self.next == self.end {
            self.watched = None;
        }
        Ok(Some(piece.into()))
    }
}
