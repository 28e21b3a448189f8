//! A network namespace without a name: it lives as long as the process that holds it, and that ends with the test.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What happens on an address of this machine that no other test sees.
pub struct Namespace {
    /// `cat` in the namespace: it ends when its standard input does, which the kernel sees to also when a test is killed.
    holder: Child,
    file: File,
}

impl Namespace {
    /// A new one, with its loopback up.
    pub fn new() -> Namespace {
        let mut holder = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare is there");
        // It answers from the namespace, so that it has left ours by then.
        holder.stdin.as_mut().unwrap().write_all(b"there\n").unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "there\n", "a network namespace needs root");
        let file = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
        let namespace = Namespace { holder, file };
        namespace.ip("link set lo up");
        namespace
    }

    /// What `nsenter --net=` and `ip ... netns` take: a path, and a process in it.
    pub fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.pid())
    }

    /// The process that holds it.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// Runs a program in it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg("--").arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a server in it, which the kernel ends with the thread that started it.
    pub fn server(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.command("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        command
    }

    /// One command of `ip`; what it printed.
    pub fn ip(&self, arguments: &str) -> String {
        let output = self.command("ip").args(arguments.split(' ')).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {arguments}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Does something in it: on a thread, as only that is moved.
    pub fn inside<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work()
            });
            there.join().unwrap()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
