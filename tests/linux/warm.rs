//! `forkd warm`: forks from an image that a daemon holds in memory, and what happens when the daemon is not there any more.

use super::harness::{Bed, Hub, alive, wait_until};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use serde_json::Value;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

const PACK: &str = "deeplethe/python-numpy";
const SOON: Duration = Duration::from_secs(10);

fn sockets(bed: &Bed) -> Vec<PathBuf> {
    let entries = fs::read_dir(bed.path("run/forkd/warm")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn warm(bed: &Bed, hub: &Hub, what: &[&str]) -> Value {
    bed.json(hub, &[&["warm"], what].concat())
}

fn kill(pid: &Value, signal: Signal) {
    let pid = pid.as_i64().unwrap();
    rustix::process::kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    assert!(wait_until(SOON, || !alive(pid)));
}

#[test]
fn forks_of_a_warm_pack_need_no_hub_and_share_nothing_they_write() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let held = warm(&bed, &hub, &[PACK]);
    assert!(held["resident_bytes"].as_u64().unwrap() > 10 << 20, "{held}");
    let hub = hub.stop();
    let write = "globals().update(mark=globals().get('mark', 0) + 1, big=numpy.ones(1 << 20)) or mark";
    for _ in 0..2 {
        let report = bed.json(&hub, &["fork", PACK, "-n", "3", "--eval", write]);
        for child in report["children"].as_array().unwrap() {
            assert_eq!(child["answer"], "1", "what another child wrote is seen: {child}");
        }
        assert_eq!(report["pack"]["bytes_fetched"], 0, "{report}");
        assert!(report["timeline"]["registry_ms"].is_null(), "{report}");
        assert_eq!(report["pack"]["warm"]["resolved"], format!("{PACK}@v1"), "{report}");
        assert_eq!(report["pack"]["warm"]["since_unix"], held["since_unix"], "{report}");
    }
    let listed = &bed.json(&hub, &["warm", "--list"])[0];
    assert_eq!((&listed["forks"], &listed["resolved"]), (&2.into(), &format!("{PACK}@v1").into()));
    let noted = bed.run(&hub, &["fork", PACK, "--eval", "6 * 7"]).both().1;
    assert!(noted.contains(&format!("from the warm image of {PACK}@v1, loaded ")), "{noted}");

    kill(&held["pid"], Signal::KILL);
    assert_eq!(bed.json(&hub, &["warm", "--list"]), serde_json::json!([]));
    let hub = hub.start_again();
    let report = bed.json(&hub, &["fork", PACK, "--eval", "6 * 7"]);
    assert!(report["pack"].get("warm").is_none(), "{report}");
    assert_eq!(report["children"][0]["answer"], "42", "a dead daemon is in nobody's way");
    assert_eq!(bed.json(&hub, &["cleanup"])["warm"], 1);
    assert!(sockets(&bed).is_empty());
}

#[test]
fn daemons_follow_each_other_and_leave_nothing() {
    let bed = Bed::new();
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let first = warm(&bed, &hub, &["--tag", "python-numpy"]);
    let second = warm(&bed, &hub, &["--tag", "python-numpy"]);
    assert!(wait_until(SOON, || !alive(first["pid"].as_i64().unwrap())), "the first holds its image on");
    assert_eq!(sockets(&bed).len(), 1);
    let listed = bed.json(&hub, &["warm", "--list"]);
    assert_eq!((listed.as_array().unwrap().len(), &listed[0]["pid"]), (1, &second["pid"]));
    let fork =
        bed.json(&hub, &["fork", "--tag", "python-numpy", "--detach", "--eval", "numpy.zeros(2).tolist()"]);
    assert_eq!(fork["children"][0]["answer"], "[0.0, 0.0]");
    let child = fork["children"][0]["id"].as_str().unwrap();
    let seen = bed.json(&hub, &["inspect", "--child", child]);
    let mapped =
        |image: &Value| image["pages"].as_u64() > Some(1000) && image["mapped_pages"].as_u64() > Some(0);
    let images = seen["images"].as_array().unwrap();
    assert!(images.len() == 2 && images.iter().all(mapped), "{seen}");

    bed.run(&hub, &["warm", "--stop", "--tag", "python-numpy"]).success();
    assert!(wait_until(SOON, || !alive(second["pid"].as_i64().unwrap())));
    assert!(sockets(&bed).is_empty());
    assert_eq!(
        bed.json(&hub, &["eval", child, "numpy.ones(2).tolist()"])["answer"],
        "[1.0, 1.0]",
        "its forks go on"
    );
    bed.run(&hub, &["kill", child]).success();
    let again = bed.run(&hub, &["warm", "--stop", "--tag", "python-numpy"]).failure();
    assert!(again.contains("is not warm"), "{again}");

    let third = warm(&bed, &hub, &["--tag", "python-numpy"]);
    kill(&third["pid"], Signal::TERM);
    assert!(sockets(&bed).is_empty(), "SIGTERM leaves the socket");
    bed.assert_nothing_left(
        fork["children"].as_array().unwrap().iter().map(|child| child["pid"].as_i64().unwrap()),
    );
}

#[test]
fn what_cannot_be_kept_is_said() {
    let bed = Bed::new();
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    for (arguments, says) in [
        (&["warm", "--tag", "nothing"][..], "nothing"),
        (&["warm", "/nowhere"], "keep the image in memory: there is no pack or snapshot at /nowhere"),
        (&["warm", "nothing"], "`nothing` is not a package name"),
        (&["warm", "/tmp"], "cannot be kept in memory"),
        (&["warm", "deeplethe/python-numpy"], "cannot reach http://127.0.0.1:9/registry.json"),
    ] {
        let said = bed.run(&hub, arguments).failure();
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    assert!(sockets(&bed).is_empty());
}

#[test]
fn a_daemon_is_reached_by_the_name_of_a_file_that_is_another_or_gone() {
    let bed = Bed::new();
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let published = fs::read_dir(Hub::publish(&bed)).unwrap().flatten();
    let pack = published.map(|entry| entry.path()).find(|path| path.extension() == Some("zst".as_ref()));
    let (pack, file) = (pack.unwrap(), bed.path("file.zst"));
    let name = file.to_str().unwrap();
    fs::copy(&pack, &file).unwrap();
    let first = warm(&bed, &hub, &[name]);
    fs::remove_file(&file).unwrap();
    fs::copy(&pack, &file).unwrap();
    let second = warm(&bed, &hub, &[name]);
    let ended = |held: &Value| wait_until(SOON, || !alive(held["pid"].as_i64().unwrap()));
    assert!(ended(&first), "the daemon of the file that was replaced holds its image on");
    assert_eq!(sockets(&bed).len(), 1);
    fs::remove_file(&file).unwrap();
    bed.run(&hub, &["warm", "--stop", name]).success();
    assert!(ended(&second));
    let again = bed.run(&hub, &["warm", "--stop", name]).failure();
    assert!(again.contains("is not warm"), "{again}");
    assert!(sockets(&bed).is_empty());
}

#[test]
fn a_daemon_that_hangs_is_named_and_in_nobodys_way() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let hung = warm(&bed, &hub, &["--tag", "python-numpy"]);
    let other = warm(&bed, &hub, &[PACK]);
    let pid = |held: &Value| Pid::from_raw(held["pid"].as_i64().unwrap() as i32).unwrap();
    let limit = |descriptors| {
        let limit = Rlimit { current: Some(descriptors), maximum: Some(1 << 10) };
        rustix::process::prlimit(Some(pid(&hung)), Resource::Nofile, limit).unwrap();
    };
    let ask = |arguments: &[&str]| bed.command(&hub).arg("--json").args(arguments).output().unwrap();
    let one_of = |output: &std::process::Output| {
        let (shown, said): (Value, _) =
            (serde_json::from_slice(&output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
        assert!(said.contains(&format!("the process {} behind", hung["pid"])), "{said}");
        assert!(said.contains("does not answer") && said.contains("kill -9"), "{said}");
        assert_eq!((output.status.code(), shown.as_array().unwrap().len()), (Some(1), 1), "{shown}");
        assert_eq!(shown[0]["pid"], other["pid"]);
    };
    // It can accept nobody, and later it can.
    limit(3);
    one_of(&ask(&["warm", "--list"]));
    limit(1 << 10);
    assert_eq!(bed.json(&hub, &["warm", "--list"]).as_array().unwrap().len(), 2);

    rustix::process::kill_process(pid(&hung), Signal::STOP).unwrap();
    one_of(&ask(&["warm", "--list"]));
    one_of(&ask(&["warm", "--stop", "--all"]));
    assert!(wait_until(SOON, || !alive(other["pid"].as_i64().unwrap())));
    kill(&hung["pid"], Signal::KILL);
    let cleaned = bed.run(&hub, &["cleanup"]).success();
    assert!(cleaned.contains("1 socket of dead warm images"), "{cleaned}");
    assert!(sockets(&bed).is_empty());
}

/// The processes that `pid` has started.
fn children_of(pid: u32) -> Vec<i64> {
    let parent = format!("PPid:\t{pid}\n");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i64>().ok());
    let is_child = |number: &i64| {
        fs::read_to_string(format!("/proc/{number}/status")).is_ok_and(|status| status.contains(&parent))
    };
    numbers.filter(is_child).collect()
}

fn interrupt(foreground: &mut Child) {
    rustix::process::kill_process(Pid::from_child(foreground), Signal::INT).unwrap();
    assert_eq!(foreground.wait().unwrap().signal(), Some(Signal::INT.as_raw()));
}

#[test]
fn an_interrupt_ends_what_goes_to_the_background() {
    let bed = Bed::new();
    // Too slow for the test to end before the interrupt.
    let hub = Hub::serve(&bed, &["--bandwidth", "100kB/s"]);
    let spawn = |hub: &Hub, arguments: &[&str]| {
        bed.command(hub).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut warm = spawn(&hub, &["warm", PACK]);
    assert!(wait_until(SOON, || bed.path("cache/forkd").exists()), "it does not begin to load");
    let background = children_of(warm.id());
    assert_eq!(background.len(), 1);
    interrupt(&mut warm);
    assert!(wait_until(SOON, || !alive(background[0])), "it loads on for nobody");
    assert!(sockets(&bed).is_empty());

    let wait = "__import__('time').sleep(600)";
    let mut fork = spawn(&hub, &["fork", "--tag", "python-numpy", "--detach", "--eval", wait]);
    let mut pid = None;
    assert!(wait_until(Duration::from_secs(60), || {
        let child = &bed.json(&hub, &["ps"])[0]["children"][0];
        pid = child["pid"].as_i64().filter(|_| child["state"] == "ready");
        pid.is_some()
    }));
    let background = children_of(fork.id());
    interrupt(&mut fork);
    for pid in background.into_iter().chain(pid) {
        assert!(wait_until(SOON, || !alive(pid)), "process {pid} runs on for nobody");
    }
    bed.assert_nothing_left(pid.into_iter());
}
