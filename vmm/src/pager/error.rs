//! What goes wrong in the pager, and what a machine's process is not allowed to do.

use crate::memory::{ImageId, MemoryError};
use crate::uffd::UffdError;
use rustix::io::Errno;

/// A pager could not be set up or could not fill an image.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Memory for an image.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// epoll or a pipe.
    #[error("{operation} for the pager failed")]
    Poll {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A source delivered more or less than a chunk.
    #[error("the source delivered {bytes} bytes for a chunk of {expected}")]
    Length {
        /// Delivered.
        bytes: u64,
        /// Length of the chunk.
        expected: u64,
    },
    /// The source's code panicked.
    #[error("loading the chunk ended in a panic")]
    Panic,
    /// A page of an image holds what did not come from the source. Machines may have seen it.
    #[error(transparent)]
    Damaged(#[from] DamagedPage),
    /// A page that is there cannot be compared with what belongs there.
    #[error("reading a page of an image failed")]
    Compare(#[source] Errno),
    /// A machine's process handed over what no honest one does.
    #[error(transparent)]
    Misconduct(#[from] Misconduct),
}

/// A page of an image was not put there by the pager: a machine that got rid of its watch has made the kernel put a
/// zero page there. Every machine of the image can have seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the page at {offset:#x} of {image:?} was filled by somebody else than the pager, with other content"
)]
pub struct DamagedPage {
    /// The image.
    pub image: ImageId,
    /// Where, bytes.
    pub offset: u64,
}

/// The pager has failed for all its machines, who must be ended: those that wait would wait for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PagerFailure {
    /// An image is not what the source has.
    #[error(transparent)]
    Damaged(#[from] DamagedPage),
    /// Nobody reads faults any more.
    #[error("the pager's thread has ended")]
    Ended,
}

/// What a machine's process did that no honest one does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misconduct {
    /// It handed over some other descriptor.
    #[error("what it handed over is not a userfaultfd")]
    NotUserfaultfd,
    /// Its userfaultfd tells of more than faults: copies of its process would fill the pager's descriptor table.
    #[error("its userfaultfd has the features {features:#x}")]
    Features {
        /// As the kernel shows them.
        features: u64,
    },
    /// It cannot have mapped the images there.
    #[error("it says that it mapped the images at impossible addresses")]
    Bases,
    /// It handed over a second userfaultfd.
    #[error("it attached to the pager twice")]
    Twice,
    /// It made its userfaultfd blocking, so that reading it would hang.
    #[error("it changed the flags of its userfaultfd")]
    Flags,
    /// Its userfaultfd told of something that was not asked for.
    #[error("its userfaultfd told of event {event:#x}")]
    Event {
        /// The kernel's number.
        event: u8,
    },
    /// It watches memory that is no image, or lied about where the images are.
    #[error("it faulted at {address:#x}, outside of every image")]
    Outside {
        /// In its address space.
        address: u64,
    },
    /// It faults again and again on pages that are there: what it watches is not the image.
    #[error("it faulted {faults} times on pages that are there")]
    Spinning {
        /// How often.
        faults: u64,
    },
}
