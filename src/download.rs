//! A whole pack in a local file, checked against the digest of the whole: for packs whose index no registry pins.
//!
//! What is known by its digest is downloaded into `downloads/SHA256.partial` in the cache directory, and an interrupted
//! download goes on from there, whatever process or machine start comes between. Used by `pull` and `cache gc`.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use forkd_fs::digest::{Digest, Hasher};
use forkd_fs::source::{Class, Deadlines, FileSource, HttpClient, Source, SourceError};
use forkd_fs::store::{PackSource, StoreOptions};
use rustix::fs::{FlockOperation, flock};

use crate::output::Output;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::registry::Resolved;

/// Interrupted downloads older than this are garbage.
const STALE_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a pack cannot be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The host.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It is not the one that was registered.
    #[error("{reference} has sha256 {found}, the registry says {expected}")]
    Digest {
        /// What was downloaded.
        reference: String,
        /// What the registry says.
        expected: Digest,
        /// What the bytes hash to.
        found: Digest,
    },
    /// The file cannot be written.
    #[error("{}", path.display())]
    File {
        /// The file or its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A downloaded pack; removed when dropped.
#[derive(Debug)]
pub struct Download {
    path: PathBuf,
    /// Locked, so that two processes do not write one file.
    file: File,
    keep: bool,
}

impl Download {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Downloads a pack of the hub, or what is missing of it.
    pub async fn fetch(
        resolved: &Resolved,
        expected: Option<Digest>,
        paths: &Paths,
        http: &HttpClient,
        output: &Output,
    ) -> Result<Download, DownloadError> {
        let source = source(resolved, http)?;
        let size = source.size().await?;
        let mut download = Download::open(&directory(paths), expected)?;
        let progress = Progress::bytes(output, &format!("downloading {}", resolved.reference), size);
        loop {
            let resumed = download.len()?;
            let found = download.complete(&source, size, &progress).await?;
            match expected.filter(|&expected| expected != found) {
                None => {
                    download.keep = false;
                    return Ok(download);
                }
                // What an earlier process left may be at fault.
                Some(_) if resumed > 0 => download.truncate()?,
                Some(expected) => {
                    download.keep = false;
                    let reference = resolved.reference.to_string();
                    return Err(DownloadError::Digest { reference, expected, found });
                }
            }
        }
    }

    /// Opens what is there already. Without a digest to know it by, nothing is.
    fn open(directory: &Path, expected: Option<Digest>) -> Result<Download, DownloadError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| DownloadError::File { path, source }
        };
        fs::create_dir_all(directory).map_err(failed(directory))?;
        let Some(digest) = expected else {
            let made = tempfile::Builder::new().suffix(".partial").tempfile_in(directory);
            let (file, path) = made
                .and_then(|file| file.keep().map_err(|failed| failed.error))
                .map_err(failed(directory))?;
            return Ok(Download { path, file, keep: false });
        };
        let path = directory.join(format!("{digest}.partial"));
        loop {
            let opened = File::options().read(true).write(true).create(true).truncate(false).open(&path);
            let file = opened.map_err(failed(&path))?;
            // Waits for another process that downloads the same.
            flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed(&path)(errno.into()))?;
            // That one may have removed it when it was done.
            if is_at(&file, &path) {
                return Ok(Download { path, file, keep: true });
            }
        }
    }

    fn failed(&self) -> impl Fn(io::Error) -> DownloadError + use<> {
        let path = self.path.clone();
        move |source| DownloadError::File { path: path.clone(), source }
    }

    fn len(&self) -> Result<u64, DownloadError> {
        Ok(self.file.metadata().map_err(self.failed())?.len())
    }

    fn truncate(&mut self) -> Result<(), DownloadError> {
        self.file.set_len(0).map_err(self.failed())
    }

    /// Hashes what is there and downloads the rest. Returns the digest of the whole.
    async fn complete(
        &mut self,
        source: &Source,
        size: u64,
        progress: &Progress,
    ) -> Result<Digest, DownloadError> {
        let failed = self.failed();
        if self.len()? > size {
            self.truncate()?;
        }
        self.file.seek(SeekFrom::Start(0)).map_err(&failed)?;
        let mut hasher = Hasher::new();
        let mut done = io::copy(&mut self.file, &mut hasher).map_err(&failed)?;
        let mut body = source.stream_at(done, size - done, Class::Prefetch);
        while let Some(piece) = body.next().await? {
            hasher.update(&piece);
            if let Err(error) = self.file.write_all(&piece) {
                // A full disk is better off without it.
                self.keep = false;
                return Err(failed(error));
            }
            done += piece.len() as u64;
            progress.to(done);
        }
        Ok(hasher.finish())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn directory(paths: &Paths) -> PathBuf {
    paths.cache.join("downloads")
}

fn source(resolved: &Resolved, http: &HttpClient) -> Result<Source, SourceError> {
    match &resolved.location.source {
        PackSource::Url(url) => {
            let StoreOptions { demand_deadline: demand, prefetch_deadline: prefetch, .. } =
                StoreOptions::default();
            let deadlines = Deadlines { demand, prefetch };
            Ok(Source::Http(http.source(url, resolved.location.size, deadlines)?))
        }
        PackSource::Path(path) => Ok(Source::File(FileSource::open(path)?)),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (Ok(file), Ok(path)) = (file.metadata(), fs::metadata(path)) else { return false };
    place(file) == place(path)
}

/// Removes interrupted downloads nobody works on: old ones, or `all`. Returns how many, and their bytes.
pub fn collect(paths: &Paths, all: bool) -> (u64, u64) {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(directory(paths)).into_iter().flatten().flatten() {
        let Ok(file) = File::open(entry.path()) else { continue };
        let Ok(metadata) = file.metadata() else { continue };
        let old = metadata
            .modified()
            .is_ok_and(|used| SystemTime::now().duration_since(used).is_ok_and(|age| age > STALE_AFTER));
        let free = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if (old || all) && free && fs::remove_file(entry.path()).is_ok() {
            files += 1;
            bytes += metadata.len();
        }
    }
    (files, bytes)
}
