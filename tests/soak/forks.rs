//! The Linux guest forked again and again: every copy's answer, memory, timers and clock, and what its fork keeps of it when
//! it is gone. Needs what `tests/linux.rs` needs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::harness::{Bed, Hub, supervisor_of, wait_until};
use crate::scaled;
use crate::sums::{PAGES, Pages, wrong_pages};

/// What a child is asked: to sleep, to read files of its root disk, to compute, and for its time at last. {N} is its own.
const CODE: &str = r#"
import glob, hashlib, time
began = time.monotonic(); time.sleep(0.05); slept = time.monotonic() - began
files = sorted(glob.glob("/usr/lib/python3.11/json/*.py")) + ["/etc/passwd", "/opt/forkd/worker.py"]
content = b"".join(open(name, "rb").read() for name in files)
print(int(numpy.arange({N} + 1000).sum()), slept, len(content), hashlib.sha256(content).hexdigest(), time.time())
"#;
/// The most that a child's clock may be off.
const CLOCK: f64 = 1.0;

/// What a child said.
struct Said {
    sum: u64,
    slept: f64,
    time: f64,
    files: String,
    pages: Option<Pages>,
}

impl Said {
    fn parse(answer: &str) -> Said {
        let (pages, last) = answer
            .trim_end()
            .rsplit_once('\n')
            .map_or((None, answer.trim_end()), |(pages, last)| (Some(pages), last));
        let words: Vec<_> = last.split(' ').collect();
        let [sum, slept, length, digest, time] = words[..] else { panic!("{answer}") };
        Said {
            sum: sum.parse().unwrap(),
            slept: slept.parse().unwrap(),
            time: time.parse().unwrap(),
            files: format!("{length} bytes {digest}"),
            pages: pages.map(Pages::parse),
        }
    }

    /// `from` and `to`: when the child was asked and had answered, by the host's clock.
    fn check(&self, number: u64, from: f64, to: f64) {
        let numbers = number + 1000;
        assert_eq!(self.sum, numbers * (numbers - 1) / 2, "child {number} computes");
        assert!(self.slept >= 0.05, "child {number} slept {} s", self.slept);
        let off = (from - self.time).max(self.time - to);
        assert!(off <= CLOCK, "the clock of child {number} is {off} s off");
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn code(number: u64, pages: bool) -> String {
    let code = CODE.replace("{N}", &number.to_string());
    if pages { format!("{PAGES}\n{code}") } else { code }
}

#[test]
fn forks_one_after_the_other_are_right() {
    let count = scaled(3, 1000);
    let bed = Bed::new();
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let (mut files, mut first, mut slowest) = (BTreeSet::new(), None::<Pages>, Duration::ZERO);
    let began = Instant::now();
    for number in 0..count {
        // Some also sum up their pages, which takes ten times as long as all the rest.
        let pages = number < 2 || number % 50 == 0;
        let (from, start) = (now(), Instant::now());
        let report = bed.json(&hub, &["fork", "--tag", "python-numpy", "--eval", &code(number, pages)]);
        slowest = slowest.max(start.elapsed());
        let said = Said::parse(report["children"][0]["answer"].as_str().unwrap());
        said.check(number, from, now());
        files.insert(said.files);
        match (&first, said.pages) {
            (Some(first), Some(pages)) => drop(pages.assert_sibling_of(first)),
            (None, pages) => first = pages,
            _ => {}
        }
    }
    assert_eq!(files.len(), 1, "siblings read different files: {files:?}");
    println!("{count} forks in {:?}, the slowest {slowest:?}", began.elapsed());
    assert!(!bed.has_run_dirs(), "a run directory is left");
}

/// What a fork holds. Connections to the hub and the threads of the runtime come and go by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    /// userfaultfds, pidfds and local sockets: what children cost.
    descriptors: usize,
    all_descriptors: usize,
    threads: u64,
    /// Memory of its own, without the images.
    own_kib: u64,
}

impl Held {
    fn by(process: i64) -> Held {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let entries = fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
        let links: Vec<_> = entries.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
        let local = fs::read_to_string("/proc/net/unix").unwrap();
        let local: BTreeSet<_> = local.lines().filter_map(|line| line.split_whitespace().nth(6)).collect();
        let is_of_a_child = |link: &str| {
            let inode = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
            link.contains("userfaultfd")
                || link.contains("pidfd")
                || inode.is_some_and(|inode| local.contains(inode))
        };
        let of_children = links.iter().filter(|link| is_of_a_child(&link.to_string_lossy())).count();
        Held {
            descriptors: of_children,
            all_descriptors: links.len(),
            threads: number("Threads:"),
            own_kib: number("RssAnon:"),
        }
    }

    /// The same, once it does not change any more.
    fn settled(process: i64) -> Held {
        let mut held = Held::by(process);
        wait_until(Duration::from_secs(10), || {
            std::thread::sleep(Duration::from_millis(300));
            let before = std::mem::replace(&mut held, Held::by(process));
            before.descriptors == held.descriptors
        });
        held
    }
}

/// Forks `count` children that stay, waits until the whole pack is there, and returns what they are and what their fork holds.
fn fork_and_stay(bed: &Bed, hub: &Hub, count: u64) -> (Vec<Value>, i64, Held) {
    let (from, number) = (now(), count.to_string());
    let asked = code(7, false);
    let report =
        bed.json(hub, &["fork", "deeplethe/python-numpy", "-n", &number, "--detach", "--eval", &asked]);
    let to = now();
    let children = report["children"].as_array().unwrap().clone();
    let mut files = BTreeSet::new();
    for child in &children {
        let said = Said::parse(child["answer"].as_str().unwrap_or_else(|| panic!("{child}")));
        said.check(7, from, to);
        files.insert(said.files);
    }
    assert_eq!((children.len() as u64, files.len()), (count, 1), "{files:?}");
    let supervisor = supervisor_of(children[0]["pid"].as_i64().unwrap());
    let snapshot = bed.snapshot();
    let whole = || wrong_pages(supervisor, &snapshot, true).is_empty();
    assert!(wait_until(Duration::from_secs(60), whole), "the images are not what the snapshot has");
    (children, supervisor, Held::settled(supervisor))
}

#[test]
fn children_that_come_and_go_leave_nothing_with_their_fork() {
    let count = scaled(4, 100);
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let kill = |child: &Value| bed.run(&hub, &["kill", child["id"].as_str().unwrap()]).success();
    let (alone, supervisor, with_one) = fork_and_stay(&bed, &hub, 1);
    kill(&alone[0]);
    assert!(wait_until(Duration::from_secs(10), || !Path::new(&format!("/proc/{supervisor}")).exists()));

    let (children, supervisor, with_all) = fork_and_stay(&bed, &hub, count);
    for child in &children[1..] {
        kill(child);
    }
    let down = || Held::by(supervisor).descriptors <= with_one.descriptors;
    wait_until(Duration::from_secs(20), down);
    let left = Held::settled(supervisor);
    println!("a fork of one holds {with_one:?}; of {count} {with_all:?}, of which one lives on {left:?}");
    assert!(with_all.descriptors > with_one.descriptors, "what is counted is not what children cost");
    assert_eq!(left.descriptors, with_one.descriptors, "something is left");
    // A thread asks each child, and the runtime has some for blocking work that come and go.
    assert!(left.threads < with_one.threads + 20, "threads are left");
    // The allocator keeps what it once had for `count` answers at a time.
    assert!(left.own_kib < with_one.own_kib + 16 * 1024 + 100 * count, "{left:?} after {with_one:?}");
    assert!(wrong_pages(supervisor, &bed.snapshot(), true).is_empty(), "a child has changed the images");
    kill(&children[0]);
    let pids = children.iter().map(|child| child["pid"].as_i64().unwrap());
    assert!(wait_until(Duration::from_secs(10), || !bed.has_run_dirs()), "a run directory is left");
    bed.assert_nothing_left(pids);
}
