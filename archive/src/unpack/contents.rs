//! What is in a file, written with holes where there are only zeros.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// Bytes read at once.
const CHUNK: u64 = 256 << 10;
/// A stretch of so many zeros, at a multiple of it, becomes a hole.
const HOLE: usize = 64 << 10;

/// Which side failed.
pub enum Failed {
    Read(io::Error),
    Write(io::Error),
}

/// Copies `contents`, which have to be `len` bytes, to an empty file; `at` is told how many bytes are done.
pub fn write(contents: &mut impl Read, len: u64, file: &File, mut at: impl FnMut(u64)) -> Result<(), Failed> {
    let mut buffer = vec![0; len.min(CHUNK) as usize];
    let (mut done, mut written) = (0, 0);
    loop {
        let filled = fill(contents, &mut buffer).map_err(Failed::Read)?;
        if filled == 0 {
            break;
        }
        let mut offset = done;
        for stretch in buffer[..filled].chunks(HOLE) {
            if stretch.len() < HOLE || stretch.iter().any(|byte| *byte != 0) {
                file.write_all_at(stretch, offset).map_err(Failed::Write)?;
                written = offset + stretch.len() as u64;
            }
            offset += stretch.len() as u64;
        }
        done = offset;
        at(done);
    }
    if done != len {
        return Err(Failed::Read(io::ErrorKind::UnexpectedEof.into()));
    }
    if written < done {
        file.set_len(done).map_err(Failed::Write)?;
    }
    Ok(())
}

/// Reads until `buffer` is full or the contents end. Asks for all that is missing at once, which the source may know to
/// be on its way. Returns the bytes read.
fn fill(contents: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match contents.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
