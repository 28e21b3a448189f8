//! What shows how a fork went and what is in a pack: `inspect`'s working set and `--heatmap`, and how `trace`,
//! `--timeline` and `--child` fail, as a user runs them. With a real guest: `linux_visibility.rs`.

mod support;

use std::fs;
use std::path::Path;

use forkd_fs::trace::{PageRun, RegionTrace, Trace};
use support::{CHUNK, Lab, legacy_pack, noise};

const MIB: usize = 16;
const PAGES_PER_CHUNK: u32 = CHUNK as u32 / 4096;

/// A pack of a snapshot whose trace is `trace`.
fn packed(lab: &Lab, trace: &[u8]) -> String {
    let dir = lab.snapshot("demo", MIB);
    fs::write(dir.join("trace"), trace).unwrap();
    lab.pack("demo").to_str().unwrap().to_owned()
}

/// Three buckets in the half of the memory that is stored, with a page that two of them name, and one that is zero.
fn trace() -> Vec<u8> {
    let half = (MIB << 20) as u32 / 2 / 4096;
    let buckets = vec![
        PageRun::from_pages([0, half, half + 1]),
        PageRun::from_pages([half + 1, half + 2, half + PAGES_PER_CHUNK]),
        PageRun::from_pages([half + 5 * PAGES_PER_CHUNK]),
    ];
    let memory = RegionTrace { file: "memory.bin".into(), buckets };
    let root = RegionTrace { file: "rootfs.erofs".into(), buckets: vec![PageRun::from_pages([0])] };
    Trace { regions: vec![memory, root] }.encode().unwrap()
}

/// Names in a directory, hidden ones included.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_working_set_is_weighed_by_bucket() {
    let lab = Lab::new();
    let pack = packed(&lab, &trace());
    let report = lab.run(&["--json", "inspect", &pack]).ok().json();
    let set = &report["working_set"];
    assert_eq!((set["pages"].as_u64(), set["page_bytes"].as_u64()), (Some(7), Some(7 * 4096)), "{set}");
    let buckets = set["buckets"].as_array().unwrap();
    let numbers = |key: &str| buckets.iter().map(|bucket| bucket[key].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((numbers("pages"), numbers("chunks")), (vec![4, 3, 1], vec![2, 1, 1]), "{set}");
    assert_eq!(set["chunks"], report["chunks"]["traced"]);
    assert_eq!(set["chunk_bytes"], report["chunks"]["traced_bytes"]);
    let share = set["chunk_share"].as_f64().unwrap();
    let expected = set["chunk_bytes"].as_f64().unwrap() / report["size_bytes"].as_f64().unwrap();
    assert!((share - expected).abs() < 1e-9 && set["hotset_bytes"].is_null(), "{set}");
    let text = lab.run(&["inspect", &pack]).ok().stdout;
    assert!(text.contains("working set") && text.contains("until ready: 3 pages, 1 more chunks"), "{text}");
}

#[test]
fn a_heatmap_tells_zero_working_set_and_fetched_apart() {
    let lab = Lab::new();
    let pack = packed(&lab, &trace());
    let picture = lab.path("work/map.svg");
    let out = picture.to_str().unwrap();
    fs::write(&picture, "old").unwrap();
    lab.run(&["inspect", &pack, "--heatmap", out]).ok();
    let drawn = fs::read_to_string(&picture).unwrap();
    assert!(drawn.starts_with("<svg ") && drawn.trim_end().ends_with("</svg>"), "{drawn}");
    for part in [
        "before the first instruction: 2 chunks",
        "until ready: 1 chunks",
        "memory.bin: 16.0 MiB in 256 chunks",
        "zero, not stored: 192 chunks, 12.0 MiB",
        "chunk cache: 0 chunks",
    ] {
        assert!(drawn.contains(part), "{part} is missing in {drawn}");
    }
    // Pulled through the cache, all of it is here.
    lab.publish(Path::new(&pack), "lab/demo").ok();
    let hub = support::Hub::start(&lab, &[]);
    lab.run(&["pull", "lab/demo", "--tag", "copy", "--hub", &hub.url()]).ok();
    lab.run(&["inspect", "lab/demo", "--hub", &hub.url(), "--heatmap", out]).ok();
    let drawn = fs::read_to_string(&picture).unwrap();
    assert!(!drawn.contains("chunk cache: 0 chunks") && drawn.contains("chunk cache: "), "{drawn}");
    assert!(!names(&lab.path("work")).iter().any(|name| name.starts_with(".forkd")), "a draft is left");
}

#[test]
fn traces_that_are_empty_corrupt_or_huge_leave_nothing_to_tell() {
    let huge = vec![PageRun { first_page: 0, pages: 1 << 28 }; 50_000];
    let regions = vec![RegionTrace { file: "memory.bin".into(), buckets: vec![huge; 3] }];
    let huge = Trace { regions }.encode().unwrap();
    for (trace, told) in [(vec![], false), (noise(5, 3000), false), (vec![0; 5 << 20], false), (huge, true)] {
        let lab = Lab::new();
        let pack = packed(&lab, &trace);
        let out = lab.path("map.svg");
        let run = lab.run(&["--json", "inspect", &pack, "--heatmap", out.to_str().unwrap()]).ok();
        let set = &run.json()["working_set"];
        assert_eq!(set.is_object(), told, "{set}");
        assert_eq!(fs::read_to_string(&out).unwrap().contains("no working set is recorded"), !told);
        if told {
            assert_eq!(set["pages"].as_u64(), Some(1 << 28), "each page counts once");
        }
    }
}

#[test]
fn pictures_that_cannot_be_written_are_named_before_any_work() {
    let lab = Lab::new();
    let nowhere = lab.path("none/x.svg");
    let (nowhere, directory) = (nowhere.to_str().unwrap(), lab.path("work"));
    let directory = directory.to_str().unwrap();
    for place in [nowhere, directory] {
        // The pack does not exist either; the picture is looked at first.
        lab.run(&["inspect", "/no/pack", "--heatmap", place]).fails(1, &["draw the picture", place, "hint:"]);
        lab.run(&["fork", "/no/pack", "--timeline", place]).fails(1, &["draw the picture", place]);
        lab.run(&["inspect", "--child", "abc-1", "--heatmap", place]).fails(1, &[place]);
    }
    assert!(names(&lab.path("work")).is_empty(), "something is left");
    lab.run(&["inspect", "--child", "abc-1"]).fails(1, &["no running child `abc-1`"]);
    lab.run(&["inspect"]).fails(2, &["--child"]);
    lab.run(&["inspect", "x", "--child", "abc-1"]).fails(2, &["--child"]);
    let old = legacy_pack(&lab, &noise(3, 10_000));
    let picture = lab.path("x.svg");
    lab.run(&["inspect", old.to_str().unwrap(), "--heatmap", picture.to_str().unwrap()])
        .fails(1, &["layout 1"]);
    assert!(!picture.exists());
}

#[test]
fn a_working_set_that_cannot_be_recorded_stays_as_it_was() {
    let lab = Lab::new();
    let pack = packed(&lab, &trace());
    let dir = lab.snapshot_dir("demo");
    let before = (names(&dir), fs::read(dir.join("trace")).unwrap());
    let out = lab.path("out.tar.zst");
    let out = out.to_str().unwrap();
    lab.run(&["trace", "--tag", "none"]).fails(1, &["no local snapshot `none`", "forkd snapshots"]);
    lab.run(&["trace", "--tag", "demo"]).fails(1, &["demo has no probe", "--eval CODE"]);
    lab.run(&["trace", "--tag", "demo", "--eval", "1"]).fails(1, &["snapshot.json"]);
    lab.run(&["trace", "--tag", "demo", "--recipe", "/no/recipe"]).fails(2, &["/no/recipe"]);
    let recipe = lab.path("recipe");
    fs::create_dir(&recipe).unwrap();
    fs::write(recipe.join("recipe.toml"), "name = \"x\"\n[base]\nsuite = \"bookworm\"\n").unwrap();
    let recipe = recipe.to_str().unwrap();
    lab.run(&["trace", "--tag", "demo", "--recipe", recipe]).fails(1, &["has no probe", "hint:"]);
    for bad in [
        &["trace"][..],
        &["trace", &pack],
        &["trace", "--tag", "demo", "--out", out],
        &["trace", "--tag", "demo", "--eval", "1", "--recipe", "r"],
        &["trace", "x", "--tag", "demo", "--out", out],
    ] {
        lab.run(bad).fails(2, &["Usage"]);
    }
    lab.run(&["trace", "/no/pack", "--out", out, "--eval", "1"]).fails(1, &["/no/pack"]);
    lab.run(&["trace", &pack, "--out", out]).fails(1, &["has no probe"]);
    lab.run(&["trace", &pack, "--out", &pack, "--eval", "1"]).fails(1, &["exists already", "--force"]);
    lab.run(&["trace", &pack, "--out", "/no/dir/x", "--eval", "1"]).fails(1, &["/no/dir/x"]);
    let old = legacy_pack(&lab, &noise(3, 10_000));
    lab.run(&["trace", old.to_str().unwrap(), "--out", out, "--eval", "1"]).fails(1, &["layout 1"]);
    assert_eq!((names(&dir), fs::read(dir.join("trace")).unwrap()), before);
    assert_eq!(names(&lab.path("data/forkd/snapshots")), ["demo"], "a draft is left");
    assert!(!Path::new(out).exists());
}
