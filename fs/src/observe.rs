//! Who wants to see what a store does while it does it: requests and decodings, as they end. Nothing is measured when
//! nobody looks. The `forkd` crate draws timelines from it.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

use crate::source::priority::Priority;

/// Hears of what one store does. Called from its tasks and threads: an observer that blocks holds them up.
pub trait Observer: Debug + Send + Sync {
    /// A request is over: all of it was read, it failed, or nobody wants the rest.
    fn transferred(&self, transfer: &Transfer);

    /// A frame was decoded.
    fn decoded(&self, decoding: &Decoding);
}

/// One request for a range of the pack; for a local pack one read.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// When it was sent.
    pub began: Instant,
    /// When it was over.
    pub ended: Instant,
    /// Bytes that came.
    pub bytes: u64,
    /// Why it was sent.
    pub priority: Priority,
}

/// One frame becoming a chunk.
#[derive(Debug, Clone, Copy)]
pub struct Decoding {
    /// When it began.
    pub began: Instant,
    /// When it was over.
    pub ended: Instant,
    /// Plain bytes it gave; 0 when it failed.
    pub bytes: u64,
}

/// A request under way that somebody observes; dropped when it is over, however it ends.
#[derive(Debug)]
pub(crate) struct Watched {
    observer: Arc<dyn Observer>,
    priority: Priority,
    began: Instant,
    bytes: u64,
}

impl Watched {
    /// A request is about to be sent.
    pub(crate) fn start(observer: Option<&Arc<dyn Observer>>, priority: Priority) -> Option<Watched> {
        let observer = Arc::clone(observer?);
        Some(Watched { observer, priority, began: Instant::now(), bytes: 0 })
    }

    /// So many bytes have come.
    pub(crate) fn arrived(&mut self, bytes: u64) {
        self.bytes += bytes;
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Watched { priority, began, bytes, .. } = *self;
        self.observer.transferred(&Transfer { began, ended: Instant::now(), bytes, priority });
    }
}
