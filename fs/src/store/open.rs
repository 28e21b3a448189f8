//! Opening a pack: finding its index, checking it, and telling other things apart from packs.

use std::io::Read;

use bytes::Bytes;

use super::error::OpenError;
use super::head::Head;
use super::location::{PackLocation, PackSource};
use super::options::StoreOptions;
use crate::cache::ChunkCache;
use crate::digest::Digest;
use crate::format::{self, MANIFEST, MAX_INDEX_LEN, PACK_VERSION, SEEK_FOOTER_LEN};
use crate::index::{Index, IndexPin, TRAILER_LEN};
use crate::manifest::{self, MAX_MANIFEST_LEN};
use crate::source::{Priority, Source, SourceError};

/// Bytes read at the end of a pack whose index is not pinned: holds seek table and index of packs up to about 4000
/// stored chunks, and at least the seek table up to 30000.
const TAIL_LEN: u64 = 256 << 10;
/// Bytes read at the start of something without an index, to tell what it is.
const SNIFF_LEN: u64 = 128 << 10;

/// A pack's bytes and its checked index.
pub(super) struct OpenedPack {
    pub(super) source: Source,
    pub(super) index: Index,
    pub(super) pin: IndexPin,
    /// The first bytes of the pack, when they were asked for along with the index.
    pub(super) head: Head,
}

/// A source and its name, for errors.
struct PackOpener {
    source: Source,
    location: String,
}

pub(super) async fn open(location: &PackLocation, options: &StoreOptions) -> Result<OpenedPack, OpenError> {
    let opener = PackOpener::new(location, options)?;
    let Some(pin) = location.index else {
        let (pin, bytes) = opener.find_index().await?;
        let index = opener.parse(&bytes, Some(opener.size().await?))?;
        return Ok(OpenedPack { source: opener.source, index, pin, head: Head::none() });
    };
    // Local packs are as near as the cache.
    let local = matches!(location.source, PackSource::Path(_));
    let cache = options.cache.as_deref().filter(|_| !local);
    let cached = cache.and_then(|cache| cache.get(pin.sha256, pin.length));
    let (bytes, head) = match cached {
        Some(bytes) => (bytes, Head::none()),
        None => opener.fetch_pinned(&pin, options.head_bytes, cache).await?,
    };
    let index = opener.parse(&bytes, opener.source.known_size())?;
    Ok(OpenedPack { source: opener.source, index, pin, head })
}

impl PackOpener {
    fn new(location: &PackLocation, options: &StoreOptions) -> Result<Self, OpenError> {
        let name = location.describe();
        match options.source(location) {
            Ok(source) => Ok(Self { source, location: name }),
            Err(source) => Err(OpenError::Source { location: name, source }),
        }
    }

    /// The pinned index frame, checked against its digest. The head of the pack, if one is wanted, is asked for at
    /// the same time, as whoever opens a pack to restore it needs the small members next; it is not waited for.
    async fn fetch_pinned(
        &self,
        pin: &IndexPin,
        head_bytes: u64,
        cache: Option<&ChunkCache>,
    ) -> Result<(Bytes, Head), OpenError> {
        let size = self.source.known_size().unwrap_or(u64::MAX);
        if pin.length > MAX_INDEX_LEN || pin.offset.checked_add(pin.length).is_none_or(|end| end > size) {
            return Err(OpenError::Truncated { location: self.location.clone(), size });
        }
        let head = Head::fetch(&self.source, head_bytes.min(pin.offset));
        let mut index = self.read(pin.offset, pin.length).await?;
        let mut found = Digest::of(&index);
        if found != pin.sha256 {
            // Damage on the way is worth one more try.
            index = self.read(pin.offset, pin.length).await?;
            found = Digest::of(&index);
        }
        if found != pin.sha256 {
            return Err(OpenError::IndexDigest {
                location: self.location.clone(),
                expected: pin.sha256,
                found,
            });
        }
        remember(cache, pin.sha256, &index);
        Ok((index, head))
    }

    /// Finds the index of a pack nobody pinned from the pack's end.
    async fn find_index(&self) -> Result<(IndexPin, Bytes), OpenError> {
        let size = self.size().await?;
        let tail_start = size.saturating_sub(TAIL_LEN);
        let tail = self.read(tail_start, size - tail_start).await?;
        let footer = &tail[tail.len().saturating_sub(SEEK_FOOTER_LEN as usize)..];
        let seek_table = format::parse_seek_footer(footer);
        let Some(index_end) = seek_table.and_then(|len| size.checked_sub(len)) else {
            return Err(self.not_a_pack(size).await);
        };
        let trailer_start = index_end.saturating_sub(TRAILER_LEN as u64);
        let trailer = match trailer_start.checked_sub(tail_start) {
            Some(at) => tail.slice(at as usize..(index_end - tail_start) as usize),
            None => self.read(trailer_start, index_end - trailer_start).await?,
        };
        let length = Index::parse_trailer(&trailer).ok().filter(|&length| length <= index_end);
        let Some(length) = length else {
            return Err(self.not_a_pack(size).await);
        };
        let offset = index_end - length;
        let bytes = match offset.checked_sub(tail_start) {
            Some(at) => tail.slice(at as usize..(index_end - tail_start) as usize),
            None => self.read(offset, length).await?,
        };
        Ok((IndexPin { offset, length, sha256: Digest::of(&bytes) }, bytes))
    }

    /// What a file without an index is, judged by its beginning.
    async fn not_a_pack(&self, size: u64) -> OpenError {
        let location = self.location.clone();
        let start = match self.read(0, size.min(SNIFF_LEN)).await {
            Ok(start) => start,
            Err(error) => return error,
        };
        match layout_of(&start) {
            Some(PACK_VERSION) => OpenError::Truncated { location, size },
            Some(version) => OpenError::Legacy { location, version },
            None => OpenError::NotAPack { location },
        }
    }

    async fn size(&self) -> Result<u64, OpenError> {
        self.source.size().await.map_err(|source| self.failed(source))
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, OpenError> {
        match len {
            0 => Ok(Bytes::new()),
            len => {
                self.source.read_at(offset, len, Priority::Demand).await.map_err(|source| self.failed(source))
            }
        }
    }

    fn parse(&self, bytes: &[u8], size: Option<u64>) -> Result<Index, OpenError> {
        Index::parse(bytes, size)
            .map_err(|source| OpenError::Index { location: self.location.clone(), source })
    }

    fn failed(&self, source: SourceError) -> OpenError {
        OpenError::Source { location: self.location.clone(), source }
    }
}

fn remember(cache: Option<&ChunkCache>, digest: Digest, bytes: &Bytes) {
    if let Some(cache) = cache {
        cache.put(digest, bytes.clone());
    }
}

/// The layout a file has, judged by its first bytes: the `forkd_pack_version` of the manifest it begins with.
fn layout_of(start: &[u8]) -> Option<u32> {
    let mut archive = tar::Archive::new(zstd::Decoder::new(start).ok()?);
    let mut entry = archive.entries().ok()?.raw(true).next()?.ok()?;
    if !entry.path_bytes().ends_with(MANIFEST.as_bytes()) {
        return None;
    }
    let mut text = String::new();
    entry.by_ref().take(MAX_MANIFEST_LEN).read_to_string(&mut text).ok()?;
    manifest::pack_version(&text).ok()
}
