//! The doorbell: eight I/O ports through which a guest process signals the monitor with one `out` instruction.
//!
//! The monitor (`forkd-vmm`) implements the device, the agent rings it. One-byte writes to [`COMMAND_PORT`] are
//! commands; one-byte reads (also `rep insb`) of [`DATA_PORT`] return the bytes of the generation record
//! ([`crate::generation`]) in order, and zero beyond its end. A machine without the device reads `0xff` everywhere.

/// First port of the device.
pub const FIRST_PORT: u16 = 0xfd00;
/// Number of ports of the device.
pub const PORT_COUNT: u16 = 8;
/// Takes one-byte commands ([`Command`]).
pub const COMMAND_PORT: u16 = FIRST_PORT;
/// Returns the generation record, one byte a read.
pub const DATA_PORT: u16 = FIRST_PORT + 4;

/// What a one-byte write to [`COMMAND_PORT`] asks or says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Command {
    /// Take the snapshot now; the copies continue with the instruction after this write.
    Snapshot = 1,
    /// The first instruction after the snapshot has run.
    Resumed = 2,
    /// The resumed work (entropy, clock, names) is done and requests will be answered.
    Ready = 3,
    /// The agent is up and listens.
    Booted = 4,
    /// The next read of [`DATA_PORT`] returns the first byte of the generation record.
    Rewind = 0x10,
}

impl Command {
    /// The command a written byte stands for; `None` for bytes without a meaning, which a monitor ignores.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Snapshot),
            2 => Some(Self::Resumed),
            3 => Some(Self::Ready),
            4 => Some(Self::Booted),
            0x10 => Some(Self::Rewind),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_commands_agree() {
        let known: Vec<u8> = (0..=u8::MAX).filter(|byte| Command::from_byte(*byte).is_some()).collect();
        assert_eq!(known, [1, 2, 3, 4, 0x10]);
        for byte in known {
            assert_eq!(Command::from_byte(byte).map(|command| command as u8), Some(byte));
        }
    }
}
