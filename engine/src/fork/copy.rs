//! Copying files into a child and out of it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forkd_abi::protocol::{CopySource, PackRequest, UnpackRequest};
use forkd_archive::{Destination, Owners, ROOT, Source, Totals, Unpacker, Watcher, pack, place};
pub use forkd_archive::{PackError, PlaceError, UnpackError};
use serde::Serialize;

use crate::fork::agent::{AgentClient, ClientError};
use crate::interrupt::Interrupt;
use crate::progress::{Amount, Progress, Task};

/// How long a child may take to begin: it starts a process for it.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(600);
/// Bytes of an archive that is passed on at once.
const CHUNK: usize = 1 << 20;
/// How often progress is shown.
const SHOWN_EVERY: Duration = Duration::from_millis(100);

/// What was copied, as `forkd cp --json` shows it.
#[derive(Debug, Default, Serialize)]
pub struct Copied {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of contents.
    pub bytes: u64,
    /// What was not copied, and why.
    pub left_out: Vec<String>,
}

/// A copy failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The child, or what it says.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What is here cannot be read.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// What comes cannot be made files here.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// Where it cannot go.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A file or directory of this host.
    #[error("{}", path.display())]
    Local {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The stream that an archive comes from or goes to.
    #[error("the archive on standard input or output")]
    Stream {
        /// Why.
        source: io::Error,
    },
    /// A name that a request cannot hold.
    #[error("{name:?} is not UTF-8")]
    Name {
        /// The name.
        name: PathBuf,
    },
    /// Somebody wanted it to end.
    #[error("interrupted")]
    Interrupted,
}

/// Copies `path` of the child to `to`, by the rules of [`place()`].
///
/// # Errors
/// [`CopyError`] as its variants say.
pub fn out(
    client: AgentClient,
    path: &str,
    follow: bool,
    to: &Path,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Copied, CopyError> {
    let local = |path: &Path| {
        let path = path.to_owned();
        move |source| CopyError::Local { path, source }
    };
    let there = Destination::at(to).map_err(local(to))?;
    let placement = place(&Source::of(Path::new(path), None), to, there)?;
    let directory: OwnedFd = File::open(&placement.directory).map_err(local(&placement.directory))?.into();
    let owners = if rustix::process::geteuid().is_root() { Owners::Kept } else { Owners::Ours };
    let unpacker = Unpacker::new(directory).with_root(placement.name, placement.only_directory);
    let request = PackRequest { path: path.to_owned(), name: ROOT.to_owned(), follow };
    let mut incoming = client.pack(request, interrupt, BEGIN_TIMEOUT)?;
    let mut shown = Shown::new(progress, path, None);
    let totals = match unpacker.with_owners(owners).unpack(&mut incoming, &mut shown) {
        Ok(totals) => totals,
        Err(_) if interrupt.is_set() => return Err(CopyError::Interrupted),
        // A stream that ended early did so for a reason, which the child says last.
        Err(error @ UnpackError::Archive { .. }) => {
            return Err(match incoming.finish() {
                Err(reason @ ClientError::Agent { .. }) => reason.into(),
                _ => error.into(),
            });
        }
        Err(UnpackError::Make { name, source }) => return Err(cannot_make(to, there, &name, source)),
        Err(error) => return Err(error.into()),
    };
    let left_out = incoming.finish()?;
    Ok(Copied { entries: totals.entries, bytes: totals.bytes, left_out })
}

/// The child says only in the archive whether it is a directory that it sends, and what it calls [`ROOT`] is `to`.
fn cannot_make(to: &Path, there: Destination, name: &OsStr, source: io::Error) -> CopyError {
    let name = Path::new(name);
    let path = to.join(name.strip_prefix(ROOT).unwrap_or(name));
    if there == Destination::File && source.kind() == io::ErrorKind::NotADirectory {
        return PlaceError::FileInTheWay { path: to.to_owned() }.into();
    }
    CopyError::Local { path, source }
}

/// Writes `path` of the child to `to` as a tar archive.
///
/// # Errors
/// [`CopyError`] as its variants say.
pub fn out_as_archive(
    client: AgentClient,
    path: &str,
    follow: bool,
    to: &mut dyn Write,
    interrupt: &Interrupt,
) -> Result<Copied, CopyError> {
    let name = Source::of(Path::new(path), None).name;
    let name = if name.is_empty() { ".".to_owned() } else { name.to_string_lossy().into_owned() };
    let request = PackRequest { path: path.to_owned(), name, follow };
    let mut incoming = client.pack(request, interrupt, BEGIN_TIMEOUT)?;
    let passed = pass(&mut incoming, to);
    if interrupt.is_set() {
        return Err(CopyError::Interrupted);
    }
    let bytes = match passed {
        Ok(bytes) => bytes,
        Err(source) => return Err(CopyError::Stream { source }),
    };
    Ok(Copied { entries: 0, bytes, left_out: incoming.finish()? })
}

/// Copies `from` into the child, by the rules of [`place()`]. With `keep_owners` user and group ids stay, otherwise all is
/// root's.
///
/// # Errors
/// [`CopyError`] as its variants say.
pub fn into(
    client: AgentClient,
    from: &Path,
    follow: bool,
    path: &str,
    keep_owners: bool,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Copied, CopyError> {
    let metadata = if follow { from.metadata() } else { from.symlink_metadata() };
    let metadata = metadata.map_err(|source| CopyError::Local { path: from.to_owned(), source })?;
    let Source { name, contents, .. } = Source::of(from, None);
    let name = name.into_string().map_err(|name| CopyError::Name { name: name.into() })?;
    let source = Some(CopySource { name, directory: metadata.is_dir(), contents });
    let request = UnpackRequest { path: path.to_owned(), source, keep_owners };
    let mut outgoing = client.unpack(request, interrupt, BEGIN_TIMEOUT)?;
    let total = metadata.is_file().then_some(metadata.len());
    let mut shown = Shown::new(progress, &from.to_string_lossy(), total);
    let packed = pack(from, ROOT, follow, &mut outgoing, &mut shown);
    let left_out = shown.left_out;
    match packed {
        _ if interrupt.is_set() => Err(CopyError::Interrupted),
        Ok(Totals { entries, bytes }) => {
            outgoing.finish()?;
            Ok(Copied { entries, bytes, left_out })
        }
        Err(PackError::Write { source }) => match outgoing.finish() {
            Err(reason) => Err(reason.into()),
            Ok(()) => Err(PackError::Write { source }.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// Has the child make files of the tar archive `from` in its directory `path`.
///
/// # Errors
/// [`CopyError`] as its variants say.
pub fn into_from_archive(
    client: AgentClient,
    from: &mut dyn Read,
    path: &str,
    keep_owners: bool,
    interrupt: &Interrupt,
) -> Result<Copied, CopyError> {
    let request = UnpackRequest { path: path.to_owned(), source: None, keep_owners };
    let mut outgoing = client.unpack(request, interrupt, BEGIN_TIMEOUT)?;
    let passed = pass(from, &mut outgoing);
    if interrupt.is_set() {
        return Err(CopyError::Interrupted);
    }
    match passed {
        Ok(bytes) => {
            outgoing.finish()?;
            Ok(Copied { bytes, ..Copied::default() })
        }
        Err(source) => match outgoing.finish() {
            Err(reason @ ClientError::Agent { .. }) => Err(reason.into()),
            _ => Err(CopyError::Stream { source }),
        },
    }
}

fn pass(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<u64> {
    let mut chunk = vec![0; CHUNK];
    let mut total = 0;
    loop {
        match from.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(0) => break,
            Ok(n) => {
                to.write_all(&chunk[..n])?;
                total += n as u64;
            }
        }
    }
    to.flush()?;
    Ok(total)
}

/// Shows how far a copy is, and keeps what it leaves out.
struct Shown {
    task: Box<dyn Task>,
    total: Option<u64>,
    what: String,
    last: Instant,
    left_out: Vec<String>,
}

impl Shown {
    fn new(progress: &dyn Progress, what: &str, total: Option<u64>) -> Shown {
        let task = progress.begin(what, total.map_or(Amount::Unknown, Amount::Bytes));
        Shown { task, total, what: what.to_owned(), last: Instant::now(), left_out: Vec::new() }
    }
}

impl Watcher for Shown {
    fn at(&mut self, totals: Totals) {
        if self.last.elapsed() < SHOWN_EVERY {
            return;
        }
        self.last = Instant::now();
        match self.total {
            Some(_) => self.task.to(totals.bytes),
            None => {
                let (files, mib) = (totals.entries, totals.bytes >> 20);
                self.task.say(&format!("{}: {files} files, {mib} MiB", self.what));
            }
        }
    }

    fn left_out(&mut self, path: &Path, why: &str) {
        self.left_out.push(format!("{}: {why}", path.display()));
    }
}
