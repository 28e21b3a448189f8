//! One forwarded connection: from a client on the host through a child's vsock to a port of its loopback.
//!
//! The child is not trusted: what it answers is bounded, and has a deadline. Behind the handshake there are no frames, each
//! direction ends by itself, and a side that fails resets the other.

use crate::fork::agent::{HANDSHAKE_MAX, accepts};
use forkd_abi::protocol::{
    FrameKind, HEADER_LEN, PORT, ProtocolError, Request, Response, decode_control, decode_header,
    encode_control, encode_header,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// How long a child may take to connect; where nobody accepts for so long, nobody will.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest answer of the agent, bytes.
const ANSWER_MAX: usize = 16 << 10;
/// What is read at once from either side, bytes; a packet of the vsock holds as much.
const BUFFER: usize = 64 << 10;

/// A child's port cannot be connected to.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Its vsock: the child is over, or has no more streams.
    #[error("the child's vsock")]
    Vsock(#[from] io::Error),
    /// What comes is not what a monitor or agent says.
    #[error("the child's answer makes no sense")]
    Nonsense,
    /// A frame that is none.
    #[error("the child's answer makes no sense")]
    Protocol(#[from] ProtocolError),
    /// The agent refuses: nothing listens there, or it forwards as many as it can.
    #[error("{message}")]
    Refused {
        /// Its words.
        message: String,
    },
    /// It is paused.
    #[error("the child is paused")]
    Paused,
    /// It takes too long.
    #[error("the child did not connect within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout,
}

/// A connection to a port of a child.
#[derive(Debug)]
pub struct GuestStream {
    stream: UnixStream,
    /// Came with the last bytes of the handshake.
    early: Vec<u8>,
}

impl GuestStream {
    /// Connects to `port` through the vsock at `socket`.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn dial(socket: &Path, port: u16) -> Result<GuestStream, DialError> {
        let dialling = tokio::time::timeout(CONNECT_TIMEOUT, GuestStream::dial_at_leisure(socket, port));
        dialling.await.unwrap_or(Err(DialError::Timeout))
    }

    async fn dial_at_leisure(socket: &Path, port: u16) -> Result<GuestStream, DialError> {
        let mut stream = UnixStream::connect(socket).await?;
        let request = encode_control(&Request::Connect { port })?;
        let mut opening = format!("CONNECT {PORT}\n").into_bytes();
        opening.extend(encode_header(FrameKind::Control, request.len())?);
        opening.extend(request);
        // In one piece: the monitor takes its line, and the agent finds the request with the connection.
        stream.write_all(&opening).await?;
        let mut received = Vec::new();
        let greeted = receive(&mut stream, &mut received, greeting).await?;
        received.drain(..greeted);
        let answered = receive(&mut stream, &mut received, answer).await?;
        let response = decode_control(&received[HEADER_LEN..answered])?;
        received.drain(..answered);
        match response {
            Response::Ok => Ok(GuestStream { stream, early: received }),
            Response::Error { message, .. } => Err(DialError::Refused { message }),
            _ => Err(DialError::Nonsense),
        }
    }

    /// Passes bytes on both ways until both sides have ended, or one has failed: then both are reset.
    pub async fn relay(self, mut client: TcpStream) {
        let GuestStream { mut stream, early } = self;
        if let Err(error) = relay(&mut client, &mut stream, &early).await {
            tracing::debug!(%error, "a forwarded connection broke off");
            reset(&client);
        }
    }
}

/// Has the client see a reset instead of an end in good order, when it is dropped.
pub fn reset(client: &TcpStream) {
    // Otherwise it sees an end.
    let _ = client.set_zero_linger();
}

/// Reads until `whole` finds its part at the begin of what came; returns the part's length.
async fn receive(
    stream: &mut UnixStream,
    received: &mut Vec<u8>,
    whole: impl Fn(&[u8]) -> Result<Option<usize>, DialError>,
) -> Result<usize, DialError> {
    loop {
        if let Some(length) = whole(received)? {
            return Ok(length);
        }
        if stream.read_buf(received).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

/// The length of the monitor's line `OK n`.
fn greeting(bytes: &[u8]) -> Result<Option<usize>, DialError> {
    let start = &bytes[..bytes.len().min(HANDSHAKE_MAX)];
    match start.iter().position(|byte| *byte == b'\n') {
        Some(end) if accepts(&start[..=end]) => Ok(Some(end + 1)),
        None if bytes.len() < HANDSHAKE_MAX => Ok(None),
        _ => Err(DialError::Nonsense),
    }
}

/// The length of the agent's answer, a control frame.
fn answer(bytes: &[u8]) -> Result<Option<usize>, DialError> {
    let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
    match decode_header(*header)? {
        (FrameKind::Control, length) if length <= ANSWER_MAX => {
            Ok(Some(HEADER_LEN + length).filter(|length| bytes.len() >= *length))
        }
        _ => Err(DialError::Nonsense),
    }
}

async fn relay(client: &mut TcpStream, guest: &mut UnixStream, early: &[u8]) -> io::Result<()> {
    let (mut from_client, mut to_client) = client.split();
    let (mut from_guest, mut to_guest) = guest.split();
    let client_ended = AtomicBool::new(false);
    let inwards = async {
        pass(&mut from_client, &mut to_guest).await?;
        client_ended.store(true, Ordering::Relaxed);
        to_guest.shutdown().await
    };
    let outwards = async {
        to_client.write_all(early).await?;
        pass(&mut from_guest, &mut to_client).await?;
        // One that has ended its direction still listens. When both have ended theirs the agent closes, and there is no
        // telling whether it would have done so anyway.
        if !client_ended.load(Ordering::Relaxed) && is_closed(from_guest.as_ref()) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        to_client.shutdown().await
    };
    tokio::try_join!(inwards, outwards).map(drop)
}

/// Whether the other side of a stream neither sends nor receives any more.
fn is_closed(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

/// Reads what comes and writes it, until its end.
async fn pass(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, UnixListener};

    /// A client, and the forwarded stream's other end, past a handshake that `speak` answers.
    async fn dial(speak: &'static [u8]) -> (Result<GuestStream, DialError>, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 13 + HEADER_LEN + br#"{"op":"connect","port":80}"#.len()];
            stream.read_exact(&mut request).await.unwrap();
            assert!(
                request.starts_with(b"CONNECT 5252\n") && request.ends_with(br#"{"op":"connect","port":80}"#)
            );
            stream.write_all(speak).await.unwrap();
            stream
        };
        tokio::join!(GuestStream::dial(&path, 80), serve)
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        (ours.unwrap(), theirs.unwrap().0)
    }

    const OK: &[u8] = b"OK 1073741824\n\x00\x0e\x00\x00\x00{\"reply\":\"ok\"}";
    const EARLY: &[u8] = b"OK 1\n\x00\x0e\x00\x00\x00{\"reply\":\"ok\"}220 mail";

    #[tokio::test]
    async fn what_comes_with_the_handshake_is_kept_and_each_direction_ends_by_itself() {
        let (stream, mut guest) = dial(EARLY).await;
        let (mut client, forwarded) = pair().await;
        let relay = tokio::spawn(stream.unwrap().relay(forwarded));
        let mut said = [0; 8];
        client.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"220 mail");
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = String::new();
        guest.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "question");
        guest.write_all(b"answer").await.unwrap();
        drop(guest);
        heard.clear();
        client.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "answer");
        relay.await.unwrap();
    }

    #[tokio::test]
    async fn a_side_that_fails_resets_the_other() {
        let (stream, guest) = dial(OK).await;
        let (mut client, forwarded) = pair().await;
        let relay = tokio::spawn(stream.unwrap().relay(forwarded));
        drop(guest);
        let error = client.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        relay.await.unwrap();

        let (stream, mut guest) = dial(OK).await;
        let (client, forwarded) = pair().await;
        let relay = tokio::spawn(stream.unwrap().relay(forwarded));
        reset(&client);
        drop(client);
        assert_eq!(guest.read(&mut [0; 8]).await.unwrap_or(0), 0);
        assert!(is_closed(&guest), "only one direction has ended");
        relay.await.unwrap();
    }

    #[tokio::test]
    async fn lies_and_refusals_are_errors() {
        let refused = b"OK 1\n\x00\x21\x00\x00\x00{\"reply\":\"error\",\"message\":\"why\"}";
        assert!(matches!(dial(refused).await.0, Err(DialError::Refused { message }) if message == "why"));
        for nonsense in [
            &b"NO\n"[..],
            b"OK \n",
            b"OK x\n",
            b"OK 11111111111111111111111111111111111111",
            b"OK 1\n\x00\x00\x00\x08\x00",
            b"OK 1\n\x02\x01\x00\x00\x00x",
            b"OK 1\n\x00\x10\x00\x00\x00{\"reply\":\"pong\"}",
        ] {
            assert!(matches!(dial(nonsense).await.0, Err(DialError::Nonsense)), "{nonsense:?}");
        }
        for broken in [&b"OK 1\n\x07\x00\x00\x00\x00"[..], b"OK 1\n\x00\x02\x00\x00\x00{}"] {
            assert!(matches!(dial(broken).await.0, Err(DialError::Protocol(_))), "{broken:?}");
        }
    }
}
