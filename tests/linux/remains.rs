//! kill -9 of commands that build machines and packs: as soon as they have what they could leave (a program, a machine,
//! a directory), and at moments chosen blindly. Their processes and mounts go with them, and `forkd cleanup` removes
//! all that is left of them on disk. `FORKD_SOAK=full` strikes more often.

use super::harness::{Bed, Hub, mounts_of, processes_of, soak, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// How long processes may take to follow the one that was killed.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// How long a command may take to be where it is to be killed.
const THERE_WITHIN: Duration = Duration::from_secs(60);
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

    /// Programs that a command runs, and machines.
    fn processes(&self) -> (usize, usize) {
        let programs = processes_of(&self.bed.path("run"));
        let tools = programs.iter().filter(|pid| !name_of(**pid).starts_with("forkd")).count();
        // Besides them there are the command itself and its zygote.
        (tools, (programs.len() - tools).saturating_sub(2))
    }

    fn is_there(&self, moment: Moment) -> bool {
        match moment {
            Moment::After(_) => true,
            Moment::Installer => {
                processes_of(&self.bed.path("run")).into_iter().any(|pid| name_of(pid) == "mmdebstrap")
            }
            Moment::Machine => self.processes().1 > 0,
            Moment::Workspace => fs::read_dir(self.bed.path("out"))
                .unwrap()
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().starts_with(".forkd-repack-")),
        }
    }

    fn run_dirs(&self) -> Vec<String> {
        let listed = fs::read_dir(self.bed.path("run/forkd/forks")).into_iter().flatten().flatten();
        listed.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
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

/// When a command is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// So many milliseconds after its start, wherever it is.
    After(u64),
    /// It runs mmdebstrap, which starts others and mounts.
    Installer,
    /// It runs a machine.
    Machine,
    /// It has a workspace beside `--out`.
    Workspace,
}

/// Kills a command at a moment, cleans up, and fails when anything is left.
fn strike(house: &House, arguments: &[&str], moment: Moment) {
    let mut command = house.start(arguments);
    let started = Instant::now();
    if let Moment::After(milliseconds) = moment {
        std::thread::sleep(Duration::from_millis(milliseconds));
    }
    while !house.is_there(moment) {
        let over = command.try_wait().unwrap();
        assert!(over.is_none(), "{arguments:?} was over before it was there: {moment:?}, {over:?}");
        assert!(started.elapsed() < THERE_WITHIN, "{arguments:?} never was there: {moment:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    let (after, ids) = (started.elapsed(), house.run_dirs());
    let (tools, machines) = house.processes();
    // On a fast host it may be over.
    let _ = command.kill();
    let killed = command.wait().unwrap().code().is_none();
    let run = house.bed.path("run");
    assert!(wait_until(GONE_WITHIN, || processes_of(&run).is_empty()), "{arguments:?}: processes go on");
    assert_eq!(mounts_of(&house.bed.path("")), 0, "{arguments:?}: mounts are left");
    let files = if killed { house.remains().len() } else { 0 };
    assert!(
        !matches!(moment, Moment::Workspace) || files > 0,
        "{arguments:?}: was over before it was killed"
    );
    let _ = fs::remove_file(house.bed.path("out/new.tar.zst"));
    let _ = fs::remove_dir_all(house.bed.path("data/forkd/snapshots/new"));
    house.finish(&["cleanup"]);
    assert_eq!(house.remains(), Vec::<PathBuf>::new(), "{arguments:?} at {moment:?}");
    assert_eq!(house.cgroups(&ids), Vec::<PathBuf>::new(), "{arguments:?} at {moment:?}");
    let ms = after.as_millis();
    println!("| {} | {moment:?} | {ms} | {tools} | {machines} | {files} |", arguments[0]);
}

#[test]
fn nothing_is_left_of_a_killed_build_trace_pack_or_repack() {
    use Moment::{After, Installer, Machine, Workspace};
    let full = soak();
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
        (build, vec![After(50), Installer, After(3000)]),
        (snapshot, vec![After(100), Machine, After(900)]),
        (trace, vec![After(100), Machine]),
        (trace_pack, vec![After(100), Workspace, Machine]),
        (repack, vec![After(50), Workspace]),
        (pack, vec![After(50), Workspace]),
        (unpack, vec![After(50)]),
    ];
    if full {
        let blind = [10, 20, 500, 1000, 2000, 5000, 8000, 12000].map(After);
        moments.iter_mut().for_each(|(_, times)| times.extend(blind));
        moments.last_mut().unwrap().1.truncate(1);
    }
    println!("| killed | when | after (ms) | tools | machines | files left before cleanup |");
    println!("|---|---|---|---|---|---|");
    for (arguments, moments) in moments {
        for moment in moments {
            strike(&house, arguments, moment);
        }
    }
}

#[test]
fn a_signal_ends_pack_trace_and_repack_with_its_status_and_nothing_is_left() {
    let house = House::new();
    house.finish(&["pack", "--tag", "python-numpy", "--out", "old.tar.zst"]);
    let trace: &[&str] = &["trace", "old.tar.zst", "--out", "new.tar.zst", "--eval", SLOW_PROBE];
    let repack: &[&str] = &["repack", "old.tar.zst", "--out", "new.tar.zst", "--level", "22"];
    let pack: &[&str] = &["pack", "--tag", "python-numpy", "--out", "new.tar.zst", "--level", "22"];
    for (arguments, signal, status) in [
        (pack, Signal::HUP, 129),
        (pack, Signal::TERM, 143),
        (trace, Signal::HUP, 129),
        (trace, Signal::TERM, 143),
        (repack, Signal::HUP, 129),
    ] {
        let mut command = house.start(arguments);
        assert!(wait_until(THERE_WITHIN, || house.is_there(Moment::Workspace)), "{arguments:?}");
        kill_process(Pid::from_child(&command), signal).unwrap();
        assert_eq!(command.wait().unwrap().code(), Some(status), "{arguments:?}");
        assert_eq!(house.remains(), Vec::<PathBuf>::new(), "{arguments:?}");
    }
}
