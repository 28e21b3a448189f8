//! Going through a file once: its digest, and which of its chunks hold anything but zeros.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::digest::{Digest, Hasher};
use crate::format;

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileScan {
    pub(crate) size: u64,
    pub(crate) digest: Digest,
    /// Numbers of the chunks that hold anything but zeros, ascending.
    pub(crate) stored: Vec<u32>,
}

/// Goes through `file`, reading no holes. `on_bytes` hears of every chunk's length.
pub(crate) fn scan(file: &File, chunk_size: u32, on_bytes: &dyn Fn(u64)) -> io::Result<FileScan> {
    let size = file.metadata()?.len();
    if size > format::MAX_FILE_SIZE {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    let (mut hasher, mut stored, mut buffer) = (Hasher::new(), Vec::new(), vec![0; chunk_size as usize]);
    let mut extent = next_extent(file, 0, size)?;
    for chunk in 0..format::chunk_count(size, chunk_size) {
        let (start, len) =
            (u64::from(chunk) * u64::from(chunk_size), format::chunk_len(size, chunk_size, chunk));
        let end = start + u64::from(len);
        if extent.end <= start {
            extent = next_extent(file, start, size)?;
        }
        if extent.start >= end {
            hasher.update_zeros(u64::from(len));
        } else {
            let plain = &mut buffer[..len as usize];
            file.read_exact_at(plain, start)?;
            hasher.update(plain);
            if !is_zero(plain) {
                stored.push(chunk);
            }
        }
        on_bytes(u64::from(len));
    }
    Ok(FileScan { size, digest: hasher.finish(), stored })
}

/// The next part of the file at or after `offset` that is not a hole; empty at the end when there is none.
fn next_extent(file: &File, offset: u64, size: u64) -> io::Result<Range<u64>> {
    let start = match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(size..size),
        // A file system that does not tell: all of it may be data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(offset..size),
        Err(error) => return Err(error.into()),
    };
    Ok(start..seek(file, SeekFrom::Hole(start)).unwrap_or(size))
}

/// Whether `bytes` are all zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Whole cache lines at a time, so that the inner loop is vectorised.
    bytes.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::MIN_CHUNK_SIZE;

    #[test]
    fn holes_and_zeros_are_told_from_data() {
        let chunk = MIN_CHUNK_SIZE as usize;
        let mut plain = vec![0; chunk * 7 + 100];
        plain[chunk] = 1;
        plain[4 * chunk - 1] = 1;
        plain[7 * chunk + 99] = 1;
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(plain.len() as u64).unwrap();
        // Chunk 5 is written zeros, 0 and 2 are holes.
        for chunk_with_data in [1, 3, 5, 7] {
            let range = chunk_with_data * chunk..plain.len().min((chunk_with_data + 1) * chunk);
            sparse.write_all_at(&plain[range.clone()], range.start as u64).unwrap();
        }
        let expect = FileScan { size: plain.len() as u64, digest: Digest::of(&plain), stored: vec![1, 3, 7] };
        assert_eq!(scan(&sparse, MIN_CHUNK_SIZE, &|_| ()).unwrap(), expect);
    }

    #[test]
    fn an_empty_file_and_one_hole() {
        let file = tempfile::tempfile().unwrap();
        let empty = FileScan { size: 0, digest: Digest::of(b""), stored: vec![] };
        assert_eq!(scan(&file, MIN_CHUNK_SIZE, &|_| ()).unwrap(), empty);
        file.set_len(1_000_000).unwrap();
        let hole = FileScan { size: 1_000_000, digest: Digest::of(&vec![0; 1_000_000]), stored: vec![] };
        assert_eq!(scan(&file, MIN_CHUNK_SIZE, &|_| ()).unwrap(), hole);
    }

    #[test]
    fn any_bit_makes_bytes_not_zero() {
        let mut bytes = vec![0; 200];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in 0..bytes.len() {
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
