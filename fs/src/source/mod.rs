//! Where a pack's bytes come from: an HTTP server or a local file. Nothing here knows what the bytes mean, and
//! nothing here is trusted to return the right ones.

use std::time::Duration;

use bytes::{Bytes, BytesMut};

mod counters;
pub mod file;
pub mod http;
pub(crate) mod priority;

pub use counters::{Outage, TransferCounters};
pub use file::{FileError, FileSource};
pub use http::{Credentials, HttpClient, HttpError, HttpOptions, HttpSource, redact_url};
pub use priority::{Priority, ReadDeadlines};

/// One object bytes are read from.
#[derive(Debug)]
pub enum Source {
    /// An object on an HTTP server.
    Http(HttpSource),
    /// A local file.
    File(FileSource),
}

/// Why bytes could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// From an HTTP server.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// From a local file.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A byte range on its way, delivered piece by piece; retries and resumes by itself.
#[derive(Debug)]
pub enum RangeBody {
    /// From an HTTP server.
    Http(Box<http::HttpBody>),
    /// From a local file.
    File(file::FileBody),
}

impl Source {
    /// Starts reading `len` bytes at `offset`. Nothing is requested until the first [`RangeBody::next`].
    pub fn stream_at(&self, offset: u64, len: u64, priority: Priority) -> RangeBody {
        match self {
            Self::Http(source) => RangeBody::Http(Box::new(source.stream_at(offset, len, priority))),
            Self::File(source) => RangeBody::File(source.stream_at(offset, len, priority)),
        }
    }

    /// Reads exactly `len` bytes at `offset`. The caller bounds `len`.
    pub async fn read_at(&self, offset: u64, len: u64, priority: Priority) -> Result<Bytes, SourceError> {
        let mut body = self.stream_at(offset, len, priority);
        let first = body.next().await?.unwrap_or_default();
        if first.len() as u64 == len {
            return Ok(first);
        }
        let mut all = BytesMut::with_capacity(len as usize);
        all.extend_from_slice(&first);
        while let Some(piece) = body.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }

    /// Size of the object in bytes; costs a request when an HTTP server was not asked for anything yet.
    pub async fn size(&self) -> Result<u64, SourceError> {
        match self {
            Self::Http(source) => Ok(source.size().await?),
            Self::File(source) => Ok(source.size()),
        }
    }

    /// Size of the object in bytes, if no request is needed to tell.
    pub fn known_size(&self) -> Option<u64> {
        match self {
            Self::Http(source) => source.known_size(),
            Self::File(source) => Some(source.size()),
        }
    }

    /// Changes how long a demand read that begins from now on may be retried.
    pub fn set_demand_deadline(&self, deadline: Duration) {
        match self {
            Self::Http(source) => source.set_demand_deadline(deadline),
            // Files answer or do not.
            Self::File(_) => {}
        }
    }

    /// The URL or path, for messages.
    pub fn describe(&self) -> &str {
        match self {
            Self::Http(source) => source.url(),
            Self::File(source) => source.path(),
        }
    }

    /// What was transferred so far.
    pub fn counters(&self) -> TransferCounters {
        match self {
            Self::Http(source) => source.counters(),
            Self::File(source) => source.counters(),
        }
    }

    /// Whether reads are failing and being retried right now.
    pub fn outage(&self) -> Option<Outage> {
        match self {
            Self::Http(source) => source.outage(),
            Self::File(_) => None,
        }
    }
}

impl RangeBody {
    /// The next piece, `None` after the last byte of the range. Ends in an error when retries ran out or are pointless.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        match self {
            Self::Http(body) => Ok(body.next().await?),
            Self::File(body) => Ok(body.next().await?),
        }
    }
}
