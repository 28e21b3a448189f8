//! A simulated network between `forkd hub serve` and its clients, so that a loopback hub can be measured like a
//! distant one.
//!
//! What is modelled, and nothing else:
//!
//! - **Round trip.** A new connection costs one round trip (the TCP handshake; no TLS) and every request one more: the
//!   first answer on a connection starts no sooner than `accept + 2 x rtt`, later ones no sooner than
//!   `request received + rtt`. Requests pipelined on one connection are answered one after the other.
//! - **Bandwidth.** One link carries all bodies of all connections in pieces of [`PIECE`] bytes, first come first
//!   served. A piece is handed to the socket when its last byte would have crossed the link. The link saves up
//!   nothing while it is idle. Headers are free.
//!
//! Not modelled: slow start, loss, jitter, the client's upload, TLS.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Body bytes handed over at a time: small, so that concurrent bodies share the link evenly.
pub const PIECE: usize = 16 << 10;

/// How far a body that was held up by its reader may lag behind and still use the link's past time: covers late
/// timers, no more.
const CATCH_UP: Duration = Duration::from_millis(10);

/// What to simulate.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkShape {
    /// Round-trip time.
    pub rtt: Duration,
    /// Bytes per second of the link all connections share; `None` for no limit.
    pub bandwidth: Option<u64>,
}

/// The shared link.
#[derive(Debug, Clone)]
pub struct Link {
    rtt: Duration,
    bandwidth: Option<u64>,
    free_at: Arc<Mutex<Instant>>,
}

impl Link {
    /// An idle link.
    pub fn new(shape: LinkShape) -> Link {
        let free_at = Arc::new(Mutex::new(Instant::now()));
        Link { rtt: shape.rtt, bandwidth: shape.bandwidth, free_at }
    }

    /// Waits until the answer to a request that has just arrived may start. `accepted`: when its connection was made.
    pub async fn answer(&self, accepted: Instant) {
        if !self.rtt.is_zero() {
            sleep_until(Instant::now().max(accepted + self.rtt) + self.rtt).await;
        }
    }

    /// A body about to be sent.
    pub fn body(&self) -> Sending {
        Sending { link: self.clone(), last: Instant::now() }
    }
}

/// One body's use of the link.
#[derive(Debug)]
pub struct Sending {
    link: Link,
    /// When its previous piece had crossed.
    last: Instant,
}

impl Sending {
    /// Waits until the next `len` bytes of the body have crossed the link.
    pub async fn cross(&mut self, len: usize) {
        let Some(bandwidth) = self.link.bandwidth else { return };
        let crossing = Duration::from_secs_f64(len as f64 / bandwidth as f64);
        let now = Instant::now();
        let crossed = {
            let mut free_at = self.link.free_at.lock().expect("no panics while held");
            // The body's bytes have been waiting since its last piece left, even if our timer woke late.
            let ready = self.last.max(now.checked_sub(CATCH_UP).unwrap_or(now));
            *free_at = (*free_at).max(ready) + crossing;
            *free_at
        };
        self.last = crossed;
        sleep_until(crossed).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Paused time: the clock jumps to the next timer, so these are exact and take no time.

    #[tokio::test(start_paused = true)]
    async fn a_connection_costs_two_round_trips_then_one() {
        let rtt = Duration::from_millis(20);
        let link = Link::new(LinkShape { rtt, bandwidth: None });
        let accepted = Instant::now();
        link.answer(accepted).await;
        assert_eq!(accepted.elapsed(), 2 * rtt);
        let request = Instant::now();
        link.answer(accepted).await;
        assert_eq!(request.elapsed(), rtt);
    }

    #[tokio::test(start_paused = true)]
    async fn two_bodies_share_one_link_and_idle_time_is_not_saved() {
        let link = Link::new(LinkShape { rtt: Duration::ZERO, bandwidth: Some(1_000_000) });
        tokio::time::sleep(Duration::from_secs(5)).await;
        let start = Instant::now();
        let send = |link: Link| async move {
            let mut body = link.body();
            for _ in 0..50 {
                body.cross(10_000).await;
            }
        };
        tokio::join!(send(link.clone()), send(link.clone()));
        let taken = start.elapsed();
        assert!((taken.as_secs_f64() - 1.0).abs() < 0.01, "1 MB at 1 MB/s took {taken:?}");
    }
}
