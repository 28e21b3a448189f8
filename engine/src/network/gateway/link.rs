//! A child's wire: frames in and out, at the child's rate and in turn with its siblings.

use super::child::ChildGateway;
use crate::network::rate::{Bucket, NetRate};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::io;
use std::os::unix::net::UnixDatagram as StdDatagram;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::net::UnixDatagram;

/// Frames of one child that go one way before others have their turn.
const TURN: usize = 64;
/// Longest frame, bytes.
const FRAME_MAX: usize = 65550;
/// Longest sleep that a timer takes.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// The gateway's end of the wire, and the limits of both directions.
pub struct Link {
    /// A socket of packets in a row: what can be said of one of datagrams, and its end is noticed.
    socket: UnixDatagram,
    sending: Bucket,
    receiving: Bucket,
    frame: Vec<u8>,
}

/// Ends the child's connections, however its link comes to an end.
struct Ending(Rc<ChildGateway>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Why a direction stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// It has nothing to do, or waits for the other side.
    Idle,
    /// Its turn is over.
    Turn,
    /// Its rate is.
    Rate(Duration),
}

impl Link {
    /// To be called in the gateway's runtime. `socket` keeps frames apart, and does not block.
    pub fn new(socket: OwnedFd, rate: Option<NetRate>) -> io::Result<Link> {
        let now = Instant::now();
        let socket = UnixDatagram::from_std(StdDatagram::from(socket))?;
        let (sending, receiving) = (Bucket::new(rate, now), Bucket::new(rate, now));
        Ok(Link { socket, sending, receiving, frame: vec![0; FRAME_MAX] })
    }

    /// Serves a child until its end of the wire is gone.
    pub async fn run(mut self, child: Rc<ChildGateway>) {
        let _ending = Ending(Rc::clone(&child));
        while let Ok(reading) = self.read_frames(&child) {
            let due = child.stack().work();
            let Ok(writing) = self.write_frames(&child) else { break };
            if [reading, writing].contains(&Pause::Turn) {
                tokio::task::yield_now().await;
                continue;
            }
            let blocked = child.stack().next_frame().is_some();
            let rates = [reading, writing].into_iter().filter_map(|pause| match pause {
                Pause::Rate(wait) => Some(wait),
                _ => None,
            });
            // What cannot be sent now is not due before it can.
            let wait = rates.chain(due.filter(|_| !blocked)).min().unwrap_or(SLEEP_MAX).min(SLEEP_MAX);
            tokio::select! {
                // Readiness is found out by trying.
                _ = self.socket.readable(), if reading == Pause::Idle => {}
                _ = self.socket.writable(), if blocked && writing == Pause::Idle => {}
                () = child.work.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Takes what the child sends, as far as its rate and its turn go. An error when its end is gone.
    fn read_frames(&mut self, child: &Rc<ChildGateway>) -> Result<Pause, Errno> {
        for _ in 0..TURN {
            let wait = self.sending.wait(Instant::now());
            if !wait.is_zero() {
                return Ok(Pause::Rate(wait));
            }
            match self.socket.try_recv(&mut self.frame) {
                Ok(0) => return Err(Errno::PIPE),
                Ok(bytes) => {
                    self.sending.take(bytes);
                    child.on_frame(&self.frame[..bytes]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Pause::Idle),
                Err(_) => return Err(Errno::PIPE),
            }
        }
        Ok(Pause::Turn)
    }

    /// Gives the child what waits for it, as far as its rate, its turn and its buffers go.
    fn write_frames(&mut self, child: &ChildGateway) -> Result<Pause, Errno> {
        for _ in 0..TURN {
            let mut stack = child.stack();
            let Some(frame) = stack.next_frame() else {
                // What did not fit is made now.
                stack.work();
                if stack.next_frame().is_none() {
                    return Ok(Pause::Idle);
                }
                continue;
            };
            let wait = self.receiving.wait(Instant::now());
            if !wait.is_zero() {
                return Ok(Pause::Rate(wait));
            }
            let bytes = frame.len();
            match self.socket.try_send(frame) {
                Ok(_) => {
                    self.receiving.take(bytes);
                    child.traffic.received(bytes);
                    stack.frame_sent();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Pause::Idle),
                Err(_) => return Err(Errno::PIPE),
            }
        }
        Ok(Pause::Turn)
    }
}
