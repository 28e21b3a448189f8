//! A connection to the agent: reaching it, and the requests with one response.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use forkd_abi::protocol::{Answer, PORT, Request, Response, Status, write_control};

use super::error::ClientError;
use super::timed::{Deadline, Timed, response, unexpected};

/// Longest answer to `CONNECT` that is read, in bytes.
pub(in crate::fork) const HANDSHAKE_MAX: usize = 32;
/// First and longest pause between two attempts to connect.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(25));

/// A connection to the agent of one machine, good for one request.
#[derive(Debug)]
pub struct AgentClient {
    pub(super) stream: UnixStream,
}

/// Whether a machine's answer to `CONNECT` is the line of one that accepts: `OK`, a number, and the line's end.
pub(in crate::fork) fn accepts(reply: &[u8]) -> bool {
    let number = reply.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n"));
    number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

impl AgentClient {
    /// Connects to the agent through a machine's vsock socket (`CONNECT 5252`, answered `OK n`), trying again until
    /// `timeout` is over: a machine that still boots refuses.
    ///
    /// # Errors
    /// [`ClientError::Connect`], [`ClientError::Handshake`], [`ClientError::Timeout`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        Self::retry(path, timeout, |deadline| {
            let mut stream = Timed::new(UnixStream::connect(path)?, deadline);
            stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
            let mut reply = Vec::new();
            while reply.last() != Some(&b'\n') && reply.len() < HANDSHAKE_MAX {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                reply.push(byte[0]);
            }
            if accepts(&reply) {
                Ok(Ok(Self { stream: stream.stream }))
            } else {
                let reply = String::from_utf8_lossy(&reply).into_owned();
                Ok(Err(ClientError::Handshake { path: path.to_owned(), reply }))
            }
        })
    }

    /// Connects to an agent that listens on a Unix socket itself (`forkd-agent --listen-unix`).
    ///
    /// # Errors
    /// [`ClientError::Connect`], [`ClientError::Timeout`].
    pub fn connect_direct(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        Self::retry(path, timeout, |_| Ok(Ok(Self { stream: UnixStream::connect(path)? })))
    }

    /// Runs `attempt` until it reports success or a final error, or the time is over.
    fn retry(
        path: &Path,
        timeout: Duration,
        mut attempt: impl FnMut(Deadline) -> io::Result<Result<Self, ClientError>>,
    ) -> Result<Self, ClientError> {
        let deadline = Deadline::within(timeout);
        let mut pause = RETRY.0;
        loop {
            let source = match attempt(deadline) {
                Ok(result) => return result,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(ClientError::Timeout { after: timeout });
                }
                Err(error) => error,
            };
            match deadline.left() {
                Some(left) if !left.is_zero() => thread::sleep(pause.min(left)),
                _ => return Err(ClientError::Connect { path: path.to_owned(), source }),
            }
            pause = (pause * 2).min(RETRY.1);
        }
    }

    /// Asks whether the agent is there.
    ///
    /// # Errors
    /// [`ClientError`] as its variants say.
    pub fn ping(self, timeout: Duration) -> Result<(), ClientError> {
        match self.ask(&Request::Ping, timeout)? {
            Response::Pong => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The state of the machine and its warm worker; with `wait`, once the worker is no longer starting.
    ///
    /// # Errors
    /// [`ClientError`] as its variants say.
    pub fn status(self, wait: bool, timeout: Duration) -> Result<Status, ClientError> {
        match self.ask(&Request::Status { wait }, timeout)? {
            Response::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the warm worker evaluate code. An error the code raised is in the answer, not an `Err`.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when there is no worker or it has failed, and the others.
    pub fn eval(self, code: &str, timeout: Duration) -> Result<Answer, ClientError> {
        match self.ask(&Request::Eval { code: code.to_owned() }, timeout)? {
            Response::Answer(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the machine ring for a snapshot. It does so once this returns, which closes the connection.
    ///
    /// # Errors
    /// [`ClientError`] as its variants say.
    pub fn snapshot(self, timeout: Duration) -> Result<(), ClientError> {
        self.ask_for_ok(&Request::Snapshot, timeout)
    }

    /// Has the machine ring for a snapshot in the midst of its work. Returns once it goes on behind it.
    ///
    /// # Errors
    /// [`ClientError`] as its variants say; [`ClientError::Agent`] also from an agent that is too old to know the request.
    pub fn branch(self, timeout: Duration) -> Result<(), ClientError> {
        self.ask_for_ok(&Request::Branch, timeout)
    }

    fn ask_for_ok(self, request: &Request, timeout: Duration) -> Result<(), ClientError> {
        match self.ask(request, timeout)? {
            Response::Ok => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends one request and reads the one response.
    pub(super) fn ask(self, request: &Request, timeout: Duration) -> Result<Response, ClientError> {
        let mut stream = Timed::new(self.stream, Deadline::within(timeout));
        write_control(&mut stream, request).map_err(|error| stream.explain(error))?;
        let frame = stream.next()?;
        response(&frame)
    }
}
