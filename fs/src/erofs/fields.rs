//! Fields of the image as numbers and times. All are little-endian.

use std::time::{Duration, SystemTime};

/// Seconds and nanoseconds since 1970 as a time; before it when the seconds are negative.
pub(super) fn time(seconds: u64, nanoseconds: u32) -> SystemTime {
    let seconds = seconds as i64;
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = match seconds < 0 {
        true => SystemTime::UNIX_EPOCH.checked_sub(whole),
        false => SystemTime::UNIX_EPOCH.checked_add(whole),
    };
    let within = Duration::from_nanos(u64::from(nanoseconds.min(999_999_999)));
    time.and_then(|time| time.checked_add(within)).unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
