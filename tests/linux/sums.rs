//! What a child's worker has in its memory, page by page, and what a fork's images hold.

use rustix::fs::{SeekFrom, seek};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Evaluated by the worker; its own comment says what it does. Of larger mappings (BLAS, arenas that are hardly used) even asking what is in place takes seconds.
pub const PAGES: &str = concat!("MOST = 8 << 20\n", include_str!("pages.py"));
/// The sum of a page of zeros, as `pages.py` cuts it.
const ZERO: u16 = 0x0011;
const PAGE: usize = 4096;
const PIECE: u64 = 256 << 10;

/// Page number -> sum.
type Sums = BTreeMap<u64, u16>;

/// The answer of [`PAGES`].
pub struct Pages {
    text: Sums,
    data: Sums,
}

impl Pages {
    /// Reads the answer.
    pub fn parse(answer: &str) -> Pages {
        let sums = |line: &str| -> Sums {
            let run = |run: &str| {
                let (first, sums) = run.split_once(':').expect("page:sums");
                let (first, sums) = (u64::from_str_radix(first, 16).unwrap(), sums.to_owned());
                let sum = move |at| u16::from_str_radix(&sums[at * 4..at * 4 + 4], 16).unwrap();
                (0..(run.len() - run.find(':').unwrap()) / 4).map(move |at| (first + at as u64, sum(at)))
            };
            line.split(',').flat_map(run).collect()
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
        let mut there = extents(&image);
        if whole {
            there.extend(extents(&original));
        }
        for piece in there {
            let (mut ours, mut theirs) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
            let at = piece * PIECE;
            // The image may be longer than the file; it is zero there.
            let (_, _) = (image.read_at(&mut ours, at).unwrap(), original.read_at(&mut theirs, at).unwrap());
            let pages = ours.chunks(PAGE).zip(theirs.chunks(PAGE)).enumerate();
            for (page, _) in pages.filter(|(_, (ours, theirs))| ours != theirs) {
                let offset = at + (page * PAGE) as u64;
                if whole || is_there(&image, offset) {
                    wrong.push((file.to_owned(), offset));
                }
            }
        }
    }
    assert_eq!(seen, 2, "the images of {supervisor}");
    wrong
}

/// Numbers of the pieces of a file that have anything.
fn extents(file: &File) -> BTreeSet<u64> {
    let (mut pieces, mut at) = (BTreeSet::new(), 0);
    while let Ok(data) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(data)).unwrap();
        pieces.extend(data / PIECE..at.div_ceil(PIECE));
    }
    pieces
}

fn is_there(file: &File, offset: u64) -> bool {
    seek(file, SeekFrom::Data(offset)).is_ok_and(|data| data == offset)
}
