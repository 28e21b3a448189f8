//! Pack v3 layout: the constants and the small codecs that `index`, `writer` and `store` share.
//!
//! ```text
//! [zstd frame: tar header of manifest.toml][frame: its chunk 0]
//! [frame: padding + tar header of the next member (+ sparse map)][frame: chunk][frame: chunk]...
//! [frame: padding + two zero blocks]                        <- the tar ends
//! [skippable frame 0x184D2A5A: index]                       <- see index.rs
//! [skippable frame 0x184D2A5E: zstd seek table]             <- the file ends
//! ```
//!
//! `docs/PACK.md` draws it byte by byte. All integers are little endian.

/// `forkd_pack_version` of the packs this crate writes, and the only one its store reads lazily.
pub const PACK_VERSION: u32 = 3;
/// Plain bytes in one frame unless asked otherwise; measured choice, see `docs/PACK.md`.
pub const DEFAULT_CHUNK_SIZE: u32 = 256 << 10;
/// Smallest chunk size accepted, in bytes.
pub const MIN_CHUNK_SIZE: u32 = 64 << 10;
/// Largest chunk size accepted, in bytes.
pub const MAX_CHUNK_SIZE: u32 = 4 << 20;
/// Largest plain size of one file in a pack, in bytes (1 TiB).
pub const MAX_FILE_SIZE: u64 = 1 << 40;
/// Largest index frame accepted, in bytes: about 1.3 million stored chunks.
pub const MAX_INDEX_LEN: u64 = 64 << 20;
/// Most packs that a delta takes chunks from: its base, the base of that, and so on.
pub const MAX_BASES: usize = 8;
/// Flag of an index: chunks lie in other packs, which it names. Forkd before deltas refuses it.
pub const FLAG_DELTA: u32 = 1;
/// The flags of an index that are read.
pub const KNOWN_FLAGS: u32 = FLAG_DELTA;
/// Most files in one pack.
pub const MAX_FILES: u32 = 256;
/// Longest file name in a pack, in bytes.
pub const MAX_NAME_LEN: usize = 64;

/// Magic of the skippable frame that holds the index (one of zstd's sixteen skippable magics).
pub const INDEX_FRAME_MAGIC: u32 = 0x184D_2A5A;
/// Magic of the skippable frame that holds the seek table (zstd seekable format).
pub const SEEK_TABLE_MAGIC: u32 = 0x184D_2A5E;
/// Last four bytes of a seek table (zstd seekable format).
pub const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
/// Magic of an ordinary zstd frame (RFC 8878).
pub const ZSTD_MAGIC: u32 = 0xFD2F_B528;
/// Bytes in a skippable frame before its content: magic and length.
pub const SKIPPABLE_HEADER_LEN: u64 = 8;
/// Bytes in the footer of a seek table: frame count, descriptor, magic.
pub const SEEK_FOOTER_LEN: u64 = 9;
/// Most frames in a seek table (zstd seekable format).
pub const MAX_SEEK_FRAMES: u32 = 0x0800_0000;

/// Name of the member that describes the others; always the first.
pub const MANIFEST: &str = "manifest.toml";
/// Name of the machine configuration.
pub const SNAPSHOT: &str = "snapshot.json";
/// Name of the CPU and device state.
pub const VMSTATE: &str = "vmstate";
/// Name of the recorded working set.
pub const TRACE: &str = "trace";
/// Name of the touched pages themselves, in the order of the trace ([`crate::trace::Trace::pages`]).
pub const HOTSET: &str = "hotset";
/// Name of the guest memory image.
pub const MEMORY: &str = "memory.bin";
/// Name of the root disk image.
pub const ROOTFS: &str = "rootfs.erofs";
/// The members of a pack in the order they are stored: small ones that a restore needs first, first.
pub const MEMBER_ORDER: [&str; 7] = [MANIFEST, SNAPSHOT, VMSTATE, TRACE, HOTSET, MEMORY, ROOTFS];

const TAR_BLOCK: u64 = 512;

/// Whether `name` can be a file's name everywhere: letters, digits, `.`, `_`, `-`, not starting with `.` or `-`.
pub fn is_plain_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    !name.is_empty()
        && name.len() <= MAX_NAME_LEN
        && name.bytes().all(allowed)
        && !name.starts_with(['.', '-'])
}

/// Whether `size` is a chunk size this format allows: a power of two in the accepted range.
pub fn is_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && (MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&size)
}

/// The longest zstd frame that can hold `plain_len` bytes (ZSTD_compressBound).
pub fn compressed_bound(plain_len: u32) -> u32 {
    zstd::zstd_safe::compress_bound(plain_len as usize) as u32
}

/// Plain bytes in chunk number `chunk` of a file of `size` bytes; 0 past its end.
pub fn chunk_len(size: u64, chunk_size: u32, chunk: u32) -> u32 {
    size.saturating_sub(u64::from(chunk) * u64::from(chunk_size)).min(u64::from(chunk_size)) as u32
}

/// How many chunks a file of `size` bytes has, zero ones included.
pub fn chunk_count(size: u64, chunk_size: u32) -> u32 {
    size.div_ceil(u64::from(chunk_size)) as u32
}

/// Everything tar wants before a member's data: extended header, header, and the sparse map when `stored` leaves out
/// chunks. Returns the bytes and the length of tar data (map and stored chunks), which the caller pads to 512.
///
/// Sparse members use GNU's format 1.0: the map stands at the start of the data as decimal lines, so that readers
/// that know nothing of it still step over the member correctly.
pub(crate) fn tar_member_head(
    name: &str,
    size: u64,
    chunk_size: u32,
    stored: &[u32],
    mtime: u64,
) -> (Vec<u8>, u64) {
    let data_len: u64 = stored.iter().map(|&c| u64::from(chunk_len(size, chunk_size, c))).sum();
    let mut extended = Vec::new();
    if data_len == size {
        if size >= MAX_OCTAL_SIZE {
            pax_record(&mut extended, "size", &size.to_string());
        }
        let mut head = pax_header(&extended, name, mtime);
        head.extend_from_slice(ustar(name, size, b'0', mtime).as_bytes());
        return (head, size);
    }
    let map = sparse_map(size, chunk_size, stored);
    let archived = map.len() as u64 + data_len;
    pax_record(&mut extended, "GNU.sparse.major", "1");
    pax_record(&mut extended, "GNU.sparse.minor", "0");
    pax_record(&mut extended, "GNU.sparse.name", name);
    pax_record(&mut extended, "GNU.sparse.realsize", &size.to_string());
    if archived >= MAX_OCTAL_SIZE {
        pax_record(&mut extended, "size", &archived.to_string());
    }
    let mut head = pax_header(&extended, name, mtime);
    head.extend_from_slice(ustar(&format!("GNUSparseFile.0/{name}"), archived, b'0', mtime).as_bytes());
    head.extend_from_slice(&map);
    (head, archived)
}

/// Bytes of padding that bring `len` to a multiple of tar's block.
pub(crate) fn tar_padding(len: u64) -> usize {
    (len.next_multiple_of(TAR_BLOCK) - len) as usize
}

/// Zero bytes that end a tar: two blocks.
pub(crate) const TAR_END: usize = 2 * TAR_BLOCK as usize;

/// Sizes from here on do not fit the eleven octal digits of a ustar header (8 GiB).
const MAX_OCTAL_SIZE: u64 = 1 << 33;

fn sparse_map(size: u64, chunk_size: u32, stored: &[u32]) -> Vec<u8> {
    let mut segments: Vec<(u64, u64)> = Vec::new();
    for &chunk in stored {
        let (start, len) =
            (u64::from(chunk) * u64::from(chunk_size), u64::from(chunk_len(size, chunk_size, chunk)));
        match segments.last_mut() {
            Some((at, run)) if *at + *run == start => *run += len,
            _ => segments.push((start, len)),
        }
    }
    // An empty last segment tells tar the file's length when it ends in a hole.
    if segments.last().is_none_or(|&(at, run)| at + run < size) {
        segments.push((size, 0));
    }
    let mut map = format!("{}\n", segments.len());
    for (at, run) in segments {
        map.push_str(&format!("{at}\n{run}\n"));
    }
    let mut map = map.into_bytes();
    map.resize(map.len() + tar_padding(map.len() as u64), 0);
    map
}

/// One `"LEN key=value\n"` record, LEN counting itself.
fn pax_record(out: &mut Vec<u8>, key: &str, value: &str) {
    let rest = key.len() + value.len() + 3;
    let mut total = rest + 1;
    while total != rest + total.to_string().len() {
        total = rest + total.to_string().len();
    }
    out.extend_from_slice(format!("{total} {key}={value}\n").as_bytes());
}

fn pax_header(records: &[u8], name: &str, mtime: u64) -> Vec<u8> {
    if records.is_empty() {
        return Vec::new();
    }
    let mut header =
        ustar(&format!("PaxHeaders/{name}"), records.len() as u64, b'x', mtime).as_bytes().to_vec();
    header.extend_from_slice(records);
    header.resize(header.len() + tar_padding(records.len() as u64), 0);
    header
}

fn ustar(path: &str, size: u64, kind: u8, mtime: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    // At most 80 bytes: names are bounded by MAX_NAME_LEN, the field holds 100.
    let field = &mut header.as_old_mut().name;
    field[..path.len()].copy_from_slice(path.as_bytes());
    // Larger sizes stand in the extended header, which overrides this field.
    header.set_size(if size < MAX_OCTAL_SIZE { size } else { 0 });
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(mtime);
    header.set_cksum();
    header
}

/// The seek table frame: (compressed, plain) length of every frame before it, in order, without checksums.
pub(crate) fn encode_seek_table(frames: &[(u32, u32)]) -> Vec<u8> {
    let content = frames.len() * 8 + SEEK_FOOTER_LEN as usize;
    let mut out = Vec::with_capacity(content + SKIPPABLE_HEADER_LEN as usize);
    out.extend_from_slice(&SEEK_TABLE_MAGIC.to_le_bytes());
    out.extend_from_slice(&(content as u32).to_le_bytes());
    for (compressed, plain) in frames {
        out.extend_from_slice(&compressed.to_le_bytes());
        out.extend_from_slice(&plain.to_le_bytes());
    }
    out.extend_from_slice(&(frames.len() as u32).to_le_bytes());
    out.push(0);
    out.extend_from_slice(&SEEKABLE_MAGIC.to_le_bytes());
    out
}

/// Length of the seek table frame of `frames` frames, in bytes.
pub(crate) fn seek_table_len(frames: u64) -> u64 {
    SKIPPABLE_HEADER_LEN + frames * 8 + SEEK_FOOTER_LEN
}

/// Length of the seek table frame that ends with this footer; `None` when the bytes are no such footer.
pub(crate) fn parse_seek_footer(footer: &[u8]) -> Option<u64> {
    let (frames, rest) = footer.split_first_chunk::<4>()?;
    let (&descriptor, magic) = rest.split_first()?;
    let frames = u32::from_le_bytes(*frames);
    let ours = magic == SEEKABLE_MAGIC.to_le_bytes() && descriptor == 0 && frames <= MAX_SEEK_FRAMES;
    ours.then(|| seek_table_len(u64::from(frames)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_records_count_themselves() {
        let mut out = Vec::new();
        pax_record(&mut out, "size", "9");
        pax_record(&mut out, "k", &"v".repeat(95));
        let text = String::from_utf8(out).unwrap();
        for line in text.lines() {
            assert_eq!(line.split(' ').next().unwrap().parse::<usize>().unwrap(), line.len() + 1, "{line}");
        }
    }

    #[test]
    fn plain_names_are_only_plain_names() {
        for good in ["memory.bin", "a", "A-1_b.c", &"n".repeat(64)] {
            assert!(is_plain_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "/a", "a\0", "a b", "-rf", "é", &"n".repeat(65)] {
            assert!(!is_plain_name(bad), "{bad}");
        }
    }

    #[test]
    fn sparse_maps_join_neighbours_and_mark_the_end() {
        let chunk = MIN_CHUNK_SIZE;
        let size = u64::from(chunk) * 4 + 7;
        let text = |stored: &[u32]| {
            String::from_utf8(sparse_map(size, chunk, stored))
                .unwrap()
                .trim_end_matches('\0')
                .replace('\n', " ")
        };
        assert_eq!(text(&[1, 2]), format!("2 65536 131072 {size} 0 "));
        assert_eq!(text(&[4]), "1 262144 7 ");
        assert_eq!(text(&[]), format!("1 {size} 0 "));
    }

    #[test]
    fn seek_footers_are_told_from_noise() {
        let table = encode_seek_table(&[(10, 100), (20, 0)]);
        assert_eq!(parse_seek_footer(&table[table.len() - 9..]), Some(table.len() as u64));
        assert_eq!(parse_seek_footer(&[0xff; 9]), None);
        assert_eq!(parse_seek_footer(&[]), None);
    }
}
