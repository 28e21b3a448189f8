//! Packs on HTTP servers: single byte ranges, one object pinned by its strong ETag, retries up to a deadline. Nothing
//! outside this folder knows reqwest.
//!
//! What is retried: what got lost, and what came but is no answer to what was asked. What is final at once: a
//! refusal, and an answer that shows that the object is another one.
//!
//! How long one read can take. A demand read ends at the latest when, for its deadline, fewer than 64 KiB have
//! arrived; the attempt that is under way then may add one idle timeout. Waiting for a free request counts; a pause
//! the server asks for (Retry-After) counts and is not begun when it would not fit. A read of `n` bytes therefore
//! takes at most `(n / 64 KiB + 1) x deadline + idle timeout`, and never waits for a silent host longer than one
//! deadline and one idle timeout. For prefetch, time spent waiting for a free request does not count.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::Response;
use tokio::time::timeout_at;

use super::counters::{Outage, TransferCounters};
use super::priority::{Priority, ReadDeadlines};
use crate::observe::{Observer, Watched};

mod address;
mod budget;
mod client;
mod credential;
mod download;
mod error;
mod keyring;
mod names;
mod object;
mod redirect;
mod retry;
mod transport;

pub use address::redact_url;
use budget::{Permit, Timing};
pub use client::HttpClient;
use download::WholeDownload;
pub use error::HttpError;
pub use keyring::{Credentials, TOKEN_VARIABLE};
use object::{Answer, Object};
use retry::{PROGRESS, Retries};
pub use transport::HttpOptions;

/// One object on an HTTP server.
#[derive(Debug, Clone)]
pub struct HttpSource(Arc<SourceShared>, Option<Arc<dyn Observer>>);

#[derive(Debug)]
struct SourceShared {
    object: Arc<Object>,
    /// Set once the host has answered a range with the whole object.
    download: Mutex<Option<Arc<WholeDownload>>>,
}

impl HttpSource {
    /// An object to read ranges of. `size` is what a registry says about it; an object of another size is refused.
    pub fn new(
        client: &HttpClient,
        url: &str,
        size: Option<u64>,
        deadlines: ReadDeadlines,
    ) -> Result<Self, HttpError> {
        let route = client.route(url)?;
        let object = Arc::new(Object::new(client.clone(), route, size, deadlines));
        Ok(Self(Arc::new(SourceShared { object, download: Mutex::default() }), None))
    }

    /// The same, with somebody who hears of its requests.
    pub fn observed_by(self, observer: Option<Arc<dyn Observer>>) -> Self {
        Self(self.0, observer)
    }

    /// Its URL as messages show it: without user, password and query.
    pub fn url(&self) -> &str {
        self.0.object.route.start()
    }

    /// Its size in bytes; asks the server for one byte when nothing told the size yet.
    pub async fn size(&self) -> Result<u64, HttpError> {
        let started = Instant::now();
        if self.known_size().is_none() {
            let mut body = self.stream_at(0, 1, Priority::Demand);
            while body.next().await?.is_some() {}
        }
        // A host that serves no ranges may not announce the size either.
        if let (None, Some(download)) = (self.known_size(), self.0.download()) {
            download.complete(started, self.0.object.deadline(Priority::Demand)).await?;
        }
        Ok(self.known_size().expect("every accepted answer sets the size, at its end at the latest"))
    }

    pub(super) fn known_size(&self) -> Option<u64> {
        self.0.object.size()
    }

    pub(super) fn counters(&self) -> TransferCounters {
        self.0.object.counters()
    }

    pub(super) fn outage(&self) -> Option<Outage> {
        self.0.object.outage()
    }

    pub(super) fn set_demand_deadline(&self, deadline: Duration) {
        self.0.object.set_demand_deadline(deadline);
    }

    pub(super) fn stream_at(&self, offset: u64, len: u64, priority: Priority) -> HttpBody {
        let deadline = self.0.object.deadline(priority);
        let download = self.0.download();
        if let Some(download) = &download {
            download.enter();
        }
        HttpBody {
            source: self.0.clone(),
            observer: self.1.clone(),
            priority,
            idle: self.0.object.idle(priority),
            start: offset,
            next: offset,
            end: offset + len,
            running: None,
            download,
            deadline,
            retries: Retries::new(deadline),
            failing: false,
            progress: (Instant::now(), offset),
        }
    }
}

impl SourceShared {
    fn download(&self) -> Option<Arc<WholeDownload>> {
        self.download.lock().expect("no panics while held").clone()
    }

    /// Lets go of a download that turned out to be of something else: the next reader starts afresh.
    fn forget_download(&self, failed: &Arc<WholeDownload>, error: &HttpError) {
        if error.is_of_another_object() {
            self.object.unlearn_after(error);
            let mut download = self.download.lock().expect("no panics while held");
            download.take_if(|download| Arc::ptr_eq(download, failed));
        }
    }

    /// The download all readers share; the first to learn that there are no ranges starts it with the answer it got.
    fn download_from(&self, whole: Response) -> Result<Arc<WholeDownload>, HttpError> {
        let mut download = self.download.lock().expect("no panics while held");
        if let Some(download) = &*download {
            return Ok(download.clone());
        }
        let started = Arc::new(WholeDownload::start(self.object.clone(), whole)?);
        *download = Some(started.clone());
        Ok(started)
    }
}

/// A range of an [`HttpSource`] on its way.
#[derive(Debug)]
pub struct HttpBody {
    source: Arc<SourceShared>,
    observer: Option<Arc<dyn Observer>>,
    priority: Priority,
    /// How long the next attempt waits for a silent host; grows with each that did in vain.
    idle: Duration,
    start: u64,
    next: u64,
    end: u64,
    running: Option<RunningAnswer>,
    download: Option<Arc<WholeDownload>>,
    deadline: Duration,
    retries: Retries,
    failing: bool,
    /// When, and up to where, the last [`PROGRESS`] bytes had arrived.
    progress: (Instant, u64),
}

/// An answer being received: bytes up to `end`, which may be less than the whole range.
#[derive(Debug)]
struct RunningAnswer {
    response: Response,
    end: u64,
    timing: Timing,
    watched: Option<Watched>,
    _permit: Permit,
}

impl HttpBody {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            if self.next == self.end && self.running.is_none() {
                return Ok(None);
            }
            if let Some(download) = self.download.clone() {
                let piece = download.read(self.next, self.end, self.progress.0, self.deadline).await;
                let piece = piece.inspect_err(|error| self.source.forget_download(&download, error))?;
                self.next += piece.len() as u64;
                self.progress = (Instant::now(), self.next);
                return Ok(Some(piece));
            }
            match self.attempt().await {
                Ok(Some(piece)) => {
                    self.arrived(piece.len() as u64)?;
                    return Ok(Some(piece));
                }
                Ok(None) => self.running = None,
                Err(error) => {
                    self.running = None;
                    let source = self.source.clone();
                    source.object.note_failure(&mut self.failing, &error);
                    if matches!(error, HttpError::Stalled { .. }) {
                        self.idle = (self.idle * 2).min(source.object.longest_idle(self.priority));
                    }
                    let pause = self.retries.pause(source.object.route.start(), self.progress.0, error);
                    pause.await.inspect_err(|error| source.object.unlearn_after(error))?;
                }
            }
        }
    }

    /// The next piece of the running answer, asking for more of the range first when none is running. `None`: that
    /// answer is over, or is another's to read.
    async fn attempt(&mut self) -> Result<Option<Bytes>, HttpError> {
        if self.running.is_none() {
            let permit = self.permit().await?;
            let (timing, end) = (Timing::start(), self.turn());
            let watched = Watched::start(self.observer.as_ref(), self.priority);
            match self.request(end).await? {
                Answer::Range(response) => {
                    self.running = Some(RunningAnswer { response, end, timing, watched, _permit: permit })
                }
                Answer::Whole(response) => {
                    self.download = Some(self.source.download_from(response)?);
                    return Ok(None);
                }
            }
        }
        let (object, running) = (&self.source.object, self.running.as_mut().expect("just set"));
        let piece = object.piece(self.idle, &mut running.response).await?;
        let (got, remaining) = (piece.as_ref().map_or(0, Bytes::len) as u64, running.end - self.next);
        // The end before the last byte, or anything after it.
        if (piece.is_none() && remaining > 0) || got > remaining {
            let (url, wanted) = (object.route.label(), self.end - self.start);
            return Err(HttpError::BodyLength { url, wanted, got: got.abs_diff(remaining) });
        }
        match &piece {
            Some(_) => {
                running.timing.arrived(got);
                running.watched.iter_mut().for_each(|watched| watched.arrived(got));
            }
            None => object.client.budgets().learn(&running.timing),
        }
        Ok(piece)
    }

    /// Up to where to ask now: prefetch takes turns with demand.
    fn turn(&self) -> u64 {
        match self.priority {
            Priority::Demand | Priority::WorkingSet => self.end,
            Priority::Prefetch => {
                let turn = self.source.object.client.budgets().turn();
                self.end.min(self.next.saturating_add(turn))
            }
        }
    }

    /// Waits for the right to ask. Nobody waits for a prefetch, so that may take its time; a demand read may not.
    async fn permit(&mut self) -> Result<Permit, HttpError> {
        let object = &self.source.object;
        let permit = object.client.budgets().permit(self.priority);
        if self.priority.is_ahead() {
            let queued = Instant::now();
            let permit = permit.await;
            self.progress.0 += queued.elapsed();
            return Ok(permit);
        }
        let since = self.progress.0;
        let late = |_| HttpError::Queued { url: object.route.label(), waited: since.elapsed() };
        timeout_at((since + self.deadline).into(), permit).await.map_err(late)
    }

    /// One attempt, redirects and all, gets what is left of the deadline, but at least one idle timeout.
    async fn request(&self, end: u64) -> Result<Answer, HttpError> {
        let (object, began) = (&self.source.object, Instant::now());
        let until = (self.progress.0 + self.deadline).max(began + self.idle);
        let late = |_| HttpError::Stalled { url: object.route.label(), waited: began.elapsed() };
        let asked = object.ask(self.next, end - 1, self.idle, self.retries.after_wrong_answer());
        timeout_at(until.into(), asked).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
    }

    fn arrived(&mut self, len: u64) -> Result<(), HttpError> {
        self.next += len;
        self.source.object.note_recovery(&mut self.failing);
        let (since, from) = self.progress;
        if self.next - from >= PROGRESS || self.next == self.end {
            self.progress = (Instant::now(), self.next);
            self.retries.reset();
            return Ok(());
        }
        match since.elapsed() {
            waited if waited > self.deadline => {
                let url = self.source.object.route.label();
                Err(HttpError::TooSlow { url, got: self.next - from, waited })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for HttpBody {
    fn drop(&mut self) {
        self.source.object.note_recovery(&mut self.failing);
    }
}
