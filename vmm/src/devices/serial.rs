//! The first serial port: the guest's console, written to a file of bounded size.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

/// Most console output that is kept of one machine, bytes; a guest cannot fill the host's disk with it.
pub const CONSOLE_MAX: u64 = 4 << 20;

/// Raises the port's interrupt line.
#[derive(Debug)]
pub struct IrqLine(pub EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A console file that stops growing at [`CONSOLE_MAX`]. Its clones write to the same file and share the limit.
#[derive(Debug, Clone)]
pub struct Console(Arc<Mutex<Sink>>);

#[derive(Debug)]
struct Sink {
    file: Option<File>,
    left: u64,
}

impl Console {
    /// Writes to `file`, or nowhere.
    pub fn new(file: Option<File>) -> Console {
        Console(Arc::new(Mutex::new(Sink { file, left: CONSOLE_MAX })))
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(file) = &mut self.file else { return Ok(bytes.len()) };
        if self.left == 0 {
            return Ok(bytes.len());
        }
        let part = &bytes[..bytes.len().min(self.left as usize)];
        self.left -= part.len() as u64;
        if self.left == 0 {
            file.write_all(part)?;
            file.write_all(b"\n[console output over 4 MiB is dropped]\n")?;
        } else if file.write_all(part).is_err() {
            // A full disk must not stop the guest.
            self.left = 0;
        }
        Ok(bytes.len())
    }
}

/// The device.
pub type SerialPort = Serial<IrqLine, NoEvents, Console>;

/// What of the port survives a snapshot: registers; pending input is dropped, as nothing sends any.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct SerialPortState {
    registers: [u8; 9],
}

impl SerialPortState {
    /// Takes the port's registers.
    pub fn save(port: &SerialPort) -> SerialPortState {
        let state = port.state();
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        SerialPortState { registers }
    }

    /// A port in that state.
    pub fn restore(&self, irq: IrqLine, console: Console) -> Result<SerialPort, io::Error> {
        let [low, high, enable, identification, control, status, modem_control, modem_status, scratch] =
            self.registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: control,
            line_status: status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        Serial::from_state(&state, irq, NoEvents, console)
            .map_err(|error| io::Error::other(format!("{error:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_stops_growing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut console = Console::new(Some(file.reopen().unwrap()));
        let block = vec![b'x'; 1 << 20];
        for _ in 0..8 {
            console.write_all(&block).unwrap();
        }
        let length = file.as_file().metadata().unwrap().len();
        assert!((CONSOLE_MAX..CONSOLE_MAX + 100).contains(&length), "{length}");
    }
}
