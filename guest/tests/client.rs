//! The host's client against agents that refuse, stay silent, or lie.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use forkd_abi::protocol::{
    Answer, ExecRequest, Exit, FrameKind, Response, encode_control, write_control, write_frame,
};
use forkd_engine::fork::agent::{AgentClient, ClientError};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(150);

/// A Unix socket whose every connection is handed to `serve`, with its number.
struct Fake {
    _dir: TempDir,
    path: PathBuf,
}

impl Fake {
    fn new(serve: impl Fn(usize, &mut UnixStream) + Send + Sync + 'static) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for (i, stream) in listener.incoming().enumerate() {
                // A client that has given up makes these fail.
                serve(i, &mut stream.unwrap());
            }
        });
        Self { _dir: dir, path }
    }

    /// Past the handshake and the request, sends `reply` and closes.
    fn replying(reply: impl Fn(&mut UnixStream) + Send + Sync + 'static) -> Self {
        Self::new(move |_, stream| {
            if handshake(stream) {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                reply(stream);
            }
        })
    }

    fn client(&self) -> AgentClient {
        AgentClient::connect(&self.path, SOON).unwrap()
    }

    fn sending(bytes: Vec<u8>) -> AgentClient {
        let fake = Self::replying(move |stream| {
            let _ = stream.write_all(&bytes);
        });
        fake.client()
    }
}

fn handshake(stream: &mut UnixStream) -> bool {
    let mut line = [0; 13];
    let read = stream.read_exact(&mut line).is_ok();
    assert!(!read || &line == b"CONNECT 5252\n", "{line:?}");
    read && stream.write_all(b"OK 1073741824\n").is_ok()
}

fn control(response: &Response) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_control(&mut bytes, response).unwrap();
    bytes
}

#[test]
fn connecting_tries_again_until_something_listens() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("later");
    let result = AgentClient::connect(&path, SHORT);
    assert!(matches!(result, Err(ClientError::Connect { .. })), "{result:?}");
    let server = path.clone();
    thread::spawn(move || {
        thread::sleep(SHORT);
        let listener = UnixListener::bind(server).unwrap();
        // A machine that still boots: the monitor closes the connection.
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        assert!(handshake(&mut stream));
        let _ = stream.read(&mut [0; 64]);
        stream.write_all(&control(&Response::Pong)).unwrap();
    });
    AgentClient::connect(&path, SOON).unwrap().ping(SOON).unwrap();
}

#[test]
fn a_handshake_that_is_none_is_an_error_at_once() {
    for reply in ["NO\n", "OK\n", "OK \n", "OK x\n", "HTTP/1.1 400 Bad Request\r\n", "OK 1\r\n"] {
        let fake = Fake::new(move |_, stream| {
            let _ = stream.write_all(reply.as_bytes());
            let _ = stream.read(&mut [0; 64]);
        });
        let result = AgentClient::connect(&fake.path, SOON);
        assert!(matches!(result, Err(ClientError::Handshake { .. })), "{reply:?}: {result:?}");
    }
    // Endless, and without a line's end.
    let fake = Fake::new(|_, stream| while stream.write_all(&[b'O'; 1000]).is_ok() {});
    let result = AgentClient::connect(&fake.path, SOON);
    assert!(matches!(result, Err(ClientError::Handshake { reply, .. }) if reply.len() == 32));
}

#[test]
fn silence_ends_at_the_deadline() {
    let fake = Fake::new(|_, stream| drop(stream.read_to_end(&mut Vec::new())));
    let started = Instant::now();
    let result = AgentClient::connect(&fake.path, SHORT);
    assert!(matches!(result, Err(ClientError::Timeout { after: SHORT })), "{result:?}");
    let fake = Fake::replying(|stream| drop(stream.read_to_end(&mut Vec::new())));
    let result = fake.client().ping(SHORT);
    assert!(matches!(result, Err(ClientError::Timeout { after: SHORT })), "{result:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_byte_now_and_then_does_not_move_the_deadline() {
    let fake = Fake::replying(|stream| {
        let bytes = control(&Response::Answer(Answer::default()));
        for byte in bytes {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(40));
        }
    });
    let started = Instant::now();
    let result = fake.client().eval("1", SHORT);
    assert!(matches!(result, Err(ClientError::Timeout { .. })), "{result:?}");
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn lies_are_errors() {
    let protocol = |bytes: Vec<u8>| {
        let result = Fake::sending(bytes).ping(SOON);
        assert!(matches!(result, Err(ClientError::Protocol { .. })), "{result:?}");
    };
    protocol(vec![0, 0xff, 0xff, 0xff, 0xff]);
    protocol(vec![77, 0, 0, 0, 0]);
    protocol(vec![0, 2, 0, 0, 0, b'{', b'}']);
    let closed = |bytes: Vec<u8>| {
        let result = Fake::sending(bytes).ping(SOON);
        assert!(matches!(result, Err(ClientError::Closed)), "{result:?}");
    };
    closed(vec![]);
    closed(vec![0, 9]);
    closed(vec![0, 0xff, 0xff, 0, 0, b'x']);
    let unexpected = |bytes: Vec<u8>| {
        let result = Fake::sending(bytes).ping(SOON);
        assert!(matches!(result, Err(ClientError::Unexpected { .. })), "{result:?}");
    };
    unexpected(control(&Response::Ok));
    unexpected(vec![2, 1, 0, 0, 0, b'x']);
    let result = Fake::sending(control(&Response::error("because"))).ping(SOON);
    assert!(matches!(&result, Err(ClientError::Agent { message }) if message == "because"), "{result:?}");
}

#[test]
fn an_exec_that_breaks_off_is_not_an_exit() {
    let run = |bytes: Vec<u8>| {
        let client = Fake::sending(bytes);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let result = client.exec(ExecRequest::default(), None, &mut out, &mut err, Some(SOON));
        (result, out)
    };
    let mut bytes = control(&Response::Started { pid: 1 });
    write_frame(&mut bytes, FrameKind::Stdout, b"half").unwrap();
    let (result, out) = run(bytes.clone());
    assert!(matches!(result, Err(ClientError::Closed)), "{result:?}");
    assert_eq!(out, b"half");
    let exit = Exit { code: Some(0), signal: None };
    bytes.extend(control(&Response::Exited(exit)));
    assert_eq!(run(bytes).0.unwrap(), exit);
    let (result, _) = run(vec![1, 0, 0, 0, 0]);
    assert!(matches!(result, Err(ClientError::Unexpected { .. })), "{result:?}");
}

#[test]
fn a_get_takes_no_more_than_its_caller_allows() {
    // The length announced is small, the contents have no end.
    let fake = Fake::replying(|stream| {
        let _ = stream.write_all(&control(&Response::File { len: 1, mode: 0o644 }));
        while write_frame(stream, FrameKind::Stdout, &[7; 1000]).is_ok() {}
    });
    let mut contents = Vec::new();
    let result = fake.client().get("/x", &mut contents, 10_000, SOON);
    assert!(matches!(result, Err(ClientError::FileTooLong { limit: 10_000 })), "{result:?}");
    assert!(contents.len() <= 10_000);
    let huge = Fake::sending(control(&Response::File { len: u64::MAX, mode: u32::MAX }));
    let result = huge.get("/x", &mut contents, 10_000, SOON);
    assert!(matches!(result, Err(ClientError::FileTooLong { .. })), "{result:?}");
}

#[test]
fn a_put_reports_the_agents_reason_and_not_the_broken_pipe() {
    let client = Fake::sending(control(&Response::error("disk full")));
    let result = client.put("/x", 0o600, &mut std::io::repeat(1).take(50 << 20), SOON);
    assert!(matches!(&result, Err(ClientError::Agent { message }) if message == "disk full"), "{result:?}");
}

#[test]
fn requests_longer_than_a_frame_are_refused_here() {
    let client = Fake::sending(control(&Response::Pong));
    let result = client.eval(&"x".repeat(1 << 20), SOON);
    assert!(matches!(result, Err(ClientError::Protocol { .. })), "{result:?}");
    assert!(encode_control(&Response::Pong).unwrap().len() < 100);
}
