//! The part of a PC's real-time clock (MC146818) that Linux reads at boot, so that a new machine starts with the
//! right date. Read-only; forks get their time with the generation record.

use std::time::{SystemTime, UNIX_EPOCH};

/// Index port; data is at the next one.
pub const INDEX_PORT: u16 = 0x70;
/// Data port.
pub const DATA_PORT: u16 = 0x71;

/// A clock that shows the host's time in UTC.
#[derive(Debug, Default)]
pub struct Cmos {
    index: u8,
}

impl Cmos {
    /// The guest wrote to one of the two ports.
    pub fn write(&mut self, port: u16, value: u8) {
        if port == INDEX_PORT {
            self.index = value & 0x7f;
        }
    }

    /// The guest read from one of the two ports.
    pub fn read(&self, port: u16) -> u8 {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if port == DATA_PORT { register(self.index, seconds) } else { 0xff }
    }
}

/// A register's value at `unix` seconds, in binary-coded decimal and 24-hour form.
fn register(index: u8, unix: u64) -> u8 {
    let (year, month, day) = civil_date(unix / 86_400);
    let of_day = unix % 86_400;
    match index {
        0x00 => bcd(of_day % 60),
        0x02 => bcd(of_day / 60 % 60),
        0x04 => bcd(of_day / 3600),
        0x06 => bcd((unix / 86_400 + 4) % 7 + 1),
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        0x32 => bcd(year / 100),
        // Register A: no update in progress, the usual divider; B: 24 hours; D: battery good.
        0x0a => 0x26,
        0x0b => 0x02,
        0x0d => 0x80,
        _ => 0,
    }
}

fn bcd(value: u64) -> u8 {
    (((value / 10) << 4) | (value % 10)) as u8
}

/// Year, month and day of a day number since 1970-01-01 (proleptic Gregorian calendar).
fn civil_date(day_number: u64) -> (u64, u64, u64) {
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let (mut year, mut days) = (1970, day_number);
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(19_782), (2024, 2, 29));
        assert_eq!(civil_date(20_454), (2026, 1, 1));
        // 2009-02-13 23:31:30 UTC.
        let at = |index| register(index, 1_234_567_890);
        assert_eq!((at(0x32), at(9), at(8), at(7)), (0x20, 0x09, 0x02, 0x13));
        assert_eq!((at(4), at(2), at(0), at(6)), (0x23, 0x31, 0x30, 6));
    }
}
