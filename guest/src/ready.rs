//! `forkd-agent --ready ORDER`: waits until a service is ready, and says so on standard output with the line `ready`, or
//! why it is not.
//!
//! A process of its own, so it may block and sleep, which the agent does not. It runs as the service's user.

use std::ffi::OsString;
use std::io::{self, BufRead, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use forkd_abi::protocol::Ready;

use crate::agent::program::{READY, READY_LINE, ReadyOrder};
use crate::http;

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(250);
/// Longest line that is looked at, in bytes; the rest of a longer one counts as a line of its own.
const LINE_MAX: u64 = 64 << 10;

/// Whether `mode` is this.
pub fn serves(mode: &OsString) -> bool {
    mode == READY
}

/// Waits. For a line it stays afterwards, and hands the service's output on to the console.
pub fn run(order: Option<OsString>) -> ExitCode {
    let order = order.unwrap_or_default();
    let order: ReadyOrder = match serde_json::from_slice(order.as_encoded_bytes()) {
        Ok(order) => order,
        Err(error) => return say(&format!("the order to wait for a service: {error}")),
    };
    let timeout = Duration::from_secs(order.timeout_s.into());
    match &order.ready {
        Ready::Line(wanted) => wait_for_line(wanted, timeout),
        ready => match wait(timeout, || attempt(ready)) {
            Ok(()) => say(READY_LINE),
            Err(last) => say(&late(timeout, &last)),
        },
    }
}

fn late(timeout: Duration, last: &str) -> String {
    let last = if last.is_empty() { String::new() } else { format!(": {last}") };
    format!("was not ready within {} s{last}", timeout.as_secs())
}

/// The agent may be gone, and then so is the machine.
fn say(line: &str) -> ExitCode {
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    if line == READY_LINE { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Tries until it works; else why the last attempt did not.
fn wait(timeout: Duration, mut attempt: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    let started = Instant::now();
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(why) if started.elapsed() >= timeout => return Err(why),
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

fn attempt(ready: &Ready) -> Result<(), String> {
    match ready {
        Ready::Tcp(port) => connect(*port).map_err(|error| format!("port {port}: {error}")),
        Ready::Http(url) => match http::get(url) {
            Ok((status, _)) if status < 400 => Ok(()),
            Ok((status, _)) => Err(format!("{url}: status {status}")),
            Err(error) => Err(format!("{url}: {error}")),
        },
        Ready::Exec(argv) => run_check(argv),
        Ready::Line(_) => Err("a line is not asked for".to_owned()),
    }
}

fn connect(port: u16) -> io::Result<()> {
    let timeout = Duration::from_secs(10);
    let at = |address| TcpStream::connect_timeout(&address, timeout).map(drop);
    at(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).or_else(|error| {
        // What is said is about the address that everybody means.
        at(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).map_err(|_| error)
    })
}

fn run_check(argv: &[String]) -> Result<(), String> {
    let program = argv.first().map_or("", String::as_str);
    let output = Command::new(program)
        .args(argv.get(1..).unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(format!("{program}: {}{}{last}", output.status, if last.is_empty() { "" } else { "; " }))
}

/// Standard input is what the service writes; all of it goes to the console, standard error.
fn wait_for_line(wanted: &str, timeout: Duration) -> ExitCode {
    let (found, heard) = mpsc::channel();
    let reported = thread::spawn(move || match heard.recv_timeout(timeout) {
        Ok(()) => say(READY_LINE),
        Err(mpsc::RecvTimeoutError::Timeout) => say(&late(timeout, "no such line")),
        Err(mpsc::RecvTimeoutError::Disconnected) => say("closed its output without such a line"),
    });
    let mut input = io::stdin().lock();
    let mut line = Vec::new();
    let mut found = Some(found);
    while input.by_ref().take(LINE_MAX).read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let _ = io::stderr().write_all(&line);
        if String::from_utf8_lossy(&line).contains(wanted)
            && let Some(found) = found.take()
        {
            let _ = found.send(());
        }
        line.clear();
    }
    drop(found);
    reported.join().unwrap_or(ExitCode::FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_port_is_ready_when_somebody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ready = Ready::Tcp(listener.local_addr().unwrap().port());
        assert_eq!(attempt(&ready), Ok(()));
        drop(listener);
        assert!(attempt(&ready).unwrap_err().contains("refused"));
    }

    #[test]
    fn a_check_that_fails_is_quoted() {
        assert_eq!(run_check(&["/bin/true".to_owned()]), Ok(()));
        let argv = ["/bin/sh", "-c", "echo not yet >&2; exit 2"].map(str::to_owned);
        let why = run_check(&argv).unwrap_err();
        assert!(why.contains("exit status: 2") && why.ends_with("not yet"), "{why}");
        assert!(run_check(&["/no/such/program".to_owned()]).unwrap_err().contains("/no/such/program"));
    }

    #[test]
    fn attempts_end_with_the_last_one_s_reason() {
        let mut left = 2;
        let attempt = || {
            left -= 1;
            if left == 0 { Ok(()) } else { Err("early".to_owned()) }
        };
        assert_eq!(wait(Duration::from_secs(60), attempt), Ok(()));
        assert_eq!(wait(Duration::ZERO, || Err("never".to_owned())), Err("never".to_owned()));
        assert_eq!(late(Duration::from_secs(3), "never"), "was not ready within 3 s: never");
    }
}
