//! Why a request to the agent failed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use forkd_abi::protocol::ProtocolError;
use thiserror::Error;

/// Why a request to the agent failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket cannot be reached, or nothing in the machine listens.
    #[error("no agent answers at {}", path.display())]
    Connect {
        /// The machine's vsock socket.
        path: PathBuf,
        /// The last attempt's error.
        source: io::Error,
    },
    /// Something else listens on the socket.
    #[error("{} answered CONNECT with {reply:?}", path.display())]
    Handshake {
        /// The machine's vsock socket.
        path: PathBuf,
        /// What came, at most `HANDSHAKE_MAX` bytes.
        reply: String,
    },
    /// The deadline has passed.
    #[error("the agent did not finish within {} ms", after.as_millis())]
    Timeout {
        /// How long the request was given.
        after: Duration,
    },
    /// The agent closed the connection without an answer: usually the machine ended.
    #[error("the agent closed the connection before it answered")]
    Closed,
    /// The agent refused, or failed at, the request.
    #[error("{message}")]
    Agent {
        /// The agent's words.
        message: String,
    },
    /// The program of an exec cannot be started.
    #[error("{message}")]
    NotStarted {
        /// The agent's words.
        message: String,
        /// What shells exit with: 127 for a program that is not there, 126 for one that cannot be run.
        code: u8,
    },
    /// The agent does not know the request, or something that it asks for.
    #[error("the machine's agent is of an older forkd and does not know this request")]
    Outdated,
    /// An answer that does not belong to the request.
    #[error("the agent sent {what} where it has no place")]
    Unexpected {
        /// The kind of frame or response.
        what: &'static str,
    },
    /// A file longer than the caller allows.
    #[error("the file is longer than the {limit} bytes allowed")]
    FileTooLong {
        /// The caller's limit.
        limit: u64,
    },
    /// A signal cannot be sent while the process does not take its input.
    #[error("the connection is busy with input the process does not read")]
    Busy,
    /// The caller's reader or writer failed.
    #[error("local input or output failed")]
    Local {
        /// Its error.
        source: io::Error,
    },
    /// The byte stream is not the protocol, or broke.
    #[error("the connection to the agent failed")]
    Protocol {
        /// What is wrong with it.
        source: ProtocolError,
    },
}
