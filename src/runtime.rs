//! The async runtime of a command, and what ends its process.

use std::io;

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// A tokio runtime for a command that does I/O; its threads start here and end with it.
pub fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// A tokio runtime on the thread that waits for it: what one thread can do is done without handing it to another.
pub fn local_runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Has Ctrl-C, SIGTERM and SIGHUP clean up and end the process with the status that shells give to that signal, from when
/// this returns. Where signals cannot be had they end the process by themselves.
pub fn end_on_signal(runtime: &Runtime, clean_up: impl FnOnce() + Send + 'static) {
    let _context = runtime.enter();
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = kinds.map(signal) else { return };
    runtime.spawn(async move {
        let code = tokio::select! {
            _ = interrupt.recv() => 130,
            _ = terminate.recv() => 143,
            _ = hangup.recv() => 129,
        };
        clean_up();
        std::process::exit(code);
    });
}
