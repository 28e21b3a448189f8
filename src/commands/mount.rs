//! `forkd mount`: a hub's packs as files.
//!
//! Without `--foreground` the command starts itself again as a daemon (`--daemon`), whose stdout is a pipe back: the
//! daemon prints its one JSON document there, `{"mountpoint": ...}` once the mount answers or `{"error": ...}`, and the
//! command passes it on. Only then does the daemon let go of the terminal. So when the command returns 0, `ls` works.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::umount;
use crate::cli::MountArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::runtime;
use forkd_engine::hub::mount::{Hub, MountOptions};
use forkd_engine::interrupt::stop_signal;
use forkd_engine::local::mounts;
use forkd_engine::local::paths::Paths;

/// What `forkd mount` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    mountpoint: PathBuf,
    hub: String,
    pid: u32,
}

/// Mounts.
pub fn run(args: &MountArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let mountpoint = mounts::check_mountpoint(&paths, &args.dir)?;
    if args.foreground || args.daemon {
        serve(args, output, &paths, &mountpoint)
    } else {
        start_daemon(args, output, &mountpoint)
    }
}

/// Starts the daemon and waits for its word.
fn start_daemon(args: &MountArgs, output: &Output, mountpoint: &Path) -> Result<ExitCode, CommandError> {
    let failed = || CommandError::mount_daemon("daemon does not start");
    let program = std::env::current_exe().map_err(failed())?;
    let mut command = Command::new(program);
    command.args(["mount", "--daemon", "--json"]);
    if let Some(hub) = &args.hub.hub {
        // Not as an argument, which everyone can read: it may hold a password.
        command.env("FORKD_HUB_URL", hub);
    }
    command.arg("--cache-size").arg(args.cache.cache_size.to_string());
    if let Some(reserve) = args.cache.cache_reserve {
        command.arg("--cache-reserve").arg(reserve.to_string());
    }
    command.arg("--refresh").arg(format!("{}us", args.refresh.as_micros()));
    command.arg("--deadline").arg(format!("{}us", args.deadline.as_micros()));
    command.arg("--").arg(mountpoint);
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut daemon = spawned.map_err(failed())?;
    let mut said = Vec::new();
    if let Some(mut stdout) = daemon.stdout.take() {
        // Ends when the daemon lets go of the pipe: ready, or dead.
        stdout.read_to_end(&mut said).map_err(failed())?;
    }
    if let Ok(report) = serde_json::from_slice::<Report>(&said) {
        output.report(&report, |report| format!("mounted {} on {}", report.hub, report.mountpoint.display()));
        return Ok(ExitCode::SUCCESS);
    }
    // It has said on stderr, which it shares with us, what went wrong.
    let status = daemon.wait().map_err(failed())?;
    match (
        status.code().and_then(|code| u8::try_from(code).ok()),
        serde_json::from_slice::<serde_json::Value>(&said),
    ) {
        (Some(code), Ok(error)) if code != 0 => {
            if output.is_json() {
                output.report(&error, |_| String::new());
            }
            Ok(ExitCode::from(code))
        }
        _ => Err(failed()(io::Error::other(format!("it ended early: {status}")))),
    }
}

/// Mounts and answers the kernel until unmounted or told to stop.
fn serve(
    args: &MountArgs,
    output: &Output,
    paths: &Paths,
    mountpoint: &Path,
) -> Result<ExitCode, CommandError> {
    if args.daemon {
        // No longer part of the terminal's session: Ctrl-C there does not reach it.
        let _ = rustix::process::setsid();
    }
    let runtime = runtime().map_err(CommandError::Runtime)?;
    let _guard = runtime.enter();
    let (hub, cache) = (args.hub.hub.clone(), args.cache.options());
    let hub = runtime.block_on(Hub::open(paths, &MountOptions { hub, cache, deadline: args.deadline }))?;
    // Before mounting, so that the watcher holds nothing of the mount.
    let watcher_failed = CommandError::mount_daemon("watcher does not start");
    let _watcher = umount::start_watcher(mountpoint).map_err(watcher_failed)?;
    // Before mounting, so that no signal finds a mount and no handler.
    let stop = stop_signal().map_err(CommandError::Signals)?;
    let report = Report { mountpoint: mountpoint.to_owned(), hub: hub.location(), pid: std::process::id() };
    let mount = hub.mount(paths, mountpoint, Handle::current())?;
    if args.daemon {
        let log = mounts::log_path(paths, mountpoint)?;
        output.report(&report, |_| String::new());
        leave_terminal(&log).map_err(CommandError::mount_daemon("daemon cannot leave the terminal"))?;
    } else {
        output.report(&report, |report| format!("mounted {} on {}", report.hub, report.mountpoint.display()));
    }
    runtime.block_on(mount.serve(args.refresh, stop))?;
    // Reads that wait for a hub must not hold up the end.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

/// Moves stdout and stderr to the log, which closes the pipe to the command that waits.
fn leave_terminal(log: &Path) -> io::Result<()> {
    let log = File::options().create(true).append(true).open(log)?;
    rustix::stdio::dup2_stdout(&log)?;
    rustix::stdio::dup2_stderr(&log)?;
    std::env::set_current_dir("/")
}
