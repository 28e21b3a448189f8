//! Children that are paused to disk. Needs what `linux.rs` needs, and root.

#[path = "linux/copies.rs"]
mod copies;
#[path = "linux/harness.rs"]
mod harness;
#[path = "support/small_disk.rs"]
mod small_disk;

use copies::Copies;
use harness::{Bed, Hub, alive, supervisor_of, wait_until};
use serde_json::Value;
use small_disk::SmallDisk;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What is to be the same: a variable, memory, a file, a thread, who it is.
const CHANGE: &str = "import hashlib, os, socket, threading, time\nheap = bytes(range(256)) * (4 << 12)\n\
    open('/root/kept', 'w').write('kept')\nturns = 0\n\
    def turn():\n    global turns\n    while True:\n        turns += 1\n        time.sleep(0.05)\n\
    threading.Thread(target=turn, daemon=True).start()";
const CHANGED: &str = "(hashlib.sha256(heap).hexdigest()[:8], open('/root/kept').read(), \
    open('/etc/machine-id').read(), socket.gethostname(), \
    __import__('subprocess').check_output(['cat', '/proc/net/fib_trie']).count(b'host LOCAL'))";

fn to_disk(copies: &Copies, name: &str) -> Value {
    copies.json(&["pause", name, "--to-disk"])
}

fn state(child: &Value) -> (&str, bool) {
    (child["state"].as_str().unwrap(), child["on_disk"] == true)
}

#[test]
fn a_child_comes_back_from_disk_as_it_was_as_often_as_one_likes() {
    let copies = Copies::of("python-numpy", &["-n", "2", "--net", "nat", "--publish", "8000"]);
    let id = copies.id(0);
    copies.eval(0, CHANGE);
    copies.eval(
        0,
        "import http.server\nthreading.Thread(target=http.server.HTTPServer(('', 8000), \
         http.server.SimpleHTTPRequestHandler).serve_forever, daemon=True).start()",
    );
    let (before, shown) = (copies.eval(0, CHANGED), copies.shown(0));
    let port = shown["ports"][0]["local"].as_u64().unwrap() as u16;
    let (mut pid, mut random) = (copies.pid(0), Vec::new());
    for round in 0..3 {
        let paused = to_disk(&copies, id);
        println!("{paused}");
        assert!(paused["paused"] == 1 && paused["disk_bytes"].as_u64().unwrap() > 4 << 20, "{paused}");
        assert!(!alive(pid), "its process is still there");
        let now = copies.shown(0);
        assert_eq!((state(&now), &now["pid"]), (("paused", true), &0.into()), "{now}");
        // Its memory lies in a file without a name.
        assert_eq!(fs::read_dir(copies.bed.path("cache/forkd")).unwrap().flatten().count(), 0);
        // Again is no more than once.
        assert_eq!(to_disk(&copies, id), paused);
        for refused in [&["eval", id, "1"][..], &["branch", id], &["snapshot", "--child", id, "--tag", "t"]] {
            let said = copies.failure(refused);
            assert!(said.contains("is paused"), "{refused:?}: {said}");
        }
        assert_eq!(copies.eval(1, "6 * 7"), "42");

        assert_eq!(copies.json(&["resume", id])["resumed"], 1);
        assert_eq!(copies.eval(0, CHANGED), before, "round {round}");
        let now = copies.shown(0);
        assert_eq!((state(&now), &now["ports"]), (("ready", false), &shown["ports"]), "{now}");
        assert_eq!(now["network"]["address"], shown["network"]["address"]);
        pid = now["pid"].as_i64().unwrap();
        random.push(copies.eval(0, "os.urandom(16).hex()"));
        // What ran in it goes on.
        let turns = || copies.eval(0, "turns").as_str().unwrap().parse::<u64>().unwrap();
        let before = turns();
        assert!(wait_until(Duration::from_secs(20), || turns() > before), "its threads stand still");
        let clock: f64 = copies.eval(0, "time.time()").as_str().unwrap().parse().unwrap();
        let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((clock - host).abs() < 2.0, "the guest's clock is {} s off", clock - host);
        let mut page = String::new();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        stream.read_to_string(&mut page).unwrap();
        assert!(page.starts_with("HTTP/1.0 200 OK"), "{page}");
    }
    random.dedup();
    assert_eq!(random.len(), 3);
    copies.run(&["kill", "--all"]).success();
    copies.bed.assert_nothing_left([pid, copies.pid(1)].into_iter());
}

#[test]
fn a_fork_is_paused_and_resumed_whole_its_branches_too() {
    let copies = Copies::of("python-numpy", &["-n", "2"]);
    let fork = copies.id(0).split_once('-').unwrap().0;
    copies.eval(0, CHANGE);
    let branch = copies.json(&["branch", copies.id(0), "--detach", "--eval", "mine = 'branch'"]);
    let branch = branch["children"][0]["id"].as_str().unwrap();
    // One is stopped already, and another lies on disk.
    copies.run(&["pause", copies.id(1)]).success();
    to_disk(&copies, branch);
    assert_eq!(to_disk(&copies, fork)["paused"], 3);
    let states = |copies: &Copies| (0..3).map(|at| copies.shown(at)).collect::<Vec<_>>();
    assert!(states(&copies).iter().all(|child| state(child) == ("paused", true)));
    let text = copies.run(&["ps"]).success();
    assert_eq!(text.matches("paused to disk").count(), 3, "{text}");
    assert_eq!(copies.json(&["resume", fork])["resumed"], 3);
    assert!(states(&copies).iter().all(|child| state(child) == ("ready", false)));
    assert_eq!(copies.eval(1, "1 + 1"), "2");
    let changed = copies.eval(0, "len(heap), open('/root/kept').read()");
    let said = copies.json(&["eval", branch, "len(heap), open('/root/kept').read(), mine"]);
    assert_eq!(said["answer"].as_str().unwrap(), changed.as_str().unwrap().replace(')', ", 'branch')"));

    // What came back from disk is branched, and kept, as any.
    let deeper = copies.json(&["branch", branch, "--eval", "mine, len(heap)"]);
    assert_eq!(deeper["children"][0]["answer"], "('branch', 4194304)");
    copies.run(&["snapshot", "--child", branch, "--tag", "from-disk", "--force"]).success();
    let forked = copies.json(&["fork", "--tag", "from-disk", "--eval", "mine, len(heap)"]);
    assert_eq!(forked["children"][0]["answer"], "('branch', 4194304)");
    copies.run(&["rmi", "from-disk"]).success();
    copies.run(&["kill", "--all"]).success();
    assert!(wait_until(Duration::from_secs(5), || !copies.bed.has_run_dirs()));
}

#[test]
fn a_child_on_disk_ends_when_it_is_killed_or_its_time_is_over() {
    let copies = Copies::of("python-numpy", &["-n", "2", "--timeout", "12s"]);
    to_disk(&copies, copies.id(0));
    to_disk(&copies, copies.id(1));
    copies.run(&["kill", copies.id(0)]).success();
    assert_eq!(copies.shown(0)["state"], "killed");
    assert!(copies.failure(&["resume", copies.id(0)]).contains("there is no running child"));
    // The other's time goes on.
    assert!(wait_until(Duration::from_secs(20), || !copies.bed.has_run_dirs()), "its time is never over");
    copies.bed.assert_nothing_left([].into_iter());
}

#[test]
fn nothing_is_left_of_children_on_disk_whose_supervisor_is_killed() {
    let copies = Copies::of("python-numpy", &["-n", "2"]);
    let supervisor = supervisor_of(copies.pid(1));
    to_disk(&copies, copies.id(0));
    let killed = Command::new("kill").args(["-9", &supervisor.to_string()]).status();
    assert!(killed.unwrap().success());
    assert!(wait_until(Duration::from_secs(10), || !alive(supervisor) && !alive(copies.pid(1))));
    assert!(copies.failure(&["resume", copies.id(0)]).contains("there is no running child"));
    copies.run(&["cleanup"]).success();
    assert!(!copies.bed.has_run_dirs());
    assert_eq!(fs::read_dir(copies.bed.path("cache/forkd")).unwrap().flatten().count(), 0);
}

#[test]
fn a_scratch_disk_goes_along_to_branches_and_through_a_pause_to_disk() {
    let copies = Copies::of("tools", &[]);
    let (parent, page) = (copies.id(0), "bs=4096 count=1 2>/dev/null");
    let shell = |id: &str, script: &str| copies.run(&["exec", id, "--", "sh", "-c", script]).success();
    let write = |id: &str, text: &str| {
        shell(id, &format!("printf %-4096s {text} | dd of=/dev/vda oflag=direct seek=9000 {page}"));
    };
    let read = |id: &str| shell(id, &format!("dd if=/dev/vda iflag=direct skip=9000 {page} | head -c 6"));
    write(parent, "before");
    let branched = copies.json(&["branch", parent, "-n", "2", "--detach"]);
    let branch = |at: usize| branched["children"][at]["id"].as_str().unwrap();
    assert_eq!([read(branch(0)), read(branch(1))], ["before", "before"]);
    write(parent, "parent");
    write(branch(0), "branch");
    to_disk(&copies, branch(0));
    copies.run(&["resume", branch(0)]).success();
    assert_eq!([parent, branch(0), branch(1)].map(read), ["parent", "branch", "before"]);
    let refused = copies.failure(&["snapshot", "--child", parent, "--tag", "t"]);
    assert!(refused.contains("has a scratch disk, which a snapshot does not hold"), "{refused}");
    copies.run(&["kill", "--all"]).success();
    copies.bed.assert_nothing_left([copies.pid(0)].into_iter());
}

#[test]
fn a_full_disk_is_named_and_the_child_goes_on() {
    let (bed, hub) = (Bed::new(), Hub::at("http://127.0.0.1:9/".to_owned()));
    let disk = SmallDisk::mount(bed.path("small"), 3 << 10);
    let mut forking = bed.command(&hub);
    forking.env("XDG_CACHE_HOME", &disk.dir);
    let forked = forking.args(["--json", "fork", "--tag", "python-numpy", "--detach"]).output().unwrap();
    let report = serde_json::from_slice(&forked.stdout).unwrap();
    let copies = Copies { bed, hub, report };
    copies.eval(0, CHANGE);
    let before = copies.eval(0, CHANGED);
    for paused in [false, true] {
        if paused {
            copies.run(&["pause", copies.id(0)]).success();
        }
        let said = copies.failure(&["pause", copies.id(0), "--to-disk"]);
        assert!(said.contains("No space left on device") && said.contains("cannot be written to"), "{said}");
        // It is as it was.
        let expected = if paused { "paused" } else { "ready" };
        assert_eq!(state(&copies.shown(0)), (expected, false));
    }
    copies.run(&["resume", copies.id(0)]).success();
    assert_eq!(copies.eval(0, CHANGED), before);
    copies.end();
}
