//! The fuzz targets' checks on stable Rust: every file of `fuzz/corpus`, thousands of mutations of each, and inputs that
//! claim far more than they hold. None may panic, take long or spend memory out of proportion.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use forkd_engine::hub::registry::Registry;
use forkd_fs::manifest::{MAX_MANIFEST_LEN, Manifest};
use forkd_fs::trace::{MAX_TRACE_LEN, Trace};

#[path = "../fuzz/src/lib.rs"]
mod checks;

/// How long the mutations of one target may take in all; what is left of a slow machine's budget is simply not tried.
const BUDGET: Duration = Duration::from_secs(2);
/// How many mutations a target gets at least, however slow the machine.
const AT_LEAST: u32 = 300;
/// The longest one input may take: bounded work, with room for a machine that is busy.
const EACH: Duration = Duration::from_secs(2);

/// Counts what is allocated and remembers the most there was. zstd's own memory is not in it.
struct Counting;

static NOW: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

impl Counting {
    fn add(bytes: isize) {
        let now = NOW.fetch_add(bytes, Relaxed) + bytes;
        PEAK.fetch_max(now, Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged; only numbers are kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::add(layout.size() as isize);
        // SAFETY: the caller's duties are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        Counting::add(-(layout.size() as isize));
        // SAFETY: as above; the pointer came from `alloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may exist for a moment.
        Counting::add(size as isize);
        // SAFETY: as above; the pointer came from `alloc`.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        Counting::add(-(layout.size() as isize));
        moved
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs a check and returns the most memory it held beyond what there was before, in bytes.
fn measured(name: &str, input: &str, check: checks::Check, bytes: &[u8]) -> usize {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let started = Instant::now();
    check(bytes);
    let took = started.elapsed();
    assert!(took < EACH, "{name}: {input} ({} bytes) took {took:?}", bytes.len());
    (PEAK.load(Relaxed) - before).max(0) as usize
}

/// What a check may hold at a time for an input of `len` bytes. Opening a pack costs a store (1 MiB of decoded chunks, a
/// connection pool that stays unused) and unpacking reads by 256 KiB.
fn allowed(name: &str, len: usize) -> usize {
    let (fixed, each) = match name {
        "pack" => (32 << 20, 16),
        "legacy" => (2 << 20, 16),
        // The first use sets up a runtime and a client.
        "registry" => (8 << 20, 256),
        _ => (1 << 20, 64),
    };
    fixed + each * len
}

/// The same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound.max(1)
    }
}

/// A few changes of the kinds that hurt parsers: bits, extreme numbers, cuts, doubled and moved parts.
fn mutate(bytes: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    const EXTREMES: [u64; 8] = [0, 1, 0x7f, 0xff, 0xffff_ffff, 1 << 31, 1 << 63, u64::MAX];
    let mut out = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(out.len());
        let rest = out.len().saturating_sub(at);
        match random.below(7) {
            0 | 1 if rest > 0 => out[at] ^= 1 << random.below(8),
            2 if rest > 0 => out[at] = random.below(256) as u8,
            3 => {
                let (value, width) = (EXTREMES[random.below(8)].to_le_bytes(), [1, 4, 8][random.below(3)]);
                let width = rest.min(width);
                out[at..at + width].copy_from_slice(&value[..width]);
            }
            4 => out.truncate(at),
            5 => {
                let part = out[at..at + random.below(rest.min(600))].to_vec();
                let to = random.below(out.len());
                out.splice(to..to, part);
            }
            _ if !other.is_empty() => {
                let from = random.below(other.len());
                let part = &other[from..other.len().min(from + 200)];
                let end = (at + part.len()).min(out.len());
                out.splice(at..end, part.iter().copied());
            }
            _ => {}
        }
    }
    out
}

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let read = |entry: fs::DirEntry| {
        (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap())
    };
    let mut files: Vec<_> = fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|f| read(f.unwrap()))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus of {name}");
    files
}

/// The corpus and its mutations, for one target.
fn replay(name: &str) {
    let check = checks::CHECKS.iter().find(|(known, _)| *known == name).expect("a target").1;
    let files = corpus(name);
    let within = |input: &str, bytes: &[u8], used: usize| {
        let allowed = allowed(name, bytes.len());
        assert!(
            used <= allowed,
            "{name}: {input} ({} bytes) held {used} bytes, allowed are {allowed}",
            bytes.len()
        );
    };
    // The first run pays for what is made once.
    check(&files[0].1);
    for (file, bytes) in &files {
        within(file, bytes, measured(name, file, check, bytes));
    }
    let (started, mut random, mut count) = (Instant::now(), Random(0x2545_F491_4F6C_DD1D), 0);
    while count < AT_LEAST || started.elapsed() < BUDGET {
        let (file, bytes) = &files[random.below(files.len())];
        let mutation = mutate(bytes, &files[random.below(files.len())].1, &mut random);
        let input = format!("mutation {count} of {file}");
        within(&input, &mutation, measured(name, &input, check, &mutation));
        count += 1;
    }
    println!("{name}: {} files, {count} mutations", files.len());
}

#[test]
fn indexes() {
    replay("index");
}

#[test]
fn manifests() {
    replay("manifest");
}

#[test]
fn registries() {
    replay("registry");
}

#[test]
fn traces() {
    replay("trace");
}

#[test]
fn root_disks() {
    replay("erofs");
}

#[test]
fn machine_states() {
    replay("vmstate");
}

#[test]
fn vector_states_of_guests() {
    replay("xsave");
}

#[test]
fn packs_of_the_predecessor() {
    replay("legacy");
}

#[test]
fn packs() {
    replay("pack");
}

/// The shapes that cost each parser most, and how many times its own length one may cost: the figure docs/SECURITY.md can
/// promise. Whoever lowers one lowers it here too.
#[test]
fn the_worst_input_of_each_parser_is_bounded() {
    let trace: checks::Check = |bytes| drop(Trace::decode(bytes));
    let registry: checks::Check = |bytes| drop(Registry::parse(bytes, "worst"));
    let manifest: checks::Check = |bytes| drop(Manifest::parse(bytes));
    let (trace_len, manifest_len) = (MAX_TRACE_LEN as usize, MAX_MANIFEST_LEN as usize);
    let worst: [(&str, checks::Check, Vec<u8>, usize); 5] = [
        (
            "one region of empty buckets",
            trace,
            lines(b"FKTR\x01\0\x01\x01m\xf0\xff\xff\x01", b"\0", b"", trace_len),
            50,
        ),
        (
            "one bucket of short runs",
            trace,
            lines(b"FKTR\x01\0\x01\x01m\x01\xf0\xff\x7f", b"\x02", b"", trace_len),
            25,
        ),
        ("unknown numbers", registry, lines(b"{\"schema_version\":1,\"x\":[0", b",0", b"]}", 4 << 20), 64),
        ("an array of numbers", manifest, lines(b"a = [\n", b"1,", b"]\n", manifest_len), 128),
        ("nested arrays", manifest, lines(b"a = ", b"[", b"", manifest_len), 128),
    ];
    for (input, check, bytes, times) in worst {
        let used = measured("worst", input, check, &bytes);
        println!("{input}: {} bytes held {used}, {} times as much", bytes.len(), used / bytes.len());
        assert!(used <= times * bytes.len(), "{input}: {used}, {times} times {} are allowed", bytes.len());
    }
}

fn lines(start: &[u8], middle: &[u8], end: &[u8], len: usize) -> Vec<u8> {
    let count = (len - start.len() - end.len()) / middle.len();
    [start, &middle.repeat(count), end].concat()
}
