//! Copies of sparse files: what is a hole stays one.

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Most bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// Copies what the first `bytes` of a sparse file store, to the same places. `written` hears of
/// the bytes of each part.
pub fn copy_data(from: &File, to: &File, bytes: u64, written: &dyn Fn(u64)) -> io::Result<()> {
    let mut at = 0;
    while at < bytes {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) if start < bytes => start,
            // No more data.
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        at = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(bytes);
        copy_range(from, to, start, at, written)?;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64, written: &dyn Fn(u64)) -> io::Result<()> {
    let mut buffer = vec![0; (end - start).min(PIECE) as usize];
    let mut at = start;
    while at < end {
        let piece = &mut buffer[..(end - at).min(PIECE) as usize];
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += piece.len() as u64;
        written(piece.len() as u64);
    }
    Ok(())
}
