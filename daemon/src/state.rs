//! What all requests share.

use crate::audit::AuditLog;
use crate::blocking::Blocking;
use crate::census::Census;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::tokens::Tokens;
use forkd_engine::local::daemon::DaemonOptions;
use forkd_engine::local::paths::Paths;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OwnedMutexGuard;

/// See the module's description.
pub struct Daemon {
    /// forkd's directories.
    pub paths: Paths,
    /// What it was told.
    pub options: DaemonOptions,
    /// Who may use it over TCP.
    pub tokens: Option<Tokens>,
    /// What forks.
    pub pool: Arc<Pool>,
    /// What calls the engine.
    pub blocking: Blocking,
    /// How many sandboxes there are.
    pub census: Arc<Census>,
    /// What /metrics shows.
    pub metrics: Arc<Metrics>,
    /// Where actions are noted.
    pub audit: Option<AuditLog>,
    /// Requests with a key that are under way.
    pub keys: Keys,
}

/// Of two requests with the same key one waits for the other.
#[derive(Debug, Default)]
pub struct Keys(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

/// The turn of one request with its key.
pub struct KeyTurn<'a> {
    keys: &'a Keys,
    key: String,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Keys {
    /// Waits until nobody else has that key.
    pub async fn turn(&self, key: String) -> KeyTurn<'_> {
        let lock = Arc::clone(self.map().entry(key.clone()).or_default());
        let guard = Some(lock.lock_owned().await);
        KeyTurn { keys: self, key, guard }
    }

    fn map(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<tokio::sync::Mutex<()>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KeyTurn<'_> {
    fn drop(&mut self) {
        self.guard = None;
        let mut map = self.keys.map();
        // The map's own is the last one: nobody waits.
        if map.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            map.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_waits_for_the_other_and_nothing_is_left() {
        let keys = Keys::default();
        let first = keys.turn("a".to_owned()).await;
        let _other = keys.turn("b".to_owned()).await;
        let waiting = keys.turn("a".to_owned());
        tokio::pin!(waiting);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), &mut waiting).await.is_err());
        drop(first);
        drop(waiting.await);
        assert_eq!(keys.map().len(), 1);
    }
}
