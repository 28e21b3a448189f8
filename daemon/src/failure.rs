//! Why the daemon does not start, or ends.

use crate::tokens::TokensError;
use forkd_engine::local::paths::PathsError;
use std::io;
use std::path::PathBuf;

/// Why the daemon does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// What it was told.
    #[error("the options are not those of this version of forkd")]
    Options(#[source] serde_json::Error),
    /// forkd's directories.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The async runtime.
    #[error("the async runtime does not start")]
    Runtime(#[source] io::Error),
    /// Another daemon has this run directory.
    #[error("a daemon runs already: it has locked {}", path.display())]
    Running {
        /// The lock.
        path: PathBuf,
    },
    /// A file or socket.
    #[error("{operation} {place} failed")]
    Place {
        /// What was tried.
        operation: &'static str,
        /// On what.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// TCP without a token.
    #[error("whoever reaches a TCP port could use it: name a file with tokens")]
    NoToken,
    /// The tokens.
    #[error(transparent)]
    Tokens(#[from] TokensError),
    /// TLS on a Unix socket.
    #[error("a certificate is of use only to a TCP port")]
    TlsWithoutTcp,
    /// The certificate or its key.
    #[error("the certificate in {} and its key cannot be used", path.display())]
    Certificate {
        /// The certificate.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The failure of `operation` on `place`.
pub fn place_error(operation: &'static str, place: impl ToString) -> impl FnOnce(io::Error) -> ServeError {
    let place = place.to_string();
    move |source| ServeError::Place { operation, place, source }
}
