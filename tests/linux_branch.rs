//! Branches of a running Linux guest. Needs what `linux.rs` needs, and root. `FORKD_SOAK=full` looks for torn pages in 500
//! branches of 128 MiB, which takes hours where KVM emulates the guest's kernel.

#[path = "linux/copies.rs"]
mod copies;
#[path = "linux/harness.rs"]
mod harness;

use copies::Copies;
use harness::{Bed, Hub, distinct, soak};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

/// What a copy is, as one tuple.
const WHO: &str = "(os.urandom(16).hex(), open('/etc/machine-id').read().strip(), __import__('socket').gethostname(), \
    float(numpy.random.random()))";

fn children(report: &Value) -> &Vec<Value> {
    report["children"].as_array().unwrap()
}

fn id(child: &Value) -> &str {
    child["id"].as_str().unwrap()
}

/// A child with `os` and a list `seen` in its worker.
fn parent() -> Copies {
    let copies = Copies::of("python-numpy", &[]);
    copies.eval(0, "import os\nseen = ['before']");
    copies
}

fn answer(copies: &Copies, id: &str, code: &str) -> Value {
    copies.json(&["eval", id, code])["answer"].clone()
}

#[test]
fn branches_go_on_from_where_the_child_is_and_so_does_it() {
    let copies = parent();
    let (parent, code) = (copies.id(0), "seen.append(os.environ['PICK']) or seen");
    let report = copies.json(&["branch", parent, "-n", "3", "--vary", "PICK=a,b,c", "--eval", code]);
    let answers: Vec<_> = children(&report).iter().map(|child| child["answer"].as_str().unwrap()).collect();
    assert_eq!(answers, ["['before', 'a']", "['before', 'b']", "['before', 'c']"]);
    assert_eq!(copies.eval(0, "seen"), "['before']", "a branch has written into its parent");
    for child in children(&report) {
        let at = |what: &str| child[what].as_f64().unwrap();
        assert!(0.0 < at("first_instruction_ms") && at("first_instruction_ms") <= at("ready_ms"), "{child}");
        assert!(at("ready_ms") <= at("answered_ms"), "{child}");
    }
    println!(
        "stood still for {} ms, {} bytes in {} ranges copied; {}",
        report["pause_ms"], report["copied_bytes"], report["ranges"], report["children"][0]
    );
    // Nobody wanted them to stay.
    let living = copies.json(&["ps"])[0]["children"].as_array().unwrap().clone();
    let living: Vec<_> = living.iter().filter(|child| child["state"] == "ready").map(id).collect();
    assert_eq!(living, [parent]);
    copies.end();
}

#[test]
fn branches_are_machines_of_their_own_and_outlive_their_parent() {
    let copies = parent();
    let report = copies.json(&["branch", copies.id(0), "-n", "2", "--detach", "--eval", WHO]);
    let second = id(&report["children"][1]).to_owned();
    // A branch of a branch has what both had.
    answer(&copies, &second, "seen.append('second')");
    let deeper = copies.json(&["branch", &second, "--detach", "--eval", WHO]);
    let third = id(&deeper["children"][0]).to_owned();
    answer(&copies, &third, "seen.append('third')");
    let deepest = copies.json(&["branch", &third, "--detach", "--eval", WHO]);
    let fourth = id(&deepest["children"][0]).to_owned();
    assert_eq!(answer(&copies, &fourth, "seen"), "['before', 'second', 'third']");
    assert_eq!(answer(&copies, &second, "seen"), "['before', 'second']");

    let own = copies.eval(0, WHO);
    let branches = [&report, &deeper, &deepest].map(children).into_iter().flatten();
    let who: Vec<Value> = branches.map(|child| child["answer"].clone()).chain([own]).collect();
    for part in 0..4 {
        let of = |who: &Value| Value::from(who.as_str().unwrap().split(", ").nth(part).unwrap());
        let parts: Vec<Value> = who.iter().map(of).collect();
        assert!(distinct(parts.iter()), "{who:?}");
    }
    let shown = copies.json(&["ps"]);
    let parent_of = |name: &str| {
        let all = shown[0]["children"].as_array().unwrap();
        all.iter().find(|child| child["id"] == name).unwrap()["parent"].clone()
    };
    assert_eq!((parent_of(&fourth), parent_of(&second)), (third.as_str().into(), copies.id(0).into()));
    assert!(parent_of(copies.id(0)).is_null());

    copies.run(&["kill", copies.id(0), &second, &third]).success();
    assert_eq!(answer(&copies, &fourth, "seen"), "['before', 'second', 'third']");
    copies.run(&["kill", "--all"]).success();
    copies.bed.assert_nothing_left([copies.pid(0)].into_iter());
}

#[test]
fn a_branch_of_a_pack_that_is_not_here_yet_gets_its_pages_too() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &["--rtt", "20ms", "--bandwidth", "20MB/s"]);
    let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "--detach", "--eval", "1"]);
    let parent = id(&report["children"][0]);
    let code =
        "sum(map(len, map(repr, vars(numpy).items()))) > 1000 and numpy.linalg.inv(numpy.eye(50)).sum()";
    let branched = bed.json(&hub, &["branch", parent, "-n", "2", "--eval", code]);
    for child in children(&branched) {
        assert!(child["answer"].as_str().unwrap().contains("50.0"), "{child}");
    }
    bed.run(&hub, &["kill", "--all"]).success();
}

/// Writes the round's number into every page of a file in memory, in order, for ever.
const WRITER: &str = "
import mmap, os
pages = memoryview(mmap.mmap(os.open('/run/pages', os.O_RDWR), 0)).cast('Q')[::512]
number = 1
while True:
    pages[:] = memoryview(number.to_bytes(8, 'little') * len(pages)).cast('Q')
    number += 1
";

/// Stops the writer, and shows the first and the last page's number, and whether all between are as they must be.
const LOOK: &str = "
import mmap, os, signal
for name in filter(str.isdigit, os.listdir('/proc')):
    try:
        if b'run/pages' in open(f'/proc/{name}/cmdline', 'rb').read():
            os.kill(int(name), signal.SIGSTOP)
    except OSError:
        pass
pages = memoryview(mmap.mmap(os.open('/run/pages', os.O_RDWR), 0)).cast('Q')[::512].tolist()
(pages[0], pages[-1], pages == sorted(pages, reverse=True))
";

#[test]
fn no_page_of_a_branch_is_older_or_newer_than_its_moment() {
    let full = soak();
    let (mib, branches) = if full { (128, 500) } else { (8, 5) };
    let copies = parent();
    copies.eval(0, &format!("os.truncate(os.open('/run/pages', os.O_RDWR | os.O_CREAT), {mib} << 20)"));
    copies.json(&["exec", "--detach", copies.id(0), "--", "python3", "-c", WRITER]);
    let mut last = 0;
    for _ in 0..branches {
        let report = copies.json(&["branch", copies.id(0), "--eval", LOOK]);
        let answer = report["children"][0]["answer"].as_str().unwrap_or_else(|| panic!("{report}"));
        let parts: Vec<_> = answer.trim_matches(['(', ')']).split(", ").collect();
        let [first, end] = [0, 1].map(|at| parts[at].parse::<u64>().unwrap());
        assert!(parts[2] == "True" && first - end <= 1, "{answer}");
        assert!(end >= last, "a branch is older than the one before: {answer} after {last}");
        last = first;
        println!(
            "{answer}: stood still for {} ms, {} bytes copied",
            report["pause_ms"], report["copied_bytes"]
        );
    }
    assert!(last > 1, "the writer does not write");
    copies.end();
}

/// How many programs wait for a line. A process may end while it is looked at.
const READERS: &str = "
def command(name):
    try:
        return open(f'/proc/{name}/cmdline', 'rb').read()
    except OSError:
        return b''
sum(b'read line' in command(name) for name in os.listdir('/proc') if name.isdigit())
";

#[test]
fn streams_of_the_child_live_on_and_end_in_its_branches() {
    let copies = parent();
    let mut exec = copies.bed.command(&copies.hub);
    exec.args(["exec", "-i", copies.id(0), "--", "sh", "-c", "echo first; read line; echo $line"]);
    let mut exec = exec.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(exec.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "first");
    assert_eq!(copies.eval(0, READERS), "1");
    let report = copies.json(&["branch", copies.id(0), "--eval", READERS]);
    assert_eq!(report["children"][0]["answer"], "0", "a program without anybody who waits for it goes on");
    std::io::Write::write_all(&mut exec.stdin.take().unwrap(), b"second\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "second");
    assert!(exec.wait().unwrap().success());
    copies.end();
}

#[test]
fn what_cannot_be_branched_is_named_and_unharmed() {
    let copies = parent();
    let refused = copies.failure(&["branch", "abcdef-1"]);
    assert!(refused.contains("there is no running child `abcdef-1`"), "{refused}");
    copies.run(&["pause", copies.id(0)]).success();
    let refused = copies.failure(&["branch", copies.id(0), "--eval", "1"]);
    assert!(refused.contains("is paused"), "{refused}");
    copies.run(&["resume", copies.id(0)]).success();
    for count in ["0", "1001"] {
        assert_eq!(copies.run(&["branch", copies.id(0), "-n", count]).both().0, Some(2));
    }
    assert_eq!(copies.eval(0, "seen"), "['before']");
    // Two at once: one after the other.
    let both: Vec<_> = std::thread::scope(|scope| {
        let branch = || copies.run(&["branch", copies.id(0), "--eval", "seen"]).both();
        let threads = [scope.spawn(branch), scope.spawn(branch)];
        threads.map(|thread| thread.join().unwrap()).into()
    });
    for (code, said) in &both {
        assert_eq!(*code, Some(0), "{said}");
    }
    assert_eq!(copies.eval(0, "seen"), "['before']");
    copies.end();
}
