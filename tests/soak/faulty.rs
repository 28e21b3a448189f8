//! A static HTTP server for a hub's folder that fails some requests on purpose, and counts which.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What can happen to an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    Reset,
    ServerError,
    Stall,
    ShortBody,
    FlippedByte,
    /// One byte further on.
    WrongRange,
    /// Said to be compressed.
    Gzip,
    /// 200 and a page of somebody else's.
    Page,
}

/// Answers that come, and are not to what was asked.
pub const WRONG: [Fault; 3] = [Fault::WrongRange, Fault::Gzip, Fault::Page];

/// Everything that can happen.
pub const FAULTS: [Fault; 8] = [
    Fault::Reset,
    Fault::ServerError,
    Fault::Stall,
    Fault::ShortBody,
    Fault::FlippedByte,
    Fault::WrongRange,
    Fault::Gzip,
    Fault::Page,
];

pub struct Faulty {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    root: PathBuf,
    /// Of a hundred requests for packs, so many fail, in one of these ways.
    percent: AtomicU64,
    kinds: Mutex<Vec<Fault>>,
    /// The first so many requests for packs never fail.
    spared: u64,
    random: AtomicU64,
    stopped: AtomicBool,
    requests: AtomicU64,
    faults: Mutex<BTreeMap<Fault, u64>>,
    next: Mutex<Option<Fault>>,
}

impl Faulty {
    pub fn start(root: PathBuf, percent: u64) -> Faulty {
        Faulty::start_with(root, percent, &FAULTS, 0)
    }

    /// A server that fails requests in some ways only, and not the first `spared`.
    pub fn start_with(root: PathBuf, percent: u64, kinds: &[Fault], spared: u64) -> Faulty {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            root,
            percent: AtomicU64::new(percent),
            kinds: Mutex::new(kinds.to_vec()),
            spared,
            random: AtomicU64::new(0x2545_F491_4F6C_DD1D),
            stopped: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            faults: Mutex::default(),
            next: Mutex::default(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.stopped.load(Relaxed) {
                    return;
                }
                let serving = accepting.clone();
                std::thread::spawn(move || while serving.answer(&stream).is_ok() {});
            }
        });
        Faulty { address, shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// Requests for packs so far, and how many of them were failed in which way.
    pub fn counts(&self) -> (u64, BTreeMap<Fault, u64>) {
        (self.shared.requests.load(Relaxed), self.shared.faults.lock().unwrap().clone())
    }

    /// The next request for a pack meets this fault.
    pub fn fail_next(&self, fault: Fault) {
        *self.shared.next.lock().unwrap() = Some(fault);
    }

    /// From now on nothing fails.
    pub fn mend(&self) {
        self.shared.percent.store(0, Relaxed);
    }

    /// From now on so many of a hundred requests fail, in one of these ways.
    pub fn fail(&self, percent: u64, kinds: &[Fault]) {
        *self.shared.kinds.lock().unwrap() = kinds.to_vec();
        self.shared.percent.store(percent, Relaxed);
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn random(&self) -> u64 {
        let next = |mut state: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^ state << 17
        };
        self.random.fetch_update(Relaxed, Relaxed, |state| Some(next(state))).unwrap() >> 8
    }

    fn fault(&self) -> Option<Fault> {
        if self.requests.fetch_add(1, Relaxed) < self.spared {
            return None;
        }
        let chosen = self.next.lock().unwrap().take();
        let fault = chosen.or_else(|| {
            let fails = self.random() % 100 < self.percent.load(Relaxed);
            let kinds = self.kinds.lock().unwrap();
            fails.then(|| kinds[self.random() as usize % kinds.len()])
        })?;
        *self.faults.lock().unwrap().entry(fault).or_default() += 1;
        Some(fault)
    }

    /// Reads one request and answers it; an error ends the connection.
    fn answer(&self, mut stream: &TcpStream) -> io::Result<()> {
        let head = read_head(stream)?;
        let path = head.split(' ').nth(1).unwrap_or("/").trim_start_matches('/').to_owned();
        let Ok(object) = File::open(self.root.join(&path)) else {
            return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        };
        let size = object.metadata()?.len() as usize;
        let pack = path.ends_with(".zst");
        let range = range_of(&head, size);
        let fault = if pack { self.fault() } else { None };
        let (start, end) = range.unwrap_or((0, size));
        let mut body = vec![0; end - start];
        object.read_exact_at(&mut body, start as u64)?;
        let mut answer = match range {
            Some((start, end)) if fault == Some(Fault::WrongRange) => {
                format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {}-{end}/{size}\r\n", start + 1)
            }
            Some((start, end)) => {
                format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{}/{size}\r\n", end - 1)
            }
            None => "HTTP/1.1 200 OK\r\n".to_owned(),
        };
        answer.push_str(&format!(
            "Content-Length: {}\r\nETag: \"{size}\"\r\nAccept-Ranges: bytes\r\n\r\n",
            body.len()
        ));
        if head.starts_with("HEAD") {
            body.clear();
        }
        let broken = || Err(io::ErrorKind::ConnectionAborted.into());
        match fault {
            None | Some(Fault::WrongRange) => {
                stream.write_all(answer.as_bytes())?;
                stream.write_all(&body)
            }
            Some(Fault::Gzip) => {
                let answer = answer.replacen("\r\n", "\r\nContent-Encoding: gzip\r\n", 1);
                stream.write_all(answer.as_bytes())?;
                stream.write_all(&body)
            }
            Some(Fault::Page) => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<p>Log in, do.\n")
            }
            Some(Fault::Reset) => {
                // Closed without lingering, a connection is reset.
                rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?;
                broken()
            }
            Some(Fault::ServerError) => {
                stream.write_all(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
            }
            Some(Fault::Stall) => {
                stream.write_all(answer.as_bytes())?;
                stream.write_all(&body[..body.len() / 3])?;
                // Until the client gives up, and not for ever.
                stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                let _ = stream.read(&mut [0]);
                broken()
            }
            Some(Fault::ShortBody) => {
                stream.write_all(answer.as_bytes())?;
                stream.write_all(&body[..body.len() / 2])?;
                broken()
            }
            Some(Fault::FlippedByte) => {
                if !body.is_empty() {
                    let at = self.random() as usize % body.len();
                    body[at] ^= 0x10;
                }
                stream.write_all(answer.as_bytes())?;
                stream.write_all(&body)
            }
        }
    }
}

fn read_head(mut stream: &TcpStream) -> io::Result<String> {
    let (mut head, mut piece) = (Vec::new(), [0; 4096]);
    // A client sends its next request only after the answer, so nothing behind the head is lost.
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if head.len() > 16 << 10 => return Err(io::ErrorKind::InvalidData.into()),
            read => head.extend_from_slice(&piece[..read]),
        }
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// `Range: bytes=A-B`, clipped to the object; nothing else is understood.
fn range_of(head: &str, len: usize) -> Option<(usize, usize)> {
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("range:"))?;
    let (start, end) = line.split_once("bytes=")?.1.trim().split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = end.parse::<usize>().map_or(len, |last| (last + 1).min(len));
    (start < end).then_some((start, end))
}
