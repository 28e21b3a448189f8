//! Long runs with everything going wrong at once. Short by default; `make soak` runs the full sizes (`FORKD_SOAK=full`)
//! and prints what was counted.

#[path = "support/small_disk.rs"]
mod small_disk;
mod support;

#[path = "soak/faulty.rs"]
#[allow(dead_code, reason = "tests/linux_faults.rs uses the rest")]
mod faulty;
#[path = "soak/forks.rs"]
mod forks;
#[path = "soak/full_disk.rs"]
mod full_disk;
#[path = "linux/harness.rs"]
mod harness;
#[path = "soak/kills.rs"]
mod kills;
#[path = "soak/readers.rs"]
mod readers;
#[path = "soak/replaced.rs"]
mod replaced;
#[path = "linux/sums.rs"]
mod sums;

use std::time::Duration;

/// The short or the full size of something.
fn scaled<T>(short: T, full: T) -> T {
    if std::env::var_os("FORKD_SOAK").is_some_and(|wanted| wanted == "full") { full } else { short }
}

/// Numbers that look random and are the same in every run.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound.max(1)
    }

    fn pause(&mut self, below: Duration) {
        std::thread::sleep(Duration::from_micros(self.below(below.as_micros() as u64)));
    }
}
