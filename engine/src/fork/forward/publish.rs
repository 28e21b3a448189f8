//! Ports of a fork's children that the fork itself forwards (`--publish`), each until its child is over.

use super::listen::{Forwarder, ListenError, Listening, Served, Way, serve_all};
use super::ports::PortMap;
use crate::local::run_dir::PublishedPort;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use tokio::sync::oneshot;

/// Ports cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A port of the host.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The thread that serves them.
    #[error("the thread that forwards ports cannot be started")]
    Thread(#[source] io::Error),
}

/// A thread that forwards the published ports of all children of a fork.
#[derive(Debug)]
pub struct Publisher {
    /// Per child; one that is gone ends its forwarding.
    children: Vec<Option<oneshot::Sender<()>>>,
    /// Per child.
    ports: Vec<Vec<PublishedPort>>,
}

impl Publisher {
    /// Listens on the host's loopback for each of the children, and forwards on a thread of its own.
    ///
    /// # Errors
    /// [`PublishError`]; nothing is listened on then.
    pub fn start(ways: Vec<Way>, maps: &[PortMap]) -> Result<Publisher, PublishError> {
        let mut publisher = Publisher { children: Vec::new(), ports: Vec::new() };
        let (mut served, count) = (Vec::new(), ways.len());
        for (at, way) in ways.into_iter().enumerate() {
            let bind = |map: &PortMap| Listening::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), *map, at, count);
            let listening = maps.iter().map(bind).collect::<Result<Vec<_>, _>>()?;
            let port = |listening: &Listening| PublishedPort {
                guest: listening.guest,
                local: listening.address.port(),
            };
            publisher.ports.push(listening.iter().map(port).collect());
            let (end, ended) = oneshot::channel::<()>();
            publisher.children.push(Some(end));
            served.push(Served { forwarder: Forwarder::new(way), listening, ended });
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(PublishError::Thread)?;
        let serve = move || runtime.block_on(serve_all(served));
        std::thread::Builder::new().name("ports".to_owned()).spawn(serve).map_err(PublishError::Thread)?;
        Ok(publisher)
    }

    /// The ports of the child that is the `at`th, counted from 0.
    pub fn ports(&self, at: usize) -> &[PublishedPort] {
        self.ports.get(at).map_or(&[], Vec::as_slice)
    }

    /// The child that is the `at`th is over: its ports are free again.
    pub fn end(&mut self, at: usize) {
        if let Some(child) = self.children.get_mut(at) {
            *child = None;
        }
    }
}
