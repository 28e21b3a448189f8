//! Packing: a local snapshot into one file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_fs::cache::CacheOptions;
use forkd_fs::digest::Digest;
use forkd_fs::format::{DEFAULT_CHUNK_SIZE, MANIFEST};
use forkd_fs::manifest::{Manifest, ManifestError};
use forkd_fs::writer::{PackOptions, PackSummary, PackWriter, Pass, WriteError};
use serde::Serialize;

use crate::build::pack_base::{BaseError, BaseRequest, OpenedBase};
use crate::build::whole::{WholeError, whole_files};
use crate::interrupt::Interrupt;
use crate::local::paths::Paths;
use crate::local::run_dir::RunDir;
use crate::local::snapshots::{LockedSnapshot, SnapshotError, file_error, manifest_bytes};
use crate::local::workspace::{Workspace, WorkspaceError};
use crate::progress::{Amount, Progress};

/// Why a snapshot cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Its manifest.
    #[error("{}", path.display())]
    Manifest {
        /// The manifest's path.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// The output exists.
    #[error("{} exists already", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The chunk size is none.
    #[error("{size} bytes is no chunk size")]
    Chunk {
        /// What was given.
        size: u64,
    },
    /// It is stored as a difference, and cannot be made whole.
    #[error(transparent)]
    Whole(#[from] WholeError),
    /// The pack cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The base of the delta.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The directory to work in, or the pack's place.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
}

/// A new pack, as `forkd pack --json` shows it.
#[derive(Debug, Serialize)]
pub struct PackReport {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Of the whole file.
    pub sha256: Digest,
    /// Where its index begins, bytes.
    pub index_offset: u64,
    /// The index's length, bytes.
    pub index_size: u64,
    /// Of the index.
    pub index_sha256: Digest,
    /// Bytes of its files.
    pub plain_bytes: u64,
    /// Bytes of its stored chunks, compressed.
    pub stored_bytes: u64,
    /// All chunks.
    pub chunks: u64,
    /// Those that it stores.
    pub stored_chunks: u64,
    /// Of a delta, those that its bases store.
    pub base_chunks: u64,
    /// Digests of the indexes of the packs without which a delta is not whole, its base first.
    pub bases: Vec<Digest>,
    /// Plain bytes to those of the pack.
    pub ratio: f64,
}

impl PackReport {
    pub(super) fn new(path: &Path, summary: &PackSummary) -> PackReport {
        PackReport {
            path: path.to_owned(),
            size_bytes: summary.pack_size,
            sha256: summary.pack_sha256,
            index_offset: summary.index.offset,
            index_size: summary.index.length,
            index_sha256: summary.index.sha256,
            plain_bytes: summary.plain_bytes,
            stored_bytes: summary.stored_bytes,
            chunks: [summary.stored_chunks, summary.base_chunks, summary.zero_chunks]
                .map(u64::from)
                .iter()
                .sum(),
            stored_chunks: u64::from(summary.stored_chunks),
            base_chunks: u64::from(summary.base_chunks),
            bases: summary.bases.iter().map(|base| base.index.sha256).collect(),
            ratio: summary.ratio(),
        }
    }
}

/// What is to be packed, and how.
#[derive(Debug)]
pub struct PackRequest {
    /// The snapshot.
    pub tag: String,
    /// The new pack.
    pub out: PathBuf,
    /// Replace what is there.
    pub force: bool,
    /// Instead of the manifest's, unless empty.
    pub description: String,
    /// Instead of the manifest's, unless empty.
    pub base_image: String,
    /// How it is compressed.
    pub compression: Compression,
    /// What it is to be a delta of, if it is to be one.
    pub base: Option<BaseRequest>,
}

/// How a pack is compressed.
#[derive(Debug, Clone, Copy)]
pub struct Compression {
    /// Plain bytes of a chunk; `None` for the usual, or for that of a delta's base.
    pub chunk_bytes: Option<u64>,
    /// The zstd level.
    pub level: i32,
}

impl Compression {
    /// As the writer takes it, if the chunk size is one; `usual` is what it is unless it was chosen.
    pub(super) fn options(self, usual: u32) -> Result<PackOptions, PackError> {
        let size = self.chunk_bytes.unwrap_or(usual.into());
        let chunk_size = u32::try_from(size).ok().filter(|&size| forkd_fs::format::is_chunk_size(size));
        let chunk_size = chunk_size.ok_or(PackError::Chunk { size })?;
        Ok(PackOptions { chunk_size, level: self.level, ..PackOptions::default() })
    }
}

/// Packs a snapshot. `interrupt` is asked for when the work begins that it ends.
pub fn pack(
    paths: &Paths,
    request: &PackRequest,
    interrupt: impl FnOnce() -> Interrupt,
    progress: &dyn Progress,
) -> Result<PackReport, PackError> {
    // Held until it is packed, so that a pull that replaces the tag meanwhile does not mix two snapshots.
    let snapshot = LockedSnapshot::find(paths, &request.tag)?;
    let (directory, out) = (snapshot.path(), request.out.as_path());
    if out.exists() && !request.force {
        return Err(PackError::Exists { path: out.to_owned() });
    }
    let open_base = |base| OpenedBase::open(paths, base, (&request.tag, &directory), out);
    let base = request.base.as_ref().map(open_base).transpose()?;
    let chunk_size = base.as_ref().map_or(DEFAULT_CHUNK_SIZE, OpenedBase::chunk_size);
    let options = request.compression.options(chunk_size)?;
    let mut manifest = read_manifest(&directory)?;
    manifest.tag.clone_from(&request.tag);
    if !request.description.is_empty() {
        manifest.description.clone_from(&request.description);
    }
    if !request.base_image.is_empty() {
        manifest.base_image.clone_from(&request.base_image);
    }
    // Asked for only now: until here there is nothing to clean up.
    let interrupt = interrupt();
    let run_dir = RunDir::create(paths).map_err(WorkspaceError::from)?;
    let work = Workspace::create(out, &Arc::new(run_dir))?;
    let summary = work.until(&interrupt, || {
        let files = whole_files(paths, &directory, CacheOptions::default(), &work, progress)?;
        let files = Files { directory: &files, manifest, base: base.as_ref() };
        write(options, files, (&work, out), progress)
    })?;
    publish(&work, out, request.force)?;
    Ok(PackReport::new(out, &summary))
}

/// What goes into a pack.
pub(super) struct Files<'a> {
    pub(super) directory: &'a Path,
    pub(super) manifest: Manifest,
    pub(super) base: Option<&'a OpenedBase>,
}

/// Packs the files of a directory into a workspace beside the new pack's place, and tells how far it is.
pub(super) fn write(
    options: PackOptions,
    Files { directory, manifest, base }: Files<'_>,
    (work, out): (&Workspace, &Path),
    progress: &dyn Progress,
) -> Result<PackSummary, PackError> {
    let task = progress.begin("packing", Amount::Bytes(0));
    let on_progress = |now: forkd_fs::writer::PackProgress| {
        task.limit(now.total);
        task.to(now.done);
        task.say(match now.pass {
            Pass::Scan => "reading",
            Pass::Compare => "comparing",
            Pass::Compress => "packing",
        });
    };
    let (writer, pack) = (PackWriter::new(options), work.pack());
    let written = match base {
        None => writer.write(directory, manifest, &pack, &on_progress),
        Some(base) => base.lend(|base| writer.write_delta(directory, manifest, base, &pack, &on_progress)),
    };
    Ok(written.map_err(|error| match error {
        // People know the pack's place, not the workspace.
        WriteError::Write { source, .. } => WriteError::Write { path: out.to_owned(), source },
        error => error,
    })?)
}

/// Puts the pack in its place; without `force` nothing may be there.
pub(super) fn publish(work: &Workspace, out: &Path, force: bool) -> Result<(), PackError> {
    work.publish(out, force).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => PackError::Exists { path: out.to_owned() },
        _ => WorkspaceError::Place { path: out.to_owned(), source }.into(),
    })
}

pub(super) fn read_manifest(directory: &Path) -> Result<Manifest, PackError> {
    let path = directory.join(MANIFEST);
    let bytes = manifest_bytes(directory).map_err(file_error("reading", &path))?;
    Manifest::parse(&bytes).map_err(|source| PackError::Manifest { path, source })
}
