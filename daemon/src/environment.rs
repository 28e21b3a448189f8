//! What both roles take from the environment: forkd's directories, and the log.

use forkd_engine::local::paths::{Paths, PathsError};
use std::path::PathBuf;
use tracing_subscriber::EnvFilter;

/// forkd's directories, of this user.
pub fn paths() -> Result<Paths, PathsError> {
    Paths::resolve(|name| std::env::var_os(name).map(PathBuf::from), rustix::process::geteuid().as_raw())
}

/// Log lines go to stderr, filtered by `FORKD_LOG`, or else by `fallback`.
pub fn start_logging(fallback: &str) {
    let filter = EnvFilter::try_from_env("FORKD_LOG").unwrap_or_else(|_| EnvFilter::new(fallback));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    // A second call in one process (tests) keeps the first subscriber: harmless.
    let _ = subscriber.with_writer(std::io::stderr).try_init();
}
