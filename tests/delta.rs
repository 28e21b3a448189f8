//! Delta packs as a user makes, publishes, mounts, pulls and compares them.

#[path = "support/small_disk.rs"]
mod small_disk;
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use forkd_fs::digest::Digest;
use serde_json::Value;
use small_disk::SmallDisk;
use support::{CHUNK, Hub, Lab, Mount, Run, noise, wait_until};

const MEMBERS: [&str; 5] = ["snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn digest(path: &Path) -> Digest {
    Digest::of(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// A snapshot that is `from` with a new page in each of some chunks of 64 KiB, and another state.
fn later(lab: &Lab, from: &str, tag: &str, chunks: &[usize]) -> PathBuf {
    let dir = lab.snapshot_dir(tag);
    let copied =
        Command::new("cp").args(["-a", "--sparse=always"]).arg(lab.snapshot_dir(from)).arg(&dir).status();
    assert!(copied.unwrap().success());
    let memory = File::options().write(true).open(dir.join("memory.bin")).unwrap();
    for &chunk in chunks {
        let page = noise((chunk as u64 + 1) * 1000 + tag.len() as u64 + u64::from(tag.as_bytes()[0]), 4096);
        memory.write_all_at(&page, (chunk * CHUNK + 4096) as u64).unwrap();
    }
    fs::write(dir.join("vmstate"), noise(tag.bytes().map(u64::from).sum(), 5000)).unwrap();
    dir
}

fn pack_path(lab: &Lab, tag: &str) -> PathBuf {
    lab.path("work").join(format!("{tag}.forkd-snapshot.tar.zst"))
}

fn delta_args<'a>(tag: &'a str, base: &'a str, out: &'a Path) -> Vec<&'a str> {
    vec!["--json", "pack", "--tag", tag, "--delta", "--base", base, "--out", text(out)]
}

/// Packs `tag` as a delta of the pack of `base`.
fn delta(lab: &Lab, tag: &str, base: &str) -> (PathBuf, Value) {
    let (out, base) = (pack_path(lab, tag), pack_path(lab, base));
    let report = lab.run(&delta_args(tag, text(&base), &out)).ok().json();
    (out, report)
}

/// A base and a delta of it, packed.
fn base_and_delta(lab: &Lab) -> (PathBuf, PathBuf) {
    let base = lab.pack("base");
    later(lab, "base", "delta", &[3, 140, 150]);
    let (delta, report) = delta(lab, "delta", "base");
    assert_eq!(report["stored_chunks"], 3 + 3, "{report}");
    assert!(fs::metadata(&delta).unwrap().len() * 10 < fs::metadata(&base).unwrap().len());
    (base, delta)
}

fn same_files(lab: &Lab, one: &Path, tag: &str) {
    for member in MEMBERS {
        assert_eq!(digest(&one.join(member)), digest(&lab.snapshot_dir(tag).join(member)), "{member}");
    }
}

/// What is left of packing in the lab's working directory.
fn left_over(lab: &Lab) -> Vec<String> {
    let entries = fs::read_dir(lab.path("work")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_chain_of_eight_deltas_mounts_as_the_flattened_pack() {
    let lab = Lab::new();
    lab.snapshot("m0", 8);
    lab.pack("m0");
    lab.publish(&pack_path(&lab, "m0"), "lab/m0").ok();
    for moment in 1..=8 {
        let (before, tag) = (format!("m{}", moment - 1), format!("m{moment}"));
        later(&lab, &before, &tag, &[moment, 64 + moment, 100]);
        let (pack, report) = delta(&lab, &tag, &before);
        assert_eq!(report["bases"].as_array().unwrap().len(), moment, "{report}");
        lab.publish(&pack, &format!("lab/{tag}")).ok();
    }
    let hub_dir = lab.path("hub");
    let flat = lab.path("work/flat.tar.zst");
    let repack = ["repack", "lab/m8", "--chunk", "64KiB", "--out", text(&flat), "--hub", text(&hub_dir)];
    lab.run(&repack).ok();
    let inspected = lab.run(&["--json", "inspect", text(&flat)]).ok().json();
    assert_eq!((inspected["bases"].as_array().unwrap().len(), &inspected["tag"]), (0, &"m8".into()));
    lab.publish(&flat, "lab/flat").ok();
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    same_files(&lab, &mount.version("m8"), "m8");
    for member in MEMBERS {
        assert_eq!(
            digest(&mount.version("m8").join(member)),
            digest(&mount.version("flat").join(member)),
            "{member}"
        );
    }
    fs::read(mount.version("m8").join("manifest.toml")).unwrap();
    let stats = mount.stats("m8");
    assert_eq!(
        (&stats["chunks_fetched"], &stats["failed_reads"]),
        (&stats["chunks_total"], &0.into()),
        "{stats}"
    );
    // The ninth does not name a ninth pack, and is whole all the same.
    later(&lab, "m8", "m9", &[9]);
    let (pack, report) = delta(&lab, "m9", "m8");
    assert_eq!(report["bases"].as_array().unwrap().len(), 8, "{report}");
    lab.run(&["unpack", text(&pack), "--tag", "copy", "--hub", &hub.url()]).ok();
    same_files(&lab, &lab.snapshot_dir("copy"), "m9");
}

#[test]
fn every_command_reads_a_delta_whose_base_is_beside_it() {
    let lab = Lab::new();
    let (base, delta) = base_and_delta(&lab);
    lab.run(&["unpack", text(&delta), "--tag", "copy"]).ok();
    same_files(&lab, &lab.snapshot_dir("copy"), "delta");
    let report = lab.run(&["--json", "inspect", text(&delta)]).ok().json();
    assert_eq!(report["bases"][0]["location"], text(&base));
    assert_eq!(report["chunks"]["in_bases"], report["bases"][0]["chunks"]);
    let shown = lab.run(&["inspect", text(&delta)]).ok().stdout;
    assert!(shown.contains("base") && shown.contains(text(&base)), "{shown}");
    let whole = lab.path("work/whole.tar.zst");
    lab.run(&["repack", text(&delta), "--out", text(&whole)]).ok();
    fs::remove_file(&base).unwrap();
    lab.run(&["unpack", text(&whole), "--tag", "again"]).ok();
    same_files(&lab, &lab.snapshot_dir("again"), "delta");
}

#[test]
fn a_base_that_is_nowhere_is_named_with_what_to_do() {
    let lab = Lab::new();
    let (base, delta) = base_and_delta(&lab);
    let sha256 = lab.run(&["--json", "inspect", text(&base)]).ok().json()["index"]["sha256"].clone();
    let sha256 = sha256.as_str().unwrap();
    fs::remove_file(&base).unwrap();
    let out = lab.path("work/out.tar.zst");
    let says =
        [sha256, "nowhere to be found", "hint: put it beside the delta as base.forkd-snapshot.tar.zst"];
    lab.run(&["unpack", text(&delta), "--tag", "x"]).fails(1, &says);
    lab.run(&["repack", text(&delta), "--out", text(&out)]).fails(1, &says);
    lab.run(&["fork", text(&delta)]).fails(1, &says);
    assert!(!lab.snapshot_dir("x").exists() && !out.exists());
    // What the delta has itself can be looked at.
    let report = lab.run(&["--json", "inspect", text(&delta)]).ok().json();
    assert_eq!((&report["bases"][0]["location"], report["tag"].as_str()), (&Value::Null, Some("delta")));
    // A mount shows the pack and says why it cannot be read.
    lab.publish(&delta, "lab/delta").ok();
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    let read = fs::read(mount.version("delta").join("memory.bin")).unwrap_err();
    assert_eq!(read.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    let why = fs::read_to_string(mount.dir.join(".forkd/stats.json")).unwrap();
    assert!(why.contains(sha256), "{why}");
}

#[test]
fn a_base_that_was_replaced_by_another_of_its_name_is_refused() {
    let lab = Lab::new();
    let (base, delta) = base_and_delta(&lab);
    let unpack = || -> Run { lab.run(&["unpack", text(&delta), "--tag", "x", "--force"]) };
    unpack().ok();
    later(&lab, "base", "other", &[7]);
    fs::remove_file(&base).unwrap();
    lab.run(&["pack", "--tag", "other", "--chunk", "64KiB", "--out", text(&base)]).ok();
    unpack()
        .fails(1, &["is another one", text(&base), "hint: only the pack that the delta was made of will do"]);
    // Under a hub's name, too: the digest decides.
    lab.publish(&base, "lab/base").ok();
    let hub = lab.path("hub");
    lab.run(&["unpack", text(&delta), "--tag", "x", "--force", "--hub", text(&hub)])
        .fails(1, &["is another one"]);
    // The right one under any name will do.
    lab.run(&["pack", "--tag", "base", "--chunk", "64KiB", "--out", text(&base), "--force"]).ok();
    let moved = lab.path("moved.tar.zst");
    fs::rename(&base, &moved).unwrap();
    lab.publish(&moved, "lab/elsewhere").ok();
    lab.run(&["unpack", text(&delta), "--tag", "x", "--force", "--hub", text(&hub)]).ok();
    same_files(&lab, &lab.snapshot_dir("x"), "delta");
}

#[test]
fn a_base_on_another_host_is_found_by_its_registry_or_by_what_the_delta_says() {
    let (bases, lab) = (Lab::new(), Lab::new());
    bases.hub_dir("base");
    let other = Hub::start(&bases, &[]);
    lab.snapshot("base", 16);
    later(&lab, "base", "delta", &[3]);
    let out = pack_path(&lab, "delta");
    let packed =
        lab.run(&[&delta_args("delta", "lab/base", &out)[..], &["--hub", &other.url()]].concat()).ok();
    assert_eq!(packed.json()["stored_chunks"], 3 + 1);
    let published = lab.publish(&out, "lab/delta").ok();
    assert!(
        published.stderr.contains("is not in this registry") && published.stderr.contains(&other.url()),
        "{}",
        published.stderr
    );
    let registry: Value = serde_json::from_slice(&fs::read(lab.path("hub/registry.json")).unwrap()).unwrap();
    assert_eq!(registry["packages"]["lab/delta"]["versions"]["v1"]["bases"], packed.json()["bases"]);
    let hub = Hub::start(&lab, &[]);
    lab.run(&["pull", "lab/delta", "--tag", "pulled", "--hub", &hub.url()]).ok();
    same_files(&lab, &lab.snapshot_dir("pulled"), "delta");
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    same_files(&lab, &mount.version("delta"), "delta");
    drop(mount);
    // All of it is in the cache now: neither host is needed.
    let (hub_url, _) = (hub.url(), (hub.kill(), other.kill()));
    lab.run(&["pull", "lab/delta", "--tag", "offline", "--hub", &hub_url]).ok();
    same_files(&lab, &lab.snapshot_dir("offline"), "delta");
    fs::remove_dir_all(lab.path("cache/forkd/chunks")).unwrap();
    lab.run(&["unpack", text(&out), "--tag", "x"])
        .fails(1, &["nowhere to be found", "hint: it was at http://"]);
    // Published where the delta is, the base is found there.
    let own = bases.published("base");
    let noted = lab.publish(&own, "lab/base").ok();
    assert!(noted.stderr.is_empty(), "{}", noted.stderr);
    assert!(!lab.publish(&out, "lab/delta").ok().stderr.contains("is not in this registry"));
    let hub = Hub::start(&lab, &[]);
    lab.run(&["pull", "lab/delta", "--tag", "x", "--hub", &hub.url()]).ok();
    same_files(&lab, &lab.snapshot_dir("x"), "delta");
}

#[test]
fn packing_a_delta_refuses_what_makes_none() {
    let lab = Lab::new();
    let (base, out) = (lab.pack("base"), lab.path("work/x.tar.zst"));
    let out = text(&out);
    lab.run(&["pack", "--tag", "base", "--delta", "--out", out])
        .fails(2, &["does not know", "--base FILE|URL|REF"]);
    lab.run(&["pack", "--tag", "base", "--base", text(&base), "--out", out]).fails(2, &["--delta"]);
    let against = |base: &str, more: &[&str]| {
        lab.run(&[&["pack", "--tag", "base", "--delta", "--base", base, "--out", out], more].concat())
    };
    let dir = lab.snapshot_dir("base");
    against(text(&dir), &[]).fails(2, &["is a local snapshot", "forkd pack --tag"]);
    against("/nonexistent.tar.zst", &[]).fails(1, &["/nonexistent.tar.zst"]);
    against(text(&base), &["--chunk", "128KiB"]).fails(2, &["65536", "131072", "leave --chunk out"]);
    let onto_itself =
        ["pack", "--tag", "base", "--delta", "--base", text(&base), "--force", "--out", text(&base)];
    lab.run(&onto_itself).fails(2, &["is the base itself"]);
    assert!(!Path::new(out).exists() && left_over(&lab).is_empty());
    against(text(&base), &[]).ok();
}

#[test]
fn two_at_once_and_one_killed_leave_a_whole_pack_and_nothing_else() {
    let lab = Lab::new();
    let (_, pack) = base_and_delta(&lab);
    let base = pack_path(&lab, "base");
    let again = [&delta_args("delta", text(&base), &pack)[..], &["--force"]].concat();
    let mut both = [lab.command(&again).spawn().unwrap(), lab.command(&again).spawn().unwrap()];
    assert!(both.iter_mut().all(|run| run.wait().unwrap().success()));
    lab.run(&["unpack", text(&pack), "--tag", "copy"]).ok();
    same_files(&lab, &lab.snapshot_dir("copy"), "delta");
    lab.snapshot("large", 256);
    let out = pack_path(&lab, "large");
    let mut killed = lab.command(&delta_args("large", text(&base), &out)).spawn().unwrap();
    wait_until("it has begun", || !left_over(&lab).is_empty());
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(!out.exists());
    lab.run(&delta_args("large", text(&base), &out)).ok();
    assert_eq!(left_over(&lab), [""; 0]);
}

#[test]
fn a_full_disk_ends_packing_and_unpacking_with_nothing_left() {
    let lab = Lab::new();
    let (_, delta) = base_and_delta(&lab);
    let disk = SmallDisk::mount(lab.path("small"), 200);
    later(&lab, "base", "much", &(128..200).collect::<Vec<_>>());
    let out = disk.dir.join("much.tar.zst");
    lab.run(&delta_args("much", text(&pack_path(&lab, "base")), &out)).fails(1, &[text(&out)]);
    let unpacked: Run =
        lab.command(&["unpack", text(&delta)]).env("XDG_DATA_HOME", &disk.dir).output().unwrap().into();
    unpacked.fails(1, &["hint: make room there"]);
    let files = Command::new("find").arg(&disk.dir).args(["-type", "f"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&files.stdout), "");
}

#[test]
fn a_delta_of_a_newer_kind_is_refused_by_name() {
    let lab = Lab::new();
    let (_, delta) = base_and_delta(&lab);
    let at = lab.run(&["--json", "inspect", text(&delta)]).ok().json()["index"]["offset"].as_u64().unwrap();
    // A flag that this forkd does not know, as its predecessor does not know that of deltas.
    let file = File::options().write(true).open(&delta).unwrap();
    file.write_all_at(&[3], at + 20).unwrap();
    lab.run(&["unpack", text(&delta), "--tag", "x"]).fails(
        1,
        &["layout 3 with flags 0x3, this forkd reads 3 with 0x1", "hint: a newer forkd may read it"],
    );
}

#[test]
fn diff_counts_what_was_changed_whatever_is_compared() {
    let lab = Lab::new();
    let (base, delta) = base_and_delta(&lab);
    let region = |report: &Value, file: &str| {
        let regions = report["regions"].as_array().unwrap();
        regions.iter().find(|region| region["file"] == file).unwrap().clone()
    };
    let whole = lab.path("work/whole.tar.zst");
    lab.run(&["repack", text(&delta), "--chunk", "128KiB", "--out", text(&whole)]).ok();
    let picture = lab.path("work/diff.svg");
    let pairs: [&[&str]; 6] = [
        &[text(&delta)],
        &[text(&delta), text(&base)],
        &["delta", "base"],
        &[text(&delta), "base"],
        &["delta", text(&base)],
        &[text(&whole), text(&base)],
    ];
    for pair in pairs {
        let report = lab.run(&[&["--json", "diff", "--svg", text(&picture)], pair].concat()).ok().json();
        let memory = region(&report, "memory.bin");
        assert_eq!(
            (&memory["chunks_differing"], &memory["pages_differing"]),
            (&3.into(), &3.into()),
            "{pair:?}: {memory}"
        );
        assert_eq!(memory["pages"], (16 << 20) / 4096);
        // A page of noise over noise or zeros: a byte in 256 stays.
        let bytes = memory["bytes_differing"].as_u64().unwrap();
        assert!((12_000..=3 * 4096).contains(&bytes), "{bytes}");
        assert_eq!(region(&report, "rootfs.erofs")["chunks_differing"], 0);
        assert_eq!(region(&report, "vmstate")["chunks_differing"], 1);
        let drawn = fs::read_to_string(&picture).unwrap();
        // The state is a chunk of its own colour where chunks are small.
        let expected =
            ["twenty differs: 4 chunks", "a few pages differ: 3 chunks", "a few pages differ: 4 chunks"];
        assert!(expected.iter().any(|text| drawn.contains(text)), "{drawn}");
    }
    // Only what differs was read: three chunks, the state and the manifest aside.
    let report = lab.run(&["--json", "diff", text(&delta)]).ok().json();
    assert_eq!(report["compared_bytes"], 3 * CHUNK + 5000);
    let same = lab.run(&["--json", "diff", "delta", text(&delta)]).ok().json();
    assert!(
        same["regions"].as_array().unwrap().iter().all(|region| region["bytes_differing"] == 0),
        "{same}"
    );
    let shown = lab.run(&["diff", text(&delta)]).ok().stdout;
    assert!(shown.contains("memory.bin") && shown.contains("DIFFER"), "{shown}");
    lab.run(&["diff", "base"]).fails(2, &["does not say what it is based on", "forkd diff TARGET BASE"]);
    fs::remove_file(&base).unwrap();
    lab.run(&["diff", text(&delta)]).fails(1, &["nowhere to be found"]);
}
