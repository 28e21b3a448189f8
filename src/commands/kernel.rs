//! `forkd kernel build` and `forkd kernel path`.

use std::process::ExitCode;

use crate::cli::KernelBuildArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::interrupt;
use crate::output::Output;
use forkd_engine::build::kernel::{self, BuildOptions, Kernel};

/// Builds the guest kernel unless it is cached, and prints where it is.
pub fn build(args: &KernelBuildArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let options = BuildOptions { source: args.source.clone(), jobs: args.jobs, force: args.force };
    let kernel = kernel::build(&environment::paths()?, &options, output, &interrupt::watch())?;
    output.report(&kernel, |kernel| {
        let how = if kernel.cached {
            "already built".to_owned()
        } else {
            format!("built in {} min {:02} s", kernel.seconds / 60, kernel.seconds % 60)
        };
        format!("{}\n{how} from {} with {}", kernel.path.display(), kernel.source, kernel.compiler)
    });
    Ok(ExitCode::SUCCESS)
}

/// Prints the path of the kernel, for scripts: nothing else on stdout.
pub fn path(output: &Output) -> Result<ExitCode, CommandError> {
    let kernel: Kernel = kernel::find(&environment::paths()?)?;
    output.report(&kernel, |kernel| kernel.path.display().to_string());
    Ok(ExitCode::SUCCESS)
}
