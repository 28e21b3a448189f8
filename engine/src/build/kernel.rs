//! The guest kernel: the distribution's kernel source, our configuration, and a cache of what was built.
//!
//! ```text
//! $XDG_DATA_HOME/forkd/kernels/
//!     <key>/vmlinux        key = hash of configuration, source and compiler
//!     <key>/kernel.json    what it was built from
//!     build.lock           held by who builds
//!     build.log            output of the last build that failed
//! $XDG_CACHE_HOME/forkd/
//!     kernel-build-*/      source and objects while a build runs; removed after it, or by the next one
//! ```
//!
//! A kernel appears with one rename, so a build that fails or is killed leaves none. What else a killed one leaves goes
//! with the next one, or with `forkd cleanup`. Called by `forkd kernel`, and by the build of recipes, which needs a
//! kernel to boot.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::statvfs;
use serde::{Deserialize, Serialize};

use crate::build::tools::{self, Tool, ToolError, sha256_parts};
use crate::interrupt::Interrupt;
use crate::local::paths::Paths;
use crate::local::work_dir::{self, WorkDir};
use crate::progress::{Amount, Progress};

mod error;
mod source;

pub use error::KernelError;
use source::KernelSource;

/// Our configuration: the values that differ from the kernel's own defaults.
pub const CONFIG: &str = include_str!("../../../guest/kernel/forkd_x86_64.config");
/// Bump when the way of building changes what comes out.
const BUILD_VERSION: &[u8] = b"1";
/// How directories of source and objects are named, and those of kernels before they have their place.
const WORK_PREFIX: &str = "kernel-build-";
const NEW_PREFIX: &str = ".new-";
/// Steps `make` announces for our configuration and linux 6.12, for the progress bar.
const MAKE_STEPS: u64 = 1660;
/// Disk a build needs: 1.6 GB of source, 0.3 GB of objects.
const BUILD_BYTES: u64 = 2_200_000_000;
/// Without these no machine boots; a source that does not know one is of no use.
const REQUIRED: [&str; 12] = [
    "CONFIG_HYPERVISOR_GUEST",
    "CONFIG_KVM_GUEST",
    "CONFIG_X86_IOPL_IOPERM",
    "CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES",
    "CONFIG_VIRTIO_PMEM",
    "CONFIG_VIRTIO_VSOCKETS",
    "CONFIG_BLK_DEV_PMEM",
    "CONFIG_FS_DAX",
    "CONFIG_EROFS_FS",
    "CONFIG_OVERLAY_FS",
    "CONFIG_TMPFS",
    "CONFIG_DEVTMPFS_MOUNT",
];

/// What is asked of a build.
#[derive(Debug, Clone, Default)]
pub struct BuildOptions {
    /// An unpacked source tree instead of the distribution's package. It is never taken from the cache: a tree can
    /// change in ways that are costly to see.
    pub source: Option<PathBuf>,
    /// Compilers at a time; the number of processors when absent.
    pub jobs: Option<u32>,
    /// Build even if the kernel is cached.
    pub force: bool,
}

/// A kernel ready to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kernel {
    /// The uncompressed ELF image.
    pub path: PathBuf,
    /// What it was built from: package and version.
    pub source: String,
    /// The compiler's first line about itself.
    pub compiler: String,
    /// Whether it was there before.
    pub cached: bool,
    /// Seconds the build took; 0 when cached.
    pub seconds: u64,
}

/// `kernel.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    config_sha256: String,
    source: String,
    compiler: String,
}

/// The newest kernel built from this forkd's configuration.
///
/// # Errors
/// [`KernelError::NotBuilt`], [`KernelError::File`] when the cache cannot be read.
pub fn find(paths: &Paths) -> Result<Kernel, KernelError> {
    let directory = paths.kernels();
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(KernelError::NotBuilt { directory });
        }
        result => result.map_err(|source| KernelError::File { path: directory.clone(), source })?,
    };
    let config = sha256_parts([CONFIG.as_bytes()]);
    let newest = entries
        .flatten()
        .filter_map(|entry| {
            let kernel = load(&entry.path(), &config)?;
            Some((fs::metadata(&kernel.path).and_then(|meta| meta.modified()).ok()?, kernel))
        })
        .max_by_key(|(built, _)| *built);
    newest.map(|(_, kernel)| kernel).ok_or(KernelError::NotBuilt { directory })
}

/// The kernel in a directory of the cache, if it is one of ours.
fn load(directory: &Path, config_sha256: &str) -> Option<Kernel> {
    let record: Record = serde_json::from_slice(&fs::read(directory.join("kernel.json")).ok()?).ok()?;
    let path = directory.join("vmlinux");
    (record.config_sha256 == config_sha256 && path.is_file()).then_some(Kernel {
        path,
        source: record.source,
        compiler: record.compiler,
        cached: true,
        seconds: 0,
    })
}

/// The kernel of this configuration, built if it is not cached.
///
/// # Errors
/// [`KernelError`] as its variants say.
pub fn build(
    paths: &Paths,
    options: &BuildOptions,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<Kernel, KernelError> {
    let started = Instant::now();
    let kernels = paths.kernels();
    for dir in [&kernels, &paths.cache] {
        fs::create_dir_all(dir).map_err(|source| KernelError::File { path: dir.clone(), source })?;
    }
    let mut waiting = None;
    let _lock = tools::lock(&kernels.join("build.lock"), interrupt, || {
        waiting = Some(progress.begin("waiting for another kernel build", Amount::Unknown));
    })
    .map_err(|source| KernelError::Tool { step: "waiting for another build", source })?;
    drop(waiting);
    let source = source::prepare(options.source.as_deref(), progress, interrupt)?;
    let compiler = Tool::new("gcc", interrupt).arg("--version").capture();
    let compiler =
        compiler.map_err(|source| KernelError::Tool { step: "asking for the compiler", source })?;
    let compiler = compiler.lines().next().unwrap_or_default().to_owned();
    let key =
        sha256_parts([BUILD_VERSION, CONFIG.as_bytes(), source.identity.as_bytes(), compiler.as_bytes()]);
    let config_sha256 = sha256_parts([CONFIG.as_bytes()]);
    let directory = kernels.join(&key[..32]);
    if let Some(kernel) = load(&directory, &config_sha256).filter(|_| !options.force && source.is_package()) {
        return Ok(kernel);
    }
    let record = Record { config_sha256, source: source.identity.clone(), compiler };
    // What cannot be removed is no reason not to build.
    let _ = remove_dead(paths);
    let work = work_directory(&paths.cache)?;
    let vmlinux =
        compile(&source, work.path(), &kernels.join("build.log"), options.jobs, progress, interrupt)?;
    publish(&vmlinux, &record, &kernels, &directory)?;
    Ok(Kernel {
        path: directory.join("vmlinux"),
        source: record.source,
        compiler: record.compiler,
        cached: false,
        seconds: started.elapsed().as_secs(),
    })
}

/// Removes what builds that were killed have left; returns the paths.
///
/// # Errors
/// That of the first that cannot be removed.
pub fn remove_dead(paths: &Paths) -> io::Result<Vec<PathBuf>> {
    let mut removed = work_dir::remove_dead(&paths.cache, WORK_PREFIX)?;
    removed.extend(work_dir::remove_dead(&paths.kernels(), NEW_PREFIX)?);
    Ok(removed)
}

/// A new directory for a build, if there is room for one.
fn work_directory(cache: &Path) -> Result<WorkDir, KernelError> {
    let failed = |source| KernelError::File { path: cache.to_owned(), source };
    let work = WorkDir::create(cache, WORK_PREFIX).map_err(failed)?;
    let space = statvfs(cache).map_err(|errno| failed(errno.into()))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free < BUILD_BYTES {
        return Err(KernelError::Space { directory: cache.to_owned(), free, needed: BUILD_BYTES });
    }
    Ok(work)
}

/// Unpacks, configures and compiles; returns the path of vmlinux below `work`.
fn compile(
    source: &KernelSource,
    work: &Path,
    log_path: &Path,
    jobs: Option<u32>,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<PathBuf, KernelError> {
    let tree = source.unpack(work, progress, interrupt)?;
    let objects = work.join("objects");
    let config = objects.join(".config");
    fs::create_dir(&objects).map_err(|source| KernelError::File { path: objects.clone(), source })?;
    fs::write(&config, CONFIG).map_err(|source| KernelError::File { path: config.clone(), source })?;
    let mut log = File::create(log_path)
        .map(BufWriter::new)
        .map_err(|source| KernelError::File { path: log_path.to_owned(), source })?;

    let mut done = make(&tree, &objects, interrupt).arg("olddefconfig").log(&mut log).run(|_| {});
    let mut step = "configuring the kernel";
    if done.is_ok() {
        check_options(
            &fs::read_to_string(&config).map_err(|source| KernelError::File { path: config, source })?,
        )?;
        step = "compiling the kernel";
        let task = progress.begin("compiling the kernel", Amount::Steps(MAKE_STEPS));
        let mut steps = 0;
        let jobs =
            jobs.or_else(|| std::thread::available_parallelism().ok()?.get().try_into().ok()).unwrap_or(1);
        done = make(&tree, &objects, interrupt).arg(format!("-j{jobs}")).arg("vmlinux").log(&mut log).run(
            |line| {
                // "  CC      init/main.o": one step; everything else is talk.
                steps += u64::from(line.starts_with("  "));
                task.to(steps.min(MAKE_STEPS));
            },
        );
    }
    let flushed = log.flush();
    match done {
        Ok(()) => {
            let _ = fs::remove_file(log_path);
            Ok(objects.join("vmlinux"))
        }
        Err(source @ ToolError::Interrupted(_)) => {
            let _ = fs::remove_file(log_path);
            Err(KernelError::Tool { step, source })
        }
        // A log that could not be written is not worth pointing at.
        Err(source) if flushed.is_err() => Err(KernelError::Tool { step, source }),
        Err(source) => Err(KernelError::Build { step, source, log: log_path.to_owned() }),
    }
}

fn make<'a>(tree: &Path, objects: &Path, interrupt: &'a Interrupt) -> Tool<'a> {
    let mut output = std::ffi::OsString::from("O=");
    output.push(objects);
    Tool::isolated("make", interrupt)
        .arg("-C")
        .arg(tree)
        .arg(output)
        // The compiler's files end with the directory.
        .env("TMPDIR", objects)
        // The same source, configuration and compiler give the same bytes.
        .env("KBUILD_BUILD_USER", "forkd")
        .env("KBUILD_BUILD_HOST", "forkd")
        .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
}

/// Kconfig drops what it does not know without a word.
fn check_options(config: &str) -> Result<(), KernelError> {
    let set = |option: &&str| config.lines().any(|line| line.strip_prefix(option) == Some("=y"));
    let options: Vec<String> =
        REQUIRED.iter().filter(|option| !set(option)).map(|option| (*option).to_owned()).collect();
    if options.is_empty() { Ok(()) } else { Err(KernelError::Options { options }) }
}

/// Puts a kernel into the cache with one rename, in place of one of the same key.
fn publish(vmlinux: &Path, record: &Record, kernels: &Path, directory: &Path) -> Result<(), KernelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::File { path, source }
    };
    let new = WorkDir::create(kernels, NEW_PREFIX).map_err(failed(kernels))?;
    let target = new.path().join("vmlinux");
    fs::copy(vmlinux, &target).map_err(failed(&target))?;
    File::open(&target).and_then(|file| file.sync_all()).map_err(failed(&target))?;
    let json = serde_json::to_vec_pretty(record).map_err(|error| failed(&target)(error.into()))?;
    fs::write(new.path().join("kernel.json"), json).map_err(failed(&target))?;
    // mkdtemp made it private to us; others may boot this kernel.
    fs::set_permissions(new.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .map_err(failed(&target))?;
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(failed(directory))?;
    }
    fs::rename(new.path(), directory).map_err(failed(directory))?;
    // Renamed away: there is nothing for the guard to remove.
    drop(new.keep());
    Ok(())
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
