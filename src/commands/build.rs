//! `forkd build` and `forkd snapshot`: from a recipe, or from a root disk, to a local snapshot.

use std::process::ExitCode;
use std::time::Instant;

use crate::cli::{BuildArgs, SnapshotArgs};
use crate::environment;
use crate::failure::CommandError;
use crate::interrupt;
use crate::output::Output;
use crate::units::show_size;
use forkd_engine::build::machine::BuildStep;
use forkd_engine::build::snapshot::{
    BuildCaller, BuiltSnapshot, RecipeRequest, RootDiskRequest, build_recipe, build_root_disk,
};
use forkd_engine::fork::child_snapshot::{ChildSnapshot, ChildSnapshotRequest, snapshot_child};
use forkd_engine::interrupt::Interrupt;
use forkd_engine::progress::Progress;

/// `forkd build`.
pub fn build(args: &BuildArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let request = RecipeRequest {
        recipe: args.recipe.clone(),
        tag: args.tag.clone(),
        kernel: args.kernel.clone(),
        force: args.force,
    };
    let built = build_recipe(&environment::paths()?, &request, &Caller::new(output))?;
    output.report(&built, show);
    Ok(ExitCode::SUCCESS)
}

/// `forkd snapshot`: of a root disk, or of a child.
pub fn snapshot(args: &SnapshotArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let (kernel, root_disk) = match (&args.child, &args.kernel, &args.rootfs) {
        (Some(child), _, _) => return snapshot_of_child(args, child, output),
        (None, kernel, root_disk) => (kernel.clone(), root_disk.clone()),
    };
    let request = RootDiskRequest {
        tag: args.tag.clone(),
        // Both are there: the command line asks for them.
        kernel: kernel.unwrap_or_default(),
        initrd: args.initrd.clone(),
        root_disk: root_disk.unwrap_or_default(),
        memory_mib: args.memory,
        vcpus: args.vcpus,
        warm: args.warm.clone(),
        scratch_mib: args.scratch,
        second_console: args.second_console,
        force: args.force,
    };
    let built = build_root_disk(&environment::paths()?, &request, &Caller::new(output))?;
    output.report(&built, show);
    Ok(ExitCode::SUCCESS)
}

fn snapshot_of_child(args: &SnapshotArgs, child: &str, output: &Output) -> Result<ExitCode, CommandError> {
    let request = ChildSnapshotRequest { child: child.to_owned(), tag: args.tag.clone(), force: args.force };
    let taken = snapshot_child(&environment::paths()?, &request, &interrupt::watch(), output)?;
    output.report(&taken, show_of_child);
    Ok(ExitCode::SUCCESS)
}

fn show_of_child(taken: &ChildSnapshot) -> String {
    let ChildSnapshot { tag, child, pause_ms, .. } = taken;
    let (stored, differs) = (show_size(taken.disk_bytes), show_size(taken.copied_bytes));
    let stored = match &taken.base {
        Some(base) => format!("{differs} of memory that differ from {}, {stored} on disk", base.name),
        None => format!("all of the machine, {stored} on disk"),
    };
    format!("{tag}: {stored}; {child} stood still for {pause_ms:.1} ms\n")
}

fn show(built: &BuiltSnapshot) -> String {
    format!(
        "{}: {} MiB machine, {} of memory stored, root disk {}, built in {:.0} s\n",
        built.tag,
        built.memory_mib,
        show_size(built.memory_stored_bytes),
        show_size(built.root_disk_bytes),
        built.seconds
    )
}

/// Shows a build on the terminal, and ends it at Ctrl-C.
pub(super) struct Caller<'a> {
    output: &'a Output,
    started: Instant,
}

impl<'a> Caller<'a> {
    pub(super) fn new(output: &'a Output) -> Caller<'a> {
        Caller { output, started: Instant::now() }
    }
}

impl BuildCaller for Caller<'_> {
    fn progress(&self) -> &dyn Progress {
        self.output
    }

    fn on_step(&self, step: BuildStep) {
        let text = match step {
            BuildStep::Boot => "booting the guest",
            BuildStep::Warm => "waiting until services and the warm command are ready",
            BuildStep::Rehearse => "doing once what copies will do first",
            BuildStep::Probe => "probing the warm state",
            BuildStep::Save => "saving memory and state",
            BuildStep::Trace => "restoring it a few times to record what a fork touches",
        };
        self.output.note(format_args!("{:>6.1} s  {text}", self.started.elapsed().as_secs_f64()));
    }

    fn interrupt(&self) -> Interrupt {
        interrupt::watch()
    }
}
