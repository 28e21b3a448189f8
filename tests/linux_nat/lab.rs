//! forkd in the small internet's `host`, and children of the machine `tools`, or of others, in it.
#![allow(dead_code, reason = "each test file uses its own part")]

use super::harness::{Bed, Hub, Said, processes_of, wait_until};
use super::internet::Internet;
use serde_json::Value;
use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::time::Duration;

/// What `attempts.py` defines in a child's warm worker.
const ATTEMPTS: &str = concat!(include_str!("attempts.py"), "\nNone\n");
/// How long what a fork had may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(10);

pub struct Lab {
    pub internet: Internet,
    pub bed: Bed,
    hub: Hub,
    /// Where children's memory still comes from.
    hubs: Mutex<Vec<Hub>>,
}

/// A child as its fork reports it.
pub struct Guest {
    pub id: String,
    pub address: String,
}

impl Lab {
    pub fn new() -> Lab {
        // By tag, no hub is asked.
        let hub = Hub::at("http://hub.test".to_owned());
        Lab { internet: Internet::start(), bed: Bed::new(), hub, hubs: Mutex::default() }
    }

    /// forkd as it is run in `host`.
    pub fn forkd(&self, arguments: &[&str]) -> Command {
        self.internet.command(self.bed.command(&self.hub).args(arguments))
    }

    /// Children of `tools` with `--net nat` that stay; what `forkd fork --json` said.
    pub fn fork(&self, count: usize, options: &[&str]) -> Vec<Guest> {
        self.fork_of("tools", count, options)
    }

    /// The same of another machine.
    pub fn fork_of(&self, tag: &str, count: usize, options: &[&str]) -> Vec<Guest> {
        let count = count.to_string();
        let (hub, machine) = Hub::of_machine(tag, &|command| self.internet.command(&command));
        let machine: Vec<&str> = machine.iter().map(String::as_str).collect();
        let fork =
            [&["--json", "fork", "-n", &count, "--detach", "--net", "nat"], &machine[..], options].concat();
        let report = document(&self.internet.command(self.bed.command(&hub).args(fork)).output().unwrap());
        self.hubs.lock().unwrap().push(hub);
        let guest = |child: &Value| Guest {
            id: child["id"].as_str().unwrap().to_owned(),
            address: child["network"]["address"].as_str().unwrap().to_owned(),
        };
        report["children"].as_array().unwrap().iter().map(guest).collect()
    }

    /// Makes a child's worker know what is in `attempts.py`.
    pub fn teach(&self, guest: &Guest) {
        self.eval(guest, ATTEMPTS);
    }

    /// The `repr` of what a child's worker makes of the code, or its error.
    pub fn eval(&self, guest: &Guest, code: &str) -> String {
        let output = self.bed.command(&self.hub).args(["--json", "eval", &guest.id, code]).output().unwrap();
        let text = || String::from_utf8_lossy(&[&*output.stdout, &*output.stderr].concat()).into_owned();
        let said: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        let answer = said.and_then(|said| said["answer"].as_str().map(str::to_owned));
        answer.unwrap_or_else(|| if output.status.success() { "None".to_owned() } else { text() })
    }

    /// A command in a child, which may take minutes.
    pub fn exec(&self, guest: &Guest, environment: &[String], script: &str) -> (Option<i32>, String) {
        let mut exec = self.bed.command(&self.hub);
        exec.args(["exec", &guest.id]);
        for variable in environment {
            exec.args(["--env", variable]);
        }
        let output = exec.args(["--", "sh", "-ec", script]).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    /// forkd about children, run to its end.
    pub fn run(&self, arguments: &[&str]) -> Said {
        self.bed.run(&self.hub, arguments)
    }

    /// The document of one command about children.
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.bed.json(&self.hub, arguments)
    }

    /// Ends all children of this bed.
    pub fn kill_all(&self) {
        self.run(&["kill", "--all"]).success();
    }

    /// Fails when a process, a directory, or anything of the network differs from what was `before`.
    pub fn assert_as_before(&self, before: &BTreeSet<String>, when: &str) {
        let run = self.bed.path("run");
        let gone =
            wait_until(GONE_WITHIN, || processes_of(&run).is_empty() && self.internet.state() == *before);
        let now = self.internet.state();
        let differs: Vec<_> = now.symmetric_difference(before).collect();
        assert!(gone, "{when}: processes {:?}, and in the network {differs:#?}", processes_of(&run));
        self.bed.run(&self.hub, &["cleanup"]).success();
        assert!(!self.bed.has_run_dirs(), "{when}: a run directory is left");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Children of a test that failed; one that did not has none.
        let _ = self.bed.command(&self.hub).args(["kill", "--all"]).output();
    }
}

/// The one document that forkd printed; the test fails when it failed.
pub fn document(output: &Output) -> Value {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "forkd failed: {stdout}{stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
}
