//! `forkd umount`.

use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;

use crate::cli::UmountArgs;
use crate::error::CommandError;
use crate::mounts;
use crate::output::Output;
use crate::paths::Paths;

/// How long the daemon gets to end; it has nothing left to do by then.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

#[derive(Serialize)]
struct Report {
    mountpoint: std::path::PathBuf,
}

/// Unmounts, and waits for the daemon's end, so that nothing of it is left when the command returns.
pub fn run(args: &UmountArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    // Held from before it can end, so that the number cannot come to mean another process.
    let daemon = mounts::find(&args.dir).ok().and_then(|mount| {
        let records = mounts::records(&paths);
        let record = records.into_iter().find(|record| record.mountpoint == mount.mountpoint)?;
        pidfd_open(Pid::from_raw(i32::try_from(record.pid).ok()?)?, PidfdFlags::empty()).ok()
    });
    let mount =
        mounts::take_down(&paths, &args.dir, args.lazy).map_err(super::mount::MountCommandError::from)?;
    if let Some(daemon) = daemon.filter(|_| !args.lazy) {
        // Readable when the process has ended. Should it not end, it is no longer mounted all the same.
        let _ = poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(&PATIENCE));
    }
    output.report(&Report { mountpoint: mount.mountpoint }, |report| {
        format!("unmounted {}", report.mountpoint.display())
    });
    Ok(ExitCode::SUCCESS)
}
