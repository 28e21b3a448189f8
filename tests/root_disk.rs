//! Builds root disks of recipes: minutes, root, and the packages of a distribution, of PyPI and of npm, so not in every run:
//! `cargo nextest run --workspace --release --run-ignored only -E 'binary(root_disk)'`, with FORKD_AGENT naming a static
//! agent.

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

/// Directories of a forkd of its own.
fn directories(home: &TempDir) -> Paths {
    Paths {
        data: home.path().join("data"),
        cache: home.path().join("cache"),
        runtime: home.path().join("run"),
    }
}

/// A recipe that takes a step of every kind.
const EVERY_STEP: &str = r#"
name = "every-step"
[base]
suite = "bookworm"
packages = ["python3"]
[python]
requirements = "requirements.txt"
[node]
to = "/opt/node"
programs = ["semver"]
[[user]]
name = "dweller"
[[files]]
from = "tree"
to = "/srv/tree"
owner = "dweller"
[[files]]
from = "secret"
to = "/srv/secret"
mode = 0o600
[[run]]
script = """
touch /run/gone
test "$PLACE" = somewhere -a "$(id -u)" = 0
rm /srv/tree/unwanted
python3 -c 'import six; print(six.__version__)' > /srv/version
! python3 -c 'import socket; socket.create_connection(("192.0.2.1", 80), 2)' 2> /srv/network
"""
[[run]]
argv = ["sh", "-c", "id -un > where; pwd >> where; mkdir lasting; touch /tmp/gone"]
user = "dweller"
cwd = "/home/dweller"
[env]
PLACE = "somewhere"
"#;

/// What pip and npm are to get: two packages that depend on nothing.
const REQUIREMENTS: &str =
    "six==1.16.0 --hash=sha256:8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254\n";
const PACKAGE: &str = r#"{"name": "x", "private": true, "dependencies": {"semver": "7.6.3"}}"#;
const PACKAGE_LOCK: &str = r#"{
  "name": "x", "lockfileVersion": 3, "requires": true,
  "packages": {
    "": {"name": "x", "dependencies": {"semver": "7.6.3"}},
    "node_modules/semver": {
      "version": "7.6.3", "bin": {"semver": "bin/semver.js"},
      "integrity": "sha512-oVekP1cKtI+CTDvHWYFUcMtsK/00wmAEfyqKfNdARm8u1wNVhSgaX7A8d4UuIlUI5e84iEwOhs7ZPYRmzU9U6A=="
    }
  }
}"#;

fn every_step() -> TempDir {
    let dir = TempDir::new().unwrap();
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    std::fs::create_dir_all(dir.path().join("tree/below")).unwrap();
    put("recipe.toml", EVERY_STEP);
    put("requirements.txt", REQUIREMENTS);
    put("package.json", PACKAGE);
    put("package-lock.json", PACKAGE_LOCK);
    put("tree/below/file", "contents");
    put("tree/unwanted", "");
    put("secret", "secret");
    std::os::unix::fs::symlink("below/file", dir.path().join("tree/link")).unwrap();
    dir
}

#[test]
#[ignore = "takes minutes, root and packages of a distribution, of PyPI and of npm"]
fn every_step_is_done_once_and_kept() {
    let home = TempDir::new().unwrap();
    let paths = directories(&home);
    let folder = every_step();
    let build = || {
        let said = std::cell::RefCell::new(Vec::new());
        let recipe = Recipe::load(folder.path()).unwrap();
        let disk =
            root_disk(&paths, &recipe, &Interrupt::default(), |line| said.borrow_mut().push(line.to_owned()));
        (disk, said.into_inner())
    };
    let (disk, said) = build();
    let disk = disk.unwrap_or_else(|error| panic!("{error:?}: {said:#?}"));
    let mounted = Mounted::new(&disk);
    let at = |path: &str| mounted.0.path().join(path);
    let read = |path: &str| std::fs::read_to_string(at(path)).unwrap();
    assert_eq!(read("srv/version"), "1.16.0\n");
    assert!(read("srv/network").contains("unreachable"), "{}", read("srv/network"));
    assert_eq!(read("home/dweller/where"), "dweller\n/home/dweller\n");
    assert_eq!(read("srv/tree/link"), "contents");
    assert!(!at("srv/tree/unwanted").exists() && !at("tmp/gone").exists() && !at("run/gone").exists());
    use std::os::unix::fs::MetadataExt;
    let owned = |path: &str| std::fs::metadata(at(path)).map(|m| (m.uid(), m.mode() & 0o7777)).unwrap();
    assert_eq!((owned("srv/tree/below"), owned("srv/secret")), ((1000, 0o755), (0, 0o600)));
    assert_eq!(owned("home/dweller/lasting").0, 1000);
    let program = std::fs::read_link(at("usr/local/bin/semver")).unwrap();
    assert_eq!(program, Path::new("/opt/node/node_modules/.bin/semver"));
    assert!(at("opt/node/node_modules/semver/package.json").is_file());
    drop(mounted);

    // The same again from what was kept, and then with a change of the last step alone.
    let digest = sha256_file(&disk).unwrap();
    std::fs::remove_file(&disk).unwrap();
    let (again, said) = build();
    assert_eq!(sha256_file(&again.unwrap()).unwrap(), digest, "{said:#?}");
    assert!(
        !said
            .iter()
            .any(|line| line.contains("installing") || line.contains("getting") || line.contains("run "))
    );
    let text = EVERY_STEP.replace("mkdir lasting", "exit 7");
    std::fs::write(folder.path().join("recipe.toml"), &text).unwrap();
    let (failed, said) = build();
    let error = failed.unwrap_err().to_string();
    assert!(error.contains("run 2 of every-step"), "{error}");
    assert!(!said.iter().any(|line| line.contains("run 1 ") || line.contains("getting")), "{said:#?}");
    std::fs::write(folder.path().join("recipe.toml"), text.replace("exit 7", "mkdir other")).unwrap();
    let (mended, said) = build();
    mended.unwrap();
    assert!(!said.iter().any(|line| line.contains("run 1 ")), "{said:#?}");

    // What is not what its hash says, or not there.
    std::fs::write(folder.path().join("requirements.txt"), REQUIREMENTS.replace("8abb", "0000")).unwrap();
    let error = format!("{:?}", build().0.unwrap_err());
    assert!(error.contains("getting Python packages") && error.contains("DO NOT MATCH"), "{error}");
    std::fs::write(folder.path().join("requirements.txt"), REQUIREMENTS).unwrap();
    std::fs::write(
        folder.path().join("package-lock.json"),
        PACKAGE_LOCK.replace("sha512-oVek", "sha512-AAAA"),
    )
    .unwrap();
    let error = format!("{:?}", build().0.unwrap_err());
    assert!(error.contains("getting Node packages") && error.contains("EINTEGRITY"), "{error}");
    let left: Vec<_> =
        std::fs::read_dir(disk.parent().unwrap()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("build-")), "{left:?}");
}

#[test]
#[ignore = "takes a minute, root and the distribution's packages"]
fn the_python_recipe_becomes_a_root_disk() {
    let home = TempDir::new().unwrap();
    let paths = directories(&home);
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
