//! How a caller ends work that takes long, and what ends a server. A leaf: everything may look at it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use tokio::signal::unix::{SignalKind, signal};

/// Exit status after Ctrl-C.
const CTRL_C: u8 = 130;

/// The caller wanted the work to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Whether the caller wants the work to end. What it holds is the exit status that shells give to the signal that was
/// the reason; 0 until there is one.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    status: Arc<AtomicU8>,
    end_process: Option<fn(u8)>,
}

impl Interrupt {
    /// One whose owner ends the whole process when it is set while work cannot look at it: `end_process` is called with
    /// the exit status, once nothing of the work is left on disk.
    pub fn of_process(end_process: fn(u8)) -> Interrupt {
        Interrupt { status: Arc::default(), end_process: Some(end_process) }
    }

    /// Whether the work is to end.
    pub fn is_set(&self) -> bool {
        self.exit_status().is_some()
    }

    /// What the process has to end with, once it is set.
    pub fn exit_status(&self) -> Option<u8> {
        Some(self.status.load(Ordering::Relaxed)).filter(|status| *status != 0)
    }

    /// Stops what watches this, as Ctrl-C would.
    pub fn set(&self) {
        self.set_status(CTRL_C);
    }

    /// Stops what watches this, for a signal to which shells give that exit status.
    pub fn set_status(&self, status: u8) {
        self.status.store(status, Ordering::Relaxed);
    }

    /// An error once it is set; for loops.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.is_set() { Err(Interrupted) } else { Ok(()) }
    }

    /// Ends the process if that is its owner's wish; otherwise the work goes on until it looks.
    pub(crate) fn end_process(&self) {
        if let (Some(end_process), Some(status)) = (self.end_process, self.exit_status()) {
            end_process(status);
        }
    }
}

/// Completes on Ctrl-C or SIGTERM. To be called in a runtime.
pub fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    })
}
