//! The thread that waits for frames and room on the wire. It only ever holds the device's lock for non-blocking work.

use super::device::Net;
use crate::devices::virtio::mmio::Transport;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// See the module's description.
pub struct Backend {
    epoll: OwnedFd,
    device: Arc<Mutex<Transport<Net>>>,
}

impl Backend {
    /// A backend for a device that has a link; none for one that has not.
    pub fn new(device: &Arc<Mutex<Transport<Net>>>) -> io::Result<Option<Backend>> {
        let transport = device.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(wire) = transport.device().wire() else { return Ok(None) };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge by edge: while the guest gives no buffers, its frames must not keep this thread awake, nor must room that
        // nobody needs.
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        epoll::add(&epoll, wire, EventData::new_u64(0), interest)?;
        Ok(Some(Backend { epoll, device: Arc::clone(device) }))
    }

    /// Serves the device for as long as the process lives.
    pub fn run(self) {
        let mut events = Vec::with_capacity(1);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(errno) => {
                    tracing::error!(%errno, "net: the wire cannot be waited for any more");
                    return;
                }
            }
            let mut transport = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            transport.with_device(|device, queues, ram| ((), device.on_wire_ready(queues, ram)));
        }
    }
}
