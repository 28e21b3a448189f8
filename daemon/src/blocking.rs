//! Calls of the engine, which block, on threads that there is a limit to.

use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;

/// Short calls at a time.
const SHORT_CALLS: usize = 64;
/// How long a short call may wait for its turn.
const TURN: Duration = Duration::from_secs(10);

/// There are more calls than may be.
#[derive(Debug, thiserror::Error)]
pub enum BusyError {
    /// All threads are in use.
    #[error("more is under way than this daemon does at a time")]
    Full,
    /// The call broke down.
    #[error("the call broke down")]
    Panicked(#[source] JoinError),
}

/// See the module's description.
#[derive(Debug)]
pub struct Blocking {
    short: Semaphore,
    streams: Arc<Semaphore>,
}

impl Blocking {
    /// With so many calls at a time that may take as long as a client likes.
    pub fn new(streams: usize) -> Blocking {
        Blocking { short: Semaphore::new(SHORT_CALLS), streams: Arc::new(Semaphore::new(streams)) }
    }

    /// Threads that a runtime needs for it.
    pub fn threads(streams: usize) -> usize {
        SHORT_CALLS + streams
    }

    /// A call that takes a moment.
    ///
    /// # Errors
    /// [`BusyError`] as its variants say.
    pub async fn short<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, BusyError> {
        let turn = tokio::time::timeout(TURN, self.short.acquire()).await;
        let Ok(Ok(_turn)) = turn else { return Err(BusyError::Full) };
        tokio::task::spawn_blocking(call).await.map_err(BusyError::Panicked)
    }

    /// The right to make calls that take long; it is to be held until they are over.
    ///
    /// # Errors
    /// [`BusyError::Full`] when there are none left.
    pub fn stream(&self) -> Result<OwnedSemaphorePermit, BusyError> {
        Arc::clone(&self.streams).try_acquire_owned().map_err(|_| BusyError::Full)
    }
}
