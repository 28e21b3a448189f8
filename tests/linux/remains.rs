//! kill -9 of commands that build machines and packs, at several moments: their processes and mounts go with them, and
//! `forkd cleanup` removes all that is left of them on disk. `FORKD_SOAK=full` strikes more often.

use super::harness::{Bed, Hub, mounts_of, processes_of, wait_until};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// How long processes may take to follow the one that was killed.
const GONE_WITHIN: Duration = Duration::from_secs(5);
const SLOW_PROBE: &str = "__import__('time').sleep(100)";

/// Directories of which every file is known.
struct House {
    bed: Bed,
    hub: Hub,
}

impl House {
    fn new() -> House {
        let bed = Bed::copied();
        for name in ["tmp", "out", "recipe"] {
            fs::create_dir(bed.path(name)).unwrap();
        }
        let recipe = "name = \"small\"\nmemory_mib = 128\n[base]\nsuite = \"bookworm\"\n";
        fs::write(bed.path("recipe/recipe.toml"), recipe).unwrap();
        House { bed, hub: Hub::at("http://127.0.0.1:9/".to_owned()) }
    }

    fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self.bed.command(&self.hub);
        command.args(arguments).env("TMPDIR", self.bed.path("tmp")).current_dir(self.bed.path("out"));
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn finish(&self, arguments: &[&str]) {
        assert!(self.start(arguments).wait().unwrap().success(), "{arguments:?} failed");
    }

    /// Every file that nobody asked for. Locks, root disks and empty directories stay.
    fn remains(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for place in ["tmp", "out", "run", "cache", "data"] {
            files(&self.bed.path(place), &mut found);
        }
        let wanted = |path: &PathBuf| {
            let (kept, name) = (path.strip_prefix(self.bed.path("")).unwrap(), path.file_name().unwrap());
            kept.starts_with("data/forkd/snapshots/python-numpy")
                || kept == Path::new("out/old.tar.zst")
                || ["build.lock", "kernels"].iter().any(|kept| name == *kept)
                || (kept.parent() == Some(Path::new("cache/forkd/root-disks")) && !path.is_dir())
        };
        found.retain(|path| !wanted(path));
        found
    }

    /// cgroups of machines that any of these commands has started.
    fn cgroups(&self, ids: &[String]) -> Vec<PathBuf> {
        let mut found = Vec::new();
        directories(Path::new("/sys/fs/cgroup"), &mut found);
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        found.retain(|path| ids.iter().any(|id| name(path).starts_with(&format!("{id}-"))));
        found
    }

    fn run_dirs(&self) -> Vec<String> {
        let listed = fs::read_dir(self.bed.path("run/forkd/forks")).into_iter().flatten().flatten();
        listed.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

/// Files, and directories that somebody works in.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if !entry.file_type().unwrap().is_dir() || name.starts_with('.') || name.starts_with("build-") {
            found.push(entry.path());
        } else {
            files(&entry.path(), found);
        }
    }
}

fn directories(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            directories(&entry.path(), found);
            found.push(entry.path());
        }
    }
}

/// What a command was doing when it was killed.
#[derive(Debug, Default)]
struct Seen {
    tools: usize,
    machines: usize,
    files: usize,
}

/// Kills a command after a moment, cleans up, and fails when anything is left.
fn strike(house: &House, arguments: &[&str], after: Duration) -> Seen {
    let run = house.bed.path("run");
    let mut command = house.start(arguments);
    std::thread::sleep(after);
    let ids = house.run_dirs();
    let programs = processes_of(&run);
    let is_tool = |pid: &&u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        !name.starts_with("forkd")
    };
    let tools = programs.iter().filter(is_tool).count();
    // Besides them there are the command itself and its zygote.
    let machines = (programs.len() - tools).saturating_sub(2);
    // On a fast host it may be over.
    let _ = command.kill();
    let killed = command.wait().unwrap().code().is_none();
    assert!(wait_until(GONE_WITHIN, || processes_of(&run).is_empty()), "{arguments:?}: processes go on");
    assert_eq!(mounts_of(&house.bed.path("")), 0, "{arguments:?}: mounts are left");
    let files = if killed { house.remains().len() } else { 0 };
    let _ = fs::remove_file(house.bed.path("out/new.tar.zst"));
    let _ = fs::remove_dir_all(house.bed.path("data/forkd/snapshots/new"));
    house.finish(&["cleanup"]);
    assert_eq!(house.remains(), Vec::<PathBuf>::new(), "{arguments:?} after {after:?}");
    assert_eq!(house.cgroups(&ids), Vec::<PathBuf>::new(), "{arguments:?} after {after:?}");
    Seen { tools, machines, files }
}

#[test]
fn nothing_is_left_of_a_killed_build_trace_pack_or_repack() {
    let full = std::env::var_os("FORKD_SOAK").is_some_and(|wanted| wanted == "full");
    let house = House::new();
    let kernel = house.bed.run(&house.hub, &["kernel", "path"]).success();
    let (recipe, kernel) = (house.bed.path("recipe"), kernel.trim());
    let rootfs = house.bed.snapshot().join("rootfs.erofs");
    let (recipe, rootfs) = (recipe.to_str().unwrap(), rootfs.to_str().unwrap());
    house.finish(&["pack", "--tag", "python-numpy", "--out", "old.tar.zst"]);
    let build: &[&str] = &["build", recipe, "--tag", "new"];
    let snapshot: &[&str] = &["snapshot", "--tag", "new", "--kernel", kernel, "--rootfs", rootfs];
    let trace: &[&str] = &["trace", "--tag", "python-numpy", "--eval", SLOW_PROBE];
    let trace_pack: &[&str] = &["trace", "old.tar.zst", "--out", "new.tar.zst", "--eval", SLOW_PROBE];
    let repack: &[&str] = &["repack", "old.tar.zst", "--out", "new.tar.zst", "--level", "22"];
    let pack: &[&str] = &["pack", "--tag", "python-numpy", "--out", "new.tar.zst", "--level", "22"];
    let unpack: &[&str] = &["unpack", "old.tar.zst", "--tag", "new"];
    let mut moments = vec![
        (build, vec![50, 700, 3000]),
        (snapshot, vec![300, 900]),
        (trace, vec![100, 3000]),
        (trace_pack, vec![100, 3500]),
        (repack, vec![50, 300, 700]),
        (pack, vec![50, 400]),
        (unpack, vec![50]),
    ];
    if full {
        moments.iter_mut().for_each(|(_, times)| times.extend([10, 20, 500, 1000, 2000, 5000, 8000, 12000]));
        moments.last_mut().unwrap().1.truncate(1);
    }
    println!("| killed | after (ms) | tools | machines | files left before cleanup |\n|---|---|---|---|---|");
    let mut all = Vec::new();
    for (arguments, times) in moments {
        for after in times {
            let seen = strike(&house, arguments, Duration::from_millis(after));
            let Seen { tools, machines, files } = seen;
            println!("| {} | {after} | {tools} | {machines} | {files} |", arguments[0]);
            all.push((arguments[0], seen));
        }
    }
    let any = |verb: &str, had: fn(&Seen) -> usize| all.iter().any(|(of, seen)| *of == verb && had(seen) > 0);
    assert!(any("build", |seen| seen.tools), "no build was killed while it made its root disk");
    assert!(any("snapshot", |seen| seen.machines) && any("trace", |seen| seen.machines), "{all:?}");
    assert!(["build", "snapshot", "trace", "repack", "pack"].iter().all(|verb| any(verb, |seen| seen.files)));
}
