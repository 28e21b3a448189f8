//! `forkd unpack`: a pack into a local snapshot.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use forkd_fs::legacy::{self, LegacyError, LegacyPack};
use forkd_fs::store::{OpenError, PackLocation, PackSource, ReadError, Store, StoreOptions};
use forkd_fs::unpack::{UnpackError, unpack};
use serde::Serialize;

use crate::cli::UnpackArgs;
use crate::error::CommandError;
use crate::output::Output;
use crate::units::show_size;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::snapshots::{Draft, SnapshotError};
use forkd_engine::progress::{Amount, Progress};

/// Most plain bytes taken out of one of the predecessor's packs: they have no index that could be checked first.
pub const LEGACY_LIMIT: u64 = 256 << 30;

/// Why a pack cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackCommandError {
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

/// What `forkd unpack` and `forkd pull` print.
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

impl Unpacked {
    /// The line for people.
    pub fn line(&self) -> String {
        let mut line = format!("{}: {} in {}", self.tag, show_size(self.plain_bytes), self.path.display());
        if self.pack_format < forkd_fs::format::PACK_VERSION {
            line.push_str(&format!(
                "\nit is a pack of layout {}: its files are here, but its Firecracker state cannot be forked",
                self.pack_format
            ));
        }
        line
    }
}

/// Unpacks.
pub fn run(args: &UnpackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let location = PackLocation { source: PackSource::Path(args.file.clone()), size: None, index: None };
    let unpacked = super::runtime()?.block_on(async {
        match Store::open(location, StoreOptions::default()).await {
            Ok(store) => from_store(&store, &paths, args.tag.as_deref(), args.force, output).await,
            Err(OpenError::Legacy { .. }) => {
                from_legacy(&args.file, &paths, args.tag.as_deref(), args.force, output)
            }
            Err(error) => Err(error.into()),
        }
    })?;
    output.report(&unpacked, |unpacked| format!("unpacked {}", unpacked.line()));
    Ok(ExitCode::SUCCESS)
}

/// Takes every file out of an opened pack, each checked, and puts the snapshot in its place.
pub async fn from_store(
    store: &Arc<Store>,
    paths: &Paths,
    tag: Option<&str>,
    force: bool,
    output: &Output,
) -> Result<Unpacked, UnpackCommandError> {
    let manifest = store.manifest().await?;
    let tag = tag.unwrap_or(&manifest.tag).to_owned();
    let draft = Draft::create(paths, &tag, force)?;
    let progress = output.begin(&format!("unpacking {tag}"), Amount::Bytes(store.index().stored_bytes()));
    unpack(store, draft.path(), &|now| {
        let share = u64::from(now.chunks_fetched) as f64 / f64::from(now.chunks_total.max(1));
        progress.to((store.index().stored_bytes() as f64 * share) as u64);
    })
    .await?;
    let plain_bytes = store.index().files().map(|(_, file)| file.size).sum();
    let path = draft.publish(force)?;
    Ok(Unpacked { tag, path, pack_format: manifest.forkd_pack_version, plain_bytes })
}

/// Takes the members out of one of the predecessor's packs.
pub fn from_legacy(
    file: &Path,
    paths: &Paths,
    tag: Option<&str>,
    force: bool,
    output: &Output,
) -> Result<Unpacked, UnpackCommandError> {
    let _progress = output.begin("unpacking", Amount::Unknown);
    let tag = match tag {
        Some(tag) => tag.to_owned(),
        None => legacy::list(file, LEGACY_LIMIT)?.manifest.tag,
    };
    let draft = Draft::create(paths, &tag, force)?;
    let LegacyPack { manifest, members } = legacy::unpack(file, draft.path(), LEGACY_LIMIT)?;
    let plain_bytes = members.iter().map(|member| member.size).sum();
    let path = draft.publish(force)?;
    Ok(Unpacked { tag, path, pack_format: manifest.forkd_pack_version, plain_bytes })
}
