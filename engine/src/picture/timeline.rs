//! What happened when during one fork, for `forkd fork --timeline`: a [`EventRecorder`] hears of requests, decodings and
//! faults, and `draw` makes a picture of it.
//!
//! Without `--timeline` there is no recorder, and nothing is measured for one.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use forkd_fs::observe::{Decoding, Observer, Transfer};
use forkd_fs::source::Priority;

mod draw;

pub use draw::{ChildMarks, Phase, TimelineScene};

/// RecordedEvents that are kept: more cannot be told apart in a picture, and a fork that runs for days must not fill its memory.
pub const EVENTS_MAX: usize = 10_000;

/// When something began and ended, milliseconds from the start of the process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// Beginning.
    pub from: f64,
    /// End.
    pub until: f64,
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct RequestSpan {
    /// From when it was sent until its last byte was here.
    pub span: Span,
    /// Bytes that came.
    pub bytes: u64,
    /// Why it was sent.
    pub priority: Priority,
}

/// A chunk that machines waited for.
#[derive(Debug, Clone, Copy)]
pub struct FaultSpan {
    /// From the first machine's fault until the chunk was in place.
    pub span: Span,
    /// File of the pack.
    pub file: &'static str,
    /// Number of the chunk.
    pub chunk: u64,
    /// How many machines waited.
    pub waiters: usize,
}

/// Everything recorded until a moment.
#[derive(Debug, Clone, Default)]
pub struct RecordedEvents {
    /// Requests, in the order in which they ended.
    pub requests: Vec<RequestSpan>,
    /// Frames decoded.
    pub decodings: Vec<Span>,
    /// Chunks that machines waited for.
    pub faults: Vec<FaultSpan>,
    /// RecordedEvents that came when [`EVENTS_MAX`] were there.
    pub left_out: u64,
}

impl RecordedEvents {
    fn len(&self) -> usize {
        self.requests.len() + self.decodings.len() + self.faults.len()
    }

    fn add(&mut self, add: impl FnOnce(&mut RecordedEvents)) {
        if self.len() < EVENTS_MAX { add(self) } else { self.left_out += 1 }
    }
}

/// Keeps the first [`EVENTS_MAX`] events of a fork.
#[derive(Debug)]
pub struct EventRecorder {
    created: Instant,
    created_ms: f64,
    events: Mutex<RecordedEvents>,
}

impl EventRecorder {
    /// One that begins now, `now_ms` after the process started.
    pub fn new(now_ms: f64) -> EventRecorder {
        EventRecorder { created: Instant::now(), created_ms: now_ms, events: Mutex::default() }
    }

    /// Notes a chunk that `waiters` machines have waited for since `since`.
    pub fn served(&self, file: &'static str, chunk: u64, since: Instant, waiters: usize) {
        let fault = FaultSpan { span: self.span(since, Instant::now()), file, chunk, waiters };
        self.lock().add(|events| events.faults.push(fault));
    }

    /// What is recorded so far.
    pub fn events(&self) -> RecordedEvents {
        self.lock().clone()
    }

    fn span(&self, from: Instant, until: Instant) -> Span {
        let ms = |at: Instant| {
            let after = at.saturating_duration_since(self.created).as_secs_f64();
            self.created_ms + (after - self.created.saturating_duration_since(at).as_secs_f64()) * 1e3
        };
        Span { from: ms(from), until: ms(until) }
    }

    fn lock(&self) -> MutexGuard<'_, RecordedEvents> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for EventRecorder {
    fn transferred(&self, transfer: &Transfer) {
        let Transfer { began, ended, bytes, priority } = *transfer;
        let request = RequestSpan { span: self.span(began, ended), bytes, priority };
        self.lock().add(|events| events.requests.push(request));
    }

    fn decoded(&self, decoding: &Decoding) {
        let span = self.span(decoding.began, decoding.ended);
        self.lock().add(|events| events.decodings.push(span));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_count_from_the_process_start() {
        let recorder = EventRecorder::new(100.0);
        let (before, after) =
            (recorder.created - Duration::from_millis(40), recorder.created + Duration::from_millis(60));
        assert_eq!(recorder.span(before, after), Span { from: 60.0, until: 160.0 });
    }

    #[test]
    fn what_goes_beyond_the_limit_is_counted_only() {
        let recorder = EventRecorder::new(0.0);
        let now = Instant::now();
        for chunk in 0..EVENTS_MAX as u64 - 1 {
            recorder.served("memory.bin", chunk, now, 1);
        }
        recorder.transferred(&Transfer { began: now, ended: now, bytes: 5, priority: Priority::Demand });
        for _ in 0..3 {
            recorder.decoded(&Decoding { began: now, ended: now, bytes: 5 });
        }
        let events = recorder.events();
        assert_eq!((events.len(), events.left_out), (EVENTS_MAX, 3));
        assert_eq!((events.requests.len(), events.decodings.len()), (1, 0));
    }
}
