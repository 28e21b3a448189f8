//! One object on a server and what was learnt of it: its way, size and ETag, against which every answer is checked.
//! Nothing an answer says is believed beyond what was asked for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Response, StatusCode};

use super::client::HttpClient;
use super::error::HttpError;
use super::redirect::Route;
use super::retry::bad_status;
use super::transport::{check_encoding, next_piece, own_connection};
use crate::source::counters::{Outage, TransferCounters};
use crate::source::priority::{Priority, ReadDeadlines};

/// One object on a server.
#[derive(Debug)]
pub(super) struct Object {
    pub(super) client: HttpClient,
    pub(super) route: Route,
    deadlines: Mutex<ReadDeadlines>,
    /// What a registry says of its size.
    declared_size: Option<u64>,
    known: Mutex<KnownObject>,
    bytes: AtomicU64,
    failing: Mutex<RetryingReads>,
}

/// What the first good answer said of the object; later ones must agree.
#[derive(Debug, Default)]
struct KnownObject {
    /// Its strong ETag (`Some(None)`: it had none).
    etag: Option<Option<String>>,
    size: Option<u64>,
    /// Whether the host has sent a range.
    ranges: bool,
}

/// Reads that are being retried.
#[derive(Debug, Default)]
struct RetryingReads {
    reads: u32,
    outage: Option<Outage>,
}

/// An answer that may be used.
#[derive(Debug)]
pub(super) enum Answer {
    /// The range asked for.
    Range(Response),
    /// The whole object: the host serves no ranges.
    Whole(Response),
}

impl Object {
    pub(super) fn new(client: HttpClient, route: Route, size: Option<u64>, deadlines: ReadDeadlines) -> Self {
        Self {
            client,
            route,
            deadlines: Mutex::new(deadlines),
            declared_size: size,
            known: Mutex::default(),
            bytes: AtomicU64::new(0),
            failing: Mutex::default(),
        }
    }

    pub(super) fn deadline(&self, priority: Priority) -> Duration {
        let deadlines = self.deadlines.lock().expect("no panics while held");
        match priority {
            Priority::Demand => deadlines.demand,
            Priority::WorkingSet | Priority::Prefetch => deadlines.prefetch,
        }
    }

    /// For reads that begin from now on.
    pub(super) fn set_demand_deadline(&self, deadline: Duration) {
        self.deadlines.lock().expect("no panics while held").demand = deadline;
    }

    /// How long a first attempt waits for the next bytes: short enough to leave time for another.
    pub(super) fn idle(&self, priority: Priority) -> Duration {
        self.longest_idle(priority).min(self.deadline(priority) / 3)
    }

    /// How long any attempt waits for the next bytes.
    pub(super) fn longest_idle(&self, priority: Priority) -> Duration {
        self.client.options().idle_timeout.min(self.deadline(priority))
    }

    pub(super) fn size(&self) -> Option<u64> {
        self.declared_size.or_else(|| self.known().size)
    }

    pub(super) fn counters(&self) -> TransferCounters {
        TransferCounters { requests: self.route.requests(), bytes: self.bytes.load(Relaxed) }
    }

    /// Asks for bytes `first..=last`; `again`: after an answer that was not one to this.
    pub(super) async fn ask(
        &self,
        first: u64,
        last: u64,
        idle: Duration,
        again: bool,
    ) -> Result<Answer, HttpError> {
        let range = format!("bytes={first}-{last}").try_into().expect("digits fit a header");
        let response = self.send(idle, HeaderMap::from_iter([(header::RANGE, range)]), again).await?;
        let answer = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                self.check_range(&response, first, last).map(|()| Answer::Range(response))
            }
            // A page of somebody else's looks like this. From a host that serves ranges it never is the object.
            StatusCode::OK if response.content_length().is_none() && self.known().ranges => {
                let (url, wanted) = (self.route.label(), format!("bytes {first}-{last}"));
                Err(HttpError::WrongRange { url, wanted, got: "something without a length".into() })
            }
            StatusCode::OK => self.check_whole(&response).map(|()| {
                let all = response.content_length().is_some_and(|len| first == 0 && len == last + 1);
                if all { Answer::Range(response) } else { Answer::Whole(response) }
            }),
            StatusCode::RANGE_NOT_SATISFIABLE => {
                Err(HttpError::OutOfRange { url: self.route.label(), wanted: format!("{first}-{last}") })
            }
            _ => Err(self.refusal(&response)),
        };
        answer.inspect_err(|error| self.doubt_way_after(error))
    }

    /// Asks for the whole object; `again`: after an answer that was not one to this.
    pub(super) async fn ask_whole(&self, idle: Duration, again: bool) -> Result<Response, HttpError> {
        let response = self.send(idle, HeaderMap::new(), again).await?;
        let answer = match response.status() {
            StatusCode::OK => self.check_whole(&response).map(|()| response),
            _ => Err(self.refusal(&response)),
        };
        answer.inspect_err(|error| self.doubt_way_after(error))
    }

    /// The next piece of a body, `None` at its end.
    pub(super) async fn piece(
        &self,
        idle: Duration,
        response: &mut Response,
    ) -> Result<Option<Bytes>, HttpError> {
        let piece = next_piece(self.route.start(), idle, response).await?;
        self.bytes.fetch_add(piece.as_ref().map_or(0, Bytes::len) as u64, Relaxed);
        Ok(piece)
    }

    fn known(&self) -> MutexGuard<'_, KnownObject> {
        self.known.lock().expect("no panics while held")
    }

    /// Asks for the way again after an answer that was not one to what was asked: a redirect may have led astray. What
    /// was learnt of the object stays, as no such answer has taught anything.
    fn doubt_way_after(&self, error: &HttpError) {
        if error.is_wrong_answer() {
            self.route.forget_all();
        }
    }

    /// Forgets what was learnt and where redirects led when a read has ended because the object is another one. One
    /// captive portal's page must not be held against all answers that come later; what they send is checked by its
    /// digest anyway.
    pub(super) fn unlearn_after(&self, error: &HttpError) {
        if error.is_of_another_object() {
            *self.known() = KnownObject::default();
            self.route.forget_all();
        }
    }

    /// The object has `total` bytes: true from the first who says so, an error from those who say otherwise later.
    pub(super) fn check_size(&self, total: u64) -> Result<(), HttpError> {
        let size = self.declared_size.unwrap_or_else(|| *self.known().size.get_or_insert(total));
        if total != size {
            let detail = format!("{size} bytes were expected, it has {total}");
            return Err(HttpError::Replaced { url: self.route.label(), detail });
        }
        Ok(())
    }

    async fn send(&self, idle: Duration, mut headers: HeaderMap, again: bool) -> Result<Response, HttpError> {
        if again {
            headers.extend(own_connection());
        }
        let etag = self.known().etag.clone().flatten().and_then(|etag| HeaderValue::from_str(&etag).ok());
        headers.extend(etag.map(|etag| (header::IF_MATCH, etag)));
        self.route.send(self.client.transport(), idle, &headers).await
    }

    fn refusal(&self, response: &Response) -> HttpError {
        let url = self.route.label();
        match response.status() {
            StatusCode::PRECONDITION_FAILED => {
                HttpError::Replaced { url, detail: "its ETag no longer matches".into() }
            }
            status => bad_status(&url, status, response.headers()),
        }
    }

    fn check_range(&self, response: &Response, first: u64, last: u64) -> Result<(), HttpError> {
        check_encoding(self.route.start(), response.headers())?;
        let url = || self.route.label();
        let wrong = || HttpError::wrong_range(url(), format!("bytes {first}-{last}"), response.headers());
        let sent = header_text(response, header::CONTENT_RANGE).and_then(parse_content_range);
        let (got_first, got_last, total) = sent.ok_or_else(wrong)?;
        // Of an object that ends before `last`, the bytes up to its end are the right answer.
        if got_first != first || got_last < first || got_last != last.min(total.saturating_sub(1)) {
            return Err(wrong());
        }
        let wanted = got_last + 1 - first;
        if let Some(len) = response.content_length().filter(|&len| len != wanted) {
            return Err(HttpError::BodyLength { url: url(), wanted, got: len.abs_diff(wanted) });
        }
        self.check_object(response, Some(total))?;
        if got_last < last {
            return Err(HttpError::OutOfRange { url: url(), wanted: format!("{first}-{last}") });
        }
        self.known().ranges = true;
        Ok(())
    }

    fn check_whole(&self, response: &Response) -> Result<(), HttpError> {
        check_encoding(self.route.start(), response.headers())?;
        self.check_object(response, response.content_length())
    }

    /// Holds what an answer says of the object against what is known, and learns what is new. Last of all checks: an
    /// answer that is not one to what was asked teaches nothing.
    fn check_object(&self, response: &Response, size: Option<u64>) -> Result<(), HttpError> {
        let etag = header_text(response, header::ETAG).filter(|etag| etag.starts_with('"'));
        let mut learnt = self.known();
        let pinned = learnt.etag.as_ref().and_then(Option::as_deref);
        let (known, url) = (self.declared_size.or(learnt.size), || self.route.label());
        if let (Some(wanted), Some(got)) = (known, size)
            && wanted != got
        {
            // A host that names the range asked for has understood, and knows how long its object is. A whole answer
            // may be a portal's or an error page, and the same ETag with another size is a contradiction.
            let understood = response.status() == StatusCode::PARTIAL_CONTENT;
            if !understood || (pinned.is_some() && pinned == etag) {
                return Err(HttpError::WrongLength { url: url(), wanted, got });
            }
            let detail = format!("{wanted} bytes were expected, it has {got}");
            return Err(HttpError::Replaced { url: url(), detail });
        }
        if let (Some(pinned), Some(etag)) = (pinned, etag)
            && pinned != etag
        {
            let detail = format!("its ETag was {pinned}, now {etag}");
            return Err(HttpError::Replaced { url: url(), detail });
        }
        learnt.size = learnt.size.or(size);
        learnt.etag.get_or_insert_with(|| etag.map(str::to_owned));
        Ok(())
    }

    pub(super) fn outage(&self) -> Option<Outage> {
        self.failing.lock().expect("no panics while held").outage.clone()
    }

    /// A read met `error` and tries again. `failing`: whether it has said so before.
    pub(super) fn note_failure(&self, failing: &mut bool, error: &HttpError) {
        let mut all = self.failing.lock().expect("no panics while held");
        if !std::mem::replace(failing, true) {
            all.reads += 1;
        }
        let since = all.outage.as_ref().map_or_else(Instant::now, |outage| outage.since);
        all.outage = Some(Outage { since, last_error: error.to_string() });
    }

    /// A read goes on, or is given up.
    pub(super) fn note_recovery(&self, failing: &mut bool) {
        if !std::mem::take(failing) {
            return;
        }
        let mut all = self.failing.lock().expect("no panics while held");
        all.reads -= 1;
        if all.reads == 0 {
            all.outage = None;
        }
    }
}

fn header_text(response: &Response, name: HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
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
