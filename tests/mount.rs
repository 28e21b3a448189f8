//! `forkd mount` through the real kernel, with a real hub.

#[path = "soak/faulty.rs"]
#[allow(dead_code, reason = "the soaks use the rest")]
mod faulty;
mod support;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use faulty::{Fault, Faulty, WRONG};
use forkd_fs::digest::Digest;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use support::{Hub, Lab, Mount, flip, is_running, wait_until};

const MEMBERS: [&str; 5] = ["snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"];

fn digest(path: &Path) -> Digest {
    Digest::of(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// Reads `len` bytes at `offset`, or says which errno came instead.
fn read_at(path: &Path, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap();
    let mut bytes = vec![0; len];
    let read = File::open(path).and_then(|file| file.read_at(&mut bytes, offset)).map_err(errno)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// An offset in memory.bin that is data (see `Lab::snapshot`), `n` chunks in.
fn data(n: u64) -> u64 {
    (8 << 20) + n * support::CHUNK as u64
}

#[test]
fn members_are_the_same_as_what_was_packed() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    for member in MEMBERS {
        let mounted = mount.dir.join("lab/demo/latest").join(member);
        assert_eq!(digest(&mounted), digest(&lab.snapshot_dir("demo").join(member)), "{member}");
    }
    assert_eq!(fs::read_link(mount.dir.join("lab/demo/latest")).unwrap(), Path::new("v1"));
    // As many tools see it: cp keeps the holes, diff finds nothing.
    let copy = lab.path("copy");
    let status =
        Command::new("cp").arg("-a").arg(mount.version("demo").join("memory.bin")).arg(&copy).status();
    assert!(status.unwrap().success());
    assert_eq!(digest(&copy), digest(&lab.snapshot_dir("demo").join("memory.bin")));
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 8 << 20, "cp filled the holes");
    fs::read(mount.version("demo").join("manifest.toml")).unwrap();
    let stats = mount.stats("demo");
    assert_eq!(stats["chunks_fetched"], stats["chunks_total"], "{stats}");
}

#[test]
fn looking_fetches_the_index_and_reading_a_little_fetches_little() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let total = fs::metadata(lab.published("demo")).unwrap().len();
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    let listed = Command::new("ls").arg("-lR").arg(mount.version("demo")).output().unwrap();
    assert!(listed.status.success() && String::from_utf8_lossy(&listed.stdout).contains("16777216"));
    let after_listing = mount.stats("demo")["bytes_fetched"].as_u64().unwrap();
    assert!(after_listing * 100 < total * 2, "{after_listing} of {total} to list");
    assert_eq!(read_at(&mount.version("demo").join("memory.bin"), data(10), 16).unwrap().len(), 16);
    let after_read = mount.stats("demo")["bytes_fetched"].as_u64().unwrap();
    assert!(after_read > after_listing && after_read * 4 < total, "{after_read} of {total} for 16 bytes");
    let blocks = fs::read_to_string(mount.version("demo").join(".forkd/blocks")).unwrap();
    let memory = blocks.lines().find(|line| line.starts_with("memory.bin ")).unwrap();
    assert!(memory.contains('#') && memory.contains('.') && memory.contains('0'), "{memory}");
}

#[test]
fn it_behaves_as_a_read_only_file_system() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = lab.path("hub");
    let mount = Mount::new(&lab, "mnt", hub.to_str().unwrap(), &[]);
    let version = mount.version("demo");
    let file = version.join("vmstate");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o444);
    assert_eq!(File::create(version.join("new")).unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(fs::remove_file(&file).unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    for absent in ["lab/demo/v2", "lab/none", "none", "lab/demo/v1/none", "lab/demo/v1/.forkd/none"] {
        assert_eq!(fs::metadata(mount.dir.join(absent)).unwrap_err().kind(), ErrorKind::NotFound, "{absent}");
    }
    assert_eq!(fs::read_dir(&file).unwrap_err().kind(), ErrorKind::NotADirectory);
    assert_eq!(read_at(&file, 5000, 10).unwrap(), b"");
    assert_eq!(read_at(&file, 1 << 40, 10).unwrap(), b"");
    let found = Command::new("find").arg(&mount.dir).args(["-type", "f"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout).lines().count(), 1 + 6 + 2);
    let last = File::open(version.join("memory.bin")).unwrap();
    assert_eq!(rustix::fs::seek(&last, rustix::fs::SeekFrom::Data(0)).unwrap(), data(0));
    assert_eq!(rustix::fs::seek(&last, rustix::fs::SeekFrom::Hole(data(0))).unwrap(), data(64));
}

#[test]
fn a_hub_that_goes_away_gives_eio_in_time_and_comes_back() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &["--deadline", "500ms"]);
    let memory = mount.version("demo").join("memory.bin");
    let kept = read_at(&memory, data(0), 4096).unwrap();
    let address = hub.kill();
    let started = Instant::now();
    assert_eq!(read_at(&memory, data(50), 4096), Err(Errno::IO));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(read_at(&memory, data(0), 4096).unwrap(), kept, "what was fetched stays readable");
    let stats = mount.stats("demo");
    assert!(stats["last_error"].as_str().unwrap().contains(&address), "{stats}");
    let _hub = Hub::start_on(&lab, &address, &[]);
    let expected = read_at(&lab.snapshot_dir("demo").join("memory.bin"), data(50), 4096).unwrap();
    assert_eq!(read_at(&memory, data(50), 4096).unwrap(), expected);
}

#[test]
fn a_flipped_byte_gives_eio_and_is_named() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let size = fs::metadata(lab.published("demo")).unwrap().len();
    flip(&lab.published("demo"), size / 2);
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    let memory = mount.version("demo").join("memory.bin");
    let original = lab.snapshot_dir("demo").join("memory.bin");
    let mut bad = 0;
    for chunk in 0..64 {
        match read_at(&memory, data(chunk), 4096) {
            Ok(bytes) => assert_eq!(bytes, read_at(&original, data(chunk), 4096).unwrap(), "chunk {chunk}"),
            Err(error) => {
                assert_eq!(error, Errno::IO);
                bad += 1;
            }
        }
    }
    // The kernel may have read ahead past it, yet only the chunk itself may fail.
    assert_eq!(bad, 1);
    let stats = mount.stats("demo");
    let said = stats["last_error"].as_str().unwrap();
    assert!(said.contains("memory.bin") && said.contains("is corrupt"), "{said}");
}

#[test]
fn a_mount_is_read_whole_while_one_answer_in_five_is_not_what_was_asked() {
    for wrong in WRONG {
        let lab = Lab::new();
        lab.snapshot("demo", 64);
        lab.hub_dir("demo");
        let faulty = Faulty::start_with(lab.path("hub"), 20, &[wrong], 0);
        // The first of all, when nothing is known of the pack yet, is one of them.
        faulty.fail_next(wrong);
        let mount = Mount::new(&lab, "mnt", &faulty.url(), &[]);
        for member in MEMBERS {
            let read = fs::read(mount.version("demo").join(member));
            let read = read.unwrap_or_else(|error| panic!("{wrong:?}: {member}: {error}"));
            let original = digest(&lab.snapshot_dir("demo").join(member));
            assert_eq!(Digest::of(&read), original, "{wrong:?}: {member}");
        }
        let (requests, faults) = faulty.counts();
        println!("{requests} requests, {faults:?}");
        assert!(requests > 20 && faults[&wrong] * 10 > requests, "{requests} requests, {faults:?}");
        assert_eq!(mount.stats("demo")["failed_reads"], 0);
    }
}

#[test]
fn a_hub_that_only_answers_what_was_not_asked_is_said_to_in_time() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let faulty = Faulty::start(lab.path("hub"), 0);
    let mount = Mount::new(&lab, "mnt", &faulty.url(), &["--deadline", "500ms"]);
    let (memory, original) =
        (mount.version("demo").join("memory.bin"), lab.snapshot_dir("demo").join("memory.bin"));
    let outcomes = [
        (Fault::WrongRange, Errno::IO, "when asked for bytes"),
        (Fault::Gzip, Errno::IO, "gzip-encoded although that was not accepted"),
        (Fault::Page, Errno::STALE, "answered for an object of 15 bytes instead of"),
    ];
    // Far enough from each other that nothing was read ahead.
    for (at, (wrong, errno, says)) in [0, 25, 50].map(data).into_iter().zip(outcomes) {
        fs::metadata(&memory).unwrap();
        faulty.fail(100, &[wrong]);
        let started = Instant::now();
        assert_eq!(read_at(&memory, at, 4096), Err(errno), "{wrong:?}");
        assert!(started.elapsed() < Duration::from_secs(3), "{wrong:?}: {:?}", started.elapsed());
        let stats = mount.stats("demo");
        let said = stats["last_error"].as_str().unwrap();
        assert!(said.contains("gave up on") && said.contains(says), "{said}");
        faulty.mend();
        assert_eq!(read_at(&memory, at, 4096), read_at(&original, at, 4096), "{wrong:?}");
    }
}

#[test]
fn replaced_cut_and_missing_packs_have_their_errnos() {
    let lab = Lab::new();
    for tag in ["demo", "cut", "gone"] {
        lab.hub_dir(tag);
    }
    let hub = Hub::start(&lab, &[]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &["--deadline", "500ms"]);
    let memory = mount.version("demo").join("memory.bin");
    read_at(&memory, data(0), 4096).unwrap();
    fs::copy(lab.published("demo"), lab.path("hub/new")).unwrap();
    fs::rename(lab.path("hub/new"), lab.published("demo")).unwrap();
    // Published again as it was, under another ETag: noticed once at most, then read on.
    let original = lab.snapshot_dir("demo").join("memory.bin");
    let expected = read_at(&original, data(50), 4096);
    wait_until("the same bytes are read", || match read_at(&memory, data(50), 4096) {
        Err(Errno::STALE) => false,
        read => read == expected,
    });
    // One whose vmstate is another: that of `gone` is the same, and may lie at the same place, where it is rightly read.
    fs::copy(lab.published("cut"), lab.published("demo")).unwrap();
    let vmstate = mount.version("demo").join("vmstate");
    assert_eq!(read_at(&vmstate, 0, 100), Err(Errno::STALE), "another pack in its place");
    let cut = File::options().write(true).open(lab.published("cut")).unwrap();
    cut.set_len(100_000).unwrap();
    let errno = |path: &Path| {
        let listed = fs::read_dir(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        listed.err().and_then(|error| Errno::from_io_error(&error))
    };
    assert!(
        matches!(errno(&mount.version("cut")), Some(Errno::IO | Errno::STALE)),
        "{:?}",
        errno(&mount.version("cut"))
    );
    fs::remove_file(lab.published("gone")).unwrap();
    assert_eq!(errno(&mount.version("gone")), Some(Errno::IO));
    assert!(mount.stats("gone")["last_error"].as_str().unwrap().contains("does not exist"));
    assert!(mount.stats("cut")["last_error"].as_str().unwrap().contains("lab-cut-v1"));
}

#[test]
fn one_slow_read_holds_up_nobody() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &["--rtt", "700ms"]);
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    let memory = mount.version("demo").join("memory.bin");
    read_at(&memory, data(0), 16).unwrap();
    std::thread::scope(|scope| {
        let slow: Vec<_> = (0..8)
            .map(|n| {
                scope.spawn({
                    let memory = &memory;
                    move || read_at(memory, data(20 + 5 * n), 16)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(100));
        let started = Instant::now();
        fs::metadata(mount.dir.join(".forkd/stats.json")).unwrap();
        read_at(&memory, 0, 16).unwrap();
        read_at(&memory, data(0), 16).unwrap();
        assert!(started.elapsed() < Duration::from_millis(400), "{:?}", started.elapsed());
        for read in slow {
            assert_eq!(read.join().unwrap().unwrap().len(), 16);
        }
    });
}

#[test]
fn two_mounts_share_what_was_fetched() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let (first, second) =
        (Mount::new(&lab, "one", &hub.url(), &[]), Mount::new(&lab, "two", &hub.url(), &[]));
    let member = |mount: &Mount<'_>| digest(&mount.version("demo").join("memory.bin"));
    let expected = digest(&lab.snapshot_dir("demo").join("memory.bin"));
    assert_eq!(member(&first), expected);
    // Chunks are written to disk behind the reader's back.
    let fetched = hub.pack_bytes();
    wait_until("the cache has what was fetched", || support::dir_bytes(&lab.path("cache")) >= fetched);
    assert_eq!(member(&second), expected);
    let again = hub.pack_bytes() - fetched;
    assert!(again * 20 < fetched, "the second mount fetched {again} more, the first {fetched}");
}

#[test]
fn mountpoints_that_will_not_do_are_refused() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = lab.path("hub");
    let hub = hub.to_str().unwrap();
    let mount = Mount::new(&lab, "mnt", hub, &[]);
    let on = |dir: &Path| lab.run(&["mount", dir.to_str().unwrap(), "--hub", hub]);
    on(&mount.dir).fails(1, &["is in use", "forkd umount"]);
    on(&lab.path("missing")).fails(1, &["missing", "No such file", "hint: "]);
    on(&hub_file(&lab)).fails(1, &["registry.json", "ot a directory"]);
    on(&lab.path("hub")).fails(1, &["is not empty"]);
    fs::create_dir(lab.path("free")).unwrap();
    lab.run(&["mount", lab.path("free").to_str().unwrap(), "--hub", "/nonexistent"])
        .fails(1, &["cannot read the hub's registry", "/nonexistent"]);
    let failed =
        lab.run(&["--json", "mount", lab.path("free").to_str().unwrap()]).fails(2, &["no hub"]).json();
    assert!(failed["error"]["why"].as_str().unwrap().contains("no hub"));
    lab.run(&["umount", lab.path("free").to_str().unwrap()]).fails(1, &["no hub is mounted"]);
    assert!(
        !fs::read_to_string("/proc/self/mountinfo").unwrap().contains(lab.path("free").to_str().unwrap())
    );
}

fn hub_file(lab: &Lab) -> std::path::PathBuf {
    lab.path("hub/registry.json")
}

#[test]
fn unmounting_leaves_nothing_and_busy_mounts_want_lazy() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = lab.path("hub");
    let mount = Mount::new(&lab, "mnt", hub.to_str().unwrap(), &[]);
    let open = File::open(mount.version("demo").join("vmstate")).unwrap();
    let dir = mount.dir.to_str().unwrap();
    lab.run(&["umount", dir]).fails(1, &["is busy", "--lazy"]);
    lab.run(&["umount", dir, "--lazy"]).ok();
    let mut byte = [0];
    assert_eq!(open.read_at(&mut byte, 0).unwrap(), 1, "an open file outlives its mountpoint");
    drop(open);
    wait_until("the daemon has ended", || !is_running(mount.pid));
    let again = Mount::new(&lab, "mnt", hub.to_str().unwrap(), &[]);
    lab.run(&["umount", dir]).ok();
    assert!(!is_running(again.pid), "umount returns when the daemon is gone");
    let left = fs::read_dir(lab.path("run/forkd/mounts")).unwrap().count();
    assert_eq!(left, 0, "records or logs were left");
}

#[test]
fn the_hubs_password_is_shown_nowhere() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let with_password = format!("http://me:hush@{}/", hub.address);
    let mount = Mount::new(&lab, "mnt", &with_password, &[]);
    fs::read(mount.version("demo").join("vmstate")).unwrap();
    let daemon = fs::read(format!("/proc/{}/cmdline", mount.pid)).unwrap();
    let shown = [
        String::from_utf8_lossy(&daemon).into_owned(),
        fs::read_to_string("/proc/self/mountinfo").unwrap(),
        fs::read_to_string(mount.version("demo").join(".forkd/stats.json")).unwrap(),
    ];
    assert!(shown.iter().all(|text| !text.contains("hush")), "{shown:?}");
    assert!(shown[1].contains(&hub.address), "but the hub itself is");
}

/// Processes that a process has started.
fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[test]
fn a_killed_daemon_leaves_a_mount_that_the_next_command_clears() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = lab.path("hub");
    let first = Mount::new(&lab, "mnt", hub.to_str().unwrap(), &[]);
    let kill = |pid: u32, signal| kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    // With its watcher, which would unmount at once.
    let kill_both = |mount: &Mount<'_>| {
        for pid in children(mount.pid) {
            kill(pid, Signal::KILL);
        }
        kill(mount.pid, Signal::KILL);
    };
    kill_both(&first);
    wait_until("the mount is dead", || fs::read_dir(&first.dir).is_err());
    let second = Mount::new(&lab, "mnt", hub.to_str().unwrap(), &[]);
    assert_eq!(fs::read(second.version("demo").join("snapshot.json")).unwrap(), b"{}\n");
    kill_both(&second);
    wait_until("the mount is dead", || fs::read_dir(&second.dir).is_err());
    lab.run(&["umount", second.dir.to_str().unwrap()]).ok();
    assert_eq!(fs::read_dir(&second.dir).unwrap().count(), 0);
    // Told to end, it unmounts by itself.
    let third = Mount::new(&lab, "mnt", hub.to_str().unwrap(), &[]);
    kill(third.pid, Signal::TERM);
    wait_until("the daemon has ended", || !is_running(third.pid));
    assert_eq!(fs::read_dir(&third.dir).unwrap().count(), 0);
}
