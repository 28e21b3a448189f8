//! What is in the snapshot directory.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use forkd_fs::manifest::Manifest;
use serde::Serialize;

use crate::chain::chain;
use crate::local::lineage::{BASE, BaseDescription, Lineage};
use crate::local::paths::{Paths, checked_tag};
use crate::local::snapshots::{self, MANIFEST, SnapshotError, file_error};

/// A local snapshot, as `forkd snapshots --json` shows it.
#[derive(Debug, Clone, Serialize)]
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
    /// What it takes on disk. Files that it shares with others count at the snapshot that they were made for, as long as
    /// that is there.
    pub disk_bytes: u64,
    /// The child that it was taken of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub child: Option<String>,
    /// What that child was forked from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<String>,
    /// What it is stored as a difference from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseDescription>,
    /// Why it cannot be used; null when it can.
    pub broken: Option<String>,
}

/// All snapshots, by name.
pub fn list(paths: &Paths) -> Result<Vec<SnapshotDescription>, SnapshotError> {
    let directory = paths.snapshots();
    let mut found = Vec::new();
    if directory.is_dir() {
        for entry in std::fs::read_dir(&directory).map_err(file_error("listing", &directory))? {
            let entry = entry.map_err(file_error("listing", &directory))?;
            let Ok(tag) = entry.file_name().into_string() else { continue };
            // Drafts start with a dot.
            if checked_tag(&tag).is_ok() && entry.path().is_dir() {
                let lineage = Lineage::read(&entry.path()).map_err(|error| chain(&error));
                found.push((tag, entry.path(), lineage));
            }
        }
    }
    // Those that are no differences first: what others share with them is theirs.
    found.sort_by_key(|(tag, _, lineage)| (!matches!(lineage, Ok(None)), tag.clone()));
    let mut counted = BTreeSet::new();
    let mut describe = |(tag, path, lineage)| describe(tag, path, lineage, &mut counted);
    let mut snapshots: Vec<_> = found.into_iter().map(&mut describe).collect();
    snapshots.sort_by(|a, b| a.tag.cmp(&b.tag));
    Ok(snapshots)
}

/// What the snapshot in `dir` takes on disk beyond what it shares with others.
pub fn own_bytes(dir: &Path) -> u64 {
    files(dir).iter().filter(|file| file.nlink() == 1).map(|file| file.blocks() * 512).sum()
}

fn files(dir: &Path) -> Vec<Metadata> {
    let entries = [dir.to_owned(), dir.join(BASE)].into_iter().filter_map(|dir| std::fs::read_dir(dir).ok());
    let found = entries.flatten().filter_map(|entry| entry.ok()?.metadata().ok());
    found.filter(|metadata| metadata.is_file()).collect()
}

fn describe(
    tag: String,
    directory: PathBuf,
    lineage: Result<Option<Lineage>, String>,
    counted: &mut BTreeSet<(u64, u64)>,
) -> SnapshotDescription {
    let new = |file: &Metadata| counted.insert((file.dev(), file.ino()));
    let disk_bytes = files(&directory).into_iter().filter(new).map(|file| file.blocks() * 512).sum();
    let (manifest, broken) = match (read_manifest(&directory), &lineage) {
        (Ok(manifest), Ok(_)) => (Some(manifest), None),
        (Ok(manifest), Err(why)) => (Some(manifest), Some(why.clone())),
        (Err(why), _) => (None, Some(why)),
    };
    let lineage = lineage.ok().flatten();
    let text = |field: fn(&Manifest) -> &String| manifest.as_ref().map(field).cloned().unwrap_or_default();
    SnapshotDescription {
        tag,
        description: text(|manifest| &manifest.description),
        base_image: text(|manifest| &manifest.base_image),
        created_at: text(|manifest| &manifest.created_at),
        memory_mib: manifest.as_ref().map(|manifest| manifest.requires.memory_mib),
        disk_bytes,
        base: lineage.as_ref().and_then(|lineage| lineage.base.as_ref()).map(BaseDescription::from),
        forked_from: lineage.as_ref().map(|lineage| lineage.forked_from.clone()),
        child: lineage.map(|lineage| lineage.child),
        broken,
    }
}

fn read_manifest(directory: &Path) -> Result<Manifest, String> {
    let place = |error| format!("{}: {error}", directory.join(MANIFEST).display());
    let bytes = snapshots::manifest_bytes(directory).map_err(place)?;
    Manifest::parse(&bytes).map_err(|error| error.to_string())
}
