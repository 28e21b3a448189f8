//! `forkd pull`: a pack of the hub, whole, into a local snapshot.
//!
//! A v3 pack whose index the registry pins is fetched chunk by chunk through the chunk cache, each chunk checked: a pull
//! that was interrupted goes on where it stopped. Any other pack has to lead back to the registry by the digest of the
//! whole file, so it is downloaded into a file of its own ([`forkd_engine::hub::download`]) and checked before anything is unpacked.

use std::path::Path;
use std::process::ExitCode;

use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};

use super::unpack::{UnpackCommandError, Unpacked, from_legacy, from_store};
use crate::cli::PullArgs;
use crate::error::CommandError;
use crate::output::Output;
use forkd_engine::hub::download::{Download, DownloadError};
use forkd_engine::hub::packs;
use forkd_engine::hub::registry::{Reference, Resolved, whole_digest};
use forkd_engine::local::paths::Paths;
use forkd_engine::local::snapshots::SnapshotError;

/// Why a pack cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Downloading failed.
    #[error(transparent)]
    Download(#[from] DownloadError),
    /// The registry's digest is none.
    #[error("the registry's sha256 of {reference} is no sha256")]
    BadDigest {
        /// What was pulled.
        reference: String,
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
    let http = packs::http_client(paths);
    let catalogue = packs::catalogue(paths, args.hub.hub.as_deref(), &http).await?;
    let resolved = catalogue.resolve(reference)?;
    let options = packs::store_options(paths, args.cache.options(), &http);
    let whole = whole_digest(&resolved.entry)
        .transpose()
        .map_err(|_| PullError::BadDigest { reference: reference.to_string() })?;
    if resolved.location.index.is_none() && (whole.is_some() || is_legacy(&resolved, &options).await) {
        let download =
            Download::fetch(&resolved, whole, paths, &http, output).await.map_err(PullError::from)?;
        return from_file(download.path(), paths, tag, args.force, output).await;
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

async fn from_file(
    file: &Path,
    paths: &Paths,
    tag: &str,
    force: bool,
    output: &Output,
) -> Result<Unpacked, CommandError> {
    let location = PackLocation { source: PackSource::Path(file.to_owned()), size: None, index: None };
    match Store::open(location, StoreOptions::default()).await {
        Ok(store) => Ok(from_store(&store, paths, Some(tag), force, output).await?),
        Err(OpenError::Legacy { .. }) => Ok(from_legacy(file, paths, Some(tag), force, output)?),
        Err(error) => Err(UnpackCommandError::from(error).into()),
    }
}
