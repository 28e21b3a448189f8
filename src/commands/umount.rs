//! `forkd umount`, and the watcher that unmounts after a daemon that was killed.

use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};
use serde::Serialize;

use crate::cli::UmountArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::local::mounts;

/// How long the daemon gets to end; it has nothing left to do by then.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

#[derive(Serialize)]
struct Report {
    mountpoint: std::path::PathBuf,
}

/// Starts a process that detaches the mount on `mountpoint` once this one has ended without doing so itself: killed, a
/// daemon leaves a mount that answers every call with ENOTCONN. It waits for the end of the pipe in [`Child::stdin`].
pub fn start_watcher(mountpoint: &Path) -> io::Result<Child> {
    use std::os::unix::process::CommandExt;
    Command::new(std::env::current_exe()?)
        .args(["umount", "--watch", "--"])
        .arg(mountpoint)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Neither Ctrl-C nor what kills the daemon's group is meant for it.
        .process_group(0)
        .current_dir("/")
        .spawn()
}

/// The watcher's life.
fn watch(args: &UmountArgs) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let daemon = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
    // The daemon's connection to the kernel may outlive its end of the pipe by a moment.
    for _ in 0..50 {
        let Ok(mount) = mounts::find(&args.dir) else { break };
        let successor = |record: &mounts::MountRecord| {
            record.mountpoint == mount.mountpoint && Some(record.pid) != daemon && !mount.is_dead()
        };
        if mounts::records(&paths).iter().any(successor) {
            break;
        }
        if mount.is_dead() {
            mounts::take_down(&paths, &args.dir, true)?;
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}

/// Unmounts, and waits for the daemon's end, so that nothing of it is left when the command returns.
pub fn run(args: &UmountArgs, output: &Output) -> Result<ExitCode, CommandError> {
    if args.watch {
        return watch(args);
    }
    let paths = environment::paths()?;
    // Held from before it can end, so that the number cannot come to mean another process.
    let daemon = mounts::find(&args.dir).ok().and_then(|mount| {
        let records = mounts::records(&paths);
        let record = records.into_iter().find(|record| record.mountpoint == mount.mountpoint)?;
        pidfd_open(Pid::from_raw(i32::try_from(record.pid).ok()?)?, PidfdFlags::empty()).ok()
    });
    let mount = mounts::take_down(&paths, &args.dir, args.lazy)?;
    if let Some(daemon) = daemon.filter(|_| !args.lazy) {
        // Readable when the process has ended. Should it not end, it is no longer mounted all the same.
        let _ = poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(&PATIENCE));
    }
    output.report(&Report { mountpoint: mount.mountpoint }, |report| {
        format!("unmounted {}", report.mountpoint.display())
    });
    Ok(ExitCode::SUCCESS)
}
