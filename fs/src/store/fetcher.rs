//! Getting chunks: from memory, the disk cache or the source, several frames in one request, each checked against the
//! index before it is decoded. The only place where bytes become trusted.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::bases::Holder;
use super::coalesce::{Cut, coalesce};
use super::decoded::Decoded;
use super::error::ReadError;
use super::flight::{Entry, Flights, Lead, Outcome, Waiter};
use super::frames::{Frames, decode};
use super::head::Head;
use super::location::PackLocation;
use super::options::StoreOptions;
use crate::cache::ChunkCache;
use crate::digest::Digest;
use crate::index::Index;
use crate::observe::{Decoding, Observer};
use crate::source::{Priority, Source, SourceError};

/// How long a demand read waits for a prefetch that is fetching its chunk before it asks for it itself.
const PATIENCE: Duration = Duration::from_millis(100);

/// How often a frame is fetched until it is refused. On a line that damages one answer in a hundred, a second attempt
/// still fails once in ten thousand frames.
const FRAME_ATTEMPTS: u32 = 3;

/// Cached frames one task reads and decodes: handing each to a thread of its own costs a tenth of decoding it.
const CACHED_TOGETHER: usize = 4;

/// Where bulk reads deliver: record number and plain bytes.
pub(super) type Sink = mpsc::Sender<(u32, Bytes)>;

/// A part of a bulk read that one task does.
#[derive(Debug)]
pub(super) struct Part {
    /// Record numbers, ascending.
    wanted: Vec<u32>,
    /// Whether to keep the frames between the wanted ones, which come along in the request.
    keep_gaps: bool,
}

/// A pack's chunks, by the numbers of their records.
#[derive(Debug)]
pub(super) struct Fetcher {
    /// The pack itself, then its bases in the order of the index.
    packs: Vec<Holder>,
    pub(super) index: Index,
    /// The first bytes of the pack, not trusted more than any others; may be empty.
    pub(super) head: Head,
    cache: Option<Arc<ChunkCache>>,
    decoded: Decoded,
    flights: Arc<Flights>,
    max_gap: u64,
    /// One bit a record: verified since the pack was opened.
    fetched: Vec<AtomicU64>,
    fetched_count: AtomicU32,
    observer: Option<Arc<dyn Observer>>,
}

/// A frame someone waits for.
enum Pending {
    Ready(Bytes),
    Fetching(Waiter),
}

impl Fetcher {
    /// `packs` are the pack itself and its bases.
    pub(super) fn new(packs: Vec<Holder>, index: Index, head: Head, options: StoreOptions) -> Self {
        let words = index.stored_chunk_count().div_ceil(64);
        let uses_cache = packs.iter().any(|pack| pack.is_cached);
        Self {
            packs,
            head,
            cache: options.cache.filter(|_| uses_cache),
            decoded: Decoded::new(options.decoded_bytes),
            flights: Arc::default(),
            max_gap: options.max_gap,
            fetched: (0..words).map(|_| AtomicU64::new(0)).collect(),
            fetched_count: AtomicU32::new(0),
            observer: options.observer,
            index,
        }
    }

    /// What chunks are read from: the pack itself first, then the bases that are anywhere.
    pub(super) fn sources(&self) -> impl Iterator<Item = &Source> {
        self.packs.iter().filter_map(|pack| pack.source.as_ref())
    }

    /// URL or path of the pack itself.
    pub(super) fn location(&self) -> &str {
        self.sources().next().map_or("", Source::describe)
    }

    /// Where the bases are, as far as they were found.
    pub(super) fn base_locations(&self) -> Vec<Option<&PackLocation>> {
        self.packs[1..].iter().map(|pack| pack.place.as_ref()).collect()
    }

    fn holder(&self, number: u32) -> &Holder {
        // The index has no records of bases that it does not name.
        &self.packs[usize::from(self.index.record_at(number).pack)]
    }

    /// What the frame of a record is read from.
    fn source(&self, number: u32) -> Result<&Source, ReadError> {
        self.holder(number).source.as_ref().ok_or_else(|| self.no_base(number))
    }

    /// URL or path of what the frame of a record is read from.
    fn location_of(&self, number: u32) -> String {
        self.holder(number).source.as_ref().map_or_else(String::new, |source| source.describe().to_owned())
    }

    fn no_base(&self, number: u32) -> ReadError {
        let record = self.index.record_at(number);
        let base = usize::from(record.pack).checked_sub(1).and_then(|base| self.index.bases().get(base));
        let base = base.map_or(record.digest, |base| base.index.sha256);
        ReadError::NoBase { file: self.file_name(number), chunk: record.chunk, base }
    }

    /// Drops the decoded chunks kept in memory.
    pub(super) fn release_memory(&self) {
        self.decoded.clear();
    }

    /// How many chunks were verified since the pack was opened.
    pub(super) fn fetched_count(&self) -> u32 {
        self.fetched_count.load(Relaxed)
    }

    /// Plain chunks someone waits for, in the order of `records`.
    pub(super) async fn demand(self: &Arc<Self>, records: &[u32]) -> Result<Vec<Bytes>, ReadError> {
        let mut leads = Vec::new();
        let pending: Vec<Pending> =
            records.iter().map(|&record| self.look_up(record, false, &mut leads)).collect();
        if !leads.is_empty() {
            self.launch(leads);
        }
        let mut plains = Vec::with_capacity(records.len());
        for (&record, pending) in records.iter().zip(pending) {
            plains.push(self.wait_for_chunk(record, pending).await?);
        }
        Ok(plains)
    }

    /// Looks for a chunk in memory, then among those being fetched; a lead is added when it is in neither.
    fn look_up(&self, record: u32, overtake: bool, leads: &mut Vec<Lead>) -> Pending {
        if let Some(plain) = self.decoded.get(record) {
            return Pending::Ready(plain);
        }
        match self.flights.enter(record, Priority::Demand, overtake) {
            Entry::Join(waiter) => Pending::Fetching(waiter),
            Entry::Lead(lead) => match self.decoded.get(record) {
                // It landed between the first look and the entry.
                Some(plain) => Pending::Ready(plain),
                None => {
                    let waiter = lead.waiter(Priority::Demand);
                    leads.push(lead);
                    Pending::Fetching(waiter)
                }
            },
        }
    }

    async fn wait_for_chunk(self: &Arc<Self>, record: u32, mut pending: Pending) -> Result<Bytes, ReadError> {
        // More than one round is needed only when others fail; a task that always dies must not spin.
        for _ in 0..8 {
            let waiter = match pending {
                Pending::Ready(plain) => return Ok(plain),
                Pending::Fetching(waiter) => waiter,
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
            pending = self.look_up(record, true, &mut leads);
            self.launch(leads);
        }
        Err(ReadError::Stopped)
    }

    /// Waits until all that was put into the disk cache is written.
    pub(super) fn flush_cache(&self) {
        if let Some(cache) = &self.cache {
            cache.flush();
        }
    }

    /// Starts fetching frames someone waits for: each cached one by itself, the others coalesced.
    pub(super) fn launch(self: &Arc<Self>, mut leads: Vec<Lead>) {
        leads.sort_unstable_by_key(Lead::record);
        let (cached, missing): (Vec<_>, Vec<_>) =
            leads.into_iter().partition(|lead| self.is_cached(lead.record()));
        let mut cached = cached.into_iter().peekable();
        while cached.peek().is_some() {
            let leads: Vec<Lead> = cached.by_ref().take(CACHED_TOGETHER).collect();
            let this = self.clone();
            tokio::spawn(async move {
                for lead in this.land_cached(leads).await {
                    // Every waiter gets the error by the landing.
                    drop(this.fetch_run(vec![lead], Priority::Demand, None).await);
                }
            });
        }
        for run in coalesce(&self.index, self.cut(), missing, Lead::record) {
            let this = self.clone();
            tokio::spawn(async move { drop(this.fetch_run(run, Priority::Demand, None).await) });
        }
    }

    /// Cuts a batch of a bulk read into parts, those that need no request first.
    pub(super) fn split(&self, records: Vec<u32>) -> Vec<Part> {
        let (cached, missing): (Vec<_>, Vec<_>) =
            records.into_iter().partition(|&record| self.is_cached(record));
        let cached =
            cached.chunks(CACHED_TOGETHER).map(|part| Part { wanted: part.to_vec(), keep_gaps: false });
        let missing = coalesce(&self.index, self.cut(), missing, |&record| record);
        let missing = missing.into_iter().map(|mut wanted| {
            wanted.sort_unstable();
            let keep_gaps = wanted.iter().all(|&record| self.index.record_at(record).pack == 0);
            Part { wanted, keep_gaps }
        });
        cached.chain(missing).collect()
    }

    /// Does one part of a bulk read.
    pub(super) async fn work(
        self: Arc<Self>,
        work: Part,
        priority: Priority,
        sink: Sink,
    ) -> Result<(), ReadError> {
        let (leads, joins) = self.claim(&work, priority, &sink).await;
        // What others fetch already may leave holes, so the runs are cut anew.
        for run in coalesce(&self.index, self.cut(), leads, Lead::record) {
            self.fetch_run(run, priority, Some(&sink)).await?;
        }
        for (record, waiter) in joins {
            let plain = match waiter.landed().await {
                Some(Ok(plain)) => plain,
                _ => self.demand(&[record]).await?.remove(0),
            };
            deliver(&sink, record, plain).await;
        }
        Ok(())
    }

    /// Delivers what is at hand and takes the lead for what nobody fetches yet; what others fetch is returned to wait
    /// for.
    async fn claim(
        self: &Arc<Self>,
        work: &Part,
        priority: Priority,
        sink: &Sink,
    ) -> (Vec<Lead>, Vec<(u32, Waiter)>) {
        let (mut leads, mut joins) = (Vec::new(), Vec::new());
        let records: Vec<u32> = match (work.keep_gaps, work.wanted.first(), work.wanted.last()) {
            // What is not the pack's own does not come along.
            (true, Some(&first), Some(&last)) => {
                (first..=last).filter(|&record| self.index.record_at(record).pack == 0).collect()
            }
            _ => work.wanted.clone(),
        };
        for record in records {
            let wanted = work.wanted.binary_search(&record).is_ok();
            if !wanted && (self.is_record_fetched(record) || self.is_cached(record)) {
                continue;
            }
            let at_hand = match self.decoded.get(record) {
                Some(plain) => Some(plain),
                None if self.is_cached(record) => self.from_cache(record).await,
                None => None,
            };
            if let Some(plain) = at_hand {
                deliver(sink, record, plain).await;
                continue;
            }
            match self.flights.enter(record, priority, false) {
                Entry::Lead(lead) => leads.push(lead),
                Entry::Join(waiter) if wanted => joins.push((record, waiter)),
                Entry::Join(_) => {}
            }
        }
        (leads, joins)
    }

    /// Fetches the frames of `leads`, which lie in one pack in this order, in one request and lands each as it arrives. The error of a demand run
    /// lands with its waiters; a failing prefetch lets go of its frames, so that waiters try for themselves.
    async fn fetch_run(
        self: &Arc<Self>,
        leads: Vec<Lead>,
        priority: Priority,
        sink: Option<&Sink>,
    ) -> Result<(), ReadError> {
        let (Some(first), Some(last)) = (leads.first(), leads.last()) else { return Ok(()) };
        let mut failure = self.source(first.record()).err();
        let (first, last) = (self.index.record_at(first.record()), self.index.record_at(last.record()));
        let (start, end) = (first.offset, last.offset + u64::from(last.length));
        let mut frames = None;
        for lead in leads {
            let record = lead.record();
            let outcome = match &failure {
                // The connection is gone for all that follows.
                Some(ReadError::Source { source, .. }) => Err(self.source_error(record, source.clone())),
                Some(ReadError::NoBase { .. }) => Err(self.no_base(record)),
                _ => match self.next_frame(record, start..end, priority, &mut frames).await {
                    Ok(frame) => self.settle(record, frame).await,
                    Err(error) => Err(error),
                },
            };
            match (&outcome, priority.is_ahead()) {
                (Err(error), true) => return Err(error.clone()),
                (Err(error), false) => drop(failure.get_or_insert_with(|| error.clone())),
                (Ok(plain), false) => self.decoded.put(record, plain),
                (Ok(_), true) => {}
            }
            lead.land(outcome.clone());
            if let (Some(sink), Ok(plain)) = (sink, outcome) {
                deliver(sink, record, plain).await;
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn cut(&self) -> Cut {
        Cut { max_gap: self.max_gap, head_len: self.head.len() }
    }

    /// The next frame of those in `range`: from the head, or else from `request`, which is made when it is first
    /// needed.
    async fn next_frame(
        &self,
        number: u32,
        range: Range<u64>,
        priority: Priority,
        request: &mut Option<Frames>,
    ) -> Result<Bytes, ReadError> {
        let record = self.index.record_at(number);
        if record.pack == 0
            && range.end <= self.head.len()
            && let Some(frame) = self.head.bytes(record.offset, record.length).await
        {
            return Ok(frame);
        }
        let frames = match request {
            Some(frames) => frames,
            None => {
                let at = record.offset;
                request.insert(Frames::new(self.source(number)?.stream_at(at, range.end - at, priority), at))
            }
        };
        frames.take(record).await.map_err(|source| self.source_error(number, Arc::new(source)))
    }

    /// Checks a frame as it came from the source, decodes it and keeps it in the cache. A frame that is not the one the
    /// index vouches for is fetched again, by itself: damage on the way is rarer at the source.
    async fn settle(self: &Arc<Self>, number: u32, frame: Bytes) -> Outcome {
        let record = *self.index.record_at(number);
        let mut frame = frame;
        let mut attempts = 0;
        loop {
            let found = match self.open_frame(number, frame).await? {
                Ok(plain) => return Ok(plain),
                Err(found) => found,
            };
            attempts += 1;
            if attempts == FRAME_ATTEMPTS {
                let (file, chunk) = (self.file_name(number), record.chunk);
                let (expected, location) = (record.digest, self.location_of(number));
                return Err(ReadError::Corrupt { file, chunk, expected, found, location });
            }
            let source = self.source(number)?;
            tracing::warn!(location = source.describe(), offset = record.offset, %found, expected = %record.digest, "damaged frame, fetching it again");
            let again = source.read_at(record.offset, u64::from(record.length), Priority::Demand).await;
            frame = again.map_err(|source| self.source_error(number, Arc::new(source)))?;
        }
    }

    /// The plain bytes of a frame, or its digest when that is the wrong one. Away from the async threads: 0.5 ms.
    async fn open_frame(
        self: &Arc<Self>,
        number: u32,
        frame: Bytes,
    ) -> Result<Result<Bytes, Digest>, ReadError> {
        let this = self.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let record = this.index.record_at(number);
            let found = Digest::of(&frame);
            if found != record.digest {
                return Ok(Err(found));
            }
            let plain = this.decode(number, &frame)?;
            if let Some(cache) = this.cache_of(number) {
                cache.put(found, frame);
            }
            this.mark_fetched(number);
            Ok(Ok(plain))
        });
        opened.await.map_err(|_| ReadError::Stopped)?
    }

    /// Lands chunks from the disk cache. Returns those that are not there after all.
    async fn land_cached(self: &Arc<Self>, leads: Vec<Lead>) -> Vec<Lead> {
        let this = self.clone();
        let read = move || {
            let mut missing = Vec::new();
            for lead in leads {
                match this.read_cached(lead.record()) {
                    Some(plain) => {
                        this.decoded.put(lead.record(), &plain);
                        lead.land(Ok(plain));
                    }
                    None => missing.push(lead),
                }
            }
            missing
        };
        // Leads lost in a panic send their waiters off to try themselves.
        tokio::task::spawn_blocking(read).await.unwrap_or_default()
    }

    async fn from_cache(self: &Arc<Self>, number: u32) -> Option<Bytes> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.read_cached(number)).await.ok()?
    }

    /// A chunk from the disk cache; `None` when it is not there after all.
    fn read_cached(&self, number: u32) -> Option<Bytes> {
        let record = self.index.record_at(number);
        let frame = self.cache_of(number)?.get(record.digest, u64::from(record.length))?;
        let plain = self.decode(number, &frame).ok()?;
        self.mark_fetched(number);
        Some(plain)
    }

    fn is_cached(&self, number: u32) -> bool {
        self.cache_of(number).is_some_and(|cache| cache.contains(self.index.record_at(number).digest))
    }

    /// The disk cache, if the frame of a record belongs into it.
    fn cache_of(&self, number: u32) -> Option<&ChunkCache> {
        self.cache.as_deref().filter(|_| self.holder(number).is_cached)
    }

    fn decode(&self, number: u32, frame: &[u8]) -> Result<Bytes, ReadError> {
        let plain_len = self.index.plain_len(self.index.chunk_at(number));
        let began = self.observer.as_ref().map(|_| Instant::now());
        let plain = decode(frame, plain_len);
        if let (Some(observer), Some(began)) = (&self.observer, began) {
            let bytes = plain.as_ref().map_or(0, Bytes::len) as u64;
            observer.decoded(&Decoding { began, ended: Instant::now(), bytes });
        }
        plain.ok_or_else(|| {
            let (file, chunk) = (self.file_name(number), self.index.record_at(number).chunk);
            ReadError::Decode { file, chunk, location: self.location_of(number), plain_len }
        })
    }

    fn source_error(&self, number: u32, source: Arc<SourceError>) -> ReadError {
        ReadError::Source { file: self.file_name(number), chunk: self.index.record_at(number).chunk, source }
    }

    fn file_name(&self, number: u32) -> String {
        let file = self.index.chunk_at(number).file;
        self.index.entry(file).map_or_else(String::new, |entry| entry.name.clone())
    }

    fn mark_fetched(&self, record: u32) {
        let bit = 1 << (record % 64);
        if self.fetched[record as usize / 64].fetch_or(bit, Relaxed) & bit == 0 {
            self.fetched_count.fetch_add(1, Relaxed);
        }
    }

    /// Whether a chunk was verified since the pack was opened.
    pub(super) fn is_record_fetched(&self, record: u32) -> bool {
        self.fetched[record as usize / 64].load(Relaxed) & (1 << (record % 64)) != 0
    }
}

/// The receiver only goes away when the bulk read was given up, which also ends this task.
async fn deliver(sink: &Sink, record: u32, plain: Bytes) {
    let _ = sink.send((record, plain)).await;
}
