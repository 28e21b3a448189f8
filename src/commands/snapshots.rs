//! `forkd snapshots`: what is in the snapshot directory.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use forkd_fs::manifest::{MAX_MANIFEST_LEN, Manifest};
use serde::Serialize;

use crate::cli::RmiArgs;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::snapshots::{self, SnapshotError, file_error};

#[derive(Debug, Serialize)]
struct Report {
    snapshots: Vec<Snapshot>,
}

#[derive(Debug, Serialize)]
struct Snapshot {
    tag: String,
    description: String,
    base_image: String,
    created_at: String,
    memory_mib: Option<u64>,
    disk_bytes: u64,
    /// Why it cannot be used; null when it can.
    broken: Option<String>,
}

#[derive(Serialize)]
struct Removed {
    removed: Vec<String>,
}

/// Lists.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let directory = Paths::from_env()?.snapshots();
    let mut snapshots = Vec::new();
    if directory.is_dir() {
        for entry in std::fs::read_dir(&directory).map_err(file_error("listing", &directory))? {
            let entry = entry.map_err(file_error("listing", &directory))?;
            let Ok(tag) = entry.file_name().into_string() else { continue };
            // Drafts start with a dot.
            if forkd_engine::local::paths::checked_tag(&tag).is_ok() && entry.path().is_dir() {
                snapshots.push(describe(tag, &entry.path()));
            }
        }
    }
    snapshots.sort_by(|a, b| a.tag.cmp(&b.tag));
    output.report(&Report { snapshots }, show);
    Ok(ExitCode::SUCCESS)
}

/// `forkd rmi`: removes snapshots. All tags are checked before the first goes.
pub fn remove(args: &RmiArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let directories: Result<Vec<_>, SnapshotError> = args.tags.iter().map(|tag| place(&paths, tag)).collect();
    for directory in directories? {
        snapshots::remove(&paths, &directory)?;
    }
    output.report(&Removed { removed: args.tags.clone() }, |removed| {
        removed.removed.iter().map(|tag| format!("removed {tag}\n")).collect()
    });
    Ok(ExitCode::SUCCESS)
}

/// The directory of a tag, broken or not.
fn place(paths: &Paths, tag: &str) -> Result<std::path::PathBuf, SnapshotError> {
    let directory = paths.snapshot(tag)?;
    if directory.is_dir() { Ok(directory) } else { Err(SnapshotError::Unknown { tag: tag.to_owned() }) }
}

fn describe(tag: String, directory: &Path) -> Snapshot {
    let disk_bytes = std::fs::read_dir(directory).map_or(0, |entries| {
        entries.filter_map(|entry| entry.ok()?.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
    });
    let (manifest, broken) = match read_manifest(directory) {
        Ok(manifest) => (Some(manifest), None),
        Err(why) => (None, Some(why)),
    };
    let text = |field: fn(&Manifest) -> &String| manifest.as_ref().map(field).cloned().unwrap_or_default();
    Snapshot {
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
    use std::io::Read;
    let path = directory.join(forkd_fs::format::MANIFEST);
    let mut bytes = Vec::new();
    std::fs::File::open(&path)
        .and_then(|file| file.take(MAX_MANIFEST_LEN + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Manifest::parse(&bytes).map_err(|error| error.to_string())
}

fn show(report: &Report) -> String {
    if report.snapshots.is_empty() {
        return "no snapshots; `forkd build` or `forkd pull` makes one".to_owned();
    }
    let mut rows = vec![["TAG", ">MEMORY", ">DISK", "CREATED", "DESCRIPTION"].map(str::to_owned).to_vec()];
    for snapshot in &report.snapshots {
        let memory = snapshot.memory_mib.map_or_else(|| "-".to_owned(), |mib| format!("{mib} MiB"));
        let description = match &snapshot.broken {
            Some(why) => format!("unusable: {why}"),
            None => snapshot.description.clone(),
        };
        let tag = snapshot.tag.clone();
        rows.push(vec![
            tag,
            memory,
            show_size(snapshot.disk_bytes),
            snapshot.created_at.clone(),
            description,
        ]);
    }
    table(&rows)
}
