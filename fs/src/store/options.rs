//! How a store behaves.

use std::sync::Arc;
use std::time::Duration;

use crate::cache::ChunkCache;
use crate::observe::Observer;
use crate::source::HttpClient;

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
            observer: None,
        }
    }
}
