//! `forkd snapshots`: what is in the snapshot directory.

use std::process::ExitCode;

use serde::Serialize;

use crate::cli::RmiArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::snapshot_list::{self, SnapshotDescription};
use forkd_engine::local::snapshots::{self, SnapshotError};

#[derive(Debug, Serialize)]
struct Report {
    snapshots: Vec<SnapshotDescription>,
}

#[derive(Serialize)]
struct Removed {
    removed: Vec<String>,
}

/// Lists.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let snapshots = snapshot_list::list(&environment::paths()?)?;
    output.report(&Report { snapshots }, show);
    Ok(ExitCode::SUCCESS)
}

/// `forkd rmi`: removes snapshots. All tags are checked before the first goes.
pub fn remove(args: &RmiArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
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

fn show(report: &Report) -> String {
    if report.snapshots.is_empty() {
        return "no snapshots; `forkd build` or `forkd pull` makes one".to_owned();
    }
    let mut rows = vec![["TAG", ">MEMORY", ">DISK", "CREATED", "DESCRIPTION"].map(str::to_owned).to_vec()];
    let bases = report.snapshots.iter().any(|snapshot| snapshot.base.is_some());
    if bases {
        rows[0].insert(1, "BASE".to_owned());
    }
    for snapshot in &report.snapshots {
        let memory = snapshot.memory_mib.map_or_else(|| "-".to_owned(), |mib| format!("{mib} MiB"));
        let description = match &snapshot.broken {
            Some(why) => format!("unusable: {why}"),
            None => snapshot.description.clone(),
        };
        let base = snapshot.base.as_ref().map_or_else(|| "-".to_owned(), |base| base.name.clone());
        let mut row = vec![snapshot.tag.clone()];
        row.extend(bases.then_some(base));
        row.extend([memory, show_size(snapshot.disk_bytes), snapshot.created_at.clone(), description]);
        rows.push(row);
    }
    table(&rows)
}
