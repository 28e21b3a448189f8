//! Where the daemon (`forkd serve`) is to be found, and what it is told when it is started.
//!
//! ```text
//! <runtime>/daemon.sock   the daemon listens here, unless it was told another place
//! <runtime>/daemon.lock   flock(2)ed by the daemon: there is one for each run directory
//! ```

use crate::local::paths::Paths;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// The daemon's program, which lies beside `forkd`.
pub const PROGRAM: &str = "forkd-daemon";
/// Its first argument where it is to serve. The second is [`DaemonOptions`] as JSON.
pub const SERVE: &str = "serve";

/// Where the daemon of this user listens, unless it was told otherwise.
pub fn socket(paths: &Paths) -> PathBuf {
    paths.runtime.join("daemon.sock")
}

/// The file that the daemon of this user has locked.
pub fn lock(paths: &Paths) -> PathBuf {
    paths.runtime.join("daemon.lock")
}

/// What `forkd serve` tells the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DaemonOptions {
    /// Where it listens.
    pub listen: Listen,
    /// The file with the tokens that clients over TCP have to show.
    pub token_file: Option<PathBuf>,
    /// Certificate and key, where TCP is to be TLS.
    pub tls: Option<TlsFiles>,
    /// The hub where images are looked for; the usual one without it.
    pub hub: Option<String>,
    /// What becomes of sandboxes when the daemon ends.
    pub on_exit: OnExit,
    /// How many processes wait ready to fork.
    pub ready: usize,
    /// How much at a time.
    pub limits: DaemonLimits,
    /// The file with one line for each action; none is written without it.
    pub audit_log: Option<PathBuf>,
    /// The most that the chunk cache may hold, bytes, and what it leaves free.
    pub cache: (u64, Option<u64>),
}

/// Where a daemon listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Listen {
    /// A Unix socket, which is this user's alone.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl Listen {
    /// The Unix socket's path.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Listen::Unix(path) => Some(path.clone()),
            Listen::Tcp(_) => None,
        }
    }
}

/// PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// The certificate and what leads from it to a root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What becomes of sandboxes when the daemon ends, however it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnExit {
    /// They live on, and the next daemon finds them.
    Keep,
    /// They end.
    End,
}

/// The most that a daemon has at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonLimits {
    /// Sandboxes that live.
    pub sandboxes: usize,
    /// Connections.
    pub connections: usize,
    /// Execs, copies and evaluations that run.
    pub streams: usize,
    /// Bytes of a file that is written.
    pub file_bytes: u64,
}
