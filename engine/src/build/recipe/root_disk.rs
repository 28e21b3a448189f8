//! Root disks: a Debian tree, the agent and the recipe's files, as an EROFS image a machine maps straight into memory.
//!
//! ```text
//! $XDG_CACHE_HOME/forkd/root-disks/
//!     KEY.erofs      hash of everything below; never changed once it is there
//!     KEY.base.tar   the distribution's part alone, which takes a minute to make
//!     build.lock     held by who builds
//!     build-*/       a tree while it is being built; removed after it, by the next build, or by `forkd cleanup`
//! ```
//!
//! The same packages, files and agent give the same bytes: packs of two builds share their chunks.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::build::tools::{self, Tool, sha256_file, sha256_parts};
use crate::interrupt::Interrupt;
use crate::local::paths::Paths;
use crate::local::work_dir::{self, WorkDir};

use super::apt_sources::{self, AptSources};
use super::tree::RootDiskTree;
use super::{Recipe, RecipeError};

/// Bump when the way of building changes what comes out.
const VERSION: &[u8] = b"1";
/// Where root disks are kept, in forkd's cache directory.
const CACHE: &str = "root-disks";
/// How directories of trees that are being built are named.
const WORK_PREFIX: &str = "build-";
/// virtio-pmem regions come in units of 2 MiB.
const ALIGNMENT: u64 = 2 << 20;
/// Where EROFS has its superblock, and the superblock's first four bytes.
const SUPERBLOCK: (u64, [u8; 4]) = (1024, 0xe0f5_e1e2_u32.to_le_bytes());
/// Programs the build needs, and the Debian package each is in.
const NEEDED: [(&str, &str); 3] =
    [("mmdebstrap", "mmdebstrap"), ("mkfs.erofs", "erofs-utils"), ("tar", "tar")];
/// Files no program in a machine misses.
const EXCLUDED: [&str; 8] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/i18n/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/bash-completion/*",
];
/// Traces of the building machine and of the build: names, mirrors (which may carry passwords), logs, caches.
const REMOVED: [&str; 9] = [
    "/etc/hostname",
    "/etc/machine-id",
    "/etc/resolv.conf",
    "/etc/apt/sources.list",
    "/etc/apt/apt.conf.d/99mmdebstrap",
    "/etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "/var/cache/ldconfig/aux-cache",
    "/var/lib/dpkg/status-old",
    "/var/lib/dpkg/available-old",
];
const CLEARED: [&str; 6] = [
    "/etc/apt/sources.list.d",
    "/var/log",
    "/var/cache/apt",
    "/var/cache/debconf",
    "/var/lib/apt/lists",
    "/tmp",
];
/// PID 1's program, and what it reads at boot.
const AGENT: &str = "/forkd/agent";
const MACHINE_FILE: &str = "/forkd/warm.json";
/// What the agent mounts on.
const MOUNT_POINTS: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/tmp"];

/// The root disk of a recipe, built unless it is cached. `say` hears what is being done.
///
/// # Errors
/// [`RecipeError`] as its variants say.
pub fn root_disk(
    paths: &Paths,
    recipe: &Recipe,
    interrupt: &Interrupt,
    mut say: impl FnMut(&str),
) -> Result<PathBuf, RecipeError> {
    let agent = agent_binary()?;
    let sources = apt_sources::for_suite(Path::new("/etc/apt"), &recipe.base.suite);
    let base_key = base_key(recipe, &sources);
    let key = disk_key(recipe, &agent, &base_key)?;
    let cache = paths.cache.join(CACHE);
    let disk = cache.join(format!("{}.erofs", &key[..32]));
    if disk.is_file() {
        return Ok(disk);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(RecipeError::NotRoot);
    }
    fs::create_dir_all(&cache).map_err(file_error(&cache))?;
    let _lock = tools::lock(&cache.join("build.lock"), interrupt, || say("waiting for another build"))
        .map_err(|source| RecipeError::Tool { step: "waiting for another build", source })?;
    if disk.is_file() {
        return Ok(disk);
    }
    prepare_tools(interrupt, &mut say)?;
    // What cannot be removed is no reason not to build.
    let _ = remove_dead(paths);
    let work = WorkDir::create(&cache, WORK_PREFIX).map_err(file_error(&cache))?;
    let builder = Builder { recipe, cache: &cache, work: &work, interrupt };
    let (tree, epoch) = builder.base(&base_key, &sources, &mut say)?;
    say("adding the agent and the recipe's files");
    builder.add_files(&tree, &agent)?;
    say("making the root disk");
    let image = builder.image(&tree, epoch, &key)?;
    fs::rename(&image, &disk).map_err(file_error(&disk))?;
    Ok(disk)
}

/// Removes what builds of root disks that were killed have left; returns the paths.
///
/// # Errors
/// That of the first that cannot be removed.
pub fn remove_dead(paths: &Paths) -> io::Result<Vec<PathBuf>> {
    work_dir::remove_dead(&paths.cache.join(CACHE), WORK_PREFIX)
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> RecipeError {
    let path = path.to_owned();
    move |source| RecipeError::File { path, source }
}

/// The static agent to put into machines: `FORKD_AGENT`, or beside this program, or where cargo puts it.
///
/// # Errors
/// [`RecipeError::NoAgent`], [`RecipeError::BadAgent`].
pub fn agent_binary() -> Result<PathBuf, RecipeError> {
    if let Some(path) = std::env::var_os("FORKD_AGENT").map(PathBuf::from) {
        return match why_not_static(&path) {
            None => Ok(path),
            Some(why) => Err(RecipeError::BadAgent { path, why }),
        };
    }
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.parent().unwrap_or(Path::new("/"));
    let target = beside.join("../x86_64-unknown-linux-gnu");
    // Cargo also builds an agent for this machine's own tests, which is not static: it is passed over.
    let profile = beside.file_name().map_or_else(|| OsString::from("release"), OsString::from);
    let searched = vec![
        beside.join("forkd-agent"),
        target.join(profile).join("forkd-agent"),
        target.join("release/forkd-agent"),
    ];
    if let Some(path) = searched.iter().find(|path| why_not_static(path).is_none()) {
        return Ok(path.clone());
    }
    match searched.iter().find(|path| path.is_file()) {
        Some(path) => {
            let why = why_not_static(path).unwrap_or("it changed just now");
            Err(RecipeError::BadAgent { path: path.clone(), why })
        }
        None => Err(RecipeError::NoAgent { searched }),
    }
}

/// Why a file cannot be a machine's first process: there is nothing beside it that could load it.
fn why_not_static(path: &Path) -> Option<&'static str> {
    const ELF_X86_64: (&[u8], &[u8]) = (b"\x7fELF\x02\x01", &[0x3e, 0]);
    const PT_INTERP: u32 = 3;
    let mut head = Vec::new();
    if File::open(path).and_then(|file| file.take(4096).read_to_end(&mut head)).is_err() {
        return Some("it cannot be read");
    }
    if head.len() < 64 || !head.starts_with(ELF_X86_64.0) || head.get(18..20) != Some(ELF_X86_64.1) {
        return Some("it is no x86-64 program");
    }
    // Program headers follow the ELF header directly, 56 bytes each; their number is at offset 56.
    let count = usize::from(u16::from_le_bytes([head[56], head[57]]));
    let headers = head[64..].chunks_exact(56).take(count);
    let kind = |header: &[u8]| u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let dynamic = headers.into_iter().any(|header| kind(header) == PT_INTERP);
    dynamic.then_some("it is linked dynamically")
}

/// Names the distribution's part: everything that decides what is in it but time.
fn base_key(recipe: &Recipe, sources: &AptSources) -> String {
    let mut packages: Vec<&[u8]> = recipe.base.packages.iter().map(String::as_bytes).collect();
    packages.sort_unstable();
    let fixed = [VERSION, recipe.base.suite.as_bytes(), sources.lines.as_bytes(), sources.stanzas.as_bytes()];
    sha256_parts(fixed.into_iter().chain(packages))
}

fn disk_key(recipe: &Recipe, agent: &Path, base_key: &str) -> Result<String, RecipeError> {
    let agent_digest = sha256_file(agent).map_err(file_error(agent))?;
    let mut parts = vec![base_key.to_owned(), agent_digest, machine_file(recipe)];
    for file in &recipe.files {
        let from = recipe.directory.join(&file.from);
        parts.push(file.to.display().to_string());
        parts.push(is_executable(recipe, file).map_err(file_error(&from))?.to_string());
        parts.push(sha256_file(&from).map_err(file_error(&from))?);
    }
    Ok(sha256_parts(parts.iter().map(String::as_bytes)))
}

fn machine_file(recipe: &Recipe) -> String {
    // A structure of strings always has a JSON form.
    serde_json::to_string(&recipe.machine_file()).unwrap_or_default()
}

fn is_executable(recipe: &Recipe, file: &super::RecipeFile) -> io::Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    match file.executable {
        Some(executable) => Ok(executable),
        None => Ok(fs::metadata(recipe.directory.join(&file.from))?.permissions().mode() & 0o100 != 0),
    }
}

fn prepare_tools(interrupt: &Interrupt, say: &mut impl FnMut(&str)) -> Result<(), RecipeError> {
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(name, _)| tools::find(name).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !tools::can_install() {
        return Err(RecipeError::Missing { packages: missing.into_iter().map(str::to_owned).collect() });
    }
    say(&format!("installing {}", missing.join(" ")));
    tools::install(&missing, interrupt, |_| {})
        .map_err(|source| RecipeError::Tool { step: "installing packages", source })
}

struct Builder<'a> {
    recipe: &'a Recipe,
    cache: &'a Path,
    work: &'a WorkDir,
    interrupt: &'a Interrupt,
}

impl Builder<'_> {
    /// A program whose temporary files end with the work directory.
    fn tool(&self, name: &str) -> Tool<'_> {
        Tool::new(name, self.interrupt).env("TMPDIR", self.work.path())
    }

    /// The distribution's tree, and the time (seconds since 1970) of its newest packaged file.
    fn base(
        &self,
        key: &str,
        sources: &AptSources,
        say: &mut impl FnMut(&str),
    ) -> Result<(RootDiskTree, u64), RecipeError> {
        let path = self.work.path().join("tree");
        let archive = self.cache.join(format!("{}.base.tar", &key[..32]));
        let open = || RootDiskTree::open(&path).map_err(file_error(&path));
        if archive.is_file() {
            say("unpacking the distribution");
            fs::create_dir(&path).map_err(file_error(&path))?;
            self.tar(
                "unpacking the distribution",
                ["--extract", "--preserve-permissions"],
                &archive,
                &path,
                &[],
            )?;
            let tree = open()?;
            let epoch = tree.newest_file(SystemTime::now()).map_err(file_error(&path))?;
            return Ok((tree, epoch));
        }
        let started = SystemTime::now();
        self.install_packages(&path, sources, say)?;
        let tree = open()?;
        for file in REMOVED {
            tree.remove(Path::new(file)).map_err(file_error(Path::new(file)))?;
        }
        for directory in CLEARED {
            tree.clear(Path::new(directory)).map_err(file_error(Path::new(directory)))?;
        }
        // Python trusts compiled code only while its source has the time it had when it was compiled, so times of
        // packaged files stay; what the installation made gets the newest of those.
        let epoch = tree.newest_file(started).map_err(file_error(&path))?;
        say("keeping the distribution for the next build");
        let partial = self.work.path().join("base.tar");
        let times = ["--sort=name".to_owned(), "--clamp-mtime".to_owned(), format!("--mtime=@{epoch}")];
        self.tar("packing the distribution", ["--create", "--one-file-system"], &partial, &path, &times)?;
        fs::rename(&partial, &archive).map_err(file_error(&archive))?;
        Ok((tree, epoch))
    }

    fn tar(
        &self,
        step: &'static str,
        mode: [&str; 2],
        archive: &Path,
        directory: &Path,
        more: &[String],
    ) -> Result<(), RecipeError> {
        self.tool("tar")
            .args(mode)
            .args(["--numeric-owner", "--xattrs", "--xattrs-include=*"])
            .args(more)
            .arg("--file")
            .arg(archive)
            .arg("--directory")
            .arg(directory)
            .args(if mode[0] == "--create" { &["."][..] } else { &[] })
            .run(|_| {})
            .map_err(|source| RecipeError::Tool { step, source })
    }

    /// Runs mmdebstrap with this machine's sources for the release.
    fn install_packages(
        &self,
        tree: &Path,
        sources: &AptSources,
        say: &mut impl FnMut(&str),
    ) -> Result<(), RecipeError> {
        say("installing the distribution");
        // It starts programs of the distribution, and mounts.
        let mut tool = Tool::isolated("mmdebstrap", self.interrupt)
            .env("TMPDIR", self.work.path())
            .args(["--mode=root", "--variant=essential", "--format=directory"])
            // Without it usrmerge does the work, and brings all of Perl.
            .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
            .args(EXCLUDED.map(|rule| format!("--dpkgopt={rule}")));
        if !self.recipe.base.packages.is_empty() {
            tool = tool.arg(format!("--include={}", self.recipe.base.packages.join(",")));
        }
        tool = tool.arg(&self.recipe.base.suite).arg(tree);
        for (name, text) in [("forkd.list", &sources.lines), ("forkd.sources", &sources.stanzas)] {
            if !text.is_empty() {
                let path = self.work.path().join(name);
                fs::write(&path, text).map_err(file_error(&path))?;
                tool = tool.arg(path);
            }
        }
        let result = tool.run(|line| {
            if line.starts_with("I: ") || line.starts_with("Unpacking ") || line.starts_with("Setting up ") {
                say(line.trim_start_matches("I: "));
            }
        });
        result.map_err(|source| RecipeError::Tool { step: "installing the distribution", source })
    }

    fn add_files(&self, tree: &RootDiskTree, agent: &Path) -> Result<(), RecipeError> {
        let put = |to: &Path, contents: &mut dyn Read, executable| {
            tree.put(to, contents, executable).map_err(file_error(to))
        };
        let open = |path: &Path| File::open(path).map_err(file_error(path));
        put(Path::new(AGENT), &mut open(agent)?, true)?;
        put(Path::new(MACHINE_FILE), &mut machine_file(self.recipe).as_bytes(), false)?;
        if !tree.has(Path::new("/etc/hosts")) {
            put(Path::new("/etc/hosts"), &mut &b"127.0.0.1\tlocalhost\n"[..], false)?;
        }
        for directory in MOUNT_POINTS {
            tree.make_directory(Path::new(directory)).map_err(file_error(Path::new(directory)))?;
        }
        for file in &self.recipe.files {
            let from = self.recipe.directory.join(&file.from);
            let executable = is_executable(self.recipe, file).map_err(file_error(&from))?;
            put(&file.to, &mut open(&from)?, executable)?;
        }
        Ok(())
    }

    /// The tree as an uncompressed image (a pack compresses, and DAX needs plain blocks), padded for virtio-pmem.
    fn image(&self, tree: &RootDiskTree, epoch: u64, key: &str) -> Result<PathBuf, RecipeError> {
        let image = self.work.path().join("disk.erofs");
        let uuid = [&key[0..8], &key[8..12], &key[12..16], &key[16..20], &key[20..32]].join("-");
        self.tool("mkfs.erofs")
            // The image's own time, and the latest any file keeps. (`-T` would give all files one time.)
            .env("SOURCE_DATE_EPOCH", epoch.to_string())
            // Files whose end lies among the metadata cannot be mapped.
            .args(["--quiet", "-Enoinline_data", "-U"])
            .arg(uuid)
            .arg(&image)
            .arg(tree.path())
            .run(|_| {})
            .map_err(|source| RecipeError::Tool { step: "making the root disk", source })?;
        pad(&image).map_err(file_error(&image))?;
        Ok(image)
    }
}

/// Checks that the image is one, lengthens it to whole units, and has it on disk.
fn pad(image: &Path) -> io::Result<()> {
    let mut file = File::options().read(true).write(true).open(image)?;
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(SUPERBLOCK.0))?;
    file.read_exact(&mut magic)?;
    if magic != SUPERBLOCK.1 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "mkfs.erofs made no EROFS image"));
    }
    let len = file.metadata()?.len();
    file.set_len(len.next_multiple_of(ALIGNMENT))?;
    file.sync_all()
}

#[cfg(test)]
#[path = "root_disk_tests.rs"]
mod tests;
