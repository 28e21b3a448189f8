//! One opened pack: the sole read path. The mount, the page source of forked machines, unpack and inspect read through
//! it. Every byte it hands out came from a frame whose digest the index vouches for, and was checked before decoding.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use lru::LruCache;
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::cache::ChunkCache;
use crate::digest::Digest;
use crate::format::MANIFEST;
use crate::index::{ChunkId, ChunkSpan, FileId, Index};
use crate::manifest::{MAX_MANIFEST_LEN, Manifest};
use crate::observe::Observer;
use crate::source::{Class, Deadlines, FileSource, HttpClient, HttpSource, Source, SourceError, redact_url};

mod error;
mod flight;
mod head;
mod open;
mod run;

pub use error::{OpenError, ReadError};
use flight::{Entry, Flights, Lead, Waiter};
use head::Head;

/// How long a demand read waits for a prefetch that is fetching its chunk before it asks for it itself.
const PATIENCE: Duration = Duration::from_millis(100);
/// Parts of a bulk read under way at once: keeps a connection busy while others wait for their round trips. The HTTP
/// client's prefetch budget bounds the requests of all stores together.
const PARALLEL_PARTS: usize = 4;
/// The same until a chunk has come that was asked for: four that begin together share the link, and what was asked for first,
/// which is needed first, comes four times as late.
const FIRST_PARTS: usize = 2;

/// Zeros at hand: as many as the mount's largest read.
const ZEROS: usize = 1 << 20;

/// Where a pack is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PackSource {
    /// An http(s) URL.
    Url(String),
    /// A local file.
    Path(PathBuf),
}

/// A pack and what is known about it before it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackLocation {
    /// Where it is.
    pub source: PackSource,
    /// Its size in bytes, from a registry.
    pub size: Option<u64>,
    /// Where its index is and what it must hash to, from a registry. Saves requests and anchors trust.
    pub index: Option<IndexPin>,
}

impl PackLocation {
    /// What messages call it: the path, or the URL without what may be secret in it.
    pub fn describe(&self) -> String {
        match &self.source {
            PackSource::Url(url) => redact_url(url),
            PackSource::Path(path) => path.display().to_string(),
        }
    }

    /// Its bytes, checked by nobody yet. Of a URL nothing is requested so far.
    pub fn source(&self, options: &StoreOptions) -> Result<Source, SourceError> {
        let deadlines = Deadlines { demand: options.demand_deadline, prefetch: options.prefetch_deadline };
        match &self.source {
            PackSource::Url(url) => {
                let source = HttpSource::new(&options.http, url, self.size, deadlines)?;
                Ok(Source::Http(source.observed_by(options.observer.clone())))
            }
            PackSource::Path(path) => {
                Ok(Source::File(FileSource::open(path)?.observed_by(options.observer.clone())))
            }
        }
    }
}

/// The root of trust of a pack: its index frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexPin {
    /// Offset of the index frame in the pack.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its digest.
    pub sha256: Digest,
}

/// How a store behaves.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Connections to use; share one client per process.
    pub http: HttpClient,
    /// Where verified chunks are kept on disk; `None` keeps none.
    pub cache: Option<Arc<ChunkCache>>,
    /// How long a demand read may be retried. A FUSE reader cannot be killed meanwhile, so a mount keeps it short; a
    /// machine can wait longer than its network is away.
    pub demand_deadline: Duration,
    /// How long a prefetch read may be retried.
    pub prefetch_deadline: Duration,
    /// Plain bytes kept decoded in memory.
    pub decoded_bytes: usize,
    /// Frames at most this many bytes apart come in one request. See `tests/gap.rs` for what others cost.
    pub max_gap: u64,
    /// Bytes at the start of the pack to fetch along with a pinned index that is not cached, and to hold: whoever opens
    /// a pack to restore it saves the round trip for the small members and hot pages, which lie there. 0 fetches none.
    pub head_bytes: u64,
    /// Who hears of requests and decodings; `None` spares measuring them.
    pub observer: Option<Arc<dyn Observer>>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            http: HttpClient::default(),
            cache: None,
            demand_deadline: Duration::from_secs(30),
            prefetch_deadline: Duration::from_secs(120),
            decoded_bytes: 64 << 20,
            max_gap: 128 << 10,
            head_bytes: 0,
            observer: None,
        }
    }
}

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
pub struct Progress {
    /// Size of the pack.
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
    source: Source,
    index: Index,
    pin: IndexPin,
    /// The first bytes of the pack, not trusted more than any others; may be empty.
    head: Head,
    cache: Option<Arc<ChunkCache>>,
    decoded: Decoded,
    flights: Arc<Flights>,
    max_gap: u64,
    /// One bit a record: verified since the store was opened.
    fetched: Vec<AtomicU64>,
    fetched_count: AtomicU32,
    manifest: OnceCell<Arc<Manifest>>,
    zeros: OnceLock<Bytes>,
    observer: Option<Arc<dyn Observer>>,
}

/// Receives chunks as they arrive in [`Store::fetch`].
pub type OnChunk<'a> = &'a (dyn Fn(ChunkId, ChunkData) + Send + Sync);

/// A frame someone waits for.
enum Wish {
    Granted(Bytes),
    Waiting(Waiter),
}

impl Store {
    /// Opens a pack. With a pinned index that costs one request (two at once with `head_bytes`), none when the cache has
    /// the index; without, up to three (size, end of the pack, index), one more for packs of over 30000 frames.
    pub async fn open(location: PackLocation, options: StoreOptions) -> Result<Arc<Self>, OpenError> {
        // Local packs are as near as the cache.
        let local = matches!(location.source, PackSource::Path(_));
        let options = if local { StoreOptions { cache: None, ..options } } else { options };
        let open::Opened { source, index, pin, head } = open::open(&location, &options).await?;
        let words = index.stored_chunk_count().div_ceil(64);
        Ok(Arc::new(Self {
            source,
            pin,
            head,
            cache: options.cache,
            decoded: Decoded::new(options.decoded_bytes),
            flights: Arc::default(),
            max_gap: options.max_gap,
            fetched: (0..words).map(|_| AtomicU64::new(0)).collect(),
            fetched_count: AtomicU32::new(0),
            manifest: OnceCell::new(),
            zeros: OnceLock::new(),
            observer: options.observer,
            index,
        }))
    }

    /// The verified index.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Where the index is and what it hashes to: what a registry should pin.
    pub fn index_pin(&self) -> IndexPin {
        self.pin
    }

    /// URL or path, for messages.
    pub fn location(&self) -> &str {
        self.source.describe()
    }

    /// Changes how long a demand read that begins from now on may be retried: who opens a pack wants to know soon that
    /// its host is away, a machine that runs can wait.
    pub fn set_demand_deadline(&self, deadline: Duration) {
        self.source.set_demand_deadline(deadline);
    }

    /// The pack's manifest, read once.
    pub async fn manifest(self: &Arc<Self>) -> Result<Arc<Manifest>, ReadError> {
        let read = async || {
            let text = self.read_files(&[MANIFEST], MAX_MANIFEST_LEN).await?.remove(0);
            let manifest = Manifest::parse(&text).map_err(|error| ReadError::Manifest(Arc::new(error)))?;
            Ok(Arc::new(manifest))
        };
        self.manifest.get_or_try_init(read).await.cloned()
    }

    /// Whole files of at most `limit` bytes each, fetched together: neighbours come in one request.
    pub async fn read_files(self: &Arc<Self>, names: &[&str], limit: u64) -> Result<Vec<Bytes>, ReadError> {
        let mut wanted = Vec::with_capacity(names.len());
        for &name in names {
            let file =
                self.index.file(name).ok_or_else(|| ReadError::NoSuchFile { name: name.to_owned() })?;
            let size = self.index.entry(file).map_or(0, |entry| entry.size);
            if size > limit {
                return Err(ReadError::TooLarge { name: name.to_owned(), size, limit });
            }
            wanted.push((file, self.index.spans(file, 0, size).collect::<Vec<_>>()));
        }
        let records =
            wanted.iter().flat_map(|(file, spans)| self.records_of(*file, spans)).collect::<Vec<_>>();
        let mut plains = self.demand(&records).await?.into_iter();
        Ok(wanted.into_iter().map(|(file, spans)| self.assemble(file, &spans, &mut plains)).collect())
    }

    /// One chunk, verified and decoded. Everyone asking for the same chunk shares one request.
    pub async fn chunk(self: &Arc<Self>, id: ChunkId) -> Result<ChunkData, ReadError> {
        match self.stored(id)? {
            None => Ok(ChunkData::Zero),
            Some(record) => Ok(ChunkData::Data(self.demand(&[record]).await?.remove(0))),
        }
    }

    /// Bytes `offset..offset + len` of a file, clipped to its end. The caller bounds `len`.
    pub async fn read(self: &Arc<Self>, file: FileId, offset: u64, len: u64) -> Result<Bytes, ReadError> {
        if self.index.entry(file).is_none() {
            return Err(ReadError::NoSuchChunk { file: file.0, chunk: 0 });
        }
        let spans: Vec<_> = self.index.spans(file, offset, len).collect();
        let records = self.records_of(file, &spans);
        let plains = self.demand(&records).await?;
        Ok(self.assemble(file, &spans, &mut plains.into_iter()))
    }

    /// Fetches many chunks, batch by batch, and hands each to `on_chunk` (called by this task) as it arrives; within a
    /// batch in whatever order is quickest. Zero chunks are handed over too. Stored chunks that lie between wanted ones
    /// and came along are handed over as well, so a chunk may come twice and may come before an error.
    pub async fn fetch(
        self: &Arc<Self>,
        batches: &[Vec<ChunkId>],
        class: Class,
        on_chunk: OnChunk<'_>,
    ) -> Result<(), ReadError> {
        let mut parts = self.plan(batches, on_chunk)?.into_iter();
        let (sink, mut arrived) = mpsc::channel(16);
        let hand_over = |(record, plain)| on_chunk(self.index.chunk_at(record), ChunkData::Data(plain));
        let (mut tasks, mut at_once) = (JoinSet::new(), FIRST_PARTS);
        loop {
            while tasks.len() < at_once
                && let Some(part) = parts.next()
            {
                tasks.spawn(self.clone().work(part, class, sink.clone()));
            }
            tokio::select! {
                Some(chunk) = arrived.recv() => {
                    if !self.is_in_head(self.index.chunk_at(chunk.0)) {
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
        self.index.record_number(id).map_or(self.index.is_zero(id), |record| self.is_record_fetched(record))
    }

    /// Whether a stored chunk comes in the head ([`StoreOptions::head_bytes`]), so that it takes no request of its own.
    pub fn is_in_head(&self, id: ChunkId) -> bool {
        let record = self.index.record(id);
        record.is_some_and(|record| record.offset + u64::from(record.length) <= self.head.len())
    }

    /// How far fetching has come. Cheap.
    pub fn progress(&self) -> Progress {
        let (counters, trouble) = (self.source.counters(), self.source.trouble());
        Progress {
            bytes_total: self.index.pack_size(),
            bytes_fetched: counters.bytes,
            requests: counters.requests,
            chunks_total: self.index.stored_chunk_count(),
            chunks_fetched: self.fetched_count.load(Relaxed),
            retrying_since: trouble.as_ref().map(|trouble| trouble.since),
            last_error: trouble.map(|trouble| trouble.last_error),
        }
    }

    /// Drops the decoded chunks kept in memory.
    pub fn release_memory(&self) {
        self.decoded.clear();
    }

    /// The parts of a bulk read in the order to start them. Hands over the zero chunks on the way.
    fn plan(&self, batches: &[Vec<ChunkId>], on_chunk: OnChunk<'_>) -> Result<Vec<run::Work>, ReadError> {
        let mut planned = vec![false; self.index.stored_chunk_count() as usize];
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
            parts.extend(self.split(records));
        }
        Ok(parts)
    }

    /// Number of a chunk's record; `None` for a chunk of zeros.
    fn stored(&self, id: ChunkId) -> Result<Option<u32>, ReadError> {
        match self.index.plain_len(id) {
            0 => Err(ReadError::NoSuchChunk { file: id.file.0, chunk: id.chunk }),
            _ => Ok(self.index.record_number(id)),
        }
    }

    fn records_of(&self, file: FileId, spans: &[ChunkSpan]) -> Vec<u32> {
        spans
            .iter()
            .filter_map(|span| self.index.record_number(ChunkId { file, chunk: span.chunk }))
            .collect()
    }

    /// Puts spans together out of the plain chunks of [`Store::records_of`], in that order.
    fn assemble(&self, file: FileId, spans: &[ChunkSpan], plains: &mut impl Iterator<Item = Bytes>) -> Bytes {
        let mut part = |span: &ChunkSpan| {
            let stored = self.index.record_number(ChunkId { file, chunk: span.chunk }).is_some();
            let plain = stored.then(|| plains.next().expect("a plain chunk for every stored one"));
            let range = span.start as usize..(span.start + span.len) as usize;
            plain.unwrap_or_else(|| self.zeros()).slice(range)
        };
        if let [span] = spans {
            return part(span);
        }
        let len = spans.iter().map(|span| span.len as usize).sum();
        // Most of a memory image: whole reads of zeros share one buffer.
        let is_zero = |span: &ChunkSpan| self.index.is_zero(ChunkId { file, chunk: span.chunk });
        if len <= self.zeros().len() && spans.iter().all(is_zero) {
            return self.zeros().slice(..len);
        }
        let mut all = BytesMut::with_capacity(len);
        spans.iter().for_each(|span| all.extend_from_slice(&part(span)));
        all.freeze()
    }

    fn zeros(&self) -> Bytes {
        self.zeros.get_or_init(|| vec![0; ZEROS.max(self.index.chunk_size() as usize)].into()).clone()
    }

    /// Plain chunks someone waits for, in the order of `records`.
    async fn demand(self: &Arc<Self>, records: &[u32]) -> Result<Vec<Bytes>, ReadError> {
        let mut leads = Vec::new();
        let wishes: Vec<Wish> = records.iter().map(|&record| self.wish(record, false, &mut leads)).collect();
        if !leads.is_empty() {
            self.launch(leads);
        }
        let mut plains = Vec::with_capacity(records.len());
        for (&record, wish) in records.iter().zip(wishes) {
            plains.push(self.granted(record, wish).await?);
        }
        Ok(plains)
    }

    /// Looks for a chunk in memory, then among those being fetched; a lead is added when it is in neither.
    fn wish(&self, record: u32, overtake: bool, leads: &mut Vec<Lead>) -> Wish {
        if let Some(plain) = self.decoded.get(record) {
            return Wish::Granted(plain);
        }
        match self.flights.enter(record, Class::Demand, overtake) {
            Entry::Join(waiter) => Wish::Waiting(waiter),
            Entry::Lead(lead) => match self.decoded.get(record) {
                // It landed between the first look and the entry.
                Some(plain) => Wish::Granted(plain),
                None => {
                    let waiter = lead.waiter(Class::Demand);
                    leads.push(lead);
                    Wish::Waiting(waiter)
                }
            },
        }
    }

    async fn granted(self: &Arc<Self>, record: u32, mut wish: Wish) -> Result<Bytes, ReadError> {
        // More than one round is needed only when others fail; a task that always dies must not spin.
        for _ in 0..8 {
            let waiter = match wish {
                Wish::Granted(plain) => return Ok(plain),
                Wish::Waiting(waiter) => waiter,
            };
            let landed = match waiter.is_ahead() {
                true => timeout(PATIENCE, waiter.landed()).await.unwrap_or(None),
                false => waiter.landed().await,
            };
            if let Some(outcome) = landed {
                if let Ok(plain) = &outcome {
                    self.decoded.put(record, plain);
                }
                return outcome;
            }
            let mut leads = Vec::new();
            wish = self.wish(record, true, &mut leads);
            self.launch(leads);
        }
        Err(ReadError::Stopped)
    }

    fn mark_fetched(&self, record: u32) {
        let bit = 1 << (record % 64);
        if self.fetched[record as usize / 64].fetch_or(bit, Relaxed) & bit == 0 {
            self.fetched_count.fetch_add(1, Relaxed);
        }
    }

    fn is_record_fetched(&self, record: u32) -> bool {
        self.fetched[record as usize / 64].load(Relaxed) & (1 << (record % 64)) != 0
    }
}

/// Plain chunks kept in memory by record number, the longest unused going first.
#[derive(Debug)]
struct Decoded {
    budget: usize,
    kept: Mutex<(LruCache<u32, Bytes>, usize)>,
}

impl Decoded {
    fn new(budget: usize) -> Self {
        Self { budget, kept: Mutex::new((LruCache::sparse(NonZeroUsize::MAX), 0)) }
    }

    fn clear(&self) {
        let (kept, bytes) = &mut *self.kept.lock().expect("no panics while held");
        kept.clear();
        *bytes = 0;
    }

    fn get(&self, record: u32) -> Option<Bytes> {
        self.kept.lock().expect("no panics while held").0.get(&record).cloned()
    }

    fn put(&self, record: u32, plain: &Bytes) {
        let (kept, bytes) = &mut *self.kept.lock().expect("no panics while held");
        *bytes += plain.len();
        *bytes -= kept.put(record, plain.clone()).map_or(0, |old| old.len());
        while *bytes > self.budget
            && let Some((_, old)) = kept.pop_lru()
        {
            *bytes -= old.len();
        }
    }
}
