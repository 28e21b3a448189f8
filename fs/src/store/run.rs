//! Getting frames: from the disk cache or the source, several in one request, each checked against the index before it
//! is decoded. The only place where bytes become trusted.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::flight::{Entry, Lead, Outcome, Waiter};
use super::{ReadError, Store};
use crate::digest::Digest;
use crate::index::{ChunkRecord, Index};
use crate::observe::Decoding;
use crate::source::{Class, RangeBody, SourceError};

/// A request is cut after this many bytes: 40 ms at 50 MB/s, so that several requests in parallel hide their round
/// trips, chunks arrive roughly in the order they were asked for, and a broken connection loses little.
const MAX_RUN: u64 = 2 << 20;

/// How often a frame is fetched until it is refused. On a line that damages one answer in a hundred, a second attempt
/// still fails once in ten thousand frames.
const FRAME_ATTEMPTS: u32 = 3;

/// Cached frames one task reads and decodes: handing each to a thread of its own costs a tenth of decoding it.
const CACHED_TOGETHER: usize = 4;

/// Where bulk reads deliver: record number and plain bytes.
pub(super) type Sink = mpsc::Sender<(u32, Bytes)>;

/// A part of a bulk read that one task does.
#[derive(Debug)]
pub(super) struct Work {
    /// Record numbers, ascending.
    wanted: Vec<u32>,
    /// Whether to keep the frames between the wanted ones, which come along in the request.
    keep_gaps: bool,
}

/// How frames are put together in requests.
#[derive(Debug, Clone, Copy)]
struct Cut {
    /// Most bytes between two of one request.
    max_gap: u64,
    /// Frames that end here or before are on their way already, and go into no request with others.
    head_len: u64,
}

/// Cuts ascending record numbers into those that go into one request each.
fn coalesce<T>(index: &Index, cut: Cut, items: Vec<T>, record: impl Fn(&T) -> u32) -> Vec<Vec<T>> {
    let Cut { max_gap, head_len } = cut;
    let mut runs: Vec<Vec<T>> = Vec::new();
    let (mut start, mut end) = (0, 0);
    for item in items {
        let frame = index.record_at(record(&item));
        let frame_end = frame.offset + u64::from(frame.length);
        match runs.last_mut() {
            Some(run)
                if frame.offset - end <= max_gap
                    && frame_end - start <= MAX_RUN
                    && (end <= head_len) == (frame_end <= head_len) =>
            {
                run.push(item)
            }
            _ => {
                start = frame.offset;
                runs.push(vec![item]);
            }
        }
        end = frame_end;
    }
    runs
}

impl Store {
    /// Starts fetching frames someone waits for: each cached one by itself, the others coalesced.
    pub(super) fn launch(self: &Arc<Self>, mut leads: Vec<Lead>) {
        leads.sort_unstable_by_key(Lead::record);
        let (cached, missing): (Vec<_>, Vec<_>) =
            leads.into_iter().partition(|lead| self.is_cached(lead.record()));
        let mut cached = cached.into_iter().peekable();
        while cached.peek().is_some() {
            let leads: Vec<Lead> = cached.by_ref().take(CACHED_TOGETHER).collect();
            let store = self.clone();
            tokio::spawn(async move {
                for lead in store.land_cached(leads).await {
                    // Every waiter gets the error by the landing.
                    drop(store.fetch_run(vec![lead], Class::Demand, None).await);
                }
            });
        }
        for run in coalesce(&self.index, self.cut(), missing, Lead::record) {
            let store = self.clone();
            tokio::spawn(async move { drop(store.fetch_run(run, Class::Demand, None).await) });
        }
    }

    /// Cuts a batch of a bulk read into parts, those that need no request first.
    pub(super) fn split(&self, records: Vec<u32>) -> Vec<Work> {
        let (cached, missing): (Vec<_>, Vec<_>) =
            records.into_iter().partition(|&record| self.is_cached(record));
        let cached =
            cached.chunks(CACHED_TOGETHER).map(|part| Work { wanted: part.to_vec(), keep_gaps: false });
        let missing = coalesce(&self.index, self.cut(), missing, |&record| record);
        cached.chain(missing.into_iter().map(|wanted| Work { wanted, keep_gaps: true })).collect()
    }

    /// Does one part of a bulk read.
    pub(super) async fn work(self: Arc<Self>, work: Work, class: Class, sink: Sink) -> Result<(), ReadError> {
        let (leads, joins) = self.claim(&work, class, &sink).await;
        // What others fetch already may leave holes, so the runs are cut anew.
        for run in coalesce(&self.index, self.cut(), leads, Lead::record) {
            self.fetch_run(run, class, Some(&sink)).await?;
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

    /// Delivers what is at hand and takes the lead for what nobody fetches yet; what others fetch is returned to wait for.
    async fn claim(
        self: &Arc<Self>,
        work: &Work,
        class: Class,
        sink: &Sink,
    ) -> (Vec<Lead>, Vec<(u32, Waiter)>) {
        let (mut leads, mut joins) = (Vec::new(), Vec::new());
        let records: Vec<u32> = match (work.keep_gaps, work.wanted.first(), work.wanted.last()) {
            (true, Some(&first), Some(&last)) => (first..=last).collect(),
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
            match self.flights.enter(record, class, false) {
                Entry::Lead(lead) => leads.push(lead),
                Entry::Join(waiter) if wanted => joins.push((record, waiter)),
                Entry::Join(_) => {}
            }
        }
        (leads, joins)
    }

    /// Fetches the frames of `leads` (ascending) in one request and lands each as it arrives. The error of a demand run
    /// lands with its waiters; a failing prefetch lets go of its frames, so that waiters try for themselves.
    async fn fetch_run(
        self: &Arc<Self>,
        leads: Vec<Lead>,
        class: Class,
        sink: Option<&Sink>,
    ) -> Result<(), ReadError> {
        let (Some(first), Some(last)) = (leads.first(), leads.last()) else { return Ok(()) };
        let (first, last) = (self.index.record_at(first.record()), self.index.record_at(last.record()));
        let (start, end) = (first.offset, last.offset + u64::from(last.length));
        let mut frames = None;
        let mut failure = None;
        for lead in leads {
            let record = lead.record();
            let outcome = match &failure {
                // The connection is gone for all that follows.
                Some(ReadError::Source { source, .. }) => Err(self.source_error(record, source.clone())),
                _ => match self.next_frame(record, start..end, class, &mut frames).await {
                    Ok(frame) => self.settle(record, frame).await,
                    Err(source) => Err(self.source_error(record, Arc::new(source))),
                },
            };
            match (&outcome, class.is_ahead()) {
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

    /// The next frame of those in `range`: from the head, or else from `request`, which is made when it is first needed.
    async fn next_frame(
        &self,
        number: u32,
        range: Range<u64>,
        class: Class,
        request: &mut Option<Frames>,
    ) -> Result<Bytes, SourceError> {
        let record = self.index.record_at(number);
        if range.end <= self.head.len()
            && let Some(frame) = self.head.bytes(record.offset, record.length).await
        {
            return Ok(frame);
        }
        let frames = request.get_or_insert_with(|| {
            let at = record.offset;
            Frames { body: self.source.stream_at(at, range.end - at, class), at, buffer: BytesMut::new() }
        });
        frames.take(record).await
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
                let (expected, location) = (record.digest, self.location().to_owned());
                return Err(ReadError::Corrupt { file, chunk, expected, found, location });
            }
            tracing::warn!(location = self.location(), offset = record.offset, %found, expected = %record.digest, "damaged frame, fetching it again");
            let again = self.source.read_at(record.offset, u64::from(record.length), Class::Demand).await;
            frame = again.map_err(|source| self.source_error(number, Arc::new(source)))?;
        }
    }

    /// The plain bytes of a frame, or its digest when that is the wrong one. Away from the async threads: 0.5 ms.
    async fn open_frame(
        self: &Arc<Self>,
        number: u32,
        frame: Bytes,
    ) -> Result<Result<Bytes, Digest>, ReadError> {
        let store = self.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let record = store.index.record_at(number);
            let found = Digest::of(&frame);
            if found != record.digest {
                return Ok(Err(found));
            }
            let plain = store.decode(number, &frame)?;
            if let Some(cache) = &store.cache {
                cache.put(found, frame);
            }
            store.mark_fetched(number);
            Ok(Ok(plain))
        });
        opened.await.map_err(|_| ReadError::Stopped)?
    }

    /// Lands chunks from the disk cache. Returns those that are not there after all.
    async fn land_cached(self: &Arc<Self>, leads: Vec<Lead>) -> Vec<Lead> {
        let store = self.clone();
        let read = move || {
            let mut missing = Vec::new();
            for lead in leads {
                match store.read_cached(lead.record()) {
                    Some(plain) => {
                        store.decoded.put(lead.record(), &plain);
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
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.read_cached(number)).await.ok()?
    }

    /// A chunk from the disk cache; `None` when it is not there after all.
    fn read_cached(&self, number: u32) -> Option<Bytes> {
        let record = self.index.record_at(number);
        let frame = self.cache.as_ref()?.get(record.digest, u64::from(record.length))?;
        let plain = self.decode(number, &frame).ok()?;
        self.mark_fetched(number);
        Some(plain)
    }

    fn is_cached(&self, number: u32) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.contains(self.index.record_at(number).digest))
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
            ReadError::Decode { file, chunk, location: self.location().to_owned(), plain_len }
        })
    }

    fn source_error(&self, number: u32, source: Arc<SourceError>) -> ReadError {
        ReadError::Source { file: self.file_name(number), chunk: self.index.record_at(number).chunk, source }
    }

    fn file_name(&self, number: u32) -> String {
        let file = self.index.chunk_at(number).file;
        self.index.entry(file).map_or_else(String::new, |entry| entry.name.clone())
    }
}

/// The receiver only goes away when the bulk read was given up, which also ends this task.
async fn deliver(sink: &Sink, record: u32, plain: Bytes) {
    let _ = sink.send((record, plain)).await;
}

/// Decodes a checked frame; `None` unless it gives exactly `plain_len` bytes. Never writes more than that.
fn decode(frame: &[u8], plain_len: u32) -> Option<Bytes> {
    thread_local! {
        static DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    DECODER.with_borrow_mut(|decoder| {
        let decoder = match decoder {
            Some(decoder) => decoder,
            None => decoder.insert(zstd::bulk::Decompressor::new().ok()?),
        };
        let mut plain = Vec::with_capacity(plain_len as usize);
        let len = decoder.decompress_to_buffer(frame, &mut plain).ok()?;
        (len == plain_len as usize).then(|| plain.into())
    })
}

/// Cuts a range that is arriving into frames.
struct Frames {
    body: RangeBody,
    /// Offset in the pack of the buffer's first byte.
    at: u64,
    buffer: BytesMut,
}

impl Frames {
    /// The bytes of the frame at `record`, which lies behind those taken before.
    async fn take(&mut self, record: &ChunkRecord) -> Result<Bytes, SourceError> {
        while self.at < record.offset {
            if self.buffer.is_empty() {
                self.fill().await?;
            }
            let gap = (record.offset - self.at).min(self.buffer.len() as u64);
            drop(self.buffer.split_to(gap as usize));
            self.at += gap;
        }
        while self.buffer.len() < record.length as usize {
            self.fill().await?;
        }
        self.at += u64::from(record.length);
        Ok(self.buffer.split_to(record.length as usize).freeze())
    }

    async fn fill(&mut self) -> Result<(), SourceError> {
        let piece = self.body.next().await?.expect("a range delivers every byte or an error");
        self.buffer.extend_from_slice(&piece);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_is_exact_and_bounded() {
        let plain = vec![7; 100_000];
        let frame = zstd::bulk::compress(&plain, 3).unwrap();
        assert_eq!(decode(&frame, 100_000).unwrap(), plain);
        assert_eq!(decode(&frame, 99_999), None, "a frame that holds more than the index says");
        assert_eq!(decode(&frame, 100_001), None, "or less");
        assert_eq!(decode(&frame[..frame.len() - 1], 100_000), None);
        assert_eq!(decode(b"not a frame", 11), None);
    }

    #[test]
    fn neighbours_share_a_request_within_limits() {
        const MAX_GAP: u64 = 128 << 10;
        let record =
            |chunk: u32, offset| ChunkRecord { chunk, length: 1000, offset, digest: Digest::of(b"") };
        let offsets = [0, 1000, 2000 + MAX_GAP, 3001 + 2 * MAX_GAP, 4000 + MAX_RUN, 4000 + 2 * MAX_RUN];
        let records = offsets.iter().enumerate().map(|(chunk, &at)| record(chunk as u32, at)).collect();
        let index = Index::new(64 << 10, 1 << 30, vec![("m".into(), 1 << 20, records)]);
        let cut = |wanted: &[u32], head_len| {
            coalesce(&index, Cut { max_gap: MAX_GAP, head_len }, wanted.to_vec(), |&r| r)
        };
        let runs = |wanted: &[u32]| cut(wanted, 0);
        assert_eq!(runs(&[0, 1, 2, 3, 4, 5]), [vec![0, 1, 2], vec![3], vec![4], vec![5]]);
        assert_eq!(runs(&[0, 2]), [vec![0], vec![2]], "the gap counts between wanted frames");
        assert!(runs(&[]).is_empty());
        assert_eq!(cut(&[0, 1, 2], 1999), [vec![0], vec![1, 2]], "what is on its way is not asked for again");
        assert_eq!(cut(&[0, 1, 2], 2000), [vec![0, 1], vec![2]]);
    }
}
