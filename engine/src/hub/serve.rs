//! The HTTP server behind `forkd hub serve`: accepts, shapes, sends, logs, and stops cleanly.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout};

use super::shape::{Link, LinkShape, PIECE};
use super::static_files::{self, FilePart};

/// Connections served at a time; further ones wait in the listen queue.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take to send a request's head on a new or idle connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may leave a body's next piece untouched.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);
/// How long connections have to finish after a stop was asked for.
const GRACE: Duration = Duration::from_secs(2);
/// Bytes read from a file at a time.
const READ: u64 = 512 << 10;

/// What to serve and how.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The hub's folder.
    pub root: PathBuf,
    /// Address to listen on.
    pub listen: SocketAddr,
    /// The network to simulate.
    pub shape: LinkShape,
    /// A file to append a line per request to.
    pub access_log: Option<PathBuf>,
}

/// Why a hub cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The folder does not exist or is no folder.
    #[error("{}", root.display())]
    Root {
        /// The folder.
        root: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("{address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The access log cannot be opened.
    #[error("{}", path.display())]
    AccessLog {
        /// The log.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A hub that listens but does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    link: Link,
    log: Option<Mutex<File>>,
}

impl Server {
    /// Checks the folder, opens the log and listens.
    pub async fn bind(options: ServeOptions) -> Result<Server, ServeError> {
        check_directory(&options.root)
            .map_err(|source| ServeError::Root { root: options.root.clone(), source })?;
        let open = |path: PathBuf| match File::options().append(true).create(true).open(&path) {
            Ok(file) => Ok(Mutex::new(file)),
            Err(source) => Err(ServeError::AccessLog { path, source }),
        };
        let log = options.access_log.map(open).transpose()?;
        let failed = |source| ServeError::Listen { address: options.listen, source };
        let listener = TcpListener::bind(options.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shared = Shared { root: options.root, link: Link::new(options.shape), log };
        Ok(Server { listener, address, shared: Arc::new(shared) })
    }

    /// The address it listens on, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` completes, then lets running answers finish for a moment.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (stopping, stopped) = watch::channel(false);
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => break,
                accepted = accept(&self.listener, &connections) => accepted,
            };
            let (stream, permit) = accepted;
            let (shared, stopped) = (self.shared.clone(), stopped.clone());
            tokio::spawn(async move {
                serve_connection(stream, shared, stopped).await;
                drop(permit);
            });
        }
        let _ = stopping.send(true);
        // All permits back means that every connection has ended.
        let _ = timeout(GRACE, connections.acquire_many(MAX_CONNECTIONS as u32)).await;
    }
}

fn check_directory(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> (TcpStream, tokio::sync::OwnedSemaphorePermit) {
    let permit = connections.clone().acquire_owned().await.expect("never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            // Out of descriptors, or the client is gone already: neither ends the server.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let accepted = Instant::now();
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| answer(request, shared.clone(), accepted));
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    let connection = server.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let stop = async { stopped.wait_for(|stop| *stop).await.is_ok() };
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        _ = stop => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn answer(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    accepted: Instant,
) -> Result<Response<Sent>, Infallible> {
    let (head, _) = request.into_parts();
    let (root, method, path) = (shared.root.clone(), head.method.clone(), head.uri.path().to_owned());
    let range = head.headers.get(header::RANGE).and_then(|v| v.to_str().ok()).unwrap_or("-").to_owned();
    let find = move || static_files::answer(&root, &head.method, head.uri.path(), &head.headers);
    shared.link.answer(accepted).await;
    let answer = match tokio::task::spawn_blocking(find).await {
        Ok(answer) => answer,
        Err(_) => unreachable!("static_files::answer does not panic"),
    };
    let entry =
        LogEntry { shared: shared.clone(), method, path, range, status: answer.status.as_u16(), sent: 0 };
    let length = answer.body.as_ref().map_or(0, |part| part.len);
    let pieces = answer.body.map(|part| {
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(send_file(part, shared.link.clone(), send));
        receive
    });
    let mut response = Response::new(Sent { pieces, left: length, entry });
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    Ok(response)
}

/// Reads the part and passes it on piece by piece as the link allows. Ends early when the client is gone, when it
/// reads nothing for too long, or when the file was cut: the client then sees the connection break.
async fn send_file(part: FilePart, link: Link, send: mpsc::Sender<io::Result<Bytes>>) {
    let mut sending = link.body();
    let (mut next, end) = (part.start, part.start + part.len);
    while next < end {
        let (file, len) = (part.file.clone(), (end - next).min(READ));
        let read = move || {
            let mut block = vec![0; len as usize];
            file.read_exact_at(&mut block, next).map(|()| Bytes::from(block))
        };
        let mut block =
            match tokio::task::spawn_blocking(read).await.map_err(io::Error::other).and_then(|r| r) {
                Ok(block) => block,
                Err(error) => {
                    let _ = send.send(Err(error)).await;
                    return;
                }
            };
        next += len;
        while !block.is_empty() {
            let piece = block.split_to(block.len().min(PIECE));
            sending.cross(piece.len()).await;
            if !matches!(timeout(SEND_TIMEOUT, send.send(Ok(piece))).await, Ok(Ok(()))) {
                return;
            }
        }
    }
}

/// A body on its way; writes the request's log line when it has ended or was abandoned.
struct Sent {
    pieces: Option<mpsc::Receiver<io::Result<Bytes>>>,
    left: u64,
    entry: LogEntry,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let body = self.get_mut();
        if body.left == 0 {
            return Poll::Ready(None);
        }
        let Some(pieces) = &mut body.pieces else { return Poll::Ready(None) };
        match pieces.poll_recv(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(piece))) => {
                body.left -= piece.len() as u64;
                body.entry.sent += piece.len() as u64;
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
            Poll::Ready(None) => Poll::Ready(Some(Err(io::ErrorKind::BrokenPipe.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// One line of the access log: method, path, range or `-`, status, body bytes sent.
struct LogEntry {
    shared: Arc<Shared>,
    method: Method,
    path: String,
    range: String,
    status: u16,
    sent: u64,
}

impl Drop for LogEntry {
    fn drop(&mut self) {
        let Some(log) = &self.shared.log else { return };
        // What a client sends goes into the log escaped: one request, one line.
        let (path, range) = (self.path.escape_default(), self.range.escape_default());
        let line = format!("{} {path} {range} {} {}\n", self.method, self.status, self.sent);
        if let Ok(mut file) = log.lock() {
            let _ = file.write_all(line.as_bytes());
        }
    }
}
