//! A byte stream of any length in frames of one kind, as archives are sent: blocking, with buffers of one frame.

use std::io::{self, Read, Write};

use crate::protocol::{
    Frame, FrameKind, HEADER_LEN, MAX_PAYLOAD, ProtocolError, decode_header, encode_header, read_frame,
};

/// Most notes (stderr frames) that are kept of one stream.
const NOTES_MAX: usize = 100;
/// Most bytes of each.
const NOTE_LEN_MAX: usize = 4096;

/// Writes what it is given in frames as long as they may be.
#[derive(Debug)]
pub struct FrameWriter<W: Write> {
    inner: W,
    kind: FrameKind,
    frame: Vec<u8>,
}

impl<W: Write> FrameWriter<W> {
    /// Frames of `kind` for `inner`.
    pub fn new(inner: W, kind: FrameKind) -> Self {
        let mut frame = Vec::with_capacity(HEADER_LEN + MAX_PAYLOAD);
        frame.resize(HEADER_LEN, 0);
        Self { inner, kind, frame }
    }

    /// What is written to, for frames of other kinds; [`Write::flush`] comes first.
    pub fn inner(&mut self) -> &mut W {
        &mut self.inner
    }
}

impl<W: Write> Write for FrameWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.frame.len() == HEADER_LEN + MAX_PAYLOAD {
            self.flush()?;
        }
        let n = bytes.len().min(HEADER_LEN + MAX_PAYLOAD - self.frame.len());
        self.frame.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        let len = self.frame.len() - HEADER_LEN;
        if len > 0 {
            let header = encode_header(self.kind, len).map_err(io::Error::other)?;
            self.frame[..HEADER_LEN].copy_from_slice(&header);
            self.inner.write_all(&self.frame)?;
            self.frame.truncate(HEADER_LEN);
        }
        Ok(())
    }
}

/// Reads the contents of all frames of one kind, up to an empty one or the first control frame.
#[derive(Debug)]
pub struct FrameReader<R: Read> {
    inner: R,
    kind: FrameKind,
    left: usize,
    ended: bool,
    control: Option<Frame>,
    notes: Vec<String>,
}

impl<R: Read> FrameReader<R> {
    /// The contents of frames of `kind` from `inner`.
    pub fn new(inner: R, kind: FrameKind) -> Self {
        Self { inner, kind, left: 0, ended: false, control: None, notes: Vec::new() }
    }

    /// The control frame that ended the stream, and what came in stderr frames.
    pub fn into_end(self) -> (Option<Frame>, Vec<String>) {
        (self.control, self.notes)
    }

    /// Goes to the next frame of the kind. `false` at the end.
    fn next(&mut self) -> Result<bool, ProtocolError> {
        while !self.ended && self.left == 0 {
            let mut header = [0; HEADER_LEN];
            self.inner.read_exact(&mut header)?;
            let (kind, len) = decode_header(header)?;
            if kind == self.kind {
                self.left = len;
                self.ended = len == 0;
                continue;
            }
            let frame = read_frame(&mut header.as_slice().chain(&mut self.inner))?;
            let frame = frame.ok_or(ProtocolError::Truncated)?;
            match kind {
                FrameKind::Stderr if self.notes.len() < NOTES_MAX => {
                    let shown = frame.payload.len().min(NOTE_LEN_MAX);
                    self.notes.push(String::from_utf8_lossy(&frame.payload[..shown]).into_owned());
                }
                FrameKind::Stderr => {}
                _ => {
                    self.control = Some(frame);
                    self.ended = true;
                }
            }
        }
        Ok(!self.ended)
    }
}

impl<R: Read> Read for FrameReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let more = self.next().map_err(|error| match error {
            ProtocolError::Io { source } => source,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        })?;
        if !more {
            return Ok(0);
        }
        let want = buffer.len().min(self.left);
        let n = self.inner.read(&mut buffer[..want])?;
        if n == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Response, write_control, write_frame};

    #[test]
    fn a_stream_comes_through_in_frames_with_its_notes_and_its_end() {
        let data: Vec<u8> = (0..3 * MAX_PAYLOAD + 7).map(|i| (i % 251) as u8).collect();
        let mut stream = Vec::new();
        let mut writer = FrameWriter::new(&mut stream, FrameKind::Stdout);
        writer.write_all(&data).unwrap();
        writer.flush().unwrap();
        write_frame(writer.inner(), FrameKind::Stderr, b"a note").unwrap();
        write_control(writer.inner(), &Response::Ok).unwrap();
        let mut reader = FrameReader::new(stream.as_slice(), FrameKind::Stdout);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read == data);
        let (control, notes) = reader.into_end();
        assert_eq!((control.unwrap().kind, notes), (FrameKind::Control, vec!["a note".to_owned()]));
    }

    #[test]
    fn streams_that_break_off_are_errors() {
        let mut stream = Vec::new();
        write_frame(&mut stream, FrameKind::Stdout, b"abc").unwrap();
        for len in 0..stream.len() {
            let mut reader = FrameReader::new(&stream[..len], FrameKind::Stdout);
            assert!(reader.read_to_end(&mut Vec::new()).is_err(), "{len}");
        }
        let mut reader = FrameReader::new(&[2, 255, 255, 255, 255][..], FrameKind::Stdout);
        assert!(reader.read(&mut [0; 9]).is_err());
    }
}
