//! Unpacking: a pack into a local snapshot.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_fs::legacy::{self, LegacyError, LegacyPack};
use forkd_fs::manifest::Manifest;
use forkd_fs::store::{OpenError, PackLocation, PackSource, ReadError, Store, StoreOptions};
use forkd_fs::unpack::{UnpackError, unpack};
use serde::Serialize;

use crate::local::paths::Paths;
use crate::local::snapshots::{SnapshotDraft, SnapshotError};
use crate::progress::{Amount, Progress};

/// Most plain bytes taken out of one of the predecessor's packs: they have no index that could be checked first.
pub const LEGACY_LIMIT: u64 = 256 << 30;

/// Why a pack cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackPackError {
    /// The pack cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its manifest cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Its files cannot be taken out.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// A pack of the predecessor.
    #[error(transparent)]
    Legacy(#[from] LegacyError),
    /// The snapshot's place.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// A new snapshot, as `forkd unpack --json` and `forkd pull --json` show it.
#[derive(Debug, Serialize)]
pub struct Unpacked {
    /// The snapshot's name.
    pub tag: String,
    /// Its directory.
    pub path: PathBuf,
    /// `forkd_pack_version` of the pack.
    pub pack_format: u32,
    /// Plain bytes of its files.
    pub plain_bytes: u64,
}

/// Unpacks the pack in a file of this machine. `options` say where the bases of a delta are read from. `tag` is the
/// snapshot's name, the manifest's when there is none.
pub async fn unpack_file(
    paths: &Paths,
    file: &Path,
    options: StoreOptions,
    tag: Option<&str>,
    force: bool,
    progress: &dyn Progress,
) -> Result<Unpacked, UnpackPackError> {
    let location = PackLocation { source: PackSource::Path(file.to_owned()), size: None, index: None };
    match Store::open(location, options).await {
        Ok(store) => from_store(&store, paths, tag, force, progress).await,
        Err(OpenError::Legacy { .. }) => from_legacy(file, paths, tag, force, progress),
        Err(error) => Err(error.into()),
    }
}

/// Takes every file out of an opened pack, each checked, and puts the snapshot in its place.
pub async fn from_store(
    store: &Arc<Store>,
    paths: &Paths,
    tag: Option<&str>,
    force: bool,
    progress: &dyn Progress,
) -> Result<Unpacked, UnpackPackError> {
    let manifest = store.manifest().await?;
    let tag = tag.unwrap_or(&manifest.tag).to_owned();
    let draft = SnapshotDraft::create(paths, &tag, force)?;
    take_out(store, draft.path(), &format!("unpacking {tag}"), progress).await?;
    let plain_bytes = store.index().files().map(|(_, file)| file.size).sum();
    let path = draft.publish(force)?;
    Ok(Unpacked { tag, path, pack_format: manifest.forkd_pack_version, plain_bytes })
}

/// Takes every file out of an opened pack into the directory `into`, which is shown as `what`; writes the chunk cache.
pub(super) async fn take_out(
    store: &Arc<Store>,
    into: &Path,
    what: &str,
    progress: &dyn Progress,
) -> Result<Arc<Manifest>, UnpackError> {
    let stored_bytes = store.index().stored_bytes();
    let task = progress.begin(what, Amount::Bytes(stored_bytes));
    let manifest = unpack(store, into, &|now| {
        let share = f64::from(now.chunks_fetched) / f64::from(now.chunks_total.max(1));
        task.to((stored_bytes as f64 * share) as u64);
    })
    .await;
    store.flush_cache();
    manifest
}

/// Takes the members out of one of the predecessor's packs.
pub fn from_legacy(
    file: &Path,
    paths: &Paths,
    tag: Option<&str>,
    force: bool,
    progress: &dyn Progress,
) -> Result<Unpacked, UnpackPackError> {
    let _task = progress.begin("unpacking", Amount::Unknown);
    let tag = match tag {
        Some(tag) => tag.to_owned(),
        None => legacy::list(file, LEGACY_LIMIT)?.manifest.tag,
    };
    let draft = SnapshotDraft::create(paths, &tag, force)?;
    let LegacyPack { manifest, members } = legacy::unpack(file, draft.path(), LEGACY_LIMIT)?;
    let plain_bytes = members.iter().map(|member| member.size).sum();
    let path = draft.publish(force)?;
    Ok(Unpacked { tag, path, pack_format: manifest.forkd_pack_version, plain_bytes })
}
