//! The whole memory of a machine in one sparse file: its image, and over it what differs.

use super::sparse::copy_data;
use forkd_vmm::memory::Delta;
use std::fs::File;
use std::io;

/// Writes `bytes` of memory into an empty file. `written` hears of the bytes of each part that is not a hole.
pub fn write(
    image: &File,
    delta: Option<&Delta>,
    bytes: u64,
    to: &File,
    written: &dyn Fn(u64),
) -> io::Result<()> {
    to.set_len(bytes)?;
    copy_data(image, to, bytes, written)?;
    delta.map_or(Ok(()), |delta| delta.copy_to(to, written))
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_vmm::memory::PAGE_BYTES as PAGE;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn what_differs_lies_over_the_image_and_holes_stay_holes() {
        let file = |pages: &[(u64, u8)]| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(512 * PAGE).unwrap();
            for (page, byte) in pages {
                file.write_all_at(&[*byte; PAGE as usize], page * PAGE).unwrap();
            }
            file
        };
        let image = file(&[(1, 1), (2, 2), (500, 3)]);
        let differs = file(&[(2, 20), (300, 30)]);
        let table = [2, 3, 300, 301].map(|page: u64| (page * PAGE).to_le_bytes()).concat();
        differs.write_all_at(&table, 512 * PAGE).unwrap();
        let delta = Delta::open(differs.into(), 512 * PAGE).unwrap();
        let (whole, done) = (tempfile::tempfile().unwrap(), std::cell::Cell::new(0));
        write(&image, Some(&delta), 512 * PAGE, &whole, &|bytes| done.set(done.get() + bytes)).unwrap();
        let mut bytes = vec![0; 512 * PAGE as usize];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        let first_bytes = bytes.chunks(PAGE as usize).map(|page| page[0]).collect::<Vec<_>>();
        let stored = [(1, 1), (2, 20), (300, 30), (500, 3)];
        for (page, byte) in (0..512).zip(first_bytes) {
            let expected = stored.iter().find(|(at, _)| *at == page).map_or(0, |(_, byte)| *byte);
            assert_eq!(byte, expected, "page {page}");
        }
        assert_eq!((whole.metadata().unwrap().len(), done.get()), (512 * PAGE, 5 * PAGE));
        assert!(whole.metadata().unwrap().blocks() * 512 <= 8 * PAGE);
    }
}
