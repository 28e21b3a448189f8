//! The terminal that forkd runs in: its size, and its raw mode while a program in a guest has it.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Lines and characters in a line where there is no terminal to ask.
const DEFAULT_SIZE: (u16, u16) = (24, 80);

/// The mode to go back to, while the terminal is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode of the terminal on stdin, for as long as this lives or until [`restore`] is called.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Every key goes to the reader as bytes, none to the line discipline; nothing is echoed.
    ///
    /// # Errors
    /// That of the operating system.
    pub fn enter() -> io::Result<RawMode> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let mode = RawMode(());
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Goes back to the mode before [`RawMode::enter`]: for who ends the process without coming back there.
pub fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Lines and characters in a line.
pub fn size() -> (u16, u16) {
    let sizes = [tcgetwinsize(io::stdin()), tcgetwinsize(io::stdout()), tcgetwinsize(io::stderr())];
    let known = sizes.into_iter().flatten().find(|size| size.ws_row > 0 && size.ws_col > 0);
    known.map_or(DEFAULT_SIZE, |size| (size.ws_row, size.ws_col))
}

/// Whether stdin is a terminal.
pub fn is_stdin() -> bool {
    io::stdin().is_terminal()
}
