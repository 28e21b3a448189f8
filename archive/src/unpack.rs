//! From a tar stream to files, below one directory whatever the stream says.
//!
//! The stream is a stranger's. Names are checked (`name.rs`), and then each part is opened in the directory before
//! it with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`: no name leads out, neither by itself nor over a link that the
//! stream made before. A file is written under a name of its own and renamed, so what was there stays whole until the new
//! one is, and a link or a second name of another file that is there is replaced and never written through. What stands
//! before an entry (long names, PAX records, lists of holes) is limited, so memory is too; contents are not.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::rc::Rc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, linkat, mkdirat, openat2, renameat, statat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};
use thiserror::Error;

use crate::name::parts;
use crate::pack::Watcher;
use crate::{ROOT, Totals};

mod contents;
mod metadata;

use metadata::Metadata;
pub use metadata::Owners;

/// Most bytes that stand before one entry: its header, long names, PAX records, and where its holes are.
const BEFORE_ENTRY_MAX: u64 = 1 << 20;
/// Mode of directories that have no entry of their own.
const IMPLIED_MODE: u32 = 0o755;
/// No links on the way, and no way out.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// Why an archive could not be unpacked.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The stream is no tar archive, or broke.
    #[error("the archive cannot be read")]
    Archive {
        /// Why.
        source: io::Error,
    },
    /// A name that is not allowed.
    #[error("the archive has a name that is refused: {name:?}: {why}")]
    Name {
        /// The name.
        name: OsString,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An entry that is no file, directory or link.
    #[error("the archive has an entry that is refused: {name:?} is {kind}")]
    Kind {
        /// Its name.
        name: OsString,
        /// What it is.
        kind: &'static str,
    },
    /// What was to be a directory is none.
    #[error("a file cannot become {name:?}, which was to be a directory")]
    NoDirectory {
        /// What it was to be.
        name: OsString,
    },
    /// An entry cannot be made.
    #[error("cannot make {name:?}")]
    Make {
        /// Its name.
        name: OsString,
        /// Why.
        source: io::Error,
    },
}

/// Makes files below a directory.
#[derive(Debug)]
pub struct Unpacker {
    /// What the archive's [`ROOT`] becomes; `None` when the archive is anybody's and taken as it is.
    root: Option<Root>,
    owners: Owners,
    set_ids: bool,
    /// From the directory that all is made in down to the one at hand.
    open: Vec<OpenDirectory>,
    totals: Totals,
    /// Numbers the names of unfinished files.
    unfinished: u64,
}

#[derive(Debug)]
struct Root {
    name: Option<OsString>,
    only_directory: bool,
}

#[derive(Debug)]
struct OpenDirectory {
    name: Vec<u8>,
    fd: OwnedFd,
    /// What is set once all that is in it is there; `None` for one that the archive does not name.
    metadata: Option<Metadata>,
}

impl Unpacker {
    /// For an archive that is taken as it is, below `directory`.
    #[must_use]
    pub fn new(directory: OwnedFd) -> Unpacker {
        let top = OpenDirectory { name: Vec::new(), fd: directory, metadata: None };
        Unpacker {
            root: None,
            owners: Owners::Ours,
            set_ids: false,
            open: vec![top],
            totals: Totals::default(),
            unfinished: 0,
        }
    }

    /// For an archive of which all lies in [`ROOT`]: that becomes `name` in the directory, or what is in it goes there
    /// when that is `None`.
    #[must_use]
    pub fn with_root(mut self, name: Option<OsString>, only_directory: bool) -> Unpacker {
        self.root = Some(Root { name, only_directory });
        self
    }

    /// Whose files they are.
    #[must_use]
    pub fn with_owners(mut self, owners: Owners) -> Unpacker {
        self.owners = owners;
        self
    }

    /// Keeps the set-user-id and set-group-id bits.
    #[must_use]
    pub fn with_set_ids(mut self) -> Unpacker {
        self.set_ids = true;
        self
    }

    /// Reads an archive to its end.
    ///
    /// # Errors
    /// [`UnpackError`] as its variants say. What was made before stays; the entry at hand is removed.
    pub fn unpack(mut self, archive: impl Read, watcher: &mut dyn Watcher) -> Result<Totals, UnpackError> {
        let limit = Rc::new(Cell::new(0));
        let mut archive = Archive::new(Limited { inner: archive, left: Rc::clone(&limit) });
        let broken = |source| UnpackError::Archive { source };
        let mut entries = archive.entries().map_err(broken)?;
        loop {
            limit.set(BEFORE_ENTRY_MAX);
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(broken)?;
            limit.set(u64::MAX);
            self.entry(&mut entry, watcher)?;
            watcher.at(self.totals);
        }
        self.leave(1)?;
        Ok(self.totals)
    }

    fn entry(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        watcher: &mut dyn Watcher,
    ) -> Result<(), UnpackError> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            io::copy(entry, &mut io::sink()).map_err(|source| UnpackError::Archive { source })?;
            return Ok(());
        }
        let full = entry.path_bytes().into_owned();
        let name = OsString::from_vec(full.clone());
        // Before there was a type for directories, a slash said so.
        let directory = kind.is_dir() || (kind.is_file() && full.ends_with(b"/"));
        let place = self.placed(&full)?;
        let Some((last, parents)) = place.split_last() else {
            // The directory that all goes into, which was there before.
            return if directory { Ok(()) } else { Err(UnpackError::NoDirectory { name }) };
        };
        if place.len() == 1 && !directory && self.root.as_ref().is_some_and(|root| root.only_directory) {
            return Err(UnpackError::NoDirectory { name: OsString::from_vec(last.clone()) });
        }
        let made = |source: io::Error| UnpackError::Make { name: name.clone(), source };
        let metadata = Metadata::of(entry.header(), self.set_ids, self.owners)
            .map_err(|source| UnpackError::Archive { source })?;
        self.enter(parents).map_err(&made)?;
        if directory {
            self.directory(last, metadata).map_err(made)?;
        } else if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            self.file(last, &metadata, entry, watcher)?;
        } else if kind.is_symlink() {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            let unfinished = self.unfinished();
            symlinkat(OsStr::from_bytes(&target), self.here(), &unfinished)
                .map_err(|error| made(error.into()))?;
            let kept = metadata.apply_to_link(self.here(), &unfinished);
            self.rename(&unfinished, last, kept).map_err(made)?;
        } else if kind.is_hard_link() {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            self.hard_link(&target, last, &name)?;
        } else {
            return Err(UnpackError::Kind { name, kind: kind_text(kind) });
        }
        self.totals.entries += 1;
        Ok(())
    }

    /// Where a name of the archive leads, part by part.
    fn placed(&self, full: &[u8]) -> Result<Vec<Vec<u8>>, UnpackError> {
        let refused = |why| UnpackError::Name { name: OsString::from_vec(full.to_vec()), why };
        let parts = parts(full).map_err(refused)?;
        let Some(root) = &self.root else { return Ok(parts.into_iter().map(<[u8]>::to_vec).collect()) };
        let Some((first, rest)) = parts.split_first().filter(|(first, _)| **first == ROOT.as_bytes()) else {
            return Err(refused("it does not belong to what is copied"));
        };
        debug_assert_eq!(*first, ROOT.as_bytes());
        let name = root.name.as_ref().map(|name| name.as_bytes().to_vec());
        Ok(name.into_iter().chain(rest.iter().map(|part| part.to_vec())).collect())
    }

    fn here(&self) -> &OwnedFd {
        // The first is there from the beginning, and `leave` keeps it.
        &self.open[self.open.len() - 1].fd
    }

    /// Goes to a directory below the top, making those that are not there.
    fn enter(&mut self, place: &[Vec<u8>]) -> io::Result<()> {
        let common = self.open[1..].iter().zip(place).take_while(|(open, part)| open.name == **part).count();
        self.finish(1 + common)?;
        for part in &place[common..] {
            let fd = match open_directory(self.here(), part) {
                Err(Errno::NOENT) => {
                    mkdirat(self.here(), OsStr::from_bytes(part), Mode::from_raw_mode(IMPLIED_MODE))?;
                    open_directory(self.here(), part)?
                }
                result => result?,
            };
            self.open.push(OpenDirectory { name: part.clone(), fd, metadata: None });
        }
        Ok(())
    }

    /// Leaves all directories but the first `keep`, whose contents are then there.
    fn leave(&mut self, keep: usize) -> Result<(), UnpackError> {
        let name = OsString::from_vec(self.open[self.open.len() - 1].name.clone());
        self.finish(keep).map_err(|source| UnpackError::Make { name, source })
    }

    fn finish(&mut self, keep: usize) -> io::Result<()> {
        while self.open.len() > keep {
            if let Some(OpenDirectory { fd, metadata: Some(metadata), .. }) = self.open.pop() {
                metadata.apply(&fd)?;
            }
        }
        Ok(())
    }

    /// One that is there keeps its mode and owner: who may enter it is not the archive's to say.
    fn directory(&mut self, name: &[u8], metadata: Metadata) -> io::Result<()> {
        let made = match mkdirat(self.here(), OsStr::from_bytes(name), Mode::RWXU) {
            Err(Errno::EXIST) => false,
            result => result.map(|()| true)?,
        };
        let fd = open_directory(self.here(), name)?;
        let metadata = if made { metadata } else { metadata.only_time() };
        self.open.push(OpenDirectory { name: name.to_vec(), fd, metadata: Some(metadata) });
        Ok(())
    }

    fn file(
        &mut self,
        name: &[u8],
        metadata: &Metadata,
        entry: &mut Entry<'_, impl Read>,
        watcher: &mut dyn Watcher,
    ) -> Result<(), UnpackError> {
        let full = OsString::from_vec(entry.path_bytes().into_owned());
        let made = |source| UnpackError::Make { name: full.clone(), source };
        let unfinished = self.unfinished();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat2(self.here(), &unfinished, flags, Mode::RUSR | Mode::WUSR, BENEATH);
        let file = File::from(file.map_err(|error| made(error.into()))?);
        let before = self.totals;
        let totals = &mut self.totals;
        let len = entry.size();
        let written = contents::write(entry, len, &file, |bytes| {
            totals.bytes = before.bytes + bytes;
            watcher.at(*totals);
        });
        let kept = match written {
            Ok(()) => metadata.apply(&file).map_err(made),
            Err(contents::Failed::Read(source)) => Err(UnpackError::Archive { source }),
            Err(contents::Failed::Write(source)) => Err(made(source)),
        };
        if kept.is_err() {
            let _ = unlinkat(self.here(), &unfinished, AtFlags::empty());
        }
        kept?;
        self.rename(&unfinished, name, Ok(())).map_err(made)
    }

    fn hard_link(&mut self, target: &[u8], name: &[u8], full: &OsStr) -> Result<(), UnpackError> {
        let made = |error: Errno| UnpackError::Make { name: full.to_owned(), source: error.into() };
        let place = self.placed(target)?;
        let Some((last, parents)) = place.split_last() else {
            return Err(UnpackError::Kind { name: full.to_owned(), kind: "a second name of a directory" });
        };
        let way = parents.join(&b'/');
        let way = if way.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(&way) };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = openat2(&self.open[0].fd, way, flags, Mode::empty(), BENEATH).map_err(made)?;
        let last = OsStr::from_bytes(last);
        let stat = statat(&parent, last, AtFlags::SYMLINK_NOFOLLOW).map_err(made)?;
        if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::Symlink) {
            return Err(UnpackError::Kind {
                name: full.to_owned(),
                kind: "a second name of what is no file",
            });
        }
        let unfinished = self.unfinished();
        linkat(&parent, last, self.here(), &unfinished, AtFlags::empty()).map_err(made)?;
        let renamed = self.rename(&unfinished, name, Ok(()));
        // Where both are names of one file already, renaming does nothing.
        let _ = unlinkat(self.here(), &unfinished, AtFlags::empty());
        renamed.map_err(|source| UnpackError::Make { name: full.to_owned(), source })
    }

    /// A name for what is not finished.
    fn unfinished(&mut self) -> OsString {
        loop {
            self.unfinished += 1;
            let name = format!(".forkd-cp-{}-{}", std::process::id(), self.unfinished);
            // Somebody may have left one, or the archive may want it.
            if statat(self.here(), &name, AtFlags::SYMLINK_NOFOLLOW).is_err() {
                return name.into();
            }
        }
    }

    /// Gives what is finished its name, if `kept` says that it is.
    fn rename(&self, unfinished: &OsStr, name: &[u8], kept: io::Result<()>) -> io::Result<()> {
        let renamed = kept.and_then(|()| {
            renameat(self.here(), unfinished, self.here(), OsStr::from_bytes(name)).map_err(io::Error::from)
        });
        if renamed.is_err() {
            let _ = unlinkat(self.here(), unfinished, AtFlags::empty());
        }
        renamed
    }
}

fn open_directory(parent: impl AsFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    openat2(parent, OsStr::from_bytes(name), flags, Mode::empty(), BENEATH)
}

fn kind_text(kind: EntryType) -> &'static str {
    match kind {
        EntryType::Char | EntryType::Block => "a device",
        EntryType::Fifo => "a FIFO",
        _ => "of a kind that is not known",
    }
}

/// A reader that fails when more than `left` bytes are read.
struct Limited<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.get();
        if left == 0 && !buffer.is_empty() {
            return Err(io::Error::other("what stands before an entry is longer than 1 MiB"));
        }
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = self.inner.read(&mut buffer[..want])?;
        self.left.set(left - n as u64);
        Ok(n)
    }
}
