//! What is in a pack, from its index, its manifest and its trace alone.

use std::path::Path;
use std::sync::Arc;

use forkd_fs::digest::Digest;
use forkd_fs::format::MANIFEST;
use forkd_fs::legacy::head::{HeadError, LegacyHead};
use forkd_fs::legacy::{self, LegacyManifest};
use forkd_fs::source::redact_url;
use forkd_fs::store::{OpenError, PackLocation, PackSource, ReadError, Store, StoreOptions};
use serde::Serialize;

use crate::build::unpack::LEGACY_LIMIT;
use crate::hub::bases::HubBases;
use crate::hub::client;
use crate::hub::registry::RegistryError;
use crate::inspect::heatmap;
use crate::inspect::working_set::{WorkingSet, WorkingSetWeight, share};
use crate::local::paths::Paths;
use crate::local::snapshots::FOREIGN_MACHINE;
use crate::picture::svg::PictureError;
use crate::target::Target;

/// A pack as `forkd inspect --json` shows it. Of the predecessor's packs only the first half is known.
#[derive(Debug, Serialize)]
pub struct PackDescription {
    /// Path or URL.
    pub location: String,
    /// `forkd_pack_version`.
    pub pack_format: u32,
    /// The machine's name.
    pub tag: String,
    /// What the publisher says of it.
    pub description: String,
    /// What its root disk was made from.
    pub base_image: String,
    /// When the snapshot was taken, RFC 3339.
    pub created_at: String,
    /// What made it.
    pub forkd_version: String,
    /// Size of the pack.
    pub size_bytes: u64,
    /// Null when a pack of the predecessor was not read whole and its manifest does not tell.
    pub plain_bytes: Option<u64>,
    /// Plain bytes to those of the pack.
    pub ratio: Option<f64>,
    /// Its files.
    pub files: Vec<FileDescription>,
    /// Why it cannot be forked; null when nothing in the pack forbids it.
    pub unforkable: Option<String>,
    /// What a host needs to restore it.
    pub requires: Option<forkd_fs::manifest::Requires>,
    /// Its chunks.
    pub chunks: Option<ChunkDescription>,
    /// The packs without which a delta is not whole, its base first; empty of any other pack.
    pub bases: Vec<BaseDescription>,
    /// What a fork touches, as recorded; null without a trace.
    pub working_set: Option<WorkingSetWeight>,
    /// Its index.
    pub index: Option<IndexDescription>,
    /// What was fetched to say all this.
    pub fetched_bytes: Option<u64>,
}

/// A file of a pack.
#[derive(Debug, Serialize)]
pub struct FileDescription {
    /// Its name.
    pub path: String,
    /// Plain bytes.
    pub size: u64,
    /// As the manifest has it.
    pub sha256: Option<Digest>,
    /// All chunks.
    pub chunks: Option<u32>,
    /// Those that are not zero, here or in a base.
    pub stored_chunks: Option<u32>,
    /// Their bytes, compressed.
    pub stored_bytes: Option<u64>,
}

/// The chunks of a pack.
#[derive(Debug, Serialize)]
pub struct ChunkDescription {
    /// Plain bytes of a chunk.
    pub size: u32,
    /// All chunks.
    pub total: u64,
    /// Those that are not zero, here or in a base.
    pub stored: u64,
    /// Their bytes, compressed.
    pub stored_bytes: u64,
    /// Of these, chunks that lie in bases.
    pub in_bases: u64,
    /// Their bytes, compressed.
    pub base_bytes: u64,
    /// Share of the chunks that are zero and not stored.
    pub zero_share: f64,
    /// Stored chunks the recorded working set touches; null without a trace.
    pub traced: Option<u64>,
    /// Their bytes, compressed.
    pub traced_bytes: Option<u64>,
    /// Share of the stored bytes that the working set needs.
    pub trace_share: Option<f64>,
}

/// A pack that holds chunks of a delta.
#[derive(Debug, Serialize)]
pub struct BaseDescription {
    /// The digest of its index, by which it is known.
    pub index_sha256: Digest,
    /// Its size.
    pub size_bytes: u64,
    /// What the delta says about where it was: a URL, a file's name or nothing.
    pub hint: String,
    /// Chunks of the delta that it holds.
    pub chunks: u64,
    /// Their bytes, compressed.
    pub stored_bytes: u64,
    /// Where it is; null when it was not found, or when nothing is needed of it.
    pub location: Option<String>,
}

/// What pins the index.
#[derive(Debug, Serialize)]
pub struct IndexDescription {
    /// Where it begins in the pack, bytes.
    pub offset: u64,
    /// Its length, bytes.
    pub size: u64,
    /// Its digest.
    pub sha256: Digest,
}

/// Why a pack cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A pack of the predecessor.
    #[error(transparent)]
    Legacy(#[from] legacy::LegacyError),
    /// The picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
}

/// Looks at the pack that `target` leads to, and draws it into `heatmap` if one is wanted.
pub async fn inspect(
    paths: &Paths,
    target: &Target,
    heatmap: Option<&Path>,
) -> Result<PackDescription, InspectError> {
    let http = client::http_client(paths);
    let located = target.locate(paths, &http).await?;
    let location = located.pack().clone();
    // No cache: what is shown is what is there now.
    let bases = HubBases::new(paths, target.hub(), &http);
    let options = StoreOptions {
        http,
        bases: Some(Arc::new(bases)),
        open_without_bases: true,
        ..StoreOptions::default()
    };
    match (Store::open(location.clone(), options.clone()).await, &location.source) {
        (Ok(store), _) => {
            let working_set = WorkingSet::read(&store).await?;
            if let Some(file) = heatmap {
                heatmap::of_pack(&store, working_set.as_ref(), paths).draw().write(file)?;
            }
            Ok(of_store(&store, working_set.as_ref()).await?)
        }
        (Err(error @ OpenError::Legacy { .. }), _) if heatmap.is_some() => Err(error.into()),
        (Err(OpenError::Legacy { .. }), PackSource::Path(path)) => Ok(of_legacy(path)?),
        (Err(OpenError::Legacy { .. }), PackSource::Url(url)) => {
            match LegacyHead::fetch(&location, &options).await {
                Ok(head) => Ok(of_head(redact_url(url), head)),
                Err(HeadError::Source { location, source }) => {
                    Err(OpenError::Source { location, source }.into())
                }
                Err(HeadError::Pack(error)) => Err(error.into()),
            }
        }
        (Err(error), _) => Err(error.into()),
    }
}

async fn of_store(
    store: &Arc<Store>,
    working_set: Option<&WorkingSet>,
) -> Result<PackDescription, ReadError> {
    let (manifest, index) = (store.manifest().await?, store.index());
    let files = index.files().map(|(id, entry)| {
        let stats = index.stats(id);
        FileDescription {
            path: entry.name.clone(),
            size: entry.size,
            sha256: manifest.file(&entry.name).map(|file| file.sha256),
            chunks: Some(stats.chunks),
            stored_chunks: Some(stats.stored_chunks),
            stored_bytes: Some(stats.stored_bytes),
        }
    });
    let files: Vec<FileDescription> = files.collect();
    let plain_bytes = files.iter().map(|file| file.size).sum();
    let total = files.iter().filter_map(|file| file.chunks).map(u64::from).sum();
    let (stored, stored_bytes) = (u64::from(index.stored_chunk_count()), index.stored_bytes());
    let working_set = working_set.map(|set| set.report(store));
    let traced = working_set.as_ref().map(|set| (set.chunks, set.chunk_bytes));
    let pin = store.index_pin();
    Ok(PackDescription {
        location: store.location().to_owned(),
        pack_format: manifest.forkd_pack_version,
        tag: manifest.tag.clone(),
        description: manifest.description.clone(),
        base_image: manifest.base_image.clone(),
        created_at: manifest.created_at.clone(),
        forkd_version: manifest.forkd_version.clone(),
        size_bytes: index.pack_size(),
        plain_bytes: Some(plain_bytes),
        ratio: Some(share(plain_bytes, index.pack_size())),
        files,
        unforkable: manifest.requires.is_foreign().then(|| FOREIGN_MACHINE.to_owned()),
        requires: Some(manifest.requires.clone()),
        chunks: Some(ChunkDescription {
            size: index.chunk_size(),
            total,
            stored,
            stored_bytes,
            in_bases: stored - u64::from(index.held_by(0).0),
            base_bytes: index.base_bytes(),
            zero_share: share(total - stored, total),
            traced: traced.map(|(chunks, _)| chunks),
            traced_bytes: traced.map(|(_, bytes)| bytes),
            trace_share: traced.map(|(_, bytes)| share(bytes, stored_bytes)),
        }),
        bases: bases(store),
        working_set,
        index: Some(IndexDescription { offset: pin.offset, size: pin.length, sha256: pin.sha256 }),
        fetched_bytes: Some(store.progress().bytes_fetched),
    })
}

fn bases(store: &Store) -> Vec<BaseDescription> {
    let index = store.index();
    let found = (1..).zip(index.bases()).zip(store.base_locations());
    found
        .map(|((pack, base), location)| {
            let (chunks, stored_bytes) = index.held_by(pack);
            BaseDescription {
                index_sha256: base.index.sha256,
                size_bytes: base.pack_size,
                hint: base.hint.clone(),
                chunks: chunks.into(),
                stored_bytes,
                location: location.map(PackLocation::describe),
            }
        })
        .collect()
}

fn of_legacy(path: &Path) -> Result<PackDescription, legacy::LegacyError> {
    let pack = legacy::list(path, LEGACY_LIMIT)?;
    let size_bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let file =
        |member: &legacy::LegacyMember| legacy_file(member.path(), member.size, pack.manifest.digest(member));
    let files: Vec<FileDescription> = pack.members.iter().map(file).collect();
    let plain_bytes = files.iter().map(|file| file.size).sum();
    let location = path.display().to_string();
    Ok(legacy_report(location, pack.manifest, size_bytes, files, Some(plain_bytes), None))
}

/// Of a pack on a server: its manifest is believed about the members that were not read.
fn of_head(location: String, head: LegacyHead) -> PackDescription {
    let listed = head.manifest.listed();
    let told = !listed.is_empty() && listed.iter().all(|file| file.size.is_some());
    let mut files = vec![legacy_file(MANIFEST.to_owned(), head.manifest_size, None)];
    let listed =
        listed.into_iter().map(|file| legacy_file(file.path, file.size.unwrap_or(0), Some(file.sha256)));
    files.extend(listed);
    let plain_bytes = told.then(|| files.iter().fold(0u64, |sum, file| sum.saturating_add(file.size)));
    legacy_report(location, head.manifest, head.packed_size, files, plain_bytes, Some(head.fetched_bytes))
}

fn legacy_file(path: String, size: u64, sha256: Option<Digest>) -> FileDescription {
    FileDescription { path, size, sha256, chunks: None, stored_chunks: None, stored_bytes: None }
}

fn legacy_report(
    location: String,
    manifest: LegacyManifest,
    size_bytes: u64,
    files: Vec<FileDescription>,
    plain_bytes: Option<u64>,
    fetched_bytes: Option<u64>,
) -> PackDescription {
    PackDescription {
        location,
        pack_format: manifest.forkd_pack_version,
        tag: manifest.tag,
        description: manifest.description,
        base_image: manifest.base_image,
        created_at: manifest.created_at,
        forkd_version: manifest.forkd_version,
        size_bytes,
        plain_bytes,
        ratio: plain_bytes.map(|plain| share(plain, size_bytes)),
        files,
        unforkable: Some(FOREIGN_MACHINE.to_owned()),
        requires: None,
        chunks: None,
        bases: Vec::new(),
        working_set: None,
        index: None,
        fetched_bytes,
    }
}
