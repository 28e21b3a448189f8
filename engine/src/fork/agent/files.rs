//! Single files in and out of the machine.

use std::io::{self, Read, Write};
use std::time::Duration;

use forkd_abi::protocol::{FrameKind, MAX_FILE_LEN, Request, Response, write_control, write_frame};

use super::connection::AgentClient;
use super::error::ClientError;
use super::timed::{Deadline, Timed, response, unexpected};

/// Bytes sent in one stdin frame.
const CHUNK: usize = 64 << 10;

/// Permissions and length of a file that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes received.
    pub len: u64,
    /// Permission bits.
    pub mode: u32,
}

impl AgentClient {
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
}
