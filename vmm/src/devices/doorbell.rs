//! The doorbell: an I/O port by which the guest tells the monitor where it stands, and from which a fork reads who it is.
//!
//! A one-byte write to [`COMMAND_PORT`] is a [`Ring`]; the snapshot is taken at such a write, and the next one is the first
//! thing a fork does, which proves that it runs. Reads of [`DATA_PORT`] return the generation record byte by byte.
//! `forkd-guest` defines the record. Nothing of it has a meaning here but eight bytes at [`CLOCK_OFFSET`]: they are the
//! wall clock when the guest starts to read, as a record is written long before its machine runs when there are many.
//! Callers: `bus.rs`.

use serde::{Deserialize, Serialize};

/// Commands are written here.
pub const COMMAND_PORT: u16 = 0xfd00;
/// The generation record is read from here.
pub const DATA_PORT: u16 = 0xfd04;
/// Command that makes reads start over.
const REWIND: u8 = 0x10;
/// Longest record, bytes.
pub const RECORD_MAX: usize = 4096;
/// Where the wall clock lies in a record: nanoseconds since 1970, eight bytes, little endian. Zero stays zero, and shorter
/// records have none.
pub const CLOCK_OFFSET: usize = 16;

/// What a guest says by a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ring {
    /// Take the snapshot now.
    SnapshotHere,
    /// The instruction after the snapshot has run.
    Resumed,
    /// A fork has made itself unique and answers requests.
    Ready,
    /// The agent has started.
    Booted,
}

/// The device.
#[derive(Debug, Default)]
pub struct Doorbell {
    record: Vec<u8>,
    position: usize,
}

impl Doorbell {
    /// A doorbell that hands out `record`, cut to [`RECORD_MAX`].
    pub fn new(mut record: Vec<u8>) -> Doorbell {
        record.truncate(RECORD_MAX);
        Doorbell { record, position: 0 }
    }

    /// The guest wrote a byte to the command port.
    pub fn write(&mut self, value: u8) -> Option<Ring> {
        match value {
            1 => Some(Ring::SnapshotHere),
            2 => Some(Ring::Resumed),
            3 => Some(Ring::Ready),
            4 => Some(Ring::Booted),
            REWIND => {
                self.position = 0;
                self.set_clock();
                None
            }
            _ => None,
        }
    }

    fn set_clock(&mut self) {
        let clock = self.record.get_mut(CLOCK_OFFSET..CLOCK_OFFSET + 8);
        if let Some(clock) = clock.filter(|clock| clock.iter().any(|byte| *byte != 0)) {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
            let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
            clock.copy_from_slice(&now.to_le_bytes());
        }
    }

    /// The guest reads from the data port; past the record's end it reads zeros.
    pub fn read(&mut self, into: &mut [u8]) {
        let rest = self.record.get(self.position..).unwrap_or_default();
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        into[count..].fill(0);
        self.position = (self.position + count).min(self.record.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_read_in_order_and_again_after_a_rewind() {
        let mut doorbell = Doorbell::new(vec![1, 2, 3]);
        let mut bytes = [9; 2];
        doorbell.read(&mut bytes);
        assert_eq!(bytes, [1, 2]);
        doorbell.read(&mut bytes);
        assert_eq!(bytes, [3, 0]);
        doorbell.read(&mut bytes);
        assert_eq!(bytes, [0, 0]);
        assert_eq!(doorbell.write(REWIND), None);
        doorbell.read(&mut bytes);
        assert_eq!(bytes, [1, 2]);
        assert_eq!(doorbell.write(2), Some(Ring::Resumed));
        assert_eq!(doorbell.write(77), None);
    }

    #[test]
    fn the_clock_in_a_record_is_that_of_its_reading() {
        let clock_of = |doorbell: &mut Doorbell| {
            doorbell.write(REWIND);
            let mut bytes = [0; 32];
            doorbell.read(&mut bytes);
            assert!(bytes[..16].iter().chain(&bytes[24..]).all(|byte| *byte == 7), "{bytes:?}");
            u64::from_le_bytes(bytes[16..24].try_into().unwrap())
        };
        let mut doorbell = Doorbell::new(vec![7; 32]);
        let (first, since_1970) = (clock_of(&mut doorbell), std::time::UNIX_EPOCH.elapsed().unwrap());
        assert!(since_1970.as_nanos() as u64 - first < 1_000_000_000, "{first} is not now");
        assert!(clock_of(&mut doorbell) > first);
        let mut without = vec![7; 32];
        without[16..24].fill(0);
        assert_eq!(
            clock_of(&mut Doorbell::new(without)),
            0,
            "a machine that is no copy is not told the time"
        );
    }
}
