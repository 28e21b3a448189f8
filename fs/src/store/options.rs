//! How a store behaves.

use std::sync::Arc;
use std::time::Duration;

use super::find_base::FindBase;
use super::location::{PackLocation, PackSource};
use crate::cache::ChunkCache;
use crate::observe::Observer;
use crate::source::{FileSource, HttpClient, HttpSource, ReadDeadlines, Source, SourceError};

/// How a store behaves.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Connections to use; share one client per process.
    pub http: HttpClient,
    /// Where verified chunks are kept on disk; `None` keeps none.
    pub cache: Option<Arc<ChunkCache>>,
    /// How long a demand read may be retried. A FUSE reader cannot be killed meanwhile, so a mount keeps it short; a
    /// machine can wait longer than its network is away.
    pub demand_deadline: Duration,
    /// How long a prefetch read may be retried.
    pub prefetch_deadline: Duration,
    /// Plain bytes kept decoded in memory.
    pub decoded_bytes: usize,
    /// Frames at most this many bytes apart come in one request. See `tests/gap.rs` for what others cost.
    pub max_gap: u64,
    /// Bytes at the start of the pack to fetch along with a pinned index that is not cached, and to hold: whoever opens
    /// a pack to restore it saves the round trip for the small members and hot pages, which lie there. 0 fetches none.
    pub head_bytes: u64,
    /// Who knows where the bases of deltas are, beside the delta and what it says itself.
    pub bases: Option<Arc<dyn FindBase>>,
    /// Whether a delta whose base is nowhere can be opened; its own chunks can be read then.
    pub open_without_bases: bool,
    /// Who hears of requests and decodings; `None` spares measuring them.
    pub observer: Option<Arc<dyn Observer>>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            http: HttpClient::default(),
            cache: None,
            demand_deadline: Duration::from_secs(30),
            prefetch_deadline: Duration::from_secs(120),
            decoded_bytes: 64 << 20,
            max_gap: 128 << 10,
            head_bytes: 0,
            bases: None,
            open_without_bases: false,
            observer: None,
        }
    }
}

impl StoreOptions {
    /// The bytes of the pack at `location`, checked by nobody yet. Of a URL nothing is requested so far.
    pub fn source(&self, location: &PackLocation) -> Result<Source, SourceError> {
        let deadlines = ReadDeadlines { demand: self.demand_deadline, prefetch: self.prefetch_deadline };
        match &location.source {
            PackSource::Url(url) => {
                let source = HttpSource::new(&self.http, url, location.size, deadlines)?;
                Ok(Source::Http(source.observed_by(self.observer.clone())))
            }
            PackSource::Path(path) => {
                Ok(Source::File(FileSource::open(path)?.observed_by(self.observer.clone())))
            }
        }
    }
}
