//! The byte stream between the host and the agent: frames, requests, responses.
//!
//! One request per connection. A frame is `kind: u8, length: u32 little endian, payload`, the payload at most
//! [`MAX_PAYLOAD`] bytes. Control frames carry one JSON document, the others raw bytes:
//!
//! ```text
//! kind 0  control   host -> agent: Request; agent -> host: Response
//! kind 1  stdin     host -> agent: input of an exec, contents of a put, an archive; an empty frame ends it
//! kind 2  stdout    agent -> host: output of an exec, contents of a get, an archive
//! kind 3  stderr    agent -> host: output of an exec; what an archive lacks
//! ```
//!
//! What follows each request:
//!
//! ```text
//! ping                        Pong
//! status                      Status             (with wait: once the worker is no longer starting)
//! exec   stdin*               Started, (stdout | stderr)*, Exited  (with detach: Started)
//!        signal, resize       may follow at any time while the process runs
//! eval                        Answer
//! put    stdin* stdin(empty)  Ok                 (the file appears at once, with its last byte)
//! get                         File, stdout*, Ok
//! pack                        Started, (stdout | stderr)*, Ok
//! unpack stdin* stdin(empty)  Started, Ok        (the first stdin frame after Started)
//! snapshot                    Ok                 (then the host closes, and the machine rings the doorbell)
//! connect                     Ok                 (then raw bytes both ways, no frames; see [`Request::Connect`])
//! ```
//!
//! Any request may be answered with `Error` instead, at any point; it is then the last frame. A host that closes its
//! connection gives up the request: an exec's process group is killed (with a terminal: hung up), an unfinished put leaves
//! no file.
//!
//! Requests and fields that came later are sent only when they are used, so that older agents serve all others. What an
//! agent does not know it refuses with [`NOT_UNDERSTOOD`].

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The vsock port the agent listens on.
pub const PORT: u32 = 5252;
/// Longest payload of one frame in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes in front of every payload.
pub const HEADER_LEN: usize = 5;
/// Longest file `put` takes and `get` gives, in bytes.
pub const MAX_FILE_LEN: u64 = 4 << 30;

/// An agent's words for a request that it does not know, or that has a field which it does not know.
pub const NOT_UNDERSTOOD: &str = "control frame does not hold the JSON expected";

/// What a frame's payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// One JSON document.
    Control = 0,
    /// Bytes for the process or the file inside; empty means the end.
    Stdin = 1,
    /// Bytes the process wrote to its standard output, or a file's contents.
    Stdout = 2,
    /// Bytes the process wrote to its standard error.
    Stderr = 3,
}

impl TryFrom<u8> for FrameKind {
    type Error = ProtocolError;

    fn try_from(byte: u8) -> Result<Self, ProtocolError> {
        match byte {
            0 => Ok(Self::Control),
            1 => Ok(Self::Stdin),
            2 => Ok(Self::Stdout),
            3 => Ok(Self::Stderr),
            other => Err(ProtocolError::Kind(other)),
        }
    }
}

/// Why a stream of frames cannot be read on.
#[derive(Debug, Error)]
pub enum ProtocolError {
    /// The first byte of a frame is no [`FrameKind`].
    #[error("frame kind {0} does not exist")]
    Kind(u8),
    /// A frame longer than the limit.
    #[error("frame of {len} bytes is longer than the {MAX_PAYLOAD} bytes allowed")]
    TooLong {
        /// The announced or attempted length in bytes.
        len: usize,
    },
    /// The stream ended within a frame.
    #[error("the stream ended in the middle of a frame")]
    Truncated,
    /// A control frame that is not the JSON expected.
    #[error("{NOT_UNDERSTOOD}")]
    Json {
        /// What the JSON reader said.
        source: serde_json::Error,
    },
    /// The stream itself failed.
    #[error("the stream cannot be read or written")]
    Io {
        /// The operating system's error.
        #[from]
        source: io::Error,
    },
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is.
    pub kind: FrameKind,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// The five bytes in front of a payload of `len` bytes.
///
/// # Errors
/// [`ProtocolError::TooLong`].
pub fn encode_header(kind: FrameKind, len: usize) -> Result<[u8; HEADER_LEN], ProtocolError> {
    if len > MAX_PAYLOAD {
        return Err(ProtocolError::TooLong { len });
    }
    let [a, b, c, d] = (len as u32).to_le_bytes();
    Ok([kind as u8, a, b, c, d])
}

/// The kind and the payload's length in a header, both checked.
///
/// # Errors
/// [`ProtocolError::Kind`], [`ProtocolError::TooLong`].
pub fn decode_header(header: [u8; HEADER_LEN]) -> Result<(FrameKind, usize), ProtocolError> {
    let [kind, a, b, c, d] = header;
    let kind = FrameKind::try_from(kind)?;
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len > MAX_PAYLOAD {
        return Err(ProtocolError::TooLong { len });
    }
    Ok((kind, len))
}

/// Writes one frame with a single `write_all`.
///
/// # Errors
/// [`ProtocolError::TooLong`], [`ProtocolError::Io`].
pub fn write_frame(writer: &mut impl Write, kind: FrameKind, payload: &[u8]) -> Result<(), ProtocolError> {
    let header = encode_header(kind, payload.len())?;
    let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
    frame.extend_from_slice(&header);
    frame.extend_from_slice(payload);
    writer.write_all(&frame)?;
    Ok(())
}

/// Writes one control frame.
///
/// # Errors
/// As [`write_frame`], and [`ProtocolError::Json`] for a value JSON cannot hold.
pub fn write_control(writer: &mut impl Write, message: &impl Serialize) -> Result<(), ProtocolError> {
    write_frame(writer, FrameKind::Control, &encode_control(message)?)
}

/// Reads one frame; `None` at a clean end between two frames.
///
/// Memory grows with what arrives, not with what the header announces.
///
/// # Errors
/// [`ProtocolError`] as its variants say.
pub fn read_frame(reader: &mut impl Read) -> Result<Option<Frame>, ProtocolError> {
    let mut header = [0; HEADER_LEN];
    let mut filled = 0;
    while filled < HEADER_LEN {
        match reader.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(ProtocolError::Truncated),
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (kind, len) = decode_header(header)?;
    let mut payload = Vec::new();
    reader.take(len as u64).read_to_end(&mut payload)?;
    if payload.len() < len {
        return Err(ProtocolError::Truncated);
    }
    Ok(Some(Frame { kind, payload }))
}

/// The JSON of a control frame.
///
/// # Errors
/// [`ProtocolError::Json`].
pub fn encode_control(message: &impl Serialize) -> Result<Vec<u8>, ProtocolError> {
    serde_json::to_vec(message).map_err(|source| ProtocolError::Json { source })
}

/// Reads the JSON of a control frame.
///
/// # Errors
/// [`ProtocolError::Json`].
pub fn decode_control<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, ProtocolError> {
    serde_json::from_slice(payload).map_err(|source| ProtocolError::Json { source })
}

/// What the host asks, once per connection ([`Request::Signal`] and [`Request::Resize`] excepted).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Are you there?
    Ping,
    /// How is the warm worker?
    Status {
        /// Answer only once the worker is no longer starting.
        #[serde(default)]
        wait: bool,
    },
    /// Run a program.
    Exec(ExecRequest),
    /// Have the warm worker evaluate some code.
    Eval {
        /// In the worker's language.
        code: String,
    },
    /// Close everything and ring the doorbell for a snapshot.
    Snapshot,
    /// Ring the doorbell for a snapshot in the midst of work. The machine that is asked goes on as if nothing had been, and
    /// answers; in its copies all connections have ended.
    Branch,
    /// Write a file.
    Put {
        /// Absolute path inside the machine.
        path: String,
        /// Permission bits, `0o7777` at most.
        mode: u32,
    },
    /// Read a regular file.
    Get {
        /// Absolute path inside the machine.
        path: String,
    },
    /// Connect to a TCP port of the machine's own loopback.
    ///
    /// After `Ok` the connection is that stream and has no frames any more. Each direction ends by itself (half-close); a
    /// side that fails closes the whole connection, which the other sees as a reset.
    Connect {
        /// TCP port, on 127.0.0.1 or else on `::1`.
        port: u16,
    },
    /// Send a signal to the process group of the exec running on this connection.
    Signal {
        /// Linux signal number, 1 to 31.
        signal: i32,
    },
    /// The window of the exec running on this connection has another size now.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters in a line.
        cols: u16,
    },
    /// Send files as a tar stream.
    Pack(PackRequest),
    /// Take a tar stream and make files of it.
    Unpack(UnpackRequest),
}

/// Files to send as a tar stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackRequest {
    /// Absolute path inside the machine.
    pub path: String,
    /// What it is called in the archive.
    pub name: String,
    /// Send what links lead to in place of links.
    pub follow: bool,
}

/// A tar stream to make files of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnpackRequest {
    /// Absolute path inside the machine.
    pub path: String,
    /// What the archive holds; `None` when it is anybody's, for a directory that exists.
    pub source: Option<CopySource>,
    /// Keep the archive's user and group ids; otherwise all is root's.
    pub keep_owners: bool,
}

/// What is copied, as far as the rules of where it goes depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopySource {
    /// The last part of its path.
    pub name: String,
    /// Whether it is a directory.
    pub directory: bool,
    /// Whether its path ends with `/.`: what is in it, and not itself.
    pub contents: bool,
}

/// A program to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program and arguments; a program without a slash is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Added to, and overriding, the agent's own small environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/` when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Whether stdin frames follow; otherwise the process reads `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// A terminal for the process, instead of pipes. Its output comes as stdout frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<Tty>,
    /// Whose process it is, `NAME|UID[:GROUP|GID]`; root's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Start it as a login does: in the user's home directory, and without `argv` the user's shell.
    #[serde(default, skip_serializing_if = "is_false")]
    pub login: bool,
    /// Nobody waits for it: no input, no output, and it outlives the connection.
    #[serde(default, skip_serializing_if = "is_false")]
    pub detach: bool,
}

/// A terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tty {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
    /// What it can do: `TERM` of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub term: Option<String>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Response {
    /// To `ping`.
    Pong,
    /// To `status`.
    Status(Status),
    /// To `exec`: the process exists.
    Started {
        /// Process id inside the machine; also its process group.
        pid: u32,
    },
    /// To `exec`: the process ended, and this is the last frame.
    Exited(Exit),
    /// To `eval`.
    Answer(Answer),
    /// To `get`: contents follow.
    File {
        /// Length in bytes when the file was opened.
        len: u64,
        /// Permission bits.
        mode: u32,
    },
    /// The request is done, or for `snapshot`, accepted.
    Ok,
    /// The request failed.
    Error {
        /// What failed and why, for a person.
        message: String,
        /// For a program that cannot be started, the exit code of shells: 127 for one that is not there, 126 for one
        /// that cannot be run.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        code: Option<u8>,
    },
}

impl Response {
    /// An error without an exit code.
    pub fn error(message: impl Into<String>) -> Response {
        Response::Error { message: message.into(), code: None }
    }
}

/// How a process ended: exactly one of the two is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, 0 to 255.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

/// What the warm worker made of some code.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The value, written as the worker's language writes values; absent when the code has none or failed.
    #[serde(default)]
    pub answer: Option<String>,
    /// Why the code failed.
    #[serde(default)]
    pub error: Option<String>,
    /// What the code printed.
    #[serde(default)]
    pub output: Option<String>,
}

/// The state of the warm worker and of the machine around it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The warm worker's state.
    pub worker: WorkerState,
    /// 0 in the original machine, else which fork this is.
    pub generation: u64,
    /// Requests being served, this one included.
    pub connections: u32,
}

/// Life of the warm worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum WorkerState {
    /// The machine's recipe names no warm command.
    None,
    /// Started, not yet ready.
    Starting,
    /// Printed `{"ready":true}`; evals are answered.
    Ready,
    /// Could not be started, ended, or broke the line protocol.
    Failed {
        /// What happened, for a person.
        reason: String,
        /// How it ended, when it did.
        exit: Exit,
        /// The end of what it wrote to its standard error.
        stderr: String,
    },
}

/// `/forkd/warm.json` in the root disk: what PID 1 reads at boot, written by the recipe's build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineFile {
    /// The warm worker; `None` for a machine without one.
    #[serde(default)]
    pub warm: Option<WarmCommand>,
    /// Host name before any fork.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Added to the environment of all that the agent starts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Started one after the other, before the warm worker.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ServiceCommand>,
}

/// A program that runs beside the warm worker. It has no input, and its output is the console's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceCommand {
    /// What messages call it.
    pub name: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Whose process it is, `NAME|UID[:GROUP|GID]`; root's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// What shows that it is ready; without, it is as soon as it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<Ready>,
    /// Seconds that this may take.
    #[serde(default = "service_timeout_s")]
    pub timeout_s: u32,
}

const fn service_timeout_s() -> u32 {
    120
}

/// What shows that a service is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ready {
    /// A connection to this TCP port of the machine's loopback is accepted.
    Tcp(u16),
    /// This program, run as the service's user, ends with code 0.
    Exec(Vec<String>),
    /// A GET of this `http://` URL is answered with a status below 400.
    Http(String),
    /// It writes a line that contains this.
    Line(String),
}

/// The warm worker: a process that prints `{"ready":true}` and then answers one line of JSON with one line of JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmCommand {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the agent's own small environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/` when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Whose process it is, `NAME|UID[:GROUP|GID]`; root's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Kernel parameter that overrides the machine file's warm command; the kernel hands it to PID 1 as environment.
pub const WARM_PARAMETER: &str = "FORKD_WARM";

impl WarmCommand {
    /// The value of [`WARM_PARAMETER`]: JSON in hexadecimal, so that no shell or kernel rule of quoting applies.
    ///
    /// # Errors
    /// When it does not encode.
    pub fn to_parameter(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_vec(self)?.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Reads what [`WarmCommand::to_parameter`] wrote; `None` when it is something else.
    #[must_use]
    pub fn from_parameter(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        let json: Vec<u8> = digits.chunks(2).map(byte).collect::<Option<_>>()?;
        serde_json::from_slice(&json).ok()
    }
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
