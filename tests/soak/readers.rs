//! Many readers on a bad network: never a wrong byte, errors only when the contract has them, memory bounded.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::faulty::{FAULTS, Faulty};
use crate::support::{Lab, Mount};
use crate::{Random, scaled};

const READERS: u64 = 16;
const PERCENT: u64 = 5;
/// The most the daemon may have resident: 64 MiB of decoded chunks; for each of 16 readers and their 1 MiB requests a
/// decoded and an assembled copy and a run of up to 2 MiB of frames on its way, with its buffers; the program itself.
const MEMORY_MIB: u64 = 256;
/// A read ends within the deadline given, one silent attempt and a pause before it (docs/PACK.md).
const LONGEST: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    bytes: AtomicU64,
    eio: AtomicU64,
    slowest_ms: AtomicU64,
}

#[test]
fn readers_on_a_bad_network_never_see_a_wrong_byte() {
    let time = scaled(Duration::from_secs(10), Duration::from_secs(600));
    let lab = Lab::new();
    // Time for a second attempt after a silent one (10 s). Twice as much data as the daemon keeps decoded, and next to no disk cache: requests go on for ever.
    lab.snapshot("demo", 512);
    lab.hub_dir("demo");
    let faulty = Faulty::start(lab.path("hub"), PERCENT);
    let mount = Mount::new(&lab, "mnt", &faulty.url(), &["--cache-size", "1MiB", "--deadline", "25s"]);
    let (memory, counts) = (mount.version("demo").join("memory.bin"), Counts::default());
    let original = lab.snapshot_dir("demo").join("memory.bin");
    let end = Instant::now() + time;
    let mut peak = 0;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|reader| {
                let (memory, original, counts) = (&memory, &original, &counts);
                scope.spawn(move || read_until(end, memory, original, counts, Random::new(reader + 1)))
            })
            .collect();
        while !readers.iter().all(|reader| reader.is_finished()) {
            peak = peak.max(resident_mib(mount.pid, "VmRSS"));
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let (requests, faults) = faulty.counts();
    println!("{time:?}: {counts:?}, {requests} requests, failed {faults:?}, at most {peak} MiB resident");
    println!("stats: {}", mount.stats("demo"));
    assert!(requests > 100 && faults.values().sum::<u64>() > 5, "{requests} requests, {faults:?}");
    // An EIO takes a frame that is damaged twice running, or silence until the deadline: less than one request in a hundred.
    let (reads, eio) = (counts.reads.load(Relaxed), counts.eio.load(Relaxed));
    assert!(eio * 100 <= reads, "{eio} errors beside {reads} reads");
    let peak = peak.max(resident_mib(mount.pid, "VmHWM"));
    assert!(peak <= MEMORY_MIB, "{peak} MiB resident");
    faulty.mend();
    let all = fs::read(&memory).unwrap();
    assert!(all == fs::read(&original).unwrap(), "after the network is well again");
}

#[test]
fn one_fault_of_any_kind_is_not_an_error() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let faulty = Faulty::start(lab.path("hub"), 0);
    let mount = Mount::new(&lab, "mnt", &faulty.url(), &["--deadline", "6s"]);
    let (memory, original) =
        (mount.version("demo").join("memory.bin"), lab.snapshot_dir("demo").join("memory.bin"));
    fs::metadata(&memory).unwrap();
    let (mounted, original) = (open_direct(&memory), File::open(original).unwrap());
    let (mut got, mut expected) = ([0; 5000], [0; 5000]);
    for (n, fault) in (0..).zip(FAULTS) {
        // Far enough from each other that nothing was read ahead.
        let at = (8 << 20) + n * (500 << 10);
        faulty.fail_next(fault);
        mounted.read_exact_at(&mut got, at).unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        original.read_exact_at(&mut expected, at).unwrap();
        assert!(got == expected, "{fault:?}");
    }
    assert_eq!(faulty.counts().1.values().sum::<u64>(), FAULTS.len() as u64, "{:?}", faulty.counts());
    assert_eq!(mount.stats("demo")["failed_reads"], 0);
}

fn read_until(end: Instant, mounted: &Path, original: &Path, counts: &Counts, mut random: Random) {
    let direct = open_direct(mounted);
    let original = File::open(original).unwrap();
    let size = original.metadata().unwrap().len();
    let (mut got, mut expected) = (vec![0; 400_000], vec![0; 400_000]);
    while Instant::now() < end {
        // Mostly where the data is.
        let at = if random.below(8) == 0 { random.below(size) } else { size / 2 + random.below(size / 4) };
        let len = 1 + random.below(got.len() as u64) as usize;
        let started = Instant::now();
        let read = direct.read_at(&mut got[..len], at);
        let took = started.elapsed();
        assert!(took < LONGEST, "a read took {took:?}");
        counts.slowest_ms.fetch_max(took.as_millis() as u64, Relaxed);
        match read {
            Ok(read) => {
                let wanted = original.read_at(&mut expected[..len], at).unwrap();
                assert_eq!(read, wanted, "a short read at {at}");
                assert!(got[..read] == expected[..read], "wrong bytes at {at}");
                counts.reads.fetch_add(1, Relaxed);
                counts.bytes.fetch_add(read as u64, Relaxed);
            }
            Err(error) => {
                assert_eq!(Errno::from_io_error(&error), Some(Errno::IO), "{error}");
                counts.eio.fetch_add(1, Relaxed);
            }
        }
    }
}

/// Around the kernel's cache: every read comes to the daemon, and the kernel does not ask twice.
fn open_direct(path: &Path) -> File {
    File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path).unwrap()
}

fn resident_mib(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}
