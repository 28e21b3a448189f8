//! `forkd-agent --pack REQUEST` and `--unpack REQUEST`: serves one copy on its standard input, which is the host's
//! connection.
//!
//! A process of its own, so it may block, is no load on the agent, and writes to the connection itself: where a guest's
//! kernel is emulated, copying a byte from here to there in it is what a copy costs. It ends when the host goes away.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use forkd_abi::chain::chain;
use forkd_abi::frames::{FrameReader, FrameWriter};
use forkd_abi::protocol::{
    CopySource, FrameKind, PackRequest, Response, UnpackRequest, write_control, write_frame,
};
use forkd_archive::{Destination, Owners, Source, Totals, Unpacker, Watcher, pack, place};
use rustix::fs::Mode;
use serde::de::DeserializeOwned;

use crate::agent::files::absolute;
use crate::agent::program::{PACK, UNPACK};
use crate::agent::sys;

/// Most bytes to sleep for: a quarter of a connection's buffer (`VSOCK_DEFAULT_BUFFER_SIZE` of net/vmw_vsock/af_vsock.c),
/// so that the host goes on filling it.
const WAKE_MAX: usize = 64 << 10;

/// Whether `mode` is one of these.
pub fn serves(mode: &OsString) -> bool {
    mode == PACK || mode == UNPACK
}

/// Serves the request, and says in its last frame how that went.
pub fn run(mode: &OsString, request: Option<OsString>) -> ExitCode {
    let connection = match sys::inherited(0).and_then(|fd| {
        rustix::io::ioctl_fionbio(&fd, false)?;
        Ok(File::from(fd))
    }) {
        Ok(connection) => connection,
        Err(error) => {
            eprintln!("forkd-agent: {}: no connection to serve: {error}", mode.display());
            return ExitCode::FAILURE;
        }
    };
    rustix::process::umask(Mode::empty());
    let request = request.unwrap_or_default();
    let done = if mode == PACK {
        serve(&connection, &request, serve_pack)
    } else {
        serve(&connection, &request, serve_unpack)
    };
    let (response, exit) = match done {
        Ok(()) => (Response::Ok, ExitCode::SUCCESS),
        Err(message) => (Response::error(message), ExitCode::FAILURE),
    };
    // A host that has gone hears nothing.
    let _ = write_control(&mut &connection, &response);
    if mode == UNPACK {
        // Closing a connection with something unread in it could overtake the answer.
        let _ = io::copy(&mut &connection, &mut io::sink());
    }
    exit
}

fn serve<R: DeserializeOwned>(
    connection: &File,
    request: &OsStr,
    work: impl FnOnce(&File, &R) -> Result<(), String>,
) -> Result<(), String> {
    let request = serde_json::from_slice(request.as_encoded_bytes()).map_err(|error| error.to_string())?;
    work(connection, &request)
}

fn started(mut connection: &File) -> Result<(), String> {
    write_control(&mut connection, &Response::Started { pid: std::process::id() })
        .map_err(|error| error.to_string())
}

fn serve_pack(connection: &File, request: &PackRequest) -> Result<(), String> {
    absolute(&request.path)?;
    started(connection)?;
    let mut out = FrameWriter::new(connection, FrameKind::Stdout);
    let mut notes = Notes(connection);
    pack(Path::new(&request.path), &request.name, request.follow, &mut out, &mut notes)
        .map(drop)
        .map_err(|error| chain(&error))
}

/// Tells the host what is left out. Notes may come between any two frames.
struct Notes<'a>(&'a File);

impl Watcher for Notes<'_> {
    fn at(&mut self, _: Totals) {}

    fn left_out(&mut self, path: &Path, why: &str) {
        let note = format!("{}: {why}", path.display());
        // When this fails, so does what is written next.
        let _ = write_frame(&mut self.0, FrameKind::Stderr, note.as_bytes());
    }
}

fn serve_unpack(connection: &File, request: &UnpackRequest) -> Result<(), String> {
    absolute(&request.path)?;
    let owners = if request.keep_owners { Owners::Kept } else { Owners::Ours };
    let unpacker = unpacker(Path::new(&request.path), request.source.as_ref())?;
    let unpacker = unpacker.with_owners(owners).with_set_ids();
    started(connection)?;
    let mut frames = FrameReader::new(Incoming { connection, wake_at: 1 }, FrameKind::Stdin);
    unpacker.unpack(&mut frames, &mut ()).map_err(|error| chain(&error))?;
    // What stands behind an archive's end is nothing.
    let mut rest = [0; 4096];
    while frames.read(&mut rest).map_err(|error| error.to_string())? > 0 {}
    Ok(())
}

/// A connection from which only what is on its way is read: the end of a frame, at most. So the kernel need not wake us
/// before it is all there. It would for each packet of 3.7 KiB, which is most of a copy's time where it is emulated.
struct Incoming<'a> {
    connection: &'a File,
    wake_at: usize,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wake_at = buffer.len().clamp(1, WAKE_MAX);
        if self.wake_at != wake_at {
            sys::wake_reader_at(self.connection.as_fd(), wake_at as i32)?;
            self.wake_at = wake_at;
        }
        self.connection.read(buffer)
    }
}

impl Drop for Incoming<'_> {
    fn drop(&mut self) {
        // Who reads next would only be woken later.
        let _ = sys::wake_reader_at(self.connection.as_fd(), 1);
    }
}

fn unpacker(path: &Path, source: Option<&CopySource>) -> Result<Unpacker, String> {
    let cannot = |path: &Path, error: io::Error| format!("cannot copy to {}: {error}", path.display());
    let Some(source) = source else {
        return open(path).map(Unpacker::new).map_err(|error| cannot(path, error));
    };
    let there = Destination::at(path).map_err(|error| cannot(path, error))?;
    let directory = Some(source.directory);
    let source = Source { name: OsString::from(&source.name), directory, contents: source.contents };
    let placement = place(&source, path, there).map_err(|error| error.to_string())?;
    let directory = open(&placement.directory).map_err(|error| cannot(&placement.directory, error))?;
    Ok(Unpacker::new(directory).with_root(placement.name, placement.only_directory))
}

fn open(directory: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::OFlags;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(directory, flags, Mode::empty())?)
}
