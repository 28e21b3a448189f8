//! The files of a snapshot that is stored as a difference, as those of any other: for whoever packs or records it.

use crate::local::lineage::{Base, BasePack, DELTA, Lineage, image_dir};
use crate::local::paths::Paths;
use crate::local::snapshots::{MEMORY, ROOT_DISK, SnapshotError, file_error};
use crate::local::whole_memory;
use crate::local::workspace::Workspace;
use crate::progress::{Amount, Progress};
use crate::target::{BaseUnavailable, OpenOptions, open_base};
use forkd_fs::cache::CacheOptions;
use forkd_fs::unpack::{UnpackError, unpack};
use forkd_vmm::memory::{Delta, MemoryError};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tokio::runtime::Runtime;

/// The files cannot be made whole.
#[derive(Debug, thiserror::Error)]
pub enum WholeError {
    /// A file of the snapshot, or of its copy.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What differs cannot be read.
    #[error(transparent)]
    Delta(#[from] MemoryError),
    /// The async runtime.
    #[error("the async runtime does not start")]
    Runtime(#[source] io::Error),
    /// The pack that it is a difference from.
    #[error(transparent)]
    Base(#[from] BaseUnavailable),
    /// The same, unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
}

/// Where the files of the snapshot in `dir` are: there, unless they are a difference; otherwise in `work`.
pub fn whole_files(
    paths: &Paths,
    dir: &Path,
    cache: CacheOptions,
    work: &Workspace,
    progress: &dyn Progress,
) -> Result<PathBuf, WholeError> {
    let Some(base) = Lineage::read(dir)?.and_then(|lineage| lineage.base) else {
        return Ok(dir.to_owned());
    };
    let whole = work.members();
    // What was in a child's memory is nobody else's to read.
    let private = fs::set_permissions(&whole, Permissions::from_mode(0o700));
    private.map_err(file_error("protecting", &whole))?;
    let delta_path = dir.join(DELTA);
    let delta = File::open(&delta_path).map_err(file_error("opening", &delta_path))?;
    let base_dir = match &base.pack {
        Some(pack) => unpack_base(paths, &base, pack, cache, work, progress)?,
        None => image_dir(dir),
    };
    let task = progress.begin("joining what differs with its base", Amount::Bytes(0));
    let (from, to) = (base_dir.join(MEMORY), whole.join(MEMORY));
    let image = File::open(&from).map_err(file_error("opening", &from))?;
    let bytes = image.metadata().map_err(file_error("reading the size of", &from))?.len();
    task.limit(bytes);
    let delta = Delta::open(delta.into(), bytes)?;
    let memory = File::create_new(&to).map_err(file_error("creating", &to))?;
    let done = std::cell::Cell::new(0);
    let written = |bytes| {
        done.set(done.get() + bytes);
        task.to(done.get());
    };
    whole_memory::write(&image, Some(&delta), bytes, &memory, &written)
        .map_err(file_error("writing", &to))?;
    let disk_dir = if base.pack.is_some() { &base_dir } else { dir };
    link_or_copy(&disk_dir.join(ROOT_DISK), &whole.join(ROOT_DISK))?;
    link_others(dir, &whole)?;
    Ok(whole)
}

/// The small files, which are the snapshot's own.
fn link_others(dir: &Path, whole: &Path) -> Result<(), SnapshotError> {
    for entry in fs::read_dir(dir).map_err(file_error("listing", dir))? {
        let name = entry.map_err(file_error("listing", dir))?.file_name();
        let hidden = name.to_string_lossy().starts_with('.');
        if !hidden && name != MEMORY && name != ROOT_DISK {
            link_or_copy(&dir.join(&name), &whole.join(&name))?;
        }
    }
    Ok(())
}

/// Nobody changes either: a snapshot's files never change.
fn link_or_copy(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    match fs::hard_link(from, to) {
        // It has no root disk.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(_) => fs::copy(from, to).map(drop).map_err(file_error("copying", from)),
        Ok(()) => Ok(()),
    }
}

/// Downloads and checks the base.
fn unpack_base(
    paths: &Paths,
    base: &Base,
    pack: &BasePack,
    cache: CacheOptions,
    work: &Workspace,
    progress: &dyn Progress,
) -> Result<PathBuf, WholeError> {
    let runtime = Runtime::new().map_err(WholeError::Runtime)?;
    let into = work.unpacked();
    runtime.block_on(async {
        let options = OpenOptions { cache, observer: None };
        let (store, _) = open_base(paths, &base.name, pack, options).await?;
        let chunks = Amount::Steps(store.index().stored_chunk_count().into());
        let task = progress.begin("unpacking its base", chunks);
        let done = |now: forkd_fs::store::FetchProgress| task.to(now.chunks_fetched.into());
        let unpacked = unpack(&store, &into, &done).await;
        store.flush_cache();
        unpacked?;
        Ok(into.clone())
    })
}
