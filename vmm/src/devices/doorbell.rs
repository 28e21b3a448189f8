//! The doorbell: an I/O port by which the guest tells the monitor where it stands, and from which a fork reads who it is.
//!
//! A command written by the guest is a [`Ring`]; the snapshot is taken at such a write, and the next one is the first
//! thing a fork does, which proves that it runs. The data port returns the generation record byte by byte. Ports,
//! commands and the record are defined by `forkd-abi`. The monitor knows one field of the record: the wall clock, which
//! it sets when the guest starts to read, because a record is written long before its machine runs when there are many.

use forkd_abi::doorbell::Command;
use forkd_abi::generation::{AT_TIME, RECORD_MAX};
use serde::{Deserialize, Serialize};

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
        match Command::from_byte(value)? {
            Command::Snapshot => Some(Ring::SnapshotHere),
            Command::Resumed => Some(Ring::Resumed),
            Command::Ready => Some(Ring::Ready),
            Command::Booted => Some(Ring::Booted),
            Command::Rewind => {
                self.position = 0;
                self.set_clock();
                None
            }
        }
    }

    fn set_clock(&mut self) {
        let clock = self.record.get_mut(AT_TIME..AT_TIME + 8);
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
        assert_eq!(doorbell.write(Command::Rewind as u8), None);
        doorbell.read(&mut bytes);
        assert_eq!(bytes, [1, 2]);
        assert_eq!(doorbell.write(2), Some(Ring::Resumed));
        assert_eq!(doorbell.write(77), None);
    }

    #[test]
    fn the_clock_in_a_record_is_that_of_its_reading() {
        let clock_of = |doorbell: &mut Doorbell| {
            doorbell.write(Command::Rewind as u8);
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
