//! Which ports are to be forwarded, as people write it: `GUEST[:LOCAL]`.

use std::num::{NonZero, ParseIntError};
use std::str::FromStr;

/// A TCP port of a child, and where on the host it is to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortMap {
    /// TCP port of the child's loopback.
    pub guest: u16,
    /// TCP port on the host for the first child, one more for each further one; 0 for any free ones.
    pub local: u16,
}

/// A text that names no ports.
#[derive(Debug, thiserror::Error)]
pub enum PortMapError {
    /// Not TCP.
    #[error(
        "`{text}` is not TCP, and only TCP is forwarded: what leads into a child carries streams, no datagrams"
    )]
    Protocol {
        /// What was given.
        text: String,
    },
    /// Not a number from 1 (or 0, where any port will do) to 65535.
    #[error("`{text}` is not GUEST[:LOCAL] with TCP ports, e.g. 5432 or 5432:15432")]
    Number {
        /// What was given.
        text: String,
        /// What is wrong with it.
        #[source]
        source: ParseIntError,
    },
}

/// There are more children than ports behind the first one.
#[derive(Debug, thiserror::Error)]
#[error("{count} children from port {first} on need ports beyond 65535")]
pub struct RangeError {
    /// The first child's port.
    first: u16,
    /// How many children there are.
    count: usize,
}

impl PortMap {
    /// Whether a text is meant as ports rather than as a child or fork: those have longer names or a dash.
    pub fn is_meant(text: &str) -> bool {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        (1..=5).contains(&digits) && matches!(text.as_bytes().get(digits), None | Some(b':' | b'/'))
    }

    /// The port on the host for the child that is the `at`th, counted from 0.
    ///
    /// # Errors
    /// [`RangeError`] when there are not enough ports for `count` children.
    pub fn local_of(self, at: usize, count: usize) -> Result<u16, RangeError> {
        let error = RangeError { first: self.local, count };
        match self.local {
            0 => Ok(0),
            first if usize::from(first) + count > usize::from(u16::MAX) + 1 => Err(error),
            first => u16::try_from(usize::from(first) + at).map_err(|_| error),
        }
    }
}

impl FromStr for PortMap {
    type Err = PortMapError;

    fn from_str(text: &str) -> Result<PortMap, PortMapError> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        if !protocol.eq_ignore_ascii_case("tcp") {
            return Err(PortMapError::Protocol { text: text.to_owned() });
        }
        let failed = |source| PortMapError::Number { text: text.to_owned(), source };
        let (guest, local) = ports.split_once(':').unwrap_or((ports, "0"));
        Ok(PortMap {
            guest: guest.parse::<NonZero<u16>>().map_err(failed)?.get(),
            local: local.parse().map_err(failed)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_what_is_none_is_refused() {
        let parsed = |text: &str| text.parse::<PortMap>().map(|map| (map.guest, map.local)).ok();
        assert_eq!(parsed("5432"), Some((5432, 0)));
        assert_eq!(parsed("5432:0"), Some((5432, 0)));
        assert_eq!(parsed("5432:15432"), Some((5432, 15432)));
        assert_eq!(parsed("80:8080/TCP"), Some((80, 8080)));
        for bad in ["", "0", "65536", "1:65536", "80:", ":80", "80:81:82", "-1", "80:a", "x"] {
            assert!(matches!(bad.parse::<PortMap>(), Err(PortMapError::Number { .. })), "{bad}");
        }
        for other in ["53/udp", "53:53/sctp", "53/"] {
            assert!(matches!(other.parse::<PortMap>(), Err(PortMapError::Protocol { .. })), "{other}");
        }
    }

    #[test]
    fn no_child_or_fork_is_taken_for_ports() {
        for ports in ["1", "65535", "99999", "80:8080", "53/udp", "80:x"] {
            assert!(PortMap::is_meant(ports), "{ports}");
        }
        for name in ["123456", "1a2b3c", "123456-1", "12-1", "abc", "", ":80", "1e4"] {
            assert!(!PortMap::is_meant(name), "{name}");
        }
    }

    #[test]
    fn a_range_ends_with_the_last_port() {
        let local = |first, at, count| PortMap { guest: 1, local: first }.local_of(at, count).ok();
        assert_eq!(
            (local(0, 5, 1000), local(9000, 0, 3), local(9000, 2, 3)),
            (Some(0), Some(9000), Some(9002))
        );
        assert_eq!((local(65533, 2, 3), local(65534, 0, 3)), (Some(65535), None));
    }
}
