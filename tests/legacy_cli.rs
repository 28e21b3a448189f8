//! The predecessor's packs as a user meets them: repacked, inspected over HTTP, mounted, and refused for forking.

#[path = "support/small_disk.rs"]
mod small_disk;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use forkd_engine::fork::template::{Template, TemplateError};
use forkd_fs::digest::Digest;
use forkd_fs::manifest::MAX_MANIFEST_LEN;
use forkd_fs::store::{PackLocation, PackSource, Store, StoreOptions};
use forkd_vmm::kvm::KvmKind;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use small_disk::SmallDisk;
use support::{Hub, Lab, Mount, flip, legacy_pack, noise, wait_until};

type Members = BTreeMap<String, Vec<u8>>;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn listing(path: &str, plain: &[u8]) -> String {
    format!("path = \"{path}\"\nsize = {}\nsha256 = \"{}\"\n", plain.len(), Digest::of(plain))
}

/// One zstd frame of a tar with these members, as the predecessor wrote them.
fn write_pack(lab: &Lab, name: &str, members: &[(String, Vec<u8>)]) -> PathBuf {
    let dir = lab.path(&format!("{name}.members"));
    for (path, plain) in members {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, plain).unwrap();
    }
    let out = lab.path(&format!("{name}.forkd-snapshot.tar.zst"));
    let mut tar = Command::new("tar");
    tar.arg("--zstd").arg("-cf").arg(&out).arg("-C").arg(&dir).args(members.iter().map(|(path, _)| path));
    assert!(tar.status().unwrap().success());
    out
}

fn memory() -> Vec<u8> {
    [vec![0; 3 << 20], noise(3, 700_001), vec![0; 2 << 20]].concat()
}

/// Layout 1 with a root disk and a manifest that lists everything.
fn version_1(lab: &Lab) -> (PathBuf, Members) {
    let members = [
        ("snapshot.json", b"{\"vcpu\":1}".to_vec()),
        ("vmstate", noise(1, 5000)),
        ("rootfs.ext4", noise(2, 900_000)),
        ("memory.bin", memory()),
    ];
    let mut manifest =
        "forkd_pack_version = 1\ntag = \"one\"\ndescription = \"d\"\nbase_image = \"debian:bookworm\"\n"
            .to_owned();
    manifest += "created_at = \"2025-01-02T03:04:05Z\"\nforkd_version = \"0.4\"\n";
    for (name, plain) in &members {
        manifest += &format!("[[files]]\n{}", listing(name, plain));
    }
    let all = [("manifest.toml", manifest.into_bytes())].into_iter().chain(members);
    let all: Vec<_> = all.map(|(name, plain)| (name.to_owned(), plain)).collect();
    let pack = write_pack(lab, "one", &all);
    let mut members: Members = all.into_iter().collect();
    members.insert("manifest.old.toml".into(), members["manifest.toml"].clone());
    members.remove("manifest.toml");
    (pack, members)
}

/// Layout 2: a chain of two links.
fn version_2(lab: &Lab) -> (PathBuf, Members) {
    let mut manifest = "forkd_pack_version = 2\ntag = \"child\"\nparent_tag = \"base\"\n".to_owned();
    let (mut packed, mut members) = (Vec::new(), Members::new());
    for (tag, seed) in [("base", 20), ("child", 30)] {
        manifest += &format!("[[chain]]\ntag = \"{tag}\"\n");
        let files =
            [("snapshot.json", b"{}".to_vec()), ("vmstate", noise(seed, 4000)), ("memory.bin", memory())];
        for (name, plain) in files {
            manifest += &format!("[[chain.files]]\n{}", listing(name, &plain));
            members.insert(format!("{tag}.{name}"), plain.clone());
            packed.push((format!("{tag}/{name}"), plain));
        }
    }
    members.insert("manifest.old.toml".into(), manifest.clone().into_bytes());
    packed.insert(0, ("manifest.toml".to_owned(), manifest.into_bytes()));
    (write_pack(lab, "two", &packed), members)
}

/// What ordinary tools find in a pack.
fn members_by_tar(pack: &Path) -> Members {
    assert!(Command::new("zstd").args(["-t", "-q"]).arg(pack).status().unwrap().success());
    let tar = |args: &[&str]| {
        let output =
            Command::new("tar").arg("--zstd").args(&args[..1]).arg(pack).args(&args[1..]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let names = String::from_utf8(tar(&["-tf"])).unwrap();
    assert_eq!(names.lines().next(), Some("manifest.toml"), "{names}");
    names.lines().skip(1).map(|name| (name.to_owned(), tar(&["-xOf", name]))).collect()
}

/// Names in a directory, hidden ones included.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        (fs::read_dir(dir).unwrap()).map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn assert_same(found: &Members, expected: &Members) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, plain) in expected {
        assert!(found[name] == *plain, "{name} differs");
    }
}

/// A directory for results with nothing else in it.
fn out_dir(lab: &Lab) -> PathBuf {
    let dir = lab.path("out");
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn repack(lab: &Lab, target: &str, out: &Path, more: &[&str]) -> Value {
    lab.run(&[&["--json", "repack", target, "--out", text(out)], more].concat()).ok().json()
}

#[test]
fn version_1_becomes_version_3_with_the_same_members() {
    let lab = Lab::new();
    let (pack, members) = version_1(&lab);
    let out = out_dir(&lab).join("new.tar.zst");
    let report = repack(&lab, text(&pack), &out, &["--chunk", "64KiB", "--level", "1"]);
    assert_eq!((report["source_format"].as_u64(), report["tag"].as_str()), (Some(1), Some("one")));
    assert_eq!(report["forkable"], false);
    assert_eq!(report["size_bytes"], fs::metadata(&out).unwrap().len());
    assert_eq!(report["sha256"].as_str().unwrap(), Digest::of(&fs::read(&out).unwrap()).to_string());
    let notes = report["notes"].to_string();
    assert!(notes.contains("Firecracker") && notes.contains("ext4"), "{notes}");
    assert_same(&members_by_tar(&out), &members);
    assert_eq!(names(&lab.path("out")), ["new.tar.zst"]);

    let inspected = lab.run(&["--json", "inspect", text(&out)]).ok().json();
    assert_eq!(inspected["pack_format"], 3);
    assert_eq!(inspected["base_image"], "debian:bookworm");
    assert_eq!(inspected["created_at"], "2025-01-02T03:04:05Z");
    assert_eq!(inspected["requires"]["vmstate_version"], 0);
    assert_eq!(inspected["requires"]["memory_mib"], 6);
    assert!(inspected["unforkable"].as_str().unwrap().contains("Firecracker"), "{inspected}");
    assert_eq!(inspected["chunks"]["size"], 65536);
    for file in inspected["files"].as_array().unwrap() {
        let name = file["path"].as_str().unwrap();
        let expected = members.get(name).map(|plain| Digest::of(plain).to_string());
        assert_eq!(file["sha256"].as_str().map(str::to_owned), expected, "{name}");
    }
    let shown = lab.run(&["inspect", text(&out)]).ok().stdout;
    assert!(shown.contains("no: it holds the state of a Firecracker machine"), "{shown}");
    // Unpacked again, nothing has changed.
    lab.run(&["unpack", text(&out), "--tag", "again"]).ok();
    for (name, plain) in &members {
        assert!(fs::read(lab.snapshot_dir("again").join(name)).unwrap() == *plain, "{name}");
    }
    let second = lab.run(&["repack", text(&pack), "--out", text(&lab.path("out/second"))]).ok();
    assert!(
        second.stderr.contains("cannot be forked") && second.stdout.contains("(v1)"),
        "{}",
        second.stderr
    );
}

#[test]
fn a_chain_of_version_2_becomes_plain_names() {
    let lab = Lab::new();
    let (pack, members) = version_2(&lab);
    let out = out_dir(&lab).join("new.tar.zst");
    let report = repack(&lab, text(&pack), &out, &[]);
    assert_eq!((report["source_format"].as_u64(), report["forkable"].as_bool()), (Some(2), Some(false)));
    assert!(report["notes"].to_string().contains("base.snapshot.json"), "{}", report["notes"]);
    assert_same(&members_by_tar(&out), &members);
    let again = repack(&lab, text(&out), &lab.path("out/again"), &[]);
    assert_eq!((again["source_format"].as_u64(), again["forkable"].as_bool()), (Some(3), Some(false)));
    assert_same(&members_by_tar(&lab.path("out/again")), &members);
    // A tag that leaves no room for the member's name.
    let tag = "t".repeat(60);
    let long = [
        ("manifest.toml".to_owned(), b"forkd_pack_version = 2".to_vec()),
        (format!("{tag}/vmstate"), vec![1]),
    ];
    let long = write_pack(&lab, "long", &long);
    lab.run(&["repack", text(&long), "--out", text(&lab.path("out/long"))]).fails(1, &["cannot be named"]);
    assert_eq!(names(&lab.path("out")), ["again", "new.tar.zst"]);
}

#[test]
fn version_3_keeps_its_machine_and_changes_its_chunks() {
    let lab = Lab::new();
    let pack = lab.pack("demo");
    let out = out_dir(&lab).join("new.tar.zst");
    let report = repack(&lab, text(&pack), &out, &["--chunk", "1MiB", "--level", "9"]);
    assert_eq!((report["source_format"].as_u64(), report["forkable"].as_bool()), (Some(3), Some(true)));
    assert_eq!(report["notes"], Value::Array(Vec::new()));
    assert_same(&members_by_tar(&out), &members_by_tar(&pack));
    let inspect = |pack: &Path| lab.run(&["--json", "inspect", text(pack)]).ok().json();
    let (old, new) = (inspect(&pack), inspect(&out));
    assert_eq!(
        (new["chunks"]["size"].as_u64(), old["chunks"]["size"].as_u64()),
        (Some(1 << 20), Some(65536))
    );
    for field in ["requires", "tag", "created_at", "unforkable", "plain_bytes"] {
        assert_eq!(new[field], old[field], "{field}");
    }
}

#[test]
fn packs_are_repacked_from_a_url_and_from_a_hub() {
    let lab = Lab::new();
    let (one, members) = version_1(&lab);
    let (demo, dir) = (lab.pack("demo"), out_dir(&lab));
    lab.publish(&one, "lab/one").ok();
    lab.publish(&demo, "lab/demo").ok();
    let hub = Hub::start(&lab, &[]);
    let expected = [("one", members), ("demo", members_by_tar(&demo))];
    for (name, members) in &expected {
        let url = format!("{}lab-{name}-v1.forkd-snapshot.tar.zst", hub.url());
        let reference = format!("lab/{name}");
        for (kind, target) in [("url", &url), ("ref", &reference)] {
            let out = dir.join(format!("{name}-{kind}"));
            let report = repack(&lab, target, &out, &["--hub", &hub.url()]);
            assert_eq!(report["forkable"], *name == "demo");
            assert_same(&members_by_tar(&out), members);
        }
    }
    assert_eq!(names(&dir), ["demo-ref", "demo-url", "one-ref", "one-url"]);
    let left = lab.path("cache/forkd/downloads");
    assert!(!left.exists() || names(&left).is_empty(), "{:?}", names(&left));
    // The hub holds another pack than the one that was registered.
    flip(&lab.published("one"), 2000);
    lab.run(&["repack", "lab/one", "--out", text(&dir.join("bad")), "--hub", &hub.url()])
        .fails(1, &["the registry says", "do not trust it"]);
    let gone = format!("{}gone.tar.zst", hub.url());
    lab.run(&["repack", &gone, "--out", text(&dir.join("bad"))]).fails(1, &["cannot repack", &gone]);
    assert_eq!(names(&dir), ["demo-ref", "demo-url", "one-ref", "one-url"]);
}

#[test]
fn the_output_is_replaced_on_demand_only_and_by_one_at_a_time() {
    let lab = Lab::new();
    let (pack, members) = version_1(&lab);
    let dir = out_dir(&lab);
    let out = dir.join("new.tar.zst");
    fs::write(&out, "mine").unwrap();
    let args = ["repack", text(&pack), "--out", text(&out)];
    let forced = [&args[..], &["--force"]].concat();
    lab.run(&args).fails(1, &["cannot repack", "exists already", "hint: replace it with --force"]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
    // Onto a new name: one wins. With --force: both do, one after the other.
    for (args, winners) in [(&args[..], 1), (&forced[..], 2)] {
        if winners == 1 {
            fs::remove_file(&out).unwrap();
        }
        let runs: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> = (0..2).map(|_| scope.spawn(|| lab.run(args))).collect();
            running.into_iter().map(|run| run.join().unwrap()).collect()
        });
        assert_eq!(runs.iter().filter(|run| run.code == Some(0)).count(), winners, "{}", runs[0].stderr);
        for run in runs.into_iter().filter(|run| run.code != Some(0)) {
            run.fails(1, &["exists already", "--force"]);
        }
        assert_same(&members_by_tar(&out), &members);
        assert_eq!(names(&dir), ["new.tar.zst"]);
    }
    // The old pack's own name.
    let own = dir.join("own");
    fs::copy(&pack, &own).unwrap();
    repack(&lab, text(&own), &own, &["--force"]);
    assert_same(&members_by_tar(&own), &members);
    for (out, code, says) in [
        (dir.clone(), 2, "is a directory"),
        (lab.path("none/new"), 1, "--out needs an existing directory"),
        (dir.join("x"), 2, "power of two"),
    ] {
        let chunk = if out.ends_with("x") { "100000" } else { "64KiB" };
        lab.run(&["repack", text(&pack), "--out", text(&out), "--force", "--chunk", chunk])
            .fails(code, &[says]);
    }
    assert_eq!(names(&dir), ["new.tar.zst", "own"]);
}

#[test]
fn damaged_packs_are_refused_and_leave_nothing() {
    let lab = Lab::new();
    let dir = out_dir(&lab);
    let out = dir.join("new");
    let bad = lab.path("bad.tar.zst");
    let fails = |says: &[&str]| {
        lab.run(&["repack", text(&bad), "--out", text(&out)]).fails(1, says);
        assert_eq!(names(&dir), Vec::<String>::new(), "{says:?}");
    };
    let (one, _) = version_1(&lab);
    let old = fs::read(&one).unwrap();
    fs::write(&bad, &old[..old.len() / 2]).unwrap();
    fails(&["cannot repack", text(&bad)]);
    fs::write(&bad, &old).unwrap();
    flip(&bad, old.len() as u64 / 2);
    fails(&["cannot repack", text(&bad)]);
    let listed = format!("forkd_pack_version = 1\n[[files]]\n{}", listing("vmstate", b"what was packed"));
    let lying = write_pack(
        &lab,
        "lying",
        &[("manifest.toml".into(), listed.into_bytes()), ("vmstate".into(), b"something else".to_vec())],
    );
    fs::copy(&lying, &bad).unwrap();
    fails(&["vmstate", "its manifest says"]);
    for content in [&b""[..], b"no pack", &zstd::encode_all(&[0; 5000][..], 3).unwrap()] {
        fs::write(&bad, content).unwrap();
        fails(&["is not a forkd pack"]);
    }
    let new = fs::read(lab.pack("demo")).unwrap();
    fs::write(&bad, &new[..new.len() - 1]).unwrap();
    fails(&["cut short"]);
    fs::write(&bad, &new).unwrap();
    flip(&bad, new.len() as u64 / 2);
    fails(&["is corrupt", "the index says"]);
    // So long a text that the new manifest, which has more to say, could not be read again.
    let long =
        format!("forkd_pack_version = 1\ndescription = \"{}\"", "x".repeat(MAX_MANIFEST_LEN as usize - 50));
    let long = write_pack(&lab, "long", &[("manifest.toml".into(), long.into_bytes())]);
    fs::copy(&long, &bad).unwrap();
    fails(&["cannot be translated", "manifest.toml has"]);
    lab.run(&["repack", "/nonexistent.tar.zst", "--out", text(&out)]).fails(1, &["/nonexistent.tar.zst"]);
    assert_eq!(names(&dir), Vec::<String>::new());
}

/// A tar with a manifest, and a member whose header claims `size` and whose data is this.
fn bomb(path: &Path, size: u64, data: impl Iterator<Item = Vec<u8>>) {
    use std::io::Write;
    let header = |name: &str, size: u64| {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        // Sizes of any length: the first bit set, then big endian.
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar  \0");
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    };
    let mut manifest = b"forkd_pack_version = 1\ntag = \"bomb\"\n".to_vec();
    let len = manifest.len() as u64;
    manifest.resize(512, 0);
    let mut out = zstd::Encoder::new(File::create(path).unwrap(), 1).unwrap();
    for bytes in [&header("manifest.toml", len)[..], &manifest, &header("memory.bin", size)] {
        out.write_all(bytes).unwrap();
    }
    for piece in data {
        out.write_all(&piece).unwrap();
    }
    out.write_all(&[0; 1024]).unwrap();
    out.finish().unwrap();
}

#[test]
fn bombs_spend_neither_memory_nor_disk() {
    let lab = Lab::new();
    let disk = SmallDisk::mount(out_dir(&lab), 288 << 10);
    let (out, pack) = (disk.dir.join("new"), lab.path("bomb.tar.zst"));
    let args = ["repack", text(&pack), "--out", text(&out)];
    for size in [300 << 30, (1 << 63) - 1, u64::MAX] {
        bomb(&pack, size, std::iter::empty());
        lab.run(&args).fails(1, &["cannot repack", text(&pack)]);
    }
    // 64 MiB that are there, in a few kilobytes, on a disk with 32 MiB to spare.
    bomb(&pack, 64 << 20, (0..64).map(|_| vec![b'A'; 1 << 20]));
    assert!(fs::metadata(&pack).unwrap().len() < 100 << 10);
    lab.run(&args).fails(1, &["cannot repack", text(&pack), "there is room for"]);
    assert_eq!(names(&disk.dir), Vec::<String>::new());
    // Zeros take no room.
    bomb(&pack, 512 << 20, (0..512).map(|_| vec![0; 1 << 20]));
    lab.run(&args).ok();
    assert_eq!(names(&disk.dir), ["new"]);
    // A server's word for a size.
    let hub = lab.path("hub");
    fs::create_dir_all(&hub).unwrap();
    File::create(hub.join("huge.tar.zst")).unwrap().set_len(100 << 30).unwrap();
    let start = fs::read(version_1(&lab).0).unwrap();
    File::options()
        .write(true)
        .open(hub.join("huge.tar.zst"))
        .unwrap()
        .write_all_at(&start[..4096], 0)
        .unwrap();
    let server = Hub::start(&lab, &[]);
    let url = format!("{}huge.tar.zst", server.url());
    lab.run(&["repack", &url, "--out", text(&disk.dir.join("huge"))])
        .fails(1, &["cannot repack", "huge.tar.zst"]);
    assert_eq!(names(&disk.dir), ["new"]);
    assert!(server.pack_bytes() < 2 << 20, "{}", server.pack_bytes());
}

#[test]
fn an_interrupted_repack_leaves_nothing() {
    let lab = Lab::new();
    let members = [
        ("manifest.toml".to_owned(), b"forkd_pack_version = 1\ntag = \"large\"".to_vec()),
        ("memory.bin".to_owned(), noise(5, 48 << 20)),
    ];
    let (pack, dir) = (write_pack(&lab, "large", &members), out_dir(&lab));
    let out = dir.join("new");
    lab.publish(&pack, "lab/large").ok();
    let hub = Hub::start(&lab, &["--bandwidth", "8MB/s"]);
    let url = format!("{}lab-large-v1.forkd-snapshot.tar.zst", hub.url());
    let below = |what: &'static str| {
        let dir = dir.clone();
        move || {
            let works = fs::read_dir(&dir).unwrap().flatten().map(|entry| entry.path());
            let mut inside = works.flat_map(|work| fs::read_dir(work).into_iter().flatten().flatten());
            inside.any(|entry| entry.file_name().to_string_lossy().contains(what))
        }
    };
    // While downloading, and while packing.
    for (target, sign, signal, code) in [
        (url.as_str(), ".partial", Signal::INT, 130),
        (text(&pack), ".forkd-pack-", Signal::INT, 130),
        (text(&pack), ".forkd-pack-", Signal::TERM, 143),
    ] {
        let args = ["repack", target, "--level", "19", "--out", text(&out)];
        let mut run = lab.command(&args).spawn().unwrap();
        wait_until(sign, below(sign));
        std::thread::sleep(Duration::from_millis(100));
        kill_process(Pid::from_child(&run), signal).unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(code), "{sign}");
        assert_eq!(names(&dir), Vec::<String>::new(), "{sign}");
    }
}

#[test]
fn inspect_reads_the_beginning_of_old_packs_over_http() {
    let lab = Lab::new();
    // Too large to be read whole by accident.
    let big = noise(8, 6 << 20);
    let mut manifest = "forkd_pack_version = 1\ntag = \"big\"\nforkd_version = \"0.4\"\n".to_owned();
    manifest += &format!("[[files]]\n{}", listing("memory.bin", &big));
    let pack = write_pack(
        &lab,
        "big",
        &[("manifest.toml".into(), manifest.into_bytes()), ("memory.bin".into(), big)],
    );
    lab.publish(&pack, "lab/big").ok();
    lab.publish(&version_2(&lab).0, "lab/two").ok();
    lab.publish(&legacy_pack(&lab, &memory()), "lab/old").ok();
    let hub = Hub::start(&lab, &[]);
    for (name, format) in [("big", 1), ("two", 2)] {
        let inspect = |target: &str| lab.run(&["--json", "inspect", target, "--hub", &hub.url()]).ok().json();
        let file = inspect(text(&lab.published(name)));
        let url = format!("{}lab-{name}-v1.forkd-snapshot.tar.zst", hub.url());
        for target in [url, format!("lab/{name}")] {
            let before = hub.pack_bytes();
            let mut report = inspect(&target);
            wait_until("the requests are logged", || hub.pack_bytes() > before);
            if name == "big" {
                // The end and the beginning, to see what it is, and the manifest.
                assert!(hub.pack_bytes() - before <= 512 << 10, "{}", hub.pack_bytes() - before);
            }
            assert_eq!(report["pack_format"], format);
            assert!(report["fetched_bytes"].as_u64().unwrap() <= 65 << 10, "{}", report["fetched_bytes"]);
            report["location"] = file["location"].clone();
            report["fetched_bytes"] = Value::Null;
            assert_eq!(report, file, "{target}");
        }
        let shown = lab.run(&["inspect", &format!("lab/{name}"), "--hub", &hub.url()]).ok().stdout;
        assert!(shown.contains("memory.bin") && shown.contains("no: it holds the state"), "{shown}");
    }
    // A manifest that lists nothing.
    let report = lab.run(&["--json", "inspect", "lab/old", "--hub", &hub.url()]).ok().json();
    assert_eq!((report["tag"].as_str(), report["plain_bytes"].as_u64()), (Some("old"), None));
    lab.run(&["inspect", "lab/old", "--hub", &hub.url()]).ok();
}

#[test]
fn old_packs_are_mounted_as_they_are_and_repacked() {
    let lab = Lab::new();
    let (pack, members) = version_1(&lab);
    let new = out_dir(&lab).join("new.tar.zst");
    repack(&lab, text(&pack), &new, &[]);
    lab.publish(&pack, "lab/one").ok();
    lab.publish(&new, "lab/new").ok();
    lab.publish(&version_2(&lab).0, "lab/two").ok();
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    for version in [mount.version("one"), mount.version("new")] {
        for (name, plain) in &members {
            // The old pack's manifest has its own name there.
            let name = if version.ends_with("one/v1") { name.replace(".old", "") } else { name.clone() };
            let output = Command::new("cat").arg(version.join(&name)).output().unwrap();
            assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
            assert!(output.stdout == *plain, "{name}");
        }
    }
    for (name, plain) in version_2(&lab).1.iter().filter(|(name, _)| !name.starts_with("manifest")) {
        let (tag, name) = name.split_once('.').unwrap();
        assert!(fs::read(mount.version("two").join(tag).join(name)).unwrap() == *plain, "{tag}/{name}");
    }
}

#[test]
fn forking_an_old_machine_is_refused_by_name() {
    let lab = Lab::new();
    let (pack, _) = version_1(&lab);
    let new = out_dir(&lab).join("new.tar.zst");
    repack(&lab, text(&pack), &new, &[]);
    for (pack, tag) in [(&pack, "old"), (&new, "new")] {
        lab.run(&["unpack", text(pack), "--tag", tag]).ok();
        let opened = Template::open_local(&lab.snapshot_dir(tag), KvmKind::Pvm);
        assert!(matches!(opened, Err(TemplateError::Foreign)), "{tag}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let location = PackLocation { source: PackSource::Path(new.clone()), size: None, index: None };
    let store = runtime.block_on(Store::open(location, StoreOptions::default())).unwrap();
    let opened = runtime.block_on(Template::open_pack(store, runtime.handle().clone(), KvmKind::Hardware));
    assert!(matches!(opened, Err(TemplateError::Foreign)));
    // The program looks for a hypervisor first.
    if File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        lab.run(&["fork", text(&new)]).fails(1, &["cannot fork", "Firecracker", "hint: "]);
        lab.run(&["fork", "--tag", "new"]).fails(1, &["Firecracker"]);
        lab.run(&["fork", "--tag", "old"]).fails(1, &["Firecracker"]);
        lab.run(&["fork", text(&pack)]).fails(1, &["layout 1", "Firecracker"]);
    }
}
