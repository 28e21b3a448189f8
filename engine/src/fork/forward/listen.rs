//! Listening on ports of the host for one child, until it is over.

use super::ports::PortMap;
use super::tunnel::{DialError, GuestStream, reset};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener as StdListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

/// Connections to one child at a time; its agent has as many (256 streams of its vsock, less 64 for requests). More wait,
/// accepted by the kernel only.
const CONNECTIONS_MAX: usize = 192;
/// Connections to one child that are being made; the agent's listener keeps 64 waiting.
const HANDSHAKES_MAX: usize = 48;
/// How long clients have to take the last bytes of a child that is over.
const LAST_BYTES: Duration = Duration::from_secs(5);
/// Pause when connections cannot be accepted: descriptors may be short for a moment.
const PAUSE: Duration = Duration::from_millis(50);

/// A port of the host cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("{address}")]
pub struct ListenError {
    /// Where.
    pub address: SocketAddr,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// The way to a child.
#[derive(Debug, Clone)]
pub struct Way {
    /// Its vsock.
    pub socket: PathBuf,
    /// The file that is there while it is paused.
    pub paused: PathBuf,
}

/// A port of the host that is listened on, and the child's port that it leads to.
#[derive(Debug)]
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
    /// The child's port.
    pub guest: u16,
    listener: StdListener,
}

impl Listening {
    /// Listens, for the child that is the `at`th of `count`, on a port of its own.
    ///
    /// # Errors
    /// [`ListenError`]; of a range that has no such port, too.
    pub fn bind(address: IpAddr, map: PortMap, at: usize, count: usize) -> Result<Listening, ListenError> {
        let failed = |port| move |source| ListenError { address: SocketAddr::new(address, port), source };
        let port = map.local_of(at, count).map_err(|error| failed(map.local)(io::Error::other(error)))?;
        let listener = StdListener::bind((address, port)).map_err(failed(port))?;
        let bound = listener.set_nonblocking(true).and_then(|()| listener.local_addr());
        Ok(Listening { address: bound.map_err(failed(port))?, guest: map.guest, listener })
    }
}

/// Ports of one child, to be served until the other end of `ended` is dropped.
#[derive(Debug)]
pub struct Served {
    /// Its connections.
    pub forwarder: Forwarder,
    /// The ports.
    pub listening: Vec<Listening>,
    /// Ends when the child is over.
    pub ended: oneshot::Receiver<()>,
}

/// Forwards until all children are over.
pub async fn serve_all(served: Vec<Served>) {
    let mut children = JoinSet::new();
    for Served { forwarder, listening, ended } in served {
        children.spawn(async move {
            let mut ports = JoinSet::new();
            for listening in listening {
                let forwarder = forwarder.clone();
                ports.spawn(async move {
                    if let Err(error) = forwarder.serve(listening).await {
                        tracing::warn!(%error, "a port is not forwarded");
                    }
                });
            }
            let _ = ended.await;
            drop(ports);
            // Its connections end by themselves, with its last bytes, which slow clients still have to take.
            let all = forwarder.connections.acquire_many(CONNECTIONS_MAX as u32);
            let _ = tokio::time::timeout(LAST_BYTES, all).await;
        });
    }
    children.join_all().await;
}

/// The connections of one child.
#[derive(Debug, Clone)]
pub struct Forwarder {
    way: Arc<Way>,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
}

impl Forwarder {
    /// To one child.
    pub fn new(way: Way) -> Forwarder {
        Forwarder {
            way: Arc::new(way),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
        }
    }

    /// Accepts connections and forwards each, for as long as it is waited for. Those that were accepted go on by themselves.
    async fn serve(&self, listening: Listening) -> io::Result<()> {
        let listener = TcpListener::from_std(listening.listener)?;
        loop {
            let Ok(permit) = Arc::clone(&self.connections).acquire_owned().await else { return Ok(()) };
            let client = match listener.accept().await {
                Ok((client, _)) => client,
                Err(error) => {
                    tracing::debug!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let forwarder = self.clone();
            tokio::spawn(async move {
                forwarder.forward(client, listening.guest).await;
                drop(permit);
            });
        }
    }

    async fn forward(&self, client: TcpStream, guest: u16) {
        // What comes in one piece goes on in one piece.
        let _ = client.set_nodelay(true);
        match self.dial(guest).await {
            Ok(stream) => stream.relay(client).await,
            Err(error) => {
                tracing::info!(guest, error = %error, "a connection is not forwarded");
                reset(&client);
            }
        }
    }

    async fn dial(&self, guest: u16) -> Result<GuestStream, DialError> {
        let permit = self.handshakes.acquire().await;
        if self.way.paused.exists() {
            return Err(DialError::Paused);
        }
        let dialled = GuestStream::dial(&self.way.socket, guest).await;
        drop(permit);
        dialled
    }
}
