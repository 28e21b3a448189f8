//! Where forkd's directories are, by the environment.

use std::path::PathBuf;

use forkd_engine::local::paths::{Paths, PathsError};

/// forkd's directories, of this user.
pub fn paths() -> Result<Paths, PathsError> {
    Paths::resolve(|name| std::env::var_os(name).map(PathBuf::from), rustix::process::geteuid().as_raw())
}
