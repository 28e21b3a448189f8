//! `forkd pack`: a local snapshot into one file.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use forkd_fs::digest::Digest;
use forkd_fs::format::MANIFEST;
use forkd_fs::manifest::{MAX_MANIFEST_LEN, Manifest, ManifestError};
use forkd_fs::writer::{PackOptions, PackSummary, PackWriter, Pass, WriteError};
use serde::Serialize;

use crate::cli::PackArgs;
use crate::error::CommandError;
use crate::output::Output;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::run_dir::RunDir;
use crate::snapshot::{Held, SnapshotError, file_error};
use crate::tools::Interrupt;
use crate::units::{show_share, show_size};
use crate::workspace::{Workspace, WorkspaceError};

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
    /// The pack cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The directory to work in, or the pack's place.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
}

/// What `forkd pack --json` prints, and `forkd repack` among other things.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    path: PathBuf,
    size_bytes: u64,
    sha256: Digest,
    index_offset: u64,
    index_size: u64,
    index_sha256: Digest,
    plain_bytes: u64,
    stored_bytes: u64,
    chunks: u64,
    stored_chunks: u64,
    ratio: f64,
}

impl Report {
    pub(super) fn new(path: &Path, summary: &PackSummary) -> Report {
        Report {
            path: path.to_owned(),
            size_bytes: summary.pack_size,
            sha256: summary.pack_sha256,
            index_offset: summary.index.offset,
            index_size: summary.index.length,
            index_sha256: summary.index.sha256,
            plain_bytes: summary.plain_bytes,
            stored_bytes: summary.stored_bytes,
            chunks: u64::from(summary.stored_chunks) + u64::from(summary.zero_chunks),
            stored_chunks: u64::from(summary.stored_chunks),
            ratio: summary.ratio(),
        }
    }

    /// The line for people, without its verb.
    pub(super) fn line(&self, what: &str) -> String {
        format!(
            "{what} as {}: {} of {} ({} of the chunks are zero), sha256 {}",
            self.path.display(),
            show_size(self.size_bytes),
            show_size(self.plain_bytes),
            show_share(self.chunks - self.stored_chunks, self.chunks),
            self.sha256
        )
    }
}

/// Packs.
pub fn run(args: &PackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let report = Report::new(&args.out, &pack(args, output)?);
    output.report(&report, |report| format!("packed {}", report.line(&args.tag)));
    Ok(ExitCode::SUCCESS)
}

fn pack(args: &PackArgs, output: &Output) -> Result<PackSummary, PackError> {
    // Held until it is packed, so that a pull that replaces the tag meanwhile does not mix two snapshots.
    let paths = Paths::from_env().map_err(SnapshotError::from)?;
    let snapshot = Held::find(&paths, &args.tag)?;
    let directory = snapshot.path();
    if args.out.exists() && !args.force {
        return Err(PackError::Exists { path: args.out.clone() });
    }
    let options = options(args.chunk, args.level)?;
    let mut manifest = read_manifest(&directory)?;
    manifest.tag.clone_from(&args.tag);
    if !args.description.is_empty() {
        manifest.description.clone_from(&args.description);
    }
    if !args.base_image.is_empty() {
        manifest.base_image.clone_from(&args.base_image);
    }
    let interrupt = Interrupt::watch();
    let run_dir = RunDir::create(&paths).map_err(WorkspaceError::from)?;
    let work = Workspace::create(&args.out, &Arc::new(run_dir))?;
    let summary =
        work.until(&interrupt, || write(options, &directory, manifest, (&work, &args.out), output))?;
    publish(&work, &args.out, args.force)?;
    Ok(summary)
}

/// How to pack, by the command line.
pub(super) fn options(chunk: u64, level: i32) -> Result<PackOptions, PackError> {
    let chunk_size = u32::try_from(chunk).ok().filter(|&size| forkd_fs::format::is_chunk_size(size));
    let chunk_size = chunk_size.ok_or(PackError::Chunk { size: chunk })?;
    Ok(PackOptions { chunk_size, level, ..PackOptions::default() })
}

/// Packs the files of a directory into a workspace beside the new pack's place, with a progress bar.
pub(super) fn write(
    options: PackOptions,
    directory: &Path,
    manifest: Manifest,
    (work, out): (&Workspace, &Path),
    output: &Output,
) -> Result<PackSummary, PackError> {
    let progress = Progress::bytes(output, "packing", 0);
    let on_progress = |now: forkd_fs::writer::PackProgress| {
        progress.limit(now.total);
        progress.to(now.done);
        progress.say(match now.pass {
            Pass::Scan => "reading",
            Pass::Compress => "packing",
        });
    };
    let written = PackWriter::new(options).write(directory, manifest, &work.pack(), &on_progress);
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
    let mut bytes = Vec::new();
    let file = std::fs::File::open(&path).map_err(file_error("reading", &path))?;
    file.take(MAX_MANIFEST_LEN + 1).read_to_end(&mut bytes).map_err(file_error("reading", &path))?;
    Manifest::parse(&bytes).map_err(|source| PackError::Manifest { path, source })
}
