//! A real Linux guest whose memory comes from a hub that fails all the time: what it reads, inside and in the images that its
//! siblings share, is what the snapshot has. Needs what `tests/linux.rs` needs.

#[path = "soak/faulty.rs"]
#[allow(dead_code, reason = "the soaks use the rest")]
mod faulty;
#[path = "linux/harness.rs"]
mod harness;
#[path = "linux/sums.rs"]
mod sums;

use faulty::{Fault, Faulty};
use harness::{Bed, Hub, supervisor_of, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::process::Stdio;
use std::time::Duration;
use sums::{PAGES, Pages, wrong_pages};

/// How a hub is away. Silence is left out: it costs a request's whole patience each time.
const AWAY: [Fault; 3] = [Fault::Reset, Fault::ServerError, Fault::ShortBody];
/// How it is bad. Bytes that are flipped in every answer would be damage, and end the fork by name.
const BAD: [Fault; 4] = [Fault::Reset, Fault::ServerError, Fault::ShortBody, Fault::FlippedByte];

#[test]
fn memory_from_a_failing_hub_through_a_stopped_fork_is_the_snapshots() {
    let bed = Bed::new();
    // The registry, the index and what is fetched with it come; from then on nothing does.
    let faulty = Faulty::start_with(Hub::publish(&bed), 100, &AWAY, 4);
    let hub = Hub::at(faulty.url());
    let local = bed.json(&hub, &["fork", "--tag", "python-numpy", "--eval", PAGES]);
    let local = Pages::parse(local["children"][0]["answer"].as_str().unwrap());

    let fork = bed
        .command(&hub)
        .args(["--json", "fork", "deeplethe/python-numpy", "-n", "2", "--detach", "--eval", PAGES])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let children = || bed.json(&hub, &["ps"])[0]["children"].as_array().cloned().unwrap_or_default();
    let stalled = || children().iter().any(|child| child["state"] == "stalled");
    assert!(wait_until(Duration::from_secs(30), stalled), "no child stalls: {:?}", children());
    let supervisor = supervisor_of(children()[0]["pid"].as_i64().unwrap());
    let process = Pid::from_raw(supervisor as i32).unwrap();
    // The pager is stopped while the hub gets better: the children must wait, not go on with something else.
    kill_process(process, Signal::STOP).unwrap();
    faulty.fail(20, &BAD);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(wrong_pages(supervisor, &bed.snapshot(), false), [], "in the images of a stopped fork");
    kill_process(process, Signal::CONT).unwrap();
    let output = fork.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for child in report["children"].as_array().unwrap() {
        let pages = Pages::parse(child["answer"].as_str().unwrap());
        println!("{}", pages.assert_sibling_of(&local));
    }
    println!("failed up to the answers: {:?}", faulty.counts());
    let whole = || wrong_pages(supervisor, &bed.snapshot(), true).is_empty();
    assert!(wait_until(Duration::from_secs(60), whole), "the images are not filled");
    let (requests, faults) = faulty.counts();
    println!("{requests} requests, of which failed {faults:?}");
    assert!(faults.len() > 2 && faults.values().sum::<u64>() > 10, "{faults:?} in {requests} requests");
    bed.run(&hub, &["kill", "--all"]).success();
    let pids = report["children"].as_array().unwrap().iter().map(|child| child["pid"].as_i64().unwrap());
    assert!(wait_until(Duration::from_secs(10), || !bed.has_run_dirs()), "a run directory is left");
    bed.assert_nothing_left(pids);
}
