//! Root disks: a tree that a recipe's steps make, the agent, and an EROFS image of both that a machine maps straight into
//! memory.
//!
//! ```text
//! $XDG_CACHE_HOME/forkd/root-disks/
//!     KEY.erofs      hash of everything below; never changed once it is there
//!     KEY.*.tar      what single steps made ([`super::layers`])
//!     build.lock     held by who builds
//!     build-*/       a tree while it is being built; removed after it, by the next build, or by `forkd cleanup`
//! ```
//!
//! The same packages, files and agent give the same bytes: packs of two builds share their chunks.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::build::tools::{self, sha256_file, sha256_parts};
use crate::interrupt::Interrupt;
use crate::local::paths::Paths;
use crate::local::work_dir::{self, WorkDir};

use super::agent_binary::agent_binary;
use super::apt_sources;
use super::enclosure::MOUNT_POINTS;
use super::error::RecipeError;
use super::format::Recipe;
use super::kept::{self, BUILD_LOCK, CACHE};
use super::layers;
use super::site::Site;
use super::steps;
use super::tree::RootDiskTree;

/// How directories of trees that are being built are named.
const WORK_PREFIX: &str = "build-";
/// virtio-pmem regions come in units of 2 MiB.
const ALIGNMENT: u64 = 2 << 20;
/// Where EROFS has its superblock, and the superblock's first four bytes.
const SUPERBLOCK: (u64, [u8; 4]) = (1024, 0xe0f5_e1e2_u32.to_le_bytes());
/// Programs the build needs, and the Debian package each is in.
const NEEDED: [(&str, &str); 3] =
    [("mmdebstrap", "mmdebstrap"), ("mkfs.erofs", "erofs-utils"), ("tar", "tar")];
/// PID 1's program, and what it reads at boot.
const AGENT: &str = "/forkd/agent";
const MACHINE_FILE: &str = "/forkd/warm.json";
/// Libraries for warm workers, which every machine has: where, and what.
const WORKERS: [(&str, &str); 2] = [
    ("/forkd/workers/forkd_worker.py", include_str!("../../../../guest/workers/python/forkd_worker.py")),
    ("/forkd/workers/forkd_worker.js", include_str!("../../../../guest/workers/node/forkd_worker.js")),
];

/// The root disk of a recipe, built unless it is cached. `say` hears what is being done.
///
/// # Errors
/// [`RecipeError`] as its variants say.
pub fn root_disk(
    paths: &Paths,
    recipe: &Recipe,
    interrupt: &Interrupt,
    say: impl FnMut(&str),
) -> Result<PathBuf, RecipeError> {
    let say = RefCell::new(say);
    let say = |text: &str| (say.borrow_mut())(text);
    let agent = agent_binary()?;
    let sources = apt_sources::for_suite(Path::new("/etc/apt"), recipe.suite());
    let steps = steps::steps(recipe, &sources);
    let keys = layers::keys(&steps)?;
    let key = disk_key(recipe, &agent, keys.last().map_or("", String::as_str))?;
    let cache = paths.cache.join(CACHE);
    let disk = cache.join(format!("{}.erofs", &key[..32]));
    if disk.is_file() {
        kept::note_use(&disk);
        return Ok(disk);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(RecipeError::NotRoot);
    }
    fs::create_dir_all(&cache).map_err(RecipeError::file(&cache))?;
    let _lock = tools::lock(&cache.join(BUILD_LOCK), interrupt, || say("waiting for another build"))
        .map_err(RecipeError::tool("waiting for another build"))?;
    if disk.is_file() {
        return Ok(disk);
    }
    prepare_tools(&needed(recipe), interrupt, &say)?;
    // What cannot be removed is no reason not to build.
    let _ = remove_dead(paths);
    let work = WorkDir::create(&cache, WORK_PREFIX).map_err(RecipeError::file(&cache))?;
    let site = Site::new(&work, interrupt, &say);
    let epoch = layers::make_tree(&site, &cache, &steps, &keys)?;
    site.say("adding the agent");
    let tree = RootDiskTree::open(&site.tree()).map_err(RecipeError::file(&site.tree()))?;
    add_agent(&tree, recipe, &agent)?;
    site.say("making the root disk");
    let image = make_image(&site, epoch, &key)?;
    layers::finish(&image, &disk).map_err(RecipeError::file(&disk))?;
    Ok(disk)
}

/// Removes what builds of root disks that were killed have left; returns the paths.
///
/// # Errors
/// That of the first that cannot be removed.
pub fn remove_dead(paths: &Paths) -> io::Result<Vec<PathBuf>> {
    work_dir::remove_dead(&paths.cache.join(CACHE), WORK_PREFIX)
}

fn disk_key(recipe: &Recipe, agent: &Path, tree_key: &str) -> Result<String, RecipeError> {
    let agent_digest = sha256_file(agent).map_err(RecipeError::file(agent))?;
    let machine_file = recipe.machine_file_text();
    let parts = [tree_key, &agent_digest, &machine_file];
    let workers = WORKERS.iter().map(|(_, text)| *text);
    Ok(sha256_parts(parts.into_iter().chain(workers).map(str::as_bytes)))
}

/// The programs that a recipe's build needs, and their packages.
fn needed(recipe: &Recipe) -> Vec<(&'static str, &'static str)> {
    let mut needed = NEEDED.to_vec();
    for recipe in recipe.lineage() {
        if recipe.python.is_some() {
            needed.push(("pip3", "python3-pip"));
        }
        if recipe.node.is_some() {
            needed.push(("npm", "npm"));
        }
    }
    needed
}

fn prepare_tools(
    needed: &[(&str, &str)],
    interrupt: &Interrupt,
    say: &dyn Fn(&str),
) -> Result<(), RecipeError> {
    let missing: Vec<&str> =
        needed.iter().filter(|(name, _)| tools::find(name).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !tools::can_install() {
        return Err(RecipeError::Missing { packages: missing.into_iter().map(str::to_owned).collect() });
    }
    say(&format!("installing {}", missing.join(" ")));
    tools::install(&missing, interrupt, |_| {}).map_err(RecipeError::tool("installing packages"))
}

/// Puts PID 1 into the tree, with what it reads and what it mounts on.
fn add_agent(tree: &RootDiskTree, recipe: &Recipe, agent: &Path) -> Result<(), RecipeError> {
    let put = |to: &str, contents: &mut dyn Read, mode| {
        tree.put(Path::new(to), contents, mode).map_err(RecipeError::file(Path::new(to)))
    };
    put(AGENT, &mut File::open(agent).map_err(RecipeError::file(agent))?, 0o755)?;
    put(MACHINE_FILE, &mut recipe.machine_file_text().as_bytes(), 0o644)?;
    for (to, text) in WORKERS {
        put(to, &mut text.as_bytes(), 0o644)?;
    }
    if !tree.has(Path::new("/etc/hosts")) {
        put("/etc/hosts", &mut &b"127.0.0.1\tlocalhost\n"[..], 0o644)?;
    }
    for directory in MOUNT_POINTS {
        tree.make_directory(Path::new(directory)).map_err(RecipeError::file(Path::new(directory)))?;
    }
    Ok(())
}

/// The tree as an uncompressed image (a pack compresses, and DAX needs plain blocks), padded for virtio-pmem.
fn make_image(site: &Site<'_>, epoch: u64, key: &str) -> Result<PathBuf, RecipeError> {
    let image = site.place("disk.erofs");
    let uuid = [&key[0..8], &key[8..12], &key[12..16], &key[16..20], &key[20..32]].join("-");
    site.tool("mkfs.erofs")
        // The image's own time, and the latest any file keeps. (`-T` would give all files one time.)
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        // Files whose end lies among the metadata cannot be mapped.
        .args(["--quiet", "-Enoinline_data", "-U"])
        .arg(uuid)
        .arg(&image)
        .arg(site.tree())
        .run(|_| {})
        .map_err(RecipeError::tool("making the root disk"))?;
    pad(&image).map_err(RecipeError::file(&image))?;
    Ok(image)
}

/// Checks that the image is one, and lengthens it to whole units.
fn pad(image: &Path) -> io::Result<()> {
    let mut file = File::options().read(true).write(true).open(image)?;
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(SUPERBLOCK.0))?;
    file.read_exact(&mut magic)?;
    if magic != SUPERBLOCK.1 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "mkfs.erofs made no EROFS image"));
    }
    let len = file.metadata()?.len();
    file.set_len(len.next_multiple_of(ALIGNMENT))
}

#[cfg(test)]
#[path = "root_disk_tests.rs"]
mod tests;
