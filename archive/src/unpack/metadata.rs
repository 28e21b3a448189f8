//! Mode, owner and time of what is unpacked.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_NOW, Uid, chownat, fchmod, fchown, futimens, utimensat,
};
use tar::Header;

/// Set-user-id and set-group-id.
const SET_IDS: u32 = 0o6000;

/// Whose files are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// Those of whoever unpacks.
    Ours,
    /// Those that the archive names, by number; takes root.
    Kept,
}

/// What an archive says of one entry.
#[derive(Debug, Clone, Copy)]
pub struct Metadata {
    mode: Option<u32>,
    owner: Option<(u32, u32)>,
    mtime: i64,
}

impl Metadata {
    /// Reads a header. The bits that let others act as the owner are kept with `set_ids` only.
    pub fn of(header: &Header, set_ids: bool, owners: Owners) -> io::Result<Metadata> {
        let all = header.mode()? & 0o7777;
        // The last number says "leave it" to chown(2).
        let id = |id: u64| match u32::try_from(id) {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(io::Error::other(format!("{id} is nobody's number"))),
        };
        let owner = match owners {
            Owners::Ours => None,
            Owners::Kept => Some((id(header.uid()?)?, id(header.gid()?)?)),
        };
        let mtime = i64::try_from(header.mtime()?).unwrap_or(i64::MAX);
        Ok(Metadata { mode: Some(if set_ids { all } else { all & !SET_IDS }), owner, mtime })
    }

    /// Without mode and owner.
    pub fn only_time(self) -> Metadata {
        Metadata { mode: None, owner: None, ..self }
    }

    /// Sets it, of a file or directory. The owner comes first, as changing it drops set-user-id.
    pub fn apply(&self, file: impl AsFd) -> io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        if let Some(mode) = self.mode {
            fchmod(&file, Mode::from_raw_mode(mode))?;
        }
        Ok(futimens(&file, &self.times())?)
    }

    /// Sets it, of a symbolic link in `parent`, which has no mode.
    pub fn apply_to_link(&self, parent: impl AsFd, name: &OsStr) -> io::Result<()> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        if let Some((uid, gid)) = self.owner {
            chownat(&parent, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), flags)?;
        }
        Ok(utimensat(&parent, name, &self.times(), flags)?)
    }

    fn times(&self) -> Timestamps {
        Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            last_modification: Timespec { tv_sec: self.mtime, tv_nsec: 0 },
        }
    }
}
