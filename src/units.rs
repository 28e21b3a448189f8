//! Sizes, rates and durations as people type them (`256KiB`, `50MB/s`, `20ms`) and as they read them.
//!
//! Pure; used by `cli` to parse and by commands to print.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use forkd_engine::picture::sizes::show_size;

/// Why a size, rate or duration could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnitError {
    /// The number in front of the unit is missing or malformed.
    #[error("`{0}` does not start with a number")]
    Number(String),
    /// The unit is not one of those listed.
    #[error("`{unit}` in `{text}` is not a unit ({expected})")]
    Unit {
        /// What was given.
        text: String,
        /// The part after the number.
        unit: String,
        /// The units there are.
        expected: &'static str,
    },
    /// The value does not fit.
    #[error("`{0}` is out of range")]
    Range(String),
}

const SIZE_UNITS: &str = "B, kB, MB, GB, TB or KiB, MiB, GiB, TiB";
const TIME_UNITS: &str = "us, ms, s, m, h";

fn split(text: &str) -> Result<(f64, &str), UnitError> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| UnitError::Number(text.to_owned()))?;
    Ok((number, text[end..].trim()))
}

fn scaled(text: &str, number: f64, factor: f64) -> Result<u64, UnitError> {
    let value = (number * factor).round();
    // 2^63 is exact in f64; beyond it nothing here is a plausible size.
    if value.is_finite() && value < 9_223_372_036_854_775_808.0 {
        Ok(value as u64)
    } else {
        Err(UnitError::Range(text.to_owned()))
    }
}

/// Bytes: `4096`, `256K`/`256KiB` (1024), `50MB` (1000). A bare letter is binary, as in `dd` and `truncate`.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text)?;
    let factor: f64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => {
            return Err(UnitError::Unit {
                text: text.to_owned(),
                unit: unit.to_owned(),
                expected: SIZE_UNITS,
            });
        }
    };
    scaled(text, number, factor)
}

/// Processors, from 0.01 to 1024.
pub fn parse_cpus(text: &str) -> Result<f64, UnitError> {
    let cpus: f64 = text.trim().parse().map_err(|_| UnitError::Number(text.to_owned()))?;
    if (0.01..=1024.0).contains(&cpus) { Ok(cpus) } else { Err(UnitError::Range(text.to_owned())) }
}

/// Bytes per second: a size with an optional `/s`; never zero.
pub fn parse_rate(text: &str) -> Result<u64, UnitError> {
    match parse_size(text.trim().strip_suffix("/s").unwrap_or(text))? {
        0 => Err(UnitError::Range(text.to_owned())),
        rate => Ok(rate),
    }
}

/// A duration with its unit: `20ms`, `1.5s`, `2m`. A bare `0` is allowed; another bare number is not.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let (number, unit) = split(text)?;
    let nanoseconds = match unit {
        "us" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        "m" => 60e9,
        "h" => 3600e9,
        "" if number == 0.0 => 1.0,
        _ => {
            return Err(UnitError::Unit {
                text: text.to_owned(),
                unit: unit.to_owned(),
                expected: TIME_UNITS,
            });
        }
    };
    scaled(text, number, nanoseconds).map(Duration::from_nanos)
}

/// `4.2%`, one decimal; `-` when there is no whole.
pub fn show_share(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1}%", part as f64 * 100.0 / whole as f64) }
}

/// `3 min ago`: how long ago a time in seconds since 1970 is.
pub fn show_since(unix: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    show_ago(now.saturating_sub(unix))
}

fn show_ago(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_both_kinds_of_unit() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("256KiB"), Ok(262_144));
        assert_eq!(parse_size("256 k"), Ok(262_144));
        assert_eq!(parse_size("1.5MB"), Ok(1_500_000));
        assert!(matches!(parse_size("12 parsecs"), Err(UnitError::Unit { .. })));
        assert!(matches!(parse_size("-1"), Err(UnitError::Number(_))));
        assert!(matches!(parse_size(""), Err(UnitError::Number(_))));
        assert!(matches!(parse_size("99999999999TiB"), Err(UnitError::Range(_))));
    }

    #[test]
    fn rates_are_never_zero() {
        assert_eq!(parse_rate("50MB/s"), Ok(50_000_000));
        assert_eq!(parse_rate("1KiB"), Ok(1024));
        assert!(matches!(parse_rate("0/s"), Err(UnitError::Range(_))));
    }

    #[test]
    fn durations_want_a_unit() {
        assert_eq!(parse_duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert!(matches!(parse_duration("20"), Err(UnitError::Unit { .. })));
    }

    #[test]
    fn times_print_for_people() {
        let shown = [59, 60, 3599, 3600, 172_799, 172_800].map(show_ago);
        assert_eq!(shown, ["59 s ago", "1 min ago", "59 min ago", "1 h ago", "47 h ago", "2 days ago"]);
        assert!(show_since(u64::MAX).starts_with("0 s"), "a clock that was set back");
    }

    #[test]
    fn sizes_print_for_people() {
        assert_eq!(show_size(1023), "1023 B");
        assert_eq!(show_size(1024), "1.0 KiB");
        assert_eq!(show_size(1024 * 1024 - 1), "1.0 MiB");
        assert_eq!(show_size(u64::MAX), "16384.0 PiB");
        assert_eq!(show_share(1, 0), "-");
        assert_eq!(show_share(1, 8), "12.5%");
    }
}
