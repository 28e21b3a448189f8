//! Ctrl-C, SIGTERM and SIGHUP: as an [`Interrupt`] of the engine's work.

use std::sync::{Arc, Barrier};
use std::thread;

use forkd_engine::interrupt::Interrupt;
use tokio::signal::unix::{SignalKind, signal};

/// Takes over SIGINT, SIGTERM and, unless it is ignored (nohup), SIGHUP for the rest of the process, on a thread of
/// its own. Where that is not possible the signals keep ending the process at once.
pub fn watch() -> Interrupt {
    let interrupt = Interrupt::of_process(|status| std::process::exit(status.into()));
    let ready = Arc::new(Barrier::new(2));
    let (set, started) = (interrupt.clone(), Arc::clone(&ready));
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let signals = runtime.as_ref().ok().and_then(|runtime| {
            let _context = runtime.enter();
            let hangup = (!ignores_hangup()).then(|| signal(SignalKind::hangup())).transpose().ok()?;
            let interrupt = signal(SignalKind::interrupt()).ok()?;
            Some((interrupt, signal(SignalKind::terminate()).ok()?, hangup))
        });
        started.wait();
        let (Ok(runtime), Some((mut interrupt, mut terminate, mut hangup))) = (runtime, signals) else {
            return;
        };
        let status = runtime.block_on(async {
            let hung_up = async {
                match &mut hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
                _ = hung_up => 129,
            }
        });
        set.set_status(status);
    });
    ready.wait();
    interrupt
}

/// Whether whoever started us wants us to outlive the terminal.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // SIGHUP is signal 1, the lowest bit.
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::Signal;
    use std::time::{Duration, Instant};

    #[test]
    fn a_closed_terminal_is_an_interrupt_with_its_own_exit_status() {
        let interrupt = watch();
        assert_eq!((interrupt.is_set(), interrupt.exit_status()), (false, None));
        rustix::process::kill_process(rustix::process::getpid(), Signal::HUP).unwrap();
        let started = Instant::now();
        while !interrupt.is_set() {
            assert!(started.elapsed() < Duration::from_secs(5));
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(interrupt.exit_status(), Some(129));
    }
}
