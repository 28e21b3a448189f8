//! The generation record: what the monitor tells a machine about which copy it is.
//!
//! The host encodes it per child, the agent reads it through the doorbell right after the snapshot point. Fixed size,
//! little endian:
//!
//! ```text
//! offset  size  field
//!      0     4  magic          0x464b4752
//!      4     4  version        1
//!      8     8  generation     0 = this machine was never forked
//!     16     8  unix_time_ns   wall clock at the resume, nanoseconds since 1970
//!     24    64  entropy        fresh random bytes, different for every child
//!     88     4  hostname_len   0..=64
//!     92    64  hostname       hostname_len bytes of [A-Za-z0-9.-], then zero
//!    156    16  machine_id     /etc/machine-id as raw bytes
//!    172   340  reserved       zero
//! ```

use thiserror::Error;

/// Size of an encoded record in bytes.
pub const RECORD_LEN: usize = 512;
/// First four bytes of a record, little endian.
pub const MAGIC: u32 = 0x464b_4752;
/// The only version there is.
pub const VERSION: u32 = 1;
/// Bytes of entropy in a record.
pub const ENTROPY_LEN: usize = 64;
/// Longest host name in bytes: Linux's `HOST_NAME_MAX`.
pub const HOSTNAME_MAX: usize = 64;

const AT_GENERATION: usize = 8;
const AT_TIME: usize = 16;
const AT_ENTROPY: usize = 24;
const AT_HOSTNAME_LEN: usize = AT_ENTROPY + ENTROPY_LEN;
const AT_HOSTNAME: usize = AT_HOSTNAME_LEN + 4;
const AT_MACHINE_ID: usize = AT_HOSTNAME + HOSTNAME_MAX;
const AT_RESERVED: usize = AT_MACHINE_ID + 16;
const _: () = assert!(AT_HOSTNAME_LEN == 88 && AT_MACHINE_ID == 156 && AT_RESERVED == 172);

/// A record that must not be believed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum GenerationError {
    /// Not [`RECORD_LEN`] bytes.
    #[error("a generation record has {RECORD_LEN} bytes, this one {0}")]
    Length(usize),
    /// The first bytes are another's: `0xffffffff` where there is no doorbell.
    #[error("generation record starts with {0:#010x}, not {MAGIC:#010x}")]
    Magic(u32),
    /// Written by a newer (or broken) monitor.
    #[error("generation record has version {0}, this agent knows {VERSION}")]
    Version(u32),
    /// A host name that is too long or has bytes no host name has.
    #[error("generation record carries no valid host name ({len} bytes)")]
    Hostname {
        /// The length the record, or the caller, gave.
        len: usize,
    },
    /// Bytes that must be zero are not.
    #[error("generation record has a non-zero reserved byte at offset {0}")]
    Reserved(usize),
}

/// Which copy of a snapshot a machine is, and the identity it is to take on.
#[derive(Clone, PartialEq, Eq)]
pub struct Generation {
    /// 0 for a machine that was never forked, else different for every fork.
    pub generation: u64,
    /// Wall clock at the resume, nanoseconds since 1970.
    pub unix_time_ns: u64,
    /// Fresh random bytes for the kernel and the worker.
    pub entropy: [u8; ENTROPY_LEN],
    /// At most [`HOSTNAME_MAX`] bytes of `[A-Za-z0-9.-]`; empty keeps the old name.
    pub hostname: String,
    /// `/etc/machine-id` as raw bytes; all zero keeps the old one.
    pub machine_id: [u8; 16],
}

/// Leaves the entropy out: it seeds a machine's random numbers and must not reach a log.
impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation")
            .field("generation", &self.generation)
            .field("unix_time_ns", &self.unix_time_ns)
            .field("hostname", &self.hostname)
            .field("machine_id", &self.machine_id)
            .finish_non_exhaustive()
    }
}

impl Generation {
    /// The record of a machine that was never forked.
    #[must_use]
    pub fn original() -> Self {
        Self {
            generation: 0,
            unix_time_ns: 0,
            entropy: [0; ENTROPY_LEN],
            hostname: String::new(),
            machine_id: [0; 16],
        }
    }

    /// The record's bytes.
    ///
    /// # Errors
    /// [`GenerationError::Hostname`] when the host name is not one.
    pub fn encode(&self) -> Result<[u8; RECORD_LEN], GenerationError> {
        let hostname = self.hostname.as_bytes();
        if !is_hostname(hostname) {
            return Err(GenerationError::Hostname { len: hostname.len() });
        }
        let mut bytes = [0; RECORD_LEN];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[AT_GENERATION..AT_TIME].copy_from_slice(&self.generation.to_le_bytes());
        bytes[AT_TIME..AT_ENTROPY].copy_from_slice(&self.unix_time_ns.to_le_bytes());
        bytes[AT_ENTROPY..AT_HOSTNAME_LEN].copy_from_slice(&self.entropy);
        // At most HOSTNAME_MAX, checked above.
        bytes[AT_HOSTNAME_LEN..AT_HOSTNAME].copy_from_slice(&(hostname.len() as u32).to_le_bytes());
        bytes[AT_HOSTNAME..AT_HOSTNAME + hostname.len()].copy_from_slice(hostname);
        bytes[AT_MACHINE_ID..AT_RESERVED].copy_from_slice(&self.machine_id);
        Ok(bytes)
    }

    /// Reads a record back, believing nothing.
    ///
    /// # Errors
    /// [`GenerationError`] naming the first thing that is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, GenerationError> {
        let bytes: &[u8; RECORD_LEN] = bytes.try_into().map_err(|_| GenerationError::Length(bytes.len()))?;
        let magic = u32::from_le_bytes(array(bytes, 0));
        if magic != MAGIC {
            return Err(GenerationError::Magic(magic));
        }
        let version = u32::from_le_bytes(array(bytes, 4));
        if version != VERSION {
            return Err(GenerationError::Version(version));
        }
        let len = u32::from_le_bytes(array(bytes, AT_HOSTNAME_LEN)) as usize;
        let bad_hostname = GenerationError::Hostname { len };
        if len > HOSTNAME_MAX || !is_hostname(&bytes[AT_HOSTNAME..AT_HOSTNAME + len]) {
            return Err(bad_hostname);
        }
        let hostname =
            std::str::from_utf8(&bytes[AT_HOSTNAME..AT_HOSTNAME + len]).map_err(|_| bad_hostname)?.to_owned();
        let reserved = (AT_HOSTNAME + len..AT_MACHINE_ID).chain(AT_RESERVED..RECORD_LEN);
        if let Some(offset) = reserved.into_iter().find(|offset| bytes[*offset] != 0) {
            return Err(GenerationError::Reserved(offset));
        }
        Ok(Self {
            generation: u64::from_le_bytes(array(bytes, AT_GENERATION)),
            unix_time_ns: u64::from_le_bytes(array(bytes, AT_TIME)),
            entropy: array(bytes, AT_ENTROPY),
            hostname,
            machine_id: array(bytes, AT_MACHINE_ID),
        })
    }
}

/// `N` bytes at a constant offset that lies inside the record.
fn array<const N: usize>(bytes: &[u8; RECORD_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn is_hostname(name: &[u8]) -> bool {
    name.len() <= HOSTNAME_MAX
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-' || *byte == b'.')
        && !name.starts_with(b"-")
        && !name.starts_with(b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Generation {
        Generation {
            generation: 7,
            unix_time_ns: 1_700_000_000_123_456_789,
            entropy: std::array::from_fn(|i| i as u8),
            hostname: "python-numpy-7".to_owned(),
            machine_id: [0xab; 16],
        }
    }

    #[test]
    fn survives_the_round_trip() {
        for generation in [example(), Generation::original()] {
            let bytes = generation.encode().unwrap();
            assert_eq!(Generation::decode(&bytes).unwrap(), generation);
        }
    }

    #[test]
    fn layout_is_the_documented_one() {
        let bytes = example().encode().unwrap();
        assert_eq!(&bytes[0..8], &[0x52, 0x47, 0x4b, 0x46, 1, 0, 0, 0]);
        assert_eq!(&bytes[8..16], &7u64.to_le_bytes());
        assert_eq!(bytes[24..88], example().entropy);
        assert_eq!(&bytes[88..92], &14u32.to_le_bytes());
        assert_eq!(&bytes[92..106], b"python-numpy-7");
        assert_eq!(&bytes[156..172], &[0xab; 16]);
    }

    #[test]
    fn host_names_are_checked_both_ways() {
        for bad in ["a b", "a/b", "ü", "-a", ".a", "a\n", &"x".repeat(65)] {
            let generation = Generation { hostname: bad.to_owned(), ..example() };
            assert!(matches!(generation.encode(), Err(GenerationError::Hostname { .. })), "{bad}");
        }
        let longest = Generation { hostname: "x".repeat(64), ..example() };
        assert_eq!(Generation::decode(&longest.encode().unwrap()).unwrap(), longest);
        let mut bytes = example().encode().unwrap();
        bytes[88..92].copy_from_slice(&65u32.to_le_bytes());
        assert_eq!(Generation::decode(&bytes), Err(GenerationError::Hostname { len: 65 }));
        bytes[88..92].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Generation::decode(&bytes).is_err());
        let mut bytes = example().encode().unwrap();
        bytes[93] = b'/';
        assert_eq!(Generation::decode(&bytes), Err(GenerationError::Hostname { len: 14 }));
    }

    #[test]
    fn anything_else_is_refused() {
        assert_eq!(Generation::decode(&[]), Err(GenerationError::Length(0)));
        assert_eq!(Generation::decode(&[0; 511]), Err(GenerationError::Length(511)));
        assert_eq!(Generation::decode(&[0xff; RECORD_LEN]), Err(GenerationError::Magic(u32::MAX)));
        let mut bytes = example().encode().unwrap();
        bytes[4] = 2;
        assert_eq!(Generation::decode(&bytes), Err(GenerationError::Version(2)));
        for offset in [106, 155, 172, 511] {
            let mut bytes = example().encode().unwrap();
            bytes[offset] = 1;
            assert_eq!(Generation::decode(&bytes), Err(GenerationError::Reserved(offset)));
        }
    }

    #[test]
    fn entropy_stays_out_of_debug_output() {
        let text = format!("{:?}", Generation { entropy: [0x5a; 64], ..example() });
        assert!(!text.contains("90"), "{text}");
    }
}
