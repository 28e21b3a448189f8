//! The doorbell: an I/O port by which the guest tells the monitor where it stands, and from which a fork reads who it is.
//!
//! A one-byte write to [`COMMAND_PORT`] is a [`Ring`]; the snapshot is taken at such a write, and the next one is the first
//! thing a fork does, which proves that it runs. Reads of [`DATA_PORT`] return the generation record byte by byte.
//! The record is opaque here; `forkd-guest` defines it. Callers: `machine.rs`.

use serde::{Deserialize, Serialize};

/// Commands are written here.
pub const COMMAND_PORT: u16 = 0xfd00;
/// The generation record is read from here.
pub const DATA_PORT: u16 = 0xfd04;
/// Command that makes reads start over.
const REWIND: u8 = 0x10;
/// Longest record, bytes.
pub const RECORD_MAX: usize = 4096;

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
                None
            }
            _ => None,
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
}
