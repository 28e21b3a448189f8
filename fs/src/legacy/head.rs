//! The manifest of a predecessor's pack without the rest of it: it comes first, so the first bytes are enough.

use std::io::Read;
use std::path::Path;

use super::whole::{WholeError, source};
use super::{LegacyError, LegacyManifest, LegacyMember, first_manifest};
use crate::manifest::MAX_MANIFEST_LEN;
use crate::source::{Priority, SourceError};
use crate::store::{PackLocation, StoreOptions};

/// Bytes asked for first; holds every manifest of an ordinary size.
const FIRST_LEN: u64 = 64 << 10;
/// Most bytes read: holds the longest manifest even if it does not compress.
const MAX_LEN: u64 = MAX_MANIFEST_LEN + (256 << 10);
/// Most plain bytes looked through for a manifest.
const MAX_PLAIN: u64 = 4 << 20;

/// The beginning of a predecessor's pack.
#[derive(Debug, Clone)]
pub struct LegacyHead {
    /// What the pack says about itself.
    pub manifest: LegacyManifest,
    /// Plain bytes of the manifest.
    pub manifest_size: u64,
    /// Bytes of the packed file.
    pub packed_size: u64,
    /// Bytes that were transferred to learn this.
    pub fetched_bytes: u64,
}

/// Why the beginning of a pack cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The bytes could not be had.
    #[error("cannot read {location}")]
    Source {
        /// URL or path.
        location: String,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// They are not the beginning of a predecessor's pack.
    #[error(transparent)]
    Pack(#[from] LegacyError),
}

impl LegacyHead {
    /// Reads at most 64 KiB, and if that is not enough 512 KiB, of the pack at `location`.
    pub async fn fetch(location: &PackLocation, options: &StoreOptions) -> Result<LegacyHead, HeadError> {
        let (source, name) = match source(location, options) {
            Ok(found) => found,
            Err(WholeError::Source { location, source }) => {
                return Err(HeadError::Source { location, source });
            }
            Err(_) => unreachable!("finding a source fails in one way"),
        };
        let failed = |source| HeadError::Source { location: name.clone(), source };
        let packed_size = source.size().await.map_err(failed)?;
        let mut len = FIRST_LEN.min(packed_size);
        loop {
            let start = source.read_at(0, len, Priority::Demand).await.map_err(failed)?;
            match parse(Path::new(&name), &start) {
                Ok((manifest, manifest_size)) => {
                    let fetched_bytes = source.counters().bytes;
                    return Ok(LegacyHead { manifest, manifest_size, packed_size, fetched_bytes });
                }
                // What looks damaged may only be cut off.
                Err(_) if len < MAX_LEN.min(packed_size) => len = MAX_LEN.min(packed_size),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The manifest in a pack's first bytes and its length.
fn parse(path: &Path, start: &[u8]) -> Result<(LegacyManifest, u64), LegacyError> {
    let unreadable = |source| LegacyError::Read { path: path.to_owned(), source };
    let decoder = zstd::Decoder::new(start).map_err(unreadable)?.take(MAX_PLAIN);
    let mut archive = tar::Archive::new(decoder);
    for entry in archive.entries().map_err(unreadable)?.raw(true) {
        let mut entry = entry.map_err(unreadable)?;
        let size = entry.header().entry_size().map_err(unreadable)?;
        let regular = entry.header().entry_type().is_file();
        if let Some(member) = LegacyMember::from_path(&entry.path_bytes(), size).filter(|_| regular) {
            return first_manifest(path, &member, &mut entry)
                .map(|(manifest, text)| (manifest, text.len() as u64));
        }
    }
    Err(LegacyError::NotLegacy { path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::MANIFEST;
    use crate::source::HttpClient;
    use crate::store::PackSource;

    fn tar_of(text: &[u8], rest: usize) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, contents) in [(MANIFEST, text), ("memory.bin", &vec![7; rest][..])] {
            let mut header = tar::Header::new_gnu();
            header.set_path(name).unwrap();
            header.set_size(contents.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append(&header, contents).unwrap();
        }
        tar.into_inner().unwrap()
    }

    async fn fetch(dir: &Path, packed: &[u8]) -> Result<LegacyHead, HeadError> {
        let path = dir.join("old.tar.zst");
        std::fs::write(&path, packed).unwrap();
        let location = PackLocation { source: PackSource::Path(path), size: None, index: None };
        let options = StoreOptions { http: HttpClient::default(), ..StoreOptions::default() };
        LegacyHead::fetch(&location, &options).await
    }

    /// Text that does not compress to less than about half.
    fn long_manifest(len: usize) -> Vec<u8> {
        let mut text = b"forkd_pack_version = 1\ntag = \"old\"\n#".to_vec();
        let mut state = 1u64;
        while text.len() < len {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push(
                b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-"[(state >> 58) as usize],
            );
        }
        text
    }

    #[tokio::test]
    async fn the_first_bytes_are_enough_and_are_all_that_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for len in [50, 10_000, 200_000, MAX_MANIFEST_LEN as usize] {
            let text = long_manifest(len);
            let packed = zstd::encode_all(&tar_of(&text, 1 << 20)[..], 1).unwrap();
            // The rest is never decoded: it may be anything.
            let packed = [packed, vec![0xee; 4 << 20]].concat();
            let head = fetch(dir.path(), &packed).await.unwrap();
            assert_eq!((head.manifest.tag.as_str(), head.manifest_size), ("old", text.len() as u64));
            assert_eq!(head.packed_size, packed.len() as u64);
            assert!(head.fetched_bytes <= FIRST_LEN + MAX_LEN, "{}", head.fetched_bytes);
        }
    }

    #[tokio::test]
    async fn what_is_no_head_is_named_and_costs_little() {
        let dir = tempfile::tempdir().unwrap();
        let cut = zstd::encode_all(&tar_of(&long_manifest(50_000), 10)[..], 1).unwrap();
        let failed = fetch(dir.path(), &cut[..20_000]).await.unwrap_err();
        assert!(matches!(failed, HeadError::Pack(LegacyError::Read { .. })), "{failed}");
        let failed = fetch(dir.path(), b"").await.unwrap_err();
        assert!(matches!(failed, HeadError::Pack(_)), "{failed}");
        // Terabytes of zeros before a manifest, or in it, are not looked through.
        let mut header = tar::Header::new_gnu();
        header.set_path("x").unwrap();
        header.set_size(1 << 40);
        header.set_cksum();
        let bomb =
            zstd::encode_all([header.as_bytes(), &vec![0; 64 << 20][..]].concat().as_slice(), 1).unwrap();
        let started = std::time::Instant::now();
        let failed = fetch(dir.path(), &bomb).await.unwrap_err();
        assert!(matches!(failed, HeadError::Pack(LegacyError::Read { .. })), "{failed}");
        let long = tar_of(&vec![b'#'; MAX_MANIFEST_LEN as usize + 1], 0);
        let failed = fetch(dir.path(), &zstd::encode_all(&long[..], 1).unwrap()).await.unwrap_err();
        assert!(matches!(failed, HeadError::Pack(LegacyError::Manifest { .. })), "{failed}");
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    }
}
