//! Connections to the real agent: nonsense, too many, files, and requests that have no place.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use forkd_abi::protocol::{FrameKind, Request, Response, WorkerState, write_control, write_frame};
use forkd_engine::fork::agent::{ClientError, FileInfo};
use support::{Agent, SOON, eventually, next_response};

fn refused(result: Result<impl std::fmt::Debug, ClientError>, words: &str) {
    match result {
        Err(ClientError::Agent { message }) => assert!(message.contains(words), "{message}"),
        other => panic!("not refused with {words:?}: {other:?}"),
    }
}

#[test]
fn an_agent_without_a_worker_says_so() {
    let agent = Agent::start();
    let status = agent.client().status(true, SOON).unwrap();
    assert_eq!((status.worker, status.generation, status.connections), (WorkerState::None, 0, 1));
    refused(agent.client().eval("1", SOON), "no warm worker");
    refused(agent.client().snapshot(SOON), "does not run a machine");
}

#[test]
fn nonsense_is_refused_and_the_agent_lives() {
    let agent = Agent::start();
    let cases: [(&[u8], &str); 9] = [
        (&[9, 0, 0, 0, 0], "frame kind 9"),
        (&[0, 0xff, 0xff, 0xff, 0xff], "longer than"),
        (&[0, 1, 0, 16, 0], "longer than"),
        (&[0, 2, 0, 0, 0, b'{', b'}'], "JSON"),
        (&[0, 0, 0, 0, 0], "JSON"),
        (&[0, 3, 0, 0, 0, 0xff, 0xfe, 0xfd], "JSON"),
        (&[1, 0, 0, 0, 0], "no place"),
        (&[2, 1, 0, 0, 0, b'x'], "no place"),
        (b"GET / HTTP/1.1\r\n\r\n", "frame kind 71"),
    ];
    for (bytes, words) in cases {
        let mut stream = agent.raw();
        stream.write_all(bytes).unwrap();
        match next_response(&mut stream) {
            Response::Error { message, .. } => assert!(message.contains(words), "{bytes:?}: {message}"),
            other => panic!("{bytes:?}: {other:?}"),
        }
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0, "the connection is closed");
    }
    agent.client().ping(SOON).unwrap();
}

#[test]
fn deep_json_does_not_end_the_agent() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    let deep = format!(r#"{{"op":"ping","x":{}"#, "[".repeat(500_000));
    write_frame(&mut stream, FrameKind::Control, deep.as_bytes()).unwrap();
    assert!(matches!(next_response(&mut stream), Response::Error { .. }));
    agent.client().ping(SOON).unwrap();
}

#[test]
fn half_a_request_holds_nobody_up() {
    let agent = Agent::start();
    let mut request = Vec::new();
    write_control(&mut request, &Request::Ping).unwrap();
    for len in 0..request.len() {
        let mut stream = agent.raw();
        stream.write_all(&request[..len]).unwrap();
        agent.client().ping(SOON).unwrap();
        drop(stream);
    }
    // One byte at a time is slow, not wrong.
    let mut stream = agent.raw();
    for byte in &request {
        stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(next_response(&mut stream), Response::Pong);
}

#[test]
fn a_second_request_on_a_connection_is_refused() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    // What the system's temporary directory has by that name is not for a test to say.
    let path = agent.dir.path().join("file").to_str().unwrap().to_owned();
    write_control(&mut stream, &Request::Put { path, mode: 0o600 }).unwrap();
    write_control(&mut stream, &Request::Ping).unwrap();
    assert!(matches!(next_response(&mut stream), Response::Error { .. }));
    let mut stream = agent.raw();
    write_control(&mut stream, &Request::Signal { signal: 9 }).unwrap();
    assert!(matches!(next_response(&mut stream), Response::Error { .. }));
}

#[test]
fn one_connection_too_many_is_told_so() {
    let agent = Agent::start();
    // raw() pings on connections of its own, so these are opened bare.
    let mut idle = vec![agent.raw()];
    idle.extend((1..64).map(|_| std::os::unix::net::UnixStream::connect(agent.socket()).unwrap()));
    eventually("the agent is full", || agent.client().ping(SOON).is_err());
    refused(agent.client().ping(SOON), "64 connections");
    idle.pop();
    eventually("there is room again", || agent.client().ping(SOON).is_ok());
    drop(idle);
    eventually("all are gone", || {
        agent.client().status(false, SOON).is_ok_and(|status| status.connections == 1)
    });
}

#[test]
fn files_go_in_and_out() {
    let agent = Agent::start();
    let path = agent.dir.path().join("file");
    let path = path.to_str().unwrap();
    let contents: Vec<u8> = (0..5_000_000u32).map(|i| (i / 3 % 253) as u8).collect();
    assert_eq!(agent.client().put(path, 0o4750, &mut contents.as_slice(), SOON).unwrap(), 5_000_000);
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o4750);
    let mut back = Vec::new();
    let info = agent.client().get(path, &mut back, 5_000_000, SOON).unwrap();
    assert_eq!(info, FileInfo { len: 5_000_000, mode: 0o4750 });
    assert!(back == contents);
    let short = agent.client().get(path, &mut Vec::new(), 4_999_999, SOON);
    assert!(matches!(short, Err(ClientError::FileTooLong { limit: 4_999_999 })), "{short:?}");

    agent.client().put(path, 0o600, &mut &b""[..], SOON).unwrap();
    let mut back = Vec::new();
    assert_eq!(agent.client().get(path, &mut back, 0, SOON).unwrap(), FileInfo { len: 0, mode: 0o600 });
    // A file whose length is only known at its end.
    let info = agent.client().get("/proc/self/status", &mut back, 1 << 20, SOON).unwrap();
    assert_eq!((info.len, back.len() > 100), (back.len() as u64, true));
}

#[test]
fn files_that_cannot_be_say_why() {
    let agent = Agent::start();
    let dir = agent.dir.path();
    let fifo = dir.join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let client = || agent.client();
    refused(client().get("relative", &mut Vec::new(), 9, SOON), "not an absolute path");
    refused(client().get("/no/such/file", &mut Vec::new(), 9, SOON), "No such file");
    refused(client().get("/etc", &mut Vec::new(), 9, SOON), "not a regular file");
    refused(client().get(fifo.to_str().unwrap(), &mut Vec::new(), 9, SOON), "not a regular file");
    refused(client().get("/etc/a\0b", &mut Vec::new(), 9, SOON), "cannot read");
    let big = vec![1; 3 << 20];
    refused(client().put("relative", 0o600, &mut big.as_slice(), SOON), "not an absolute path");
    refused(client().put("/", 0o600, &mut big.as_slice(), SOON), "is a directory");
    refused(client().put(dir.to_str().unwrap(), 0o600, &mut big.as_slice(), SOON), "is a directory");
    refused(client().put("/no/such/dir/file", 0o600, &mut big.as_slice(), SOON), "No such file");
    refused(
        client().put(dir.join("file").to_str().unwrap(), 0o100_000, &mut big.as_slice(), SOON),
        "permission bits",
    );
    refused(client().put("/dev/fd/x", 0o600, &mut big.as_slice(), SOON), "cannot write");
}

#[test]
fn a_put_that_ends_early_leaves_the_old_file() {
    let agent = Agent::start();
    let path = agent.dir.path().join("kept");
    fs::write(&path, "old").unwrap();
    let mut stream = agent.raw();
    write_control(&mut stream, &Request::Put { path: path.display().to_string(), mode: 0o600 }).unwrap();
    write_frame(&mut stream, FrameKind::Stdin, b"new").unwrap();
    let partial = || {
        fs::read_dir(agent.dir.path())
            .unwrap()
            .flatten()
            .any(|e| e.file_name().to_string_lossy().contains("put"))
    };
    eventually("the put has begun", partial);
    drop(stream);
    eventually("nothing partial is left", || !partial());
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn the_agent_sleeps_while_nothing_is_asked() {
    let agent = Agent::with_worker("echo '{\"ready\":true}'; read line");
    agent.client().status(true, SOON).unwrap();
    let _idle = agent.raw();
    let before = agent.cpu_ticks();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(agent.cpu_ticks(), before, "clock ticks used while idle");
}
