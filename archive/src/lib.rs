//! Files as a tar stream, for `forkd cp`: both sides of a copy use the same code.
//!
//! [`pack()`] walks a file or directory and writes GNU tar; [`Unpacker`] reads any tar and makes files of it below one
//! directory, whatever the archive says; [`place()`] has the rules of what a copy is called where it arrives.
//!
//! Kept are contents, names, modes, times (in seconds), symbolic links, hard links within the copy, holes, and user and
//! group ids if wanted. Extended attributes are not. Devices, FIFOs and sockets are left out when packing and refused
//! when unpacking.
#![forbid(unsafe_code)]

pub mod name;
pub mod pack;
pub mod place;
pub mod unpack;

pub use pack::{PackError, Watcher, pack};
pub use place::{Destination, PlaceError, Placement, Source, place};
pub use unpack::{Owners, UnpackError, Unpacker};

/// What the copied file or directory is called in an archive that one forkd sends another: only the receiver knows what
/// it is to be called.
pub const ROOT: &str = "root";

/// What went through so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of contents, holes included.
    pub bytes: u64,
}
