//! Which errno a failure becomes: the contract of the mount, in one exhaustive table.
//!
//! | failure | errno |
//! |---|---|
//! | retries exhausted, bytes corrupt, the pack malformed or missing where the registry says it is | EIO |
//! | the base of a delta is nowhere, or another pack is in its place | EIO |
//! | the object was replaced or vanished since it was opened, or has another length until the deadline | ESTALE |
//! | the hub or the file system denies access | EACCES |
//! | a host without byte ranges, and no room for a copy of the pack | ENOSPC |
//! | no such name in the pack | ENOENT |
//! | a pack of the predecessor that is still being downloaded | EAGAIN |
//! | no room to unpack a pack of the predecessor | ENOSPC |
//! | one that is larger than any may be | EFBIG |

use rustix::io::Errno;

use crate::legacy::LegacyError;
use crate::legacy::whole::WholeError;
use crate::source::{FileError, HttpError, SourceError};
use crate::store::{OpenError, ReadError};

/// The errno for a pack that cannot be opened.
pub fn of_open_error(error: &OpenError) -> Errno {
    match error {
        // Not ENOENT: glibc's readdir takes that for the end of the directory, and the pack would look empty.
        OpenError::Source { source, .. } => of_source_error(source, Errno::IO),
        OpenError::Legacy { .. } => Errno::OPNOTSUPP,
        OpenError::Truncated { .. }
        | OpenError::NotAPack { .. }
        | OpenError::NoBase { .. }
        | OpenError::BaseReplaced { .. }
        | OpenError::IndexDigest { .. }
        | OpenError::Index { .. } => Errno::IO,
    }
}

/// The errno for a pack of the predecessor that cannot be had whole.
pub fn of_whole_error(error: &WholeError) -> Errno {
    match error {
        WholeError::Source { source, .. } => of_source_error(source, Errno::IO),
        WholeError::NotYet { .. } => Errno::AGAIN,
        WholeError::TooLarge { .. } | WholeError::Unpack(LegacyError::TooLarge { .. }) => Errno::FBIG,
        WholeError::Unpack(LegacyError::NoRoom { .. }) | WholeError::NoRoom { .. } => Errno::NOSPC,
        WholeError::Write { source, .. } | WholeError::Unpack(LegacyError::Write { source, .. }) => {
            Errno::from_io_error(source).unwrap_or(Errno::IO)
        }
        WholeError::Digest { .. }
        | WholeError::Stopped
        | WholeError::Unpack(
            LegacyError::Open { .. }
            | LegacyError::Read { .. }
            | LegacyError::Manifest { .. }
            | LegacyError::NotLegacy { .. }
            | LegacyError::Duplicate { .. }
            | LegacyError::Digest { .. },
        ) => Errno::IO,
    }
}

/// The errno for bytes of an opened pack that cannot be had.
pub fn of_read_error(error: &ReadError) -> Errno {
    match error {
        ReadError::Source { source, .. } => of_source_error(source, Errno::STALE),
        ReadError::NoSuchFile { .. } => Errno::NOENT,
        ReadError::TooLarge { .. } => Errno::FBIG,
        ReadError::Corrupt { .. }
        | ReadError::Decode { .. }
        | ReadError::NoSuchChunk { .. }
        | ReadError::NoBase { .. }
        | ReadError::Manifest(_)
        | ReadError::Stopped => Errno::IO,
    }
}

/// `missing`: what it means that the object is not there.
fn of_source_error(error: &SourceError, missing: Errno) -> Errno {
    match error {
        SourceError::Http(error) => of_http_error(error, missing),
        SourceError::File(FileError::Open { source, .. }) => match source.kind() {
            std::io::ErrorKind::NotFound => missing,
            std::io::ErrorKind::PermissionDenied => Errno::ACCESS,
            _ => Errno::IO,
        },
        SourceError::File(FileError::NotAFile { .. } | FileError::Read { .. }) => Errno::IO,
    }
}

fn of_http_error(error: &HttpError, missing: Errno) -> Errno {
    match error {
        HttpError::Denied { .. } => Errno::ACCESS,
        HttpError::NotFound { .. } => missing,
        HttpError::Replaced { .. } => Errno::STALE,
        HttpError::WrongLength { .. } => Errno::STALE,
        HttpError::Download { last, .. } => of_http_error(last, missing),
        HttpError::Deadline { last, .. } => of_http_error(last, missing),
        HttpError::TemporaryFile { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
        HttpError::Url { .. }
        | HttpError::Client(_)
        | HttpError::Connect { .. }
        | HttpError::Transfer { .. }
        | HttpError::Stalled { .. }
        | HttpError::TooSlow { .. }
        | HttpError::Busy { .. }
        | HttpError::Status { .. }
        | HttpError::NoRanges { .. }
        | HttpError::WrongRange { .. }
        | HttpError::BodyLength { .. }
        | HttpError::Encoded { .. }
        | HttpError::OutOfRange { .. }
        | HttpError::TooLong { .. }
        | HttpError::Redirects { .. }
        | HttpError::Downgrade { .. }
        | HttpError::Untrusted { .. }
        | HttpError::Queued { .. } => Errno::IO,
    }
}
