//! `forkd pull`: a pack of the hub, whole, into a local snapshot.
//!
//! A v3 pack whose index the registry pins is fetched chunk by chunk through the chunk cache, each chunk checked: a pull
//! that was interrupted goes on where it stopped. Any other pack has to lead back to the registry by the digest of the
//! whole file, so it is downloaded into a temporary file and checked before anything is unpacked.

use std::io::Write;
use std::process::ExitCode;

use forkd_fs::digest::{Digest, Hasher};
use forkd_fs::source::{Class, Deadlines, FileSource, HttpClient, Source, SourceError};
use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};
use tempfile::NamedTempFile;

use super::unpack::{UnpackCommandError, Unpacked, from_legacy, from_store};
use crate::cli::PullArgs;
use crate::error::CommandError;
use crate::output::Output;
use crate::packs;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::registry::{Reference, Resolved, whole_digest};
use crate::snapshot::SnapshotError;

/// Why a pack cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Downloading failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The pack is not the one that was registered.
    #[error("{reference} has sha256 {found}, the registry says {expected}")]
    Digest {
        /// What was pulled.
        reference: String,
        /// What the registry says.
        expected: Digest,
        /// What the bytes hash to.
        found: Digest,
    },
    /// The registry's digest is none.
    #[error("the registry's sha256 of {reference} is no sha256")]
    BadDigest {
        /// What was pulled.
        reference: String,
    },
    /// The temporary file cannot be written.
    #[error("the temporary file in {}", directory.display())]
    Temporary {
        /// Where.
        directory: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Pulls.
pub fn run(args: &PullArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let reference: Reference = args.reference.parse()?;
    let tag = args.tag.clone().unwrap_or_else(|| reference.package.name.clone());
    // Before anything is downloaded.
    if !args.force && paths.snapshot(&tag)?.exists() {
        return Err(SnapshotError::Exists { tag }.into());
    }
    let unpacked = super::runtime()?.block_on(pull(args, &paths, &reference, &tag, output))?;
    output.report(&unpacked, |unpacked| format!("pulled {reference} as {}", unpacked.line()));
    Ok(ExitCode::SUCCESS)
}

async fn pull(
    args: &PullArgs,
    paths: &Paths,
    reference: &Reference,
    tag: &str,
    output: &Output,
) -> Result<Unpacked, CommandError> {
    let http = packs::http_client();
    let catalogue = packs::catalogue(args.hub.hub.as_deref(), &http).await?;
    let resolved = catalogue.resolve(reference)?;
    let options = packs::store_options(paths, &args.cache, &http);
    let whole = whole_digest(&resolved.entry)
        .transpose()
        .map_err(|_| PullError::BadDigest { reference: reference.to_string() })?;
    if resolved.location.index.is_none() && (whole.is_some() || is_legacy(&resolved, &options).await) {
        let file = download(&resolved, whole, paths, &http, output).await?;
        return from_file(file, paths, tag, args.force, output).await;
    }
    let store = Store::open(resolved.location.clone(), options).await?;
    if resolved.location.index.is_none() {
        output.note(format!("the registry has no digest of {reference}: it is taken as it comes"));
    }
    Ok(from_store(&store, paths, Some(tag), args.force, output).await?)
}

/// Whether the pack is one of the predecessor's, which have to be read from start to end.
async fn is_legacy(resolved: &Resolved, options: &StoreOptions) -> bool {
    let opened = Store::open(resolved.location.clone(), options.clone()).await;
    matches!(opened, Err(OpenError::Legacy { .. }))
}

/// Downloads a pack from start to end and checks its digest.
async fn download(
    resolved: &Resolved,
    expected: Option<Digest>,
    paths: &Paths,
    http: &HttpClient,
    output: &Output,
) -> Result<NamedTempFile, PullError> {
    let directory = paths.snapshots();
    let failed = |source| PullError::Temporary { directory: directory.clone(), source };
    std::fs::create_dir_all(&directory).map_err(failed)?;
    let mut file = tempfile::Builder::new().prefix(".pull-").tempfile_in(&directory).map_err(failed)?;
    let source = match &resolved.location.source {
        PackSource::Url(url) => {
            let StoreOptions { demand_deadline: demand, prefetch_deadline: prefetch, .. } =
                StoreOptions::default();
            let deadlines = Deadlines { demand, prefetch };
            Source::Http(http.source(url, resolved.location.size, deadlines).map_err(SourceError::from)?)
        }
        PackSource::Path(path) => Source::File(FileSource::open(path).map_err(SourceError::from)?),
    };
    let size = source.size().await?;
    let progress = Progress::bytes(output, &format!("downloading {}", resolved.reference), size);
    let (mut body, mut hasher, mut done) = (source.stream_at(0, size, Class::Prefetch), Hasher::new(), 0);
    while let Some(piece) = body.next().await? {
        hasher.update(&piece);
        file.write_all(&piece).map_err(failed)?;
        done += piece.len() as u64;
        progress.to(done);
    }
    let found = hasher.finish();
    match expected.filter(|&expected| expected != found) {
        Some(expected) => {
            Err(PullError::Digest { reference: resolved.reference.to_string(), expected, found })
        }
        None => Ok(file),
    }
}

async fn from_file(
    file: NamedTempFile,
    paths: &Paths,
    tag: &str,
    force: bool,
    output: &Output,
) -> Result<Unpacked, CommandError> {
    let location = PackLocation { source: PackSource::Path(file.path().to_owned()), size: None, index: None };
    match Store::open(location, StoreOptions::default()).await {
        Ok(store) => Ok(from_store(&store, paths, Some(tag), force, output).await?),
        Err(OpenError::Legacy { .. }) => Ok(from_legacy(file.path(), paths, Some(tag), force, output)?),
        Err(error) => Err(UnpackCommandError::from(error).into()),
    }
}
