//! `forkd hub serve` over real sockets: ranges, validators, refusals, shaping, and its end.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use support::{Hub, Lab, noise};

const PACK: &str = "/x.forkd-snapshot.tar.zst";

struct Response {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Response {
    fn header(&self, name: &str) -> Option<&str> {
        let find = |line: &&str| line.split(':').next().is_some_and(|key| key.eq_ignore_ascii_case(name));
        self.head.lines().find(find).map(|line| line.split_once(':').unwrap().1.trim())
    }
}

fn connect(hub: &Hub) -> TcpStream {
    let stream = TcpStream::connect(&hub.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

/// One request on an open connection.
fn ask(stream: &mut TcpStream, method: &str, path: &str, headers: &[(&str, &str)]) -> Response {
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: hub\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the hub closed: {}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut response = Response { status, head, body: Vec::new() };
    let length = response.header("content-length").map_or(0, |text| text.parse().unwrap());
    if method != "HEAD" && status != 304 {
        response.body.resize(length, 0);
        stream.read_exact(&mut response.body).unwrap();
    }
    response
}

fn get(hub: &Hub, path: &str, headers: &[(&str, &str)]) -> Response {
    ask(&mut connect(hub), "GET", path, headers)
}

fn lab_with(bytes: &[u8]) -> Lab {
    let lab = Lab::new();
    std::fs::create_dir_all(lab.path("hub/sub")).unwrap();
    std::fs::write(lab.path("hub").join(&PACK[1..]), bytes).unwrap();
    std::fs::write(lab.path("hub/registry.json"), b"{\"schema_version\":1}").unwrap();
    std::fs::write(lab.path("hub/secret.txt"), b"secret").unwrap();
    std::fs::write(lab.path("hub/sub/y.tar.zst"), b"below").unwrap();
    std::fs::write(lab.path("outside.tar.zst"), b"outside").unwrap();
    std::os::unix::fs::symlink(lab.path("outside.tar.zst"), lab.path("hub/link.tar.zst")).unwrap();
    lab
}

#[test]
fn ranges_are_exact() {
    let bytes = noise(1, 200_000);
    let lab = lab_with(&bytes);
    let hub = Hub::start(&lab, &[]);
    let mut stream = connect(&hub);
    let whole = ask(&mut stream, "GET", PACK, &[]);
    assert_eq!((whole.status, whole.header("accept-ranges")), (200, Some("bytes")));
    assert!(whole.body == bytes);
    for (range, expected, content_range) in [
        ("bytes=0-0", 0..1, "bytes 0-0/200000"),
        ("bytes=1000-150999", 1000..151_000, "bytes 1000-150999/200000"),
        ("bytes=199990-999999", 199_990..200_000, "bytes 199990-199999/200000"),
        ("bytes=-5", 199_995..200_000, "bytes 199995-199999/200000"),
    ] {
        let part = ask(&mut stream, "GET", PACK, &[("Range", range)]);
        assert_eq!((part.status, part.header("content-range")), (206, Some(content_range)), "{range}");
        assert!(part.body == bytes[expected], "{range}");
    }
    for range in ["bytes=200000-", "bytes=-0", "bytes=0-1,5-6"] {
        let none = ask(&mut stream, "GET", PACK, &[("Range", range)]);
        assert_eq!((none.status, none.header("content-range")), (416, Some("bytes */200000")), "{range}");
    }
    let head = ask(&mut stream, "HEAD", PACK, &[]);
    assert_eq!((head.status, head.header("content-length")), (200, Some("200000")));
    assert!(hub.log().contains(&format!("GET {PACK} bytes=0-0 206 1")), "{:?}", hub.log());
}

#[test]
fn validators_tell_a_replaced_file() {
    let lab = lab_with(b"first");
    let hub = Hub::start(&lab, &[]);
    let etag = get(&hub, PACK, &[]).header("etag").unwrap().to_owned();
    assert!(etag.starts_with('"'), "strong: {etag}");
    assert_eq!(get(&hub, PACK, &[("If-Match", &etag), ("Range", "bytes=0-1")]).status, 206);
    assert_eq!(get(&hub, PACK, &[("If-None-Match", &etag)]).status, 304);
    std::fs::write(lab.path("new"), b"other").unwrap();
    std::fs::rename(lab.path("new"), lab.path("hub").join(&PACK[1..])).unwrap();
    assert_eq!(get(&hub, PACK, &[("If-Match", &etag), ("Range", "bytes=0-1")]).status, 412);
    assert_eq!(get(&hub, PACK, &[("If-None-Match", &etag)]).status, 200);
    let voided = get(&hub, PACK, &[("If-Range", &etag), ("Range", "bytes=0-1")]);
    assert_eq!((voided.status, voided.body.as_slice()), (200, &b"other"[..]));
}

#[test]
fn only_the_registry_and_packs_are_served() {
    let lab = lab_with(b"x");
    let hub = Hub::start(&lab, &[]);
    assert_eq!(get(&hub, "/registry.json", &[]).status, 200);
    for path in [
        "/",
        "/secret.txt",
        "/sub/y.tar.zst",
        "/link.tar.zst",
        "/../outside.tar.zst",
        "/..%2foutside.tar.zst",
        "/sub/../registry.json",
        "/.registry.lock",
        "/absent.tar.zst",
        "//registry.json",
    ] {
        let refused = get(&hub, path, &[]);
        assert_eq!((refused.status, refused.body.len()), (404, 0), "{path}");
    }
    let posted = ask(&mut connect(&hub), "POST", "/registry.json", &[]);
    assert_eq!((posted.status, posted.header("allow")), (405, Some("GET, HEAD")));
}

#[test]
fn round_trips_and_bandwidth_are_simulated() {
    let lab = lab_with(&noise(2, 400_000));
    let hub = Hub::start(&lab, &["--rtt", "50ms", "--bandwidth", "1MB/s"]);
    let started = Instant::now();
    let mut stream = connect(&hub);
    ask(&mut stream, "GET", PACK, &[("Range", "bytes=0-0")]);
    let first = started.elapsed();
    let again = Instant::now();
    ask(&mut stream, "GET", PACK, &[("Range", "bytes=0-0")]);
    let second = again.elapsed();
    let body = Instant::now();
    assert_eq!(ask(&mut stream, "GET", PACK, &[]).body.len(), 400_000);
    let third = body.elapsed();
    // Lower bounds only: a busy machine may take longer, never less.
    assert!(first >= Duration::from_millis(100), "connection and request: {first:?}");
    assert!(second >= Duration::from_millis(50) && second < first, "request alone: {second:?}");
    assert!(third >= Duration::from_millis(440), "400 kB at 1 MB/s: {third:?}");
}

#[test]
fn it_says_where_it_listens_and_ends_on_sigterm() {
    let lab = lab_with(b"x");
    let hub = Hub::start(&lab, &[]);
    let taken = hub.address.clone();
    lab.run(&["hub", "serve", "--listen", &taken, lab.path("hub").to_str().unwrap()])
        .fails(1, &["cannot serve the hub", &taken, "in use", "hint: "]);
    lab.run(&["hub", "serve", "/nonexistent"]).fails(1, &["/nonexistent", "No such file"]);
    let idle = connect(&hub);
    let started = Instant::now();
    assert_eq!(hub.terminate(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(5), "an idle connection holds it up");
    drop(idle);
}
