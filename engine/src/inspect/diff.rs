//! What differs between two machines, file by file: chunks by their digests, and pages where these differ.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_fs::cache::CacheOptions;
use forkd_fs::digest::Digest;
use forkd_fs::format::{self, DEFAULT_CHUNK_SIZE, MEMBER_ORDER};
use forkd_fs::store::{OpenError, PackLocation, Store, StoreOptions};
use forkd_fs::trace::PAGE_SIZE;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::hub::client;
use crate::hub::registry::RegistryError;
use crate::local::lineage::Lineage;
use crate::local::paths::Paths;
use crate::picture::heatmap::{Heatmap, HeatmapCell, ImageCells};
use crate::picture::svg::{LegendEntry, PALE, PictureError};
use crate::progress::{Amount, Progress};
use crate::target::{Target, TargetError};

mod side;

pub use side::SideError;
use side::{Known, SideFile, of_directory, of_pack};

/// Chunks that are read at once: enough to keep a link busy while others wait for their round trips.
const AT_ONCE: usize = 16;
/// How many of a chunk's pages differ, from which share on it has which colour; the last is for those with none.
const SHADES: [(f64, &str, &str); 3] = [
    (0.5, "#c0392b", "half of its pages or more differ"),
    (0.05, "#f28e2b", "more than one page in twenty differs"),
    (0.0, "#edc948", "a few pages differ"),
];
const SAME: (&str, &str) = ("#a0b8d0", "the same");
const ZERO: &str = "zero in both";

/// What is to be compared.
#[derive(Debug)]
pub struct DiffRequest {
    /// What has changed.
    pub target: Target,
    /// What people call it.
    pub name: String,
    /// What it was before, and what people call it; `None` for the base that a delta names.
    pub base: Option<(Target, String)>,
    /// Draw it there.
    pub svg: Option<PathBuf>,
    /// The chunk cache's limits.
    pub cache: CacheOptions,
}

/// What differs, as `forkd diff --json` shows it.
#[derive(Debug, Serialize)]
pub struct DiffReport {
    /// What has changed.
    pub target: String,
    /// What it was before.
    pub base: String,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Bytes of a chunk.
    pub chunk_bytes: u32,
    /// File by file: memory, saved state, disks.
    pub regions: Vec<RegionDiff>,
    /// Bytes that had to be read to compare pages.
    pub compared_bytes: u64,
}

/// What differs in one file.
#[derive(Debug, Serialize)]
pub struct RegionDiff {
    /// The file.
    pub file: String,
    /// Its size; null where it is gone.
    pub size: Option<u64>,
    /// The size that it had; null where it is new.
    pub base_size: Option<u64>,
    /// Its chunks, those included that it had.
    pub chunks: u32,
    /// Those of which a byte differs.
    pub chunks_differing: u32,
    /// Its pages.
    pub pages: u64,
    /// Those of which a byte differs.
    pub pages_differing: u64,
    /// Bytes that differ.
    pub bytes_differing: u64,
}

/// Two machines cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// Nothing was named, and the target does not say.
    #[error("{name} does not say what it is based on")]
    NoBase {
        /// The target.
        name: String,
    },
    /// The base that the target names was not found.
    #[error("the base of {name}, a pack with index sha256 {base}, is nowhere to be found")]
    BaseAway {
        /// The target.
        name: String,
        /// Digest of the base's index.
        base: Digest,
    },
    /// A child's snapshot, of whose memory only what differs is there.
    #[error("{name} is stored as a difference from what its fork was of")]
    Difference {
        /// What was named.
        name: String,
    },
    /// One of them cannot be opened.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// One of them cannot be read.
    #[error(transparent)]
    Side(#[from] SideError),
    /// The picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// forkd is ending.
    #[error("the comparison was abandoned because forkd is stopping")]
    Stopped,
}

impl From<RegistryError> for DiffError {
    fn from(error: RegistryError) -> DiffError {
        TargetError::from(error).into()
    }
}

impl From<OpenError> for DiffError {
    fn from(error: OpenError) -> DiffError {
        TargetError::from(error).into()
    }
}

/// One that is compared.
struct Side {
    name: String,
    files: Vec<SideFile>,
    /// `None` of a directory.
    store: Option<Arc<Store>>,
}

/// Differences of one chunk.
#[derive(Debug, Clone, Copy, Default)]
struct ChunkDiff {
    pages: u64,
    bytes: u64,
}

/// A file on both sides; where it is missing it has no bytes.
#[derive(Clone)]
struct Pair {
    file: String,
    target: Option<SideFile>,
    base: Option<SideFile>,
}

/// Compares.
pub async fn diff(
    paths: &Paths,
    request: &DiffRequest,
    progress: &dyn Progress,
) -> Result<DiffReport, DiffError> {
    let target = open(paths, &request.target, &request.name, request.cache).await?;
    let base = match &request.base {
        Some((base, name)) => open(paths, base, name, request.cache).await?,
        None => open_base(paths, request, &target).await?,
    };
    let sizes = [&target, &base].map(|side| side.store.as_ref().map(|store| store.index().chunk_size()));
    let chunk_bytes = sizes.into_iter().flatten().next().unwrap_or(DEFAULT_CHUNK_SIZE);
    let pairs = pairs(&target, &base);
    let chunks = pairs.iter().map(|pair| u64::from(pair.chunks(chunk_bytes))).sum();
    let task = progress.begin("comparing", Amount::Steps(chunks));
    let (mut regions, mut images, mut done, mut compared_bytes) = (Vec::new(), Vec::new(), 0, 0);
    for pair in &pairs {
        let (found, read) = pair.compare(chunk_bytes, |chunk| task.to(done + u64::from(chunk))).await?;
        done += u64::from(pair.chunks(chunk_bytes));
        compared_bytes += read;
        images.push(pair.image(chunk_bytes, &found));
        regions.push(pair.region(chunk_bytes, &found));
    }
    for store in [&target, &base].into_iter().filter_map(|side| side.store.as_ref()) {
        store.flush_cache();
    }
    if let Some(file) = &request.svg {
        draw(&target.name, &base.name, images, file)?;
    }
    let (target, base) = (target.name, base.name);
    Ok(DiffReport { target, base, page_bytes: PAGE_SIZE, chunk_bytes, regions, compared_bytes })
}

async fn open(paths: &Paths, target: &Target, name: &str, cache: CacheOptions) -> Result<Side, DiffError> {
    if let Some(snapshot) = target.snapshot(paths)? {
        let lineage = Lineage::read(&snapshot.path()).map_err(TargetError::from)?;
        if lineage.is_some_and(|lineage| lineage.base.is_some()) {
            return Err(DiffError::Difference { name: name.to_owned() });
        }
        return Ok(Side { name: name.to_owned(), files: of_directory(&snapshot)?, store: None });
    }
    let location = target.locate(paths, &client::http_client(paths)).await?.pack().clone();
    open_pack(paths, target, location, name, cache).await
}

async fn open_pack(
    paths: &Paths,
    target: &Target,
    location: PackLocation,
    name: &str,
    cache: CacheOptions,
) -> Result<Side, DiffError> {
    // Without its bases a delta can still be compared with one that has the same ones.
    let http = client::http_client(paths);
    if let forkd_fs::store::PackSource::Url(url) = &location.source
        && matches!(target, Target::Url { .. })
    {
        http.authorize(url);
    }
    let options =
        StoreOptions { open_without_bases: true, ..client::store_options(paths, cache, &http, target.hub()) };
    let store = Store::open(location, options).await?;
    Ok(Side { name: name.to_owned(), files: of_pack(&store), store: Some(store) })
}

/// The base that a delta names.
async fn open_base(paths: &Paths, request: &DiffRequest, target: &Side) -> Result<Side, DiffError> {
    let name = request.name.clone();
    let base = target.store.as_ref().and_then(|store| Some((store, store.index().bases().first()?)));
    let Some((store, base)) = base else { return Err(DiffError::NoBase { name }) };
    let place = store.base_locations().first().copied().flatten().cloned();
    let Some(place) = place else { return Err(DiffError::BaseAway { name, base: base.index.sha256 }) };
    let shown = place.describe();
    let location = PackLocation { size: Some(base.pack_size), index: Some(base.index), ..place };
    open_pack(paths, &request.target, location, &shown, request.cache).await
}

/// The files of both in the order that packs have them.
fn pairs(target: &Side, base: &Side) -> Vec<Pair> {
    let rank =
        |name: &str| MEMBER_ORDER.iter().position(|&known| known == name).unwrap_or(MEMBER_ORDER.len());
    let names: BTreeSet<(usize, &str)> =
        target.files.iter().chain(&base.files).map(|file| (rank(&file.name), file.name.as_str())).collect();
    let find = |side: &Side, name: &str| side.files.iter().find(|file| file.name == name).cloned();
    let pair =
        |(_, name)| Pair { file: String::from(name), target: find(target, name), base: find(base, name) };
    names.into_iter().map(pair).collect()
}

impl Pair {
    fn sides(&self) -> impl Iterator<Item = &SideFile> {
        [&self.target, &self.base].into_iter().flatten()
    }

    /// Bytes of the longer one.
    fn len(&self) -> u64 {
        self.sides().map(|file| file.size).max().unwrap_or(0)
    }

    fn chunks(&self, chunk_bytes: u32) -> u32 {
        format::chunk_count(self.len(), chunk_bytes)
    }

    fn known(side: Option<&SideFile>, chunk: u32, chunk_bytes: u32) -> Known {
        side.map_or(Known::Zero, |file| file.known(chunk, chunk_bytes))
    }

    /// What differs in each chunk, `None` of those that are zero on both sides; and how many bytes were read for it.
    async fn compare(
        &self,
        chunk_bytes: u32,
        on_chunk: impl Fn(u32),
    ) -> Result<(Vec<Option<ChunkDiff>>, u64), DiffError> {
        let mut found = vec![None; self.chunks(chunk_bytes) as usize];
        let (mut running, mut read) = (JoinSet::new(), 0);
        for chunk in 0..self.chunks(chunk_bytes) {
            let [target, base] =
                [&self.target, &self.base].map(|side| Pair::known(side.as_ref(), chunk, chunk_bytes));
            match (target, base) {
                (Known::Zero, Known::Zero) => continue,
                (Known::Frame(one), Known::Frame(other)) if one == other => {
                    found[chunk as usize] = Some(ChunkDiff::default());
                    continue;
                }
                _ => {}
            }
            if running.len() == AT_ONCE {
                let (at, diff) = running.join_next().await.ok_or(DiffError::Stopped)?.map_err(stopped)??;
                found[at as usize] = diff;
            }
            read += u64::from(format::chunk_len(self.len(), chunk_bytes, chunk));
            let pair = self.clone();
            running.spawn(async move {
                Ok::<_, DiffError>((chunk, pair.compare_chunk(chunk, chunk_bytes).await?))
            });
            on_chunk(chunk);
        }
        while let Some(done) = running.join_next().await {
            let (at, diff) = done.map_err(stopped)??;
            found[at as usize] = diff;
        }
        Ok((found, read))
    }

    async fn compare_chunk(&self, chunk: u32, chunk_bytes: u32) -> Result<Option<ChunkDiff>, DiffError> {
        let read = async |side: &Option<SideFile>| match side {
            Some(file) => file.read(chunk, chunk_bytes).await,
            None => Ok(vec![0; chunk_bytes as usize].into()),
        };
        let (target, base) = (read(&self.target).await?, read(&self.base).await?);
        let mut diff = ChunkDiff::default();
        for (one, other) in target.chunks(PAGE_SIZE as usize).zip(base.chunks(PAGE_SIZE as usize)) {
            if one != other {
                diff.pages += 1;
                diff.bytes += one.iter().zip(other).filter(|(one, other)| one != other).count() as u64;
            }
        }
        let is_zero = diff.pages == 0 && target.iter().all(|&byte| byte == 0);
        Ok((!is_zero).then_some(diff))
    }

    fn region(&self, chunk_bytes: u32, found: &[Option<ChunkDiff>]) -> RegionDiff {
        let differing = || found.iter().flatten().filter(|diff| diff.pages > 0);
        RegionDiff {
            file: self.file.clone(),
            size: self.target.as_ref().map(|file| file.size),
            base_size: self.base.as_ref().map(|file| file.size),
            chunks: self.chunks(chunk_bytes),
            chunks_differing: differing().count() as u32,
            pages: self.len().div_ceil(PAGE_SIZE),
            pages_differing: differing().map(|diff| diff.pages).sum(),
            bytes_differing: differing().map(|diff| diff.bytes).sum(),
        }
    }

    fn image(&self, chunk_bytes: u32, found: &[Option<ChunkDiff>]) -> ImageCells {
        let cell = |diff: &Option<ChunkDiff>| {
            let pages = f64::from(chunk_bytes) / PAGE_SIZE as f64;
            let shade = match diff {
                None => SHADES.len() + 1,
                Some(diff) if diff.pages == 0 => SHADES.len(),
                Some(diff) => {
                    SHADES.iter().position(|(share, ..)| diff.pages as f64 / pages > *share).unwrap_or(0)
                }
            };
            HeatmapCell { shade: shade as u8, marked: false }
        };
        let cells = found.iter().map(cell).collect();
        ImageCells { name: self.file.clone(), bytes: self.len(), chunk_bytes: chunk_bytes.into(), cells }
    }
}

fn stopped(_: tokio::task::JoinError) -> DiffError {
    DiffError::Stopped
}

fn draw(target: &str, base: &str, images: Vec<ImageCells>, file: &Path) -> Result<(), PictureError> {
    let shades = SHADES.map(|(_, colour, text)| (colour, text)).into_iter().chain([SAME, (PALE, ZERO)]);
    let heatmap = Heatmap {
        title: format!("{target} against {base}"),
        lines: vec!["a chunk has the colour of how much of it differs".to_owned()],
        shades: shades.map(|(colour, text)| LegendEntry { colour, text: text.to_owned() }).collect(),
        mark: None,
        images: images.into_iter().filter(|image| !image.cells.is_empty()).collect(),
    };
    heatmap.draw().write(file)
}
