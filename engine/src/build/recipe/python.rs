//! Packages from PyPI: this machine's pip gets the wheels, the tree's Python installs them without a network. No code of
//! a package runs on this machine, which is why only wheels will do.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use super::enclosure::{self, Command, STAGE};
use super::error::RecipeError;
use super::site::Site;
use super::tree::RootDiskTree;

const GETTING: &str = "getting Python packages";
const INSTALLING: &str = "installing Python packages";
/// The oldest C library that wheels are made for: the second number of its version.
const OLDEST_GLIBC: u32 = 5;
/// Longest list of installed packages that is read, in bytes.
const STATUS_MAX: u64 = 64 << 20;

/// Installs what `requirements` pins.
pub(super) fn install(site: &Site<'_>, tree: &RootDiskTree, requirements: &Path) -> Result<(), RecipeError> {
    let lacks = |why: &str| RecipeError::Lacks { step: INSTALLING.to_owned(), why: why.to_owned() };
    let python = python_version(tree).ok_or_else(|| lacks("no python3: it belongs into base.packages"))?;
    let glibc = glibc_version(tree).ok_or_else(|| lacks("no libc6, of which packages depend"))?;
    let stage = site.place("python");
    let (wheels, pinned) = (stage.join("wheels"), stage.join("requirements.txt"));
    fs::create_dir_all(&wheels).map_err(RecipeError::file(&wheels))?;
    fs::copy(requirements, &pinned).map_err(RecipeError::file(requirements))?;
    site.say(GETTING);
    download(site, &pinned, &wheels, &python, glibc)?;
    copy_pip(site, &stage)?;
    site.say(INSTALLING);
    let find = format!("--find-links={STAGE}/wheels");
    let file = format!("{STAGE}/requirements.txt");
    let pip_path = format!("{STAGE}/pip");
    let argv = [
        "/usr/bin/python3",
        "-m",
        "pip",
        "install",
        "--no-index",
        &find,
        "--require-hashes",
        "--requirement",
        &file,
    ];
    let options = ["--no-compile", "--no-cache-dir", "--disable-pip-version-check"];
    let environment = [
        ("PYTHONPATH", pip_path.as_str()),
        ("PIP_BREAK_SYSTEM_PACKAGES", "1"),
        ("PIP_ROOT_USER_ACTION", "ignore"),
    ];
    let run = |argv: Vec<&str>, env| {
        let command = Command { argv, user: None, cwd: None, env, network: false, stage: Some(&stage) };
        enclosure::run(site, tree, INSTALLING, &command)
    };
    run(argv.into_iter().chain(options).collect(), BTreeMap::from(environment))?;
    // By contents, because the image does not keep the times that would tell. Some packages bring files for other
    // versions, which do not compile.
    let packages = format!("/usr/local/lib/python{python}/dist-packages");
    let compile = "python3 -m compileall -qq --invalidation-mode unchecked-hash \"$0\" || true";
    run(vec!["/bin/sh", "-c", compile, &packages], BTreeMap::new())?;
    fs::remove_dir_all(&stage).map_err(RecipeError::file(&stage))
}

fn download(
    site: &Site<'_>,
    requirements: &Path,
    wheels: &Path,
    python: &str,
    glibc: u32,
) -> Result<(), RecipeError> {
    let digits: String = python.chars().filter(char::is_ascii_digit).collect();
    let mut platforms: Vec<String> =
        (OLDEST_GLIBC..=glibc).rev().map(|minor| format!("manylinux_2_{minor}_x86_64")).collect();
    platforms.extend(
        ["manylinux2014", "manylinux2010", "manylinux1", "linux"].map(|name| format!("{name}_x86_64")),
    );
    site.tool("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--require-hashes",
            "--only-binary=:all:",
            "--disable-pip-version-check",
        ])
        .args(["--implementation", "cp", "--python-version", python])
        .args([format!("--abi=cp{digits}"), "--abi=abi3".to_owned(), "--abi=none".to_owned()])
        .args(platforms.iter().map(|platform| format!("--platform={platform}")))
        .arg("--requirement")
        .arg(requirements)
        .arg("--dest")
        .arg(wheels)
        .run(|line| site.say(line))
        .map_err(RecipeError::tool(GETTING))
}

/// Puts this machine's pip where the tree's Python finds it: it is made of Python alone, and the root disk need not have
/// one.
fn copy_pip(site: &Site<'_>, stage: &Path) -> Result<(), RecipeError> {
    let found = site.tool("python3").args(["-c", "import pip; print(pip.__path__[0])"]).capture();
    let found = found.map_err(RecipeError::tool(GETTING))?;
    let into = stage.join("pip");
    fs::create_dir_all(&into).map_err(RecipeError::file(&into))?;
    let copy = site.tool("cp").args(["--recursive", "--dereference", "--"]).arg(found.trim()).arg(&into);
    copy.run(|_| {}).map_err(RecipeError::tool(GETTING))
}

/// "3.11", from where /usr/bin/python3 leads.
fn python_version(tree: &RootDiskTree) -> Option<String> {
    let target = tree.read_link(Path::new("/usr/bin/python3")).ok()?;
    let version = target.file_name()?.to_str()?.strip_prefix("python")?;
    let (major, minor) = version.split_once('.')?;
    let number = |text: &str| text.parse::<u32>().is_ok();
    (number(major) && number(minor)).then(|| version.to_owned())
}

/// The second number of the C library's version.
fn glibc_version(tree: &RootDiskTree) -> Option<u32> {
    let mut status = String::new();
    let read = |text: &mut String| -> io::Result<usize> {
        tree.read(Path::new("/var/lib/dpkg/status"))?.take(STATUS_MAX).read_to_string(text)
    };
    read(&mut status).ok()?;
    glibc_of(&status)
}

fn glibc_of(status: &str) -> Option<u32> {
    let package =
        status.split("\n\n").find(|package| package.lines().any(|line| line == "Package: libc6"))?;
    let version = package.lines().find_map(|line| line.strip_prefix("Version: 2."))?;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    #[test]
    fn versions_are_those_of_the_tree() {
        let dir = TempDir::new().unwrap();
        let tree = RootDiskTree::open(dir.path()).unwrap();
        assert_eq!((python_version(&tree), glibc_version(&tree)), (None, None));
        fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
        symlink("python3.11", dir.path().join("usr/bin/python3")).unwrap();
        fs::create_dir_all(dir.path().join("var/lib/dpkg")).unwrap();
        let status =
            "Package: libc6-dev\nVersion: 2.1\n\nPackage: libc6\nStatus: ok\nVersion: 2.36-9+deb12u10\n";
        fs::write(dir.path().join("var/lib/dpkg/status"), status).unwrap();
        assert_eq!((python_version(&tree).as_deref(), glibc_version(&tree)), (Some("3.11"), Some(36)));
        assert_eq!(glibc_of("Package: libc6\nVersion: unknown\n"), None);
    }
}
