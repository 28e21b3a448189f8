//! Snapshots of children of a running Linux guest. Needs what `linux.rs` needs, and root.

#[path = "linux/copies.rs"]
mod copies;
#[path = "linux/harness.rs"]
mod harness;
#[path = "support/small_disk.rs"]
mod small_disk;

use copies::Copies;
use harness::{Bed, Hub, distinct, supervisor_of, wait_until};
use serde_json::Value;
use small_disk::SmallDisk;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// What a copy is, as one tuple.
const WHO: &str =
    "(os.urandom(16).hex(), open('/etc/machine-id').read().strip(), __import__('socket').gethostname())";
/// What a child has that its snapshots have to have, too: a variable, 4 MiB of memory, a file.
const CHANGE: &str = "import os, hashlib\nseen = ['before']\nheap = bytes(range(256)) * 16384\n\
    open('/root/kept', 'w').write('kept')";
const CHANGED: &str = "(seen, hashlib.sha256(heap).hexdigest()[:8], open('/root/kept').read())";

/// A child of a snapshot that the test may replace, which has changed something.
fn changed() -> Copies {
    let (bed, hub) = (Bed::copied(), Hub::at("http://127.0.0.1:9/".to_owned()));
    let report = bed.json(&hub, &["fork", "--tag", "python-numpy", "--detach"]);
    let copies = Copies { bed, hub, report };
    copies.eval(0, CHANGE);
    copies
}

fn answer(report: &Value, at: usize) -> &str {
    report["children"][at]["answer"].as_str().unwrap_or_else(|| panic!("{report}"))
}

fn snapshots(bed: &Bed) -> PathBuf {
    bed.snapshot().parent().unwrap().to_owned()
}

/// What the snapshot directory has besides whole snapshots.
fn drafts(bed: &Bed) -> Vec<String> {
    let entries = fs::read_dir(snapshots(bed)).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with('.')).collect()
}

fn described(copies: &Copies, tag: &str) -> Value {
    let all = copies.json(&["snapshots"])["snapshots"].as_array().unwrap().clone();
    all.into_iter().find(|found| found["tag"] == tag).unwrap_or_default()
}

#[test]
fn a_fork_goes_on_from_where_the_child_was_and_the_child_goes_on_itself() {
    let copies = changed();
    let expected = copies.eval(0, CHANGED);
    let taken = copies.json(&["snapshot", "--child", copies.id(0), "--tag", "kept"]);
    println!("{taken}");
    copies.eval(0, "seen.append('after')");
    assert_eq!(taken["base"]["name"], "python-numpy");
    // A few MiB were changed, and few are stored; of the image nothing is stored again.
    let stored = taken["disk_bytes"].as_u64().unwrap();
    assert!((4 << 20..32 << 20).contains(&stored), "{taken}");
    let shown = described(&copies, "kept");
    assert_eq!((&shown["disk_bytes"], &shown["base"]), (&taken["disk_bytes"], &taken["base"]));
    let (base, kept) = (copies.bed.snapshot(), snapshots(&copies.bed).join("kept"));
    assert_eq!(fs::metadata(&kept).unwrap().mode() & 0o077, 0, "others can read the child's memory");
    let inode = |path: PathBuf| fs::metadata(path).unwrap().ino();
    assert_eq!(inode(kept.join(".base/memory.bin")), inode(base.join("memory.bin")));

    let code = format!("({CHANGED}, {WHO})");
    let forked = copies.json(&["fork", "--tag", "kept", "-n", "2", "--eval", &code]);
    for at in 0..2 {
        assert!(answer(&forked, at).starts_with(&format!("({}", expected.as_str().unwrap())), "{forked}");
    }
    assert!(distinct(forked["children"].as_array().unwrap().iter().map(|child| &child["answer"])));
    assert_eq!(copies.eval(0, "seen"), "['before', 'after']");
    let taken = copies.failure(&["snapshot", "--child", copies.id(0), "--tag", "kept"]);
    assert!(taken.contains("there is a local snapshot `kept` already"), "{taken}");
    copies.run(&["snapshot", "--child", copies.id(0), "--tag", "kept", "--force"]).success();
    let forked = copies.json(&["fork", "--tag", "kept", "--eval", "seen"]);
    assert_eq!(answer(&forked, 0), "['before', 'after']");
    copies.end();
}

#[test]
fn branches_and_children_of_such_a_snapshot_can_be_kept_too_and_have_the_same_base() {
    let copies = changed();
    let branched = copies.json(&["branch", copies.id(0), "--detach", "--eval", "seen.append('branch')"]);
    let branch = branched["children"][0]["id"].as_str().unwrap();
    let first = copies.json(&["snapshot", "--child", branch, "--tag", "first"]);
    let forked = copies.json(&["fork", "--tag", "first", "--detach", "--eval", "seen.append('second')"]);
    let second = forked["children"][0]["id"].as_str().unwrap();
    let taken = copies.json(&["snapshot", "--child", second, "--tag", "second"]);
    assert_eq!(taken["base"], first["base"], "deltas are not flattened");
    let deeper = copies.json(&["branch", second, "--eval", CHANGED]);
    assert!(answer(&deeper, 0).starts_with("(['before', 'branch', 'second'], "), "{deeper}");
    // Whatever becomes of what lies between.
    copies.run(&["rmi", "first"]).success();
    let forked = copies.json(&["fork", "--tag", "second", "--eval", CHANGED]);
    assert!(answer(&forked, 0).starts_with("(['before', 'branch', 'second'], "), "{forked}");
    copies.run(&["kill", "--all"]).success();
}

#[test]
fn ps_forgets_branches_that_are_over_and_the_tree_shows_where_all_come_from() {
    let copies = changed();
    let parent = copies.id(0);
    let branch = |of: &str| {
        let report = copies.json(&["branch", of, "--detach"]);
        report["children"][0]["id"].as_str().unwrap().to_owned()
    };
    let first = branch(parent);
    let second = branch(&first);
    copies.run(&["snapshot", "--child", &second, "--tag", "kept"]).success();
    let ids = || -> Vec<String> {
        let shown = copies.json(&["ps"]);
        let children = shown[0]["children"].as_array().unwrap().iter();
        children.map(|child| child["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(), [parent, &first, &second]);
    copies.run(&["kill", &first]).success();
    assert!(wait_until(Duration::from_secs(5), || ids() == [parent, &second]), "{:?}", ids());
    let path = |node: &Value, names: &[&str]| {
        names.iter().fold(node.clone(), |node, name| {
            let children = node["children"].as_array().cloned().unwrap_or_default();
            children.into_iter().find(|child| child["name"] == *name).unwrap_or_default()
        })
    };
    let fork = parent.split('-').next().unwrap();
    let root = copies.json(&["tree"])["roots"][0].clone();
    assert_eq!((&root["name"], &root["kind"]), (&"python-numpy".into(), &"snapshot".into()));
    assert_eq!(path(&root, &[fork, parent, &first])["state"], "killed");
    assert_eq!(path(&root, &[fork, parent, &first, &second, "kept"])["kind"], "snapshot");
    let drawn = copies.run(&["tree"]).success();
    assert!(drawn.contains("└─ kept"), "{drawn}");
    copies.run(&["kill", &second]).success();
    assert!(wait_until(Duration::from_secs(5), || ids() == [parent]), "{:?}", ids());
    // The snapshot is then all that is left of the branch.
    let root = copies.json(&["tree"])["roots"][0].clone();
    assert_eq!(path(&root, &[&second, "kept"])["kind"], "snapshot", "{root}");
    copies.end();
}

#[test]
fn a_base_that_is_removed_or_replaced_stays_what_it_was() {
    let copies = changed();
    let expected = copies.eval(0, CHANGED);
    copies.run(&["snapshot", "--child", copies.id(0), "--tag", "kept"]).success();
    // Another of the same name, with other bytes.
    let base = copies.bed.snapshot();
    fs::rename(&base, base.with_file_name("old")).unwrap();
    copies.run(&["snapshot", "--child", copies.id(0), "--tag", "python-numpy"]).success();
    let fork = |tag: &str| copies.json(&["fork", "--tag", tag, "--eval", CHANGED]);
    assert_eq!(answer(&fork("kept"), 0), expected);
    copies.run(&["rmi", "python-numpy", "old"]).success();
    assert_eq!(answer(&fork("kept"), 0), expected);
    assert_eq!(copies.eval(0, CHANGED), expected);
    // What nobody else has is now this one's.
    assert!(described(&copies, "kept")["disk_bytes"].as_u64().unwrap() > 64 << 20);
    // The fork's own files are gone but for the links of `kept`.
    copies.run(&["snapshot", "--child", copies.id(0), "--tag", "linked"]).success();
    copies.run(&["rmi", "kept", "linked"]).success();
    let taken = copies.json(&["snapshot", "--child", copies.id(0), "--tag", "whole"]);
    assert!(taken["base"].is_null(), "{taken}");
    assert!(snapshots(&copies.bed).join("whole/memory.bin").exists());
    assert_eq!(answer(&fork("whole"), 0), expected);
    copies.end();
}

#[test]
fn a_pack_of_it_is_whole() {
    let copies = changed();
    let expected = copies.eval(0, CHANGED);
    copies.run(&["snapshot", "--child", copies.id(0), "--tag", "kept"]).success();
    let pack = copies.bed.path("kept.tar.zst");
    copies.run(&["pack", "--tag", "kept", "--out", pack.to_str().unwrap()]).success();
    copies.run(&["rmi", "kept"]).success();
    let of_file = copies.json(&["fork", pack.to_str().unwrap(), "--eval", CHANGED]);
    assert_eq!(answer(&of_file, 0), expected);
    copies.run(&["unpack", pack.to_str().unwrap(), "--tag", "again"]).success();
    assert_eq!(answer(&copies.json(&["fork", "--tag", "again", "--eval", CHANGED]), 0), expected);
    // What is held in memory is the same.
    copies.run(&["snapshot", "--child", copies.id(0), "--tag", "kept"]).success();
    copies.run(&["warm", "--tag", "kept"]).success();
    let warm = copies.json(&["fork", "--tag", "kept", "--detach", "--eval", CHANGED]);
    assert_eq!(answer(&warm, 0), expected);
    let of_warm =
        copies.json(&["snapshot", "--child", warm["children"][0]["id"].as_str().unwrap(), "--tag", "warm"]);
    assert_eq!(of_warm["base"]["name"], "python-numpy", "{of_warm}");
    assert_eq!(answer(&copies.json(&["fork", "--tag", "warm", "--eval", CHANGED]), 0), expected);
    copies.run(&["warm", "--stop", "--all"]).success();
    copies.run(&["kill", "--all"]).success();
}

#[test]
fn the_base_of_a_pack_that_is_not_here_yet_is_the_pack() {
    let bed = Bed::copied();
    let hub = Hub::serve(&bed, &["--rtt", "5ms", "--bandwidth", "40MB/s"]);
    let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "--detach"]);
    let copies = Copies { bed, hub, report };
    copies.eval(0, CHANGE);
    let taken = copies.json(&["snapshot", "--child", copies.id(0), "--tag", "kept"]);
    println!("{taken}");
    assert!(taken["base"]["name"].as_str().unwrap().starts_with("deeplethe/python-numpy@"), "{taken}");
    assert!(taken["base"]["index_sha256"].as_str().is_some_and(|digest| digest.len() == 64), "{taken}");
    assert!(taken["disk_bytes"].as_u64().unwrap() < 32 << 20, "{taken}");
    let expected = copies.eval(0, CHANGED);
    copies.run(&["kill", "--all"]).success();
    let forked = copies.json(&["fork", "--tag", "kept", "--eval", CHANGED]);
    assert_eq!(answer(&forked, 0), expected);
    let pack = copies.bed.path("kept.tar.zst");
    copies.run(&["pack", "--tag", "kept", "--out", pack.to_str().unwrap()]).success();
    let forked = copies.json(&["fork", pack.to_str().unwrap(), "--eval", CHANGED]);
    assert_eq!(answer(&forked, 0), expected);

    // Packed as a delta it is small, and its fork takes the rest from the pack at the hub.
    let delta = copies.bed.path("delta.tar.zst");
    let packed = copies.json(&["pack", "--tag", "kept", "--delta", "--out", delta.to_str().unwrap()]);
    println!("{packed}");
    assert_eq!(packed["bases"], serde_json::json!([taken["base"]["index_sha256"]]), "{packed}");
    let [small, whole] = [&delta, &pack].map(|path| fs::metadata(path).unwrap().len());
    assert!(small * 3 < whole, "a delta of {small} bytes of a pack of {whole}");
    let forked = copies.json(&["fork", delta.to_str().unwrap(), "--eval", CHANGED]);
    assert_eq!(answer(&forked, 0), expected);

    // Another pack in its place is refused, and one that is gone is named.
    fs::remove_dir_all(copies.bed.path("cache")).unwrap();
    let folder = copies.bed.path("hub");
    let entries = || fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.path());
    let place = entries().find(|path| path.extension().is_some_and(|end| end == "zst")).unwrap();
    fs::rename(&pack, &place).unwrap();
    let refused = copies.failure(&["fork", "--tag", "kept", "--eval", CHANGED]);
    assert!(refused.contains("its base deeplethe/python-numpy@"), "{refused}");
    fs::remove_file(&place).unwrap();
    let refused = copies.failure(&["fork", "--tag", "kept", "--eval", CHANGED]);
    assert!(refused.contains("its base deeplethe/python-numpy@"), "{refused}");
}

#[test]
fn whoever_is_killed_leaves_no_half_snapshot() {
    let copies = changed();
    let expected = copies.eval(0, CHANGED);
    let look = |tag: &str| {
        if described(&copies, tag).is_null() {
            return false;
        }
        let forked = copies.json(&["fork", "--tag", tag, "--eval", CHANGED]);
        assert_eq!(answer(&forked, 0), expected, "a half snapshot");
        true
    };
    let take = |tag: &str| {
        let mut taking = copies.bed.command(&copies.hub);
        taking.args(["snapshot", "--child", copies.id(0), "--tag", tag]).stderr(Stdio::null());
        taking.stdout(Stdio::null()).spawn().unwrap()
    };
    let mut whole = 0;
    for after in [5, 20, 40, 60, 90, 150] {
        let mut taking = take("kept");
        std::thread::sleep(Duration::from_millis(after));
        taking.kill().unwrap();
        taking.wait().unwrap();
        if look("kept") {
            whole += 1;
            copies.run(&["rmi", "kept"]).success();
        }
    }
    println!("{whole} of 6 were whole");
    // What the supervisor still writes goes with the next cleanup.
    let clean = || {
        copies.run(&["cleanup"]).success();
        drafts(&copies.bed).is_empty()
    };
    assert!(wait_until(Duration::from_secs(10), clean), "{:?}", drafts(&copies.bed));
    copies.run(&["snapshot", "--child", copies.id(0), "--tag", "after"]).success();
    assert!(look("after"));
    let mut taking = take("kept");
    std::thread::sleep(Duration::from_millis(60));
    let supervisor = supervisor_of(copies.pid(0));
    assert!(Command::new("kill").args(["-9", &supervisor.to_string()]).status().unwrap().success());
    let done = taking.wait().unwrap().success();
    assert_eq!(look("kept"), done);
    assert!(clean());
}

#[test]
fn two_at_once_are_two_moments_and_one_name_is_one_snapshots() {
    let copies = changed();
    let expected = copies.eval(0, CHANGED);
    let take = |tag: &str| copies.run(&["snapshot", "--child", copies.id(0), "--tag", tag]).both();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads = ["a", "b", "same", "same"].map(|tag| scope.spawn(move || take(tag)));
        threads.map(|thread| thread.join().unwrap()).into()
    });
    assert_eq!((results[0].0, results[1].0), (Some(0), Some(0)), "{results:?}");
    let same = [results[2].0, results[3].0];
    assert!(same.contains(&Some(0)) && same.contains(&Some(1)), "{results:?}");
    for tag in ["a", "b", "same"] {
        assert_eq!(answer(&copies.json(&["fork", "--tag", tag, "--eval", CHANGED]), 0), expected);
    }
    assert!(drafts(&copies.bed).is_empty());
    copies.end();
}

#[test]
fn a_full_disk_is_named_and_the_child_goes_on() {
    let copies = changed();
    let disk = SmallDisk::mount(copies.bed.path("small"), 3 << 10);
    let mut taking = copies.bed.command(&copies.hub);
    taking.env("XDG_DATA_HOME", &disk.dir).args(["snapshot", "--child", copies.id(0), "--tag", "kept"]);
    let taking = taking.output().unwrap();
    let said = String::from_utf8_lossy(&taking.stderr);
    assert!(!taking.status.success() && said.contains("No space left on device"), "{said}");
    assert!(said.contains("nothing was kept"), "{said}");
    let left = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(left(&disk.dir.join("forkd/snapshots")), 0);
    assert_eq!(copies.eval(0, "seen"), "['before']");
    let refused = copies.failure(&["snapshot", "--child", "abcdef-1", "--tag", "kept"]);
    assert!(refused.contains("there is no running child `abcdef-1`"), "{refused}");
    copies.run(&["pause", copies.id(0)]).success();
    let refused = copies.failure(&["snapshot", "--child", copies.id(0), "--tag", "kept"]);
    assert!(refused.contains("is paused"), "{refused}");
    copies.run(&["resume", copies.id(0)]).success();
    assert!(drafts(&copies.bed).is_empty());
    copies.end();
}
