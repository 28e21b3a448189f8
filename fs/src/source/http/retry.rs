//! When to try again: pauses between attempts, what a server says about them, and when to give up.

use std::time::{Duration, Instant, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap, HeaderName};

use super::error::HttpError;

/// First pause before trying again; doubles up to [`LONGEST_PAUSE`], each time scattered by half, so that readers that
/// failed together do not come back together.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Bytes that must arrive within one deadline: a server that drips is treated like one that is silent.
pub(super) const PROGRESS: u64 = 64 << 10;

/// The error for a status that is not success.
pub(super) fn bad_status(url: &str, status: StatusCode, headers: &HeaderMap) -> HttpError {
    let (url, status) = (url.to_owned(), status.as_u16());
    match status {
        // To a request for all of it.
        206 => HttpError::wrong_range(url, "all of it".into(), headers),
        401 | 403 => HttpError::Denied { url, status },
        404 | 410 => HttpError::NotFound { url, status },
        408 | 429 | 500.. => HttpError::Busy { url, status, retry_after: retry_after(headers) },
        _ => HttpError::Status { url, status },
    }
}

/// How long the server asks to wait: seconds or a date. A date counts from the server's own, so that its clock may be
/// wrong.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let date = |text: &str| httpdate::parse_http_date(text).ok();
    let asked = text(header::RETRY_AFTER)?.trim();
    if let Ok(seconds) = asked.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let now = text(header::DATE).and_then(date).unwrap_or_else(SystemTime::now);
    Some(date(asked)?.duration_since(now).unwrap_or_default())
}

/// Counts attempts and pauses between them until a deadline.
#[derive(Debug)]
pub(super) struct Retries {
    deadline: Duration,
    attempts: u32,
    after_wrong_answer: bool,
}

impl Retries {
    pub(super) fn new(deadline: Duration) -> Self {
        Self { deadline, attempts: 0, after_wrong_answer: false }
    }

    /// Whether the last attempt met an answer that is not one to what was asked.
    pub(super) fn after_wrong_answer(&self) -> bool {
        self.after_wrong_answer
    }

    /// Forgets the attempts so far and what the last of them met, after a success.
    pub(super) fn reset(&mut self) {
        (self.attempts, self.after_wrong_answer) = (0, false);
    }

    /// Waits before the next attempt, or ends in an error when `error` is final or the deadline, which counts from
    /// `since`, would pass.
    pub(super) async fn pause(
        &mut self,
        url: &str,
        since: Instant,
        error: HttpError,
    ) -> Result<(), HttpError> {
        if !error.is_transient() {
            return Err(error);
        }
        let Some(pause) = self.next_pause(since, &error) else {
            let (url, attempts, waited) = (url.to_owned(), self.attempts, since.elapsed());
            return Err(HttpError::Deadline { url, attempts, waited, last: Box::new(error) });
        };
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// How long to wait before the next attempt after `error`; `None` when it is no use or there is no time.
    pub(super) fn next_pause(&mut self, since: Instant, error: &HttpError) -> Option<Duration> {
        self.attempts += 1;
        self.after_wrong_answer = error.is_wrong_answer();
        let pause = self.pause_after(error);
        if !error.is_transient() || since.elapsed().saturating_add(pause) > self.deadline {
            return None;
        }
        tracing::debug!(%error, attempts = self.attempts, pause_ms = pause.as_millis(), "trying again");
        Some(pause)
    }

    fn pause_after(&self, error: &HttpError) -> Duration {
        let doubled = FIRST_PAUSE.saturating_mul(1 << (self.attempts - 1).min(16)).min(LONGEST_PAUSE);
        let scattered = doubled.mul_f64(0.5 + fastrand::f64());
        match error {
            HttpError::Busy { retry_after: Some(asked), .. } => scattered.max(*asked),
            _ => scattered,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(lines: &[(HeaderName, &str)]) -> Option<Duration> {
        retry_after(&lines.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect())
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let seconds = |s| Some(Duration::from_secs(s));
        assert_eq!(asked(&[(header::RETRY_AFTER, "120")]), seconds(120));
        let date = "Wed, 21 Oct 2015 07:28:30 GMT";
        let then = (header::DATE, "Wed, 21 Oct 2015 07:28:00 GMT");
        assert_eq!(asked(&[then.clone(), (header::RETRY_AFTER, date)]), seconds(30), "by the server's clock");
        assert_eq!(asked(&[(header::RETRY_AFTER, date)]), seconds(0), "a time gone by");
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        let left = asked(&[(header::RETRY_AFTER, &soon)]).unwrap();
        assert!((98..=100).contains(&left.as_secs()), "{left:?}");
        for bad in ["", "soon", "-1", "1.5", "99999999999999999999999"] {
            assert_eq!(asked(&[then.clone(), (header::RETRY_AFTER, bad)]), None, "{bad}");
        }
        assert_eq!(asked(&[]), None);
    }

    #[test]
    fn pauses_grow_scatter_and_are_bounded() {
        let error = HttpError::Stalled { url: String::new(), waited: Duration::ZERO };
        let pauses = |attempts| {
            let retries = Retries { attempts, ..Retries::new(Duration::MAX) };
            (0..100).map(|_| retries.pause_after(&error).as_millis()).collect::<Vec<_>>()
        };
        for (attempts, middle) in [(1, 50), (2, 100), (4, 400), (40, 2000)] {
            let pauses = pauses(attempts);
            let (least, most) = (*pauses.iter().min().unwrap(), *pauses.iter().max().unwrap());
            assert!(least >= middle / 2 && most <= middle * 3 / 2, "{attempts}: {least}..{most}");
            assert!(most - least > middle / 2, "scattered: {least}..{most}");
        }
    }
}
