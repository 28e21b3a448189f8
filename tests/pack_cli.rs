//! pack, unpack, inspect, publish, pull, images, snapshots and rmi as a user runs them.

#[path = "soak/faulty.rs"]
#[allow(dead_code, reason = "the soaks use the rest")]
mod faulty;
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use faulty::{Faulty, WRONG};
use forkd_fs::digest::Digest;
use serde_json::Value;
use support::{CHUNK, Hub, Lab, dir_bytes, flip, legacy_pack, noise, wait_until};

const MEMBERS: [&str; 5] = ["snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"];

fn digest(path: &Path) -> Digest {
    Digest::of(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// Names in the snapshot directory, hidden ones included.
fn left_over(lab: &Lab) -> Vec<String> {
    let entries = fs::read_dir(lab.path("data/forkd/snapshots")).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_pack_is_an_ordinary_archive_and_unpacks_to_the_same_files() {
    let lab = Lab::new();
    let (pack, source) = (lab.pack("demo"), lab.snapshot_dir("demo"));
    let accepts = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).arg(&pack).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    accepts("zstd", &["-t", "-q"]);
    let listed = accepts("tar", &["--zstd", "-tf"]);
    assert_eq!(listed.lines().skip(1).collect::<Vec<_>>(), MEMBERS);
    let unpacked = lab.run(&["--json", "unpack", pack.to_str().unwrap(), "--tag", "copy"]).ok().json();
    assert_eq!(unpacked["tag"], "copy");
    for member in MEMBERS {
        let extracted = Command::new("tar").args(["--zstd", "-xOf"]).arg(&pack).arg(member).output().unwrap();
        let original = digest(&source.join(member));
        assert_eq!(Digest::of(&extracted.stdout), original, "tar's {member}");
        assert_eq!(digest(&lab.snapshot_dir("copy").join(member)), original, "unpack's {member}");
    }
    let sparse = fs::metadata(lab.snapshot_dir("copy").join("memory.bin")).unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&sparse) * 512 < sparse.len() / 2, "holes stay holes");
    lab.run(&["unpack", pack.to_str().unwrap(), "--tag", "copy"]).fails(1, &["`copy` already", "--force"]);
    lab.run(&["unpack", pack.to_str().unwrap(), "--tag", "copy", "--force"]).ok();
    assert_eq!(left_over(&lab), ["copy", "demo"]);
}

#[test]
fn inspect_tells_the_same_of_a_file_a_url_and_a_name() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let pack = lab.published("demo");
    let url = format!("{}{}", hub.url(), pack.file_name().unwrap().to_str().unwrap());
    let inspect = |target: &str| lab.run(&["--json", "inspect", target, "--hub", &hub.url()]).ok().json();
    let (file, web, name) = (inspect(pack.to_str().unwrap()), inspect(&url), inspect("lab/demo"));
    for report in [&file, &web, &name] {
        assert_eq!(report["pack_format"], 3);
        assert_eq!(report["tag"], "demo");
        assert_eq!(report["size_bytes"], fs::metadata(&pack).unwrap().len());
        assert_eq!(report["index"], file["index"]);
        assert_eq!(report["files"], file["files"]);
        let chunks = &report["chunks"];
        assert_eq!(chunks["size"], CHUNK);
        assert!(chunks["zero_share"].as_f64().unwrap() > 0.5, "{chunks}");
    }
    // From the hub, only the index, the manifest and the trace were read.
    let fetched = name["fetched_bytes"].as_u64().unwrap();
    assert!(fetched * 20 < name["size_bytes"].as_u64().unwrap(), "{fetched} bytes for an inspection");
    let text = lab.run(&["inspect", pack.to_str().unwrap()]).ok().stdout;
    assert!(text.contains("memory.bin") && text.contains("zero"), "{text}");
}

#[test]
fn a_cut_or_foreign_file_is_named_for_what_it_is() {
    let lab = Lab::new();
    let pack = lab.pack("demo");
    let bytes = fs::read(&pack).unwrap();
    let target = pack.to_str().unwrap();
    for (content, says) in [
        (&bytes[..bytes.len() / 2], "cut short"),
        (&bytes[..bytes.len() - 1], "cut short"),
        (&b""[..], "not a forkd pack"),
        (&b"hello, this is no pack at all, not even a little"[..], "not a forkd pack"),
    ] {
        fs::write(&pack, content).unwrap();
        for args in [&["inspect", target][..], &["unpack", target, "--tag", "x"]] {
            lab.run(args).fails(1, &[says, target]);
        }
        lab.publish(&pack, "lab/demo").fails(1, &[says]);
    }
    lab.run(&["inspect", "/nonexistent.tar.zst"]).fails(1, &["/nonexistent.tar.zst"]);
    assert_eq!(left_over(&lab), ["demo"]);
    assert!(!lab.path("hub/registry.json").exists(), "a broken pack was published");
}

#[test]
fn names_and_hubs_that_do_not_exist_come_with_a_hint() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = lab.path("hub");
    let hub = hub.to_str().unwrap();
    lab.run(&["pull", "lab/demmo", "--hub", hub]).fails(1, &["lab/demmo", "hint: did you mean lab/demo?"]);
    lab.run(&["pull", "lab/demo@v7", "--tag", "x", "--hub", hub])
        .fails(1, &["v7", "hint: there is latest, v1"]);
    lab.run(&["pull", "demo", "--hub", hub]).fails(2, &["`demo` is not a package name", "owner/name"]);
    lab.run(&["pull", "lab/demo", "--tag", "x"]).fails(2, &["no hub was named", "--hub"]);
    lab.run(&["pull", "lab/demo", "--tag", "x", "--hub", "ftp://x/"]).fails(2, &["ftp://x/"]);
    lab.run(&["images", "--hub", "/nonexistent"]).fails(1, &["/nonexistent"]);
    let failed = lab.run(&["--json", "pull", "lab/demmo", "--hub", hub]).fails(1, &["lab/demmo"]).json();
    assert_eq!(failed["error"]["hint"], "did you mean lab/demo?");
    assert_eq!(left_over(&lab), ["demo"]);
}

#[test]
fn an_unreachable_hub_is_named_within_its_deadline() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let address = Hub::start(&lab, &[]).kill();
    let started = std::time::Instant::now();
    let url = format!("http://{address}/");
    lab.run(&["images", "--hub", &url]).fails(1, &[&address, "hint: check that the server runs"]);
    assert!(started.elapsed() < Duration::from_secs(40), "{:?}", started.elapsed());
}

#[test]
fn the_hub_lists_what_was_published_and_versions_are_kept() {
    let lab = Lab::new();
    let pack = lab.pack("demo");
    lab.publish(&pack, "lab/demo").ok();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| lab.publish(&pack, "lab/demo").ok());
        }
    });
    let hub = lab.path("hub");
    let images = lab.run(&["--json", "images", "--hub", hub.to_str().unwrap()]).ok().json();
    let package = &images["packages"][0];
    assert_eq!(package["name"], "lab/demo");
    assert_eq!(package["versions"].as_array().unwrap().len(), 6, "latest and v1 to v5: {package}");
    let args =
        ["hub", "publish", pack.to_str().unwrap(), "--hub", hub.to_str().unwrap(), "--name", "lab/demo"];
    lab.run(&[&args[..], &["--version", "v3"]].concat()).fails(1, &["v3 already", "never rewritten"]);
    lab.run(&[&args[..6], &["no-slash"]].concat()).fails(2, &["`no-slash`"]);
}

#[test]
fn a_release_is_entered_and_not_made() {
    let lab = Lab::new();
    let pack = lab.pack("demo");
    let checkout = lab.path("checkout");
    fs::create_dir(&checkout).unwrap();
    let listed =
        r#"{"schema_version": 1, "packages": {"lab/other": {"versions": {"latest": {"recipe_path": "r"}}}}}"#;
    fs::write(checkout.join("registry.json"), listed).unwrap();
    let place = ["--hub", checkout.to_str().unwrap(), "--name", "lab/demo", "--github", "acme/packs"];
    let publish = [&["--json", "hub", "publish", pack.to_str().unwrap()], &place[..]].concat();
    let published = lab.run(&publish).ok().json();
    let release = &published["release"];
    assert_eq!(release["tag"], "hub-demo-v1");
    let command = release["commands"][0].as_str().unwrap();
    assert!(
        command.starts_with("gh release create hub-demo-v1 ") && command.contains(pack.to_str().unwrap())
    );
    assert_eq!(published["file"].as_str(), pack.to_str());
    // Beside the registry nothing has appeared, and what it listed is still there.
    let visible =
        |entry: fs::DirEntry| entry.file_name().into_string().ok().filter(|name| !name.starts_with('.'));
    let names: Vec<_> =
        fs::read_dir(&checkout).unwrap().filter_map(|entry| visible(entry.unwrap())).collect();
    assert_eq!(names, ["registry.json"]);
    let registry: Value = serde_json::from_slice(&fs::read(checkout.join("registry.json")).unwrap()).unwrap();
    let entry = &registry["packages"]["lab/demo"]["versions"]["v1"];
    assert_eq!((&entry["url"], &entry["release_tag"]), (&release["url"], &release["tag"]));
    assert_eq!(entry["sha256"].as_str().unwrap(), digest(&pack).to_string());
    assert!(registry["packages"]["lab/other"].is_object());
    assert_eq!(lab.run(&publish).ok().json()["release"]["tag"], "hub-demo-v2");
}

#[test]
fn the_page_of_a_hub_lists_its_packs() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let (hub, page) = (lab.path("hub"), lab.path("index.html"));
    let draw = ["hub", "page", "--hub", hub.to_str().unwrap(), "--out", page.to_str().unwrap()];
    lab.run(&draw).ok();
    let drawn = fs::read_to_string(&page).unwrap();
    assert!(drawn.starts_with("<!DOCTYPE html>") && drawn.contains("forkd fork lab/demo"), "{drawn}");
    lab.run(&[&draw[..], &["--title", "Ours"]].concat()).ok();
    assert!(fs::read_to_string(&page).unwrap().contains("<title>Ours</title>"));
    lab.run(&[&draw[..5], &["/"]].concat()).fails(1, &["no regular file"]);
}

#[test]
fn pull_goes_on_where_it_was_killed() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let total = fs::metadata(lab.published("demo")).unwrap().len();
    let hub = Hub::start(&lab, &["--bandwidth", "4MB/s"]);
    let mut first = lab.command(&["pull", "lab/demo", "--tag", "copy", "--hub", &hub.url()]).spawn().unwrap();
    wait_until("some chunks are cached", || dir_bytes(&lab.path("cache")) > total / 4);
    first.kill().unwrap();
    first.wait().unwrap();
    let kept = dir_bytes(&lab.path("cache"));
    assert!(kept < total, "it was done before it was killed");
    wait_until("the killed connections are logged", || hub.pack_bytes() >= kept / 2);
    let before = hub.pack_bytes();
    lab.run(&["pull", "lab/demo", "--tag", "copy", "--hub", &hub.url()]).ok();
    wait_until("the access log is complete", || hub.pack_bytes() + kept > total * 9 / 10);
    let second = hub.pack_bytes() - before;
    assert!(second < total - kept / 2, "{second} of {total} fetched although {kept} were kept");
    assert_eq!(
        digest(&lab.snapshot_dir("copy").join("memory.bin")),
        digest(&lab.snapshot_dir("demo").join("memory.bin"))
    );
    lab.run(&["pull", "lab/demo", "--tag", "copy", "--hub", &hub.url()]).fails(1, &["`copy` already"]);
}

#[test]
fn a_flipped_byte_fails_the_pull_and_leaves_nothing() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    flip(&lab.published("demo"), fs::metadata(lab.published("demo")).unwrap().len() / 2);
    let hub = Hub::start(&lab, &[]);
    lab.run(&["pull", "lab/demo", "--tag", "copy", "--hub", &hub.url()])
        .fails(1, &["is corrupt", "the index says", "hint: "]);
    assert_eq!(left_over(&lab), ["demo"]);
}

#[test]
fn a_changed_index_is_not_trusted() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = lab.path("hub");
    let images = lab.run(&["--json", "inspect", "lab/demo", "--hub", hub.to_str().unwrap()]).ok().json();
    flip(&lab.published("demo"), images["index"]["offset"].as_u64().unwrap() + 100);
    lab.run(&["pull", "lab/demo", "--tag", "copy", "--hub", hub.to_str().unwrap()])
        .fails(1, &["the registry says", "do not trust it"]);
}

#[test]
fn the_predecessors_packs_are_inspected_unpacked_and_pulled() {
    let lab = Lab::new();
    let memory = [vec![0; 1 << 20], noise(3, 100_000), vec![0; 1 << 20]].concat();
    let pack = legacy_pack(&lab, &memory);
    let report = lab.run(&["--json", "inspect", pack.to_str().unwrap()]).ok().json();
    assert_eq!((report["pack_format"].as_u64(), report["tag"].as_str()), (Some(1), Some("old")));
    assert!(report["unforkable"].as_str().unwrap().contains("Firecracker"));
    lab.run(&["unpack", pack.to_str().unwrap()]).ok();
    assert!(fs::read(lab.snapshot_dir("old").join("memory.bin")).unwrap() == memory);
    assert!(!Path::new("/etc/cron.d/evil").exists());
    lab.publish(&pack, "lab/old").ok();
    let hub = Hub::start(&lab, &[]);
    lab.run(&["pull", "lab/old", "--tag", "pulled", "--hub", &hub.url()]).ok();
    assert!(fs::read(lab.snapshot_dir("pulled").join("memory.bin")).unwrap() == memory);
    flip(&lab.path("hub/lab-old-v1.forkd-snapshot.tar.zst"), 40);
    lab.run(&["pull", "lab/old", "--tag", "bad", "--hub", &hub.url()]).fails(1, &["the registry says"]);
    assert_eq!(left_over(&lab), ["old", "pulled"]);
}

#[test]
fn snapshots_are_listed_and_removed() {
    let lab = Lab::new();
    assert!(lab.run(&["snapshots"]).ok().stdout.contains("no snapshots"));
    lab.snapshot("one", 4);
    lab.snapshot("two", 4);
    let listed = lab.run(&["--json", "snapshots"]).ok().json();
    let tags: Vec<_> =
        listed["snapshots"].as_array().unwrap().iter().map(|s| s["tag"].as_str().unwrap()).collect();
    assert_eq!(tags, ["one", "two"]);
    lab.run(&["rmi", "one", "three"]).fails(1, &["`three`", "forkd snapshots"]);
    lab.run(&["rmi", "../data"]).fails(2, &["`../data` is not a tag"]);
    assert_eq!(left_over(&lab), ["one", "two"], "nothing goes when one of them is wrong");
    lab.run(&["rmi", "one"]).ok();
    assert_eq!(left_over(&lab), ["two"]);
}

#[test]
fn packing_refuses_what_it_cannot_do() {
    let lab = Lab::new();
    let out = lab.path("work/x.tar.zst");
    let out = out.to_str().unwrap();
    lab.run(&["pack", "--tag", "none", "--out", out]).fails(1, &["no local snapshot `none`"]);
    lab.snapshot("demo", 4);
    lab.run(&["pack", "--tag", "demo", "--out", out, "--chunk", "100000"])
        .fails(2, &["100000", "power of two"]);
    lab.run(&["pack", "--tag", "demo", "--out", "/nonexistent/x.tar.zst"]).fails(1, &["/nonexistent"]);
    lab.run(&["pack", "--tag", "demo", "--out", out]).ok();
    lab.run(&["pack", "--tag", "demo", "--out", out]).fails(1, &["exists already", "--force"]);
    lab.run(&["pack", "--tag", "demo", "--out", out, "--force"]).ok();
}

#[test]
fn a_pull_is_whole_though_one_answer_in_five_is_not_what_was_asked() {
    for wrong in WRONG {
        let lab = Lab::new();
        lab.snapshot("demo", 64);
        lab.hub_dir("demo");
        let faulty = Faulty::start_with(lab.path("hub"), 20, &[wrong], 0);
        faulty.fail_next(wrong);
        lab.run(&["pull", "lab/demo", "--tag", "copy", "--hub", &faulty.url()]).ok();
        for member in MEMBERS {
            let (pulled, original) = (lab.snapshot_dir("copy"), lab.snapshot_dir("demo"));
            assert_eq!(digest(&pulled.join(member)), digest(&original.join(member)), "{wrong:?}: {member}");
        }
        let (requests, faults) = faulty.counts();
        println!("{requests} requests, {faults:?}");
        assert!(faults[&wrong] >= 2, "{requests} requests, {faults:?}");
    }
}
