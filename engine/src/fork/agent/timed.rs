//! A request's stream with its deadline, and the responses read from it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use forkd_abi::protocol::{
    Frame, FrameKind, NOT_UNDERSTOOD, ProtocolError, Response, decode_control, read_frame,
};

use super::error::ClientError;

/// The response in a control frame; the agent's own errors become [`ClientError::Agent`].
pub(super) fn response(frame: &Frame) -> Result<Response, ClientError> {
    if frame.kind != FrameKind::Control {
        return Err(ClientError::Unexpected { what: "a data frame" });
    }
    match decode_control(&frame.payload) {
        Ok(Response::Error { message, .. }) if message == NOT_UNDERSTOOD => Err(ClientError::Outdated),
        Ok(Response::Error { message, code: Some(code) }) => Err(ClientError::NotStarted { message, code }),
        Ok(Response::Error { message, code: None }) => Err(ClientError::Agent { message }),
        Ok(response) => Ok(response),
        Err(source) => Err(ClientError::Protocol { source }),
    }
}

/// The error for a response that does not belong to the request.
pub(super) fn unexpected(response: &Response) -> ClientError {
    let what = match response {
        Response::Pong => "a pong",
        Response::Status(_) => "a status",
        Response::Started { .. } => "a started process",
        Response::Exited(_) => "an ended process",
        Response::Answer(_) => "an answer",
        Response::File { .. } => "a file",
        Response::Ok => "an ok",
        Response::Error { .. } => "an error",
    };
    ClientError::Unexpected { what }
}

/// When a request must be over, and how long it was given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    at: Option<Instant>,
    given: Duration,
}

impl Deadline {
    pub(super) fn within(timeout: Duration) -> Self {
        // So far away that the clock cannot hold it is no deadline.
        Self { at: Instant::now().checked_add(timeout), given: timeout }
    }

    pub(super) fn maybe(timeout: Option<Duration>) -> Self {
        timeout.map_or(Self { at: None, given: Duration::MAX }, Self::within)
    }

    /// Time left, zero when it is over; `None` without a deadline.
    pub(super) fn left(&self) -> Option<Duration> {
        self.at.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

/// A stream whose every operation fails with `TimedOut` once the deadline has passed.
pub(super) struct Timed {
    pub(super) stream: UnixStream,
    deadline: Deadline,
}

impl Timed {
    pub(super) fn new(stream: UnixStream, deadline: Deadline) -> Self {
        Self { stream, deadline }
    }

    /// Time for the next operation; never zero, which would mean "for ever" to the socket.
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.left() {
            Some(Duration::ZERO) => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(left),
        }
    }

    /// The next frame.
    pub(super) fn next(&mut self) -> Result<Frame, ClientError> {
        match read_frame(self) {
            Ok(Some(frame)) => Ok(frame),
            Ok(None) | Err(ProtocolError::Truncated) => Err(ClientError::Closed),
            Err(error) => Err(self.explain(error)),
        }
    }

    /// The error of the request whose stream failed so.
    pub(super) fn explain(&self, error: ProtocolError) -> ClientError {
        match error {
            ProtocolError::Io { source } if source.kind() == io::ErrorKind::TimedOut => {
                ClientError::Timeout { after: self.deadline.given }
            }
            ProtocolError::Io { source }
                if matches!(source.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                ClientError::Closed
            }
            source => ClientError::Protocol { source },
        }
    }
}

/// A socket's timeout shows as `WouldBlock`.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer).map_err(timed_out)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
