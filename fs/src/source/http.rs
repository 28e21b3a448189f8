//! Packs on HTTP servers: single byte ranges, one object pinned by its strong ETag, retries up to a deadline. The only
//! file that knows reqwest. Nothing an answer says is believed beyond what was asked for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header;
use reqwest::{Response, StatusCode};
use tokio::sync::OwnedSemaphorePermit;

use super::{Class, Counters, Deadlines, Trouble};

mod client;
mod error;

pub use client::{HttpClient, HttpOptions};
use client::{Retries, bad_status, check_encoding, next_piece};
pub use error::HttpError;

/// Bytes that must arrive within one deadline: a server that drips is treated like one that is silent.
const PROGRESS: u64 = 64 << 10;

/// One object on an HTTP server.
#[derive(Debug, Clone)]
pub struct HttpSource(Arc<SourceShared>);

#[derive(Debug)]
struct SourceShared {
    client: HttpClient,
    url: String,
    deadlines: Deadlines,
    /// The strong ETag of the first answer (`None`: it had none); later ones must agree.
    etag: OnceLock<Option<String>>,
    size: OnceLock<u64>,
    requests: AtomicU64,
    bytes: AtomicU64,
    failing: Mutex<Failing>,
}

/// Reads that are being retried.
#[derive(Debug, Default)]
struct Failing {
    reads: u32,
    trouble: Option<Trouble>,
}

impl HttpSource {
    fn new(client: HttpClient, url: &str, size: Option<u64>, deadlines: Deadlines) -> Self {
        Self(Arc::new(SourceShared {
            client,
            url: url.to_owned(),
            deadlines,
            etag: OnceLock::new(),
            size: size.map_or_else(OnceLock::new, OnceLock::from),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            failing: Mutex::default(),
        }))
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// Its size in bytes; asks the server for one byte when nothing told the size yet.
    pub async fn size(&self) -> Result<u64, HttpError> {
        if self.0.size.get().is_none() {
            let mut body = self.stream_at(0, 1, Class::Demand);
            while body.next().await?.is_some() {}
        }
        Ok(*self.0.size.get().expect("every accepted answer sets the size"))
    }

    pub(super) fn known_size(&self) -> Option<u64> {
        self.0.size.get().copied()
    }

    pub(super) fn counters(&self) -> Counters {
        Counters { requests: self.0.requests.load(Relaxed), bytes: self.0.bytes.load(Relaxed) }
    }

    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.0.failing.lock().expect("no panics while held").trouble.clone()
    }

    pub(super) fn stream_at(&self, offset: u64, len: u64, class: Class) -> HttpBody {
        let deadline = match class {
            Class::Demand => self.0.deadlines.demand,
            Class::Prefetch => self.0.deadlines.prefetch,
        };
        HttpBody {
            source: self.0.clone(),
            class,
            idle: self.0.client.idle_timeout().min(deadline),
            start: offset,
            next: offset,
            end: offset + len,
            answer: None,
            deadline,
            retries: Retries::new(deadline),
            failing: false,
            progress: (Instant::now(), offset),
        }
    }
}

/// A range of an [`HttpSource`] on its way.
#[derive(Debug)]
pub struct HttpBody {
    source: Arc<SourceShared>,
    class: Class,
    idle: Duration,
    start: u64,
    next: u64,
    end: u64,
    answer: Option<(Response, OwnedSemaphorePermit)>,
    deadline: Duration,
    retries: Retries,
    failing: bool,
    /// When, and up to where, the last [`PROGRESS`] bytes had arrived.
    progress: (Instant, u64),
}

impl HttpBody {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            if self.next == self.end && self.answer.is_none() {
                return Ok(None);
            }
            match self.attempt().await {
                Ok(Some(piece)) => {
                    self.arrived(piece.len() as u64)?;
                    return Ok(Some(piece));
                }
                Ok(None) => self.answer = None,
                Err(error) => {
                    self.answer = None;
                    self.note_failure(&error);
                    let source = self.source.clone();
                    self.retries.pause(&source.url, self.progress.0, error).await?;
                }
            }
        }
    }

    /// The next piece of the running answer, asking for the rest of the range first when none is running.
    async fn attempt(&mut self) -> Result<Option<Bytes>, HttpError> {
        let remaining = self.end - self.next;
        if self.answer.is_none() {
            self.answer = Some(self.request().await?);
        }
        let (response, _) = self.answer.as_mut().expect("just set");
        let url = &self.source.url;
        let piece = next_piece(url, self.idle, response).await?;
        let got = piece.as_ref().map_or(0, Bytes::len) as u64;
        self.source.bytes.fetch_add(got, Relaxed);
        // The end before the last byte, or anything after it.
        if (piece.is_none() && remaining > 0) || got > remaining {
            let got = got.abs_diff(remaining);
            return Err(HttpError::BodyLength { url: url.clone(), wanted: self.end - self.start, got });
        }
        Ok(piece)
    }

    async fn request(&self) -> Result<(Response, OwnedSemaphorePermit), HttpError> {
        let permit = self.source.client.permit(self.class).await;
        let range = format!("bytes={}-{}", self.next, self.end - 1);
        self.source.requests.fetch_add(1, Relaxed);
        let dress = |request: reqwest::RequestBuilder| {
            let request = request.header(header::RANGE, &range);
            match self.source.etag.get() {
                Some(Some(etag)) => request.header(header::IF_MATCH, etag),
                _ => request,
            }
        };
        let response = self.source.client.send(&self.source.url, self.idle, dress).await?;
        self.check(&response)?;
        Ok((response, permit))
    }

    /// Refuses every answer but the exact range of the object that was opened.
    fn check(&self, response: &Response) -> Result<(), HttpError> {
        let url = || self.source.url.clone();
        let (first, last) = (self.next, self.end - 1);
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::OK => return Err(HttpError::NoRanges { url: url() }),
            StatusCode::PRECONDITION_FAILED => {
                return Err(HttpError::Replaced { url: url(), detail: "its ETag no longer matches".into() });
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Err(HttpError::OutOfRange { url: url(), wanted: format!("{first}-{last}") });
            }
            _ => return Err(bad_status(&self.source.url, response)),
        }
        let headers = response.headers();
        check_encoding(&self.source.url, headers)?;
        let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
        let etag = text(header::ETAG).filter(|etag| etag.starts_with('"')).map(str::to_owned);
        let pinned = self.source.etag.get_or_init(|| etag.clone());
        if let (Some(pinned), Some(etag)) = (pinned, &etag)
            && pinned != etag
        {
            let detail = format!("its ETag was {pinned}, now {etag}");
            return Err(HttpError::Replaced { url: url(), detail });
        }
        let got = text(header::CONTENT_RANGE).unwrap_or_default();
        let Some((got_first, got_last, total)) = parse_content_range(got) else {
            return Err(HttpError::WrongRange {
                url: url(),
                wanted: format!("{first}-{last}"),
                got: got.into(),
            });
        };
        let size = *self.source.size.get_or_init(|| total);
        if total != size {
            return Err(HttpError::Replaced {
                url: url(),
                detail: format!("{size} bytes were expected, it has {total}"),
            });
        }
        // A server clips a range that runs past the end; so does the check, and the length of the body tells.
        if (got_first, got_last) != (first, last) {
            return Err(HttpError::WrongRange {
                url: url(),
                wanted: format!("{first}-{last}"),
                got: got.into(),
            });
        }
        match response.content_length() {
            Some(len) if len != self.end - self.next => Err(HttpError::BodyLength {
                url: url(),
                wanted: self.end - self.next,
                got: len.abs_diff(self.end - self.next),
            }),
            _ => Ok(()),
        }
    }

    fn arrived(&mut self, len: u64) -> Result<(), HttpError> {
        self.next += len;
        self.note_recovery();
        let (since, from) = self.progress;
        if self.next - from >= PROGRESS || self.next == self.end {
            self.progress = (Instant::now(), self.next);
            self.retries.reset();
            return Ok(());
        }
        match since.elapsed() {
            waited if waited > self.deadline => {
                Err(HttpError::TooSlow { url: self.source.url.clone(), got: self.next - from, waited })
            }
            _ => Ok(()),
        }
    }

    fn note_failure(&mut self, error: &HttpError) {
        let mut failing = self.source.failing.lock().expect("no panics while held");
        if !self.failing {
            self.failing = true;
            failing.reads += 1;
        }
        let since = failing.trouble.as_ref().map_or_else(Instant::now, |trouble| trouble.since);
        failing.trouble = Some(Trouble { since, last_error: error.to_string() });
    }

    fn note_recovery(&mut self) {
        if !std::mem::take(&mut self.failing) {
            return;
        }
        let mut failing = self.source.failing.lock().expect("no panics while held");
        failing.reads -= 1;
        if failing.reads == 0 {
            failing.trouble = None;
        }
    }
}

impl Drop for HttpBody {
    fn drop(&mut self) {
        self.note_recovery();
    }
}

/// `bytes FIRST-LAST/TOTAL` as three numbers.
fn parse_content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?, total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_exactly() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0, 9, 100)));
        for bad in ["", "bytes */100", "bytes 0-9/*", "bytes 0-9", "0-9/100", "bytes -9/100", "items 0-9/100"]
        {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }
}
