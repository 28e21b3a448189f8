//! Why an HTTP server did not deliver.

use std::time::Duration;

/// Why an HTTP server did not deliver.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The text is no http(s) URL.
    #[error("{url} is not an http or https URL")]
    Url {
        /// The text.
        url: String,
    },
    /// The HTTP client cannot be set up.
    #[error("cannot set up an HTTP client")]
    Client(#[source] reqwest::Error),
    /// No connection, or no answer on it.
    #[error("cannot reach {url}: {}", root_cause(source))]
    Connect {
        /// What was asked.
        url: String,
        /// The client's reason.
        #[source]
        source: reqwest::Error,
    },
    /// The connection broke while the body was arriving.
    #[error("the answer from {url} broke off: {}", root_cause(source))]
    Transfer {
        /// What was asked.
        url: String,
        /// The client's reason.
        #[source]
        source: reqwest::Error,
    },
    /// Nothing arrived for too long.
    #[error("{url} sent nothing for {} ms", waited.as_millis())]
    Stalled {
        /// What was asked.
        url: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Bytes drip in, so few that the deadline passes.
    #[error("{url} sent only {got} bytes in {:.1} s", waited.as_secs_f64())]
    TooSlow {
        /// What was asked.
        url: String,
        /// How many came.
        got: u64,
        /// In how long.
        waited: Duration,
    },
    /// The server is busy or broken (429, 408, 5xx).
    #[error("{url} answered {status}")]
    Busy {
        /// What was asked.
        url: String,
        /// Its status code.
        status: u16,
        /// What it said about trying again.
        retry_after: Option<Duration>,
    },
    /// 401 or 403.
    #[error("{url} denies access ({status})")]
    Denied {
        /// What was asked.
        url: String,
        /// Its status code.
        status: u16,
    },
    /// 404 or 410.
    #[error("{url} does not exist on the server ({status})")]
    NotFound {
        /// What was asked.
        url: String,
        /// Its status code.
        status: u16,
    },
    /// Any other answer nobody asked for.
    #[error("{url} answered {status} to a request for bytes")]
    Status {
        /// What was asked.
        url: String,
        /// Its status code.
        status: u16,
    },
    /// The whole object instead of a range of it.
    #[error("the host of {url} does not serve byte ranges (it answered 200 to a range request)")]
    NoRanges {
        /// What was asked.
        url: String,
    },
    /// Another range than the one asked for.
    #[error("{url} sent the range {got:?} for bytes {wanted}")]
    WrongRange {
        /// What was asked.
        url: String,
        /// The range asked for.
        wanted: String,
        /// Its Content-Range.
        got: String,
    },
    /// A body of another length than announced.
    #[error("{url} sent {got} bytes more or fewer than the {wanted} asked for")]
    BodyLength {
        /// What was asked.
        url: String,
        /// Length of the range.
        wanted: u64,
        /// By how much it differs.
        got: u64,
    },
    /// Redirected in circles.
    #[error("{url} redirects too often")]
    Redirects {
        /// What was asked.
        url: String,
    },
    /// A compressed body although only identity was accepted.
    #[error("{url} sent its answer {encoding}-encoded although that was not accepted")]
    Encoded {
        /// What was asked.
        url: String,
        /// Its Content-Encoding.
        encoding: String,
    },
    /// The object is not the one that was opened.
    #[error("{url} was replaced on the server since it was opened ({detail})")]
    Replaced {
        /// What was asked.
        url: String,
        /// How that was noticed.
        detail: String,
    },
    /// The range lies outside the object.
    #[error("{url} has no bytes {wanted}")]
    OutOfRange {
        /// What was asked.
        url: String,
        /// The range asked for.
        wanted: String,
    },
    /// A document longer than the caller reads.
    #[error("{url} is longer than the {limit} bytes that are read of it")]
    TooLong {
        /// What was asked.
        url: String,
        /// The caller's limit.
        limit: u64,
    },
    /// Retried until the deadline.
    #[error("gave up on {url} after {attempts} attempts in {:.1} s", waited.as_secs_f64())]
    Deadline {
        /// What was asked.
        url: String,
        /// How often it was tried.
        attempts: u32,
        /// For how long.
        waited: Duration,
        /// What the last attempt met.
        #[source]
        last: Box<HttpError>,
    },
}

impl HttpError {
    /// Whether trying again may help.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Transfer { .. } | Self::Stalled { .. } | Self::Busy { .. } => true,
            Self::BodyLength { .. } => true,
            Self::Url { .. } | Self::Client(_) | Self::Denied { .. } | Self::NotFound { .. } => false,
            Self::Status { .. } | Self::NoRanges { .. } | Self::WrongRange { .. } | Self::Encoded { .. } => {
                false
            }
            Self::Redirects { .. }
            | Self::TooSlow { .. }
            | Self::Replaced { .. }
            | Self::OutOfRange { .. }
            | Self::TooLong { .. }
            | Self::Deadline { .. } => false,
        }
    }
}

/// The innermost reason of a client error: "connection refused" rather than "error sending request".
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
