//! Connections: accepting them, a limit on their number, on their heads and on the time that these take, and their end.

use crate::listener::{Connection, Listener, Peer};
use crate::metrics::Metrics;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tower_service::Service;

/// How long a client may take for a request's head, and for TLS before it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest head, bytes.
const HEAD_MAX: usize = 32 << 10;
/// Most fields of a head.
const FIELDS_MAX: usize = 64;
/// How long answers may still take when the daemon ends.
const GRACE: Duration = Duration::from_secs(5);
/// How long a client that is refused may take to ask, and how many of those are waited for.
const LINGER: Duration = Duration::from_secs(1);
const LINGERING: usize = 64;
/// Pause when there is no descriptor for a connection.
const SCARCITY_PAUSE: Duration = Duration::from_millis(100);
/// What a client hears for whom there is no room.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n\
    content-type: application/json\r\ncontent-length: 65\r\n\r\n\
    {\"code\":\"too_many_connections\",\"message\":\"too many\",\"hint\":null}\n";

/// What all connections share.
struct Shared {
    app: Router,
    tls: Option<TlsAcceptor>,
    metrics: Arc<Metrics>,
    /// How many more of those who are refused are waited for.
    lingering: Semaphore,
    /// Becomes true when the daemon ends.
    ending: watch::Receiver<bool>,
}

/// Serves `app` to all who connect until `ending` becomes true, and then until all have their answers.
pub async fn serve(
    listener: &Listener,
    app: Router,
    connections: usize,
    metrics: Arc<Metrics>,
    mut ending: watch::Receiver<bool>,
) {
    let room = Arc::new(Semaphore::new(connections));
    let shared = Arc::new(Shared {
        app,
        tls: listener.tls(),
        metrics,
        lingering: Semaphore::new(LINGERING),
        ending: ending.clone(),
    });
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.wait_for(|ending| *ending) => break,
        };
        match accepted {
            Ok(connection) => match Arc::clone(&room).try_acquire_owned() {
                Ok(permit) => drop(tokio::spawn(attend(Arc::clone(&shared), connection, permit))),
                Err(_) => {
                    shared.metrics.refused_connections.inc();
                    drop(tokio::spawn(refuse(Arc::clone(&shared), connection)));
                }
            },
            Err(error) => {
                tracing::warn!(%error, "a client that connects waits");
                tokio::time::sleep(SCARCITY_PAUSE).await;
            }
        }
    }
    let all = u32::try_from(connections).unwrap_or(u32::MAX);
    if timeout(GRACE, room.acquire_many(all)).await.is_err() {
        tracing::info!("connections that are still open are closed");
    }
}

/// Over TLS there are no words for it.
async fn refuse(shared: Arc<Shared>, connection: Connection) {
    // A client that is closed before it has asked does not read the answer.
    if let (None, Ok(_turn)) = (&shared.tls, shared.lingering.try_acquire())
        && let Ok(mut stream) = connection.open(None).await
    {
        let _ = timeout(LINGER, stream.write_all(FULL)).await;
        let _ = timeout(LINGER, stream.read(&mut [0; 1024])).await;
    }
}

async fn attend(shared: Arc<Shared>, connection: Connection, permit: OwnedSemaphorePermit) {
    let _permit = permit;
    shared.metrics.connections.inc();
    let peer = connection.peer();
    match timeout(HEAD_TIMEOUT, connection.open(shared.tls.clone())).await {
        Ok(Ok(stream)) => {
            if let Err(error) = converse(&shared, peer, TokioIo::new(stream)).await {
                tracing::debug!(%error, "a connection has ended");
            }
        }
        Ok(Err(error)) => tracing::debug!(%error, "a client speaks no TLS"),
        Err(_) => tracing::debug!("a client was too slow with TLS"),
    }
    shared.metrics.connections.dec();
}

async fn converse<I>(shared: &Shared, peer: Peer, io: I) -> Result<(), hyper::Error>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let app = shared.app.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer);
        let answer = app.clone().call(request);
        async move { Ok::<_, Infallible>(answer.await.unwrap_or_else(|never| match never {})) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .max_headers(FIELDS_MAX)
        .serve_connection(io, service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let mut ending = shared.ending.clone();
    tokio::select! {
        ended = connection.as_mut() => return ended,
        _ = ending.wait_for(|ending| *ending) => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}
