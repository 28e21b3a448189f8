//! The JSON documents of commands that need a guest, as golden files (`tests/golden/guest`).

use super::golden::{Golden, Names, with_placeholders};
use super::harness::{Bed, Hub};
use serde_json::Value;

/// Values that differ from run to run or from host to host.
#[rustfmt::skip]
const VOLATILE: &[&str] = &[
    // Processes, times and places.
    "pid", "since_unix", "registry_ms", "index_ms", "vmstate_ms", "first_instruction_ms", "ready_ms", "answered_ms",
    "path", "namespace", "mac", "address", "host_address",
    // What was fetched, faulted in and mapped.
    "requests", "bytes_total", "bytes_fetched", "at_first_instruction", "at_ready", "at_answered", "demand",
    "demand_chunks", "on_traced_pages", "in_traced_chunks", "pages", "bytes", "touched_pages", "touched_bytes",
    // Memory.
    "pss_kib_per_child", "private_kib_per_child", "image_kib", "resident_bytes", "private_pages", "mapped_pages",
    // What the kernel and its build say.
    "console", "source", "compiler",
];

/// Documents of one bed.
struct Documents<'a> {
    bed: &'a Bed,
    hub: &'a Hub,
    names: Names,
    golden: Golden,
}

impl Documents<'_> {
    /// Runs a command and compares its document. What it calls a fork is called `<fork>` from then on.
    fn compare(&mut self, name: &str, arguments: &[&str]) -> Value {
        let output = self.bed.command(self.hub).arg("--json").args(arguments).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        let document: Value = serde_json::from_str(&printed)
            .unwrap_or_else(|error| panic!("{error}: {printed}{}", String::from_utf8_lossy(&output.stderr)));
        if let Some((fork, _)) = document["children"][0]["id"].as_str().and_then(|id| id.rsplit_once('-')) {
            self.names.name(fork, "fork");
        }
        let code = output.status.code().unwrap();
        let shown = self.names.apply(&with_placeholders(&printed, VOLATILE));
        self.golden.check(&format!("{name}.json"), &format!("exit code {code}\n{shown}"));
        document
    }
}

#[test]
fn documents_of_forks_are_what_they_were() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let golden = Golden::open("guest");
    let mut documents = Documents { bed: &bed, hub: &hub, names: Names::default(), golden };
    let from_hub =
        ["fork", "deeplethe/python-numpy", "-n", "2", "--detach", "--eval", "numpy.zeros(5).tolist()"];
    let report = documents.compare("fork-eval", &from_hub);
    let id = |at: usize| report["children"][at]["id"].as_str().unwrap();
    documents.compare("ps", &["ps"]);
    documents.compare("exec", &["exec", id(0), "--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
    documents.compare("exec-signal", &["exec", id(0), "--", "sh", "-c", "kill -9 $$"]);
    documents.compare("exec-missing", &["exec", id(0), "--", "/no/such/program"]);
    documents.compare("eval", &["eval", id(0), "6 * 7"]);
    documents.compare("eval-output", &["eval", id(0), "print('said')"]);
    documents.compare("eval-failed", &["eval", id(0), "1 / 0"]);
    documents.compare("logs", &["logs", id(0)]);
    documents.compare("inspect-child", &["inspect", "--child", id(1)]);
    documents.compare("kill", &["kill", id(0)]);
    documents.compare("kill-all", &["kill", "--all"]);
    bed.assert_nothing_left(
        report["children"].as_array().unwrap().iter().map(|child| child["pid"].as_i64().unwrap()),
    );

    documents.compare("warm", &["warm", "--tag", "python-numpy"]);
    let exec = [
        "fork",
        "--tag",
        "python-numpy",
        "--net",
        "isolated",
        "--exec",
        "--",
        "sh",
        "-c",
        "echo out; exit 3",
    ];
    documents.compare("fork-warm-exec", &exec);
    documents.compare("warm-list", &["warm", "--list"]);
    documents.compare("warm-stop", &["warm", "--stop", "--tag", "python-numpy"]);
    documents.compare("kernel-path", &["kernel", "path"]);
    documents.golden.finish();
}
