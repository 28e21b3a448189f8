//! Which frames come in one request.

use crate::index::Index;

/// A request is cut after this many bytes: 40 ms at 50 MB/s, so that several requests in parallel hide their round
/// trips, chunks arrive roughly in the order they were asked for, and a broken connection loses little.
const MAX_RUN: u64 = 2 << 20;

/// How frames are put together in requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Most bytes between two of one request.
    pub(super) max_gap: u64,
    /// Frames that end here or before are on their way already, and go into no request with others.
    pub(super) head_len: u64,
}

/// Cuts records into those that go into one request each: frames of one pack, in its order. Nothing in a delta keeps
/// two of its chunks from being the same frame of a base, which then comes twice.
pub(super) fn coalesce<T>(
    index: &Index,
    cut: Cut,
    mut items: Vec<T>,
    record: impl Fn(&T) -> u32,
) -> Vec<Vec<T>> {
    let Cut { max_gap, head_len } = cut;
    let mut runs: Vec<Vec<T>> = Vec::new();
    let (mut pack, mut start, mut end) = (0, 0, 0);
    items.sort_by_key(|item| {
        let frame = index.record_at(record(item));
        (frame.pack, frame.offset)
    });
    for item in items {
        let frame = index.record_at(record(&item));
        let frame_end = frame.offset + u64::from(frame.length);
        let is_in_head = |end| frame.pack == 0 && end <= head_len;
        match runs.last_mut() {
            Some(run)
                if frame.pack == pack
                    && frame.offset.checked_sub(end).is_some_and(|gap| gap <= max_gap)
                    && frame_end - start <= MAX_RUN
                    && is_in_head(end) == is_in_head(frame_end) =>
            {
                run.push(item)
            }
            _ => {
                (pack, start) = (frame.pack, frame.offset);
                runs.push(vec![item]);
            }
        }
        end = frame_end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::index::{BasePack, ChunkRecord, IndexPin};

    #[test]
    fn neighbours_share_a_request_within_limits() {
        const MAX_GAP: u64 = 128 << 10;
        let record = |chunk: u32, offset| ChunkRecord {
            chunk,
            length: 1000,
            pack: 0,
            offset,
            digest: Digest::of(b""),
        };
        let offsets = [0, 1000, 2000 + MAX_GAP, 3001 + 2 * MAX_GAP, 4000 + MAX_RUN, 4000 + 2 * MAX_RUN];
        let records = offsets.iter().enumerate().map(|(chunk, &at)| record(chunk as u32, at)).collect();
        let index = Index::new(64 << 10, 1 << 30, Vec::new(), vec![("m".into(), 1 << 20, records)]);
        let cut = |wanted: &[u32], head_len| {
            coalesce(&index, Cut { max_gap: MAX_GAP, head_len }, wanted.to_vec(), |&r| r)
        };
        let runs = |wanted: &[u32]| cut(wanted, 0);
        assert_eq!(runs(&[0, 1, 2, 3, 4, 5]), [vec![0, 1, 2], vec![3], vec![4], vec![5]]);
        assert_eq!(runs(&[0, 2]), [vec![0], vec![2]], "the gap counts between wanted frames");
        assert!(runs(&[]).is_empty());
        assert_eq!(cut(&[0, 1, 2], 1999), [vec![0], vec![1, 2]], "what is on its way is not asked for again");
        assert_eq!(cut(&[0, 1, 2], 2000), [vec![0, 1], vec![2]]);
    }

    #[test]
    fn frames_of_different_packs_come_in_different_requests() {
        let frames = [(0, 0), (1, 5000), (0, 1000), (1, 4000), (1, 4000), (2, 5000)];
        let record = |(chunk, &(pack, offset))| ChunkRecord {
            chunk: chunk as u32,
            length: 1000,
            pack,
            offset,
            digest: Digest::of(b""),
        };
        let records = frames.iter().enumerate().map(record).collect();
        let base = |byte: u8| {
            let index = IndexPin { offset: 1 << 20, length: 100, sha256: Digest([byte; 32]) };
            BasePack::new(index, 1 << 21, "")
        };
        let index =
            Index::new(64 << 10, 1 << 30, vec![base(1), base(2)], vec![("m".into(), 1 << 20, records)]);
        let cut = Cut { max_gap: 1000, head_len: 10_000 };
        let runs = coalesce(&index, cut, (0..6).collect(), |&r| r);
        assert_eq!(runs, [vec![0, 2], vec![3], vec![4, 1], vec![5]]);
    }
}
