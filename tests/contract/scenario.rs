//! Every command that needs no guest, run once in an order in which each finds what it needs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use forkd_fs::trace::{PageRun, RegionTrace, Trace};

use crate::golden::Names;
use crate::program::{command, date, names, run, text};
use crate::support::{Hub, Lab, Run, flip, legacy_pack, noise, wait_until};

const MEMBERS: [&str; 6] =
    ["manifest.toml", "snapshot.json", "vmstate", "trace", "memory.bin", "rootfs.erofs"];

/// One command line and what came of it.
pub struct Said {
    pub name: &'static str,
    pub args: Vec<String>,
    pub run: Run,
}

/// A run of the scenario, with `--json` everywhere or nowhere.
pub struct Stage {
    pub lab: Lab,
    pub names: Names,
    pub said: Vec<Said>,
    /// Files that commands wrote.
    pub files: Vec<(&'static str, String)>,
    json: bool,
}

impl Stage {
    pub fn play(json: bool) -> Stage {
        let lab = Lab::new();
        let names = names(&lab);
        let mut stage = Stage { lab, names, said: Vec::new(), files: Vec::new(), json };
        stage.empty();
        let pack = stage.packs();
        stage.old_packs();
        stage.publish(&pack);
        stage.hub();
        stage.cache();
        stage.remains();
        stage
    }

    fn arguments<'a>(&self, args: &[&'a str]) -> Vec<&'a str> {
        if self.json { [&["--json"], args].concat() } else { args.to_vec() }
    }

    fn say(&mut self, name: &'static str, args: &[&str]) {
        let args = self.arguments(args);
        let run = run(&self.lab, &args);
        self.keep(name, &args, run);
    }

    /// Repacks. The new pack has the time of its making, and a digest to match.
    fn repack(&mut self, name: &'static str, args: &[&str]) {
        self.say(name, &[&["repack"], args].concat());
        let said = &self.said.last().unwrap().run.stdout;
        if let Some(digest) = said.split("sha256 ").nth(1) {
            self.names.name(digest.trim(), "sha256");
        }
    }

    fn keep(&mut self, name: &'static str, args: &[&str], run: Run) {
        self.said.push(Said { name, args: args.iter().map(|arg| (*arg).to_owned()).collect(), run });
    }

    /// Where nothing is.
    fn empty(&mut self) {
        for (name, args) in [
            ("doctor", &["doctor"][..]),
            ("snapshots-empty", &["snapshots"]),
            ("cache-ls-empty", &["cache", "ls"]),
            ("cache-verify-empty", &["cache", "verify"]),
            ("ps-empty", &["ps"]),
            ("tree-empty", &["tree"]),
            ("warm-list-empty", &["warm", "--list"]),
            ("warm-stop-all-empty", &["warm", "--stop", "--all"]),
            ("kill-all-empty", &["kill", "--all"]),
            ("pause-all-empty", &["pause", "--all"]),
            ("resume-all-empty", &["resume", "--all"]),
            ("cleanup-empty", &["cleanup"]),
        ] {
            self.say(name, args);
        }
        if self.json {
            self.say("completions", &["completions", "bash"]);
        }
    }

    /// Snapshots and packs as local files.
    fn packs(&mut self) -> PathBuf {
        let dir = self.lab.snapshot("demo", 16);
        fs::write(dir.join("trace"), trace(16)).unwrap();
        fs::write(dir.join(".console"), "the first line\nthe second\n").unwrap();
        date(&dir);
        self.say("snapshots", &["snapshots"]);
        self.say("images", &["images"]);
        self.say("logs-of-snapshot", &["logs", "--tag", "demo"]);
        let (pack, again) = (self.lab.path("demo.forkd-snapshot.tar.zst"), self.lab.path("again.tar.zst"));
        let about =
            ["--chunk", "64KiB", "--description", "A demonstration", "--base-image", "debian:bookworm"];
        self.say("pack", &[&["pack", "--tag", "demo", "--out", text(&pack)][..], &about].concat());
        self.say("unpack", &["unpack", text(&pack), "--tag", "copy"]);
        self.say("inspect-file", &["inspect", text(&pack)]);
        let picture = self.lab.path("picture.svg");
        // The picture is as wide as the path in its title.
        let relative = "../demo.forkd-snapshot.tar.zst";
        self.say("inspect-heatmap", &["inspect", relative, "--heatmap", text(&picture)]);
        self.files.push(("heatmap.svg", fs::read_to_string(&picture).unwrap()));
        self.repack("repack", &[text(&pack), "--out", text(&again), "--chunk", "128KiB"]);
        self.delta(&pack);
        pack
    }

    /// What the machine of a pack has become, beside the pack.
    fn delta(&mut self, base: &Path) {
        let dir = self.lab.snapshot("later", 16);
        for (member, at) in [("memory.bin", 5 << 20), ("memory.bin", 9 << 20), ("vmstate", 0)] {
            let bytes = fs::read(self.lab.snapshot_dir("demo").join(member)).unwrap();
            let file = fs::File::options().write(true).open(dir.join(member)).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            file.write_all_at(&noise(5, 5000), at).unwrap();
        }
        date(&dir);
        let delta = self.lab.path("later.forkd-snapshot.tar.zst");
        let args = ["pack", "--tag", "later", "--delta", "--base", text(base), "--out", text(&delta)];
        self.say("pack-delta", &args);
        self.say("inspect-delta", &["inspect", text(&delta)]);
        self.say("diff", &["diff", text(&delta)]);
        self.say("diff-tags", &["diff", "later", "demo"]);
        fs::remove_dir_all(dir).unwrap();
    }

    /// Packs of the predecessor.
    fn old_packs(&mut self) {
        let old = legacy_pack(&self.lab, &noise(3, 10_000));
        self.say("inspect-old", &["inspect", text(&old)]);
        self.say("unpack-old", &["unpack", text(&old)]);
        let new = self.lab.path("new.forkd-snapshot.tar.zst");
        self.repack("repack-old", &[text(&old), "--out", text(&new)]);
    }

    fn publish(&mut self, pack: &Path) {
        let (hub, pack) = (self.lab.path("hub"), text(pack));
        let publish = ["hub", "publish", pack, "--hub", text(&hub), "--name", "lab/demo"];
        self.say("hub-publish", &publish);
        let more = ["--version", "v9", "--recipe-path", "recipes/demo"];
        self.say("hub-publish-version", &[&publish[..], &more].concat());
        self.files.push(("registry.json", fs::read_to_string(hub.join("registry.json")).unwrap()));
        let page = self.lab.path("page.html");
        self.say("hub-page", &["hub", "page", "--hub", text(&hub), "--out", text(&page)]);
        // Into a folder of its own: an entry of a release that is never made leads nowhere.
        let checkout = self.lab.path("checkout");
        let release = ["--name", "lab/demo", "--github", "acme/packs"];
        let publish = [&["hub", "publish", pack, "--hub", text(&checkout)], &release[..]].concat();
        self.say("hub-publish-github", &publish);
    }

    /// `forkd hub serve`: what it prints when it listens.
    fn serve(&mut self) {
        let hub = self.lab.path("hub");
        let args = self.arguments(&["hub", "serve", "--listen", "127.0.0.1:0", text(&hub)]);
        let mut server =
            command(&self.lab, &args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let mut stdout = String::new();
        while let Some(Ok(line)) = lines.next() {
            stdout.push_str(&(line + "\n"));
            if !self.json || stdout.ends_with("}\n") {
                break;
            }
        }
        server.kill().unwrap();
        server.wait().unwrap();
        let address = stdout.split("http://").nth(1).unwrap().split(['"', '/', '\n']).next().unwrap();
        self.names.name(address, "address");
        self.keep("hub-serve", &args, Run { code: None, stdout, stderr: String::new() });
    }

    /// Commands that ask a hub over HTTP.
    fn hub(&mut self) {
        self.serve();
        let hub = Hub::start(&self.lab, &[]);
        self.names.name(&hub.address, "address");
        let url = hub.url();
        let file = format!("{url}lab-demo-v1.forkd-snapshot.tar.zst");
        self.say("images-hub", &["images", "--hub", &url]);
        self.say("inspect-url", &["inspect", &file]);
        self.say("inspect-ref", &["inspect", "lab/demo@v1", "--hub", &url]);
        let mountpoint = self.lab.path("mnt");
        fs::create_dir(&mountpoint).unwrap();
        self.say("mount", &["mount", text(&mountpoint), "--hub", &url]);
        let unmount = Unmount { lab: &self.lab, mountpoint: &mountpoint };
        let version = mountpoint.join("lab/demo/v9");
        for member in MEMBERS {
            read(&version.join(member));
        }
        for (name, file) in [("mount-stats.json", "stats.json"), ("mount-blocks.txt", "blocks")] {
            self.files.push((name, read(&version.join(".forkd").join(file))));
        }
        // The daemon ends without waiting for chunks that are being written to the cache.
        wait_until("every chunk is cached", || is_cache_complete(&self.lab));
        std::mem::forget(unmount);
        self.unmount(text(&mountpoint));
        self.say("pull", &["pull", "lab/demo", "--tag", "pulled", "--hub", &url]);
        let again = self.lab.path("of-the-hub.tar.zst");
        self.repack("repack-ref", &["lab/demo", "--out", text(&again), "--hub", &url]);
    }

    /// Mount namespaces that other tests' guests get at this moment can keep it busy for a while.
    fn unmount(&mut self, mountpoint: &str) {
        for _ in 0..100 {
            self.say("umount", &["umount", mountpoint]);
            if self.said.last().unwrap().run.code == Some(0) {
                return;
            }
            self.said.pop();
            std::thread::sleep(Duration::from_millis(100));
        }
        run(&self.lab, &["umount", "--lazy", mountpoint]);
        panic!("{mountpoint} stays busy");
    }

    fn cache(&mut self) {
        self.say("cache-ls", &["cache", "ls"]);
        self.say("cache-verify", &["cache", "verify"]);
        let folders = fs::read_dir(self.lab.path("cache/forkd/chunks")).unwrap().flatten();
        let files = folders.filter_map(|folder| fs::read_dir(folder.path()).ok()).flatten().flatten();
        let largest = files
            .map(|file| file.path())
            .max_by_key(|path| (fs::metadata(path).unwrap().len(), path.clone()));
        flip(&largest.unwrap(), 100);
        self.say("cache-verify-damaged", &["cache", "verify"]);
        self.say("cache-ls-damaged", &["cache", "ls"]);
        self.say("cache-gc", &["cache", "gc"]);
        self.say("cache-gc-all", &["cache", "gc", "--all"]);
    }

    /// What is removed.
    fn remains(&mut self) {
        self.say("rmi", &["rmi", "copy", "pulled"]);
        fs::create_dir(self.lab.path("data/forkd/snapshots/.draft-dead")).unwrap();
        self.say("cleanup", &["cleanup"]);
        fs::remove_file(self.lab.snapshot_dir("demo").join("manifest.toml")).unwrap();
        self.say("snapshots-broken", &["snapshots"]);
    }
}

/// Unmounts when the test fails while something is mounted.
struct Unmount<'a> {
    lab: &'a Lab,
    mountpoint: &'a Path,
}

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        run(self.lab, &["umount", "--lazy", text(self.mountpoint)]);
    }
}

/// What is in a file of the mount. Another program reads it: processes that other tests start inherit for a moment what
/// this one has open, and the mount is busy then.
fn read(path: &Path) -> String {
    let output = Command::new("cat").arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn is_cache_complete(lab: &Lab) -> bool {
    let cache = run(lab, &["--json", "cache", "ls"]).ok().json();
    let packs = cache["packs"].as_array().unwrap();
    cache["unfinished"] == 0 && !packs.is_empty() && packs.iter().all(|pack| pack["complete"] == true)
}

/// Two buckets in the half of the memory that is stored, with a page that both name.
fn trace(mib: usize) -> Vec<u8> {
    let half = (mib << 20) as u32 / 2 / 4096;
    let buckets = vec![
        PageRun::from_pages([0, half, half + 1]),
        PageRun::from_pages([half + 1, half + 2, half + 100]),
        PageRun::from_pages([half + 500]),
    ];
    let memory = RegionTrace { file: "memory.bin".into(), buckets };
    let root = RegionTrace { file: "rootfs.erofs".into(), buckets: vec![PageRun::from_pages([0])] };
    Trace { regions: vec![memory, root] }.encode().unwrap()
}
