//! A whole pack in a local file, checked against the digest of the whole: for packs whose index no registry pins.
//!
//! What is known by its digest is downloaded into `downloads/SHA256.partial` in the cache directory, and an interrupted
//! download goes on from there, whatever process or machine start comes between. What is not cannot: `forkd cleanup` removes
//! it.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use forkd_fs::digest::{Digest, Hasher};
use forkd_fs::source::{HttpClient, Priority, Source, SourceError};
use forkd_fs::store::{PackLocation, StoreOptions};
use rustix::fs::{FlockOperation, flock};

use crate::hub::registry::{Resolved, whole_digest};
use crate::local::paths::Paths;
use crate::local::work_dir;
use crate::progress::{Amount, Progress, Task};

/// Interrupted downloads older than this are garbage.
const STALE_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);

/// How files are named of which no digest is known.
const UNKNOWN_PREFIX: &str = ".unknown-";

/// Largest pack downloaded whole, in bytes.
const MAX_PACK: u64 = 64 << 30;

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
    /// The registry's digest is none.
    #[error("the registry's sha256 of {reference} is no sha256")]
    BadDigest {
        /// What was to be downloaded.
        reference: String,
    },
    /// Larger than any pack may be.
    #[error("{location} has {size} bytes, at most {MAX_PACK} are downloaded")]
    TooLarge {
        /// URL or path.
        location: String,
        /// Its size in bytes.
        size: u64,
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

/// What the registry says that the whole pack hashes to, if anything.
pub fn registered_digest(resolved: &Resolved) -> Result<Option<Digest>, DownloadError> {
    let bad = |_| DownloadError::BadDigest { reference: resolved.reference.to_string() };
    whole_digest(&resolved.entry).transpose().map_err(bad)
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
        progress: &dyn Progress,
    ) -> Result<Download, DownloadError> {
        let source = source(&resolved.location, http)?;
        let size = size_of(&source).await?;
        let mut download = Download::open(&directory(paths), expected)?;
        let task = progress.begin(&format!("downloading {}", resolved.reference), Amount::Bytes(size));
        loop {
            let resumed = download.len()?;
            let found = download.complete(&source, size, &*task).await?;
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

    /// Downloads a pack that nothing vouches for, into a directory which the caller removes.
    pub async fn fetch_unknown(
        location: &PackLocation,
        directory: &Path,
        http: &HttpClient,
        progress: &dyn Progress,
    ) -> Result<Download, DownloadError> {
        let source = source(location, http)?;
        let size = size_of(&source).await?;
        let mut download = Download::open(directory, None)?;
        let task = progress.begin("downloading", Amount::Bytes(size));
        download.complete(&source, size, &*task).await?;
        Ok(download)
    }

    /// Opens what is there already. Without a digest to know it by, nothing is.
    fn open(directory: &Path, expected: Option<Digest>) -> Result<Download, DownloadError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| DownloadError::File { path, source }
        };
        fs::create_dir_all(directory).map_err(failed(directory))?;
        let path = expected.map(|digest| directory.join(format!("{digest}.partial")));
        loop {
            let Some(path) = &path else {
                let made =
                    tempfile::Builder::new().prefix(UNKNOWN_PREFIX).suffix(".partial").tempfile_in(directory);
                let (file, path) = made
                    .and_then(|file| file.keep().map_err(|failed| failed.error))
                    .map_err(failed(directory))?;
                // Nobody else knows its name but who collects what is left.
                flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed(&path)(errno.into()))?;
                if work_dir::is_at(&file, &path) {
                    return Ok(Download { path, file, keep: false });
                }
                continue;
            };
            let opened = File::options().read(true).write(true).create(true).truncate(false).open(path);
            let file = opened.map_err(failed(path))?;
            // Waits for another process that downloads the same.
            flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed(path)(errno.into()))?;
            // That one may have removed it when it was done.
            if work_dir::is_at(&file, path) {
                return Ok(Download { path: path.clone(), file, keep: true });
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

    /// Says before the download rather than near its end that the disk is too full for it.
    fn check_room(&self, size: u64) -> Result<(), DownloadError> {
        let failed = self.failed();
        let disk = rustix::fs::fstatvfs(&self.file).map_err(|errno| failed(errno.into()))?;
        let room = disk.f_bavail.saturating_mul(disk.f_frsize);
        match size.saturating_sub(self.len()?) > room {
            true => Err(failed(rustix::io::Errno::NOSPC.into())),
            false => Ok(()),
        }
    }

    fn truncate(&mut self) -> Result<(), DownloadError> {
        self.file.set_len(0).map_err(self.failed())
    }

    /// Hashes what is there and downloads the rest. Returns the digest of the whole.
    async fn complete(
        &mut self,
        source: &Source,
        size: u64,
        task: &dyn Task,
    ) -> Result<Digest, DownloadError> {
        let failed = self.failed();
        if self.len()? > size {
            self.truncate()?;
        }
        self.check_room(size)?;
        self.file.seek(SeekFrom::Start(0)).map_err(&failed)?;
        let mut hasher = Hasher::new();
        let mut done = io::copy(&mut self.file, &mut hasher).map_err(&failed)?;
        let mut body = source.stream_at(done, size - done, Priority::Prefetch);
        while let Some(piece) = body.next().await? {
            hasher.update(&piece);
            if let Err(error) = self.file.write_all(&piece) {
                // A full disk is better off without it.
                self.keep = false;
                return Err(failed(error));
            }
            done += piece.len() as u64;
            task.to(done);
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

fn source(location: &PackLocation, http: &HttpClient) -> Result<Source, SourceError> {
    StoreOptions { http: http.clone(), ..StoreOptions::default() }.source(location)
}

async fn size_of(source: &Source) -> Result<u64, DownloadError> {
    let size = source.size().await?;
    match size > MAX_PACK {
        true => Err(DownloadError::TooLarge { location: source.describe().to_owned(), size }),
        false => Ok(size),
    }
}

/// Removes interrupted downloads that nobody works on and that nobody can go on with; returns their paths.
pub fn remove_dead(paths: &Paths) -> io::Result<Vec<PathBuf>> {
    work_dir::remove_dead(&directory(paths), UNKNOWN_PREFIX)
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
