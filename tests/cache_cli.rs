//! The chunk cache and the copies of registries as their user sees them: `forkd cache`, hubs that are away, mounts that
//! notice new versions, daemons that are killed, downloads that go on.

mod support;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::{Hub, Lab, Mount, flip, is_running, wait_until};

fn read_all(mount: &Mount<'_>, lab: &Lab, tag: &str) {
    for member in ["manifest.toml", "snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"] {
        let mounted = fs::read(mount.version(tag).join(member)).unwrap();
        if member != "manifest.toml" {
            assert!(mounted == fs::read(lab.snapshot_dir(tag).join(member)).unwrap(), "{member}");
        }
    }
}

fn cached_chunks(lab: &Lab) -> Vec<PathBuf> {
    let folders = fs::read_dir(lab.path("cache/forkd/chunks")).unwrap().flatten();
    let files = folders.filter_map(|folder| fs::read_dir(folder.path()).ok()).flatten().flatten();
    files.map(|file| file.path()).collect()
}

fn json(lab: &Lab, args: &[&str]) -> Value {
    lab.run(&[&["--json"], args].concat()).ok().json()
}

#[test]
fn the_cache_is_listed_verified_and_emptied() {
    let lab = Lab::new();
    let empty = json(&lab, &["cache", "ls"]);
    assert_eq!((empty["chunks"].as_u64(), empty["packs"].as_array().map(Vec::len)), (Some(0), Some(0)));
    assert_eq!(json(&lab, &["cache", "verify"])["damaged"], 0);
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    fs::read(mount.version("demo").join("vmstate")).unwrap();
    wait_until("a chunk is cached", || json(&lab, &["cache", "ls"])["packs"][0]["chunks"] == 1);
    read_all(&mount, &lab, "demo");
    drop(mount);
    let full = json(&lab, &["cache", "ls"]);
    let pack = &full["packs"][0];
    assert_eq!((&pack["name"], &pack["complete"]), (&"lab/demo@latest".into(), &true.into()), "{full}");
    assert_eq!(pack["chunks"], pack["chunks_total"]);
    assert!(full["bytes"].as_u64() > pack["bytes"].as_u64(), "the index is there too");

    let entry = cached_chunks(&lab).into_iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    flip(&entry, 100);
    let verified = lab.run(&["--json", "cache", "verify"]);
    assert_eq!((verified.code, verified.json()["damaged"].as_u64()), (Some(1), Some(1)));
    assert!(!entry.exists());
    assert_eq!(json(&lab, &["cache", "ls"])["packs"][0]["complete"], false);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    read_all(&mount, &lab, "demo");
    drop(mount);
    assert!(entry.exists(), "what was damaged is fetched again");
    assert_eq!(json(&lab, &["cache", "gc"])["removed_files"], 1, "the damaged one that was put aside");
    let smaller = json(&lab, &["cache", "gc", "--cache-size", "2MiB"]);
    assert!(smaller["bytes"].as_u64().unwrap() <= 2 << 20, "{smaller}");
    assert_eq!(json(&lab, &["cache", "gc", "--all"])["chunks"], 0);
}

#[test]
fn complete_packs_are_read_while_the_hub_is_away() {
    let lab = Lab::new();
    lab.hub_dir("whole");
    lab.hub_dir("part");
    let hub = Hub::start(&lab, &[]);
    let url = hub.url();
    let mount = Mount::new(&lab, "mnt", &url, &[]);
    read_all(&mount, &lab, "whole");
    let seen = File::open(mount.version("part").join("vmstate")).unwrap();
    let mut bytes = Vec::new();
    (&seen).read_to_end(&mut bytes).unwrap();
    drop(seen);
    drop(mount);
    hub.kill();
    let listed = lab.run(&["images", "--hub", &url]).ok();
    assert!(listed.stdout.contains("lab/whole"), "{}", listed.stdout);
    assert!(listed.stderr.contains("cannot be reached"), "it is said: {}", listed.stderr);
    let mount = Mount::new(&lab, "mnt", &url, &["--deadline", "300ms"]);
    read_all(&mount, &lab, "whole");
    assert_eq!(fs::read(mount.version("part").join("vmstate")).unwrap(), bytes);
    let missing = fs::read(mount.version("part").join("memory.bin")).unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(5), "what is not here is an I/O error, not a hang");
    let pulled = lab.run(&["pull", "lab/whole", "--tag", "copy", "--hub", &url]).ok();
    assert!(pulled.stdout.contains("copy"));
    // A hub never seen before has no copy to serve.
    let unknown = lab.run(&["images", "--hub", "http://127.0.0.1:1/"]);
    assert_eq!(unknown.code, Some(1));
}

#[test]
fn new_versions_appear_while_mounted() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &["--refresh", "100ms"]);
    let package = mount.dir.join("lab/demo");
    assert_eq!(fs::read_link(package.join("latest")).unwrap(), Path::new("v1"));
    assert!(fs::metadata(package.join("v2")).is_err(), "also a name that was looked for before it came");
    let open = File::open(mount.version("demo").join("memory.bin")).unwrap();
    lab.snapshot("other", 8);
    let pack = lab.pack("other");
    lab.publish(&pack, "lab/demo").ok();
    lab.publish(&pack, "lab/fresh").ok();
    wait_until("the new version shows", || {
        let latest = fs::read_link(package.join("latest")).is_ok_and(|target| target == Path::new("v2"));
        let names: Vec<_> = fs::read_dir(mount.dir.join("lab")).unwrap().flatten().collect();
        latest && names.len() == 2
    });
    let memory = |dir: PathBuf| fs::read(dir.join("memory.bin")).unwrap();
    assert!(memory(package.join("latest")) == memory(lab.snapshot_dir("other")));
    assert!(memory(mount.dir.join("lab/fresh/v1")) == memory(lab.snapshot_dir("other")));
    let mut byte = [0; 4096];
    open.read_exact_at(&mut byte, 8 << 20).unwrap();
    let original = File::open(lab.snapshot_dir("demo").join("memory.bin")).unwrap();
    let mut expected = [0; 4096];
    original.read_exact_at(&mut expected, 8 << 20).unwrap();
    assert!(byte == expected, "what was open stays what it was");
    // A registry that goes away, or breaks, changes nothing.
    fs::write(lab.path("hub/registry.json"), b"not a registry").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(fs::read_link(package.join("latest")).unwrap(), Path::new("v2"));
}

#[test]
fn a_killed_daemon_is_unmounted_at_once() {
    let lab = Lab::new();
    let dir = lab.hub_dir("demo");
    let mount = Mount::new(&lab, "mnt", dir.to_str().unwrap(), &[]);
    fs::read(mount.version("demo").join("vmstate")).unwrap();
    kill_process(Pid::from_raw(mount.pid as i32).unwrap(), Signal::KILL).unwrap();
    let mounts = || fs::read_to_string("/proc/self/mounts").unwrap();
    let place = mount.dir.to_str().unwrap();
    wait_until("the dead mount is gone", || !mounts().contains(place));
    assert_eq!(fs::read_dir(&mount.dir).unwrap().count(), 0, "the mountpoint is an empty directory again");
    wait_until("its record too", || fs::read_dir(lab.path("run/forkd/mounts")).unwrap().count() == 0);
}

/// A registry without pins: what a publisher has who never heard of our fields.
fn unpin(lab: &Lab) {
    let path = lab.path("hub/registry.json");
    let mut registry: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (_, package) in registry["packages"].as_object_mut().unwrap() {
        for (_, version) in package["versions"].as_object_mut().unwrap() {
            let version = version.as_object_mut().unwrap();
            version.retain(|field, _| !field.starts_with("index_"));
            assert!(version.contains_key("sha256"));
        }
    }
    fs::write(path, registry.to_string()).unwrap();
}

#[test]
fn a_killed_download_goes_on_where_it_stopped() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    unpin(&lab);
    let hub = Hub::start(&lab, &["--bandwidth", "2MB/s"]);
    let total = fs::metadata(lab.published("demo")).unwrap().len();
    let args = ["pull", "lab/demo", "--tag", "copy", "--hub", &hub.url()];
    let mut pull = lab.command(&args).spawn().unwrap();
    let partial = || {
        let files = fs::read_dir(lab.path("cache/forkd/downloads")).into_iter().flatten().flatten();
        files.map(|file| file.metadata().unwrap().len()).sum::<u64>()
    };
    wait_until("a part of it is here", || partial() > total / 8);
    pull.kill().unwrap();
    pull.wait().unwrap();
    assert!(!is_running(pull.id()) && partial() < total);
    let here = partial();
    wait_until("the hub has logged what it sent", || hub.pack_bytes() >= here);
    let before = hub.pack_bytes();
    lab.run(&args).ok();
    let memory = |tag: &str| fs::read(lab.snapshot_dir(tag).join("memory.bin")).unwrap();
    assert!(memory("copy") == memory("demo"));
    let fetched = hub.pack_bytes() - before;
    assert!(fetched <= total - here + 100_000, "the rest only: {fetched} of {total}, {here} were here");
    assert_eq!(partial(), 0, "and nothing stays of it");
}

#[test]
fn a_partial_download_that_is_something_else_is_started_anew() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    unpin(&lab);
    let registry: Value = serde_json::from_slice(&fs::read(lab.path("hub/registry.json")).unwrap()).unwrap();
    let sha256 = registry["packages"]["lab/demo"]["versions"]["v1"]["sha256"].as_str().unwrap();
    let downloads = lab.path("cache/forkd/downloads");
    fs::create_dir_all(&downloads).unwrap();
    let partial = downloads.join(format!("{sha256}.partial"));
    for left in [vec![7; 100_000], vec![7; 64 << 20]] {
        fs::write(&partial, left).unwrap();
        let hub = lab.path("hub");
        lab.run(&["pull", "lab/demo", "--tag", "copy", "--force", "--hub", hub.to_str().unwrap()]).ok();
        assert!(!partial.exists());
    }
    // A pack that is not what the registry says leaves nothing either.
    flip(&lab.published("demo"), 5000);
    let hub = lab.path("hub");
    let failed = lab.run(&["pull", "lab/demo", "--tag", "copy", "--force", "--hub", hub.to_str().unwrap()]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("the registry says"), "{}", failed.stderr);
    assert!(!partial.exists() && lab.snapshot_dir("copy").exists());
    fs::write(&partial, b"half").unwrap();
    assert_eq!(json(&lab, &["cache", "gc"])["removed_files"], 0, "a fresh one may be going on");
    assert_eq!(json(&lab, &["cache", "gc", "--all"])["removed_files"].as_u64().map(|n| n > 0), Some(true));
    assert!(!partial.exists());
}
