//! What a delta is packed against: a pack, of which no more than the index is read where both are compressed alike.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_fs::cache::CacheOptions;
use forkd_fs::index::{BasePack, ChunkId};
use forkd_fs::source::redact_url;
use forkd_fs::store::{ChunkData, OpenError, PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::writer::DeltaBase;
use tokio::runtime::Handle;

use crate::hub::client;
use crate::hub::registry::RegistryError;
use crate::local::lineage::Lineage;
use crate::local::paths::Paths;
use crate::local::snapshots::{CONFIGURATION, SnapshotError};
use crate::reference::InvalidReference;
use crate::target::Target;

/// Why there is no base to pack against.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The snapshot does not know what it came from, and nothing was named.
    #[error("the snapshot `{tag}` does not know of a pack that it came from")]
    Unknown {
        /// The snapshot.
        tag: String,
    },
    /// What it is stored as a difference from cannot be read.
    #[error(transparent)]
    Lineage(#[from] SnapshotError),
    /// A local snapshot, which has no index that a delta could name.
    #[error("the base {name} is a local snapshot, and a delta is made of a pack")]
    Snapshot {
        /// What was named.
        name: String,
    },
    /// The new pack would replace its base.
    #[error("{} is the base itself", path.display())]
    Output {
        /// The new pack.
        path: PathBuf,
    },
    /// What was named is neither a path nor a package.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The pack cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// What a pack is to be a delta of.
#[derive(Debug)]
pub struct BaseRequest {
    /// The base, and what people call it. Without it the pack that the snapshot is stored as a difference from.
    pub named: Option<(Target, String)>,
    /// The chunk cache's limits.
    pub cache: CacheOptions,
    /// Where it is read.
    pub runtime: Handle,
}

/// An opened base.
pub(super) struct OpenedBase {
    store: Arc<Store>,
    pack: BasePack,
    runtime: Handle,
}

impl OpenedBase {
    /// Opens it, for a delta at `out` of the snapshot `tag` in `directory`.
    pub(super) fn open(
        paths: &Paths,
        request: &BaseRequest,
        (tag, directory): (&str, &Path),
        out: &Path,
    ) -> Result<OpenedBase, BaseError> {
        let BaseRequest { named, cache, runtime } = request;
        runtime.block_on(async {
            let http = client::http_client(paths);
            let (location, hub) = match named {
                Some((target, name)) => {
                    check(target, name)?;
                    (target.locate(paths, &http).await?.pack().clone(), target.hub())
                }
                None => {
                    client::authorize_hub(&http);
                    (known(tag, directory)?, None)
                }
            };
            if let PackSource::Path(path) = &location.source
                && is_same_file(path, out)
            {
                return Err(BaseError::Output { path: out.to_owned() });
            }
            // A base that is a delta itself is named with its own bases, which are not needed now.
            let options =
                StoreOptions { open_without_bases: true, ..client::store_options(paths, *cache, &http, hub) };
            let hint = hint(&location);
            let store = Store::open(location, options).await?;
            let pack = BasePack::new(store.index_pin(), store.index().pack_size(), &hint);
            Ok(OpenedBase { store, pack, runtime: runtime.clone() })
        })
    }

    pub(super) fn chunk_size(&self) -> u32 {
        self.store.index().chunk_size()
    }

    /// As the writer takes it.
    pub(super) fn lend<T>(&self, write: impl FnOnce(&DeltaBase<'_>) -> T) -> T {
        let read = |id: ChunkId| match self.runtime.block_on(self.store.chunk(id))? {
            ChunkData::Data(plain) => Ok(plain),
            ChunkData::Zero => Ok(vec![0; self.store.index().plain_len(id) as usize].into()),
        };
        write(&DeltaBase { index: self.store.index(), pack: self.pack.clone(), read: &read })
    }
}

/// Whether a pack is meant.
fn check(target: &Target, name: &str) -> Result<(), BaseError> {
    let is_snapshot = match target {
        Target::Tag(_) => true,
        Target::File { path, .. } => path.join(CONFIGURATION).exists(),
        Target::Url { .. } | Target::Package { .. } | Target::MountFolder { .. } => false,
    };
    if is_snapshot {
        return Err(BaseError::Snapshot { name: name.to_owned() });
    }
    Ok(target.check_name()?)
}

/// The pack that a child's fork was of.
fn known(tag: &str, directory: &Path) -> Result<PackLocation, BaseError> {
    let base = Lineage::read(directory)?.and_then(|lineage| lineage.base);
    let pack = base.and_then(|base| base.pack).ok_or_else(|| BaseError::Unknown { tag: tag.to_owned() })?;
    Ok(pack.location())
}

/// What the delta says about where its base is: nothing that is secret, and no path of this machine.
fn hint(location: &PackLocation) -> String {
    match &location.source {
        PackSource::Url(url) if redact_url(url) == *url => url.clone(),
        PackSource::Url(_) => String::new(),
        PackSource::Path(path) => {
            path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
        }
    }
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    identity(one).is_some_and(|one| identity(other) == Some(one))
}
