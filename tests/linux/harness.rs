//! A hub with the real pack, directories of the test's own, and forkd run as a user does.
#![allow(dead_code, reason = "each test file uses its own part")]

#[allow(clippy::duplicate_mod, reason = "the soak has both harnesses")]
#[path = "../support/program.rs"]
mod program;

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PACK: &str = "python-numpy.forkd-snapshot.tar.zst";

/// The directories of one test.
pub struct Bed {
    dir: TempDir,
    data: PathBuf,
}

/// What forkd said.
pub struct Said(Output);

impl Said {
    /// Its stdout; the test fails when forkd did.
    pub fn success(self) -> String {
        let text = String::from_utf8_lossy(&self.0.stderr).into_owned();
        assert!(self.0.status.success(), "forkd failed: {text}");
        String::from_utf8(self.0.stdout).unwrap()
    }

    /// Everything it printed; the test fails when forkd did not.
    pub fn failure(self) -> String {
        assert!(!self.0.status.success(), "forkd succeeded");
        self.both().1
    }

    /// Exit code, and everything it printed.
    pub fn both(self) -> (Option<i32>, String) {
        let text = [self.0.stdout, self.0.stderr].concat();
        (self.0.status.code(), String::from_utf8_lossy(&text).into_owned())
    }
}

impl Bed {
    /// Fresh directories; the snapshot is the one `make machine` built.
    pub fn new() -> Bed {
        let base = std::env::var_os("XDG_DATA_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share")));
        let data = base.expect("HOME is set");
        let manifest = data.join("forkd/snapshots/python-numpy/manifest.toml");
        assert!(manifest.exists(), "{} is missing: run `make machine` first", manifest.display());
        Bed { dir: tempfile::tempdir().unwrap(), data }
    }

    /// The same with a copy of the snapshot, which the test may change and which nobody else maps.
    pub fn copied() -> Bed {
        let theirs = Bed::new();
        let data = theirs.path("data");
        fs::create_dir_all(data.join("forkd/snapshots")).unwrap();
        let mut copy = Command::new("cp");
        copy.args(["-r", "--sparse=always"]).arg(theirs.snapshot()).arg(data.join("forkd/snapshots"));
        assert!(copy.status().unwrap().success());
        symlink(theirs.data.join("forkd/kernels"), data.join("forkd/kernels")).unwrap();
        Bed { data, ..theirs }
    }

    /// Fresh directories, and no snapshot but what the test makes.
    pub fn with_own_snapshots() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        Bed { dir, data }
    }

    /// A path in the test's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The folder of the snapshot that is packed.
    pub fn snapshot(&self) -> PathBuf {
        self.data.join("forkd/snapshots/python-numpy")
    }

    /// forkd, set up to use this test's directories and hub.
    pub fn command(&self, hub: &Hub) -> Command {
        let mut command = Command::new(program::forkd());
        command
            .env("XDG_DATA_HOME", &self.data)
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("FORKD_HUB_URL", &hub.url)
            .stdin(Stdio::null());
        command
    }

    /// Runs forkd to its end.
    pub fn run(&self, hub: &Hub, arguments: &[&str]) -> Said {
        Said(self.command(hub).args(arguments).output().unwrap())
    }

    /// Runs forkd, which must succeed, and reads its one JSON document.
    pub fn json(&self, hub: &Hub, arguments: &[&str]) -> Value {
        let output = self.command(hub).arg("--json").args(arguments).output().unwrap();
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "forkd {arguments:?} failed: {stdout}{stderr}");
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
    }

    /// Whether a fork has left its directory.
    pub fn has_run_dirs(&self) -> bool {
        fs::read_dir(self.path("run/forkd/forks")).is_ok_and(|entries| entries.count() > 0)
    }

    /// The test fails when a machine lives on or a directory is left.
    pub fn assert_nothing_left(&self, pids: impl Iterator<Item = i64>) {
        for pid in pids {
            assert!(wait_until(Duration::from_secs(5), || !alive(pid)), "machine {pid} lives on");
        }
        // A fork in the background removes it when it has seen its last machine end.
        assert!(wait_until(Duration::from_secs(5), || !self.has_run_dirs()), "a run directory is left");
    }
}

/// The fork of a child: the parent of the process that started it.
pub fn supervisor_of(child: i64) -> i64 {
    let parent = |pid: i64| -> i64 {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
    };
    parent(parent(child))
}

/// Whether a process exists and is no zombie.
pub fn alive(pid: i64) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// Processes, this one's children and zombies aside, that were started with the test's run directory.
pub fn processes_of(run: &Path) -> Vec<u32> {
    let needle = format!("XDG_RUNTIME_DIR={}", run.display());
    let listed = fs::read_dir("/proc").unwrap().flatten();
    let pids = listed.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let ours = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == needle.as_bytes())
    };
    pids.filter(|pid| ours(pid) && alive(i64::from(*pid))).collect()
}

/// How many mounts lie in a directory or come from it.
pub fn mounts_of(dir: &Path) -> usize {
    let dir = dir.to_str().unwrap();
    fs::read_to_string("/proc/self/mounts").unwrap().lines().filter(|line| line.contains(dir)).count()
}

/// Looks every 50 ms.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    condition()
}

/// Whether the full sizes are to be run, which take hours: `FORKD_SOAK=full`.
pub fn soak() -> bool {
    std::env::var_os("FORKD_SOAK").is_some_and(|wanted| wanted == "full")
}

/// Whether no value comes twice.
pub fn distinct<'a>(values: impl Iterator<Item = &'a Value>) -> bool {
    let mut seen: Vec<_> = values.map(Value::to_string).collect();
    let count = seen.len();
    seen.sort();
    seen.dedup();
    seen.len() == count
}

/// A `forkd hub serve` of this test.
pub struct Hub {
    /// Its address.
    pub url: String,
    dir: PathBuf,
    arguments: Vec<String>,
    server: Option<Child>,
}

impl Hub {
    /// A folder with the pack, as `deeplethe/python-numpy`, for the test to serve.
    pub fn publish(bed: &Bed) -> PathBuf {
        let dir = bed.path("hub");
        let packed = packed(bed);
        let published = Command::new(program::forkd())
            .args(["hub", "publish", packed.to_str().unwrap(), "--name", "deeplethe/python-numpy", "--hub"])
            .arg(&dir)
            .output()
            .unwrap();
        assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
        dir
    }

    /// A hub that somebody else serves.
    pub fn at(url: String) -> Hub {
        Hub { url, dir: PathBuf::new(), arguments: Vec::new(), server: None }
    }

    /// Serves the pack.
    pub fn serve(bed: &Bed, arguments: &[&str]) -> Hub {
        Hub::serve_with(bed, arguments, |_| {})
    }

    /// Serves the pack after `change` has had its way with it, the registry still being that of the good one.
    pub fn serve_with(bed: &Bed, arguments: &[&str], change: impl FnOnce(&mut Vec<u8>)) -> Hub {
        let dir = Hub::publish(bed);
        let entry = fs::read_dir(&dir)
            .unwrap()
            .flatten()
            .find(|entry| entry.path().extension() == Some("zst".as_ref()));
        let pack = entry.expect("publish copies the pack").path();
        let good = fs::read(&pack).unwrap();
        let mut bytes = good.clone();
        change(&mut bytes);
        if bytes != good {
            // Never through a hard link to the shared pack.
            fs::remove_file(&pack).unwrap();
            fs::write(&pack, bytes).unwrap();
        }
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Hub { url: "127.0.0.1:0".to_owned(), dir, arguments, server: None }.start()
    }

    /// Where a test finds a machine, and what names it to `forkd fork`: its local snapshot, or, when `FORKD_PACKS_HUB` is the
    /// folder of a hub, its pack there, over a link that `make test-packs-lazily` says. `place` says where the server runs.
    pub fn of_machine(tag: &str, place: &dyn Fn(Command) -> Command) -> (Hub, Vec<String>) {
        let Some(dir) = std::env::var_os("FORKD_PACKS_HUB") else {
            return (Hub::at("http://127.0.0.1:9/".to_owned()), vec!["--tag".to_owned(), tag.to_owned()]);
        };
        let arguments = ["--rtt", "20ms", "--bandwidth", "50MB"].map(str::to_owned).to_vec();
        let hub = Hub { url: "127.0.0.1:0".to_owned(), dir: dir.into(), arguments, server: None };
        (hub.start_within(10, place), vec![format!("deeplethe/{tag}")])
    }

    fn start(self) -> Hub {
        self.start_within(10, &|command| command)
    }

    fn start_within(mut self, attempts: u32, place: &dyn Fn(Command) -> Command) -> Hub {
        let listen = self.url.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let mut server = Command::new(program::forkd());
        server.args(["hub", "serve", self.dir.to_str().unwrap(), "--listen", &listen]).args(&self.arguments);
        let mut server = place(server).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() && attempts > 0 {
            // Somebody else has the port for a moment, perhaps a client that connected to itself.
            let _ = server.wait();
            std::thread::sleep(Duration::from_millis(500));
            return self.start_within(attempts - 1, place);
        }
        self.url =
            line.trim().strip_prefix("listening on ").expect("the server says where it listens").to_owned();
        self.server = Some(server);
        self
    }

    /// Ends the server as a crash would.
    pub fn stop(mut self) -> Hub {
        self.end();
        self
    }

    /// Serves again at the same address.
    pub fn start_again(self) -> Hub {
        self.start()
    }

    fn end(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.end();
    }
}

/// The snapshot as a pack, made once for all tests of a build and again when the snapshot changes.
fn packed(bed: &Bed) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let pack = dir.join(PACK);
    let snapshot = bed.data.join("forkd/snapshots/python-numpy/manifest.toml");
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    if modified(&pack) < modified(&snapshot) || modified(&pack).is_none() {
        let made = bed.path(PACK);
        let output = Command::new(program::forkd())
            .env("XDG_DATA_HOME", &bed.data)
            .args(["pack", "--tag", "python-numpy", "--out"])
            .arg(&made)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let staged = dir.join(format!("{PACK}.{}", std::process::id()));
        fs::copy(&made, &staged).unwrap();
        fs::rename(&staged, &pack).unwrap();
    }
    pack
}
