//! `forkd umount`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::UmountArgs;
use crate::error::CommandError;
use crate::mounts;
use crate::output::Output;
use crate::paths::Paths;

/// How long the daemon gets to end; it has nothing left to do by then.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Serialize)]
struct Report {
    mountpoint: std::path::PathBuf,
}

/// Unmounts, and waits for the daemon's end, so that nothing of it is left when the command returns.
pub fn run(args: &UmountArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let daemon = mounts::find(&args.dir).ok().and_then(|mount| {
        mounts::records(&paths).into_iter().find(|record| record.mountpoint == mount.mountpoint)
    });
    let mount =
        mounts::take_down(&paths, &args.dir, args.lazy).map_err(super::mount::MountCommandError::from)?;
    if let Some(daemon) = daemon.filter(|_| !args.lazy) {
        let started = Instant::now();
        while is_running(daemon.pid) && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    output.report(&Report { mountpoint: mount.mountpoint }, |report| {
        format!("unmounted {}", report.mountpoint.display())
    });
    Ok(ExitCode::SUCCESS)
}

fn is_running(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}
