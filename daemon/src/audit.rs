//! The audit log: one line of JSON for each action, in a file that is rotated.

use file_rotate::compression::Compression;
use file_rotate::suffix::AppendCount;
use file_rotate::{ContentLimit, FileRotate};
use serde::Serialize;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// How long a file may be, bytes, and how many older ones are kept.
const FILE_MAX: usize = 64 << 20;
const KEPT: usize = 8;

/// See the module's description.
pub struct AuditLog(Mutex<FileRotate<AppendCount>>);

/// What was done. Neither code nor output nor contents of files are in it.
#[derive(Debug, Serialize)]
pub struct Action<'a> {
    /// Seconds since 1970.
    pub time: f64,
    /// The request's id, as its answer has it.
    pub request: &'a str,
    /// Whose token it was; null for this user, over the Unix socket.
    pub tenant: Option<&'a str>,
    /// POST, PUT, DELETE, or GET for a WebSocket.
    pub method: &'a str,
    /// The path.
    pub path: &'a str,
    /// How it was answered.
    pub status: u16,
    /// How long that took, ms.
    pub ms: f64,
}

impl AuditLog {
    /// Goes on in a file that is there, or makes one that nobody else reads.
    pub fn open(path: &Path) -> std::io::Result<AuditLog> {
        let mut options = OpenOptions::new();
        options.read(true).create(true).append(true).mode(0o600);
        // The log itself does not say why it cannot be opened.
        options.open(path)?;
        let rotated = FileRotate::new(
            path,
            AppendCount::new(KEPT),
            ContentLimit::BytesSurpassed(FILE_MAX),
            Compression::None,
            Some(options),
        );
        Ok(AuditLog(Mutex::new(rotated)))
    }

    /// Notes an action. Where that fails the daemon's own log says so.
    pub fn note(&self, action: &Action<'_>) {
        let Ok(mut line) = serde_json::to_vec(action) else { return };
        line.push(b'\n');
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(&line).and_then(|()| file.flush()) {
            tracing::error!(%error, "an action is missing in the audit log");
        }
    }
}

/// Now, seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
