//! `--net-rate`: how much a child may send and receive. A token bucket for each direction.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// What a bucket holds at most: so much of a second's worth may go at once.
const BURST: f64 = 0.1;
/// But at least this, so that whole frames get through, bytes and packets.
const BURST_MIN: (f64, f64) = (65536.0, 4.0);

/// A text that is no rate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no rate: 10mbit, 1MB/s, 500pps or 10mbit,500pps")]
pub struct RateError {
    text: String,
}

/// A limit for each direction of a child's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetRate {
    /// Bytes a second; `None` without a limit.
    pub bytes: Option<u64>,
    /// Packets a second; `None` without a limit.
    pub packets: Option<u64>,
}

impl FromStr for NetRate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<NetRate, RateError> {
        let bad = || RateError { text: text.to_owned() };
        let mut rate = NetRate { bytes: None, packets: None };
        for part in text.split(',') {
            let digits = part.bytes().take_while(u8::is_ascii_digit).count();
            let (number, unit) = part.split_at(digits);
            let number: u64 = number.parse().map_err(|_| bad())?;
            let (slot, value) = match unit.to_ascii_lowercase().as_str() {
                "pps" => (&mut rate.packets, Some(number)),
                "bit" => (&mut rate.bytes, Some(number / 8)),
                "kbit" => (&mut rate.bytes, number.checked_mul(1000 / 8)),
                "mbit" => (&mut rate.bytes, number.checked_mul(1_000_000 / 8)),
                "gbit" => (&mut rate.bytes, number.checked_mul(1_000_000_000 / 8)),
                "kb/s" => (&mut rate.bytes, number.checked_mul(1000)),
                "mb/s" => (&mut rate.bytes, number.checked_mul(1_000_000)),
                "gb/s" => (&mut rate.bytes, number.checked_mul(1_000_000_000)),
                _ => return Err(bad()),
            };
            if slot.is_some() || value.is_none_or(|value| value == 0) {
                return Err(bad());
            }
            *slot = value;
        }
        Ok(rate)
    }
}

impl fmt::Display for NetRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(bytes) = self.bytes {
            write!(f, "{}bit", u128::from(bytes) * 8)?;
        }
        if let Some(packets) = self.packets {
            let comma = if self.bytes.is_some() { "," } else { "" };
            write!(f, "{comma}{packets}pps")?;
        }
        Ok(())
    }
}

impl From<NetRate> for String {
    fn from(rate: NetRate) -> String {
        rate.to_string()
    }
}

impl TryFrom<String> for NetRate {
    type Error = RateError;

    fn try_from(text: String) -> Result<NetRate, RateError> {
        text.parse()
    }
}

/// One direction: tokens come in evenly and are taken by frames.
#[derive(Debug)]
pub(super) struct Bucket {
    bytes: Option<Tokens>,
    packets: Option<Tokens>,
}

#[derive(Debug)]
struct Tokens {
    per_second: f64,
    most: f64,
    left: f64,
    filled: Instant,
}

impl Bucket {
    pub(super) fn new(rate: Option<NetRate>, now: Instant) -> Bucket {
        let tokens = |per_second: Option<u64>, least: f64| {
            per_second.map(|per_second| {
                let per_second = per_second as f64;
                let most = (per_second * BURST).max(least);
                Tokens { per_second, most, left: most, filled: now }
            })
        };
        let (bytes, packets) = rate.map_or((None, None), |rate| (rate.bytes, rate.packets));
        Bucket { bytes: tokens(bytes, BURST_MIN.0), packets: tokens(packets, BURST_MIN.1) }
    }

    /// How long the next frame has to wait; zero when it may go.
    pub(super) fn wait(&mut self, now: Instant) -> Duration {
        let all = self.bytes.iter_mut().chain(&mut self.packets);
        all.map(|tokens| tokens.wait(now)).max().unwrap_or_default()
    }

    /// A frame went; the bucket may get into debt by it.
    pub(super) fn take(&mut self, bytes: usize) {
        if let Some(tokens) = &mut self.bytes {
            tokens.left -= bytes as f64;
        }
        if let Some(tokens) = &mut self.packets {
            tokens.left -= 1.0;
        }
    }
}

impl Tokens {
    fn wait(&mut self, now: Instant) -> Duration {
        let came = now.saturating_duration_since(self.filled).as_secs_f64() * self.per_second;
        self.left = (self.left + came).min(self.most);
        self.filled = now;
        if self.left > 0.0 {
            Duration::ZERO
        } else {
            Duration::from_secs_f64((1.0 - self.left) / self.per_second)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_people_write_them() {
        let rate = |text: &str| text.parse::<NetRate>().map(|rate| (rate.bytes, rate.packets));
        assert_eq!(rate("10mbit"), Ok((Some(1_250_000), None)));
        assert_eq!(rate("1MB/s,500pps"), Ok((Some(1_000_000), Some(500))));
        for text in [
            "",
            "10",
            "mbit",
            "0mbit",
            "0pps",
            "1mbit,2mbit",
            "1pps,",
            "-1mbit",
            "99999999999999999999bit",
            "7bit",
        ] {
            assert!(rate(text).is_err(), "{text}");
        }
        let rate: NetRate = "8kbit,3pps".parse().unwrap();
        assert_eq!(rate.to_string().parse(), Ok(rate));
    }

    #[test]
    fn a_second_lets_its_rate_through_and_no_more() {
        let start = Instant::now();
        let mut bucket = Bucket::new("1MB/s".parse().ok(), start);
        let (mut now, mut sent) = (start, 0);
        while now < start + Duration::from_secs(10) {
            let wait = bucket.wait(now);
            now += wait;
            if wait.is_zero() {
                bucket.take(1500);
                sent += 1500;
            }
        }
        assert!((9_900_000..10_200_000).contains(&sent), "{sent}");
        let mut free = Bucket::new(None, start);
        free.take(usize::MAX);
        assert_eq!(free.wait(start), Duration::ZERO);
    }
}
