//! Why memory cannot be arranged.

use rustix::io::Errno;

/// Memory could not be arranged.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size is outside of what a machine can have.
    #[error("{what} of {bytes} bytes is not possible: it must be between {min} and {max}")]
    Size {
        /// Which size.
        what: &'static str,
        /// What was asked for.
        bytes: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// A memfd could not be made.
    #[error("creating a memory file of {bytes} bytes failed")]
    Create {
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: Errno,
    },
    /// mmap(2) refused.
    #[error("mapping {bytes} bytes of guest memory failed")]
    Map {
        /// Length of the mapping.
        bytes: u64,
        /// Why.
        #[source]
        source: Errno,
    },
    /// madvise(2) refused.
    #[error("giving back {bytes} bytes at offset {offset:#x} of guest memory failed")]
    Discard {
        /// Where.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The parts overlap or overflow.
    #[error("guest memory regions do not fit together")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// Memory that is not there, or not in one piece, was to be given back.
    #[error("guest memory has no range {start:#x} to {end:#x} to be given back")]
    Absent {
        /// First guest-physical address.
        start: u64,
        /// Address behind the last.
        end: u64,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// vm-memory refused a region.
    #[error("a guest memory region is not usable")]
    Region(#[source] vm_memory::mmap::MmapRegionError),
    /// A delta cannot be read or written.
    #[error("the memory that a branch does not share with its image cannot be read or written")]
    ReadDelta(#[source] Errno),
    /// A delta is not what its owner said.
    #[error("the memory that a branch does not share with its image is not what was said of it")]
    Delta,
    /// The memory of another machine cannot be read.
    #[error("the machine's memory cannot be read")]
    ReadMachine(#[source] std::io::Error),
    /// What a machine has written is in too many pieces.
    #[error("what the machine has written is in {runs} pieces, more than a branch can map")]
    Scattered {
        /// How many.
        runs: usize,
    },
}
