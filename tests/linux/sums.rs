//! What a child's worker has in its memory, page by page, and what a fork's images hold.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Evaluated by the worker; its own comment says what it does. Mappings over 64 MiB have nothing of interest.
pub const PAGES: &str = concat!("MOST = 64 << 20\n", include_str!("pages.py"));
/// The sum of a page of zeros, as `pages.py` cuts it.
const ZERO: u32 = 0x1c_0011;
const PAGE: u64 = 4096;

/// Page number -> sum.
type Sums = BTreeMap<u64, u32>;

/// The answer of [`PAGES`].
pub struct Pages {
    text: Sums,
    data: Sums,
}

impl Pages {
    /// Reads the answer.
    pub fn parse(answer: &str) -> Pages {
        let sums = |line: &str| -> Sums {
            let page = |pair: &str| {
                let (page, sum) = pair.split_once(':').expect("page:sum");
                (u64::from_str_radix(page, 16).unwrap(), u32::from_str_radix(sum, 16).unwrap())
            };
            line.split(',').map(page).collect()
        };
        let mut lines = answer.lines();
        let mut next = || sums(lines.next().expect("two lines"));
        Pages { text: next(), data: next() }
    }

    /// Fails unless these are the pages of a sibling of `other`: the same text, and the same data but for what a child
    /// writes by itself; nowhere a page of zeros instead. Returns the numbers for people.
    pub fn assert_sibling_of(&self, other: &Pages) -> String {
        let common = |ours: &Sums, theirs: &Sums| {
            let both = ours.iter().filter_map(|(page, sum)| Some((*page, *sum, *theirs.get(page)?)));
            let both: Vec<_> = both.collect();
            assert!(
                both.len() * 10 > theirs.len() * 9,
                "{} of {} pages are in place",
                both.len(),
                theirs.len()
            );
            let zeroed = both.iter().find(|(_, ours, theirs)| *ours == ZERO && *theirs != ZERO);
            assert_eq!(zeroed, None, "a page of zeros");
            (both.len(), both.iter().filter(|(_, ours, theirs)| ours != theirs).count())
        };
        let (text, wrong) = common(&self.text, &other.text);
        assert_eq!(wrong, 0, "of {text} pages of code and constants");
        let (data, differing) = common(&self.data, &other.data);
        assert!(differing * 5 < data, "{differing} of {data} pages of data differ");
        format!("{text} pages of text all the same, {data} of data of which {differing} were written to")
    }
}

/// Offsets of pages in which the images of a running fork differ from its snapshot's files. Pages that are not there yet
/// count only when `whole`.
pub fn wrong_pages(supervisor: i64, snapshot: &Path, whole: bool) -> Vec<(String, u64)> {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for entry in fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().flatten() {
        let link = fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
        let file = match link.as_str() {
            "/memfd:forkd-Ram (deleted)" => "memory.bin",
            "/memfd:forkd-RootDisk (deleted)" => "rootfs.erofs",
            _ => continue,
        };
        seen += 1;
        let image = File::open(entry.path()).unwrap();
        let original = File::open(snapshot.join(file)).unwrap();
        for at in extents(&image, whole) {
            let (mut ours, mut theirs) = (vec![0; PAGE as usize], vec![0; PAGE as usize]);
            image.read_exact_at(&mut ours, at).unwrap();
            // The image may be longer than the file; it is zero there.
            let _ = original.read_at(&mut theirs, at).unwrap();
            if ours != theirs {
                wrong.push((file.to_owned(), at));
            }
        }
    }
    assert_eq!(seen, 2, "the images of {supervisor}");
    wrong
}

/// Offsets of the pages of a file: all, or those that are there.
fn extents(file: &File, whole: bool) -> Vec<u64> {
    use rustix::fs::{SeekFrom, seek};
    let length = file.metadata().unwrap().len();
    if whole {
        return (0..length).step_by(PAGE as usize).collect();
    }
    let (mut pages, mut at) = (Vec::new(), 0);
    while let Ok(data) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(data)).unwrap();
        pages.extend((data..at).step_by(PAGE as usize));
    }
    pages
}
