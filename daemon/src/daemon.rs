//! The daemon's start and its end.

use crate::api::router;
use crate::audit::AuditLog;
use crate::blocking::Blocking;
use crate::census::Census;
use crate::failure::{ServeError, place_error};
use crate::listener::Listener;
use crate::pool::Pool;
use crate::sandboxes;
use crate::server;
use crate::state::{Daemon, Keys};
use crate::tokens::Tokens;
use forkd_engine::chain::chain;
use forkd_engine::fork::zygote::raise_file_limit;
use forkd_engine::interrupt::stop_signal;
use forkd_engine::local::daemon::{DaemonOptions, OnExit, lock};
use forkd_engine::local::paths::Paths;
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::sync::watch;

/// Threads that answer requests; what blocks has others.
const WORKERS: usize = 2;
/// How often sandboxes are counted.
const COUNTED_EVERY: Duration = Duration::from_secs(5);

/// Serves until SIGTERM or Ctrl-C.
///
/// # Errors
/// [`ServeError`] as its variants say.
pub fn run(paths: Paths, options: DaemonOptions) -> Result<(), ServeError> {
    let _lock = lock_run_directory(&paths)?;
    raise_file_limit();
    let tokens = options.token_file.as_deref().map(Tokens::read).transpose()?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(Blocking::threads(options.limits.streams))
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    let served = runtime.block_on(serve(paths, options, tokens));
    // What still blocks waits for guests, which may be for ever.
    runtime.shutdown_background();
    served
}

/// There is one daemon for each run directory.
fn lock_run_directory(paths: &Paths) -> Result<File, ServeError> {
    paths.create_runtime(Path::new(""))?;
    let path = lock(paths);
    let file = File::create(&path).map_err(place_error("creating", path.display()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| ServeError::Running { path })?;
    Ok(file)
}

async fn serve(paths: Paths, options: DaemonOptions, tokens: Option<Tokens>) -> Result<(), ServeError> {
    let listener = Listener::open(&options, tokens.as_ref()).await?;
    let stopped = stop_signal().map_err(ServeError::Runtime)?;
    let audit = options
        .audit_log
        .as_deref()
        .map(|file| AuditLog::open(file).map_err(place_error("opening", file.display())));
    let audit = audit.transpose()?;
    let pool = Pool::start(options.ready).map_err(place_error("starting", "supervisors"))?;
    let daemon = Arc::new(Daemon {
        blocking: Blocking::new(options.limits.streams),
        census: Census::new(options.limits.sandboxes),
        metrics: Arc::default(),
        keys: Keys::default(),
        audit,
        paths,
        options,
        tokens,
        pool,
    });
    let counting = tokio::spawn(count_on(Arc::clone(&daemon)));
    let (end, ending) = watch::channel(false);
    let (app, metrics) = (router::router(Arc::clone(&daemon)), Arc::clone(&daemon.metrics));
    tracing::info!(place = listener.place(), "listening");
    tokio::spawn(async move {
        stopped.await;
        tracing::info!("ending");
        // Nobody listens any more only when it has ended.
        let _ = end.send(true);
    });
    server::serve(&listener, app, daemon.options.limits.connections, metrics, ending).await;
    counting.abort();
    listener.remove();
    if daemon.options.on_exit == OnExit::End {
        end_sandboxes(&daemon).await;
    }
    Ok(())
}

async fn end_sandboxes(daemon: &Daemon) {
    let paths = daemon.paths.clone();
    match daemon.blocking.short(move || sandboxes::end_all(&paths)).await {
        Ok(Ok(count)) => tracing::info!(count, "sandboxes ended"),
        Ok(Err(error)) => tracing::error!(error = chain(&error), "sandboxes could not be ended"),
        Err(error) => tracing::error!(error = chain(&error), "sandboxes could not be ended"),
    }
}

async fn count_on(daemon: Arc<Daemon>) {
    loop {
        let (census, paths) = (Arc::clone(&daemon.census), daemon.paths.clone());
        if let Err(error) = daemon.blocking.short(move || census.count(&paths)).await {
            tracing::warn!(error = chain(&error), "sandboxes cannot be counted");
        }
        tokio::time::sleep(COUNTED_EVERY).await;
    }
}
