//! A daemon of a test, and clients of it: curl, and tungstenite for WebSockets.

use super::harness::{Bed, Hub, wait_until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

/// How long anything may take before the test fails.
const LIMIT: &str = "100";

/// A daemon, and directories of its own.
pub struct Service {
    pub bed: Bed,
    daemon: Child,
    /// Where it listens, as curl is told.
    place: Vec<String>,
    url: String,
}

/// What it answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn list(&self) -> Vec<Value> {
        self.json().as_array().unwrap_or_else(|| panic!("no list: {self:?}")).clone()
    }

    pub fn header(&self, name: &str) -> Option<String> {
        let fields = self.head.lines().filter_map(|line| line.split_once(": "));
        let mut values = fields.filter(|(field, _)| field.eq_ignore_ascii_case(name));
        values.next().map(|(_, value)| value.trim().to_owned())
    }
}

impl Service {
    /// One on its Unix socket.
    pub fn start(arguments: &[&str]) -> Service {
        Service::start_in(Bed::new(), arguments)
    }

    /// The same in directories that are there.
    pub fn start_in(bed: Bed, arguments: &[&str]) -> Service {
        let (daemon, place) = spawn(&bed, arguments);
        assert!(place.starts_with("unix:"), "{place}");
        let socket = socket(&bed);
        let place = vec!["--unix-socket".to_owned(), socket.to_str().unwrap().to_owned()];
        Service { bed, daemon, place, url: "http://daemon".to_owned() }
    }

    /// One on a TCP port; `place` are curl's arguments for it.
    pub fn start_tcp(bed: Bed, arguments: &[&str], place: &[&str]) -> Service {
        let (daemon, url) = spawn(&bed, &[&["--listen", "127.0.0.1:0"], arguments].concat());
        let place = place.iter().map(|argument| (*argument).to_owned()).collect();
        Service { bed, daemon, place, url }
    }

    pub fn socket(&self) -> PathBuf {
        socket(&self.bed)
    }

    fn curl_command(&self, arguments: &[&str], path: &str) -> Command {
        let mut curl = Command::new("curl");
        // Nothing is to be taken out of a path.
        curl.args(["--silent", "--show-error", "--path-as-is", "--max-time", LIMIT])
            .args(&self.place)
            .args(arguments);
        curl.arg(format!("{}{path}", self.url)).stdin(Stdio::null());
        curl
    }

    /// What curl gets.
    pub fn curl(&self, arguments: &[&str], path: &str) -> Answer {
        let head = tempfile::NamedTempFile::new().unwrap();
        let dump = ["--dump-header", head.path().to_str().unwrap()];
        let output = self.curl_command(&[&dump[..], arguments].concat(), path).output().unwrap();
        let head = std::fs::read_to_string(head.path()).unwrap();
        // Behind a `100 Continue`.
        let head = head.trim_end().rsplit("\r\n\r\n").next().unwrap_or_default().to_owned();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| {
            panic!("{path} was not answered: {}", String::from_utf8_lossy(&output.stderr))
        });
        Answer { status, head, body: String::from_utf8_lossy(&output.stdout).into_owned() }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.curl(&[], path)
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.curl(&["-X", "POST", "--data", &body.to_string()], path)
    }

    pub fn delete(&self, id: &str) -> Answer {
        self.curl(&["-X", "DELETE"], &format!("/v1/sandboxes/{id}"))
    }

    /// A new sandbox of python-numpy, with what `wanted` adds.
    pub fn one(&self, wanted: &Value) -> String {
        let mut body = wanted.clone();
        body["snapshot_tag"] = json!("python-numpy");
        let answer = self.post("/v1/sandboxes", &body);
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()[0]["id"].as_str().unwrap().to_owned()
    }

    /// What a sandbox's worker makes of some code.
    pub fn eval(&self, id: &str, code: &str) -> Value {
        let answer = self.post(&format!("/v1/sandboxes/{id}/eval"), &json!({ "code": code }));
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["answer"].clone()
    }

    /// A sandbox as it is shown.
    pub fn show(&self, id: &str) -> Value {
        self.get(&format!("/v1/sandboxes/{id}")).json()
    }

    /// Server-sent events of a POST.
    pub fn events(&self, path: &str, body: &Value) -> Events {
        let arguments = ["--no-buffer", "-H", "accept: text/event-stream", "--data", &body.to_string()];
        let mut curl = self.curl_command(&arguments, path).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(curl.stdout.take().unwrap());
        Events { curl, lines }
    }

    /// A WebSocket, over the daemon's Unix socket.
    pub fn websocket(&self, path: &str) -> WebSocket<UnixStream> {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let request = format!("ws://daemon{path}").into_client_request().unwrap();
        tungstenite::client(request, stream).unwrap().0
    }

    /// Kills the daemon, and starts another in its place.
    pub fn kill_and_start(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
        self.daemon = spawn(&self.bed, &[]).0;
    }

    /// Ends the daemon by a signal, and leaves its directories.
    pub fn stop(mut self, signal: &str) -> Bed {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.daemon.id().to_string()]).status();
        assert!(sent.unwrap().success());
        let mut ended = || self.daemon.try_wait().unwrap().is_some();
        assert!(wait_until(Duration::from_secs(20), &mut ended), "the daemon does not end");
        std::mem::replace(&mut self.bed, Bed::with_own_snapshots())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Their zygotes end with their supervisors, and machines with their zygotes.
        let hub = Hub::at("http://127.0.0.1:9/".to_owned());
        let _ = self.bed.command(&hub).args(["kill", "--all"]).output();
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn socket(bed: &Bed) -> PathBuf {
    bed.path("run/forkd/daemon.sock")
}

/// The daemon, and where it says that it listens.
fn spawn(bed: &Bed, arguments: &[&str]) -> (Child, String) {
    let log = bed.path("daemon.log");
    let file = std::fs::File::options().create(true).append(true).open(&log).unwrap();
    let before = std::fs::metadata(&log).unwrap().len() as usize;
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let daemon =
        bed.command(&hub).arg("serve").args(arguments).stdout(Stdio::null()).stderr(file).spawn().unwrap();
    let mut place = None;
    let listens = || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let rest = text[before..].split_once("listening place=\"");
        place = rest.and_then(|(_, rest)| Some(rest.split_once('"')?.0.to_owned()));
        place.is_some()
    };
    let there = wait_until(Duration::from_secs(20), listens);
    assert!(there, "the daemon does not listen: {}", std::fs::read_to_string(&log).unwrap_or_default());
    (daemon, place.unwrap())
}

/// Events as they come: name and data.
pub struct Events {
    curl: Child,
    lines: BufReader<ChildStdout>,
}

impl Iterator for Events {
    type Item = (String, Value);

    fn next(&mut self) -> Option<(String, Value)> {
        let (mut name, mut data) = (None, None);
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            match line.trim_end().split_once(": ") {
                Some(("event", value)) => name = Some(value.to_owned()),
                Some(("data", value)) => data = Some(serde_json::from_str(value).unwrap()),
                _ => {}
            }
            if line == "\n"
                && let Some(event) = name.take().zip(data.take())
            {
                return Some(event);
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.curl.kill();
        let _ = self.curl.wait();
    }
}

/// What comes over a WebSocket: output, error output, and the last text.
pub fn read_all(socket: &mut WebSocket<UnixStream>) -> (Vec<u8>, Vec<u8>, Value) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match socket.read().unwrap() {
            Message::Binary(bytes) if bytes[0] == 1 => stdout.extend_from_slice(&bytes[1..]),
            Message::Binary(bytes) if bytes[0] == 2 => stderr.extend_from_slice(&bytes[1..]),
            Message::Text(text) => return (stdout, stderr, serde_json::from_str(&text).unwrap()),
            other => panic!("{other:?}"),
        }
    }
}

/// Reads output until a text was in it.
pub fn read_until(socket: &mut WebSocket<UnixStream>, wanted: &str) {
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(wanted) {
        match socket.read() {
            Ok(Message::Binary(bytes)) => seen.extend_from_slice(&bytes[1..]),
            other => panic!("{other:?} after {}", String::from_utf8_lossy(&seen)),
        }
    }
}
