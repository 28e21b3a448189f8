//! Going to the background: the process splits in two; the one in front waits until the other has reported.
//! Callers: `commands/fork.rs`, before any thread exists.

use forkd_vmm::sys::{self, ForkError, Forked, Lifetime};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use std::process::ExitCode;

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
    report: OwnedFd,
}

/// Splits the process.
pub fn split() -> Result<Detached, DetachError> {
    let (wait, report) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(DetachError::Pipe)?;
    match sys::fork_process(Lifetime::Independent)? {
        Forked::Child => {
            // A new session: Ctrl-C in the terminal no longer reaches this process.
            let _ = rustix::process::setsid();
            Ok(Detached::Background(Handover { report }))
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
    /// The report is printed: the process in front exits with `code`, this one gives its output up.
    pub fn finish(self, code: u8) {
        if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
            let _ = rustix::stdio::dup2_stdin(&null);
            let _ = rustix::stdio::dup2_stdout(&null);
            let _ = rustix::stdio::dup2_stderr(&null);
        }
        let _ = rustix::io::write(&self.report, &[code]);
    }
}
