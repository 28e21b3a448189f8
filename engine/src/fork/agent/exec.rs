//! Running a program in the machine: its input, its output, signals, and how it ended.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forkd_abi::protocol::{ExecRequest, Exit, FrameKind, Request, Response, write_control, write_frame};

use super::connection::AgentClient;
use super::error::ClientError;
use super::timed::{Deadline, Timed, response, unexpected};

/// How long a signal waits for a gap in the input, and the pause between two looks.
const BUSY: Duration = Duration::from_millis(200);
const GAP: Duration = Duration::from_millis(2);
/// `SIGKILL`.
const KILL: i32 = 9;
/// Bytes sent in one stdin frame.
const CHUNK: usize = 64 << 10;

/// Sends signals to a running exec, from any thread.
#[derive(Debug, Clone)]
pub struct Signaller {
    writer: Arc<Writer>,
    /// The request has been sent, so that signals may follow it.
    asked: Arc<AtomicBool>,
}

/// The way to the machine, for whole frames of one thread at a time.
#[derive(Debug)]
struct Writer {
    turn: Mutex<()>,
    stream: UnixStream,
}

impl AgentClient {
    /// A handle for signals to the exec that is about to be started on this connection.
    ///
    /// # Errors
    /// [`ClientError::Protocol`] when the socket cannot be duplicated.
    pub fn signaller(&self) -> Result<Signaller, ClientError> {
        let stream = self.stream.try_clone().map_err(stream_failed)?;
        let writer = Arc::new(Writer { turn: Mutex::default(), stream });
        Ok(Signaller { writer, asked: Arc::default() })
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

    /// Starts a program that nobody waits for, and returns its process id.
    ///
    /// # Errors
    /// As [`AgentClient::exec`].
    pub fn start(self, request: ExecRequest, timeout: Duration) -> Result<u32, ClientError> {
        match self.ask(&Request::Exec(ExecRequest { detach: true, ..request }), timeout)? {
            Response::Started { pid } => Ok(pid),
            other => Err(unexpected(&other)),
        }
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
        signaller.asked.store(true, Ordering::Release);
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
        if matches!(exit, Err(ClientError::Timeout { .. })) {
            // A terminal that is hung up does not end what ignores that. No answer is waited for.
            let _ = signaller.send(KILL);
        }
        // Ends the input thread too, and the process if it still runs. A socket closed already is as good.
        let _ = stream.stream.shutdown(Shutdown::Both);
        exit
    }
}

impl Signaller {
    /// Sends a signal (1 to 31) to the process group of the exec.
    ///
    /// # Errors
    /// [`ClientError::Busy`] before the exec was asked for and while the input thread waits for the process to read,
    /// [`ClientError::Protocol`] when the exec has ended.
    pub fn send(&self, signal: i32) -> Result<(), ClientError> {
        self.write(&Request::Signal { signal })
    }

    /// Tells the exec's terminal its new size.
    ///
    /// # Errors
    /// As [`Signaller::send`].
    pub fn resize(&self, rows: u16, cols: u16) -> Result<(), ClientError> {
        self.write(&Request::Resize { rows, cols })
    }

    /// Has nobody wait for the exec any longer: it is killed (with a terminal: hung up), and whoever waits hears that the
    /// connection is closed.
    pub fn give_up(&self) {
        // One that is closed already is as good.
        let _ = self.writer.stream.shutdown(Shutdown::Both);
    }

    fn write(&self, request: &Request) -> Result<(), ClientError> {
        let given_up = Instant::now() + BUSY;
        while self.asked.load(Ordering::Acquire) {
            if let Ok(_turn) = self.writer.turn.try_lock() {
                return write_control(&mut &self.writer.stream, request)
                    .map_err(|source| ClientError::Protocol { source });
            }
            // Input that flows leaves gaps; input that nobody reads does not.
            if Instant::now() > given_up {
                break;
            }
            thread::sleep(GAP);
        }
        Err(ClientError::Busy)
    }
}

/// Copies input until it or the connection ends.
fn send_input(stdin: &mut dyn Read, writer: &Writer) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let n = match stdin.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Input that cannot be read has ended, as far as the process is concerned.
            Err(_) => 0,
            Ok(n) => n,
        };
        let Ok(_turn) = writer.turn.lock() else { return };
        if write_frame(&mut &writer.stream, FrameKind::Stdin, &chunk[..n]).is_err() || n == 0 {
            return;
        }
    }
}

fn stream_failed(error: io::Error) -> ClientError {
    ClientError::Protocol { source: error.into() }
}
