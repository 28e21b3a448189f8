//! From a recipe, or from a root disk, to a local snapshot.

use crate::build::kernel::{self, KernelError};
use crate::build::machine::{self, BuildError, BuildFailure, BuildStep, MachineRequest, Machines};
use crate::build::recipe::{self, Probe, Recipe, RecipeError, Rehearse};
use crate::build::tools;
use crate::fork::scratch::Scratch;
use crate::interrupt::Interrupt;
use crate::local::host;
use crate::local::paths::Paths;
use crate::local::run_dir::{RunDir, RunDirError};
use crate::local::snapshots::{
    self, MachineConfiguration, SnapshotDraft, SnapshotError, check_vcpus, file_error,
};
use crate::progress::{Amount, Progress};
use forkd_abi::protocol::WarmCommand;
use forkd_fs::format::PACK_VERSION;
use forkd_fs::manifest::{self, Manifest, ManifestProbe, Requires};
use forkd_vmm::kvm::{Hypervisor, KvmError, KvmKind};
use forkd_vmm::zygote::{SpawnError, Zygote};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// How long a warm command may take when no recipe says so.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// Longest probe that the manifest, which is bounded, keeps for `forkd trace`; of code and answer each.
const PROBE_MAX: usize = 32 << 10;

/// A snapshot could not be built.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotBuildError {
    /// The guest kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The recipe or its root disk.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// /dev/kvm.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Processes.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The snapshot's directory.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine.
    #[error("{tag}")]
    Build {
        /// The snapshot's name.
        tag: String,
        /// Why not.
        #[source]
        source: BuildError,
        /// [`BuildFailure::console`].
        console: String,
    },
}

impl SnapshotBuildError {
    /// Of a snapshot's machine.
    pub(super) fn of_machine(tag: &str, failure: BuildFailure) -> SnapshotBuildError {
        let BuildFailure { error: source, console } = failure;
        SnapshotBuildError::Build { tag: tag.to_owned(), source, console }
    }
}

/// A new snapshot, as `forkd build --json` shows it.
#[derive(Debug, Serialize)]
pub struct BuiltSnapshot {
    /// Its name.
    pub tag: String,
    /// Its directory.
    pub path: PathBuf,
    /// Memory of the machine, MiB.
    pub memory_mib: u64,
    /// What is stored of it, holes aside.
    pub memory_stored_bytes: u64,
    /// Size of the root disk.
    pub root_disk_bytes: u64,
    /// How long it took.
    pub seconds: f64,
}

/// A recipe to be built.
#[derive(Debug)]
pub struct RecipeRequest {
    /// The recipe's folder.
    pub recipe: PathBuf,
    /// The snapshot's name; the recipe's when there is none.
    pub tag: Option<String>,
    /// Instead of the kernel that forkd built.
    pub kernel: Option<PathBuf>,
    /// Replace a snapshot of that name.
    pub force: bool,
}

/// A root disk to be booted and kept.
#[derive(Debug)]
pub struct RootDiskRequest {
    /// The snapshot's name.
    pub tag: String,
    /// What boots.
    pub kernel: PathBuf,
    /// An initramfs.
    pub initrd: Option<PathBuf>,
    /// The root disk.
    pub root_disk: PathBuf,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u32,
    /// A shell command for the warm worker, instead of the root disk's own.
    pub warm: Option<String>,
    /// Size of the scratch disk, MiB.
    pub scratch_mib: u32,
    /// A second console, /dev/hvc0.
    pub second_console: bool,
    /// Replace a snapshot of that name.
    pub force: bool,
}

/// Whoever has a machine built.
pub trait BuildCaller {
    /// What shows how far it is.
    fn progress(&self) -> &dyn Progress;
    /// The machine has come to `step`.
    fn on_step(&self, _step: BuildStep) {}
    /// From when on the work looks at it. Called once there is a zygote, because it may start a thread.
    fn interrupt(&self) -> Interrupt;
}

/// What goes into the manifest besides the machine itself.
struct About<'a> {
    tag: &'a str,
    description: &'a str,
    base_image: &'a str,
    kernel: &'a Path,
    probe: Option<&'a Probe>,
}

/// Builds a recipe. To be called by a process of one thread.
pub fn build_recipe(
    paths: &Paths,
    wanted: &RecipeRequest,
    caller: &dyn BuildCaller,
) -> Result<BuiltSnapshot, SnapshotBuildError> {
    let started = Instant::now();
    let recipe = Recipe::load(&wanted.recipe)?;
    let tag = wanted.tag.as_deref().unwrap_or(&recipe.name);
    let vcpus = check_vcpus(recipe.vcpus)?;
    let machines = start_machines(paths)?;
    let interrupt = caller.interrupt();
    let draft = SnapshotDraft::create(paths, tag, wanted.force)?;
    let kernel = match &wanted.kernel {
        Some(kernel) => kernel.clone(),
        None => kernel::find(paths)?.path,
    };
    let task = caller.progress().begin("root disk", Amount::Unknown);
    let root_disk = recipe::root_disk(paths, &recipe, &interrupt, |line| task.say(line))?;
    drop(task);
    let request = MachineRequest {
        kernel: &kernel,
        initrd: None,
        root_disk: &root_disk,
        memory_mib: recipe.memory_mib.into(),
        vcpus,
        warm: None,
        ready_timeout: recipe.ready_timeout(),
        rehearse: &recipe.rehearse,
        probes: &recipe.probe,
        paths,
        scratch: Scratch { dir: &paths.cache, mib: recipe.scratch_mib },
        second_console: recipe.second_console,
        interrupt: &interrupt,
    };
    let base_image = format!("debian:{}", recipe.suite());
    let probe = recipe.probe.first();
    let about =
        About { tag, description: &recipe.description, base_image: &base_image, kernel: &kernel, probe };
    finish(&machines, &request, draft, &about, wanted.force, (started, caller))
}

/// Boots a root disk and keeps the machine. To be called by a process of one thread.
pub fn build_root_disk(
    paths: &Paths,
    wanted: &RootDiskRequest,
    caller: &dyn BuildCaller,
) -> Result<BuiltSnapshot, SnapshotBuildError> {
    let started = Instant::now();
    let vcpus = check_vcpus(wanted.vcpus)?;
    let machines = start_machines(paths)?;
    let interrupt = caller.interrupt();
    let draft = SnapshotDraft::create(paths, &wanted.tag, wanted.force)?;
    let shell = |command: &String| WarmCommand {
        argv: vec!["/bin/sh".to_owned(), "-c".to_owned(), command.clone()],
        ..WarmCommand::default()
    };
    let warm = wanted.warm.as_ref().map(shell);
    let request = MachineRequest {
        kernel: &wanted.kernel,
        initrd: wanted.initrd.as_deref(),
        root_disk: &wanted.root_disk,
        memory_mib: wanted.memory_mib.into(),
        vcpus,
        warm: warm.as_ref(),
        ready_timeout: READY_TIMEOUT,
        rehearse: &Rehearse::default(),
        probes: &[],
        paths,
        scratch: Scratch { dir: &paths.cache, mib: wanted.scratch_mib },
        second_console: wanted.second_console,
        interrupt: &interrupt,
    };
    let kernel = &wanted.kernel;
    let about = About { tag: &wanted.tag, description: "", base_image: "", kernel, probe: None };
    finish(&machines, &request, draft, &about, wanted.force, (started, caller))
}

fn start_machines(paths: &Paths) -> Result<Machines, SnapshotBuildError> {
    let zygote = start_zygote()?;
    Ok(Machines::new(zygote, RunDir::create(paths)?.into())?)
}

pub(super) fn start_zygote() -> Result<Zygote, SnapshotBuildError> {
    drop(Hypervisor::open(KvmKind::detect())?);
    Ok(Zygote::start()?)
}

fn finish(
    machines: &Machines,
    request: &MachineRequest<'_>,
    draft: SnapshotDraft,
    about: &About<'_>,
    force: bool,
    (started, caller): (Instant, &dyn BuildCaller),
) -> Result<BuiltSnapshot, SnapshotBuildError> {
    let failed = |failure| SnapshotBuildError::of_machine(about.tag, failure);
    let configuration =
        machine::build(machines, request, draft.path(), |step| caller.on_step(step)).map_err(failed)?;
    write_manifest(draft.path(), about, &configuration)?;
    let path = draft.publish(force)?;
    // 512-byte blocks: what is stored, holes aside.
    let stored =
        |name: &str| std::fs::metadata(path.join(name)).map_or(0, |metadata| metadata.blocks() * 512);
    Ok(BuiltSnapshot {
        tag: about.tag.to_owned(),
        memory_mib: configuration.layout.memory_mib,
        memory_stored_bytes: stored(snapshots::MEMORY),
        root_disk_bytes: configuration.layout.root_disk_bytes,
        seconds: started.elapsed().as_secs_f64(),
        path,
    })
}

fn write_manifest(
    dir: &Path,
    about: &About<'_>,
    configuration: &MachineConfiguration,
) -> Result<(), SnapshotBuildError> {
    let cpu = host::cpu()?;
    let manifest = Manifest {
        forkd_pack_version: PACK_VERSION,
        tag: about.tag.to_owned(),
        description: about.description.to_owned(),
        base_image: about.base_image.to_owned(),
        created_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        forkd_version: env!("CARGO_PKG_VERSION").to_owned(),
        requires: Requires {
            memory_mib: configuration.layout.memory_mib,
            vcpus: configuration.vcpus,
            kvm_kind: match configuration.kvm_kind {
                KvmKind::Pvm => manifest::KvmKind::Pvm,
                KvmKind::Hardware => manifest::KvmKind::Hardware,
            },
            kernel: kernel_name(about.kernel),
            vmstate_version: forkd_vmm::vmstate::VERSION,
            cpu_features: cpu.features.iter().map(|name| (*name).to_owned()).collect(),
            cpu_vendor: cpu.vendor,
        },
        files: Vec::new(),
        probe: about.probe.and_then(manifest_probe),
    };
    let path = dir.join(snapshots::MANIFEST);
    Ok(std::fs::write(&path, manifest.to_toml()).map_err(file_error("writing", &path))?)
}

/// What the manifest can say of a probe: code of a bounded length.
fn manifest_probe(probe: &Probe) -> Option<ManifestProbe> {
    let code = probe.eval.as_ref()?;
    let longest = code.len().max(probe.expect.as_ref().map_or(0, String::len));
    (longest <= PROBE_MAX).then(|| ManifestProbe { code: code.clone(), expect: probe.expect.clone() })
}

/// The kernel's digest: a host path has no business in a pack.
fn kernel_name(kernel: &Path) -> String {
    tools::sha256_file(kernel).map_or_else(|_| "unknown".to_owned(), |digest| format!("sha256:{digest}"))
}
