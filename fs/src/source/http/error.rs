//! Why an HTTP server did not deliver. Every `url` is fit to be shown: without passwords and signatures.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{self, HeaderMap};

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
    #[error("cannot set up an HTTP client: {}", root_cause(_0))]
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
    /// No ranges, and no word about the size either: too much to download blindly.
    #[error(
        "the host of {url} serves no byte ranges and does not say how long it is; no more than {limit} bytes are \
         downloaded on trust"
    )]
    NoRanges {
        /// What was asked.
        url: String,
        /// How much is downloaded.
        limit: u64,
    },
    /// The copy of an object whose host serves no ranges cannot be kept.
    #[error("cannot keep a copy of {url}, whose host serves no byte ranges, in {}: {source}", directory.display())]
    TemporaryFile {
        /// What was asked.
        url: String,
        /// Where the copy was to be.
        directory: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The download of an object whose host serves no ranges ended before the bytes wanted.
    #[error("{url} is downloaded whole, as its host serves no byte ranges, and that failed: {last}")]
    Download {
        /// What was asked.
        url: String,
        /// What the download met; shared by everyone who waited for it.
        last: Arc<HttpError>,
    },
    /// The server's certificate is not to be trusted.
    #[error("the certificate of {url} is not trusted: {reason}")]
    Untrusted {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// All requests that may be under way are, and none of them ended.
    #[error("{url} was not asked: too many other reads waited for answers for {:.1} s", waited.as_secs_f64())]
    Queued {
        /// What was to be asked.
        url: String,
        /// For how long.
        waited: Duration,
    },
    /// Another range than the one asked for.
    #[error("{url} sent {got} when asked for {wanted}")]
    WrongRange {
        /// What was asked.
        url: String,
        /// What was asked for.
        wanted: String,
        /// What it says it sent.
        got: String,
    },
    /// A whole object of another length than the object has, or another length although the ETag is the same.
    #[error("{url} answered for an object of {got} bytes instead of {wanted}")]
    WrongLength {
        /// What was asked.
        url: String,
        /// Length of the object.
        wanted: u64,
        /// The answer's; when it is not announced, how much of it came.
        got: u64,
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
    /// Redirected in circles, or more than ten times.
    #[error("{url} redirects in circles or too often")]
    Redirects {
        /// What was asked.
        url: String,
    },
    /// A redirect from https to http.
    #[error("{url} redirects to {to}, which is not encrypted: not followed")]
    Downgrade {
        /// What was asked.
        url: String,
        /// Where it leads.
        to: String,
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
    /// A partial answer with these headers, which is not what was `wanted`.
    pub(super) fn wrong_range(url: String, wanted: String, headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let got = match (text(header::CONTENT_RANGE), text(header::CONTENT_TYPE)) {
            (Some(range), _) => format!("the range {range:?}"),
            (None, Some(kind)) if kind.starts_with("multipart/byteranges") => "several ranges".into(),
            (None, _) => "a range without saying which".into(),
        };
        Self::WrongRange { url, wanted, got }
    }

    /// Whether an answer came that is not one to what was asked. It says nothing about the object.
    pub(super) fn is_wrong_answer(&self) -> bool {
        matches!(
            self,
            Self::WrongRange { .. }
                | Self::WrongLength { .. }
                | Self::Encoded { .. }
                | Self::BodyLength { .. }
        )
    }

    /// Whether what was opened may have been something else than what is there.
    pub(super) fn is_of_another_object(&self) -> bool {
        match self {
            Self::Replaced { .. } | Self::WrongLength { .. } | Self::OutOfRange { .. } => true,
            Self::Download { last, .. } => last.is_of_another_object(),
            Self::Deadline { last, .. } => last.is_of_another_object(),
            _ => false,
        }
    }

    /// What a request that got no answer met.
    pub(super) fn of_failed_exchange(url: &str, error: reqwest::Error) -> Self {
        let (url, source) = (url.to_owned(), error.without_url());
        match certificate_error(&source) {
            Some(reason) => Self::Untrusted { url, reason },
            None => Self::Connect { url, source },
        }
    }

    /// Whether trying again may help.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Transfer { .. } | Self::Stalled { .. } | Self::Busy { .. } => true,
            Self::WrongRange { .. }
            | Self::WrongLength { .. }
            | Self::Encoded { .. }
            | Self::BodyLength { .. } => true,
            Self::Url { .. } | Self::Client(_) | Self::Denied { .. } | Self::NotFound { .. } => false,
            Self::Status { .. }
            | Self::NoRanges { .. }
            | Self::Redirects { .. }
            | Self::Downgrade { .. }
            | Self::Untrusted { .. }
            | Self::Queued { .. }
            | Self::TemporaryFile { .. }
            | Self::Download { .. }
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
    causes(error).last().expect("at least itself").to_string()
}

/// What is wrong with the server's certificate, if that is why there is no connection.
fn certificate_error(error: &reqwest::Error) -> Option<String> {
    let tls = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>().cloned())?;
    match tls {
        // A bad signature is what a CA of the same name as a trusted one looks like.
        rustls::Error::InvalidCertificate(
            rustls::CertificateError::UnknownIssuer | rustls::CertificateError::BadSignature,
        ) => Some("nobody this machine trusts has signed it".into()),
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(reason)) => {
            Some(reason.0.to_string())
        }
        rustls::Error::InvalidCertificate(reason) => Some(reason.to_string()),
        rustls::Error::NoCertificatesPresented => Some("it presents none".into()),
        _ => None,
    }
}

/// An error and what caused it, the innermost last. `io::Error` hides the error it wraps from `source()`.
fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |cause| {
        let wrapped = cause.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
        wrapped.map(|inner| inner as &(dyn std::error::Error + 'static)).or_else(|| cause.source())
    })
}
