//! Recording the working set of a snapshot or pack again, with a probe that may be another than its recipe's.
//!
//! A snapshot gets a new directory with its old files (as hard links) and the new trace, which takes the old one's
//! place at once: trace and hot set have to fit each other, so neither may be replaced by itself.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_fs::format::{HOTSET, MEMORY, ROOTFS, TRACE};
use forkd_fs::manifest::{Manifest, ManifestProbe};
use forkd_fs::store::{OpenError, ReadError, Store};
use forkd_fs::trace::{MAX_TRACE_LEN, PAGE_SIZE, Trace, bucket_name};
use forkd_fs::unpack::{UnpackError, unpack};
use forkd_vmm::kvm::KvmKind;
use serde::Serialize;

use crate::build::machine::Machines;
use crate::build::machine::recording::{self, TRIALS, TrialOptions};
use crate::build::pack::{self, Compression, Files, PackError};
use crate::build::recipe::{Probe, Recipe};
use crate::build::snapshot::{BuildCaller, SnapshotBuildError, start_zygote};
use crate::build::tools::ToolError;
use crate::build::whole::{WholeError, whole_files};
use crate::hub::client;
use crate::hub::registry::RegistryError;
use crate::interrupt::Interrupt;
use crate::local::host::{self, HostError};
use crate::local::lineage::BASE;
use crate::local::paths::Paths;
use crate::local::run_dir::{RunDir, RunDirError};
use crate::local::snapshots::{
    self, CONFIGURATION_MAX, FOREIGN_MACHINE, LockedSnapshot, MachineConfiguration, SnapshotDraft,
    SnapshotError, file_error, read_at_most,
};
use crate::local::workspace::{Workspace, WorkspaceError};
use crate::progress::{Amount, Progress};
use crate::target::Target;
use forkd_fs::cache::CacheOptions;
use tokio::runtime::{Handle, Runtime};

/// A working set could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RetraceError {
    /// Nothing says what to ask the machine.
    #[error("{name} has no probe: nothing says what its forks are asked")]
    NoProbe {
        /// The snapshot or pack.
        name: String,
    },
    /// The recipe has none.
    #[error("the recipe {} has no probe", path.display())]
    RecipeWithoutProbe {
        /// The recipe.
        path: PathBuf,
    },
    /// The machine is another monitor's.
    #[error("{FOREIGN_MACHINE}")]
    Foreign,
    /// Somebody has replaced the snapshot meanwhile.
    #[error("the snapshot `{tag}` was replaced while its working set was recorded")]
    Replaced {
        /// Its tag.
        tag: String,
    },
    /// The recipe, the trial restores, or this host's KVM.
    #[error(transparent)]
    Build(#[from] SnapshotBuildError),
    /// The host's processor.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The hub.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Opening the pack.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Reading the pack.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It is stored as a difference, and cannot be made whole.
    #[error(transparent)]
    Whole(#[from] WholeError),
    /// Unpacking it.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// Writing the new pack, or reading the snapshot's manifest.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The directory to work in, or the new pack's place.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// Ctrl-C.
    #[error(transparent)]
    Interrupted(#[from] ToolError),
}

/// What came of it, as `forkd trace --json` shows it.
#[derive(Debug, Serialize)]
pub struct RetraceReport {
    /// Tag, or pack.
    pub name: String,
    /// The new pack; null when a snapshot was changed.
    pub out: Option<PathBuf>,
    /// Trial restores.
    pub trials: usize,
    /// Null when there was no trace that can be read.
    pub before: Option<WorkingSetShare>,
    /// The new one.
    pub after: WorkingSetShare,
    /// Pages that are in both.
    pub common_pages: u64,
}

/// A working set's share of what the images store.
#[derive(Debug, Serialize)]
pub struct WorkingSetShare {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of the bytes that both images store, holes aside.
    pub share: f64,
    /// By the part of a fork's life in which they are touched first.
    pub buckets: Vec<TraceBucket>,
}

/// The pages that are touched first in one part of a fork's life.
#[derive(Debug, Serialize)]
pub struct TraceBucket {
    /// Which part.
    pub name: String,
    /// How many.
    pub pages: u64,
}

/// What is to be recorded again.
#[derive(Debug)]
pub struct RetraceRequest {
    /// A snapshot's tag, or a pack.
    pub target: Target,
    /// What people call it.
    pub name: String,
    /// Where the new pack goes, when the target is one.
    pub out: PathBuf,
    /// Replace a file that is there.
    pub force: bool,
    /// What the machine is asked, instead of what it was asked when it was built.
    pub eval: Option<String>,
    /// A recipe whose probe it is asked.
    pub recipe: Option<PathBuf>,
    /// The new pack's zstd level.
    pub level: i32,
    /// The chunk cache's limits.
    pub cache: CacheOptions,
}

/// Records. To be called by a process of one thread.
pub fn retrace(
    paths: &Paths,
    request: &RetraceRequest,
    caller: &dyn BuildCaller,
) -> Result<RetraceReport, RetraceError> {
    match &request.target {
        Target::Tag(tag) => retrace_snapshot(paths, request, tag, caller),
        _ => retrace_pack(paths, request, caller),
    }
}

fn retrace_snapshot(
    paths: &Paths,
    request: &RetraceRequest,
    tag: &str,
    caller: &dyn BuildCaller,
) -> Result<RetraceReport, RetraceError> {
    let held = LockedSnapshot::find(paths, tag)?;
    let dir = held.path();
    let manifest = pack::read_manifest(&dir)?;
    let probe = probe(request, &manifest)?;
    let configuration = configuration(&dir, &manifest)?;
    let zygote = start_zygote()?;
    let run_dir = Arc::new(RunDir::create(paths)?);
    let machines = Machines::new(zygote, Arc::clone(&run_dir))?;
    let interrupt = caller.interrupt();
    let draft = SnapshotDraft::create(paths, tag, true)?;
    // A child's is nobody else's to read.
    let same = fs::metadata(&dir).and_then(|old| fs::set_permissions(draft.path(), old.permissions()));
    same.map_err(file_error("protecting", draft.path()))?;
    link_files(&dir, draft.path())?;
    let place = paths.snapshot(tag).map_err(SnapshotError::from)?;
    let work = Workspace::create(&place, &run_dir)?;
    let files =
        work.until(&interrupt, || whole_files(paths, &dir, request.cache, &work, caller.progress()))?;
    let recording = Recording { machines, configuration, probe, paths, interrupt: &interrupt };
    let report = recording.record(tag, &files, draft.path(), caller.progress())?;
    let identity = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    if identity(&place) != identity(&dir) {
        return Err(RetraceError::Replaced { tag: tag.to_owned() });
    }
    // Ours was the last hold on the old one, which then goes at once.
    drop(held);
    draft.publish(true)?;
    Ok(report)
}

fn retrace_pack(
    paths: &Paths,
    request: &RetraceRequest,
    caller: &dyn BuildCaller,
) -> Result<RetraceReport, RetraceError> {
    let (name, out) = (&request.name, request.out.as_path());
    if out.symlink_metadata().is_ok() && !request.force {
        return Err(PackError::Exists { path: out.to_owned() }.into());
    }
    let place = |source| WorkspaceError::Place { path: out.to_owned(), source };
    let zygote = start_zygote()?;
    let run_dir = Arc::new(RunDir::create(paths)?);
    let machines = Machines::new(zygote, Arc::clone(&run_dir))?;
    let interrupt = caller.interrupt();
    let work = Workspace::create(out, &run_dir)?;
    let runtime = Runtime::new().map_err(place)?;
    let (manifest, chunk_size) =
        work.until(&interrupt, || take_apart(paths, request, &work, runtime.handle(), caller.progress()))?;
    let members = work.members();
    let probe = probe(request, &manifest)?;
    let configuration = configuration(&members, &manifest)?;
    let recording = Recording { machines, configuration, probe, paths, interrupt: &interrupt };
    let mut report = recording.record(name, &members, &members, caller.progress())?;
    let options = Compression { chunk_bytes: None, level: request.level }.options(chunk_size)?;
    work.until(&interrupt, || {
        let files = Files { directory: &members, manifest, base: None };
        pack::write(options, files, (&work, out), caller.progress())
    })?;
    pack::publish(&work, out, request.force)?;
    report.out = Some(out.to_owned());
    Ok(report)
}

/// Unpacks a pack into the workspace; returns its manifest and the size of its chunks.
fn take_apart(
    paths: &Paths,
    request: &RetraceRequest,
    work: &Workspace,
    runtime: &Handle,
    progress: &dyn Progress,
) -> Result<(Manifest, u32), RetraceError> {
    runtime.block_on(async {
        let http = client::http_client(paths);
        let located = request.target.locate(paths, &http).await?;
        let options = client::store_options(paths, request.cache, &http, request.target.hub());
        let store = Store::open(located.pack().clone(), options).await?;
        if store.manifest().await?.requires.is_foreign() {
            return Err(RetraceError::Foreign);
        }
        let chunks = Amount::Steps(store.index().stored_chunk_count().into());
        let task = progress.begin("unpacking", chunks);
        let done = |now: forkd_fs::store::FetchProgress| task.to(now.chunks_fetched.into());
        let manifest = unpack(&store, &work.members(), &done).await;
        store.flush_cache();
        let manifest = manifest?;
        Ok((Manifest::clone(&manifest), store.index().chunk_size()))
    })
}

/// What the trial restores are asked: what the user says, what a recipe says, what was asked when it was built.
fn probe(request: &RetraceRequest, manifest: &Manifest) -> Result<Probe, RetraceError> {
    if let Some(code) = &request.eval {
        return Ok(Probe { eval: Some(code.clone()), ..Probe::default() });
    }
    if let Some(path) = &request.recipe {
        let recipe = Recipe::load(path).map_err(SnapshotBuildError::from)?;
        let first = recipe.probe.into_iter().next();
        return first.ok_or_else(|| RetraceError::RecipeWithoutProbe { path: path.clone() });
    }
    match &manifest.probe {
        Some(ManifestProbe { code, expect }) => {
            Ok(Probe { eval: Some(code.clone()), expect: expect.clone(), ..Probe::default() })
        }
        None => Err(RetraceError::NoProbe { name: request.name.clone() }),
    }
}

/// The machine's configuration, once this host is known to be able to run it.
fn configuration(dir: &Path, manifest: &Manifest) -> Result<MachineConfiguration, RetraceError> {
    if manifest.requires.is_foreign() {
        return Err(RetraceError::Foreign);
    }
    host::check_cpu(&manifest.requires)?;
    let path = dir.join(snapshots::CONFIGURATION);
    let text = read_at_most(&path, CONFIGURATION_MAX as u64).map_err(file_error("reading", &path))?;
    let configuration = MachineConfiguration::parse(&text)?;
    configuration.check_host(KvmKind::detect())?;
    Ok(configuration)
}

/// Everything of the old snapshot but its working set.
fn link_files(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    for entry in fs::read_dir(from).map_err(file_error("listing", from))? {
        let entry = entry.map_err(file_error("listing", from))?;
        let name = entry.file_name();
        if name == TRACE || name == HOTSET {
            continue;
        }
        let target = to.join(&name);
        if name == BASE {
            fs::create_dir(&target).map_err(file_error("creating", &target))?;
            link_files(&from.join(&name), &target)?;
            continue;
        }
        fs::hard_link(from.join(&name), &target).map_err(file_error("linking", &target))?;
    }
    Ok(())
}

/// What every recording needs.
struct Recording<'a> {
    machines: Machines,
    configuration: MachineConfiguration,
    probe: Probe,
    paths: &'a Paths,
    interrupt: &'a Interrupt,
}

impl Recording<'_> {
    /// Records the snapshot in `dir`, puts trace and hot set into `into`, and compares with what was there.
    fn record(
        &self,
        name: &str,
        dir: &Path,
        into: &Path,
        progress: &dyn Progress,
    ) -> Result<RetraceReport, RetraceError> {
        let stored = |name: &str| fs::metadata(dir.join(name)).map_or(0, |metadata| metadata.blocks() * 512);
        let stored = stored(MEMORY) + stored(ROOTFS);
        let old = read_at_most(&dir.join(TRACE), MAX_TRACE_LEN + 1).ok();
        let old = old.and_then(|bytes| Trace::decode(&bytes).ok());
        progress.note(&format!("restoring it {} times to record what a fork touches", TRIALS.len()));
        let trials = TrialOptions { probe: Some(&self.probe), paths: self.paths, interrupt: self.interrupt };
        let new = recording::record(&self.machines, &self.configuration, dir, into, &trials)
            .map_err(|failure| SnapshotBuildError::of_machine(name, failure))?;
        Ok(RetraceReport {
            name: name.to_owned(),
            out: None,
            trials: TRIALS.len(),
            before: old.as_ref().map(|trace| WorkingSetShare::of(trace, stored)),
            common_pages: old.as_ref().map_or(0, |old| common_pages(old, &new)),
            after: WorkingSetShare::of(&new, stored),
        })
    }
}

impl WorkingSetShare {
    fn of(trace: &Trace, stored: u64) -> WorkingSetShare {
        let buckets = trace.regions.iter().map(|region| region.buckets.len()).max().unwrap_or(0);
        let pages = |buckets: std::ops::Range<usize>| -> u64 {
            let ranges = trace.regions.iter().flat_map(|region| region.page_ranges(buckets.clone()));
            ranges.map(|range| u64::from(range.end - range.start)).sum()
        };
        let all = pages(0..buckets);
        let bytes = all * PAGE_SIZE;
        WorkingSetShare {
            pages: all,
            bytes,
            share: if stored == 0 { 0.0 } else { bytes as f64 / stored as f64 },
            buckets: (0..buckets)
                .map(|at| TraceBucket { name: bucket_name(at), pages: pages(at..at + 1) })
                .collect(),
        }
    }
}

/// Pages that both traces name.
fn common_pages(old: &Trace, new: &Trace) -> u64 {
    let ranges = |trace: &Trace, file: &str| {
        trace.region(file).map_or_else(Vec::new, |region| region.page_ranges(0..usize::MAX))
    };
    let mut common = 0;
    for region in &new.regions {
        let (ours, theirs) = (ranges(new, &region.file), ranges(old, &region.file));
        let (mut ours, mut theirs) = (ours.iter().peekable(), theirs.iter().peekable());
        while let (Some(a), Some(b)) = (ours.peek(), theirs.peek()) {
            common += u64::from(a.end.min(b.end).saturating_sub(a.start.max(b.start)));
            if a.end <= b.end {
                ours.next()
            } else {
                theirs.next()
            };
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_fs::trace::{PageRun, RegionTrace};

    fn trace(file: &str, buckets: &[&[u32]]) -> Trace {
        let buckets = buckets.iter().map(|pages| PageRun::from_pages(pages.iter().copied())).collect();
        Trace { regions: vec![RegionTrace { file: file.to_owned(), buckets }] }
    }

    #[test]
    fn shares_count_each_page_once() {
        let share = WorkingSetShare::of(&trace("memory.bin", &[&[1, 2, 3], &[3, 9]]), 40 * PAGE_SIZE);
        assert_eq!((share.pages, share.bytes, share.share), (4, 4 * PAGE_SIZE, 0.1));
        assert_eq!(share.buckets.iter().map(|bucket| bucket.pages).collect::<Vec<_>>(), [3, 2]);
        let nothing = WorkingSetShare::of(&Trace::default(), 0);
        assert_eq!((nothing.pages, nothing.share), (0, 0.0));
    }

    #[test]
    fn common_pages_are_those_of_the_same_file() {
        let old = trace("memory.bin", &[&[1, 2, 3, 10, 11], &[20]]);
        let new = trace("memory.bin", &[&[2, 3, 4], &[11, 12, 20]]);
        assert_eq!(common_pages(&old, &new), 4);
        assert_eq!(common_pages(&new, &old), 4);
        assert_eq!(common_pages(&trace("rootfs.erofs", &[&[2]]), &new), 0);
        assert_eq!(common_pages(&Trace::default(), &new), 0);
    }
}
