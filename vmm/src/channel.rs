//! A message channel between forkd's processes: JSON messages with file descriptors over a SOCK_SEQPACKET pair.
//! Both ends are ours, but a child may have been taken over by its guest, so sizes and descriptors are bounded.

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::time::Instant;

/// Longest message, bytes.
pub const MESSAGE_MAX: usize = 64 * 1024;
/// Most file descriptors in one message.
pub const FDS_MAX: usize = 16;

/// Sending or receiving failed.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end is gone.
    #[error("the other process closed the channel")]
    Closed,
    /// A message is larger than the channel carries.
    #[error("a message of {bytes} bytes is over the limit of {MESSAGE_MAX}")]
    TooLarge {
        /// Size of the message.
        bytes: usize,
    },
    /// A message was not of the expected form.
    #[error("a message could not be understood")]
    Malformed(#[source] serde_json::Error),
    /// The socket failed.
    #[error("the channel's socket failed")]
    Socket(#[source] Errno),
}

/// One end of a channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Two connected ends, close-on-exec.
    pub fn pair() -> Result<(Channel, Channel), ChannelError> {
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(ChannelError::Socket)?;
        Ok((Channel { socket: a }, Channel { socket: b }))
    }

    /// An end received over another channel.
    pub fn from_fd(socket: OwnedFd) -> Channel {
        Channel { socket }
    }

    /// Sends one message with descriptors, which the receiver gets copies of.
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Malformed)?;
        if bytes.len() > MESSAGE_MAX {
            return Err(ChannelError::TooLarge { bytes: bytes.len() });
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            let sent = rustix::net::sendmsg(
                &self.socket,
                &[IoSlice::new(&bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            );
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(ChannelError::Closed),
                Err(errno) => return Err(ChannelError::Socket(errno)),
            }
        }
    }

    /// Waits for the next message at most until `deadline`; `None` when none came.
    pub fn receive_until<M: DeserializeOwned>(
        &self,
        deadline: Instant,
    ) -> Result<Option<(M, Vec<OwnedFd>)>, ChannelError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
            match rustix::event::poll(&mut polled, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_) => return self.receive().map(Some),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::Socket(errno)),
            }
        }
    }

    /// Waits for the next message and its descriptors.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        let mut bytes = vec![0; self.next_length()?];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received.bytes,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(ChannelError::Socket(errno)),
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        let message = serde_json::from_slice(&bytes[..received]).map_err(ChannelError::Malformed)?;
        Ok((message, fds))
    }

    /// Waits for the next message, which stays where it is, and returns its length in bytes. Room for the longest would take
    /// longer to clear than most messages to carry.
    fn next_length(&self) -> Result<usize, ChannelError> {
        loop {
            match rustix::net::recv(&self.socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::TRUNC) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
                Ok((_, bytes)) if bytes > MESSAGE_MAX => return Err(ChannelError::TooLarge { bytes }),
                Ok((_, bytes)) => return Ok(bytes),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ChannelError::Socket(errno)),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.socket
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_messages_and_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        a.send(&"hello", &[write.as_fd()]).unwrap();
        drop(write);
        let (text, fds): (String, _) = b.receive().unwrap();
        assert_eq!((text.as_str(), fds.len()), ("hello", 1));
        rustix::io::write(&fds[0], b"x").unwrap();
        let mut byte = [0];
        assert_eq!(rustix::io::read(&read, &mut byte).unwrap(), 1);
    }

    #[test]
    fn refuses_what_is_too_large_malformed_or_gone() {
        let (a, b) = Channel::pair().unwrap();
        rustix::net::send(&a.socket, &[b' '; MESSAGE_MAX + 1], SendFlags::empty()).unwrap();
        assert!(
            matches!(b.receive::<u32>(), Err(ChannelError::TooLarge { bytes }) if bytes == MESSAGE_MAX + 1)
        );
        let (a, b) = Channel::pair().unwrap();
        let large = a.send(&"x".repeat(MESSAGE_MAX), &[]);
        assert!(matches!(large, Err(ChannelError::TooLarge { .. })), "{large:?}");
        a.send(&"not a number", &[]).unwrap();
        assert!(matches!(b.receive::<u32>(), Err(ChannelError::Malformed(_))));
        drop(a);
        assert!(matches!(b.receive::<u32>(), Err(ChannelError::Closed)));
        assert!(matches!(b.send(&1, &[]), Err(ChannelError::Closed)));
    }
}
