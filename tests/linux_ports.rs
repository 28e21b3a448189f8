//! Ports of a real Linux guest, and the lifetime of its copies: `forkd forward`, `--publish`, `pause`, `resume`,
//! `--timeout`. Needs what `linux.rs` needs. `FORKD_PORTS_MIB` says how much goes through a port; little by default.

#[path = "linux/copies.rs"]
mod copies;
#[path = "linux/harness.rs"]
mod harness;

use copies::Copies;
use harness::{alive, wait_until};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

/// Servers in the guest, in threads of its worker: HTTP; one that answers after the end of what it hears, with its length
/// and sha256; one that sends bytes and their sha256; and one that sends back what comes.
const SERVE: &str = "
import hashlib, http.server, socket, threading
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        body = ('you asked for ' + self.path).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
web = Server(('127.0.0.1', 8000), Quiet)
threading.Thread(target=web.serve_forever, daemon=True).start()
def serve(port, work):
    server = socket.create_server(('127.0.0.1', port), backlog=128)
    def accept():
        while True:
            peer = server.accept()[0]
            threading.Thread(target=lambda: (work(peer), peer.close()), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
def digest(peer):
    sum, length = hashlib.sha256(), 0
    while block := peer.recv(1 << 18):
        sum.update(block)
        length += len(block)
    peer.sendall(f'{length} {sum.hexdigest()}'.encode())
def source(peer):
    block, sum = bytes(range(256)) * 1024, hashlib.sha256()
    for _ in range(int(peer.recv(16))):
        peer.sendall(block)
        sum.update(block)
    peer.sendall(sum.hexdigest().encode())
def echo(peer):
    while block := peer.recv(1 << 16):
        peer.sendall(block)
serve(8001, digest)
serve(8002, source)
serve(8003, echo)
";
/// What `source` sends in one block, bytes.
const BLOCK: usize = 256 << 10;

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

fn get(port: u16, path: &str) -> String {
    let mut stream = connect(port);
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn signal(process: &Child, name: &str) {
    let mut kill = std::process::Command::new("kill");
    assert!(kill.args([name, &process.id().to_string()]).status().unwrap().success());
}

/// A figure of a process in KiB.
fn status_kib(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

fn is_refused(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[test]
fn servers_in_a_copy_are_reached_by_many_at_once_and_each_direction_ends_by_itself() {
    let copies = Copies::of("python-numpy", &[]);
    copies.eval(0, SERVE);
    let (mut forward, ports) = copies.forward(&[copies.id(0), "8000", "8001", "8002", "9"]);
    std::thread::scope(|scope| {
        for number in 0..20 {
            let port = ports[0];
            scope.spawn(move || {
                let said = get(port, &format!("/{number}"));
                assert!(
                    said.starts_with("HTTP/1.0 200") && said.ends_with(&format!("asked for /{number}")),
                    "{said}"
                );
            });
        }
    });
    let mut halved = connect(ports[1]);
    halved.write_all(b"hello").unwrap();
    halved.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    halved.read_to_string(&mut said).unwrap();
    assert_eq!(said, "5 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824");
    let error = connect(ports[3]).read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "nothing listens there");

    // Ctrl-C ends it, an open connection included; the copy goes on.
    let mut open = connect(ports[1]);
    open.write_all(b"x").unwrap();
    signal(&forward, "-INT");
    assert_eq!(forward.wait().unwrap().code(), Some(130));
    assert!(open.read(&mut [0; 1]).unwrap_or(0) == 0 && ports.iter().all(|port| is_refused(*port)));
    assert_eq!(copies.eval(0, "1 + 1"), "2");

    // A forward ends with its last child.
    let (mut forward, ports) = copies.forward(&[copies.id(0), "8000"]);
    copies.run(&["kill", copies.id(0)]).success();
    assert!(forward.wait().unwrap().success() && is_refused(ports[0]));
    copies.end();
}

#[test]
fn large_amounts_arrive_whole_both_ways_and_a_slow_reader_holds_them_up() {
    let blocks = std::env::var("FORKD_PORTS_MIB").map_or(4, |mib| mib.parse().unwrap()) * 4;
    let copies = Copies::of("python-numpy", &[]);
    copies.eval(0, SERVE);
    let (forward, ports) = copies.forward(&[copies.id(0), "8001", "8002"]);
    let block: Vec<u8> = (0..BLOCK).map(|at| at as u8).collect();
    let mut sum = Sha256::new();
    let mut sink = connect(ports[0]);
    let began = Instant::now();
    for _ in 0..blocks {
        sink.write_all(&block).unwrap();
        sum.update(&block);
    }
    sink.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    sink.read_to_string(&mut said).unwrap();
    let inwards = began.elapsed();
    let digest: String = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(said, format!("{} {digest}", blocks * BLOCK));

    let mut source = connect(ports[1]);
    write!(source, "{blocks}").unwrap();
    // Meanwhile nobody reads.
    std::thread::sleep(Duration::from_secs(2));
    let (began, mut bytes) = (Instant::now(), Vec::new());
    source.read_to_end(&mut bytes).unwrap();
    let outwards = began.elapsed();
    let (sent, said) = bytes.split_at(blocks * BLOCK);
    assert!(sent.chunks(BLOCK).all(|chunk| chunk == block) && said == digest.as_bytes());
    let peak = status_kib(forward.id(), "VmHWM:");
    assert!(peak < 32 << 10, "forkd forward takes {peak} KiB");
    let speed = |time: Duration| (blocks * BLOCK) as f64 / time.as_secs_f64() / (1 << 20) as f64;
    println!("{:.1} MiB/s inwards, {:.1} outwards, {peak} KiB", speed(inwards), speed(outwards));
    copies.end();
    let _ = { forward }.wait();
}

/// The first of `count` ports that are free now.
fn free_range(count: u16) -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if first.checked_add(count).is_some() && (first..first + count).all(free) {
            return first;
        }
    }
}

#[test]
fn each_copy_publishes_its_port_of_a_range_until_it_is_over() {
    let first = free_range(3);
    let map = format!("8000:{first}");
    let copies = Copies::of("python-numpy", &["-n", "3", "--publish", &map, "--publish", "8001"]);
    let ports = |at: usize, value: &Value| {
        let ports = value["ports"].as_array().unwrap();
        assert_eq!(
            (&ports[0]["guest"], &ports[0]["local"]),
            (&8000.into(), &(first + at as u16).into()),
            "{value}"
        );
        ports[1]["local"].as_u64().unwrap() as u16
    };
    let mut any = Vec::new();
    for at in 0..3 {
        copies.eval(at, &format!("{SERVE}\nQuiet.server_version = 'copy {at}'\nNone"));
        any.push(ports(at, &copies.report["children"][at]));
        assert_eq!(ports(at, &copies.shown(at)), any[at]);
    }
    for at in 0..3 {
        let said = get(first + at as u16, "/");
        assert!(said.contains(&format!("Server: copy {at} ")), "{said}");
    }
    copies.run(&["kill", copies.id(1)]).success();
    assert!(wait_until(Duration::from_secs(5), || is_refused(first + 1) && is_refused(any[1])));
    assert!(copies.shown(1)["ports"].is_null());
    assert!(get(first + 2, "/").contains("copy 2"));
    // One that is paused refuses at once.
    copies.json(&["pause", copies.id(0)]);
    assert_eq!(connect(first).read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // A port that is taken fails before anything is left.
    let taken = copies.failure(&["fork", "--tag", "python-numpy", "--publish", &map]);
    assert!(taken.contains(&format!("cannot listen: 127.0.0.1:{first}: Address already in use")), "{taken}");
    copies.end();
    assert!(is_refused(first));
}

/// Processor time of all threads of a process, clock ticks.
fn cpu_ticks(pid: i64) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_paused_copy_takes_no_time_refuses_requests_and_answers_when_it_is_resumed() {
    let copies = Copies::of("python-numpy", &["-n", "2"]);
    copies.eval(0, SERVE);
    copies.eval(0, "n = 0\ndef count():\n    global n\n    while True: n += 1\n");
    let (mut forward, ports) = copies.forward(&[copies.id(0), "8003"]);
    let mut echo = connect(ports[0]);
    let mut said = [0; 2];
    let mut round_trip = || {
        let began = Instant::now();
        echo.write_all(b"hi").and_then(|()| echo.read_exact(&mut said)).unwrap();
        began.elapsed()
    };
    // What a pause adds to an answer, of a copy at rest.
    let usual = [(); 10].map(|()| round_trip());
    let after_pause = [(); 10].map(|()| {
        copies.json(&["pause", copies.id(0)]);
        copies.json(&["resume", copies.id(0)]);
        round_trip()
    });
    let middle = |mut times: [Duration; 10]| {
        times.sort();
        times[5].as_secs_f64() * 1e3
    };
    println!(
        "an answer takes {:.1} ms, and right after a resume {:.1} ms (medians of 10)",
        middle(usual),
        middle(after_pause)
    );
    copies.eval(0, "threading.Thread(target=count, daemon=True).start()");
    let busy = [(); 5].map(|()| round_trip()).into_iter().max().unwrap();

    assert_eq!(copies.json(&["pause", copies.id(0)])["paused"], 1);
    assert_eq!(copies.json(&["pause", copies.id(0)])["paused"], 1, "it is paused already");
    let (states, ticks) = ([copies.shown(0), copies.shown(1)], cpu_ticks(copies.pid(0)));
    assert_eq!((&states[0]["state"], &states[1]["state"]), (&"paused".into(), &"ready".into()));
    for refused in [
        &["exec", copies.id(0), "--", "true"][..],
        &["eval", copies.id(0), "1"],
        &["forward", copies.id(0), "80"],
    ] {
        let began = Instant::now();
        let text = copies.failure(refused);
        let hint = "hint: `forkd resume ID` lets it go on";
        assert!(text.contains(&format!("{} is paused", copies.id(0))) && text.contains(hint), "{text}");
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(cpu_ticks(copies.pid(0)), ticks, "a paused copy takes processor time");

    // An open connection goes on where it was.
    let mut after_resume: Vec<Duration> = (0..5)
        .map(|round| {
            if round > 0 {
                copies.json(&["pause", copies.id(0)]);
                std::thread::sleep(Duration::from_secs(1));
            }
            echo.write_all(b"yo").unwrap();
            assert_eq!(copies.json(&["resume", copies.id(0)])["resumed"], 1);
            let resumed = Instant::now();
            echo.read_exact(&mut said).unwrap();
            assert_eq!(&said, b"yo");
            resumed.elapsed()
        })
        .collect();
    println!("busy: an answer takes {busy:.1?} at most; right after a resume: {after_resume:.1?}");
    // The host is shared, and what the guest does at that moment chance: one of them alone says nothing.
    after_resume.sort();
    let after = after_resume[2];
    assert!(after < 10 * busy, "the first answer after a resume took {after:?}, others {busy:?}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let clock: f64 = copies.eval(0, "__import__('time').time()").as_str().unwrap().parse().unwrap();
    assert!((clock - now).abs() < 1.0, "the guest's clock is {} s off", clock - now);

    // By the fork's name, and killed while they are stopped.
    let fork = copies.id(0).split_once('-').unwrap().0.to_owned();
    assert_eq!(copies.json(&["pause", &fork])["paused"], 2);
    copies.run(&["kill", copies.id(1)]).success();
    assert!(wait_until(Duration::from_secs(5), || !alive(copies.pid(1))), "a paused copy cannot be killed");
    assert!(copies.failure(&["pause", copies.id(1)]).contains("there is no running child"));
    assert!(copies.failure(&["resume", "abcdef"]).contains("there is no running fork `abcdef`"));
    copies.end();
    assert!(forward.wait().unwrap().success());
}

#[test]
fn a_copy_whose_time_is_over_is_ended_or_paused() {
    let copies = Copies::of("python-numpy", &["--timeout", "3s", "--on-timeout", "pause"]);
    let shown = copies.shown(0);
    assert!(shown["expires_in_ms"].as_u64().is_some_and(|left| left <= 3000), "{shown}");
    assert!(wait_until(Duration::from_secs(10), || copies.shown(0)["state"] == "paused"));
    assert_eq!(copies.shown(0)["error"], "its time of 3s is over");
    copies.json(&["resume", copies.id(0)]);
    assert_eq!(copies.eval(0, "2 + 2"), "4");
    let shown = copies.shown(0);
    assert!(shown["error"].is_null() && shown["expires_in_ms"].is_null(), "{shown}");
    copies.end();

    // Held by the fork, not by the command that started it.
    let copies = Copies::of("python-numpy", &["--timeout", "2s"]);
    assert!(wait_until(Duration::from_secs(10), || !alive(copies.pid(0))));
    copies.end();

    for on_timeout in ["kill", "pause"] {
        let copies = Copies::of("python-numpy", &[]);
        let sleep = "__import__('time').sleep(60)";
        let (code, text) = copies
            .run(&[
                "fork",
                "--tag",
                "python-numpy",
                "--timeout",
                "2s",
                "--on-timeout",
                on_timeout,
                "--eval",
                sleep,
            ])
            .both();
        assert!(code == Some(1) && text.contains("error: its time of 2s is over"), "{text}");
        copies.end();
    }
}
