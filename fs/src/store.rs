//! One opened pack: the sole read path. The mount, the page source of forked machines, unpack and inspect read through
//! it. Every byte it hands out came from a frame whose digest the index vouches for, and was checked before decoding.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;

use crate::format::MANIFEST;
use crate::index::{ChunkId, ChunkRecord, ChunkSpan, FileId, Index};
use crate::manifest::{MAX_MANIFEST_LEN, Manifest};
use crate::source::{Priority, Source};

mod bases;
mod coalesce;
mod decoded;
mod error;
mod fetcher;
mod find_base;
mod flight;
mod frames;
mod head;
mod location;
mod open;
mod options;

pub use crate::index::IndexPin;
use bases::Holder;
pub use error::{OpenError, ReadError};
use fetcher::{Fetcher, Part};
pub use find_base::{FindBase, Places};
pub use location::{PackLocation, PackSource};
pub use options::StoreOptions;

/// Parts of a bulk read under way at once: keeps a connection busy while others wait for their round trips. The HTTP
/// client's prefetch budget bounds the requests of all stores together.
const PARALLEL_PARTS: usize = 4;
/// The same until a chunk has come that was asked for: four that begin together share the link, and what was asked
/// for first, which is needed first, comes four times as late.
const FIRST_PARTS: usize = 2;

/// Zeros at hand: as many as the mount's largest read.
const ZEROS: usize = 1 << 20;

/// The plain contents of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChunkData {
    /// All zeros (not stored).
    Zero,
    /// These bytes; as long as the index says.
    Data(Bytes),
}

/// How far fetching has come.
#[derive(Debug, Clone, Default)]
pub struct FetchProgress {
    /// Size of the pack, and of the frames that a delta has in its bases.
    pub bytes_total: u64,
    /// Bytes received from the source, the index included.
    pub bytes_fetched: u64,
    /// Requests sent to the source.
    pub requests: u64,
    /// Stored chunks in the pack.
    pub chunks_total: u32,
    /// Stored chunks verified since the store was opened, whether they came from the source or the disk cache.
    pub chunks_fetched: u32,
    /// Since when reads fail and are retried; `None` when all is well.
    pub retrying_since: Option<Instant>,
    /// What the last failed attempt met, while retrying.
    pub last_error: Option<String>,
}

/// One opened pack.
#[derive(Debug)]
pub struct Store {
    fetcher: Arc<Fetcher>,
    pin: IndexPin,
    origin: PackSource,
    manifest: OnceCell<Arc<Manifest>>,
    zeros: OnceLock<Bytes>,
}

/// Receives chunks as they arrive in [`Store::fetch`].
pub type OnChunk<'a> = &'a (dyn Fn(ChunkId, ChunkData) + Send + Sync);

impl Store {
    /// Opens a pack. With a pinned index that costs one request (two at once with `head_bytes`), none when the cache
    /// has the index; without, up to three (size, end of the pack, index), one more for packs of over 30000 frames.
    pub async fn open(location: PackLocation, options: StoreOptions) -> Result<Arc<Self>, OpenError> {
        let open::OpenedPack { source, index, pin, head } = open::open(&location, &options).await?;
        let mut packs = vec![Holder::new(source)];
        packs.extend(bases::find(&index, &location, &options).await?);
        let fetcher = Arc::new(Fetcher::new(packs, index, head, options));
        let origin = match location.source {
            // Whoever opens it again may stand elsewhere.
            PackSource::Path(path) => PackSource::Path(std::path::absolute(&path).unwrap_or(path)),
            url => url,
        };
        Ok(Arc::new(Self { fetcher, pin, origin, manifest: OnceCell::new(), zeros: OnceLock::new() }))
    }

    /// The verified index.
    pub fn index(&self) -> &Index {
        &self.fetcher.index
    }

    /// Where the index is and what it hashes to: what a registry should pin.
    pub fn index_pin(&self) -> IndexPin {
        self.pin
    }

    /// What was opened: a URL as it was given, or an absolute path.
    pub fn origin(&self) -> &PackSource {
        &self.origin
    }

    /// URL or path, for messages.
    pub fn location(&self) -> &str {
        self.fetcher.location()
    }

    /// Where each base of a delta is, in the order of [`Index::bases`]; `None` of one that was not found, or of which
    /// nothing is needed.
    pub fn base_locations(&self) -> Vec<Option<&PackLocation>> {
        self.fetcher.base_locations()
    }

    /// Waits until all that was fetched is in the disk cache: for the end of a command.
    pub fn flush_cache(&self) {
        self.fetcher.flush_cache();
    }

    /// Changes how long a demand read that begins from now on may be retried: who opens a pack wants to know soon that
    /// its host is away, a machine that runs can wait.
    pub fn set_demand_deadline(&self, deadline: Duration) {
        self.fetcher.sources().for_each(|source| source.set_demand_deadline(deadline));
    }

    /// The pack's manifest, read once.
    pub async fn manifest(&self) -> Result<Arc<Manifest>, ReadError> {
        let read = async || {
            let text = self.read_files(&[MANIFEST], MAX_MANIFEST_LEN).await?.remove(0);
            let manifest = Manifest::parse(&text).map_err(|error| ReadError::Manifest(Arc::new(error)))?;
            Ok(Arc::new(manifest))
        };
        self.manifest.get_or_try_init(read).await.cloned()
    }

    /// Whole files of at most `limit` bytes each, fetched together: neighbours come in one request.
    pub async fn read_files(&self, names: &[&str], limit: u64) -> Result<Vec<Bytes>, ReadError> {
        let mut wanted = Vec::with_capacity(names.len());
        for &name in names {
            let file =
                self.index().file(name).ok_or_else(|| ReadError::NoSuchFile { name: name.to_owned() })?;
            let size = self.index().entry(file).map_or(0, |entry| entry.size);
            if size > limit {
                return Err(ReadError::TooLarge { name: name.to_owned(), size, limit });
            }
            wanted.push((file, self.index().spans(file, 0, size).collect::<Vec<_>>()));
        }
        let records =
            wanted.iter().flat_map(|(file, spans)| self.records_of(*file, spans)).collect::<Vec<_>>();
        let mut plains = self.fetcher.demand(&records).await?.into_iter();
        Ok(wanted.into_iter().map(|(file, spans)| self.assemble(file, &spans, &mut plains)).collect())
    }

    /// One chunk, verified and decoded. Everyone asking for the same chunk shares one request.
    pub async fn chunk(&self, id: ChunkId) -> Result<ChunkData, ReadError> {
        match self.stored(id)? {
            None => Ok(ChunkData::Zero),
            Some(record) => Ok(ChunkData::Data(self.fetcher.demand(&[record]).await?.remove(0))),
        }
    }

    /// Bytes `offset..offset + len` of a file, clipped to its end. The caller bounds `len`.
    pub async fn read(&self, file: FileId, offset: u64, len: u64) -> Result<Bytes, ReadError> {
        if self.index().entry(file).is_none() {
            return Err(ReadError::NoSuchChunk { file: file.0, chunk: 0 });
        }
        let spans: Vec<_> = self.index().spans(file, offset, len).collect();
        let records = self.records_of(file, &spans);
        let plains = self.fetcher.demand(&records).await?;
        Ok(self.assemble(file, &spans, &mut plains.into_iter()))
    }

    /// Fetches many chunks, batch by batch, and hands each to `on_chunk` (called by this task) as it arrives; within a
    /// batch in whatever order is quickest. Zero chunks are handed over too. Stored chunks that lie between wanted ones
    /// and came along are handed over as well, so a chunk may come twice and may come before an error.
    pub async fn fetch(
        &self,
        batches: &[Vec<ChunkId>],
        priority: Priority,
        on_chunk: OnChunk<'_>,
    ) -> Result<(), ReadError> {
        let mut parts = self.plan(batches, on_chunk)?.into_iter();
        let (sink, mut arrived) = mpsc::channel(16);
        let hand_over = |(record, plain)| on_chunk(self.index().chunk_at(record), ChunkData::Data(plain));
        let (mut tasks, mut at_once) = (JoinSet::new(), FIRST_PARTS);
        loop {
            while tasks.len() < at_once
                && let Some(part) = parts.next()
            {
                tasks.spawn(self.fetcher.clone().work(part, priority, sink.clone()));
            }
            tokio::select! {
                Some(chunk) = arrived.recv() => {
                    if !self.is_in_head(self.index().chunk_at(chunk.0)) {
                        at_once = PARALLEL_PARTS;
                    }
                    hand_over(chunk);
                }
                finished = tasks.join_next() => match finished {
                    Some(done) => done.unwrap_or(Err(ReadError::Stopped))?,
                    None => break,
                },
            }
        }
        drop(sink);
        while let Some(chunk) = arrived.recv().await {
            hand_over(chunk);
        }
        Ok(())
    }

    /// Whether a chunk was verified since the store was opened (zero chunks always are).
    pub fn is_fetched(&self, id: ChunkId) -> bool {
        self.index()
            .record_number(id)
            .map_or(self.index().is_zero(id), |record| self.fetcher.is_record_fetched(record))
    }

    /// Whether a stored chunk comes in the head ([`StoreOptions::head_bytes`]), so that it takes no request of its own.
    pub fn is_in_head(&self, id: ChunkId) -> bool {
        let record = self.index().record(id);
        let end = |record: &ChunkRecord| record.offset + u64::from(record.length);
        record.is_some_and(|record| record.pack == 0 && end(record) <= self.fetcher.head.len())
    }

    /// How far fetching has come. Cheap.
    pub fn progress(&self) -> FetchProgress {
        let counters = || self.fetcher.sources().map(Source::counters);
        let outage = self.fetcher.sources().find_map(Source::outage);
        FetchProgress {
            bytes_total: self.index().pack_size() + self.index().base_bytes(),
            bytes_fetched: counters().map(|counters| counters.bytes).sum(),
            requests: counters().map(|counters| counters.requests).sum(),
            chunks_total: self.index().stored_chunk_count(),
            chunks_fetched: self.fetcher.fetched_count(),
            retrying_since: outage.as_ref().map(|outage| outage.since),
            last_error: outage.map(|outage| outage.last_error),
        }
    }

    /// Drops the decoded chunks kept in memory.
    pub fn release_memory(&self) {
        self.fetcher.release_memory();
    }

    /// The parts of a bulk read in the order to start them. Hands over the zero chunks on the way.
    fn plan(&self, batches: &[Vec<ChunkId>], on_chunk: OnChunk<'_>) -> Result<Vec<Part>, ReadError> {
        let mut planned = vec![false; self.index().stored_chunk_count() as usize];
        let mut parts = Vec::new();
        for batch in batches {
            let mut records = Vec::with_capacity(batch.len());
            for &id in batch {
                match self.stored(id)? {
                    None => on_chunk(id, ChunkData::Zero),
                    Some(record) if !std::mem::replace(&mut planned[record as usize], true) => {
                        records.push(record)
                    }
                    Some(_) => {}
                }
            }
            records.sort_unstable();
            parts.extend(self.fetcher.split(records));
        }
        Ok(parts)
    }

    /// Number of a chunk's record; `None` for a chunk of zeros.
    fn stored(&self, id: ChunkId) -> Result<Option<u32>, ReadError> {
        match self.index().plain_len(id) {
            0 => Err(ReadError::NoSuchChunk { file: id.file.0, chunk: id.chunk }),
            _ => Ok(self.index().record_number(id)),
        }
    }

    fn records_of(&self, file: FileId, spans: &[ChunkSpan]) -> Vec<u32> {
        spans
            .iter()
            .filter_map(|span| self.index().record_number(ChunkId { file, chunk: span.chunk }))
            .collect()
    }

    /// Puts spans together out of the plain chunks of [`Store::records_of`], in that order.
    fn assemble(&self, file: FileId, spans: &[ChunkSpan], plains: &mut impl Iterator<Item = Bytes>) -> Bytes {
        let mut part = |span: &ChunkSpan| {
            let stored = self.index().record_number(ChunkId { file, chunk: span.chunk }).is_some();
            let plain = stored.then(|| plains.next().expect("a plain chunk for every stored one"));
            let range = span.start as usize..(span.start + span.len) as usize;
            plain.unwrap_or_else(|| self.zeros()).slice(range)
        };
        if let [span] = spans {
            return part(span);
        }
        let len = spans.iter().map(|span| span.len as usize).sum();
        // Most of a memory image: whole reads of zeros share one buffer.
        let is_zero = |span: &ChunkSpan| self.index().is_zero(ChunkId { file, chunk: span.chunk });
        if len <= self.zeros().len() && spans.iter().all(is_zero) {
            return self.zeros().slice(..len);
        }
        let mut all = BytesMut::with_capacity(len);
        spans.iter().for_each(|span| all.extend_from_slice(&part(span)));
        all.freeze()
    }

    fn zeros(&self) -> Bytes {
        self.zeros.get_or_init(|| vec![0; ZEROS.max(self.index().chunk_size() as usize)].into()).clone()
    }
}
