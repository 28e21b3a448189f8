//! `forkd mount`: a hub's packs as files.
//!
//! Without `--foreground` the command starts itself again as a daemon (`--daemon`), whose stdout is a pipe back: the
//! daemon prints its one JSON document there, `{"mountpoint": ...}` once the mount answers or `{"error": ...}`, and the
//! command passes it on. Only then does the daemon let go of the terminal. So when the command returns 0, `ls` works.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use forkd_fs::fuse::{MountError, MountedTree};
use forkd_fs::source::HttpClient;
use forkd_fs::tree::{PackListing, Tree};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::umount;
use crate::cli::MountArgs;
use crate::error::CommandError;
use crate::hub::serve::stop_signal;
use crate::mounts::{self, MountsError, Record, SOURCE_PREFIX};
use crate::output::Output;
use crate::packs;
use crate::paths::Paths;
use crate::registry::{Catalogue, RegistryCopies, Resolved, whole_digest};

/// Why a hub cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountCommandError {
    /// The mountpoint, or what is mounted there.
    #[error(transparent)]
    Mounts(#[from] MountsError),
    /// FUSE.
    #[error(transparent)]
    Fuse(#[from] MountError),
    /// The daemon does not start.
    #[error("the daemon does not start")]
    Spawn(#[source] io::Error),
    /// The process that unmounts after a killed daemon does not start.
    #[error("the watcher does not start")]
    Watcher(#[source] io::Error),
    /// The daemon's output cannot be moved to its log.
    #[error("the daemon cannot leave the terminal")]
    Detach(#[source] io::Error),
}

/// What `forkd mount` prints.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    mountpoint: std::path::PathBuf,
    hub: String,
    pid: u32,
}

/// Mounts.
pub fn run(args: &MountArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let mountpoint = mounts::check_mountpoint(&paths, &args.dir).map_err(MountCommandError::from)?;
    if args.foreground || args.daemon {
        serve(args, output, &paths, &mountpoint)
    } else {
        Ok(start_daemon(args, output, &mountpoint)?)
    }
}

/// Starts the daemon and waits for its word.
fn start_daemon(args: &MountArgs, output: &Output, mountpoint: &Path) -> Result<ExitCode, MountCommandError> {
    let program = std::env::current_exe().map_err(MountCommandError::Spawn)?;
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
    let mut daemon = spawned.map_err(MountCommandError::Spawn)?;
    let mut said = Vec::new();
    if let Some(mut stdout) = daemon.stdout.take() {
        // Ends when the daemon lets go of the pipe: ready, or dead.
        stdout.read_to_end(&mut said).map_err(MountCommandError::Spawn)?;
    }
    if let Ok(report) = serde_json::from_slice::<Report>(&said) {
        output.report(&report, |report| format!("mounted {} on {}", report.hub, report.mountpoint.display()));
        return Ok(ExitCode::SUCCESS);
    }
    // It has said on stderr, which it shares with us, what went wrong.
    let status = daemon.wait().map_err(MountCommandError::Spawn)?;
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
        _ => Err(MountCommandError::Spawn(io::Error::other(format!("it ended early: {status}")))),
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
    let runtime = super::runtime()?;
    let _guard = runtime.enter();
    let http = packs::http_client();
    let catalogue = runtime.block_on(packs::catalogue(paths, args.hub.hub.as_deref(), &http))?;
    let mut options = packs::store_options(paths, &args.cache, &http);
    options.demand_deadline = args.deadline;
    let tree = Arc::new(Tree::new(listings(&catalogue), options));
    // Before mounting, so that the watcher holds nothing of the mount.
    let _watcher = umount::start_watcher(mountpoint).map_err(MountCommandError::Watcher)?;
    // Before mounting, so that no signal finds a mount and no handler.
    let stop = runtime.block_on(stop_signal())?;
    let hub = catalogue.location();
    let source = format!("{SOURCE_PREFIX}{hub}");
    let mounted = MountedTree::new(tree.clone(), mountpoint, &source, Handle::current())
        .map_err(MountCommandError::from)?;
    let record = Record {
        mountpoint: mountpoint.to_owned(),
        pid: std::process::id(),
        hub: catalogue.address().spelled_out(),
    };
    mounts::write_record(paths, &record).map_err(MountCommandError::from)?;
    let report = Report { mountpoint: mountpoint.to_owned(), hub, pid: record.pid };
    if args.daemon {
        let log = mounts::log_path(paths, mountpoint).map_err(MountCommandError::from)?;
        output.report(&report, |_| String::new());
        leave_terminal(&log).map_err(MountCommandError::Detach)?;
    } else {
        output.report(&report, |report| format!("mounted {} on {}", report.hub, report.mountpoint.display()));
    }
    let unmounted_by_other = runtime.block_on(async {
        tokio::select! {
            () = stop => false,
            () = mounted.ended() => true,
            () = keep_current(args.refresh, &catalogue, (paths, &http), (&tree, &mounted)) => true,
        }
    });
    let ours = mounts::is_ours(paths, mountpoint, record.pid);
    if ours && !unmounted_by_other {
        // Busy or not, the mount goes: a daemon that is told to stop leaves no dead mount behind.
        mounts::detach(mountpoint).map_err(MountCommandError::from)?;
    }
    if ours {
        mounts::remove_record(paths, mountpoint);
        drop(mounted);
    } else {
        // Dropped, it would unmount whatever is there now; its own mount ends with this process.
        std::mem::forget(mounted);
    }
    // Reads that wait for a hub must not hold up the end.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

/// Reads the registry anew every `interval` (0: never), and shows what it lists from then on. Never ends.
async fn keep_current(
    interval: Duration,
    catalogue: &Catalogue,
    (paths, http): (&Paths, &HttpClient),
    (tree, mounted): (&Tree, &MountedTree),
) {
    if interval.is_zero() {
        return std::future::pending().await;
    }
    let copies = RegistryCopies::new(paths);
    let mut away = false;
    loop {
        tokio::time::sleep(interval).await;
        match catalogue.address().fetch(http, &copies).await {
            Ok(catalogue) => {
                mounted.forget(tree.refresh(&listings(&catalogue)));
                away = false;
            }
            // Said once: what was listed before stays.
            Err(error) if !std::mem::replace(&mut away, true) => {
                tracing::warn!(error = %crate::error::chain(&error), "the registry cannot be read anew");
            }
            Err(_) => {}
        }
    }
}

/// The registry as the tree wants it. An entry that cannot be used is left out, with a warning.
fn listings(catalogue: &Catalogue) -> Vec<PackListing> {
    let listing = |resolved: Resolved| {
        let sha256 = match whole_digest(&resolved.entry).transpose() {
            Ok(sha256) => sha256,
            // The index is pinned: nobody needs the other.
            Err(_) if resolved.location.index.is_some() => None,
            Err(error) => {
                tracing::warn!(pack = %resolved.reference, %error, "an entry with a malformed sha256 is left out");
                return None;
            }
        };
        let created_at = resolved.entry.created_at.as_deref();
        Some(PackListing {
            owner: resolved.reference.package.owner,
            name: resolved.reference.package.name,
            version: resolved.reference.version,
            location: resolved.location,
            sha256,
            modified: created_at
                .and_then(|text| humantime::parse_rfc3339_weak(text).ok())
                .unwrap_or(SystemTime::UNIX_EPOCH),
        })
    };
    let usable = |entry: Result<Resolved, _>| {
        entry.map_err(|error| tracing::warn!(%error, "an entry is left out")).ok()
    };
    catalogue.entries().filter_map(usable).map(packs::warn_unpinned).filter_map(listing).collect()
}

/// Moves stdout and stderr to the log, which closes the pipe to the command that waits.
fn leave_terminal(log: &Path) -> io::Result<()> {
    let log = File::options().create(true).append(true).open(log)?;
    rustix::stdio::dup2_stdout(&log)?;
    rustix::stdio::dup2_stderr(&log)?;
    std::env::set_current_dir("/")
}
