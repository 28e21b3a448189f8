//! Going to the background: the process splits in two; the one in front waits until the other has reported.

use forkd_vmm::sys::{self, ForkError, Forked, Lifetime};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The process could not be split.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// fork(2).
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// The pipe between the two.
    #[error("a pipe could not be made")]
    Pipe(#[source] rustix::io::Errno),
}

/// Which of the two processes this is.
pub enum Detached {
    /// The one in front; the other has reported, this is what to exit with.
    Foreground(ExitCode),
    /// The one that goes on.
    Background(Handover),
}

/// Lets go of the terminal when the background process has reported.
pub struct Handover {
    report: Arc<OwnedFd>,
    finished: Arc<AtomicBool>,
}

/// Splits the process.
pub fn split() -> Result<Detached, DetachError> {
    let (wait, report) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(DetachError::Pipe)?;
    match sys::fork_process(Lifetime::Independent)? {
        Forked::Child => {
            // A new session: Ctrl-C in the terminal no longer reaches this process.
            let _ = rustix::process::setsid();
            Ok(Detached::Background(Handover::new(report)))
        }
        Forked::Parent(_) => {
            drop(report);
            let mut code = [1];
            // No byte: the other process ended early, and has said why on stderr.
            let _ = rustix::io::retry_on_intr(|| rustix::io::read(&wait, &mut code));
            Ok(Detached::Foreground(ExitCode::from(code[0])))
        }
    }
}

impl Handover {
    fn new(report: OwnedFd) -> Handover {
        Handover { report: Arc::new(report), finished: Arc::default() }
    }

    /// Has this process asked to end (SIGTERM) when the one in front goes before the report: what was begun was begun for
    /// it, and Ctrl-C reaches only that one. To be called where this process may have threads.
    pub fn end_with_foreground(&self) {
        let (report, finished) = (Arc::clone(&self.report), Arc::clone(&self.finished));
        let watch = move || {
            // A pipe that nobody reads is an error, which is waited for without being named.
            let mut polled = [PollFd::new(&*report, PollFlags::empty())];
            let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None));
            if ended.is_ok() && !finished.load(Ordering::Acquire) {
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::TERM);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("foreground".to_owned()).spawn(watch) {
            tracing::debug!(%error, "Ctrl-C is noticed only when everything is done");
        }
    }

    /// The report is printed: the process in front exits with `code`, this one gives its output up. Returns whether it was
    /// still there; if not, nobody wants what this process has made.
    #[must_use]
    pub fn finish(self, code: u8) -> bool {
        if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
            let _ = rustix::stdio::dup2_stdin(&null);
            let _ = rustix::stdio::dup2_stdout(&null);
            let _ = rustix::stdio::dup2_stderr(&null);
        }
        self.finished.store(true, Ordering::Release);
        rustix::io::retry_on_intr(|| rustix::io::write(&*self.report, &[code])).is_ok()
    }
}
