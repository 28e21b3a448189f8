//! The main job on a real Linux guest: the python-numpy machine is packed, served over HTTP and forked while most of it
//! is still at the hub. Needs the snapshot that `make machine` builds, /dev/kvm and userfaultfd; without them these
//! tests fail and say so.

#[path = "linux/consoles.rs"]
mod consoles;
#[path = "linux/contract.rs"]
mod contract;
#[path = "support/golden.rs"]
mod golden;
#[path = "linux/harness.rs"]
mod harness;
#[path = "linux/hostile_guests.rs"]
mod hostile_guests;
#[path = "linux/kills.rs"]
mod kills;
#[path = "linux/remains.rs"]
mod remains;
#[path = "linux/warm.rs"]
mod warm;

use harness::{Bed, Hub, alive, distinct, wait_until};
use serde_json::Value;
use std::fs;
use std::process::Stdio;
use std::time::Duration;

const ZEROS: &str = "[0.0, 0.0, 0.0, 0.0, 0.0]";
const WHO: &str = "[__import__('os').urandom(8).hex(), __import__('socket').gethostname(), float(numpy.random.random()), numpy.zeros(5).tolist()]";

#[test]
fn ten_children_of_a_pack_at_the_hub_answer_and_are_all_different() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &["--rtt", "20ms", "--bandwidth", "50MB/s"]);
    let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "-n", "10", "--eval", WHO]);
    let children = report["children"].as_array().unwrap();
    assert_eq!(children.len(), 10);
    let answers: Vec<Value> = children
        .iter()
        .map(|child| serde_json::from_str(&child["answer"].as_str().unwrap().replace('\'', "\"")).unwrap())
        .collect();
    assert!(distinct(answers.iter().map(|answer| &answer[0])), "urandom repeats: {answers:?}");
    assert!(distinct(answers.iter().map(|answer| &answer[1])), "hostnames repeat: {answers:?}");
    assert!(distinct(answers.iter().map(|answer| &answer[2])), "numpy's generator repeats: {answers:?}");
    assert!(
        answers.iter().all(|answer| answer[3] == serde_json::json!([0.0, 0.0, 0.0, 0.0, 0.0])),
        "{answers:?}"
    );

    let total = report["pack"]["bytes_total"].as_u64().unwrap();
    let first = report["fetched"]["at_first_instruction"].as_u64().unwrap();
    assert!(first * 2 < total, "{first} of {total} bytes were there at the first instruction");
    for child in children {
        let at = |key: &str| child[key].as_f64().unwrap();
        assert!(at("first_instruction_ms") < at("ready_ms") && at("ready_ms") < at("answered_ms"), "{child}");
    }
    let private = report["memory"]["private_kib_per_child"].as_u64().unwrap();
    let image = report["memory"]["image_kib"].as_u64().unwrap();
    assert!(private < image, "{private} KiB private a child, {image} KiB in the image");
    bed.assert_nothing_left(children.iter().map(|child| child["pid"].as_i64().unwrap()));
}

#[test]
fn image_pages_that_a_child_maps_alone_are_not_its_private_memory() {
    let bed = Bed::copied();
    let hub = Hub::at("http://127.0.0.1:9/".to_owned());
    let report = bed.json(&hub, &["fork", "--tag", "python-numpy", "--detach", "--eval", "1 + 1"]);
    let pid = report["children"][0]["pid"].as_i64().unwrap();
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let kib = |field: &str| -> u64 {
        let line = rollup.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let private = report["memory"]["private_kib_per_child"].as_u64().unwrap();
    let alone = kib("Private_Clean:") + kib("Private_Dirty:");
    assert!(alone > 3 * private, "{private} KiB written, {alone} KiB mapped by nobody else");
    assert!(private.abs_diff(kib("Anonymous:")) < 1024, "{private} KiB, now {rollup}");
    bed.run(&hub, &["kill", "--all"]).success();
    bed.assert_nothing_left([pid].into_iter());
}

#[test]
fn what_one_child_writes_no_other_sees() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "-n", "2", "--detach"]);
    let id = |at: usize| report["children"][at]["id"].as_str().unwrap();
    bed.run(&hub, &["eval", id(0), "globals().update(secret=numpy.arange(100000))"]).success();
    let there = bed.json(&hub, &["eval", id(0), "int(secret.sum())"]);
    assert_eq!(there["answer"], "4999950000");
    let other = bed.run(&hub, &["eval", id(1), "secret.sum()"]).failure();
    assert!(other.contains("secret"), "{other}");
    let written =
        bed.json(&hub, &["exec", id(0), "--", "sh", "-c", "echo mine > /root/file && cat /root/file"]);
    assert_eq!((written["stdout"].as_str(), written["exit_code"].as_i64()), (Some("mine\n"), Some(0)));
    let absent = bed.run(&hub, &["exec", id(1), "--", "cat", "/root/file"]).failure();
    assert!(absent.contains("No such file"), "{absent}");

    let listed = bed.json(&hub, &["ps"]);
    let states: Vec<_> =
        listed[0]["children"].as_array().unwrap().iter().map(|child| &child["state"]).collect();
    assert_eq!(states, ["ready", "ready"]);
    bed.run(&hub, &["exec", id(0), "--", "sh", "-c", "echo only on this console > /dev/ttyS0"]).success();
    let console = |at: usize| bed.run(&hub, &["logs", id(at)]).success();
    let there = || console(0).contains("only on this console");
    assert!(wait_until(Duration::from_secs(5), there), "it is not on the console: {}", console(0));
    assert!(!console(1).contains("only on this console"), "a sibling's console has it too");
    bed.run(&hub, &["kill", id(0)]).success();
    bed.run(&hub, &["eval", id(1), "1 + 1"]).success();
    bed.run(&hub, &["kill", "--all"]).success();
    let pids: Vec<_> =
        report["children"].as_array().unwrap().iter().map(|child| child["pid"].as_i64().unwrap()).collect();
    assert!(wait_until(Duration::from_secs(10), || !bed.has_run_dirs()), "run directories are left");
    bed.assert_nothing_left(pids.into_iter());
}

#[test]
fn a_hub_that_goes_away_stalls_a_child_and_it_goes_on_when_the_hub_is_back() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &["--bandwidth", "4MB/s"]);
    let report =
        bed.json(&hub, &["fork", "deeplethe/python-numpy", "--detach", "--eval", "numpy.zeros(5).tolist()"]);
    let child = report["children"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(report["children"][0]["answer"], ZEROS);
    let (fetched, total) = (report["pack"]["bytes_fetched"].as_u64(), report["pack"]["bytes_total"].as_u64());
    assert!(fetched < total, "the whole pack was there before the hub went: {report}");
    let hub = hub.stop();
    // Reads the whole root disk, most of which is not here.
    let reader = bed
        .command(&hub)
        .args(["exec", &child, "--", "sh", "-c", "cat /usr/lib/python3/dist-packages/numpy/*/*.so | wc -c"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stalled = wait_until(Duration::from_secs(60), || {
        bed.json(&hub, &["ps"])[0]["children"][0]["state"] == "stalled"
    });
    assert!(stalled, "`forkd ps` does not say stalled: {}", bed.json(&hub, &["ps"]));
    let _hub = hub.start_again();
    let output = reader.wait_with_output().unwrap();
    assert!(output.status.success());
    let bytes: u64 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    assert!(bytes > 1_000_000, "{bytes} bytes were read");
    bed.run(&_hub, &["kill", "--all"]).success();
}

#[test]
fn a_child_killed_while_it_waits_for_memory_does_not_harm_its_sibling() {
    const DIGEST: &str = "cat /usr/lib/python3/dist-packages/numpy/*/*.so | sha256sum";
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &["--bandwidth", "4MB/s"]);
    let local = bed.json(&hub, &["fork", "--tag", "python-numpy", "--exec", "--", "sh", "-c", DIGEST]);
    let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "-n", "2", "--detach", "--eval", "1"]);
    let ids: Vec<_> = report["children"]
        .as_array()
        .unwrap()
        .iter()
        .map(|child| child["id"].as_str().unwrap().to_owned())
        .collect();
    let hub = hub.stop();
    let mut reader = bed
        .command(&hub)
        .args(["exec", &ids[0], "--", "sh", "-c", DIGEST])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stalled = || bed.json(&hub, &["ps"])[0]["children"][0]["state"] == "stalled";
    assert!(wait_until(Duration::from_secs(60), stalled), "the child does not stall");
    bed.run(&hub, &["kill", &ids[0]]).success();
    reader.wait().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let hub = hub.start_again();
    let sibling = bed.json(&hub, &["exec", &ids[1], "--", "sh", "-c", DIGEST]);
    assert_eq!(sibling["stdout"], local["children"][0]["answer"], "the sibling read something else");
    bed.run(&hub, &["kill", "--all"]).success();
}

#[test]
fn flipped_bytes_at_the_hub_end_in_a_named_error_and_no_answer() {
    let bed = Bed::new();
    let hub = Hub::serve_with(&bed, &[], |pack| {
        // One byte in every 50 KB of the first members' data on, the index at the end left alone.
        let end = pack.len() - pack.len() / 20;
        let mut at = 400_000;
        while at < end {
            pack[at] ^= 0x10;
            at += 50_000;
        }
    });
    let output =
        bed.run(&hub, &["fork", "deeplethe/python-numpy", "--eval", "numpy.zeros(5).tolist()"]).failure();
    assert!(output.contains("sha256"), "{output}");
    assert!(!output.contains(ZEROS), "a child ran on damaged memory: {output}");
    assert!(!bed.has_run_dirs(), "a run directory is left");
}

#[test]
fn a_killed_fork_leaves_no_machine_behind() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let mut fork = bed
        .command(&hub)
        .args(["fork", "deeplethe/python-numpy", "-n", "3"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ready = || {
        let listed = bed.json(&hub, &["ps"]);
        listed[0]["children"].as_array().is_some_and(|all| all.iter().all(|child| child["state"] == "ready"))
    };
    assert!(wait_until(Duration::from_secs(60), ready), "the children are not ready");
    let listed = bed.json(&hub, &["ps"]);
    let pids: Vec<_> = listed[0]["children"]
        .as_array()
        .unwrap()
        .iter()
        .map(|child| child["pid"].as_i64().unwrap())
        .collect();
    assert_eq!(pids.len(), 3);
    fork.kill().unwrap();
    fork.wait().unwrap();
    assert!(
        wait_until(Duration::from_secs(5), || !pids.iter().any(|pid| alive(*pid))),
        "machines outlive their fork"
    );
    let cleaned = bed.json(&hub, &["cleanup"]);
    assert_eq!(cleaned["forks"].as_array().map(Vec::len), Some(1), "{cleaned}");
    assert!(!bed.has_run_dirs());
}

#[test]
fn local_snapshots_eager_forks_and_folders_of_a_mount_work_too() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let answers = |report: &Value| report["children"][0]["answer"] == ZEROS;
    let code = "numpy.zeros(5).tolist()";
    assert!(answers(&bed.json(&hub, &["fork", "--tag", "python-numpy", "--eval", code])));
    let eager = bed.json(&hub, &["fork", "deeplethe/python-numpy", "--eager", "--eval", code]);
    assert!(answers(&eager));
    let total = eager["pack"]["bytes_total"].as_u64().unwrap();
    assert!(eager["fetched"]["at_first_instruction"].as_u64().unwrap() * 10 > total * 9, "{eager}");
    let mountpoint = bed.path("mnt");
    fs::create_dir(&mountpoint).unwrap();
    let mountpoint = mountpoint.to_str().unwrap();
    bed.run(&hub, &["mount", mountpoint]).success();
    let folder = format!("{mountpoint}/deeplethe/python-numpy/latest");
    let mounted = bed.json(&hub, &["fork", &folder, "--eval", code]);
    bed.run(&hub, &["umount", mountpoint]).success();
    assert!(answers(&mounted));
    assert_eq!(mounted["pack"]["bytes_total"].as_u64(), Some(total), "the fork read the pack itself");
    let cached =
        bed.json(&hub, &["fork", "deeplethe/python-numpy", "--exec", "--", "python3", "-c", "print(6 * 7)"]);
    assert_eq!(cached["children"][0]["answer"], "42\n");
}

#[test]
fn mistakes_are_named_and_leave_nothing() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let cases: [(&[&str], i32, &str); 7] = [
        (&["fork", "deeplethe/python-numpy", "-n", "0"], 2, "0"),
        (&["fork", "deeplethe/python-numpy", "-n", "10000"], 2, "10000"),
        (&["fork", "deeplethe/python-nump"], 1, "deeplethe/python-numpy"),
        (&["fork", "deeplethe/python-numpy@v9"], 1, "v9"),
        (&["fork", "--tag", "absent"], 1, "absent"),
        (&["fork", "/no/such/pack"], 1, "/no/such/pack"),
        (&["eval", "abc-1", "1"], 1, "abc-1"),
    ];
    for (arguments, code, named) in cases {
        let (status, text) = bed.run(&hub, arguments).both();
        assert_eq!(status, Some(code), "{arguments:?}: {text}");
        assert!(text.contains(named), "{arguments:?} does not name {named}: {text}");
    }
    let gone = hub.stop();
    let (status, text) = bed.run(&gone, &["fork", "deeplethe/python-numpy"]).both();
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("cannot be reached") && text.contains("hint:"), "{text}");
    assert!(!bed.has_run_dirs(), "a run directory is left");
}

/// Runs forkd where /dev has /dev/null and nothing else, as on a host without the devices.
fn without_devices(bed: &Bed, hub: &Hub, arguments: &[&str]) -> (Option<i32>, String) {
    let forkd = bed.command(hub);
    let mut unshared = std::process::Command::new("unshare");
    unshared
        .args(["-m", "sh", "-c", "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec \"$@\"", "sh"])
        .arg(forkd.get_program())
        .args(arguments)
        .envs(forkd.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdin(Stdio::null());
    let output = unshared.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn missing_devices_are_named_with_a_mend() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let mountpoint = bed.path("mnt");
    fs::create_dir(&mountpoint).unwrap();
    let mountpoint = mountpoint.to_str().unwrap();
    let cases: [(&[&str], &str); 3] = [
        (&["fork", "deeplethe/python-numpy"], "/dev/kvm"),
        (&["mount", mountpoint], "/dev/fuse"),
        (&["doctor"], "/dev/kvm"),
    ];
    for (arguments, named) in cases {
        let (code, text) = without_devices(&bed, &hub, arguments);
        assert_eq!(code, Some(1), "{arguments:?}: {text}");
        assert!(text.contains(named), "{arguments:?} does not name {named}: {text}");
        assert!(arguments == ["doctor"] || text.contains("hint:"), "{arguments:?} gives no hint: {text}");
    }
    assert!(!bed.has_run_dirs(), "a run directory is left");
}

#[test]
fn packs_that_cannot_be_forked_say_why() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    // The predecessor's layout: one zstd frame around a tar.
    let old = bed.path("old");
    fs::create_dir(&old).unwrap();
    fs::write(old.join("manifest.toml"), "forkd_pack_version = 1\ntag = \"old\"\n").unwrap();
    for name in ["snapshot.json", "vmstate", "memory.bin"] {
        fs::write(old.join(name), "x").unwrap();
    }
    let v1 = bed.path("old.forkd-snapshot.tar.zst");
    let made = std::process::Command::new("tar")
        .args(["--zstd", "-cf", v1.to_str().unwrap(), "-C", old.to_str().unwrap()])
        .args(["manifest.toml", "snapshot.json", "vmstate", "memory.bin"])
        .status()
        .unwrap();
    assert!(made.success());
    let whole = fs::read_dir(bed.path("hub"))
        .unwrap()
        .flatten()
        .find(|e| e.path().extension() == Some("zst".as_ref()));
    let whole = fs::read(whole.unwrap().path()).unwrap();
    let cut = bed.path("cut.forkd-snapshot.tar.zst");
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let noise = bed.path("noise.forkd-snapshot.tar.zst");
    fs::write(&noise, vec![0x5a; 100_000]).unwrap();
    for (pack, said) in [(&v1, "layout 1"), (&cut, "cut short"), (&noise, "not a forkd pack")] {
        let (code, text) = bed.run(&hub, &["fork", pack.to_str().unwrap()]).both();
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(said), "{} does not say `{said}`: {text}", pack.display());
    }
    assert!(!bed.has_run_dirs(), "a run directory is left");
}
