//! The host's side of the agent's protocol: blocking, one request per connection, a limit on everything.
//!
//! The guest is not trusted. Frames are bounded by [`forkd_abi::protocol`], a `get` by its caller, and every request has a
//! deadline that counts the whole request, so that a guest that answers a byte a second gains nothing by it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use forkd_abi::protocol::{
    Answer, ExecRequest, Exit, Frame, FrameKind, MAX_FILE_LEN, PORT, ProtocolError, Request, Response,
    Status, decode_control, read_frame, write_control, write_frame,
};

/// Bytes sent in one stdin frame.
const CHUNK: usize = 64 << 10;
/// Longest answer to `CONNECT` that is read, in bytes.
const HANDSHAKE_MAX: usize = 32;
/// First and longest pause between two attempts to connect.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(25));

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

/// A connection to the agent of one machine, good for one request.
#[derive(Debug)]
pub struct AgentClient {
    stream: UnixStream,
}

/// Permissions and length of a file that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes received.
    pub len: u64,
    /// Permission bits.
    pub mode: u32,
}

/// Sends signals to a running exec, from any thread.
#[derive(Debug, Clone)]
pub struct Signaller {
    writer: Arc<Mutex<UnixStream>>,
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
            let number = reply.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n"));
            if number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit)) {
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
        match self.ask(&Request::Snapshot, timeout)? {
            Response::Ok => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// A handle for signals to the exec that is about to be started on this connection.
    ///
    /// # Errors
    /// [`ClientError::Protocol`] when the socket cannot be duplicated.
    pub fn signaller(&self) -> Result<Signaller, ClientError> {
        Ok(Signaller { writer: Arc::new(Mutex::new(self.stream.try_clone().map_err(stream_failed)?)) })
    }

    /// Runs a program, copying `stdin` to it and its output to the two writers, and returns how it ended. With a
    /// `timeout`, a program that runs longer is killed.
    ///
    /// `stdin` is read on a thread of its own, which outlives this call if it is stuck in a read.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when the program cannot be started, and the others.
    pub fn exec(
        self,
        request: ExecRequest,
        stdin: Option<Box<dyn Read + Send>>,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
        timeout: Option<Duration>,
    ) -> Result<Exit, ClientError> {
        let signaller = self.signaller()?;
        self.exec_with(&signaller, request, stdin, stdout, stderr, timeout)
    }

    /// [`AgentClient::exec`] with a signaller made before, so that another thread may use it meanwhile.
    ///
    /// # Errors
    /// As [`AgentClient::exec`].
    pub fn exec_with(
        self,
        signaller: &Signaller,
        request: ExecRequest,
        stdin: Option<Box<dyn Read + Send>>,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
        timeout: Option<Duration>,
    ) -> Result<Exit, ClientError> {
        let mut stream = Timed::new(self.stream, Deadline::maybe(timeout));
        let request = Request::Exec(ExecRequest { stdin: stdin.is_some(), ..request });
        write_control(&mut stream, &request).map_err(|error| stream.explain(error))?;
        if let Some(mut stdin) = stdin {
            let writer = Arc::clone(&signaller.writer);
            thread::spawn(move || send_input(&mut stdin, &writer));
        }
        let exit = loop {
            let frame = match stream.next() {
                Ok(frame) => frame,
                Err(error) => break Err(error),
            };
            let written = match frame.kind {
                FrameKind::Stdout => stdout.write_all(&frame.payload).and_then(|()| stdout.flush()),
                FrameKind::Stderr => stderr.write_all(&frame.payload).and_then(|()| stderr.flush()),
                FrameKind::Stdin => break Err(ClientError::Unexpected { what: "a stdin frame" }),
                FrameKind::Control => match response(&frame) {
                    Ok(Response::Started { .. }) => Ok(()),
                    Ok(Response::Exited(exit)) => break Ok(exit),
                    Ok(other) => break Err(unexpected(&other)),
                    Err(error) => break Err(error),
                },
            };
            if let Err(source) = written {
                break Err(ClientError::Local { source });
            }
        };
        // Ends the input thread too, and the process if it still runs. A socket closed already is as good.
        let _ = stream.stream.shutdown(Shutdown::Both);
        exit
    }

    /// Writes a file in the machine: all of it or none. Returns its length in bytes.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when it cannot be written there, and the others.
    pub fn put(
        self,
        path: &str,
        mode: u32,
        contents: &mut dyn Read,
        timeout: Duration,
    ) -> Result<u64, ClientError> {
        let mut stream = Timed::new(self.stream, Deadline::within(timeout));
        let request = Request::Put { path: path.to_owned(), mode };
        let mut sent = write_control(&mut stream, &request);
        let mut chunk = vec![0; CHUNK];
        let mut total = 0;
        while sent.is_ok() {
            let n = match contents.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(|source| ClientError::Local { source })?,
            };
            total += n as u64;
            if total > MAX_FILE_LEN {
                return Err(ClientError::FileTooLong { limit: MAX_FILE_LEN });
            }
            // The empty frame is the end.
            sent = write_frame(&mut stream, FrameKind::Stdin, &chunk[..n]);
            if n == 0 {
                break;
            }
        }
        // An agent that refuses says why and closes: its words are worth more than the broken pipe.
        let answer = stream.next().and_then(|frame| response(&frame));
        match (answer, sent) {
            (Ok(Response::Ok), Ok(())) => Ok(total),
            (Err(error @ ClientError::Agent { .. }), _) => Err(error),
            (_, Err(error)) => Err(stream.explain(error)),
            (Ok(other), Ok(())) => Err(unexpected(&other)),
            (Err(error), Ok(())) => Err(error),
        }
    }

    /// Reads a regular file of at most `limit` bytes into `contents`.
    ///
    /// # Errors
    /// [`ClientError::FileTooLong`], [`ClientError::Agent`] when it cannot be read there, and the others.
    pub fn get(
        self,
        path: &str,
        contents: &mut dyn Write,
        limit: u64,
        timeout: Duration,
    ) -> Result<FileInfo, ClientError> {
        let mut stream = Timed::new(self.stream, Deadline::within(timeout));
        write_control(&mut stream, &Request::Get { path: path.to_owned() })
            .map_err(|error| stream.explain(error))?;
        let mode = match response(&stream.next()?)? {
            Response::File { len, .. } if len > limit => return Err(ClientError::FileTooLong { limit }),
            Response::File { mode, .. } => mode & 0o7777,
            other => return Err(unexpected(&other)),
        };
        let mut len = 0;
        loop {
            let frame = stream.next()?;
            if frame.kind != FrameKind::Stdout {
                return match response(&frame)? {
                    Response::Ok => Ok(FileInfo { len, mode }),
                    other => Err(unexpected(&other)),
                };
            }
            len += frame.payload.len() as u64;
            if len > limit {
                return Err(ClientError::FileTooLong { limit });
            }
            contents.write_all(&frame.payload).map_err(|source| ClientError::Local { source })?;
        }
    }

    /// Sends one request and reads the one response.
    fn ask(self, request: &Request, timeout: Duration) -> Result<Response, ClientError> {
        let mut stream = Timed::new(self.stream, Deadline::within(timeout));
        write_control(&mut stream, request).map_err(|error| stream.explain(error))?;
        let frame = stream.next()?;
        response(&frame)
    }
}

impl Signaller {
    /// Sends a signal (1 to 31) to the process group of the exec.
    ///
    /// # Errors
    /// [`ClientError::Busy`] while the input thread waits for the process to read, [`ClientError::Protocol`] when the
    /// exec has ended.
    pub fn send(&self, signal: i32) -> Result<(), ClientError> {
        let Ok(mut writer) = self.writer.try_lock() else { return Err(ClientError::Busy) };
        write_control(&mut *writer, &Request::Signal { signal })
            .map_err(|source| ClientError::Protocol { source })
    }
}

/// Copies input until it or the connection ends.
fn send_input(stdin: &mut dyn Read, writer: &Mutex<UnixStream>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let n = match stdin.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Input that cannot be read has ended, as far as the process is concerned.
            Err(_) => 0,
            Ok(n) => n,
        };
        let Ok(mut writer) = writer.lock() else { return };
        if write_frame(&mut *writer, FrameKind::Stdin, &chunk[..n]).is_err() || n == 0 {
            return;
        }
    }
}

/// The response in a control frame; the agent's own errors become [`ClientError::Agent`].
fn response(frame: &Frame) -> Result<Response, ClientError> {
    if frame.kind != FrameKind::Control {
        return Err(ClientError::Unexpected { what: "a data frame" });
    }
    match decode_control(&frame.payload) {
        Ok(Response::Error { message }) => Err(ClientError::Agent { message }),
        Ok(response) => Ok(response),
        Err(source) => Err(ClientError::Protocol { source }),
    }
}

fn unexpected(response: &Response) -> ClientError {
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

fn stream_failed(error: io::Error) -> ClientError {
    ClientError::Protocol { source: error.into() }
}

/// When a request must be over, and how long it was given.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Option<Instant>,
    given: Duration,
}

impl Deadline {
    fn within(timeout: Duration) -> Self {
        // So far away that the clock cannot hold it is no deadline.
        Self { at: Instant::now().checked_add(timeout), given: timeout }
    }

    fn maybe(timeout: Option<Duration>) -> Self {
        timeout.map_or(Self { at: None, given: Duration::MAX }, Self::within)
    }

    /// Time left, zero when it is over; `None` without a deadline.
    fn left(&self) -> Option<Duration> {
        self.at.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

/// A stream whose every operation fails with `TimedOut` once the deadline has passed.
struct Timed {
    stream: UnixStream,
    deadline: Deadline,
}

impl Timed {
    fn new(stream: UnixStream, deadline: Deadline) -> Self {
        Self { stream, deadline }
    }

    /// Time for the next operation; never zero, which would mean "for ever" to the socket.
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.left() {
            Some(Duration::ZERO) => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(left),
        }
    }

    fn next(&mut self) -> Result<Frame, ClientError> {
        match read_frame(self) {
            Ok(Some(frame)) => Ok(frame),
            Ok(None) | Err(ProtocolError::Truncated) => Err(ClientError::Closed),
            Err(error) => Err(self.explain(error)),
        }
    }

    fn explain(&self, error: ProtocolError) -> ClientError {
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
