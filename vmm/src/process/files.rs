//! The files that a machine starts with, and their order in the message that carries them to its process:
//!
//! ```text
//! channel  start  console  vsock  [initrd]  [wire]  images...  [delta]  [scratch]
//! ```

use crate::channel::Channel;
use rustix::fd::{BorrowedFd, OwnedFd};

/// The files of a machine. [`MachineFiles`] are those that its owner lends.
#[derive(Debug)]
pub struct Files<F> {
    /// RAM and, if the layout has one, root disk.
    pub images: Vec<F>,
    /// Kernel (to boot) or vmstate (to restore).
    pub start: F,
    /// Console output.
    pub console: F,
    /// Listening Unix socket for the guest's vsock.
    pub vsock: F,
    /// Scratch disk, if [`super::MachineSpec::scratch_bytes`] says so.
    pub scratch: Option<F>,
    /// Initramfs, if [`super::MachineStart::Boot`] says that there is one.
    pub initrd: Option<F>,
    /// The wire, if the machine's specification has a MAC.
    pub wire: Option<F>,
    /// What differs from the image of RAM, if [`super::MachineStart::Restore`] says that something does.
    pub delta: Option<F>,
}

/// The files of a machine, lent by its owner.
pub type MachineFiles<'a> = Files<BorrowedFd<'a>>;

/// Which files a machine has, besides those that all have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) images: usize,
    pub(super) scratch: bool,
    pub(super) initrd: bool,
    pub(super) wire: bool,
    pub(super) delta: bool,
}

impl MachineFiles<'_> {
    /// The descriptors of the message; `channel` is the machine's end of its channel.
    pub(crate) fn encode<'a>(&'a self, channel: BorrowedFd<'a>) -> Vec<BorrowedFd<'a>> {
        let mut fds = Vec::with_capacity(8 + self.images.len());
        fds.extend([channel, self.start, self.console, self.vsock]);
        fds.extend(self.initrd);
        fds.extend(self.wire);
        fds.extend(&self.images);
        fds.extend(self.delta);
        fds.extend(self.scratch);
        fds
    }
}

impl Files<OwnedFd> {
    /// The files of a message whose channel was taken. `None` when there are fewer or more than expected.
    pub(super) fn decode(
        expected: Expected,
        mut fds: impl Iterator<Item = OwnedFd>,
    ) -> Option<Files<OwnedFd>> {
        let (start, console, vsock) = (fds.next()?, fds.next()?, fds.next()?);
        let initrd = if expected.initrd { Some(fds.next()?) } else { None };
        let wire = if expected.wire { Some(fds.next()?) } else { None };
        let images: Vec<_> = fds.by_ref().take(expected.images).collect();
        let delta = if expected.delta { Some(fds.next()?) } else { None };
        let scratch = if expected.scratch { Some(fds.next()?) } else { None };
        let complete = images.len() == expected.images && fds.next().is_none();
        complete.then_some(Files { images, start, console, vsock, scratch, initrd, wire, delta })
    }
}

/// Takes the machine's end of its channel out of a message's descriptors.
pub(crate) fn take_channel(fds: &mut impl Iterator<Item = OwnedFd>) -> Option<Channel> {
    fds.next().map(Channel::from_fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::{AsFd, AsRawFd};

    fn pipes(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| rustix::pipe::pipe().unwrap().0).collect()
    }

    #[test]
    fn every_file_arrives_in_its_place() {
        for bits in 0..16 {
            let [scratch, initrd, wire, delta] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let all = pipes(10);
            let fd = |position: usize| all[position].as_fd();
            let sent = MachineFiles {
                images: vec![fd(1), fd(2)],
                start: fd(3),
                console: fd(4),
                vsock: fd(5),
                scratch: scratch.then(|| fd(6)),
                initrd: initrd.then(|| fd(7)),
                wire: wire.then(|| fd(8)),
                delta: delta.then(|| fd(9)),
            };
            let message = sent.encode(fd(0));
            // The copies that a receiver has are told apart by their order only.
            let numbers: Vec<_> = message.iter().map(AsRawFd::as_raw_fd).collect();
            let copies: Vec<_> = message.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
            let sources: std::collections::HashMap<_, _> =
                copies.iter().map(AsRawFd::as_raw_fd).zip(numbers).collect();
            let mut fds = copies.into_iter();
            let channel = take_channel(&mut fds).unwrap();
            let expected = Expected { images: 2, scratch, initrd, wire, delta };
            let got = Files::decode(expected, fds).unwrap();
            let pairs = [(Some(channel.as_fd()), Some(fd(0)))]
                .into_iter()
                .chain(
                    got.images.iter().map(|fd| Some(fd.as_fd())).zip(sent.images.iter().map(|fd| Some(*fd))),
                )
                .chain([
                    (Some(got.start.as_fd()), Some(sent.start)),
                    (Some(got.console.as_fd()), Some(sent.console)),
                    (Some(got.vsock.as_fd()), Some(sent.vsock)),
                    (got.scratch.as_ref().map(AsFd::as_fd), sent.scratch),
                    (got.initrd.as_ref().map(AsFd::as_fd), sent.initrd),
                    (got.wire.as_ref().map(AsFd::as_fd), sent.wire),
                    (got.delta.as_ref().map(AsFd::as_fd), sent.delta),
                ]);
            for (got, sent) in pairs {
                assert_eq!(got.map(|fd| sources[&fd.as_raw_fd()]), sent.map(|fd| fd.as_raw_fd()));
            }
        }
    }

    #[test]
    fn too_few_and_too_many_files_are_noticed() {
        let expected = Expected { images: 2, scratch: true, initrd: false, wire: false, delta: false };
        for count in [0, 3, 4, 5, 7] {
            assert!(Files::decode(expected, pipes(count).into_iter()).is_none(), "{count} files");
        }
        assert!(Files::decode(expected, pipes(6).into_iter()).is_some());
    }
}
