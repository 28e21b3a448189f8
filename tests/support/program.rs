//! Which forkd the tests run.

use std::path::PathBuf;

/// The one that `FORKD_UNDER_TEST` names, as `make test` does with the static one that it has built, or cargo's own.
pub fn forkd() -> PathBuf {
    std::env::var_os("FORKD_UNDER_TEST").map_or_else(|| env!("CARGO_BIN_EXE_forkd").into(), PathBuf::from)
}
