//! `forkd-agent --get URL`: one GET of the machine's own loopback, its body on standard output. The same serves
//! readiness checks ([`crate::ready`]) and what a build asks by HTTP.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::time::Duration;

use crate::agent::program::GET;

/// How long a server may be silent.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Longest head of an answer, and longest answer, in bytes.
const HEAD_MAX: usize = 64 << 10;
const ANSWER_MAX: u64 = 16 << 20;

/// Whether `mode` is this.
pub fn serves(mode: &OsString) -> bool {
    mode == GET
}

/// Prints the body; a status of 400 or more, or no answer, is a failure.
pub fn run(url: Option<OsString>) -> ExitCode {
    let url = url.unwrap_or_default();
    let url = url.to_string_lossy();
    let failed = |why: String| {
        eprintln!("{url}: {why}");
        ExitCode::FAILURE
    };
    match get(&url) {
        Err(error) => failed(error.to_string()),
        Ok((status, body)) => {
            if let Err(error) = io::stdout().write_all(&body) {
                return failed(error.to_string());
            }
            if status < 400 { ExitCode::SUCCESS } else { failed(format!("status {status}")) }
        }
    }
}

/// The status and the body that a GET of `http://HOST[:PORT][/PATH]` is answered with.
pub fn get(url: &str) -> io::Result<(u16, Vec<u8>)> {
    let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
    let rest = url.strip_prefix("http://").ok_or_else(|| invalid("not an http:// URL"))?;
    let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    if host.is_empty() || url.contains(|c: char| c.is_control() || c == ' ') {
        return Err(invalid("not an http:// URL"));
    }
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let address = if has_port { host.to_owned() } else { format!("{host}:80") };
    let mut last = invalid("its host has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(stream) => return ask(stream, host, path),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn ask(mut stream: TcpStream, host: &str, path: &str) -> io::Result<(u16, Vec<u8>)> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // Version 1.0, so that the answer is neither in chunks nor followed by another.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: */*\r\nConnection: close\r\n\r\n");
    // At once: a server may answer and hang up before it has read all of it.
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
    parse(answer)
}

/// Takes an answer apart.
fn parse(mut answer: Vec<u8>) -> io::Result<(u16, Vec<u8>)> {
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP");
    let end = answer[..answer.len().min(HEAD_MAX)].windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.ok_or_else(strange)?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let mut words = head.lines().next().unwrap_or_default().split_whitespace();
    let status = words.next().filter(|version| version.starts_with("HTTP/1.")).and(words.next());
    let status = status.and_then(|status| status.parse().ok()).ok_or_else(strange)?;
    let body = answer.split_off(end + 4);
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn answers_are_taken_apart() {
        let parsed = parse(b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nbody\r\n\r\nmore".to_vec()).unwrap();
        assert_eq!(parsed, (404, b"body\r\n\r\nmore".to_vec()));
        for strange in ["", "HTTP/1.1 200", "220 ready\r\n\r\n", "HTTP/1.1 xx OK\r\n\r\n"] {
            assert!(parse(strange.into()).is_err(), "{strange}");
        }
        assert!(parse(vec![b'x'; HEAD_MAX * 2]).is_err());
    }

    #[test]
    fn a_server_is_asked_for_the_path() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let n = stream.read(&mut request).unwrap();
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello").unwrap();
            String::from_utf8_lossy(&request[..n]).into_owned()
        });
        let answer = get(&format!("http://127.0.0.1:{port}/a?b=c")).unwrap();
        assert_eq!(answer, (200, b"hello".to_vec()));
        assert!(server.join().unwrap().starts_with("GET /a?b=c HTTP/1.0\r\n"));
    }

    #[test]
    fn only_plain_http_is_spoken() {
        for url in
            ["", "https://127.0.0.1/", "http://", "http:///x", "http://127.0.0.1/a b", "http://1/\r\nX: y"]
        {
            assert!(get(url).is_err(), "{url:?}");
        }
    }
}
