//! The ports of children that their fork forwards (`--publish`).

use super::{Child, StartError, Supervisor};
use crate::fork::forward::listen::Way;
use crate::fork::forward::ports::PortMap;
use crate::fork::forward::publish::Publisher;
use std::sync::PoisonError;

impl Supervisor {
    /// Has ports of all children forwarded. They are started already: no first instruction waits for it.
    pub(super) fn publish(&self, maps: &[PortMap]) -> Result<(), StartError> {
        if maps.is_empty() {
            return Ok(());
        }
        let mut children = self.children();
        let way =
            |child: &Child| Way { socket: child.socket.clone(), paused: self.run_dir.paused(&child.id) };
        let mut publisher = Publisher::start(children.iter().map(way).collect(), maps)?;
        for (at, child) in children.iter_mut().enumerate() {
            match child.process.is_some() {
                true => child.ports = publisher.ports(at).to_vec(),
                false => publisher.end(at),
            }
        }
        *self.publisher.lock().unwrap_or_else(PoisonError::into_inner) = Some(publisher);
        Ok(())
    }

    /// A child is over.
    pub(super) fn end_publishing(&self, at: usize) {
        if let Some(publisher) = &mut *self.publisher.lock().unwrap_or_else(PoisonError::into_inner) {
            publisher.end(at);
        }
    }
}
