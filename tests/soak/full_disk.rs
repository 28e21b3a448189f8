//! Disks without a free byte: reads go on without a cache, pulls say why they fail and leave nothing.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use forkd_fs::digest::Digest;

use crate::small_disk::SmallDisk;
use crate::support::{Hub, Lab, Mount, Run, dir_bytes};

impl SmallDisk {
    /// Takes every byte that is free.
    fn fill(&self) {
        let mut filler = File::create(self.dir.join("filler")).unwrap();
        for piece in [64 << 10, 4096, 1] {
            while filler.write_all(&vec![1; piece]).is_ok() {}
        }
        let free = rustix::fs::statvfs(&self.dir).unwrap().f_bavail;
        assert_eq!(free, 0, "blocks are free");
    }

    /// Files on it but for the filler.
    fn files(&self) -> Vec<PathBuf> {
        fn below(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                match entry.path() {
                    path if path.is_dir() => below(&path, found),
                    path if path.ends_with("filler") => {}
                    path => found.push(path),
                }
            }
        }
        let mut found = Vec::new();
        below(&self.dir, &mut found);
        found
    }
}

fn memory_is_right(lab: &Lab, mount: &Mount<'_>) {
    let read =
        |path: PathBuf| Digest::of(&fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
    let original = read(lab.snapshot_dir("demo").join("memory.bin"));
    assert_eq!(read(mount.version("demo").join("memory.bin")), original);
}

fn pull(lab: &Lab, hub: &Hub, variable: &str, disk: &SmallDisk) -> Run {
    let mut command = lab.command(&["pull", "lab/demo", "--tag", "pulled", "--hub", &hub.url()]);
    command.env(variable, &disk.dir).output().unwrap().into()
}

#[test]
fn a_full_disk_under_the_cache_costs_only_the_cache() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    let disk = SmallDisk::mount(lab.path("cache"), 2048);
    disk.fill();
    let mount = Mount::new(&lab, "mnt", &hub.url(), &[]);
    memory_is_right(&lab, &mount);
    assert_eq!(mount.stats("demo")["failed_reads"], 0);
    drop(mount);
    assert!(disk.files().iter().all(|file| fs::metadata(file).unwrap().len() == 0), "{:?}", disk.files());
    // The disk fills up on the way: half of the chunks are kept, all are right.
    fs::remove_file(disk.dir.join("filler")).unwrap();
    for name in ["one", "two"] {
        let mount = Mount::new(&lab, name, &hub.url(), &[]);
        memory_is_right(&lab, &mount);
        assert_eq!(mount.stats("demo")["failed_reads"], 0);
    }
    assert!(dir_bytes(&disk.dir) <= 2 << 20);
    let pulled = pull(&lab, &hub, "XDG_CACHE_HOME", &disk).ok();
    assert!(pulled.stdout.contains("pulled"), "{}", pulled.stdout);
}

#[test]
fn a_pull_onto_a_full_disk_says_so_and_leaves_nothing() {
    let lab = Lab::new();
    lab.hub_dir("demo");
    let hub = Hub::start(&lab, &[]);
    // Full from the start, and full half way through its 4 MiB of data.
    for (kib, full) in [(512, true), (2048, false)] {
        let disk = SmallDisk::mount(lab.path("small"), kib);
        if full {
            disk.fill();
        }
        pull(&lab, &hub, "XDG_DATA_HOME", &disk).fails(1, &["No space left on device", "small"]);
        assert_eq!(disk.files(), Vec::<PathBuf>::new());
        assert!(!disk.dir.join("forkd/snapshots/pulled").exists());
    }
    // A mount that cannot leave its record does not stay either.
    let disk = SmallDisk::mount(lab.path("small"), 64);
    disk.fill();
    let dir = lab.path("mnt");
    fs::create_dir(&dir).unwrap();
    let mut command = lab.command(&["mount", "--hub", &hub.url()]);
    let run = Run::from(command.arg(&dir).env("XDG_RUNTIME_DIR", &disk.dir).output().unwrap());
    run.fails(1, &["No space left on device"]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(dir.to_str().unwrap()));
}
