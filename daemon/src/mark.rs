//! What the daemon notes in the run directory of a fork that is its own: so it finds it again after a restart.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// The label that all forks of a daemon have. Its value is the version of the others.
const DAEMON: &str = "daemon";
const VERSION: &str = "1";
const CREATED: &str = "created_unix";
const TENANT: &str = "tenant";
const KEY: &str = "idempotency_key";
const DIGEST: &str = "request_sha256";
/// In front of what the client noted.
const METADATA: &str = "metadata.";

/// The mark of one fork.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mark {
    /// When it was asked for, seconds since 1970.
    pub created_unix: u64,
    /// Whose token asked for it; `None` for this user, over the Unix socket.
    pub tenant: Option<String>,
    /// What the client noted.
    pub metadata: BTreeMap<String, String>,
    /// The client's key, and a digest of what it asked for with it.
    pub idempotency: Option<(String, String)>,
}

impl Mark {
    /// One of now.
    pub fn now(tenant: Option<String>, metadata: BTreeMap<String, String>) -> Mark {
        let created_unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Mark { created_unix, tenant, metadata, idempotency: None }
    }

    /// As the run directory keeps it.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::from([
            (DAEMON.to_owned(), VERSION.to_owned()),
            (CREATED.to_owned(), self.created_unix.to_string()),
        ]);
        labels.extend(self.tenant.iter().map(|tenant| (TENANT.to_owned(), tenant.clone())));
        if let Some((key, digest)) = &self.idempotency {
            labels.extend([(KEY.to_owned(), key.clone()), (DIGEST.to_owned(), digest.clone())]);
        }
        let metadata = self.metadata.iter().map(|(name, value)| (format!("{METADATA}{name}"), value.clone()));
        labels.extend(metadata);
        labels
    }

    /// The mark in a run directory's labels; `None` where it is not of a daemon.
    pub fn of(mut labels: BTreeMap<String, String>) -> Option<Mark> {
        labels.remove(DAEMON)?;
        let idempotency = labels.remove(KEY).zip(labels.remove(DIGEST));
        let created_unix = labels.remove(CREATED).and_then(|text| text.parse().ok()).unwrap_or(0);
        let tenant = labels.remove(TENANT);
        let metadata = labels
            .into_iter()
            .filter_map(|(name, value)| Some((name.strip_prefix(METADATA)?.to_owned(), value)));
        Some(Mark { created_unix, tenant, metadata: metadata.collect(), idempotency })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_notes_cannot_pass_for_the_daemon_s() {
        let pairs = [("daemon", "2"), ("tenant", "somebody"), ("metadata.x", "y")];
        let metadata: BTreeMap<_, _> =
            pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let mut mark = Mark::now(Some("alice".to_owned()), metadata.clone());
        mark.idempotency = Some(("key".to_owned(), "digest".to_owned()));
        assert_eq!(Mark::of(mark.labels()), Some(mark));
        assert_eq!(Mark::of(metadata.into_iter().filter(|(name, _)| name != "daemon").collect()), None);
    }
}
