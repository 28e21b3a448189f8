//! Packs of the predecessor: one zstd stream of a tar, which can only be read from start to end. `inspect` and
//! `unpack` use this, `repack` turns them into v3; the mount fetches and unpacks them whole ([`whole`]); of one on an
//! HTTP server, `inspect` reads the beginning alone ([`head`]).
//!
//! Layout 1 holds `manifest.toml`, `snapshot.json`, `vmstate`, `rootfs.ext4` (not always) and `memory.bin`; layout 2
//! holds the same under `TAG/` for every link of a chain. Members are recognised by those names alone, paths from the
//! pack are never used, and the manifest's `rootfs.target_path` is not even read.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::digest::{Digest, Hasher};
use crate::format::{MANIFEST, MAX_FILE_SIZE, MEMORY, SNAPSHOT, VMSTATE, is_plain_name};
use crate::manifest::{MAX_MANIFEST_LEN, ManifestError};

pub mod head;
pub mod whole;

const MEMBERS: [&str; 5] = [MANIFEST, SNAPSHOT, VMSTATE, "rootfs.ext4", MEMORY];
/// Most tar entries looked at.
const MAX_ENTRIES: usize = 4096;
/// Plain bytes handled at a time; holes are as coarse as this.
const PIECE: usize = 64 << 10;
/// Bytes of the disk left to others.
const RESERVE: u64 = 256 << 20;

/// A predecessor's pack.
#[derive(Debug, Clone)]
pub struct LegacyPack {
    /// What it says about itself.
    pub manifest: LegacyManifest,
    /// Its members in order, the manifest included.
    pub members: Vec<LegacyMember>,
}

/// A member of a predecessor's pack.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LegacyMember {
    /// The link of the chain it belongs to (layout 2).
    pub tag: Option<String>,
    /// Its name, one of the known ones.
    pub name: &'static str,
    /// Plain size in bytes.
    pub size: u64,
}

/// A predecessor's manifest, as far as it is of use.
#[derive(Debug, Clone, Deserialize)]
pub struct LegacyManifest {
    /// 1 or 2.
    pub forkd_pack_version: u32,
    /// Name of the snapshot.
    #[serde(default)]
    pub tag: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// What the root disk was made from.
    #[serde(default)]
    pub base_image: String,
    /// When it was made.
    #[serde(default)]
    pub created_at: String,
    /// By which version.
    #[serde(default)]
    pub forkd_version: String,
    #[serde(default)]
    files: Vec<LegacyFile>,
    #[serde(default)]
    chain: Vec<LegacyLink>,
}

#[derive(Debug, Clone, Deserialize)]
struct LegacyFile {
    path: String,
    #[serde(default)]
    size: Option<u64>,
    sha256: Digest,
}

#[derive(Debug, Clone, Deserialize)]
struct LegacyLink {
    tag: String,
    #[serde(default)]
    files: Vec<LegacyFile>,
}

/// A member as a predecessor's manifest lists it, which need not be true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyListedFile {
    /// `NAME` or `TAG/NAME`, of any form.
    pub path: String,
    /// Plain size in bytes, if it says.
    pub size: Option<u64>,
    /// Digest of the plain contents.
    pub sha256: Digest,
}

/// Why a predecessor's pack cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LegacyError {
    /// It cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The pack.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It is damaged, cut short, or no tar in zstd at all.
    #[error("cannot read the pack {}", path.display())]
    Read {
        /// The pack.
        path: PathBuf,
        /// What the decoder met.
        #[source]
        source: io::Error,
    },
    /// Its manifest cannot be used.
    #[error("the manifest of {} cannot be used", path.display())]
    Manifest {
        /// The pack.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// It does not begin with a manifest, or with one of another layout.
    #[error("{} is not a pack of layout 1 or 2", path.display())]
    NotLegacy {
        /// The pack.
        path: PathBuf,
    },
    /// It unpacks to more than the caller allows, or has too many entries.
    #[error("{} unpacks to more than {limit} bytes", path.display())]
    TooLarge {
        /// The pack.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// It holds the same member twice.
    #[error("{} holds {name} twice", path.display())]
    Duplicate {
        /// The pack.
        path: PathBuf,
        /// The member.
        name: String,
    },
    /// A member is not the one its manifest lists.
    #[error("{name} in {} has sha256 {found}, its manifest says {expected}", path.display())]
    Digest {
        /// The pack.
        path: PathBuf,
        /// The member.
        name: String,
        /// What the manifest says.
        expected: Digest,
        /// What the bytes hash to.
        found: Digest,
    },
    /// What is not zero in it does not fit.
    #[error("{} unpacks to more than the {room} bytes there is room for", path.display())]
    NoRoom {
        /// The pack.
        path: PathBuf,
        /// How many bytes may be written.
        room: u64,
    },
    /// An output file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The output file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Reads through a pack and lists its members. `limit` bounds the plain bytes it may hold.
pub fn list(path: &Path, limit: u64) -> Result<LegacyPack, LegacyError> {
    walk(path, open(path)?, limit, &mut |_, _| Ok(()))
}

fn open(path: &Path) -> Result<File, LegacyError> {
    File::open(path).map_err(|source| LegacyError::Open { path: path.to_owned(), source })
}

/// Unpacks a pack into the existing, empty directory `dest`: members of layout 1 side by side, those of layout 2 in a
/// directory a tag. Zeros become holes, and members the manifest lists are checked against its digests. Ends before the
/// disk is full.
pub fn unpack(path: &Path, dest: &Path, limit: u64) -> Result<LegacyPack, LegacyError> {
    unpack_from(path, open(path)?, dest, limit)
}

/// Does what [`unpack`] does with a pack read from `data`; `path` names it in errors.
pub fn unpack_from(path: &Path, data: impl Read, dest: &Path, limit: u64) -> Result<LegacyPack, LegacyError> {
    let room = room(dest).map_err(|source| LegacyError::Write { path: dest.to_owned(), source })?;
    let limits = Limits { plain: limit, stored: room };
    unpack_into(path, data, limits, &mut |member| {
        let directory = member.tag.as_ref().map_or_else(|| dest.to_owned(), |tag| dest.join(tag));
        let output = directory.join(member.name);
        let failed = |source| LegacyError::Write { path: output.clone(), source };
        // Never `dest` itself: who removes it wants it gone.
        if member.tag.is_some()
            && let Err(error) = fs::create_dir(&directory)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(failed(error));
        }
        Ok((File::create_new(&output).map_err(failed)?, output.clone()))
    })
    .map(|(pack, _)| pack)
}

/// How much a pack may unpack to.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Bytes of all members, zeros included.
    plain: u64,
    /// Bytes that are written because they are not zero.
    stored: u64,
}

/// Gives a new file for a member, and its name for errors.
type Make<'a> = &'a mut dyn FnMut(&LegacyMember) -> Result<(File, PathBuf), LegacyError>;

/// Unpacks the pack read from `data` into the files `make` gives, which come back in the order of the members. `path`
/// names the pack in errors.
fn unpack_into(
    path: &Path,
    data: impl Read,
    limits: Limits,
    make: Make<'_>,
) -> Result<(LegacyPack, Vec<File>), LegacyError> {
    let (mut found, mut files, mut room) = (Vec::new(), Vec::new(), limits.stored);
    let pack = walk(path, data, limits.plain, &mut |member, data| {
        let (mut file, output) = make(member)?;
        let failed = |source| LegacyError::Write { path: output.clone(), source };
        let mut spend = |len: u64| {
            room = room
                .checked_sub(len)
                .ok_or_else(|| LegacyError::NoRoom { path: path.to_owned(), room: limits.stored })?;
            Ok(())
        };
        found.push((member.clone(), copy_sparse(path, data, &mut file, &mut spend, failed)?));
        files.push(file);
        Ok(())
    })?;
    for (member, found) in found {
        match pack.manifest.digest(&member) {
            Some(expected) if expected != found => {
                let (path, name) = (path.to_owned(), member.path());
                return Err(LegacyError::Digest { path, name, expected, found });
            }
            _ => {}
        }
    }
    Ok((pack, files))
}

impl LegacyMember {
    /// The member a tar entry's path names, if it is one a pack can have.
    fn from_path(path: &[u8], size: u64) -> Option<Self> {
        let path = std::str::from_utf8(path).ok()?;
        let path = path.strip_prefix("./").unwrap_or(path);
        let (tag, name) = match path.split_once('/') {
            Some((tag, name)) if is_plain_name(tag) => (Some(tag.to_owned()), name),
            Some(_) => return None,
            None => (None, path),
        };
        let name = MEMBERS.into_iter().find(|&known| known == name)?;
        Some(Self { tag, name, size })
    }

    /// The member as `NAME` or `TAG/NAME`.
    pub fn path(&self) -> String {
        self.tag.as_ref().map_or_else(|| self.name.to_owned(), |tag| format!("{tag}/{}", self.name))
    }
}

impl LegacyManifest {
    /// The members it lists, in its order.
    pub fn listed(&self) -> Vec<LegacyListedFile> {
        let listed = |tag: Option<&str>, file: &LegacyFile| LegacyListedFile {
            path: match tag {
                Some(tag) if !file.path.contains('/') => format!("{tag}/{}", file.path),
                _ => file.path.clone(),
            },
            size: file.size,
            sha256: file.sha256,
        };
        let own = self.files.iter().map(|file| listed(None, file));
        let chain = self.chain.iter();
        own.chain(chain.flat_map(|link| link.files.iter().map(move |file| listed(Some(&link.tag), file))))
            .collect()
    }

    /// What the manifest says a member hashes to.
    pub fn digest(&self, member: &LegacyMember) -> Option<Digest> {
        let path = member.path();
        let link = self.chain.iter().find(|link| Some(&link.tag) == member.tag.as_ref());
        let of_link = link.into_iter().flat_map(|link| &link.files).find(|file| {
            let name = file.path.rsplit_once('/').map_or(file.path.as_str(), |(_, name)| name);
            name == member.name
        });
        of_link.or_else(|| self.files.iter().find(|file| file.path == path)).map(|file| file.sha256)
    }
}

type Visit<'a> = &'a mut dyn FnMut(&LegacyMember, &mut dyn Read) -> Result<(), LegacyError>;

/// Reads a pack from start to end, showing every known member to `visit`.
fn walk(path: &Path, data: impl Read, limit: u64, visit: Visit<'_>) -> Result<LegacyPack, LegacyError> {
    let unreadable = |source| LegacyError::Read { path: path.to_owned(), source };
    let too_large = || LegacyError::TooLarge { path: path.to_owned(), limit };
    let decoder = zstd::Decoder::new(data).map_err(unreadable)?;
    let mut archive = tar::Archive::new(decoder);
    let (mut manifest, mut members, mut seen, mut total) = (None, Vec::new(), HashSet::new(), 0u64);
    // Raw: extended headers, which could be of any length, stay unread.
    for (count, entry) in archive.entries().map_err(unreadable)?.raw(true).enumerate() {
        let mut entry = entry.map_err(unreadable)?;
        let size = entry.header().entry_size().map_err(unreadable)?;
        total = total.saturating_add(size);
        if count >= MAX_ENTRIES || total > limit || size > MAX_FILE_SIZE {
            return Err(too_large());
        }
        let regular = entry.header().entry_type().is_file();
        let Some(member) = LegacyMember::from_path(&entry.path_bytes(), size).filter(|_| regular) else {
            continue;
        };
        if !seen.insert(member.path()) {
            return Err(LegacyError::Duplicate { path: path.to_owned(), name: member.path() });
        }
        if manifest.is_none() {
            let (parsed, text) = first_manifest(path, &member, &mut entry)?;
            manifest = Some(parsed);
            visit(&member, &mut &text[..])?;
        } else {
            visit(&member, &mut entry)?;
        }
        members.push(member);
    }
    let manifest = manifest.ok_or_else(|| LegacyError::NotLegacy { path: path.to_owned() })?;
    Ok(LegacyPack { manifest, members })
}

/// The manifest, which must be the first member; also as it stands in the pack.
fn first_manifest(
    path: &Path,
    member: &LegacyMember,
    data: &mut dyn Read,
) -> Result<(LegacyManifest, Vec<u8>), LegacyError> {
    let not_legacy = || LegacyError::NotLegacy { path: path.to_owned() };
    let unusable = |source| LegacyError::Manifest { path: path.to_owned(), source };
    if member.name != MANIFEST {
        return Err(not_legacy());
    }
    if member.size > MAX_MANIFEST_LEN {
        return Err(unusable(ManifestError::TooLong { len: member.size }));
    }
    let mut text = Vec::new();
    data.take(MAX_MANIFEST_LEN)
        .read_to_end(&mut text)
        .map_err(|source| LegacyError::Read { path: path.to_owned(), source })?;
    let utf8 = std::str::from_utf8(&text).map_err(|e| unusable(ManifestError::NotText(e)))?;
    let manifest: LegacyManifest =
        toml::from_str(utf8).map_err(|e| unusable(ManifestError::Syntax(Box::new(e))))?;
    match manifest.forkd_pack_version {
        1 | 2 => Ok((manifest, text)),
        _ => Err(not_legacy()),
    }
}

/// Copies `data` into `file`, zeros as holes; returns the digest of what was read.
fn copy_sparse(
    pack: &Path,
    data: &mut dyn Read,
    file: &mut File,
    spend: &mut dyn FnMut(u64) -> Result<(), LegacyError>,
    failed: impl Fn(io::Error) -> LegacyError,
) -> Result<Digest, LegacyError> {
    let (mut hasher, mut piece, mut len) = (Hasher::new(), vec![0; PIECE], 0);
    loop {
        let mut filled = 0;
        while filled < PIECE {
            match data.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(more) => filled += more,
                Err(source) => return Err(LegacyError::Read { path: pack.to_owned(), source }),
            }
        }
        let plain = &piece[..filled];
        if plain.is_empty() {
            break;
        }
        hasher.update(plain);
        len += filled as u64;
        if crate::scan::is_zero(plain) {
            file.seek(io::SeekFrom::Start(len)).map_err(&failed)?;
        } else {
            spend(filled as u64)?;
            file.write_all(plain).map_err(&failed)?;
        }
    }
    file.set_len(len).map_err(failed)?;
    Ok(hasher.finish())
}

/// Bytes that may be written to a directory's disk.
fn room(directory: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(directory)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize).saturating_sub(RESERVE))
}
