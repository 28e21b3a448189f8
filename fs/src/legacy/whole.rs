//! A predecessor's pack fetched whole, once: downloaded into a file without a name, checked against the registry's
//! digest of the whole file before anything is decoded, and unpacked into sparse files without names. Nothing of it
//! outlives the process.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::{LegacyError, LegacyMember, LegacyPack, Limits, room, unpack_into};
use crate::digest::{Digest, Hasher};
use crate::source::{Priority, Source, SourceError};
use crate::store::{PackLocation, StoreOptions};

/// Largest pack downloaded, in bytes.
const MAX_PACK: u64 = 64 << 30;
/// Most plain bytes of one pack, zeros included.
const MAX_PLAIN: u64 = 256 << 30;
/// Why a pack cannot be had whole.
#[derive(Debug, thiserror::Error)]
pub enum WholeError {
    /// The bytes could not be had.
    #[error("cannot download {location}")]
    Source {
        /// URL or path.
        location: String,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// It goes on in the background.
    #[error("{location} is still being downloaded and unpacked: try again")]
    NotYet {
        /// URL or path.
        location: String,
    },
    /// Larger than any pack may be.
    #[error("{location} has {size} bytes, at most {MAX_PACK} are downloaded")]
    TooLarge {
        /// URL or path.
        location: String,
        /// Its size in bytes.
        size: u64,
    },
    /// The temporary directory's disk is too full for the pack.
    #[error("{location} has {size} bytes, and {} has room for {room}", directory.display())]
    NoRoom {
        /// URL or path.
        location: String,
        /// Its size in bytes.
        size: u64,
        /// The temporary directory.
        directory: PathBuf,
        /// Bytes it has room for.
        room: u64,
    },
    /// A temporary file cannot be written.
    #[error("cannot write a temporary file in {}", directory.display())]
    Write {
        /// The temporary directory.
        directory: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The pack is not the one that was registered.
    #[error("{location} has sha256 {found}, the registry says {expected}")]
    Digest {
        /// URL or path.
        location: String,
        /// What the registry says.
        expected: Digest,
        /// What the bytes hash to.
        found: Digest,
    },
    /// It cannot be unpacked.
    #[error(transparent)]
    Unpack(#[from] LegacyError),
    /// The runtime is shutting down.
    #[error("unpacking was abandoned because forkd is stopping")]
    Stopped,
}

/// A pack's members in sparse files without names.
#[derive(Debug)]
pub struct WholePack {
    /// What it says about itself and holds.
    pub pack: LegacyPack,
    /// Bytes of the packed file.
    pub packed_size: u64,
    files: Vec<Arc<File>>,
}

impl WholePack {
    /// Downloads, checks and unpacks a pack. Temporary files go to `directory`.
    pub async fn fetch(
        location: &PackLocation,
        expected: Option<Digest>,
        options: &StoreOptions,
        directory: PathBuf,
    ) -> Result<WholePack, WholeError> {
        let (source, name) = source(location, options)?;
        let failed = |source| WholeError::Source { location: name.clone(), source };
        let size = source.size().await.map_err(failed)?;
        if size > MAX_PACK {
            return Err(WholeError::TooLarge { location: name, size });
        }
        let unwritable = |source| WholeError::Write { directory: directory.clone(), source };
        std::fs::create_dir_all(&directory).map_err(unwritable)?;
        let room = room(&directory).map_err(unwritable)?;
        if size > room {
            return Err(WholeError::NoRoom { location: name, size, directory, room });
        }
        let mut packed = tempfile::tempfile_in(&directory).map_err(unwritable)?;
        let (mut body, mut hasher) = (source.stream_at(0, size, Priority::Prefetch), Hasher::new());
        while let Some(piece) = body.next().await.map_err(failed)? {
            hasher.update(&piece);
            packed.write_all(&piece).map_err(unwritable)?;
        }
        let found = hasher.finish();
        if let Some(expected) = expected.filter(|&expected| expected != found) {
            return Err(WholeError::Digest { location: name, expected, found });
        }
        let unpacking = tokio::task::spawn_blocking(move || unpack(packed, size, &name, &directory));
        unpacking.await.unwrap_or(Err(WholeError::Stopped))
    }

    /// At most `len` bytes of a member from `offset`; fewer only at its end.
    pub async fn read(&self, member: usize, offset: u64, len: u64) -> io::Result<Bytes> {
        let (Some(file), Some(entry)) = (self.files.get(member), self.pack.members.get(member)) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let len = len.min(entry.size.saturating_sub(offset));
        let file = file.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let mut plain = vec![0; len as usize];
            file.read_exact_at(&mut plain, offset).map(|()| plain.into())
        });
        reading.await.unwrap_or(Err(io::ErrorKind::Interrupted.into()))
    }

    /// The next offset from `offset` that holds data, or that is in a hole.
    pub fn seek(&self, member: usize, offset: u64, data: bool) -> rustix::io::Result<u64> {
        let file = self.files.get(member).ok_or(rustix::io::Errno::STALE)?;
        rustix::fs::seek(
            file,
            if data { rustix::fs::SeekFrom::Data(offset) } else { rustix::fs::SeekFrom::Hole(offset) },
        )
    }

    /// Bytes of a member that are not holes.
    pub fn allocated(&self, member: usize) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let metadata = self.files.get(member).and_then(|file| file.metadata().ok());
        metadata.map_or(0, |metadata| metadata.blocks().saturating_mul(512))
    }
}

fn unpack(mut packed: File, size: u64, name: &str, directory: &Path) -> Result<WholePack, WholeError> {
    let unwritable = |source| WholeError::Write { directory: directory.to_owned(), source };
    packed.seek(SeekFrom::Start(0)).map_err(unwritable)?;
    let limits = Limits { plain: MAX_PLAIN, stored: room(directory).map_err(unwritable)? };
    let mut make = |member: &LegacyMember| {
        let path = directory.join(member.name);
        match tempfile::tempfile_in(directory) {
            Ok(file) => Ok((file, path)),
            Err(source) => Err(LegacyError::Write { path, source }),
        }
    };
    let (pack, files) = unpack_into(Path::new(name), packed, limits, &mut make)?;
    Ok(WholePack { pack, packed_size: size, files: files.into_iter().map(Arc::new).collect() })
}

pub(super) fn source(
    location: &PackLocation,
    options: &StoreOptions,
) -> Result<(Source, String), WholeError> {
    let name = location.describe();
    match options.source(location) {
        Ok(source) => Ok((source, name)),
        Err(source) => Err(WholeError::Source { location: name, source }),
    }
}
