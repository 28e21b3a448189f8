//! Connections that the agent forwards to TCP ports of the loopback.

mod support;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use forkd_abi::protocol::{Request, Response, write_control};
use support::{Agent, SOON, eventually, next_response};

/// Tunnels and requests at a time, as the agent has them.
const TUNNELS_MAX: usize = 192;

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    stream
}

/// Asks for a port; the answer is still to be read.
fn ask(agent: &Agent, port: u16) -> UnixStream {
    let mut stream = UnixStream::connect(agent.socket()).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    write_control(&mut stream, &Request::Connect { port }).unwrap();
    stream
}

/// Both ends of a forwarded connection.
fn connect(agent: &Agent, listener: &TcpListener) -> (UnixStream, TcpStream) {
    let mut stream = ask(agent, listener.local_addr().unwrap().port());
    assert_eq!(next_response(&mut stream), Response::Ok);
    (stream, accept(listener))
}

fn start() -> Agent {
    let agent = Agent::start();
    agent.client().ping(SOON).unwrap();
    agent
}

fn connections(agent: &Agent) -> u32 {
    // Less the one that asks.
    agent.client().status(false, SOON).unwrap().connections - 1
}

#[test]
fn bytes_go_both_ways_and_each_direction_ends_by_itself() {
    let agent = start();
    let (listener, _) = listen();
    for host_first in [true, false] {
        let (mut host, mut local) = connect(&agent, &listener);
        host.write_all(b"ping").unwrap();
        let mut said = [0; 4];
        local.read_exact(&mut said).unwrap();
        local.write_all(b"pong").unwrap();
        host.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"pong");
        let mut text = String::new();
        if host_first {
            host.write_all(b"last question").unwrap();
            host.shutdown(Shutdown::Write).unwrap();
            local.read_to_string(&mut text).unwrap();
            assert_eq!(text, "last question");
            local.write_all(b"last answer").unwrap();
            drop(local);
            host.read_to_string(&mut text).unwrap();
            assert_eq!(text, "last questionlast answer");
        } else {
            local.write_all(b"told").unwrap();
            local.shutdown(Shutdown::Write).unwrap();
            host.read_to_string(&mut text).unwrap();
            host.write_all(b"heard").unwrap();
            host.shutdown(Shutdown::Write).unwrap();
            local.read_to_string(&mut text).unwrap();
            assert_eq!(text, "toldheard");
        }
    }
    eventually("nothing is left of them", || connections(&agent) == 0);
}

#[test]
fn what_comes_behind_the_request_is_for_the_port() {
    let agent = start();
    let (listener, port) = listen();
    let mut stream = UnixStream::connect(agent.socket()).unwrap();
    let mut opening = Vec::new();
    write_control(&mut opening, &Request::Connect { port }).unwrap();
    opening.extend(b"\x00\x01early");
    stream.write_all(&opening).unwrap();
    assert_eq!(next_response(&mut stream), Response::Ok);
    let mut said = [0; 7];
    accept(&listener).read_exact(&mut said).unwrap();
    assert_eq!(&said, b"\x00\x01early");
}

#[test]
fn a_port_that_nobody_has_is_an_error_and_one_of_ipv6_is_found() {
    let agent = start();
    let (listener, port) = listen();
    drop(listener);
    let mut refused = ask(&agent, port);
    let Response::Error { message, .. } = next_response(&mut refused) else { panic!("not refused") };
    assert_eq!(message, format!("nothing listens on TCP port {port} of the machine's loopback"));
    assert_eq!(refused.read(&mut [0; 8]).unwrap(), 0);
    let Ok(listener) = TcpListener::bind("[::1]:0") else { return };
    let (mut host, mut local) = connect(&agent, &listener);
    host.write_all(b"6").unwrap();
    let mut said = [0; 1];
    local.read_exact(&mut said).unwrap();
}

#[test]
fn a_side_that_fails_resets_the_other() {
    let agent = start();
    let (listener, _) = listen();
    // The host goes without a word.
    let (host, mut local) = connect(&agent, &listener);
    drop(host);
    let error = local.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // And after it has ended its direction.
    let (host, mut local) = connect(&agent, &listener);
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(local.read(&mut [0; 8]).unwrap(), 0);
    drop(host);
    eventually("the port's side is told", || local.write_all(b"x").is_err());
    // The port's side closes with what it has not read, which is a reset.
    let (mut host, local) = connect(&agent, &listener);
    host.write_all(b"unread").unwrap();
    eventually("it has come", || local.peek(&mut [0; 6]).unwrap() == 6);
    drop(local);
    assert_eq!(host.read(&mut [0; 8]).unwrap_or(0), 0);
    eventually("the host is told", || host.write_all(b"x").is_err());
    eventually("nothing is left of them", || connections(&agent) == 0);
}

/// Writes until nothing more is taken, which must be soon; how many bytes were.
fn fill(mut stream: impl Write) -> usize {
    let block = vec![7; 64 << 10];
    let mut written = 0;
    loop {
        match stream.write(&block) {
            Ok(count) => written += count,
            Err(_) => return written,
        }
        assert!(written < 64 << 20, "there is no end to what is taken");
    }
}

fn read_all(mut stream: impl Read, length: usize) {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
fn what_is_not_read_is_not_taken_and_holds_nobody_else_up() {
    let agent = start();
    let (listener, _) = listen();
    let (host, local) = connect(&agent, &listener);
    let before = agent.resident_kib();
    let short = Some(Duration::from_millis(300));
    host.set_write_timeout(short).and_then(|()| local.set_write_timeout(short)).unwrap();
    let (to_local, to_host) = (fill(&host), fill(&local));
    let grown = agent.resident_kib().saturating_sub(before);
    assert!(grown < 1024, "the agent has grown by {grown} KiB");
    let (mut other, mut other_local) = connect(&agent, &listener);
    other.write_all(b"hello").unwrap();
    other_local.read_exact(&mut [0; 5]).unwrap();
    agent.client().ping(SOON).unwrap();
    // Idle, though both directions have bytes to be taken.
    let ticks = agent.cpu_ticks();
    thread::sleep(Duration::from_millis(200));
    assert!(agent.cpu_ticks() - ticks <= 1, "the agent does not sleep");
    read_all(&local, to_local);
    read_all(&host, to_host);
}

#[test]
fn large_amounts_arrive_whole_both_ways_at_once() {
    const LENGTH: usize = 24 << 20;
    let agent = start();
    let (listener, _) = listen();
    let (host, local) = connect(&agent, &listener);
    let byte = |at: usize| (at % 251) as u8;
    let send = |mut to: Box<dyn Write + Send>, end: &dyn Fn()| {
        to.write_all(&(0..LENGTH).map(byte).collect::<Vec<u8>>()).unwrap();
        end();
    };
    let receive = |mut from: Box<dyn Read + Send>| {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), LENGTH);
        assert!(bytes.iter().enumerate().all(|(at, value)| *value == byte(at)));
    };
    let (host_again, local_again) = (host.try_clone().unwrap(), local.try_clone().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| send(Box::new(host_again), &|| host.shutdown(Shutdown::Write).unwrap()));
        scope.spawn(|| send(Box::new(local_again), &|| local.shutdown(Shutdown::Write).unwrap()));
        scope.spawn(|| receive(Box::new(host.try_clone().unwrap())));
        receive(Box::new(local.try_clone().unwrap()));
    });
    drop((host, local));
    eventually("nothing is left of it", || connections(&agent) == 0);
}

#[test]
fn however_many_there_are_requests_are_served() {
    let agent = start();
    let (listener, port) = listen();
    let mut open: Vec<_> = (0..TUNNELS_MAX).map(|_| connect(&agent, &listener)).collect();
    let mut one_more = ask(&agent, port);
    let Response::Error { message, .. } = next_response(&mut one_more) else { panic!("one more was taken") };
    assert_eq!(message, format!("the agent already forwards {TUNNELS_MAX} connections"));
    agent.client().ping(SOON).unwrap();
    assert_eq!(connections(&agent) as usize, TUNNELS_MAX);
    for (at, (host, local)) in open.iter_mut().enumerate() {
        host.write_all(&[at as u8]).unwrap();
        let mut said = [0];
        local.read_exact(&mut said).unwrap();
        local.write_all(&said).unwrap();
        host.read_exact(&mut said).unwrap();
        assert_eq!(said[0], at as u8);
    }
    // Idle ones cost no time.
    let ticks = agent.cpu_ticks();
    thread::sleep(Duration::from_millis(200));
    assert!(agent.cpu_ticks() - ticks <= 1, "the agent does not sleep");
    drop(open);
    eventually("all are over", || connections(&agent) == 0);
}
