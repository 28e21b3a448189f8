//! What the console of a machine that is built holds, in a file that its guest fills: its end for an error, its beginning
//! to keep.

use crate::local::snapshots::{SnapshotError, file_error};
use forkd_vmm::devices::serial::CONSOLE_MAX;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// Lines that an error shows.
const TAIL_LINES: usize = 12;
/// Bytes at the end in which they are looked for.
const TAIL_BYTES: u64 = 4096;
/// Most that is kept, bytes: what the monitor lets a guest print, and its remark that there was more.
const KEPT_MAX: u64 = CONSOLE_MAX + 4096;

/// The last lines that are not empty; none when it cannot be read.
pub(super) fn tail(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        file.take(TAIL_BYTES).read_to_end(&mut bytes)
    });
    if read.is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// Copies it to where the snapshot keeps it.
pub(super) fn keep(console: &Path, kept: &Path) -> Result<(), SnapshotError> {
    let from = File::open(console).map_err(file_error("opening", console))?;
    let copied = File::create(kept).and_then(|mut to| io::copy(&mut from.take(KEPT_MAX), &mut to));
    copied.map(drop).map_err(file_error("writing", kept))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn errors_show_the_end_and_snapshots_keep_no_more_than_a_guest_may_print() {
        let dir = tempfile::tempdir().unwrap();
        let (console, kept) = (dir.path().join("console"), dir.path().join("kept"));
        assert_eq!(tail(&console), "");
        let lines: String = (0..2000).map(|number| format!("line {number}\r\n\r\n")).collect();
        fs::write(&console, &lines).unwrap();
        let shown: Vec<_> = (1988..2000).map(|number| format!("line {number}")).collect();
        assert_eq!(tail(&console), shown.join("\n"));
        keep(&console, &kept).unwrap();
        assert_eq!(fs::read_to_string(&kept).unwrap(), lines);
        // A process that its guest has taken over can write what it likes.
        fs::write(&console, vec![b'x'; KEPT_MAX as usize + 1]).unwrap();
        assert_eq!(tail(&console).len() as u64, TAIL_BYTES);
        keep(&console, &kept).unwrap();
        assert_eq!(fs::metadata(&kept).unwrap().len(), KEPT_MAX);
    }
}
