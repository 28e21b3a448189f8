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

/// `forkd snapshot`.
pub fn snapshot(args: &SnapshotArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let request = RootDiskRequest {
        tag: args.tag.clone(),
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        root_disk: args.rootfs.clone(),
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
