//! From files to a tar stream.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};
use rustix::io::Errno;
use tar::{EntryType, Header};
use thiserror::Error;

use crate::Totals;
use crate::name::DEPTH_MAX;

mod holes;

/// Bytes read from a file at once: a system call costs 0.2 ms in some guests.
const CHUNK: usize = 1 << 20;
/// Bytes of a header, and what everything is rounded up to.
const BLOCK: u64 = 512;
/// Names up to this length, in bytes, go into the header itself.
const SHORT_NAME: usize = 100;

/// Why files could not be packed.
#[derive(Debug, Error)]
pub enum PackError {
    /// Something cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Too many directories in each other.
    #[error("{} is more than {DEPTH_MAX} directories deep", path.display())]
    Deep {
        /// Where.
        path: PathBuf,
    },
    /// A device, a FIFO or a socket was to be copied itself.
    #[error("{} is no file, directory or link", path.display())]
    Special {
        /// What.
        path: PathBuf,
    },
    /// The stream cannot be written.
    #[error("the archive cannot be written")]
    Write {
        /// Why.
        #[from]
        source: io::Error,
    },
}

/// Is told how the work goes on.
pub trait Watcher {
    /// So much is done.
    fn at(&mut self, totals: Totals);
    /// Something below the source is left out.
    fn left_out(&mut self, path: &Path, why: &str);
}

/// Nobody watches.
impl Watcher for () {
    fn at(&mut self, _: Totals) {}
    fn left_out(&mut self, _: &Path, _: &str) {}
}

/// Writes `source` and all that is in it to `out`, called `name` there; with `follow`, what it leads to if it is a link.
/// Links below it stay links.
///
/// # Errors
/// [`PackError`] as its variants say. What vanishes meanwhile is none.
pub fn pack(
    source: &Path,
    name: &str,
    follow: bool,
    out: &mut dyn Write,
    watcher: &mut dyn Watcher,
) -> Result<Totals, PackError> {
    let failed = |error: Errno| PackError::Read { path: source.to_owned(), source: error.into() };
    let file_name = CString::new(source.as_os_str().as_bytes()).map_err(|_| failed(Errno::INVAL))?;
    let flags = if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
    let stat = statat(CWD, &file_name, flags).map_err(failed)?;
    let mut packer = Packer {
        out,
        watcher,
        totals: Totals::default(),
        path: source.to_owned(),
        name: name.as_bytes().to_vec(),
        linked: HashMap::new(),
        buffer: vec![0; CHUNK],
        follow,
    };
    if !is_packed(&stat) {
        return Err(PackError::Special { path: source.to_owned() });
    }
    packer.entry(CWD, &file_name, &stat, 0)?;
    packer.out.write_all(&[0; 2 * BLOCK as usize])?;
    packer.out.flush()?;
    Ok(packer.totals)
}

fn is_packed(stat: &Stat) -> bool {
    matches!(
        FileType::from_raw_mode(stat.st_mode),
        FileType::RegularFile | FileType::Directory | FileType::Symlink
    )
}

struct Packer<'a> {
    out: &'a mut dyn Write,
    watcher: &'a mut dyn Watcher,
    totals: Totals,
    /// Where the walk is, for messages.
    path: PathBuf,
    /// What that is called in the archive.
    name: Vec<u8>,
    /// Files with several names by device and inode: the name they were packed with.
    linked: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
    /// The source itself may be a link that is followed.
    follow: bool,
}

impl Packer<'_> {
    fn failed(&self, error: impl Into<io::Error>) -> PackError {
        PackError::Read { path: self.path.clone(), source: error.into() }
    }

    fn entry(&mut self, parent: impl AsFd, file: &CStr, stat: &Stat, depth: usize) -> Result<(), PackError> {
        let mut header = Header::new_gnu();
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => self.directory(parent, file, header, depth)?,
            FileType::Symlink => {
                let target = match readlinkat(parent, file, Vec::new()) {
                    Err(Errno::NOENT) => return Ok(()),
                    result => result.map_err(|error| self.failed(error))?,
                };
                header.set_entry_type(EntryType::Symlink);
                self.header(&mut header, Some(target.as_bytes()))?;
            }
            _ => self.file(parent, file, stat, header, depth)?,
        }
        self.totals.entries += 1;
        self.watcher.at(self.totals);
        Ok(())
    }

    fn open(
        &self,
        parent: impl AsFd,
        file: &CStr,
        flags: OFlags,
        depth: usize,
    ) -> rustix::io::Result<OwnedFd> {
        let nofollow = if self.follow && depth == 0 { OFlags::empty() } else { OFlags::NOFOLLOW };
        // Non-blocking: a FIFO that has taken the file's place would wait for a writer.
        let flags = flags | nofollow | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        openat(parent, file, flags, Mode::empty())
    }

    fn directory(
        &mut self,
        parent: impl AsFd,
        file: &CStr,
        mut header: Header,
        depth: usize,
    ) -> Result<(), PackError> {
        if depth == DEPTH_MAX {
            return Err(PackError::Deep { path: self.path.clone() });
        }
        let dir = match self.open(parent, file, OFlags::DIRECTORY, depth) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if depth > 0 => return Ok(()),
            result => result.map_err(|error| self.failed(error))?,
        };
        let (name_len, name_had_slash) = (self.name.len(), self.name.ends_with(b"/"));
        if !name_had_slash {
            self.name.push(b'/');
        }
        header.set_entry_type(EntryType::Directory);
        self.header(&mut header, None)?;
        for child in self.children(&dir)? {
            self.name.extend_from_slice(child.as_bytes());
            self.path.push(std::ffi::OsStr::from_bytes(child.as_bytes()));
            match statat(&dir, &child, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => {}
                Err(error) => return Err(self.failed(error)),
                Ok(stat) if is_packed(&stat) => self.entry(&dir, &child, &stat, depth + 1)?,
                Ok(_) => self.watcher.left_out(&self.path, "it is a device, a FIFO or a socket"),
            }
            self.path.pop();
            self.name.truncate(name_len + usize::from(!name_had_slash));
        }
        self.name.truncate(name_len);
        Ok(())
    }

    /// All names in a directory, sorted, so that two copies of one tree are the same archive.
    fn children(&self, dir: &OwnedFd) -> Result<Vec<CString>, PackError> {
        let mut names = Vec::new();
        for entry in Dir::read_from(dir).map_err(|error| self.failed(error))? {
            let entry = entry.map_err(|error| self.failed(error))?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn file(
        &mut self,
        parent: impl AsFd,
        file: &CStr,
        stat: &Stat,
        mut header: Header,
        depth: usize,
    ) -> Result<(), PackError> {
        let identity = (stat.st_dev, stat.st_ino);
        if stat.st_nlink > 1
            && let Some(first) = self.linked.get(&identity).cloned()
        {
            header.set_entry_type(EntryType::Link);
            return self.header(&mut header, Some(&first));
        }
        let mut open = match self.open(parent, file, OFlags::empty(), depth) {
            Err(Errno::NOENT | Errno::LOOP) if depth > 0 => return Ok(()),
            result => File::from(result.map_err(|error| self.failed(error))?),
        };
        if stat.st_nlink > 1 {
            self.linked.insert(identity, self.name.clone());
        }
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        let full = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK) >= len;
        let pieces = if full { None } else { holes::pieces(&open, len) };
        let Some(pieces) = pieces else {
            header.set_entry_type(EntryType::Regular);
            header.set_size(len);
            self.header(&mut header, None)?;
            return self.contents(&mut open, len);
        };
        holes::describe(&mut header, &pieces, len);
        self.header(&mut header, None)?;
        self.out.write_all(&holes::more(&pieces))?;
        let data: u64 = pieces.iter().map(|piece| piece.len).sum();
        let before = self.totals.bytes;
        for piece in &pieces {
            rustix::fs::seek(&open, rustix::fs::SeekFrom::Start(piece.at))
                .map_err(|error| self.failed(error))?;
            self.bytes(&mut open, piece.len)?;
        }
        self.pad(data)?;
        self.totals.bytes = before + len;
        Ok(())
    }

    /// `len` bytes of a file, and what rounds them up.
    fn contents(&mut self, file: &mut File, len: u64) -> Result<(), PackError> {
        self.bytes(file, len)?;
        self.pad(len)
    }

    /// Exactly `len` bytes of a file, with zeros in place of what it has lost since it was looked at.
    fn bytes(&mut self, file: &mut File, len: u64) -> Result<(), PackError> {
        let mut left = len;
        while left > 0 {
            let want = left.min(CHUNK as u64) as usize;
            let n = match file.read(&mut self.buffer[..want]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(error)),
                Ok(0) => {
                    self.buffer[..want].fill(0);
                    want
                }
                Ok(n) => n,
            };
            self.out.write_all(&self.buffer[..n])?;
            left -= n as u64;
            self.totals.bytes += n as u64;
            if left > 0 {
                self.watcher.at(self.totals);
            }
        }
        Ok(())
    }

    fn pad(&mut self, len: u64) -> Result<(), PackError> {
        let over = (len % BLOCK) as usize;
        if over > 0 {
            self.out.write_all(&[0; BLOCK as usize][over..])?;
        }
        Ok(())
    }

    /// The header of the entry at hand, behind one for each of its names that is too long for it.
    fn header(&mut self, header: &mut Header, link: Option<&[u8]>) -> Result<(), PackError> {
        if let Some(link) = link {
            if link.len() > SHORT_NAME {
                self.long_name(EntryType::GNULongLink, link)?;
            }
            let shown = link.len().min(SHORT_NAME);
            header.as_old_mut().linkname[..shown].copy_from_slice(&link[..shown]);
            header.set_size(0);
        } else if header.entry_type() == EntryType::Directory {
            header.set_size(0);
        }
        let name = std::mem::take(&mut self.name);
        let long = name.len() > SHORT_NAME;
        let written = if long { self.long_name(EntryType::GNULongName, &name) } else { Ok(()) };
        let shown = name.len().min(SHORT_NAME);
        header.as_old_mut().name[..shown].copy_from_slice(&name[..shown]);
        self.name = name;
        written?;
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        Ok(())
    }

    fn long_name(&mut self, kind: EntryType, name: &[u8]) -> Result<(), PackError> {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..13].copy_from_slice(b"././@LongLink");
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        // With a NUL at its end, as GNU tar has it.
        let len = name.len() as u64 + 1;
        header.set_size(len);
        header.set_entry_type(kind);
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(name)?;
        self.out.write_all(&[0])?;
        self.pad(len)
    }
}
