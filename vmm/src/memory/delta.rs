//! What a machine's RAM has that its image has not: pages in a file of their own, at the same offsets, and the ranges
//! that count. A branch maps them over the image; what they do not cover it shares with everybody who maps the image.
//!
//! ```text
//! 0              RAM, only the ranges stored
//! bytes of RAM   start and end of each range, u64, little-endian
//! ```
//! The file is in memory, or on disk as a part of a snapshot: then it ends with the table.

use super::{Mapping, MemoryError, PAGE_BYTES, Sharing, add_run, create_image};
use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Most ranges: each is a mapping of the branch, of which a process may have 65530 (`vm.max_map_count`).
pub const DELTA_RUNS_MAX: usize = 60_000;
/// Bytes of a range in the table.
const RUN_BYTES: usize = 16;
/// Most bytes that are copied at once.
const PIECE: usize = 1 << 20;

/// See the module's description. Nobody changes it any more.
#[derive(Debug)]
pub struct Delta {
    file: OwnedFd,
    runs: Vec<Range<u64>>,
}

impl Delta {
    /// As its owner sent it: a file for RAM of `ram_bytes` with a table of `runs` ranges.
    pub fn from_file(file: OwnedFd, ram_bytes: u64, runs: usize) -> Result<Delta, MemoryError> {
        let mut table = vec![0; runs.min(DELTA_RUNS_MAX) * RUN_BYTES];
        let read = rustix::io::pread(&file, &mut table, ram_bytes).map_err(MemoryError::ReadDelta)?;
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let runs: Vec<_> =
            table[..read].chunks_exact(RUN_BYTES).map(|run| word(&run[..8])..word(&run[8..])).collect();
        let fits = |run: &Range<u64>| {
            run.start < run.end && run.end <= ram_bytes && (run.start | run.end).is_multiple_of(PAGE_BYTES)
        };
        let sorted = runs.windows(2).all(|pair| pair[0].end < pair[1].start);
        if read == table.len() && runs.iter().all(fits) && sorted {
            Ok(Delta { file, runs })
        } else {
            Err(MemoryError::Delta)
        }
    }

    /// As [`Delta::write_to`] has written it for RAM of `ram_bytes`.
    pub fn open(file: OwnedFd, ram_bytes: u64) -> Result<Delta, MemoryError> {
        let length = rustix::fs::fstat(&file).map_err(MemoryError::ReadDelta)?.st_size as u64;
        let table = length.checked_sub(ram_bytes).ok_or(MemoryError::Delta)?;
        let runs = usize::try_from(table / RUN_BYTES as u64).map_err(|_| MemoryError::Delta)?;
        match runs <= DELTA_RUNS_MAX && table.is_multiple_of(RUN_BYTES as u64) {
            true => Delta::from_file(file, ram_bytes, runs),
            false => Err(MemoryError::Delta),
        }
    }

    /// Writes what its ranges hold to the same places of a file. `written` hears of the bytes of each part.
    pub fn copy_to(&self, file: &File, written: &dyn Fn(u64)) -> io::Result<()> {
        let mut buffer = vec![0; PIECE];
        for run in &self.runs {
            let mut at = run.start;
            while at < run.end {
                let piece = &mut buffer[..(run.end - at).min(PIECE as u64) as usize];
                let read = rustix::io::pread(&self.file, &mut *piece, at)?;
                if read == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                file.write_all_at(&piece[..read], at)?;
                at += read as u64;
                written(read as u64);
            }
        }
        Ok(())
    }

    /// Writes it into an empty file, in which everything else is a hole. `written` hears of the bytes of each part.
    pub fn write_to(&self, file: &File, ram_bytes: u64, written: &dyn Fn(u64)) -> io::Result<()> {
        self.copy_to(file, written)?;
        // Also where there are no ranges: the length tells how many there are.
        file.set_len(ram_bytes)?;
        file.write_all_at(&table_of(&self.runs), ram_bytes)
    }

    /// The same ranges in a file in memory.
    pub fn to_memory(&self, ram_bytes: u64) -> Result<Delta, MemoryError> {
        DeltaDraft::new(ram_bytes, Some(self))?.finish(Vec::new())
    }

    /// Maps its ranges over those of a private mapping of the image, so that writes stay in that mapping.
    pub fn overlay(&self, ram: &Mapping) -> Result<(), MemoryError> {
        ram.overlay(Some(self.file()), &self.runs)
    }

    /// The file, to be handed to a branch.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The ranges that count, sorted.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// Bytes in them.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }
}

/// A delta that is being made.
#[derive(Debug)]
pub struct DeltaDraft<'a> {
    file: OwnedFd,
    ram: Mapping,
    base: Option<&'a Delta>,
    copied: Vec<Range<u64>>,
}

impl<'a> DeltaDraft<'a> {
    /// For a machine with so much RAM, which was itself started with `base`.
    pub fn new(ram_bytes: u64, base: Option<&'a Delta>) -> Result<DeltaDraft<'a>, MemoryError> {
        let table = (DELTA_RUNS_MAX * RUN_BYTES) as u64;
        let file = create_image("forkd-delta", ram_bytes + table)?;
        let ram = Mapping::of_file(&file, ram_bytes, Sharing::Shared)?;
        for (base, run) in base.iter().flat_map(|base| base.runs.iter().map(move |run| (base, run))) {
            copy_run(base.file(), &file, run)?;
        }
        Ok(DeltaDraft { file, ram, base, copied: Vec::new() })
    }

    /// Has memory ready for ranges that will probably be copied.
    pub fn prepare(&self, runs: &[Range<u64>]) {
        for run in runs {
            // What is not ready is made ready when it is written to.
            let bytes = run.end - run.start;
            let _ = rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, run.start, bytes);
        }
    }

    /// Copies ranges of the RAM that the process `pid` has mapped at `address`, again if they were copied before.
    pub fn copy(&mut self, pid: i32, address: u64, runs: &[Range<u64>]) -> Result<(), MemoryError> {
        sys::read_memory(pid, address, &self.ram, runs).map_err(MemoryError::ReadMachine)?;
        self.copied.extend_from_slice(runs);
        Ok(())
    }

    /// The delta of a machine whose own pages are `own`, all of which were copied. What was copied besides it has given
    /// back since.
    pub fn finish(self, own: Vec<Range<u64>>) -> Result<Delta, MemoryError> {
        let DeltaDraft { file, ram, base, copied } = self;
        let mut runs = own;
        if let Some(base) = base {
            // There the image's place is the base's again.
            for run in intersection(&subtraction(&union(copied), &runs), &base.runs) {
                copy_run(base.file(), &file, &run)?;
            }
            runs.extend_from_slice(&base.runs);
        }
        let runs = union(runs);
        if runs.len() > DELTA_RUNS_MAX {
            return Err(MemoryError::Scattered { runs: runs.len() });
        }
        let table = table_of(&runs);
        let bytes = ram.bytes();
        drop(ram);
        let written = rustix::io::pwrite(&file, &table, bytes).map_err(MemoryError::ReadDelta)?;
        if written < table.len() { Err(MemoryError::Delta) } else { Ok(Delta { file, runs }) }
    }
}

fn table_of(runs: &[Range<u64>]) -> Vec<u8> {
    runs.iter().flat_map(|run| [run.start.to_le_bytes(), run.end.to_le_bytes()].concat()).collect()
}

/// Ranges in any order as sorted ones that do not touch.
fn union(mut runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    runs.sort_by_key(|run| run.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(runs.len());
    for run in runs {
        add_run(&mut joined, run);
    }
    joined
}

/// What of sorted ranges is not in other sorted ranges.
fn subtraction(of: &[Range<u64>], other: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut left, mut others) = (Vec::new(), other.iter().peekable());
    for run in of {
        let mut start = run.start;
        while let Some(cut) = others.peek().filter(|cut| cut.start < run.end) {
            if start < cut.start {
                left.push(start..cut.start);
            }
            start = start.max(cut.end);
            if cut.end > run.end {
                // It may cut the next one, too.
                break;
            }
            others.next();
        }
        if start < run.end {
            left.push(start..run.end);
        }
    }
    left
}

/// What sorted ranges have in common.
fn intersection(some: &[Range<u64>], other: &[Range<u64>]) -> Vec<Range<u64>> {
    subtraction(some, &subtraction(some, other))
}

fn copy_run(from: BorrowedFd<'_>, to: &OwnedFd, run: &Range<u64>) -> Result<(), MemoryError> {
    let mut buffer = vec![0; (run.end - run.start).min(PIECE as u64) as usize];
    let mut at = run.start;
    while at < run.end {
        let length = (run.end - at).min(buffer.len() as u64) as usize;
        let read = rustix::io::pread(from, &mut buffer[..length], at).map_err(MemoryError::ReadDelta)?;
        let written = rustix::io::pwrite(to, &buffer[..read], at).map_err(MemoryError::ReadDelta)?;
        if written == 0 {
            return Err(MemoryError::Delta);
        }
        at += written as u64;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one range is meant")]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_BYTES;

    fn first_bytes(mapping: &Mapping) -> Vec<u8> {
        let mut pages = Vec::new();
        for page in 0..mapping.bytes() / PAGE {
            let file = std::fs::File::open("/proc/self/mem").unwrap();
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, mapping.address() + page * PAGE)
                .unwrap();
            pages.push(byte[0]);
        }
        pages
    }

    fn image(bytes: &[u8]) -> OwnedFd {
        let image = create_image("test", bytes.len() as u64 * PAGE).unwrap();
        for (page, byte) in (0..).zip(bytes) {
            rustix::io::pwrite(&image, &[*byte; PAGE as usize], page * PAGE).unwrap();
        }
        image
    }

    fn write(mapping: &Mapping, page: u64, byte: u8) {
        let file = std::fs::OpenOptions::new().write(true).open("/proc/self/mem").unwrap();
        let at = mapping.range(page * PAGE, PAGE);
        std::os::unix::fs::FileExt::write_all_at(&file, &[byte; PAGE as usize], at).unwrap();
    }

    #[test]
    fn a_branch_has_what_its_parent_had_and_a_branch_of_it_too() {
        let image = image(&[1, 2, 3, 4, 5, 6]);
        let map = || Mapping::of_file(&image, 6 * PAGE, Sharing::Private).unwrap();
        let pid = std::process::id() as i32;
        let parent = map();
        write(&parent, 1, 20);
        write(&parent, 2, 30);
        write(&parent, 4, 50);
        let mut draft = DeltaDraft::new(6 * PAGE, None).unwrap();
        let runs = [PAGE..3 * PAGE, 4 * PAGE..5 * PAGE];
        draft.prepare(&runs);
        draft.copy(pid, parent.address(), &runs).unwrap();
        let delta = draft.finish(runs.to_vec()).unwrap();
        assert_eq!((delta.runs(), delta.bytes()), (&runs[..], 3 * PAGE));
        write(&parent, 1, 99);

        let branch = map();
        let sent = delta.file().try_clone_to_owned().unwrap();
        Delta::from_file(sent, 6 * PAGE, 2).unwrap().overlay(&branch).unwrap();
        assert_eq!(first_bytes(&branch), [1, 20, 30, 4, 50, 6]);
        write(&branch, 2, 31);
        write(&branch, 3, 41);
        let mut draft = DeltaDraft::new(6 * PAGE, Some(&delta)).unwrap();
        let own = vec![2 * PAGE..4 * PAGE];
        draft.copy(pid, branch.address(), &own).unwrap();
        let second = draft.finish(own).unwrap();
        assert_eq!(second.runs(), [PAGE..5 * PAGE]);
        let grandchild = map();
        second.overlay(&grandchild).unwrap();
        assert_eq!(first_bytes(&grandchild), [1, 20, 31, 41, 50, 6]);
        assert_eq!(first_bytes(&branch), [1, 20, 31, 41, 50, 6]);
        write(&grandchild, 4, 51);
        let other = map();
        second.overlay(&other).unwrap();
        assert_eq!(
            first_bytes(&other),
            [1, 20, 31, 41, 50, 6],
            "a branch has written into what its siblings share"
        );
    }

    #[test]
    fn a_table_that_does_not_fit_is_refused() {
        let file = |runs: &[u64]| {
            let file = create_image("test", 4 * PAGE + 64).unwrap();
            let table: Vec<u8> = runs.iter().flat_map(|word| word.to_le_bytes()).collect();
            rustix::io::pwrite(&file, &table, 4 * PAGE).unwrap();
            file
        };
        let twice = file(&[2 * PAGE, 3 * PAGE, 0, PAGE]);
        assert!(matches!(Delta::from_file(twice, 4 * PAGE, 2), Err(MemoryError::Delta)), "not sorted");
        for runs in [[0, 5 * PAGE], [PAGE, PAGE], [2 * PAGE, PAGE], [1, PAGE], [u64::MAX - 4095, 0]] {
            assert!(
                matches!(Delta::from_file(file(&runs), 4 * PAGE, 1), Err(MemoryError::Delta)),
                "{runs:?}"
            );
        }
        assert!(Delta::from_file(file(&[0, PAGE]), 4 * PAGE, 1).is_ok());
        assert!(matches!(Delta::from_file(file(&[]), 4 * PAGE, usize::MAX), Err(MemoryError::Delta)));
    }

    #[test]
    fn a_delta_on_disk_is_the_same_and_as_small() {
        let image = image(&[1; 64]);
        let parent = Mapping::of_file(&image, 64 * PAGE, Sharing::Private).unwrap();
        write(&parent, 40, 20);
        write(&parent, 63, 30);
        let own = vec![40 * PAGE..41 * PAGE, 63 * PAGE..64 * PAGE];
        let mut draft = DeltaDraft::new(64 * PAGE, None).unwrap();
        draft.copy(std::process::id() as i32, parent.address(), &own).unwrap();
        let delta = draft.finish(own.clone()).unwrap();
        let (file, written) = (tempfile::tempfile().unwrap(), std::cell::Cell::new(0));
        delta.write_to(&file, 64 * PAGE, &|bytes| written.set(written.get() + bytes)).unwrap();
        let stored = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        assert!(written.get() == 2 * PAGE && stored <= 4 * PAGE, "{} {stored}", written.get());
        let again = Delta::open(file.try_clone().unwrap().into(), 64 * PAGE).unwrap();
        for delta in [again.to_memory(64 * PAGE).unwrap(), again] {
            let branch = Mapping::of_file(&image, 64 * PAGE, Sharing::Private).unwrap();
            delta.overlay(&branch).unwrap();
            let bytes = first_bytes(&branch);
            assert_eq!((delta.runs(), bytes[39], bytes[40], bytes[63]), (&own[..], 1, 20, 30));
        }
        for cut in [64 * PAGE + 16, 64 * PAGE + 31, 64 * PAGE - 1] {
            file.set_len(cut).unwrap();
            let opened = Delta::open(file.try_clone().unwrap().into(), 64 * PAGE);
            assert_eq!(opened.is_ok(), cut == 64 * PAGE + 16, "{cut}");
        }
        file.set_len(64 * PAGE + 16 * (DELTA_RUNS_MAX as u64 + 1)).unwrap();
        assert!(matches!(Delta::open(file.into(), 64 * PAGE), Err(MemoryError::Delta)));
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let mut draft = DeltaDraft::new(PAGE, None).unwrap();
        assert!(draft.copy(std::process::id() as i32, 0, std::slice::from_ref(&(0..PAGE))).is_err());
        assert!(draft.copy(i32::MAX, 0, std::slice::from_ref(&(0..PAGE))).is_err());
    }

    #[test]
    fn what_was_given_back_is_the_bases_again() {
        let image = image(&[1, 2, 3, 4]);
        let map = || Mapping::of_file(&image, 4 * PAGE, Sharing::Private).unwrap();
        let (pid, first) = (std::process::id() as i32, map());
        write(&first, 1, 20);
        write(&first, 2, 30);
        let own = vec![PAGE..3 * PAGE];
        let mut draft = DeltaDraft::new(4 * PAGE, None).unwrap();
        draft.copy(pid, first.address(), &own).unwrap();
        let base = draft.finish(own).unwrap();
        let second = map();
        base.overlay(&second).unwrap();
        write(&second, 2, 31);
        write(&second, 3, 41);
        let mut draft = DeltaDraft::new(4 * PAGE, Some(&base)).unwrap();
        draft.copy(pid, second.address(), &[2 * PAGE..4 * PAGE]).unwrap();
        second.discard(2 * PAGE, 2 * PAGE).unwrap();
        assert_eq!(first_bytes(&second), [1, 20, 30, 4]);
        let third = map();
        draft.finish(Vec::new()).unwrap().overlay(&third).unwrap();
        assert_eq!(first_bytes(&third), [1, 20, 30, 4]);
    }

    proptest::proptest! {
        #[test]
        fn ranges_are_added_and_taken_away(some in ranges(), other in ranges()) {
            let pages = |runs: &[Range<u64>]| runs.iter().cloned().flatten().collect::<std::collections::BTreeSet<_>>();
            let (joined, others) = (union(some.clone()), union(other));
            proptest::prop_assert_eq!(pages(&joined), pages(&some));
            proptest::prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
            let left = pages(&subtraction(&joined, &others));
            proptest::prop_assert_eq!(left, &pages(&joined) - &pages(&others));
            let both = pages(&intersection(&joined, &others));
            proptest::prop_assert_eq!(both, &pages(&joined) & &pages(&others));
        }
    }

    fn ranges() -> impl proptest::strategy::Strategy<Value = Vec<Range<u64>>> {
        use proptest::strategy::Strategy;
        let range = (0_u64..60, 1_u64..9).prop_map(|(start, length)| start..start + length);
        proptest::collection::vec(range, 0..8)
    }
}
