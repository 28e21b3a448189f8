//! TCP ports of children, reached from the host through their vsocks: `forkd forward`, and `--publish` of a fork.
//!
//! ```text
//! client -> port of the host -> vsock CONNECT 5252 -> agent -> 127.0.0.1:PORT or [::1]:PORT in the child
//! ```
//!
//! No network is needed for it. Whoever can connect to the port of the host can use it: on loopback every user of the host.

pub mod listen;
pub mod ports;
pub mod publish;
pub mod tunnel;

use crate::fork::children::{ChildrenError, RunningChild, find};
use crate::local::paths::Paths;
use listen::{Forwarder, ListenError, Listening, Served, Way, serve_all};
use ports::PortMap;
use rustix::event::{PollFd, PollFlags};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;
use std::io;
use std::net::IpAddr;
use tokio::sync::oneshot;

/// Ports cannot be forwarded.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The children.
    #[error(transparent)]
    Children(#[from] ChildrenError),
    /// A port of the host.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A child's process.
    #[error("the process of {id}")]
    Process {
        /// The child.
        id: String,
        /// Why it cannot be watched.
        #[source]
        source: io::Error,
    },
}

/// A port that is forwarded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForwardedPort {
    /// The child.
    pub id: String,
    /// Its port.
    pub guest: u16,
    /// Address of the host that is listened on.
    pub address: IpAddr,
    /// Port of the host.
    pub local: u16,
}

/// Ports of children that are listened on, to be served.
#[derive(Debug)]
pub struct Forward {
    children: Vec<ForwardedChild>,
}

#[derive(Debug)]
struct ForwardedChild {
    id: String,
    way: Way,
    listening: Vec<Listening>,
    /// Readable when its machine is over.
    process: OwnedFd,
}

impl Forward {
    /// Listens on `address` for each of the children `names`: a fork stands for all of its own. The first child gets the
    /// ports that `maps` name, each further one the next ones.
    ///
    /// # Errors
    /// [`ForwardError`]; nothing is listened on then.
    pub fn open(
        paths: &Paths,
        names: &[String],
        maps: &[PortMap],
        address: IpAddr,
    ) -> Result<Forward, ForwardError> {
        let found = names.iter().map(|name| find(paths, name)).collect::<Result<Vec<_>, _>>()?;
        let found: Vec<RunningChild> = found.into_iter().flatten().collect();
        let count = found.len();
        let child = |(at, RunningChild { id, pid, fork }): (usize, RunningChild)| {
            if fork.paused(&id).exists() {
                return Err(ChildrenError::Paused { id }.into());
            }
            let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound.into());
            let process = pid.and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
            let process = process.map_err(|source| ForwardError::Process { id: id.clone(), source })?;
            let listening = maps.iter().map(|map| Listening::bind(address, *map, at, count));
            let listening = listening.collect::<Result<_, _>>()?;
            let way = Way { socket: fork.socket(&id), paused: fork.paused(&id) };
            Ok(ForwardedChild { id, way, listening, process })
        };
        let children = found.into_iter().enumerate().map(child).collect::<Result<_, ForwardError>>()?;
        Ok(Forward { children })
    }

    /// What is listened on.
    pub fn ports(&self) -> Vec<ForwardedPort> {
        let of_child = |child: &ForwardedChild| {
            let id = child.id.clone();
            let port = move |listening: &Listening| ForwardedPort {
                id: id.clone(),
                guest: listening.guest,
                address: listening.address.ip(),
                local: listening.address.port(),
            };
            child.listening.iter().map(port).collect::<Vec<_>>()
        };
        self.children.iter().flat_map(of_child).collect()
    }

    /// Forwards until all children are over. Ends with its runtime.
    ///
    /// # Errors
    /// When there is no thread that waits for the children's ends.
    pub async fn serve(self) -> io::Result<()> {
        let (mut served, mut watched) = (Vec::new(), Vec::new());
        for ForwardedChild { way, listening, process, .. } in self.children {
            let (end, ended) = oneshot::channel();
            watched.push((process, end));
            served.push(Served { forwarder: Forwarder::new(way), listening, ended });
        }
        std::thread::Builder::new().name("ends".to_owned()).spawn(move || watch(watched))?;
        serve_all(served).await;
        Ok(())
    }
}

/// Waits for the ends of processes, and drops what belongs to each that is over.
fn watch<T>(mut watched: Vec<(OwnedFd, T)>) {
    while !watched.is_empty() {
        let mut polled: Vec<_> =
            watched.iter().map(|(process, _)| PollFd::new(process, PollFlags::IN)).collect();
        if let Err(error) = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None)) {
            tracing::warn!(%error, "the children's ends cannot be waited for");
            return;
        }
        let over: Vec<_> = polled.iter().map(|poll| !poll.revents().is_empty()).collect();
        let mut over = over.into_iter();
        watched.retain(|_| !over.next().unwrap_or(false));
    }
}
