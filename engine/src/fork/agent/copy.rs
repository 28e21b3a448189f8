//! Archives in and out of the machine, as streams without a deadline: who waits may interrupt.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use forkd_abi::frames::{FrameReader, FrameWriter};
use forkd_abi::protocol::{
    FrameKind, PackRequest, ProtocolError, Request, Response, UnpackRequest, write_control, write_frame,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::AgentClient;
use super::error::ClientError;
use super::timed::{Deadline, Timed, response, unexpected};
use crate::interrupt::{Interrupt, Interrupted};

/// How often a stream that stands still looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(100);
/// Most bytes that may follow an archive's end.
const REST_MAX: u64 = 1 << 20;

impl AgentClient {
    /// Has the machine pack files, and returns the archive as it comes.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when there is nothing to read there, and the others.
    pub fn pack(
        self,
        request: PackRequest,
        interrupt: &Interrupt,
        timeout: Duration,
    ) -> Result<Incoming, ClientError> {
        let stream = self.begin(&Request::Pack(request), interrupt, timeout)?;
        Ok(Incoming { frames: FrameReader::new(stream, FrameKind::Stdout) })
    }

    /// Has the machine make files of an archive, which is then written to what this returns.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when it cannot go there, and the others.
    pub fn unpack(
        self,
        request: UnpackRequest,
        interrupt: &Interrupt,
        timeout: Duration,
    ) -> Result<Outgoing, ClientError> {
        let stream = self.begin(&Request::Unpack(request), interrupt, timeout)?;
        Ok(Outgoing { frames: FrameWriter::new(stream, FrameKind::Stdin) })
    }

    fn begin(
        self,
        request: &Request,
        interrupt: &Interrupt,
        timeout: Duration,
    ) -> Result<Patient, ClientError> {
        let mut stream = Timed::new(self.stream, Deadline::within(timeout));
        write_control(&mut stream, request).map_err(|error| stream.explain(error))?;
        let frame = stream.next()?;
        match response(&frame)? {
            Response::Started { .. } => Patient::new(stream.stream, interrupt),
            other => Err(unexpected(&other)),
        }
    }
}

/// An archive that comes from a machine.
#[derive(Debug)]
pub struct Incoming {
    frames: FrameReader<Patient>,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.frames.read(buffer)
    }
}

impl Incoming {
    /// Hears how the packing went, and what was left out.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when the machine could not read everything, and the others.
    pub fn finish(mut self) -> Result<Vec<String>, ClientError> {
        let rest = io::copy(&mut (&mut self.frames).take(REST_MAX), &mut io::sink()).map_err(broken)?;
        if rest == REST_MAX {
            return Err(ClientError::Unexpected { what: "more than the archive" });
        }
        let (control, notes) = self.frames.into_end();
        match response(&control.ok_or(ClientError::Closed)?)? {
            Response::Ok => Ok(notes),
            other => Err(unexpected(&other)),
        }
    }
}

/// An archive that goes to a machine.
#[derive(Debug)]
pub struct Outgoing {
    frames: FrameWriter<Patient>,
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.frames.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.frames.flush()
    }
}

impl Outgoing {
    /// Ends the archive and hears what became of it; to be called too when writing failed, for the machine's reason.
    ///
    /// # Errors
    /// [`ClientError::Agent`] when the machine could not make everything, and the others.
    pub fn finish(mut self) -> Result<(), ClientError> {
        let sent = self.frames.flush().map_err(ProtocolError::from);
        let stream = self.frames.inner();
        let sent = sent.and_then(|()| write_frame(stream, FrameKind::Stdin, b""));
        let mut answer = FrameReader::new(stream, FrameKind::Stdout);
        let read = answer.read(&mut [0; 1]);
        let answer = answer.into_end().0.map(|frame| response(&frame));
        match (answer, sent, read) {
            (Some(Ok(Response::Ok)), Ok(()), _) => Ok(()),
            (Some(Err(error)), ..) => Err(error),
            (_, Err(source), _) => Err(ClientError::Protocol { source }),
            (Some(Ok(other)), ..) => Err(unexpected(&other)),
            (None, _, Err(error)) => Err(broken(error)),
            (None, _, Ok(_)) => Err(ClientError::Unexpected { what: "a data frame" }),
        }
    }
}

fn broken(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            ClientError::Closed
        }
        _ => ClientError::Protocol { source: error.into() },
    }
}

/// A stream that waits as long as it takes, unless it is interrupted.
#[derive(Debug)]
struct Patient {
    stream: UnixStream,
    interrupt: Interrupt,
}

impl Patient {
    fn new(stream: UnixStream, interrupt: &Interrupt) -> Result<Patient, ClientError> {
        let times = stream.set_read_timeout(Some(LOOK)).and_then(|()| stream.set_write_timeout(Some(LOOK)));
        times.map_err(|error| ClientError::Protocol { source: error.into() })?;
        Ok(Patient { stream, interrupt: interrupt.clone() })
    }

    fn patiently(
        &mut self,
        mut attempt: impl FnMut(&mut UnixStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            self.interrupt.check().map_err(|Interrupted| io::Error::other(Interrupted))?;
            match attempt(&mut self.stream) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                result => return result,
            }
        }
    }

    /// Whether the machine has something to say, which in the middle of an archive is that it takes no more.
    fn has_answer(&self) -> bool {
        let mut ready = [PollFd::new(&self.stream, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut ready, Some(&now)).is_ok_and(|count| count > 0)
    }
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.patiently(|stream| stream.read(buffer))
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.has_answer() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.patiently(|stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
