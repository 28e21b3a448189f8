//! Signals that forkd gets while a program in a guest runs, passed on to the program.

use std::process;
use std::sync::{Arc, Barrier};
use std::thread;

use forkd_engine::fork::agent::Signaller;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::terminal;

/// Added to a signal's number where a shell makes an exit code of it.
pub const SIGNALLED: i32 = 128;
const INTERRUPT: i32 = 2;
/// Those that are passed on: SIGHUP, SIGINT, SIGQUIT, SIGTERM.
const PASSED_ON: [i32; 4] = [1, INTERRUPT, 3, 15];

/// Passes signals on for the rest of this process, from a thread of its own. A second SIGINT ends the process, and with
/// it the program. With a `terminal` only its size is passed on, as its keys are bytes to the program; signals that come
/// all the same end this process. Where that cannot be set up, signals end it as they always do.
pub fn start(signaller: Signaller, terminal: bool) {
    let ready = Arc::new(Barrier::new(2));
    let started = Arc::clone(&ready);
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let signals = runtime.as_ref().ok().and_then(|runtime| {
            let _context = runtime.enter();
            let kinds = PASSED_ON.map(|number| signal(SignalKind::from_raw(number)).ok());
            Some((kinds.into_iter().collect::<Option<Vec<_>>>()?, signal(SignalKind::window_change()).ok()?))
        });
        started.wait();
        if let (Ok(runtime), Some((mut signals, mut resized))) = (runtime, signals) {
            runtime.block_on(pass_on(&signaller, terminal, &mut signals, &mut resized));
        }
    });
    ready.wait();
}

async fn pass_on(signaller: &Signaller, terminal: bool, signals: &mut [Signal], resized: &mut Signal) {
    let mut interrupted = false;
    loop {
        let [hangup, interrupt, quit, terminate] = signals else { return };
        let number = tokio::select! {
            _ = hangup.recv() => PASSED_ON[0],
            _ = interrupt.recv() => PASSED_ON[1],
            _ = quit.recv() => PASSED_ON[2],
            _ = terminate.recv() => PASSED_ON[3],
            _ = resized.recv() => {
                let (rows, cols) = terminal::size();
                if terminal {
                    // A program that has just ended has no use for it.
                    let _ = signaller.resize(rows, cols);
                }
                continue;
            }
        };
        let again = number == INTERRUPT && std::mem::replace(&mut interrupted, number == INTERRUPT);
        if terminal || again || signaller.send(number).is_err() {
            terminal::restore();
            process::exit(SIGNALLED + number);
        }
    }
}
