//! The files that go into a pack.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::error::WriteError;
use crate::format::{self, MANIFEST, MEMBER_ORDER};
use crate::index::ChunkRecord;
use crate::scan::FileScan;

/// One file on its way into a pack.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Of a delta without the chunks that are in its bases.
    pub(super) scan: FileScan,
    pub(super) mtime: u64,
    /// Chunks of a delta that its bases hold, ascending.
    pub(super) in_bases: Vec<ChunkRecord>,
}

impl Member {
    /// What tar calls it. What lacks chunks, and unpacks to something else, is not to pass for the file.
    pub(super) fn tar_name(&self) -> String {
        if self.in_bases.is_empty() { self.name.clone() } else { format!("{}.delta", self.name) }
    }
}

/// The files of a directory that go into a pack, in pack order.
pub(super) fn member_files(dir: &Path) -> Result<Vec<(String, PathBuf)>, WriteError> {
    let failed = |source| WriteError::Read { path: dir.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.starts_with('.') || name == MANIFEST {
            continue;
        }
        if !format::is_plain_name(&name) {
            return Err(WriteError::Refused { path, reason: "its name is not a plain file name" });
        }
        if !entry.file_type().map_err(failed)?.is_file() {
            return Err(WriteError::Refused { path, reason: "it is not a regular file" });
        }
        files.push((name.into_owned(), path));
    }
    if files.len() >= format::MAX_FILES as usize {
        return Err(WriteError::Refused { path: dir.to_owned(), reason: "it holds too many files" });
    }
    let rank =
        |name: &str| MEMBER_ORDER.iter().position(|&known| known == name).unwrap_or(MEMBER_ORDER.len());
    files.sort_by(|(a, _), (b, _)| (rank(a), a).cmp(&(rank(b), b)));
    Ok(files)
}
