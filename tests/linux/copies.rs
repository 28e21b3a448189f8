//! Copies of a snapshot that stay, and forkd as a user runs it on them. Uses [`super::harness`].
#![allow(dead_code, reason = "each test file uses its own part")]

use super::harness::{Bed, Hub, Said};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

/// A bed, the hub that is asked if any is, and copies that stay until this is dropped.
pub struct Copies {
    pub bed: Bed,
    pub hub: Hub,
    /// What the fork said.
    pub report: Value,
}

impl Copies {
    /// Copies of a machine; `arguments` are more for the fork.
    pub fn of(tag: &str, arguments: &[&str]) -> Copies {
        let (bed, (hub, machine)) = (Bed::new(), Hub::of_machine(tag, &|command| command));
        let machine: Vec<&str> = machine.iter().map(String::as_str).collect();
        let report = bed.json(&hub, &[&["fork", "--detach"], &machine[..], arguments].concat());
        Copies { bed, hub, report }
    }

    /// What a copy is called; they count from 0.
    pub fn id(&self, at: usize) -> &str {
        self.report["children"][at]["id"].as_str().unwrap()
    }

    /// Its process.
    pub fn pid(&self, at: usize) -> i64 {
        self.report["children"][at]["pid"].as_i64().unwrap()
    }

    /// forkd, run to its end.
    pub fn run(&self, arguments: &[&str]) -> Said {
        self.bed.run(&self.hub, arguments)
    }

    /// forkd, which must succeed, and the one document that it prints.
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.bed.json(&self.hub, arguments)
    }

    /// What a copy's worker answers.
    pub fn eval(&self, at: usize, code: &str) -> Value {
        self.json(&["eval", self.id(at), code])["answer"].clone()
    }

    /// What forkd says, which must fail.
    pub fn failure(&self, arguments: &[&str]) -> String {
        self.run(arguments).failure()
    }

    /// A child as `forkd ps` shows it; null when its fork is over.
    pub fn shown(&self, at: usize) -> Value {
        self.json(&["ps"]).pointer(&format!("/0/children/{at}")).cloned().unwrap_or_default()
    }

    /// `forkd forward` of an id and ports, and the ports on the host in the same order.
    pub fn forward(&self, arguments: &[&str]) -> (Child, Vec<u16>) {
        let mut forward = self.bed.command(&self.hub);
        let mut forward = forward.arg("forward").args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(forward.stdout.take().unwrap()).lines().take(arguments.len() - 1);
        let port = |line: String| {
            let (address, _) = line.split_once(" -> ").unwrap();
            address.strip_prefix("127.0.0.1:").unwrap().parse().unwrap()
        };
        let ports = lines.map(|line| port(line.unwrap())).collect();
        (forward, ports)
    }

    /// Ends all of them; the test fails when something is left.
    pub fn end(&self) {
        let count = self.report["children"].as_array().unwrap().len();
        self.run(&["kill", "--all"]).success();
        self.bed.assert_nothing_left((0..count).map(|at| self.pid(at)));
    }

    /// Ends those that are still there.
    pub fn kill(&self) {
        let _ = self.bed.command(&self.hub).args(["kill", "--all"]).output();
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.kill();
    }
}
