//! How a fork of the real Linux guest shows what it did: timelines, heatmaps of children, figures of the trace; and a
//! trace recorded again. Needs what `linux.rs` needs.

#[path = "support/golden.rs"]
mod golden;
#[path = "linux/harness.rs"]
mod harness;

use golden::{Golden, with_placeholders};
use harness::{Bed, Hub, alive, wait_until};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const CODE: &str = "numpy.zeros(5).tolist()";
const ZEROS: &str = "[0.0, 0.0, 0.0, 0.0, 0.0]";
const RECIPE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/python-numpy");

/// Runs forkd on a copy of the snapshot, which it may change.
struct Copied {
    bed: Bed,
    hub: Hub,
}

impl Copied {
    fn new() -> Copied {
        let bed = Bed::copied();
        Copied { bed, hub: Hub::at("file:///nonexistent".to_owned()) }
    }

    fn snapshots(&self) -> PathBuf {
        self.bed.path("data/forkd/snapshots")
    }

    fn file(&self, name: &str) -> Vec<u8> {
        fs::read(self.snapshots().join("python-numpy").join(name)).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.bed.command(&self.hub);
        command.args(arguments);
        command
    }

    /// Runs it; returns its exit code and all it printed.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.command(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.document(arguments)).unwrap()
    }

    /// The document as it is printed.
    fn document(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).arg("--json").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// One directory a tag: no drafts.
    fn assert_only_the_snapshot(&self) {
        let left: Vec<_> = fs::read_dir(self.snapshots()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["python-numpy"]);
    }
}

fn drawn(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"), "{text}");
    text
}

#[test]
fn timelines_show_lazy_cached_eager_and_local_forks() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &["--rtt", "20ms", "--bandwidth", "50MB/s"]);
    let picture = bed.path("t.svg");
    let out = picture.to_str().unwrap();
    let fork = |arguments: &[&str]| -> (Value, String) {
        let arguments = [&["fork", "--timeline", out, "--eval", CODE], arguments].concat();
        let report = bed.json(&hub, &arguments);
        (report, drawn(&picture))
    };
    let (report, lazy) = fork(&["deeplethe/python-numpy", "-n", "3"]);
    for part in [
        "registry",
        "index",
        "machine state",
        "demand, ",
        "working set, ",
        "of memory.bin for",
        "until answered",
    ] {
        assert!(lazy.contains(part), "{part} is missing in {lazy}");
    }
    for child in report["children"].as_array().unwrap() {
        assert!(lazy.contains(child["id"].as_str().unwrap()), "{child}");
    }
    let (report, ten) = fork(&["deeplethe/python-numpy", "-n", "10"]);
    let all = report["children"].as_array().unwrap();
    assert!(all.len() == 10 && all.iter().all(|child| ten.contains(child["id"].as_str().unwrap())));
    assert!(ten.contains("10 children") && !ten.contains("capped"), "{ten}");
    let (report, eager) = fork(&["deeplethe/python-numpy", "--eager"]);
    assert!(
        eager.contains("chunks that children waited for: 0") && report["faults"]["demand"] == 0,
        "{report}"
    );
    let (report, local) = fork(&["--tag", "python-numpy"]);
    assert!(!local.contains(">registry<") && local.contains("machine state"), "{local}");
    assert_eq!(report["prefetch"]["pages"], 0);
    assert!(!bed.has_run_dirs(), "a run directory is left");
}

#[test]
fn the_report_says_what_the_trace_was_good_for() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &["--rtt", "20ms", "--bandwidth", "50MB/s"]);
    let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "-n", "2", "--eval", CODE]);
    let number = |part: &str, key: &str| {
        report[part][key].as_u64().unwrap_or_else(|| panic!("{part}.{key}: {report}"))
    };
    let (pages, touched) = (number("prefetch", "pages"), number("prefetch", "touched_pages"));
    assert_eq!(number("prefetch", "bytes"), pages * 4096);
    assert_eq!(number("prefetch", "children"), 2);
    assert!(pages > 500 && touched <= pages, "{touched} of {pages} pages");
    // What is fetched ahead is what trial restores touched, so nearly all of it is touched again.
    assert!(touched * 10 > pages * 6, "only {touched} of {pages} pages fetched ahead were touched");
    let (demand, chunks) = (number("faults", "demand"), number("faults", "demand_chunks"));
    let (on_pages, in_chunks) = (number("faults", "on_traced_pages"), number("faults", "in_traced_chunks"));
    assert!(on_pages <= in_chunks && in_chunks <= demand && chunks <= demand, "{}", report["faults"]);
    // The trace spares most faults.
    assert!(demand * 3 < touched, "{demand} faults beside {touched} pages that were there");
}

#[test]
fn what_a_child_writes_is_dirty_in_its_heatmap_alone() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &[]);
    let report = bed.json(&hub, &["fork", "deeplethe/python-numpy", "-n", "2", "--detach", "--eval", CODE]);
    let id = |at: usize| report["children"][at]["id"].as_str().unwrap().to_owned();
    bed.run(&hub, &["eval", &id(0), "globals().update(mine=numpy.ones(2000000))"]).success();
    let picture = bed.path("c.svg");
    let private = |id: &str| {
        let seen = bed.json(&hub, &["inspect", "--child", id, "--heatmap", picture.to_str().unwrap()]);
        assert!(drawn(&picture).contains(&format!("child {id} of deeplethe/python-numpy")));
        let images = seen["images"].as_array().unwrap().clone();
        assert_eq!(
            images.iter().map(|image| image["name"].as_str().unwrap()).collect::<Vec<_>>(),
            ["memory.bin", "rootfs.erofs"]
        );
        assert_eq!(
            (images[0]["pages"].as_u64(), images[1]["private_pages"].as_u64()),
            (Some(512 << 8), Some(0))
        );
        images[0]["private_pages"].as_u64().unwrap()
    };
    let (writer, sibling) = (private(&id(0)), private(&id(1)));
    // 16 MB.
    assert!(writer > sibling + 3500, "{writer} private pages, its sibling has {sibling}");
    for at in 0..2 {
        bed.run(&hub, &["kill", &id(at)]).success();
    }
    let pids = report["children"].as_array().unwrap().iter().map(|child| child["pid"].as_i64().unwrap());
    bed.assert_nothing_left(pids);
    bed.run(&hub, &["inspect", "--child", &id(0)]).failure();
}

#[test]
fn a_trace_recorded_again_replaces_the_old_one() {
    let copied = Copied::new();
    fs::write(copied.snapshots().join("python-numpy/.console"), "as it was built\n").unwrap();
    let mut golden = Golden::open("trace");
    let mut traced = |name: &str, arguments: &[&str]| -> Value {
        let document = copied.document(arguments);
        let shown = with_placeholders(&document, &["pages", "bytes", "share", "common_pages"]);
        golden.check(name, &shown.replace(copied.bed.path("").to_str().unwrap(), "<bed>/"));
        serde_json::from_str(&document).unwrap()
    };
    let report = traced("tag.json", &["trace", "--tag", "python-numpy", "--recipe", RECIPE]);
    assert_eq!(copied.run(&["logs", "--tag", "python-numpy"]), (Some(0), "as it was built\n".to_owned()));
    let (before, after) =
        (report["before"]["pages"].as_u64().unwrap(), report["after"]["pages"].as_u64().unwrap());
    let common = report["common_pages"].as_u64().unwrap();
    assert!(common * 10 > before * 8 && after * 2 > before, "{report}");
    assert_eq!(copied.file("hotset").len() as u64, after * 4096);
    // Another probe touches other pages.
    let other =
        copied.json(&["trace", "--tag", "python-numpy", "--eval", "numpy.linalg.inv(numpy.eye(64)).sum()"]);
    assert!(other["after"]["pages"].as_u64().unwrap() > other["common_pages"].as_u64().unwrap(), "{other}");
    copied.assert_only_the_snapshot();
    let (code, text) = copied.run(&["fork", "--tag", "python-numpy", "--eval", CODE]);
    assert!(code == Some(0) && text.contains(ZEROS), "{text}");
    let pack = copied.bed.path("old.tar.zst");
    let (pack, out) = (pack.to_str().unwrap(), copied.bed.path("new.tar.zst"));
    let out = out.to_str().unwrap();
    assert_eq!(copied.run(&["pack", "--tag", "python-numpy", "--out", pack]).0, Some(0));
    let report = traced("pack.json", &["trace", pack, "--out", out, "--recipe", RECIPE]);
    golden.finish();
    assert_eq!(report["out"].as_str(), Some(out));
    let inspected = copied.json(&["inspect", out]);
    assert_eq!(inspected["working_set"]["pages"], report["after"]["pages"]);
    let (code, text) = copied.run(&["fork", out, "--eval", CODE]);
    assert!(code == Some(0) && text.contains(ZEROS), "{text}");
}

#[test]
fn a_trace_that_fails_or_is_interrupted_leaves_the_old_one() {
    let copied = Copied::new();
    let old = (copied.file("trace"), copied.file("hotset"));
    let kept = || (copied.file("trace"), copied.file("hotset")) == old;
    let (code, text) = copied.run(&["trace", "--tag", "python-numpy", "--eval", "1 / 0"]);
    assert!(code == Some(1) && text.contains("ZeroDivisionError") && text.contains("is kept"), "{text}");
    assert!(kept());

    let sleep = "__import__('time').sleep(100)";
    let mut interrupted = copied
        .command(&["trace", "--tag", "python-numpy", "--eval", sleep])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let pid = rustix::process::Pid::from_child(&interrupted);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut ended = None;
    let over = || {
        ended = interrupted.try_wait().unwrap();
        ended.is_some()
    };
    assert!(wait_until(Duration::from_secs(20), over), "Ctrl-C does not end it");
    assert!(!ended.unwrap().success() && kept() && !alive(pid.as_raw_nonzero().get().into()));
    copied.assert_only_the_snapshot();

    // A machine that cannot come up: its state is cut short.
    let vmstate = copied.snapshots().join("python-numpy/vmstate");
    let bytes = fs::read(&vmstate).unwrap();
    fs::write(&vmstate, &bytes[..bytes.len() / 2]).unwrap();
    let (code, text) = copied.run(&["trace", "--tag", "python-numpy", "--recipe", RECIPE]);
    assert!(code == Some(1) && text.contains("python-numpy") && text.contains("is kept"), "{text}");
    assert!(kept());
    copied.assert_only_the_snapshot();
}

#[test]
fn a_trace_of_a_pack_is_interrupted_while_it_downloads() {
    let bed = Bed::new();
    let hub = Hub::serve(&bed, &["--bandwidth", "2MB/s"]);
    let out = bed.path("out");
    fs::create_dir(&out).unwrap();
    let new_pack = out.join("new.tar.zst");
    let arguments =
        ["trace", "deeplethe/python-numpy", "--recipe", RECIPE, "--out", new_pack.to_str().unwrap()];
    let mut interrupted = bed.command(&hub).args(arguments).stderr(Stdio::null()).spawn().unwrap();
    let busy = || fs::read_dir(&out).unwrap().count() == 1;
    assert!(wait_until(Duration::from_secs(20), busy), "nothing is unpacked");
    std::thread::sleep(Duration::from_millis(500));
    let pid = rustix::process::Pid::from_child(&interrupted);
    let since = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let ended = interrupted.wait().unwrap();
    assert!(since.elapsed() < Duration::from_secs(5), "{:?} after Ctrl-C", since.elapsed());
    assert_eq!((ended.code(), fs::read_dir(&out).unwrap().count()), (Some(130), 0));
    assert!(!bed.has_run_dirs());
}
