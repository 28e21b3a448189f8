//! Builds the root disk of recipes/python-numpy: a minute, root, and the distribution's packages, so not in every run:
//! `cargo nextest run -p forkd --test root_disk --run-ignored only`, with FORKD_AGENT naming a static agent.

use std::path::Path;
use std::process::Command;

use forkd_engine::build::recipe::{Recipe, root_disk};
use forkd_engine::build::tools::sha256_file;
use forkd_engine::interrupt::Interrupt;
use forkd_engine::local::paths::Paths;
use tempfile::TempDir;

/// An image mounted while this lives.
struct Mounted(TempDir);

impl Mounted {
    fn new(image: &Path) -> Self {
        let dir = TempDir::new().unwrap();
        let status =
            Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(image).arg(dir.path()).status();
        assert!(status.unwrap().success(), "the kernel does not mount {}", image.display());
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
#[ignore = "takes a minute, root and the distribution's packages"]
fn the_python_recipe_becomes_a_root_disk() {
    let home = TempDir::new().unwrap();
    let paths = Paths {
        data: home.path().join("data"),
        cache: home.path().join("cache"),
        runtime: home.path().join("run"),
    };
    let recipe = Recipe::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/python-numpy")).unwrap();
    let build = || {
        let started = std::time::Instant::now();
        let disk = root_disk(&paths, &recipe, &Interrupt::default(), |_| {}).unwrap();
        println!("{} s, {} bytes", started.elapsed().as_secs_f32(), std::fs::metadata(&disk).unwrap().len());
        disk
    };
    let disk = build();
    assert_eq!(std::fs::metadata(&disk).unwrap().len() % (2 << 20), 0);
    assert_eq!(build(), disk, "the second time it is cached");

    let mounted = Mounted::new(&disk);
    let root = mounted.0.path();
    for file in ["forkd/agent", "forkd/warm.json", "opt/forkd/worker.py", "etc/hosts"] {
        assert!(root.join(file).is_file(), "{file}");
    }
    for gone in ["etc/hostname", "etc/machine-id", "etc/resolv.conf", "etc/apt/sources.list"] {
        assert!(!root.join(gone).exists(), "{gone} tells about the building machine");
    }
    assert_eq!(std::fs::read_dir(root.join("etc/apt/sources.list.d")).map_or(0, Iterator::count), 0);

    // The interpreter must find its compiled modules valid: with times changed it would compile numpy at every start.
    let program = "import numpy, sys; print(numpy.zeros(5).tolist())";
    let output = Command::new("chroot").arg(root).args(["python3", "-v", "-c", program]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "[0.0, 0.0, 0.0, 0.0, 0.0]");
    let talk = String::from_utf8_lossy(&output.stderr);
    assert!(talk.contains("numpy/core/__pycache__/multiarray.cpython"), "numpy's compiled modules are used");
    let stale: Vec<&str> = talk.lines().filter(|line| line.contains("bytecode is stale")).collect();
    assert!(stale.is_empty(), "{stale:?}");
    drop(mounted);

    // From the kept distribution, the same bytes again.
    let digest = sha256_file(&disk).unwrap();
    std::fs::remove_file(&disk).unwrap();
    assert_eq!(sha256_file(&build()).unwrap(), digest);
    let left: Vec<_> =
        std::fs::read_dir(disk.parent().unwrap()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 3, "an image, a distribution and a lock: {left:?}");
}
