//! `forkd build` and `forkd snapshot`: from a recipe, or from a root disk, to a local snapshot.

use crate::cli::{BuildArgs, SnapshotArgs};
use crate::error::CommandError;
use crate::host;
use crate::kernel;
use crate::machine_build::{self, BuildError, Failure, Machines, Request, Step};
use crate::output::Output;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::recipe::{self, Probe, Recipe, RecipeError};
use crate::run_dir::{RunDir, RunDirError};
use crate::scratch::Scratch;
use crate::snapshot::{self, Configuration, Draft, SnapshotError, check_vcpus, file_error};
use crate::tools::Interrupt;
use crate::units::show_size;
use forkd_fs::format::PACK_VERSION;
use forkd_fs::manifest::{self, Manifest, ManifestProbe, Requires};
use forkd_guest::protocol::WarmCommand;
use forkd_vmm::kvm::{Hypervisor, KvmError, KvmKind};
use forkd_vmm::zygote::{SpawnError, Zygote};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// How long a warm command may take when no recipe says so.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// Longest probe that the manifest, which is bounded, keeps for `forkd trace`; of code and answer each.
const PROBE_MAX: usize = 32 << 10;

/// A snapshot could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildCommandError {
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
        /// [`Failure::console`].
        console: String,
    },
}

impl BuildCommandError {
    /// Of a snapshot's machine.
    pub(super) fn of_machine(tag: &str, failure: Failure) -> BuildCommandError {
        let Failure { error: source, console } = failure;
        BuildCommandError::Build { tag: tag.to_owned(), source, console }
    }
}

/// What is printed at the end.
#[derive(Debug, Serialize)]
struct Built {
    tag: String,
    path: PathBuf,
    memory_mib: u64,
    memory_stored_bytes: u64,
    root_disk_bytes: u64,
    seconds: f64,
}

/// What goes into the manifest besides the machine itself.
struct About<'a> {
    tag: &'a str,
    description: &'a str,
    base_image: &'a str,
    kernel: &'a Path,
    probe: Option<&'a Probe>,
}

/// `forkd build`.
pub fn build(args: &BuildArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let started = Instant::now();
    let paths = Paths::from_env()?;
    let recipe = Recipe::load(&args.recipe).map_err(BuildCommandError::from)?;
    let tag = args.tag.as_deref().unwrap_or(&recipe.name);
    let vcpus = check_vcpus(recipe.vcpus).map_err(BuildCommandError::from)?;
    let machines = start_machines(&paths)?;
    let interrupt = Interrupt::watch();
    let draft = Draft::create(&paths, tag, args.force).map_err(BuildCommandError::from)?;
    let kernel = match &args.kernel {
        Some(kernel) => kernel.clone(),
        None => kernel::find(&paths)?.path,
    };
    let spinner = Progress::spinner(output, "root disk");
    let root_disk = recipe::root_disk(&paths, &recipe, &interrupt, |line| spinner.say(line))
        .map_err(BuildCommandError::from)?;
    drop(spinner);
    let request = Request {
        kernel: &kernel,
        initrd: None,
        root_disk: &root_disk,
        memory_mib: recipe.memory_mib.into(),
        vcpus,
        warm: None,
        ready_timeout: recipe.ready_timeout(),
        probe: recipe.probe.as_ref(),
        scratch: Scratch { dir: &paths.cache, mib: recipe.scratch_mib },
        second_console: recipe.second_console,
        interrupt: &interrupt,
    };
    let base_image = format!("debian:{}", recipe.base.suite);
    let probe = recipe.probe.as_ref();
    let about =
        About { tag, description: &recipe.description, base_image: &base_image, kernel: &kernel, probe };
    finish(&machines, &request, draft, &about, args.force, started, output)
}

/// `forkd snapshot`.
pub fn snapshot(args: &SnapshotArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let started = Instant::now();
    let paths = Paths::from_env()?;
    let vcpus = check_vcpus(args.vcpus).map_err(BuildCommandError::from)?;
    let machines = start_machines(&paths)?;
    let interrupt = Interrupt::watch();
    let draft = Draft::create(&paths, &args.tag, args.force).map_err(BuildCommandError::from)?;
    let shell = |command: &String| WarmCommand {
        argv: vec!["/bin/sh".to_owned(), "-c".to_owned(), command.clone()],
        ..WarmCommand::default()
    };
    let warm = args.warm.as_ref().map(shell);
    let request = Request {
        kernel: &args.kernel,
        initrd: args.initrd.as_deref(),
        root_disk: &args.rootfs,
        memory_mib: args.memory.into(),
        vcpus,
        warm: warm.as_ref(),
        ready_timeout: READY_TIMEOUT,
        probe: None,
        scratch: Scratch { dir: &paths.cache, mib: args.scratch },
        second_console: args.second_console,
        interrupt: &interrupt,
    };
    let about = About { tag: &args.tag, description: "", base_image: "", kernel: &args.kernel, probe: None };
    finish(&machines, &request, draft, &about, args.force, started, output)
}

fn start_machines(paths: &Paths) -> Result<Machines, BuildCommandError> {
    let zygote = start_zygote()?;
    Ok(Machines::new(zygote, RunDir::create(paths)?.into())?)
}

pub(super) fn start_zygote() -> Result<Zygote, BuildCommandError> {
    drop(Hypervisor::open(KvmKind::detect())?);
    Ok(Zygote::start()?)
}

fn finish(
    machines: &Machines,
    request: &Request<'_>,
    draft: Draft,
    about: &About<'_>,
    force: bool,
    started: Instant,
    output: &Output,
) -> Result<ExitCode, CommandError> {
    let failed = |failure| BuildCommandError::of_machine(about.tag, failure);
    let configuration = machine_build::build(machines, request, draft.path(), |step| {
        let text = match step {
            Step::Boot => "booting the guest",
            Step::Warm => "waiting until the warm command is ready",
            Step::Probe => "probing the warm state",
            Step::Save => "saving memory and state",
            Step::Trace => "restoring it a few times to record what a fork touches",
        };
        output.note(format_args!("{:>6.1} s  {text}", started.elapsed().as_secs_f64()));
    })
    .map_err(failed)?;
    write_manifest(draft.path(), about, &configuration)?;
    let path = draft.publish(force).map_err(BuildCommandError::from)?;
    // 512-byte blocks: what is stored, holes aside.
    let stored =
        |name: &str| std::fs::metadata(path.join(name)).map_or(0, |metadata| metadata.blocks() * 512);
    let built = Built {
        tag: about.tag.to_owned(),
        memory_mib: configuration.layout.memory_mib,
        memory_stored_bytes: stored(snapshot::MEMORY),
        root_disk_bytes: configuration.layout.root_disk_bytes,
        seconds: started.elapsed().as_secs_f64(),
        path,
    };
    output.report(&built, |built| {
        format!(
            "{}: {} MiB machine, {} of memory stored, root disk {}, built in {:.0} s\n",
            built.tag,
            built.memory_mib,
            show_size(built.memory_stored_bytes),
            show_size(built.root_disk_bytes),
            built.seconds
        )
    });
    Ok(ExitCode::SUCCESS)
}

fn write_manifest(
    dir: &Path,
    about: &About<'_>,
    configuration: &Configuration,
) -> Result<(), BuildCommandError> {
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
        probe: about
            .probe
            .filter(|probe| probe.code.len().max(probe.expect.as_ref().map_or(0, String::len)) <= PROBE_MAX)
            .map(|probe| ManifestProbe { code: probe.code.clone(), expect: probe.expect.clone() }),
    };
    let path = dir.join(snapshot::MANIFEST);
    Ok(std::fs::write(&path, manifest.to_toml()).map_err(file_error("writing", &path))?)
}

/// The kernel's digest: a host path has no business in a pack.
fn kernel_name(kernel: &Path) -> String {
    crate::tools::sha256_file(kernel)
        .map_or_else(|_| "unknown".to_owned(), |digest| format!("sha256:{digest}"))
}
