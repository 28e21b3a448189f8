//! What is in the snapshot directory.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use forkd_fs::manifest::Manifest;
use serde::Serialize;

use crate::local::paths::{Paths, checked_tag};
use crate::local::snapshots::{self, MANIFEST, SnapshotError, file_error};

/// A local snapshot, as `forkd snapshots --json` shows it.
#[derive(Debug, Serialize)]
pub struct SnapshotDescription {
    /// Its name.
    pub tag: String,
    /// What its maker says of it.
    pub description: String,
    /// What its root disk was made from.
    pub base_image: String,
    /// When it was made, RFC 3339.
    pub created_at: String,
    /// Memory of its machine.
    pub memory_mib: Option<u64>,
    /// What it takes on disk.
    pub disk_bytes: u64,
    /// Why it cannot be used; null when it can.
    pub broken: Option<String>,
}

/// All snapshots, by name.
pub fn list(paths: &Paths) -> Result<Vec<SnapshotDescription>, SnapshotError> {
    let directory = paths.snapshots();
    let mut snapshots = Vec::new();
    if directory.is_dir() {
        for entry in std::fs::read_dir(&directory).map_err(file_error("listing", &directory))? {
            let entry = entry.map_err(file_error("listing", &directory))?;
            let Ok(tag) = entry.file_name().into_string() else { continue };
            // Drafts start with a dot.
            if checked_tag(&tag).is_ok() && entry.path().is_dir() {
                snapshots.push(describe(tag, &entry.path()));
            }
        }
    }
    snapshots.sort_by(|a, b| a.tag.cmp(&b.tag));
    Ok(snapshots)
}

fn describe(tag: String, directory: &Path) -> SnapshotDescription {
    let disk_bytes = std::fs::read_dir(directory).map_or(0, |entries| {
        entries.filter_map(|entry| entry.ok()?.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
    });
    let (manifest, broken) = match read_manifest(directory) {
        Ok(manifest) => (Some(manifest), None),
        Err(why) => (None, Some(why)),
    };
    let text = |field: fn(&Manifest) -> &String| manifest.as_ref().map(field).cloned().unwrap_or_default();
    SnapshotDescription {
        tag,
        description: text(|manifest| &manifest.description),
        base_image: text(|manifest| &manifest.base_image),
        created_at: text(|manifest| &manifest.created_at),
        memory_mib: manifest.as_ref().map(|manifest| manifest.requires.memory_mib),
        disk_bytes,
        broken,
    }
}

fn read_manifest(directory: &Path) -> Result<Manifest, String> {
    let place = |error| format!("{}: {error}", directory.join(MANIFEST).display());
    let bytes = snapshots::manifest_bytes(directory).map_err(place)?;
    Manifest::parse(&bytes).map_err(|error| error.to_string())
}
