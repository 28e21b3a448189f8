//! What the daemon listens on: a Unix socket, a TCP port, or one that systemd hands over; and TLS on TCP.

use crate::failure::{ServeError, place_error};
use crate::tokens::Tokens;
use forkd_engine::local::daemon::{DaemonOptions, Listen, TlsFiles};
use rustix::fs::Mode;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::TlsAcceptor;

/// See the module's description.
pub struct Listener {
    socket: Socket,
    /// The Unix socket that it made.
    made: Option<PathBuf>,
    tls: Option<TlsAcceptor>,
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A process that may use the socket, which is this user's.
    Unix,
    /// Anybody.
    Tcp,
}

/// A connection.
pub enum Connection {
    /// From this host.
    Unix(UnixStream),
    /// From anywhere.
    Tcp(TcpStream),
}

/// What bytes of a connection come through.
pub trait Stream: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

impl Listener {
    /// Listens where the options say. `tokens` are asked for over TCP.
    ///
    /// # Errors
    /// [`ServeError`] as its variants say.
    pub async fn open(options: &DaemonOptions, tokens: Option<&Tokens>) -> Result<Listener, ServeError> {
        let (socket, made) = match handed_over().map_err(place_error("taking over", "systemd's socket"))? {
            Some(socket) => (socket, None),
            None => (Socket::open(&options.listen).await?, options.listen.path()),
        };
        match (&socket, tokens, &options.tls) {
            (Socket::Tcp(_), None, _) => Err(ServeError::NoToken),
            (Socket::Unix(_), _, Some(_)) => Err(ServeError::TlsWithoutTcp),
            (_, _, tls) => {
                let tls = tls.as_ref().map(acceptor).transpose()?;
                Ok(Listener { socket, made, tls })
            }
        }
    }

    /// Where it listens, for people.
    pub fn place(&self) -> String {
        match &self.socket {
            Socket::Unix(listener) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                format!("unix:{}", path.unwrap_or(Path::new("?")).display())
            }
            Socket::Tcp(listener) => {
                let scheme = if self.tls.is_some() { "https" } else { "http" };
                let address = listener.local_addr().map_or("?".to_owned(), |address| address.to_string());
                format!("{scheme}://{address}")
            }
        }
    }

    /// The next connection.
    ///
    /// # Errors
    /// That of accept(2).
    pub async fn accept(&self) -> io::Result<Connection> {
        match &self.socket {
            Socket::Unix(listener) => Ok(Connection::Unix(listener.accept().await?.0)),
            Socket::Tcp(listener) => Ok(Connection::Tcp(listener.accept().await?.0)),
        }
    }

    /// Nobody listens any more: removes the socket that it made.
    pub fn remove(&self) {
        if let Some(path) = &self.made {
            // The next daemon replaces it anyway.
            let _ = std::fs::remove_file(path);
        }
    }

    /// What connections' bytes come through.
    pub fn tls(&self) -> Option<TlsAcceptor> {
        self.tls.clone()
    }
}

impl Connection {
    /// Who it is of.
    pub fn peer(&self) -> Peer {
        match self {
            Connection::Unix(_) => Peer::Unix,
            Connection::Tcp(_) => Peer::Tcp,
        }
    }

    /// Its bytes. With TLS this shakes hands.
    ///
    /// # Errors
    /// A client that speaks no TLS.
    pub async fn open(self, tls: Option<TlsAcceptor>) -> io::Result<Pin<Box<dyn Stream>>> {
        match (self, tls) {
            (Connection::Unix(stream), _) => Ok(Box::pin(stream)),
            (Connection::Tcp(stream), None) => {
                stream.set_nodelay(true)?;
                Ok(Box::pin(stream))
            }
            (Connection::Tcp(stream), Some(tls)) => {
                stream.set_nodelay(true)?;
                Ok(Box::pin(tls.accept(stream).await?))
            }
        }
    }
}

impl Socket {
    async fn open(listen: &Listen) -> Result<Socket, ServeError> {
        match listen {
            Listen::Unix(path) => {
                // Nobody else listens: the daemon's lock is held.
                match std::fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(place_error("replacing", path.display())(error));
                    }
                    _ => {}
                }
                // Nobody else may connect, not even for a moment.
                let before = rustix::process::umask(Mode::from_raw_mode(0o177));
                let bound = UnixListener::bind(path);
                rustix::process::umask(before);
                Ok(Socket::Unix(bound.map_err(place_error("listening on", path.display()))?))
            }
            Listen::Tcp(address) => {
                let bound = TcpListener::bind(address).await;
                Ok(Socket::Tcp(bound.map_err(place_error("listening on", address))?))
            }
        }
    }
}

/// The socket that systemd has opened for us, if it has.
fn handed_over() -> io::Result<Option<Socket>> {
    let mut handed = listenfd::ListenFd::from_env();
    if handed.len() == 0 {
        return Ok(None);
    }
    if let Ok(Some(listener)) = handed.take_unix_listener(0) {
        listener.set_nonblocking(true)?;
        return Ok(Some(Socket::Unix(UnixListener::from_std(listener)?)));
    }
    let Some(listener) = handed.take_tcp_listener(0)? else { return Ok(None) };
    listener.set_nonblocking(true)?;
    Ok(Some(Socket::Tcp(TcpListener::from_std(listener)?)))
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, ServeError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| ServeError::Certificate {
        path: files.certificate.clone(),
        source,
    };
    let certificates = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| failed(error.into()))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| failed(error.into()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let configuration = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(certificates, key))
        .map_err(|error| failed(error.into()))?;
    Ok(TlsAcceptor::from(Arc::new(configuration)))
}
