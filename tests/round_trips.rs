//! How many round trips a cold fork makes before its first instruction: a guest waits for each. The machines are those of
//! `examples/synthetic_machine.rs`, behind a link so slow that everything else is small beside a round trip.

#[path = "support/program.rs"]
mod program;

use forkd_fs::format::{HOTSET, MEMORY, TRACE};
use forkd_fs::trace::{PAGE_SIZE, PageRun, Trace};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const ROUND_TRIP_MS: f64 = 400.0;
/// The first of the pages that the guest reads between its first instruction and ready.
const TOUCHED: u32 = 512;
/// Connection, registry, index with head.
const LEAST: u64 = 3;
/// A busy host can only make it look like more of them.
const ATTEMPTS: usize = 3;

/// A machine that touches 16 MiB of its 64, published in a hub of its own.
struct Bed {
    dir: tempfile::TempDir,
}

/// A `forkd hub serve`, or a `forkd fork` whose children run on.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        drop(self.0.wait());
    }
}

impl Bed {
    /// With its trace changed by `change`, and the hot pages that belong to it.
    fn new(change: impl FnOnce(&mut [Vec<PageRun>])) -> Bed {
        let bed = Bed { dir: tempfile::tempdir().unwrap() };
        let snapshot = bed.path("data/forkd/snapshots/machine");
        let maker = PathBuf::from(env!("CARGO_BIN_EXE_forkd")).with_file_name("examples/synthetic_machine");
        let made = Command::new(&maker).arg(&snapshot).args(["64", "16", "12", "hot"]).output();
        let made = made.unwrap_or_else(|error| panic!("{}: {error}", maker.display()));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

        let mut trace = Trace::decode(&fs::read(snapshot.join(TRACE)).unwrap()).unwrap();
        change(&mut trace.regions[0].buckets);
        fs::write(snapshot.join(TRACE), trace.encode().unwrap()).unwrap();
        let memory = File::open(snapshot.join(MEMORY)).unwrap();
        let mut hot = vec![0; (trace.page_count() * PAGE_SIZE) as usize];
        for (into, (_, page)) in hot.chunks_exact_mut(PAGE_SIZE as usize).zip(trace.pages()) {
            memory.read_exact_at(into, u64::from(page) * PAGE_SIZE).unwrap();
        }
        fs::write(snapshot.join(HOTSET), hot).unwrap();

        let (pack, hub) = (bed.path("machine.tar.zst"), bed.path("hub"));
        bed.run(&["pack", "--tag", "machine", "--out", pack.to_str().unwrap()]);
        let hub = ["--hub", hub.to_str().unwrap(), "--name", "test/machine"];
        bed.run(&[&["hub", "publish", pack.to_str().unwrap()], &hub[..]].concat());
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program::forkd());
        for (variable, name) in
            [("XDG_DATA_HOME", "data"), ("XDG_CACHE_HOME", "cache"), ("XDG_RUNTIME_DIR", "run")]
        {
            command.env(variable, self.path(name));
        }
        command.args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) {
        let done = self.command(arguments).output().unwrap();
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// Changes each entry of the registry.
    fn change_entries(&self, change: impl Fn(&mut serde_json::Map<String, Value>)) {
        let path = self.path("hub/registry.json");
        let mut registry: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let versions = registry["packages"]["test/machine"]["versions"].as_object_mut().unwrap();
        versions.values_mut().for_each(|entry| change(entry.as_object_mut().unwrap()));
        fs::write(&path, registry.to_string()).unwrap();
    }

    /// Forks the machine, by an attempt that `prepare`s the cache, until it takes no more than `expected` round trips to its
    /// first instruction; returns the least.
    fn least_round_trips(&self, expected: u64, prepare: impl Fn(&Bed)) -> u64 {
        let (hub, rtt) = (self.path("hub"), format!("{ROUND_TRIP_MS}ms"));
        let serve = ["hub", "serve", hub.to_str().unwrap(), "--listen", "127.0.0.1:0", "--rtt", &rtt];
        let mut server = Running(self.command(&serve).stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").expect("the server says where it listens");
        let mut least = u64::MAX;
        for _ in 0..ATTEMPTS {
            prepare(self);
            least = least.min(self.round_trips(url));
            if least <= expected {
                break;
            }
        }
        least
    }

    /// The same with nothing cached.
    fn cold_round_trips(&self, expected: u64) -> u64 {
        self.least_round_trips(expected, |bed| drop(fs::remove_dir_all(bed.path("cache"))))
    }

    fn round_trips(&self, url: &str) -> u64 {
        let fork = ["--json", "fork", "test/machine", "--hub", url];
        let mut fork = Running(self.command(&fork).stdout(Stdio::piped()).spawn().unwrap());
        // The children stay, and with them forkd.
        let report = BufReader::new(fork.0.stdout.take().unwrap());
        let report = serde_json::Deserializer::from_reader(report).into_iter::<Value>().next();
        let report = report.expect("forkd prints a report").unwrap();
        let first = report["children"][0]["first_instruction_ms"].as_f64();
        let first = first.unwrap_or_else(|| panic!("{report}"));
        assert!(report["children"][0]["ready_ms"].is_number(), "{report}");
        (first / ROUND_TRIP_MS) as u64
    }

    /// Leaves the pack's index in the cache and nothing else.
    fn keep_index(&self) {
        let registry: Value =
            serde_json::from_slice(&fs::read(self.path("hub/registry.json")).unwrap()).unwrap();
        let entry = &registry["packages"]["test/machine"]["versions"]["latest"];
        let number = |field: &str| entry[field].as_u64().unwrap();
        let pack = File::open(self.path("hub").join(entry["url"].as_str().unwrap())).unwrap();
        let mut index = vec![0; number("index_size") as usize];
        pack.read_exact_at(&mut index, number("index_offset")).unwrap();
        let name = entry["index_sha256"].as_str().unwrap();
        let chunks = self.path("cache/forkd/chunks");
        drop(fs::remove_dir_all(&chunks));
        fs::create_dir_all(chunks.join(&name[..2])).unwrap();
        fs::write(chunks.join(&name[..2]).join(name), index).unwrap();
    }
}

/// Pages that the guest reads later, as a trace's first runs: what lies behind them comes later.
fn later_pages(pages: u32) -> PageRun {
    PageRun { first_page: TOUCHED, pages }
}

#[test]
fn a_machine_with_its_trace_makes_three() {
    let bed = Bed::new(|_| {});
    assert_eq!(bed.cold_round_trips(LEAST), LEAST);
}

#[test]
fn a_page_that_the_trace_lacks_costs_one_more() {
    // All of them lie in one chunk, and the working set is on its way when the guest asks for it.
    let bed = Bed::new(|buckets| buckets[0].clear());
    assert_eq!(bed.cold_round_trips(LEAST + 1), LEAST + 1);
}

#[test]
fn first_pages_beyond_the_usual_head_cost_none_where_the_registry_tells_and_one_where_not() {
    // 4 MiB of noise, which does not compress, before the guest's own pages.
    let bed = Bed::new(|buckets| buckets[0].insert(0, later_pages(1024)));
    assert_eq!(bed.cold_round_trips(LEAST), LEAST);
    bed.change_entries(|entry| drop(entry.remove("head_size").expect("it is published")));
    assert_eq!(bed.cold_round_trips(LEAST + 1), LEAST + 1);
    // What a stranger says is bounded, and cannot make a fork wait for more than there is.
    for size in [1_u64, 1 << 40] {
        bed.change_entries(|entry| drop(entry.insert("head_size".to_owned(), size.into())));
        assert!(bed.cold_round_trips(LEAST + 1) <= LEAST + 1, "a head of {size}");
    }
}

#[test]
fn a_hot_set_too_large_to_be_used_still_has_the_first_pages() {
    // 257 MiB of the same pages, over and over.
    let bed = Bed::new(|buckets| buckets[1] = vec![later_pages(3584); 19]);
    assert!(fs::metadata(bed.path("data/forkd/snapshots/machine/hotset")).unwrap().len() > 256 << 20);
    assert_eq!(bed.cold_round_trips(LEAST), LEAST);
}

#[test]
fn a_pack_of_which_only_the_index_is_cached_needs_no_more() {
    // Without the index's request there is no head; small members and first pages come together all the same.
    let bed = Bed::new(|_| {});
    assert_eq!(bed.least_round_trips(LEAST, Bed::keep_index), LEAST);
}
