//! Reading what machines wait for. One thread reads all userfaultfds where a read cannot block, and otherwise one a
//! machine.

use super::error::{Misconduct, PagerError, PagerFailure};
use super::image::Image;
use super::shared::Shared;
use super::source::{ClientId, ImageChunk};
use crate::memory::ImageId;
use crate::uffd::{Uffd, UffdEvent, UffdReads};
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Epoll token of the pipe that ends the reader; machines have their ids.
pub(super) const STOP_EVENT: u64 = u64::MAX;
/// How often a thread that reads one machine's faults looks whether it is still needed.
const LOOK_AROUND: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Notes that faults are not read any more, also when the reader panics.
struct NoteEnd<'a>(&'a Shared);

impl Drop for NoteEnd<'_> {
    fn drop(&mut self) {
        if !self.0.lock().stopping {
            self.0.fail(PagerFailure::Ended);
        }
    }
}

impl Shared {
    /// Has a machine's faults read from now on.
    pub(super) fn watch(self: &Arc<Self>, id: ClientId, uffd: &Arc<Uffd>) -> Result<(), PagerError> {
        match self.reading {
            UffdReads::NeverBlocks => {
                epoll::add(&self.epoll, &**uffd, epoll::EventData::new_u64(id.0), epoll::EventFlags::IN)
                    .map_err(|source| PagerError::Poll { operation: "epoll_ctl", source })?;
            }
            UffdReads::MayBlock => {
                let (shared, uffd) = (Arc::clone(self), Arc::clone(uffd));
                std::thread::spawn(move || shared.serve_one(id, &uffd));
            }
        }
        Ok(())
    }

    pub(super) fn serve_faults(self: &Arc<Self>, _stop: &OwnedFd) {
        let _note = NoteEnd(self);
        let mut events = Vec::with_capacity(64);
        let mut messages = Vec::new();
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the pager cannot wait for faults any more");
                    return;
                }
            }
            for event in &events {
                match event.data.u64() {
                    STOP_EVENT => return,
                    client => {
                        self.serve(ClientId(client), &mut messages);
                    }
                }
            }
        }
    }

    fn serve_one(&self, id: ClientId, uffd: &Uffd) {
        let mut messages = Vec::new();
        loop {
            let mut polled = [PollFd::new(uffd, PollFlags::IN)];
            let ready = rustix::event::poll(&mut polled, Some(&LOOK_AROUND)).unwrap_or(0);
            let needed = {
                let state = self.lock();
                !state.stopping && state.clients.contains_key(&id)
            };
            if !needed || ready > 0 && !self.serve(id, &mut messages) {
                return;
            }
        }
    }

    /// Reads what one machine waits for; returns whether to go on with it.
    fn serve(&self, id: ClientId, messages: &mut Vec<UffdEvent>) -> bool {
        let Some((uffd, bases)) = self
            .lock()
            .clients
            .get(&id)
            .filter(|client| !client.refused)
            .map(|client| (Arc::clone(&client.uffd), client.bases.clone()))
        else {
            return false;
        };
        messages.clear();
        if !uffd.is_nonblocking() {
            self.refuse(id, &uffd, Misconduct::Flags);
            return false;
        }
        if let Err(error) = uffd.messages(self.reading, messages) {
            tracing::debug!(?id, %error, "a machine's userfaultfd ended");
            let _ = epoll::delete(&self.epoll, &*uffd);
            return false;
        }
        for message in &*messages {
            let served = match *message {
                UffdEvent::Fault { address } => {
                    self.counters.faults.fetch_add(1, Ordering::Relaxed);
                    tracing::trace!(?id, address, ?bases, "a machine waits for a page");
                    match self.locate(&bases, address) {
                        Some((chunk, offset)) => {
                            if !self.is_present(chunk) {
                                self.source.faulted(id, chunk.image, offset);
                            }
                            self.want(id, chunk, &uffd, &bases)
                        }
                        None => Err(Misconduct::Outside { address }),
                    }
                }
                UffdEvent::Other { event } => Err(Misconduct::Event { event }),
            };
            if let Err(misconduct) = served {
                self.refuse(id, &uffd, misconduct);
                return false;
            }
        }
        true
    }

    /// Leaves a machine asleep. Its descriptor is kept: see [`super::client::Client::ended`].
    fn refuse(&self, id: ClientId, uffd: &Uffd, misconduct: Misconduct) {
        tracing::error!(?id, error = %misconduct, "a machine is not served any more");
        let _ = epoll::delete(&self.epoll, uffd);
        let state = &mut *self.lock();
        if let Some(client) = state.clients.get_mut(&id) {
            client.refused = true;
            state.misconduct.push((id, misconduct));
        }
    }

    /// The chunk at an address of a machine, and the offset in its image.
    fn locate(&self, bases: &[u64], address: u64) -> Option<(ImageChunk, u64)> {
        let inside = |(position, (image, base)): (usize, (&Image, &u64))| {
            let offset = address.checked_sub(*base).filter(|offset| *offset < image.shape.bytes)?;
            let chunk = ImageChunk { image: ImageId::ALL[position], chunk: offset / image.shape.chunk_bytes };
            Some((chunk, offset))
        };
        self.images.iter().zip(bases).enumerate().find_map(inside)
    }

    fn want(&self, id: ClientId, chunk: ImageChunk, uffd: &Uffd, bases: &[u64]) -> Result<(), Misconduct> {
        let state = &mut *self.lock();
        if self.is_present(chunk) {
            self.counters.faults_on_present.fetch_add(1, Ordering::Relaxed);
            if let Some(client) = state.clients.get_mut(&id) {
                client.may_fault_on_present()?;
            }
            self.wake(uffd, bases, chunk);
            return Ok(());
        }
        let wanted = state.wanted.entry(chunk).or_default();
        if !wanted.waiters.contains(&id) {
            wanted.waiters.push(id);
        }
        // A chunk that failed is tried again for whoever comes next: nobody may wait without somebody loading.
        if wanted.since.is_none() || std::mem::take(&mut wanted.failed) {
            wanted.since = Some(Instant::now());
            state.queue.push_back(chunk);
            self.work.notify_one();
        }
        Ok(())
    }
}
