//! Setting up network devices: rtnetlink (`man 7 rtnetlink`), as little of it as machines and their hosts need.
//!
//! The agent gives a copy its addresses with it, the host the other end of the copy's wire. Requests are sent together
//! and only the last is acknowledged, because on kvm_pvm a system call costs 0.2 ms.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use thiserror::Error;

/// `struct nlmsghdr`, bytes.
const HEADER: usize = 16;
/// Answers are a header, an error number and the header of the request; the kernel may add a few words.
const ANSWER_MAX: usize = 512;
/// `struct rtmsg`, bytes, and where in it the kind of the route stands.
const ROUTE: usize = 12;
const ROUTE_KIND: usize = 7;

/// The kernel refused to set up a network device.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// No socket, or it does not work.
    #[error("the kernel's network configuration cannot be reached")]
    Socket(#[source] io::Error),
    /// A request was refused.
    #[error("the kernel refused to {doing}")]
    Refused {
        /// What was asked.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An answer that is none.
    #[error("the kernel's answer to a network request cannot be read ({bytes} bytes)")]
    Answer {
        /// Its length.
        bytes: usize,
    },
}

/// A socket to the kernel's network configuration, in the network namespace of the calling thread.
///
/// # Errors
/// [`NetlinkError::Socket`].
pub fn socket() -> Result<OwnedFd, NetlinkError> {
    // Protocol 0 is NETLINK_ROUTE.
    socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
        .map_err(|errno| NetlinkError::Socket(errno.into()))
}

/// Requests to be sent together, executed in order.
#[derive(Debug, Default)]
pub struct Requests {
    bytes: Vec<u8>,
    doing: Vec<&'static str>,
    last: usize,
}

impl Requests {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Switches a device on.
    pub fn link_up(&mut self, index: u32) {
        let flags = (libc::IFF_UP as u32).to_ne_bytes();
        self.request("switch the device on", libc::RTM_SETLINK, 0, &link(index, flags, flags), &[]);
    }

    /// Changes a device's Ethernet address.
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) {
        let attributes = [(libc::IFLA_ADDRESS, &mac[..])];
        self.request("set the MAC", libc::RTM_SETLINK, 0, &link(index, [0; 4], [0; 4]), &attributes);
    }

    /// Changes the longest packet that a device takes, bytes.
    pub fn set_mtu(&mut self, index: u32, mtu: u16) {
        let attributes = [(libc::IFLA_MTU, &u32::from(mtu).to_ne_bytes()[..])];
        self.request("set the MTU", libc::RTM_SETLINK, 0, &link(index, [0; 4], [0; 4]), &attributes);
    }

    /// Gives a device an address; its network is reached through the device then.
    pub fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) {
        // struct ifaddrmsg
        let mut body = vec![libc::AF_INET as u8, prefix, 0, libc::RT_SCOPE_UNIVERSE];
        body.extend(index.to_ne_bytes());
        let octets = address.octets();
        let attributes = [(libc::IFA_LOCAL, &octets[..]), (libc::IFA_ADDRESS, &octets[..])];
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        self.request("add the address", libc::RTM_NEWADDR, flags, &body, &attributes);
    }

    /// Sends what has no route of its own through a device to `gateway`.
    pub fn default_route(&mut self, index: u32, gateway: Ipv4Addr) {
        // struct rtmsg: the destination's prefix has no bits.
        let mut body = vec![libc::AF_INET as u8, 0, 0, 0, libc::RT_TABLE_MAIN, libc::RTPROT_BOOT];
        body.extend([libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST, 0, 0, 0, 0]);
        let (octets, index) = (gateway.octets(), index.to_ne_bytes());
        let attributes = [(libc::RTA_GATEWAY, &octets[..]), (libc::RTA_OIF, &index[..])];
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        self.request("set the default route", libc::RTM_NEWROUTE, flags, &body, &attributes);
    }

    /// Appends one message; `flags` on top of those that all have.
    fn request(
        &mut self,
        doing: &'static str,
        kind: u16,
        flags: i32,
        body: &[u8],
        attributes: &[(libc::c_ushort, &[u8])],
    ) {
        self.last = self.bytes.len();
        self.doing.push(doing);
        // The length is filled in below.
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(((flags | libc::NLM_F_REQUEST) as u16).to_ne_bytes());
        // Sequence numbers count from 1; the kernel fills in the port.
        self.bytes.extend((self.doing.len() as u32).to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(body);
        for (kind, value) in attributes {
            self.bytes.extend((4 + value.len() as u16).to_ne_bytes());
            self.bytes.extend(kind.to_ne_bytes());
            self.bytes.extend_from_slice(value);
            self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        }
        let length = (self.bytes.len() - self.last) as u32;
        self.bytes[self.last..self.last + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Has the kernel do all of it. What comes after a refused request is tried too; the first refusal is returned.
    ///
    /// # Errors
    /// [`NetlinkError`].
    pub fn send(mut self, socket: impl AsFd) -> Result<(), NetlinkError> {
        if self.doing.is_empty() {
            return Ok(());
        }
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        let at = self.last + 6;
        let given = u16::from_ne_bytes([self.bytes[at], self.bytes[at + 1]]);
        self.bytes[at..at + 2].copy_from_slice(&(given | flags).to_ne_bytes());
        let failed = |errno: Errno| NetlinkError::Socket(errno.into());
        send(&socket, &self.bytes, SendFlags::empty()).map_err(failed)?;
        let mut refused = None;
        // Each answer is a message of its own, and they are all there by now.
        for _ in 0..self.doing.len() {
            let mut answer = [0; ANSWER_MAX];
            let (bytes, _) = recv(&socket, &mut answer, RecvFlags::empty()).map_err(failed)?;
            let (sequence, code) = read_answer(&answer[..bytes])?;
            if code != 0 && refused.is_none() {
                let doing = sequence.checked_sub(1).and_then(|at| self.doing.get(at)).copied();
                let doing = doing.unwrap_or("do what was not asked");
                let source = io::Error::from_raw_os_error(code.saturating_neg());
                refused = Some(NetlinkError::Refused { doing, source });
            }
            if sequence == self.doing.len() {
                break;
            }
        }
        refused.map_or(Ok(()), Err)
    }
}

/// What the kernel does with packets to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteKind {
    /// They are for this host, or for everybody near it.
    Local,
    /// They go somewhere else, or nowhere.
    Away,
}

/// Asks the kernel what it does with packets to `address`, in the network namespace of the socket.
///
/// # Errors
/// [`NetlinkError::Socket`], [`NetlinkError::Answer`].
pub fn route_kind(socket: impl AsFd, address: Ipv4Addr) -> Result<RouteKind, NetlinkError> {
    let mut request = Requests::new();
    let mut body = [0; ROUTE];
    // The whole of the destination counts.
    (body[0], body[1]) = (libc::AF_INET as u8, 32);
    let attributes = [(libc::RTA_DST, &address.octets()[..])];
    request.request("look a route up", libc::RTM_GETROUTE, 0, &body, &attributes);
    let failed = |errno: Errno| NetlinkError::Socket(errno.into());
    send(&socket, &request.bytes, SendFlags::empty()).map_err(failed)?;
    let mut answer = [0; ANSWER_MAX];
    let (bytes, _) = recv(&socket, &mut answer, RecvFlags::empty()).map_err(failed)?;
    read_route_kind(&answer[..bytes.min(ANSWER_MAX)])
}

fn read_route_kind(answer: &[u8]) -> Result<RouteKind, NetlinkError> {
    let kind = answer.get(4..6).map(|word| u16::from_ne_bytes([word[0], word[1]]));
    match (kind, answer.get(HEADER + ROUTE_KIND)) {
        (Some(libc::RTM_NEWROUTE), Some(kind)) => match *kind {
            libc::RTN_LOCAL | libc::RTN_BROADCAST | libc::RTN_ANYCAST | libc::RTN_MULTICAST => {
                Ok(RouteKind::Local)
            }
            _ => Ok(RouteKind::Away),
        },
        // There is no way there.
        _ if read_answer(answer).is_ok_and(|(_, code)| code != 0) => Ok(RouteKind::Away),
        _ => Err(NetlinkError::Answer { bytes: answer.len() }),
    }
}

/// `struct ifinfomsg` of a device: flags, and which of them change.
fn link(index: u32, flags: [u8; 4], change: [u8; 4]) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags);
    body[12..].copy_from_slice(&change);
    body
}

/// Which request an answer is for, and the negative error number in it.
fn read_answer(bytes: &[u8]) -> Result<(usize, i32), NetlinkError> {
    let unreadable = NetlinkError::Answer { bytes: bytes.len() };
    let word = |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    let kind = word(4).map(|word: [u8; 4]| u16::from_ne_bytes([word[0], word[1]]));
    match (kind.map(i32::from), word(8), word(HEADER)) {
        (Some(libc::NLMSG_ERROR), Some(sequence), Some(code)) => {
            Ok((u32::from_ne_bytes(sequence) as usize, i32::from_ne_bytes(code)))
        }
        _ => Err(unreadable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_what_was_refused() {
        // No machine has that many devices, and nobody may do this without privileges either.
        let mut requests = Requests::new();
        requests.set_mac(i32::MAX as u32, [2, 0, 0, 0, 0, 1]);
        requests.add_address(i32::MAX as u32, Ipv4Addr::LOCALHOST, 8);
        let refused = requests.send(socket().unwrap());
        assert!(matches!(refused, Err(NetlinkError::Refused { doing: "set the MAC", .. })), "{refused:?}");
        let mut requests = Requests::new();
        requests.default_route(i32::MAX as u32, Ipv4Addr::new(10, 0, 0, 1));
        let refused = requests.send(socket().unwrap());
        assert!(
            matches!(refused, Err(NetlinkError::Refused { doing: "set the default route", .. })),
            "{refused:?}"
        );
        assert!(Requests::new().send(socket().unwrap()).is_ok());
    }

    #[test]
    fn messages_are_laid_out_as_the_kernel_reads_them() {
        let mut requests = Requests::new();
        requests.set_mac(2, [2, 1, 2, 3, 4, 5]);
        requests.link_up(3);
        let first = [
            44, 0, 0, 0, 19, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, // header
            0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // ifinfomsg
            10, 0, 1, 0, 2, 1, 2, 3, 4, 5, 0, 0, // IFLA_ADDRESS, padded
        ];
        assert_eq!(requests.bytes[..44], first);
        let second = [
            32, 0, 0, 0, 19, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0,
        ];
        assert_eq!(requests.bytes[44..], second);
    }

    #[test]
    fn the_kernel_says_which_addresses_are_this_hosts() {
        let socket = socket().unwrap();
        assert_eq!(route_kind(&socket, Ipv4Addr::LOCALHOST).unwrap(), RouteKind::Local);
        assert_eq!(route_kind(&socket, Ipv4Addr::new(192, 0, 2, 1)).unwrap(), RouteKind::Away);
        assert!(read_route_kind(&[0; 20]).is_err() && read_route_kind(&[]).is_err());
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        assert!(matches!(read_answer(&[]), Err(NetlinkError::Answer { bytes: 0 })));
        assert!(matches!(read_answer(&[0; 36]), Err(NetlinkError::Answer { bytes: 36 })));
        assert!(matches!(
            read_answer(&[36, 0, 0, 0, 2, 0, 0, 0, 1, 0]),
            Err(NetlinkError::Answer { bytes: 10 })
        ));
    }
}
