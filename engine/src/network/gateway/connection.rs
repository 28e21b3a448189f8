//! One TCP connection of a child: made to the real host first, then answered, then copied both ways.

use super::child::ChildGateway;
use super::frame::Flow;
use super::resolver::answer_stream;
use crate::network::policy::Transport;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use std::io;
use std::net::SocketAddrV4;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a host may take to answer, and then the child.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection that both sides have ended may stand still before the child has all of it.
const FAREWELL: Duration = Duration::from_secs(60);
/// What is copied at once, bytes.
const COPY: usize = 32 << 10;

/// Who answers a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The host that it is for.
    Host,
    /// The gateway's own resolver.
    Names,
}

/// Makes the connection that `packet` asks for, and serves it to its end.
pub async fn serve(child: Rc<ChildGateway>, flow: Flow, packet: Vec<u8>, service: Service) {
    let upstream = match service {
        Service::Names => None,
        Service::Host => match connect(flow).await {
            Ok(stream) => Some(stream),
            Err(error) => {
                tracing::debug!(%error, ?flow, "a child's connection cannot be made");
                child.forget(Transport::Tcp, flow);
                // Nobody listens there: the stack resets it.
                child.stack().take(&packet);
                child.work.notify_one();
                return;
            }
        },
    };
    let _open = child.traffic.opened();
    child.answered(flow);
    let accepted = child.stack().accept(flow, &packet);
    if let Some(handle) = accepted {
        child.work.notify_one();
        let mut stream = GuestStream { child: Rc::clone(&child), handle, flow };
        if timeout(CONNECT_TIMEOUT, stream.established()).await == Ok(true) {
            let served = match upstream {
                Some(mut upstream) => {
                    copy_bidirectional_with_sizes(&mut stream, &mut upstream, COPY, COPY).await.map(drop)
                }
                None => answer_stream(&child, &mut stream).await,
            };
            if served.is_ok() {
                let _ = stream.shutdown().await;
                let mut left = stream.left();
                while timeout(FAREWELL, stream.over()).await.is_err() && stream.left() < left {
                    left = stream.left();
                }
            }
        }
    } else {
        child.forget(Transport::Tcp, flow);
    }
}

async fn connect(flow: Flow) -> io::Result<TcpStream> {
    let (address, port) = flow.to;
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(SocketAddrV4::new(address, port))).await??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The child's end of a connection. Dropped before its end, it is reset.
pub struct GuestStream {
    child: Rc<ChildGateway>,
    handle: SocketHandle,
    flow: Flow,
}

impl GuestStream {
    /// Waits until the child has answered the answer; whether it has.
    async fn established(&self) -> bool {
        std::future::poll_fn(|context| self.child.stack().poll_established(self.handle, context)).await
    }

    /// Bytes that the child does not have yet.
    fn left(&self) -> usize {
        self.child.stack().socket(self.handle).send_queue()
    }

    /// Waits until both sides have said that they are over.
    async fn over(&self) {
        std::future::poll_fn(|context| {
            let mut stack = self.child.stack();
            let socket = stack.socket(self.handle);
            if [State::Closed, State::TimeWait].contains(&socket.state()) {
                return Poll::Ready(());
            }
            socket.register_recv_waker(context.waker());
            Poll::Pending
        })
        .await;
    }
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for GuestStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut stack = self.child.stack();
        let socket = stack.socket(self.handle);
        if socket.can_recv() {
            let read = socket.recv_slice(buffer.initialize_unfilled()).map_err(|_| reset())?;
            buffer.advance(read);
            // There is room again.
            self.child.work.notify_one();
            return Poll::Ready(Ok(()));
        }
        match socket.state() {
            State::Established | State::FinWait1 | State::FinWait2 => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
            // It has said that nothing more comes.
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait => Poll::Ready(Ok(())),
            _ => Poll::Ready(Err(reset())),
        }
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut stack = self.child.stack();
        let socket = stack.socket(self.handle);
        if !socket.may_send() {
            return Poll::Ready(Err(reset()));
        }
        if !socket.can_send() {
            socket.register_send_waker(context.waker());
            return Poll::Pending;
        }
        let written = socket.send_slice(bytes).map_err(|_| reset())?;
        self.child.work.notify_one();
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.child.stack().socket(self.handle).close();
        self.child.work.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl Drop for GuestStream {
    fn drop(&mut self) {
        self.child.stack().remove(self.handle);
        self.child.forget(Transport::Tcp, self.flow);
        self.child.work.notify_one();
    }
}
