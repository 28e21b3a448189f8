//! Tests of the index: round trips against a model, rules by name, and no trust in damaged bytes.

use proptest::prelude::*;

use super::*;
use crate::format::{MAX_BASES, MIN_CHUNK_SIZE};

/// Files as (size, stored chunk numbers with frame lengths), laid out with a gap before every file.
fn build(files: &[(u64, Vec<(u32, u32)>)]) -> (Index, u64) {
    let mut offset = 0;
    let mut built = Vec::new();
    for (position, (size, chunks)) in files.iter().enumerate() {
        offset += 100;
        let record = |&(chunk, length): &(u32, u32)| {
            let record =
                ChunkRecord { chunk, length, pack: 0, offset, digest: Digest::of(&chunk.to_le_bytes()) };
            offset += u64::from(length);
            record
        };
        let records: Vec<_> = chunks.iter().map(record).collect();
        built.push((format!("file{position}"), *size, records));
    }
    let records = built.iter().map(|(_, _, records)| records.len()).sum();
    let pack_size = offset + Index::encoded_len(0, built.len(), records) + 50;
    (Index::new(MIN_CHUNK_SIZE, pack_size, Vec::new(), built), pack_size)
}

/// A base whose frames end at `end`.
fn base(number: u8, end: u64, hint: &str) -> BasePack {
    let index = IndexPin { offset: end, length: 100, sha256: Digest([number; 32]) };
    BasePack { index, pack_size: end + 150, hint: hint.to_owned() }
}

/// The same index as a delta's: every chunk goes to one of the packs, anywhere in there.
fn as_delta(index: Index, packs: &[(u8, u64)], bases: Vec<BasePack>) -> (Index, u64) {
    let (count, mut at) = (bases.len() as u8, 0);
    let mut files = Vec::new();
    for (file, entry) in index.files() {
        let records = index.stored_chunks(file).map(|(_, record)| {
            let (pack, offset) = packs[at % packs.len()];
            at += 1;
            let pack = pack % (count + 1);
            let offset = if pack == 0 { record.offset } else { offset % 9000 };
            ChunkRecord { pack, offset, ..*record }
        });
        files.push((entry.name.clone(), entry.size, records.collect()));
    }
    let pack_size = index.pack_size() + (bases.len() * BASE_LEN) as u64;
    (Index::new(MIN_CHUNK_SIZE, pack_size, bases, files), pack_size)
}

fn deltas() -> impl Strategy<Value = (Index, u64)> {
    let hints = ["", "base.forkd-snapshot.tar.zst", "https://h/b?c=d", "http://127.0.0.1:1/x"];
    let bases = proptest::collection::vec(0..hints.len(), 1..=MAX_BASES);
    let packs = proptest::collection::vec((any::<u8>(), any::<u64>()), 1..20);
    (indexes(), bases, packs).prop_map(move |((index, _), bases, packs)| {
        let bases = bases.iter().enumerate().map(|(at, &hint)| base(at as u8, 10_000, hints[hint]));
        as_delta(index, &packs, bases.collect())
    })
}

fn indexes() -> impl Strategy<Value = (Index, u64)> {
    let chunk_size = u64::from(MIN_CHUNK_SIZE);
    let file = (0..40 * chunk_size).prop_flat_map(move |size| {
        let count = size.div_ceil(chunk_size) as u32;
        // A frame of any plain length may have this many bytes.
        let chunks = proptest::collection::btree_map(0..count.max(1), 1u32..60, 0..=count.min(20) as usize);
        (Just(size), chunks.prop_map(|chunks| chunks.into_iter().collect()))
    });
    proptest::collection::vec(file, 0..5).prop_map(|files| {
        let files: Vec<_> =
            files.into_iter().map(|(size, chunks)| (size, if size == 0 { vec![] } else { chunks })).collect();
        build(&files)
    })
}

proptest! {
    #[test]
    fn round_trips((index, pack_size) in indexes()) {
        let bytes = index.encode();
        prop_assert_eq!(Index::parse_trailer(&bytes[bytes.len() - TRAILER_LEN..]), Ok(bytes.len() as u64));
        prop_assert_eq!(Index::parse(&bytes, Some(pack_size)), Ok(index.clone()));
        prop_assert_eq!(Index::parse(&bytes, None), Ok(index.clone()));
        prop_assert!(Index::parse(&bytes, Some(pack_size + 1)).is_err());
    }

    #[test]
    fn deltas_round_trip((index, pack_size) in deltas()) {
        let bytes = index.encode();
        prop_assert_eq!(Index::parse_trailer(&bytes[bytes.len() - TRAILER_LEN..]), Ok(bytes.len() as u64));
        prop_assert_eq!(Index::parse(&bytes, Some(pack_size)), Ok(index.clone()));
        let held: u32 = (0..=MAX_BASES as u8).map(|pack| index.held_by(pack).0).sum();
        prop_assert_eq!(held, index.stored_chunk_count());
    }

    #[test]
    fn damage_to_a_delta_never_breaks_the_rules((index, pack_size) in deltas(), flips in proptest::collection::vec(any::<(prop::sample::Index, u8)>(), 1..6)) {
        let mut bytes = index.encode();
        for (at, flip) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
        }
        if let Ok(index) = Index::parse(&bytes, Some(pack_size)) {
            prop_assert!(index.bases().len() <= MAX_BASES);
            let mut own_end = 0;
            for (id, record) in index.files().flat_map(|(file, _)| index.stored_chunks(file)) {
                prop_assert!(index.plain_len(id) > 0);
                let end = record.offset + u64::from(record.length);
                match record.pack.checked_sub(1) {
                    None => {
                        prop_assert!(record.offset >= own_end && end <= pack_size);
                        own_end = end;
                    }
                    Some(base) => prop_assert!(end <= index.bases()[usize::from(base)].index.offset),
                }
            }
        }
    }

    #[test]
    fn truncation_is_always_noticed((index, pack_size) in indexes(), cut in any::<prop::sample::Index>()) {
        let bytes = index.encode();
        prop_assert!(Index::parse(&bytes[..cut.index(bytes.len())], Some(pack_size)).is_err());
    }

    /// Damage may go unnoticed here (the digest of the index is checked before), but what is accepted keeps the rules.
    #[test]
    fn damage_never_breaks_the_rules((index, pack_size) in indexes(), flips in proptest::collection::vec(any::<(prop::sample::Index, u8)>(), 1..6)) {
        let mut bytes = index.encode();
        for (at, flip) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
        }
        if let Ok(index) = Index::parse(&bytes, Some(pack_size)) {
            let mut end = 0;
            for (file, _) in index.files() {
                for (id, record) in index.stored_chunks(file) {
                    prop_assert!(index.plain_len(id) > 0);
                    prop_assert!(record.offset >= end && record.offset + u64::from(record.length) <= pack_size);
                    end = record.offset + u64::from(record.length);
                }
            }
        }
    }

    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Index::parse(&noise, None).is_err());
    }

    #[test]
    fn spans_cover_exactly_what_was_asked((index, _) in indexes(), offset in 0u64..3_000_000, len in 0u64..3_000_000) {
        for (file, entry) in index.files() {
            let mut at = offset;
            for span in index.spans(file, offset, len) {
                let chunk_start = u64::from(span.chunk) * u64::from(MIN_CHUNK_SIZE);
                prop_assert_eq!(chunk_start + u64::from(span.start), at);
                let id = ChunkId { file, chunk: span.chunk };
                prop_assert!(span.start + span.len <= index.plain_len(id));
                at += u64::from(span.len);
            }
            prop_assert_eq!(at, (offset + len).min(entry.size).max(offset));
        }
    }

    #[test]
    fn every_chunk_is_stored_or_zero((index, _) in indexes()) {
        for (file, _) in index.files() {
            let stats = index.stats(file);
            let zero = (0..stats.chunks).filter(|&chunk| index.is_zero(ChunkId { file, chunk })).count() as u32;
            prop_assert_eq!(zero + stats.stored_chunks, stats.chunks);
            for (id, record) in index.stored_chunks(file) {
                prop_assert_eq!(index.record(id), Some(record));
                prop_assert_eq!(index.chunk_at(index.record_number(id).unwrap()), id);
            }
        }
    }
}

/// Parses a one-file index after `damage` to its bytes.
fn refused(damage: impl Fn(&mut Vec<u8>)) -> IndexError {
    let (index, pack_size) = build(&[(200_000, vec![(0, 50), (1, 50), (3, 50)])]);
    let mut bytes = index.encode();
    damage(&mut bytes);
    Index::parse(&bytes, Some(pack_size)).expect_err("damage to be noticed")
}

const FILES: usize = FRAME_HEADER_LEN + HEADER_LEN;
const RECORDS: usize = FILES + FILE_LEN;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn each_rule_has_its_name() {
    fn record(at: usize, value: &[u8]) -> IndexError {
        refused(|b| put(b, RECORDS + RECORD_LEN + at, value))
    }
    let of_record = |what| IndexError::Record { position: 1, what };
    assert_eq!(record(0, &9u32.to_le_bytes()), of_record("chunk past the end of its file"));
    assert_eq!(record(0, &0u32.to_le_bytes()), of_record("chunks out of order"));
    assert_eq!(record(4, &0u32.to_le_bytes()), of_record("frame length"));
    assert_eq!(record(4, &70_000u32.to_le_bytes()), of_record("frame length"));
    assert_eq!(record(8, &120u64.to_le_bytes()), of_record("frame overlaps the one before"));
    assert_eq!(record(8, &u64::MAX.to_le_bytes()), of_record("frame outside the pack"));
    assert_eq!(
        record(8, &400u64.to_le_bytes()),
        of_record("frame outside the pack"),
        "inside the index itself"
    );

    fn file(at: usize, value: &[u8]) -> IndexError {
        refused(|b| put(b, FILES + at, value))
    }
    let of_file = |what| IndexError::File { position: 0, what };
    assert_eq!(file(0, b"../x"), of_file("name"));
    assert_eq!(file(0, b"a\0b"), of_file("name"));
    assert_eq!(file(64, &(MAX_FILE_SIZE + 1).to_le_bytes()), of_file("size"));
    assert_eq!(file(64, &u64::MAX.to_le_bytes()), of_file("size"));
    assert_eq!(file(72, &1u32.to_le_bytes()), of_file("records"));
    assert_eq!(file(76, &u32::MAX.to_le_bytes()), malformed("records without a file"));

    assert_eq!(refused(|b| put(b, 8 + 20, &u32::MAX.to_le_bytes())), malformed("table lengths"));
    assert_eq!(refused(|b| put(b, 8 + 24, &u32::MAX.to_le_bytes())), malformed("table lengths"));
    assert_eq!(refused(|b| put(b, 8 + 16, &3u32.to_le_bytes())), malformed("chunk size"));
    assert_eq!(
        refused(|b| put(b, 8 + 12, &2u32.to_le_bytes())),
        IndexError::Unsupported { version: 3, flags: 2 }
    );
    assert_eq!(refused(|b| put(b, 8 + 12, &1u32.to_le_bytes())), IndexError::Bases { count: 0 });
    assert_eq!(record(7, &[1]), of_record("frame in a base that is not named"));
    assert_eq!(refused(|b| b.push(0)), malformed("frame length"));
}

/// Parses a delta's index after `damage` to its bytes: one chunk of its own, then one of each of two bases.
fn refused_delta(damage: impl Fn(&mut Vec<u8>)) -> IndexError {
    let (index, _) = build(&[(200_000, vec![(0, 50), (1, 50), (3, 50)])]);
    let bases = vec![base(1, 10_000, "name"), base(2, 10_000, "")];
    let (index, pack_size) = as_delta(index, &[(0, 0), (1, 9_000), (2, 0)], bases);
    let mut bytes = index.encode();
    assert!(Index::parse(&bytes, Some(pack_size)).is_ok());
    damage(&mut bytes);
    Index::parse(&bytes, Some(pack_size)).expect_err("damage to be noticed")
}

#[test]
fn each_rule_of_a_delta_has_its_name() {
    const RECORDS: usize = FILES + 2 * BASE_LEN + FILE_LEN;
    let bases = |count: u32| refused_delta(|b| put(b, 8 + 28, &count.to_le_bytes()));
    assert_eq!(bases(0), IndexError::Bases { count: 0 });
    assert_eq!(bases(9), IndexError::Bases { count: 9 });
    assert_eq!(bases(u32::MAX), IndexError::Bases { count: u32::MAX as usize });
    assert_eq!(bases(1), malformed("table lengths"));
    let second = |at: usize, value: &[u8]| refused_delta(|b| put(b, FILES + BASE_LEN + at, value));
    let of_base = |what| IndexError::Base { position: 1, what };
    assert_eq!(second(0, &u64::MAX.to_le_bytes()), of_base("index outside its pack"));
    assert_eq!(second(8, &(MAX_INDEX_LEN + 1).to_le_bytes()), of_base("index outside its pack"));
    assert_eq!(second(16, &10_099u64.to_le_bytes()), of_base("index outside its pack"));
    assert_eq!(second(24, &[1; 32]), of_base("named twice"));
    for hint in [&b"../x"[..], b"/etc/passwd", b"file:///x", b"http://a b", b"x\0y", b"\xff", b"\x1b[2J"] {
        assert_eq!(second(56, hint), of_base("hint"), "{hint:?}");
    }
    let record = |number: usize, at: usize, value: &[u8]| {
        refused_delta(|b| put(b, RECORDS + number * RECORD_LEN + at, value))
    };
    let of_record = |position, what| IndexError::Record { position, what };
    assert_eq!(record(1, 7, &[3]), of_record(1, "frame in a base that is not named"));
    assert_eq!(record(1, 7, &[255]), of_record(1, "frame in a base that is not named"));
    assert_eq!(record(2, 8, &u64::MAX.to_le_bytes()), of_record(2, "frame outside its base"));
    assert_eq!(
        record(2, 8, &9_951u64.to_le_bytes()),
        of_record(2, "frame outside its base"),
        "inside the index"
    );
    assert_eq!(record(2, 4, &[0, 0, 0]), of_record(2, "frame length"));
    assert_eq!(record(2, 0, &1u32.to_le_bytes()), of_record(2, "chunks out of order"));
}

#[test]
fn a_name_used_twice_is_refused() {
    let (mut index, pack_size) = build(&[(10, vec![]), (10, vec![])]);
    index.files[1].name = index.files[0].name.clone();
    let refusal = Index::parse(&index.encode(), Some(pack_size));
    assert_eq!(refusal, Err(IndexError::File { position: 1, what: "name used twice" }));
}

#[test]
fn ids_of_another_index_find_nothing() {
    let (index, _) = build(&[(10, vec![])]);
    let id = ChunkId { file: FileId(7), chunk: 0 };
    assert_eq!((index.record(id), index.plain_len(id), index.chunk_count(id.file)), (None, 0, 0));
    assert_eq!(index.spans(id.file, 0, 100).count(), 0);
}
