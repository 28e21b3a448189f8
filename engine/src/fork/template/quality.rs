//! How good a pack's trace was for a fork: which faults it has not spared, and what of the pages fetched ahead was of any
//! use.

use crate::fork::pagemap::{self, PAGE, PageState, Pagemap};
use forkd_fs::trace::Trace;
use forkd_vmm::memory::ImageId;
use forkd_vmm::pager::Pager;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Children that are looked at: looking at each takes a millisecond or two.
const CHILDREN_MAX: usize = 8;

/// Faults that machines had to wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FaultFigures {
    /// Faults on pages that were not there. A machine that is woken for another page of a chunk may fault again.
    pub demand: u64,
    /// Those on a page that the trace names: it came too late.
    pub on_traced_pages: u64,
    /// Those in a chunk with any page that the trace names.
    pub in_traced_chunks: u64,
}

/// Pages fetched ahead of need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefetchFigures {
    /// How many.
    pub pages: u64,
    /// How many of them at least one of the children has mapped; `None` when no child could be looked at. Never fewer than
    /// were touched: the kernel maps pages around a touched one as well.
    pub touched: Option<u64>,
    /// Children that were looked at.
    pub children: usize,
}

/// Counts faults by what the trace says of their pages.
#[derive(Debug, Default)]
pub(super) struct FaultCounts {
    /// Pages of the trace in each image, as ascending ranges.
    traced: Vec<Vec<Range<u32>>>,
    chunk_pages: u64,
    demand: AtomicU64,
    on_traced_pages: AtomicU64,
    in_traced_chunks: AtomicU64,
}

impl FaultCounts {
    /// For images in the order of `files`, which name them in the trace.
    pub(super) fn new(trace: &Trace, files: &[&str], chunk_bytes: u64) -> FaultCounts {
        let ranges = |file: &&str| {
            trace.region(file).map_or_else(Vec::new, |region| region.page_ranges(0..usize::MAX))
        };
        let traced = files.iter().map(ranges).collect();
        FaultCounts { traced, chunk_pages: (chunk_bytes / PAGE).max(1), ..FaultCounts::default() }
    }

    /// A machine waits for the page at `offset`.
    pub(super) fn count(&self, image: ImageId, offset: u64) {
        self.demand.fetch_add(1, Ordering::Relaxed);
        let page = offset / PAGE;
        let first = page / self.chunk_pages * self.chunk_pages;
        if self.is_traced(image, page..page + 1) {
            self.on_traced_pages.fetch_add(1, Ordering::Relaxed);
        }
        if self.is_traced(image, first..first + self.chunk_pages) {
            self.in_traced_chunks.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn figures(&self) -> FaultFigures {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        FaultFigures {
            demand: load(&self.demand),
            on_traced_pages: load(&self.on_traced_pages),
            in_traced_chunks: load(&self.in_traced_chunks),
        }
    }

    /// Whether the trace names any of `pages`.
    fn is_traced(&self, image: ImageId, pages: Range<u64>) -> bool {
        let Some(ranges) = self.traced.get(image.index()) else { return false };
        let next = ranges.partition_point(|range| u64::from(range.end) <= pages.start);
        ranges.get(next).is_some_and(|range| u64::from(range.start) < pages.end)
    }
}

/// How many of `pages` the processes `pids` have mapped between them.
pub(super) fn measure(pager: &Pager, pages: &[(ImageId, u32)], pids: &[i32]) -> PrefetchFigures {
    // A hostile trace may name a page often.
    let mut pages: Vec<_> = pages.to_vec();
    pages.sort_unstable_by_key(|(image, page)| (image.index(), *page));
    pages.dedup();
    let mut touched = BTreeSet::new();
    let mut children = 0;
    for pid in pids.iter().take(CHILDREN_MAX) {
        match note_mapped(pager, &pages, *pid, &mut touched) {
            Ok(()) => children += 1,
            // It has just ended, or is not ours to look at.
            Err(error) => tracing::debug!(pid, %error, "a child's pages cannot be looked at"),
        }
    }
    let touched = (children > 0).then_some(touched.len() as u64);
    PrefetchFigures { pages: pages.len() as u64, touched, children }
}

fn note_mapped(
    pager: &Pager,
    pages: &[(ImageId, u32)],
    pid: i32,
    touched: &mut BTreeSet<(usize, u64)>,
) -> io::Result<()> {
    let (mappings, pagemap) = (pagemap::mapped_files(pid)?, Pagemap::open(pid)?);
    for of_image in pages.chunk_by(|a, b| a.0 == b.0) {
        let image = of_image[0].0;
        let Some(file) = pager.image_file(image) else { continue };
        let inode = rustix::fs::fstat(file)?.st_ino;
        let is_image = |path: &str| path.starts_with("/memfd:forkd-");
        let own = mappings.iter().find(|mapping| mapping.inode == inode && is_image(&mapping.path));
        let Some(base) = own.and_then(|mapping| mapping.base()) else { continue };
        for run in of_image.chunk_by(|a, b| a.1 + 1 == b.1) {
            let first = u64::from(run[0].1);
            pagemap.visit(base, first..first + run.len() as u64, |page, state| {
                if !matches!(state, PageState::Absent | PageState::Zero) {
                    touched.insert((image.index(), page));
                }
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_fs::trace::{PageRun, RegionTrace};

    #[test]
    fn faults_are_told_apart_by_the_trace() {
        let buckets = vec![PageRun::from_pages([3, 4, 70]), PageRun::from_pages([5])];
        let trace = Trace { regions: vec![RegionTrace { file: "memory.bin".to_owned(), buckets }] };
        let counts = FaultCounts::new(&trace, &["memory.bin", "rootfs.erofs"], 64 * PAGE);
        for page in [5, 6, 63, 64, 70, 128, 1 << 30] {
            counts.count(ImageId::Ram, page * PAGE + 17);
        }
        counts.count(ImageId::RootDisk, 3 * PAGE);
        let expected = FaultFigures { demand: 8, on_traced_pages: 2, in_traced_chunks: 5 };
        assert_eq!(counts.figures(), expected);
        let without = FaultCounts::new(&Trace::default(), &["memory.bin"], 0);
        without.count(ImageId::Ram, 0);
        without.count(ImageId::RootDisk, u64::MAX);
        assert_eq!(without.figures(), FaultFigures { demand: 2, ..FaultFigures::default() });
    }
}
