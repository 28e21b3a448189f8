//! Traces: which 4 KiB pages a restored machine touches, in coarse order of first touch. The VMM records one, the pack
//! carries it, [`crate::prefetch`] turns it into chunks to fetch ahead.
//!
//! Layout: magic `FKTR`, version u16, then a postcard document of regions whose page runs are stored as (signed distance
//! from the end of the run before, length), so that neighbours cost two bytes.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::format::{MAX_FILE_SIZE, is_plain_name};

/// Bytes in a page of a trace.
pub const PAGE_SIZE: u64 = 4096;
/// Largest encoded trace accepted, in bytes.
pub const MAX_TRACE_LEN: u64 = 4 << 20;
/// Most regions in a trace.
pub const MAX_REGIONS: usize = 16;
/// Most buckets in a region.
pub const MAX_BUCKETS: usize = 16;

/// What is touched first in each of the buckets that the VMM records.
const BUCKETS: [&str; 3] = ["before the first instruction", "until ready", "until answered"];

const MAGIC: [u8; 4] = *b"FKTR";
const VERSION: u16 = 1;
const MAX_PAGES: u64 = MAX_FILE_SIZE / PAGE_SIZE;

/// The first touches of one restored machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// One entry for every lazily filled file.
    pub regions: Vec<RegionTrace>,
}

/// The first touches within one file of the pack.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegionTrace {
    /// Name of the file, e.g. `memory.bin`.
    pub file: String,
    /// Pages by phase: 0 = before the first instruction, 1 = until ready, 2 = until answered.
    pub buckets: Vec<Vec<PageRun>>,
}

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Number of the first page, counted from the start of the file.
    pub first_page: u32,
    /// How many pages.
    pub pages: u32,
}

/// Why a trace cannot be written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// More than [`MAX_TRACE_LEN`] bytes.
    #[error("the trace has {len} bytes, at most {MAX_TRACE_LEN} are read")]
    TooLong {
        /// Its length.
        len: u64,
    },
    /// The magic is missing.
    #[error("this is not a trace")]
    Magic,
    /// A layout this version does not know.
    #[error("the trace has layout {found}, this forkd reads {VERSION}")]
    Version {
        /// The layout it has.
        found: u16,
    },
    /// The body is malformed or truncated.
    #[error("the trace is malformed")]
    Malformed(#[source] postcard::Error),
    /// A name, count or page number outside the limits.
    #[error("the trace is out of bounds: {what}")]
    Bounds {
        /// Which limit.
        what: &'static str,
    },
}

/// As stored: a region's name and its buckets of (distance, length).
#[derive(Serialize, Deserialize)]
struct StoredRegion(String, Vec<Vec<(i64, u32)>>);

impl PageRun {
    /// Joins page numbers in any order into ascending runs without overlap.
    pub fn from_pages(pages: impl IntoIterator<Item = u32>) -> Vec<Self> {
        let mut pages: Vec<u32> = pages.into_iter().collect();
        pages.sort_unstable();
        pages.dedup();
        let mut runs: Vec<Self> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(run) if run.first_page + run.pages == page => run.pages += 1,
                _ => runs.push(Self { first_page: page, pages: 1 }),
            }
        }
        runs
    }

    fn end(&self) -> u64 {
        u64::from(self.first_page) + u64::from(self.pages)
    }
}

impl Trace {
    /// The trace as bytes for a pack's `trace` member. Fails when it exceeds what [`Trace::decode`] accepts.
    pub fn encode(&self) -> Result<Vec<u8>, TraceError> {
        self.check()?;
        let stored: Vec<StoredRegion> = self.regions.iter().map(StoredRegion::from_region).collect();
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        let out = postcard::to_extend(&stored, out).map_err(TraceError::Malformed)?;
        match out.len() as u64 {
            len if len > MAX_TRACE_LEN => Err(TraceError::TooLong { len }),
            _ => Ok(out),
        }
    }

    /// Reads what [`Trace::encode`] wrote. Safe on hostile input: memory stays below 48 times the length of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, TraceError> {
        if bytes.len() as u64 > MAX_TRACE_LEN {
            return Err(TraceError::TooLong { len: bytes.len() as u64 });
        }
        let body = bytes.strip_prefix(&MAGIC).ok_or(TraceError::Magic)?;
        let (version, body) = body.split_first_chunk::<2>().ok_or(TraceError::Magic)?;
        match u16::from_le_bytes(*version) {
            VERSION => {}
            found => return Err(TraceError::Version { found }),
        }
        let stored: Vec<StoredRegion> = postcard::from_bytes(body).map_err(TraceError::Malformed)?;
        let regions = stored.into_iter().map(StoredRegion::into_region).collect::<Result<_, _>>()?;
        let trace = Self { regions };
        trace.check()?;
        Ok(trace)
    }

    /// The region of the file `name`.
    pub fn region(&self, name: &str) -> Option<&RegionTrace> {
        self.regions.iter().find(|region| region.file == name)
    }

    /// Number of pages in the trace; a page counts once for each bucket that names it.
    pub fn page_count(&self) -> u64 {
        let runs = self.regions.iter().flat_map(|region| region.buckets.iter().flatten());
        runs.map(|run| u64::from(run.pages)).sum()
    }

    /// Every page, as the position of its region and its number: bucket by bucket, region by region, run by run. A pack's
    /// `hotset` holds the pages themselves in this order. Check [`Trace::page_count`] before iterating over a stranger's.
    pub fn pages(&self) -> impl Iterator<Item = (usize, u32)> {
        let buckets = self.regions.iter().map(|region| region.buckets.len()).max().unwrap_or(0);
        let runs = (0..buckets).flat_map(|bucket| {
            let of_bucket =
                move |region: &'_ RegionTrace| region.buckets.get(bucket).cloned().unwrap_or_default();
            self.regions
                .iter()
                .enumerate()
                .flat_map(move |(at, region)| of_bucket(region).into_iter().map(move |run| (at, run)))
        });
        runs.flat_map(|(at, run)| (run.first_page..run.first_page + run.pages).map(move |page| (at, page)))
    }

    fn check(&self) -> Result<(), TraceError> {
        let bounds = |ok: bool, what| if ok { Ok(()) } else { Err(TraceError::Bounds { what }) };
        bounds(self.regions.len() <= MAX_REGIONS, "number of regions")?;
        for region in &self.regions {
            bounds(is_plain_name(&region.file), "file name")?;
            bounds(region.buckets.len() <= MAX_BUCKETS, "number of buckets")?;
            let runs = || region.buckets.iter().flatten();
            bounds(runs().all(|run| run.pages > 0 && run.end() <= MAX_PAGES), "page number")?;
        }
        Ok(())
    }
}

/// What a bucket is called; those that a stranger adds have numbers only.
pub fn bucket_name(bucket: usize) -> String {
    BUCKETS.get(bucket).map_or_else(|| format!("bucket {bucket}"), |name| (*name).to_owned())
}

impl RegionTrace {
    /// The pages of some buckets as ascending ranges that neither touch nor overlap: a hostile trace may name the same
    /// pages a million times.
    pub fn page_ranges(&self, buckets: Range<usize>) -> Vec<Range<u32>> {
        let end = buckets.end.min(self.buckets.len());
        let runs = self.buckets[buckets.start.min(end)..end].iter().flatten();
        // Page numbers are at most MAX_PAGES.
        let mut ranges: Vec<_> = runs.map(|run| run.first_page..run.first_page + run.pages).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u32>> = Vec::new();
        for range in ranges {
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        joined
    }
}

impl StoredRegion {
    fn from_region(region: &RegionTrace) -> Self {
        let pack = |runs: &Vec<PageRun>| {
            let mut end = 0i64;
            let distance = |run: &PageRun| {
                let distance = i64::from(run.first_page) - end;
                end = run.end() as i64;
                (distance, run.pages)
            };
            runs.iter().map(distance).collect()
        };
        Self(region.file.clone(), region.buckets.iter().map(pack).collect())
    }

    fn into_region(self) -> Result<RegionTrace, TraceError> {
        let unpack = |runs: Vec<(i64, u32)>| {
            let mut end = 0i64;
            let run = |(distance, pages): (i64, u32)| {
                let first = end.checked_add(distance).and_then(|first| u32::try_from(first).ok());
                let first_page = first.ok_or(TraceError::Bounds { what: "page number" })?;
                let run = PageRun { first_page, pages };
                end = run.end() as i64;
                Ok(run)
            };
            runs.into_iter().map(run).collect::<Result<Vec<_>, _>>()
        };
        let buckets = self.1.into_iter().map(unpack).collect::<Result<_, _>>()?;
        Ok(RegionTrace { file: self.0, buckets })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs() -> impl Strategy<Value = Vec<PageRun>> {
        let run =
            (0u32..1 << 27, 1u32..1 << 20).prop_map(|(first_page, pages)| PageRun { first_page, pages });
        proptest::collection::vec(run, 0..50)
    }

    fn traces() -> impl Strategy<Value = Trace> {
        let region = ("[a-z][a-z.]{0,20}", proptest::collection::vec(runs(), 0..4))
            .prop_map(|(file, buckets)| RegionTrace { file, buckets });
        proptest::collection::vec(region, 0..4).prop_map(|regions| Trace { regions })
    }

    proptest! {
        #[test]
        fn round_trips(trace in traces()) {
            prop_assert_eq!(Trace::decode(&trace.encode().unwrap()), Ok(trace));
        }

        #[test]
        fn damage_never_panics(trace in traces(), cut in any::<prop::sample::Index>(), flip in any::<(prop::sample::Index, u8)>()) {
            let mut bytes = trace.encode().unwrap();
            let _ = Trace::decode(&bytes[..cut.index(bytes.len())]);
            let at = flip.0.index(bytes.len());
            bytes[at] ^= flip.1;
            let _ = Trace::decode(&bytes);
        }

        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Trace::decode(&noise);
            let _ = Trace::decode(&[&MAGIC[..], &VERSION.to_le_bytes(), &noise].concat());
        }
    }

    #[test]
    fn pages_become_runs() {
        let runs = PageRun::from_pages([9, 3, 2, 3, 4, 11]);
        let expect = [(2, 3), (9, 1), (11, 1)].map(|(first_page, pages)| PageRun { first_page, pages });
        assert_eq!(runs, expect);
        assert!(PageRun::from_pages([]).is_empty());
    }

    #[test]
    fn pages_of_buckets_are_joined() {
        let run = |first_page, pages| PageRun { first_page, pages };
        let buckets = vec![vec![run(7, 2), run(1, 3)], vec![run(2, 5), run(8, 1)], vec![run(20, 1)]];
        let region = RegionTrace { file: "m".into(), buckets };
        assert_eq!(region.page_ranges(0..1), [1..4, 7..9]);
        assert_eq!(region.page_ranges(0..2), vec![1..9]);
        assert_eq!(region.page_ranges(1..99), [2..7, 8..9, 20..21]);
        assert!(region.page_ranges(3..9).is_empty() && region.page_ranges(0..0).is_empty());
    }

    #[test]
    fn neighbours_are_cheap() {
        let buckets = vec![PageRun::from_pages((0..20_000).map(|n| n * 3))];
        let trace = Trace { regions: vec![RegionTrace { file: "memory.bin".into(), buckets }] };
        assert!(trace.encode().unwrap().len() < 41_000);
    }

    #[test]
    fn limits_are_named() {
        let one = |file: &str, run| Trace {
            regions: vec![RegionTrace { file: file.into(), buckets: vec![vec![run]] }],
        };
        let run = PageRun { first_page: 0, pages: 1 };
        assert_eq!(one("../x", run).encode(), Err(TraceError::Bounds { what: "file name" }));
        let beyond = PageRun { first_page: u32::MAX, pages: u32::MAX };
        assert_eq!(one("m", beyond).encode(), Err(TraceError::Bounds { what: "page number" }));
        assert_eq!(Trace::decode(b""), Err(TraceError::Magic));
        assert_eq!(Trace::decode(b"FKTR\x09\0"), Err(TraceError::Version { found: 9 }));
        let claims_2_pow_28_regions = b"FKTR\x01\0\xff\xff\xff\x7f";
        assert!(matches!(Trace::decode(claims_2_pow_28_regions), Err(TraceError::Malformed(_))));
    }
}
