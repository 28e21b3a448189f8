//! What the inode numbers inside a pack stand for. The low 32 bits of such a number are a slot:
//!
//! ```text
//! 0  the version's directory    1  .forkd    2  .forkd/stats.json    3  .forkd/blocks    4  rootfs
//! 16 + N       member N, in the pack's order
//! 1 << 30 | N  directory of tag N, in a chain of the predecessor
//! 1 << 31 | N  inode N of the root disk's image
//! ```

/// Slot of the first member.
const FIRST_MEMBER: u32 = 16;
/// Marks the directories of tags.
const TAG: u32 = 1 << 30;
/// Marks the inodes of the root disk's image.
const IMAGE: u32 = 1 << 31;

/// What an inode inside a pack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// The version's directory.
    Directory,
    /// `.forkd` in it.
    Reports,
    /// `.forkd/stats.json`.
    Stats,
    /// `.forkd/blocks`.
    Blocks,
    /// `rootfs`, the root directory of the root disk.
    RootDisk,
    /// A member, by its position in the pack.
    Member(u32),
    /// The directory of a tag, by the order of the tags' first members.
    Tag(u32),
    /// Another inode of the root disk, by its number in the image.
    Image(u32),
}

impl Slot {
    /// The slot with that number, if there is one.
    pub(super) fn decode(number: u32) -> Option<Slot> {
        match number {
            0 => Some(Slot::Directory),
            1 => Some(Slot::Reports),
            2 => Some(Slot::Stats),
            3 => Some(Slot::Blocks),
            4 => Some(Slot::RootDisk),
            number if number & IMAGE != 0 => Some(Slot::Image(number & !IMAGE)),
            number if number & TAG != 0 => Some(Slot::Tag(number & !TAG)),
            number => number.checked_sub(FIRST_MEMBER).map(Slot::Member),
        }
    }

    /// Its number.
    pub(super) fn encode(self) -> u32 {
        match self {
            Slot::Directory => 0,
            Slot::Reports => 1,
            Slot::Stats => 2,
            Slot::Blocks => 3,
            Slot::RootDisk => 4,
            Slot::Member(position) => FIRST_MEMBER + position,
            Slot::Tag(position) => TAG | position,
            Slot::Image(nid) => IMAGE | nid,
        }
    }

    /// The slot of an inode of the image. There is none for an inode beyond the image's first 64 GiB.
    pub(super) fn of_image(nid: u64) -> Option<Slot> {
        u32::try_from(nid).ok().filter(|nid| nid & IMAGE == 0).map(Slot::Image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_comes_back() {
        let fixed = [Slot::Directory, Slot::Reports, Slot::Stats, Slot::Blocks, Slot::RootDisk];
        let counted = [0, 1, TAG - FIRST_MEMBER - 1].map(Slot::Member);
        let tags = [0, 1, TAG - 1].map(Slot::Tag);
        let image = [0, 1, IMAGE - 1].map(Slot::Image);
        for slot in fixed.into_iter().chain(counted).chain(tags).chain(image) {
            assert_eq!(Slot::decode(slot.encode()), Some(slot));
        }
        for unused in 5..FIRST_MEMBER {
            assert_eq!(Slot::decode(unused), None, "{unused}");
        }
        assert_eq!(Slot::of_image(7), Some(Slot::Image(7)));
        assert_eq!(Slot::of_image(u64::from(IMAGE)), None);
        assert_eq!(Slot::of_image(1 << 32), None);
    }
}
