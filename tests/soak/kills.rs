//! kill -9 of mounts and pulls at any moment: what was read before was right, and the next command finds a clean house.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use forkd_fs::digest::Digest;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Hub, Lab, Mount, wait_until};
use crate::{Random, scaled};

const READERS: u64 = 3;

/// What happened, for the report.
#[derive(Debug, Default)]
struct Counts {
    mounts: u64,
    starting: u64,
    pulls: u64,
    pulls_done: u64,
    reads: AtomicU64,
    failed_reads: AtomicU64,
}

#[test]
fn killed_at_any_moment_nothing_is_wrong_afterwards() {
    let kills = scaled(20, 1000);
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &["--bandwidth", "60MB/s", "--rtt", "1ms"]);
    let original = lab.snapshot_dir("demo").join("memory.bin");
    let (mut random, mut counts) = (Random::new(1), Counts::default());
    for round in 0..kills {
        match random.below(5) {
            0 | 1 => kill_mount(&lab, &hub, &original, &mut random, &mut counts),
            2 => kill_starting_mount(&lab, &hub, &mut random, &mut counts),
            _ => kill_pull(&lab, &hub, &mut random, &mut counts),
        }
        // Filled and half filled, and from nothing again.
        if random.below(8) == 0 {
            fs::remove_dir_all(lab.path("cache/forkd")).or_else(missing_is_fine).unwrap();
        }
        if round % 10 == 9 || round + 1 == kills {
            check_house(&lab, &hub, &original);
        }
    }
    println!("{kills} kills: {counts:?}");
    assert!(counts.reads.load(Relaxed) > 0 && counts.mounts > 0 && counts.pulls > 0, "{counts:?}");
}

fn missing_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn kill(pid: u32) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
}

/// Reads at random while the daemon dies. Every read that succeeds has to be right.
fn kill_mount(lab: &Lab, hub: &Hub, original: &Path, random: &mut Random, counts: &mut Counts) {
    let mount = Mount::new(lab, "mnt", &hub.url(), &["--deadline", "2s"]);
    let (memory, stop) = (mount.version("demo").join("memory.bin"), AtomicBool::new(false));
    let seed = random.below(u64::MAX);
    std::thread::scope(|scope| {
        for reader in 0..READERS {
            let (memory, stop, counts) = (&memory, &stop, &*counts);
            scope.spawn(move || read_on(memory, original, stop, counts, Random::new(seed ^ reader)));
        }
        let stop_them = StopWhenDropped(&stop);
        random.pause(Duration::from_millis(120));
        kill(mount.pid);
        // What is known of a file outlives the daemon, opening it does not.
        wait_until("the mount is dead", || File::open(&memory).is_err());
        // A reader that hung would keep the scope from ending, and the runner would end the test.
        drop(stop_them);
    });
    counts.mounts += 1;
    // Its place is taken by the next mount, without an unmount.
    std::mem::forget(mount);
}

struct StopWhenDropped<'a>(&'a AtomicBool);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn read_on(mounted: &Path, original: &Path, stop: &AtomicBool, counts: &Counts, mut random: Random) {
    let original = File::open(original).unwrap();
    let size = original.metadata().unwrap().len();
    let (mut got, mut expected) = (vec![0; 300_000], vec![0; 300_000]);
    while !stop.load(Relaxed) {
        let (at, len) = (random.below(size), 1 + random.below(got.len() as u64) as usize);
        let read = File::open(mounted).and_then(|file| file.read_at(&mut got[..len], at));
        match read {
            Ok(read) => {
                let wanted = original.read_at(&mut expected[..len], at).unwrap();
                assert_eq!(&got[..read], &expected[..read], "wrong bytes at {at}");
                // A daemon that dies in mid-read leaves what came before: POSIX calls that a short read.
                let whole = read == wanted || File::open(mounted).is_err();
                assert!(whole, "a short read at {at}: {read} of {wanted}");
                counts.reads.fetch_add(1, Relaxed);
            }
            Err(_) => {
                counts.failed_reads.fetch_add(1, Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Kills a mount that is coming up: before, while and after the kernel has it.
fn kill_starting_mount(lab: &Lab, hub: &Hub, random: &mut Random, counts: &mut Counts) {
    let dir = lab.path("mnt");
    fs::create_dir(&dir).or_else(existing_is_fine).unwrap();
    let mut command = lab.command(&["mount", "--foreground", "--hub", &hub.url()]);
    let daemon = command.arg(&dir).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    random.pause(Duration::from_millis(60));
    end(daemon);
    counts.starting += 1;
}

fn existing_is_fine(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

fn kill_pull(lab: &Lab, hub: &Hub, random: &mut Random, counts: &mut Counts) {
    let mut command = lab.command(&["pull", "lab/demo", "--tag", "pulled", "--force", "--hub", &hub.url()]);
    let mut pull = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    random.pause(Duration::from_millis(120));
    if let Some(status) = pull.try_wait().unwrap() {
        assert!(status.success(), "a pull that was left alone");
        counts.pulls_done += 1;
    }
    end(pull);
    counts.pulls += 1;
    whole_or_absent(lab);
}

fn end(mut process: Child) {
    let _ = process.kill();
    process.wait().unwrap();
}

/// The tag that is pulled is there with all its bytes, or not there.
fn whole_or_absent(lab: &Lab) {
    let (pulled, original) = (lab.snapshot_dir("pulled"), lab.snapshot_dir("demo"));
    if !pulled.exists() {
        return;
    }
    for member in ["snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"] {
        let read =
            |dir: &Path| Digest::of(&fs::read(dir.join(member)).unwrap_or_else(|e| panic!("{member}: {e}")));
        assert_eq!(read(&pulled), read(&original), "{member}");
    }
    assert!(pulled.join("manifest.toml").exists());
}

/// After `forkd cleanup` nothing of the dead is left, what is cached is intact, and all bytes read right.
fn check_house(lab: &Lab, hub: &Hub, original: &Path) {
    lab.run(&["cleanup"]).ok();
    assert_eq!(mounts_below(&lab.path("")), Vec::<String>::new());
    let left: Vec<_> = names(&lab.path("run/forkd/mounts"));
    assert!(left.len() <= 2, "records and logs pile up: {left:?}");
    let drafts: Vec<_> =
        names(&lab.path("data/forkd/snapshots")).into_iter().filter(|n| n.starts_with('.')).collect();
    assert_eq!(drafts, Vec::<String>::new(), "drafts of dead pulls");
    wait_until("watchers have seen their daemons' ends", || processes_of(lab).is_empty());
    let (entries, temporary) = check_cache(&lab.path("cache"));
    // A death leaves at most one file a writer; they go when the cache is next cleaned.
    assert!(temporary <= 40, "{temporary} temporary files beside {entries} entries");
    whole_or_absent(lab);
    let mount = Mount::new(lab, "check", &hub.url(), &[]);
    let memory = fs::read(mount.version("demo").join("memory.bin")).unwrap();
    assert_eq!(Digest::of(&memory), Digest::of(&fs::read(original).unwrap()));
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn mounts_below(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().filter(|line| line.contains(dir.to_str().unwrap())).map(str::to_owned).collect()
}

/// Command lines of processes that name the lab, but for its hub.
fn processes_of(lab: &Lab) -> Vec<String> {
    let listed = Command::new("ps").args(["-eo", "args"]).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let ours = |line: &&str| line.contains(lab.path("").to_str().unwrap()) && !line.contains("hub serve");
    listed.lines().filter(ours).map(str::to_owned).collect()
}

/// Every entry of the cache must be what its name says. Returns how many there are, and how many other files.
fn check_cache(dir: &Path) -> (usize, usize) {
    let (mut entries, mut temporary) = (0, 0);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() {
            let below = check_cache(&path);
            (entries, temporary) = (entries + below.0, temporary + below.1);
        } else if let Ok(digest) = name.parse::<Digest>() {
            assert_eq!(Digest::of(&fs::read(&path).unwrap()), digest, "{} is damaged", path.display());
            entries += 1;
        } else if name.starts_with(".tmp") {
            temporary += 1;
        }
    }
    (entries, temporary)
}
