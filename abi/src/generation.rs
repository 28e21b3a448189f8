//! The generation record: what the monitor tells a machine about which copy it is.
//!
//! The host encodes it per child, the agent reads it through the doorbell right after the snapshot point: a head of
//! fixed size, and behind it the environment, so that a child without one reads no more than the head. Little endian,
//! addresses in network order:
//!
//! ```text
//! offset  size  field
//!      0     4  magic          0x464b4752
//!      4     4  version        2
//!      8     8  generation     0 = this machine was never forked
//!     16     8  unix_time_ns   wall clock, nanoseconds since 1970; the monitor puts in what it is when it is read
//!     24    64  entropy        fresh random bytes, different for every child
//!     88     4  hostname_len   0..=64
//!     92    64  hostname       hostname_len bytes of [A-Za-z0-9.-], then zero
//!    156    16  machine_id     /etc/machine-id as raw bytes
//!    172     4  flags          bit 0: there is a network, else the next five fields and mtu are zero
//!    176     6  mac            of the first Ethernet device
//!    182     1  prefix         length of the network's prefix, 1..=32
//!    183     1  zero
//!    184     4  address        IPv4
//!    188     4  gateway        IPv4; 0.0.0.0 for none
//!    192     4  environment    length of what follows the head, 0..=3584
//!    196     2  mtu            longest packet, bytes; 0 leaves it as it is
//!    198   314  reserved       zero
//!    512        NAME=VALUE, UTF-8, a zero byte after each; no name twice
//! ```

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use thiserror::Error;

/// Size of a record's head in bytes.
pub const HEAD_LEN: usize = 512;
/// Size of the longest record in bytes: what the monitor hands out at most.
pub const RECORD_MAX: usize = 4096;
/// The most that an environment takes, in bytes: each variable as `NAME=VALUE` and one more byte.
pub const ENVIRONMENT_MAX: usize = RECORD_MAX - HEAD_LEN;
/// First four bytes of a record, little endian.
pub const MAGIC: u32 = 0x464b_4752;
/// The only version there is.
pub const VERSION: u32 = 2;
/// Bytes of entropy in a record.
pub const ENTROPY_LEN: usize = 64;
/// Longest host name in bytes: Linux's `HOST_NAME_MAX`.
pub const HOSTNAME_MAX: usize = 64;

const AT_GENERATION: usize = 8;
/// Where the wall clock lies in a record: the monitor writes it there whenever a record is read from its start.
pub const AT_TIME: usize = 16;
const AT_ENTROPY: usize = 24;
const AT_HOSTNAME_LEN: usize = AT_ENTROPY + ENTROPY_LEN;
const AT_HOSTNAME: usize = AT_HOSTNAME_LEN + 4;
const AT_MACHINE_ID: usize = AT_HOSTNAME + HOSTNAME_MAX;
const AT_FLAGS: usize = AT_MACHINE_ID + 16;
const AT_MAC: usize = AT_FLAGS + 4;
const AT_PREFIX: usize = AT_MAC + 6;
const AT_ADDRESS: usize = AT_PREFIX + 2;
const AT_GATEWAY: usize = AT_ADDRESS + 4;
const AT_ENVIRONMENT_LEN: usize = AT_GATEWAY + 4;
const AT_MTU: usize = AT_ENVIRONMENT_LEN + 4;
const AT_RESERVED: usize = AT_MTU + 2;
const _: () = assert!(AT_HOSTNAME_LEN == 88 && AT_MACHINE_ID == 156 && AT_FLAGS == 172 && AT_MTU == 196);
/// In the flags: there is a network.
const HAS_NETWORK: u32 = 1;

/// A record that must not be believed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum GenerationError {
    /// Shorter than a head, or not as long as its head says.
    #[error("a generation record has {HEAD_LEN} bytes and its environment's, this one {0}")]
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
    /// An address that no machine can have, or flags without a meaning.
    #[error("generation record carries no valid network")]
    Network,
    /// A variable that no environment can have.
    #[error(
        "{name:?} is no environment variable: names are not empty, come once and have no `=`; no zero bytes"
    )]
    Variable {
        /// Its name, as far as it can be told.
        name: String,
    },
    /// Too many or too long variables.
    #[error(
        "the environment takes {bytes} bytes, over the limit of {ENVIRONMENT_MAX} (each NAME=VALUE and one more)"
    )]
    EnvironmentSize {
        /// What it takes.
        bytes: usize,
    },
}

/// How a copy is reached on its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkIdentity {
    /// Ethernet address of the first device.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub address: Ipv4Addr,
    /// Length of the prefix that the network's addresses share, 1 to 32.
    pub prefix: u8,
    /// Where everything else is sent, if anywhere.
    pub gateway: Option<Ipv4Addr>,
    /// Longest packet that goes through, bytes, 68 or more (RFC 791); `None` leaves the device's own.
    pub mtu: Option<u16>,
}

impl NetworkIdentity {
    fn check(self) -> Result<Self, GenerationError> {
        // Multicast is for groups; all zeros is nobody.
        let own_mac = self.mac[0] & 1 == 0 && self.mac != [0; 6];
        let own_address = !self.address.is_unspecified() && !self.address.is_multicast();
        let passable = self.mtu.is_none_or(|mtu| mtu >= 68);
        let valid = own_mac && own_address && passable && (1..=32).contains(&self.prefix);
        if valid { Ok(self) } else { Err(GenerationError::Network) }
    }
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
    /// How it is reached; `None` leaves its network device without a link.
    pub network: Option<NetworkIdentity>,
    /// Variables for the warm worker and for all that is started from now on.
    pub environment: BTreeMap<String, String>,
}

/// Leaves out what must not reach a log: the entropy, which seeds a machine's random numbers, and the environment, in which
/// people keep passwords.
impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation")
            .field("generation", &self.generation)
            .field("unix_time_ns", &self.unix_time_ns)
            .field("hostname", &self.hostname)
            .field("machine_id", &self.machine_id)
            .field("network", &self.network)
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
            network: None,
            environment: BTreeMap::new(),
        }
    }

    /// The record's bytes.
    ///
    /// # Errors
    /// [`GenerationError`] when the host name, the network or a variable is not one, or the variables are too many.
    pub fn encode(&self) -> Result<Vec<u8>, GenerationError> {
        let hostname = self.hostname.as_bytes();
        if !is_hostname(hostname) {
            return Err(GenerationError::Hostname { len: hostname.len() });
        }
        let environment = encode_environment(&self.environment)?;
        let mut bytes = vec![0; HEAD_LEN];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[AT_GENERATION..AT_TIME].copy_from_slice(&self.generation.to_le_bytes());
        bytes[AT_TIME..AT_ENTROPY].copy_from_slice(&self.unix_time_ns.to_le_bytes());
        bytes[AT_ENTROPY..AT_HOSTNAME_LEN].copy_from_slice(&self.entropy);
        // At most HOSTNAME_MAX, checked above.
        bytes[AT_HOSTNAME_LEN..AT_HOSTNAME].copy_from_slice(&(hostname.len() as u32).to_le_bytes());
        bytes[AT_HOSTNAME..AT_HOSTNAME + hostname.len()].copy_from_slice(hostname);
        bytes[AT_MACHINE_ID..AT_FLAGS].copy_from_slice(&self.machine_id);
        if let Some(network) = self.network {
            let NetworkIdentity { mac, address, prefix, gateway, mtu } = network.check()?;
            bytes[AT_FLAGS..AT_MAC].copy_from_slice(&HAS_NETWORK.to_le_bytes());
            bytes[AT_MAC..AT_PREFIX].copy_from_slice(&mac);
            bytes[AT_PREFIX] = prefix;
            bytes[AT_ADDRESS..AT_GATEWAY].copy_from_slice(&address.octets());
            let gateway = gateway.unwrap_or(Ipv4Addr::UNSPECIFIED);
            bytes[AT_GATEWAY..AT_ENVIRONMENT_LEN].copy_from_slice(&gateway.octets());
            bytes[AT_MTU..AT_RESERVED].copy_from_slice(&mtu.unwrap_or(0).to_le_bytes());
        }
        // At most ENVIRONMENT_MAX, checked above.
        bytes[AT_ENVIRONMENT_LEN..AT_MTU].copy_from_slice(&(environment.len() as u32).to_le_bytes());
        bytes.extend(environment);
        Ok(bytes)
    }

    /// Reads a record back, believing nothing.
    ///
    /// # Errors
    /// [`GenerationError`] naming the first thing that is wrong.
    pub fn decode(record: &[u8]) -> Result<Self, GenerationError> {
        let wrong_length = GenerationError::Length(record.len());
        let Some((bytes, environment)) = record.split_first_chunk::<HEAD_LEN>() else {
            return Err(wrong_length);
        };
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
        let reserved = (AT_HOSTNAME + len..AT_MACHINE_ID).chain(AT_RESERVED..HEAD_LEN);
        if let Some(offset) = reserved.into_iter().find(|offset| bytes[*offset] != 0) {
            return Err(GenerationError::Reserved(offset));
        }
        if record_len(bytes) != record.len() {
            return Err(wrong_length);
        }
        Ok(Self {
            generation: u64::from_le_bytes(array(bytes, AT_GENERATION)),
            unix_time_ns: u64::from_le_bytes(array(bytes, AT_TIME)),
            entropy: array(bytes, AT_ENTROPY),
            hostname,
            machine_id: array(bytes, AT_MACHINE_ID),
            network: decode_network(bytes)?,
            environment: decode_environment(environment)?,
        })
    }
}

/// How long the record with this head is, in bytes. [`HEAD_LEN`] where the head names an impossible length: what
/// follows is then not worth reading, and [`Generation::decode`] refuses it.
#[must_use]
pub fn record_len(head: &[u8; HEAD_LEN]) -> usize {
    let environment = u32::from_le_bytes(array(head, AT_ENVIRONMENT_LEN)) as usize;
    if environment <= ENVIRONMENT_MAX { HEAD_LEN + environment } else { HEAD_LEN }
}

fn decode_network(bytes: &[u8; HEAD_LEN]) -> Result<Option<NetworkIdentity>, GenerationError> {
    let (flags, fields) =
        (u32::from_le_bytes(array(bytes, AT_FLAGS)), (AT_MAC..AT_ENVIRONMENT_LEN).chain(AT_MTU..AT_RESERVED));
    match flags {
        0 => match fields.into_iter().find(|offset| bytes[*offset] != 0) {
            Some(offset) => Err(GenerationError::Reserved(offset)),
            None => Ok(None),
        },
        HAS_NETWORK if bytes[AT_PREFIX + 1] != 0 => Err(GenerationError::Reserved(AT_PREFIX + 1)),
        HAS_NETWORK => {
            let mtu = u16::from_le_bytes(array(bytes, AT_MTU));
            let gateway = Ipv4Addr::from(array(bytes, AT_GATEWAY));
            let network = NetworkIdentity {
                mac: array(bytes, AT_MAC),
                address: Ipv4Addr::from(array(bytes, AT_ADDRESS)),
                prefix: bytes[AT_PREFIX],
                gateway: Some(gateway).filter(|gateway| !gateway.is_unspecified()),
                mtu: Some(mtu).filter(|mtu| *mtu != 0),
            };
            network.check().map(Some)
        }
        _ => Err(GenerationError::Network),
    }
}

fn encode_environment(environment: &BTreeMap<String, String>) -> Result<Vec<u8>, GenerationError> {
    let mut bytes = Vec::new();
    for (name, value) in environment {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(GenerationError::Variable { name: name.clone() });
        }
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(b'=');
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
    }
    if bytes.len() > ENVIRONMENT_MAX {
        return Err(GenerationError::EnvironmentSize { bytes: bytes.len() });
    }
    Ok(bytes)
}

fn decode_environment(bytes: &[u8]) -> Result<BTreeMap<String, String>, GenerationError> {
    let mut environment = BTreeMap::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| *byte == 0);
        let entry = &rest[..end.unwrap_or(rest.len())];
        let bad = || GenerationError::Variable { name: String::from_utf8_lossy(entry).into_owned() };
        let text = std::str::from_utf8(entry).map_err(|_| bad())?;
        let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(bad)?;
        rest = &rest[end.ok_or_else(bad)? + 1..];
        if environment.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(bad());
        }
    }
    Ok(environment)
}

/// `N` bytes at a constant offset that lies inside the record.
fn array<const N: usize>(bytes: &[u8; HEAD_LEN], at: usize) -> [u8; N] {
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
#[path = "generation_tests.rs"]
mod tests;
