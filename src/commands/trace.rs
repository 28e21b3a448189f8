//! `forkd trace`: records the working set of a snapshot or pack again, with a probe that may be another than its
//! recipe's.
//!
//! A snapshot gets a new directory with its old files (as hard links) and the new trace, which takes the old one's
//! place at once: trace and hot set have to fit each other, so neither may be replaced by itself.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use forkd_fs::format::{HOTSET, MEMORY, ROOTFS, TRACE};
use forkd_fs::manifest::{Manifest, ManifestProbe};
use forkd_fs::store::{OpenError, ReadError, Store};
use forkd_fs::trace::{MAX_TRACE_LEN, PAGE_SIZE, Trace, bucket_name};
use forkd_fs::unpack::{UnpackError, unpack};
use forkd_vmm::kvm::KvmKind;
use serde::Serialize;

use super::build::{BuildCommandError, start_zygote};
use super::pack::{self, PackError};
use crate::cli::TraceArgs;
use crate::error::CommandError;
use crate::host::{self, HostError};
use crate::machine_build::Machines;
use crate::machine_build::recording::{self, TRIALS, Trials};
use crate::output::{Output, table};
use crate::packs;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::recipe::{Probe, Recipe};
use crate::registry::RegistryError;
use crate::run_dir::{RunDir, RunDirError};
use crate::scratch::Scratch;
use crate::snapshot::{
    self, CONFIGURATION_MAX, Configuration, Draft, FOREIGN_MACHINE, Held, SnapshotError, file_error,
};
use crate::tools::{Interrupt, ToolError};
use crate::units::{show_share, show_size};
use crate::workspace::{Workspace, WorkspaceError};

/// A working set could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum TraceCommandError {
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
    Build(#[from] BuildCommandError),
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

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Tag, or pack.
    name: String,
    /// The new pack; null when a snapshot was changed.
    out: Option<PathBuf>,
    trials: usize,
    /// Null when there was no trace that can be read.
    before: Option<Share>,
    after: Share,
    /// Pages that are in both.
    common_pages: u64,
}

/// A working set's share of what the images store.
#[derive(Debug, Serialize)]
struct Share {
    pages: u64,
    bytes: u64,
    /// Of the bytes that both images store, holes aside.
    share: f64,
    buckets: Vec<Bucket>,
}

#[derive(Debug, Serialize)]
struct Bucket {
    name: String,
    pages: u64,
}

/// Records.
pub fn run(args: &TraceArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let report = match (&args.tag, &args.target) {
        (Some(tag), _) => trace_snapshot(args, tag, output),
        (None, target) => trace_pack(args, target.as_deref().unwrap_or_default(), output),
    }?;
    output.report(&report, show);
    Ok(ExitCode::SUCCESS)
}

fn trace_snapshot(args: &TraceArgs, tag: &str, output: &Output) -> Result<Report, TraceCommandError> {
    let paths = Paths::from_env().map_err(SnapshotError::from)?;
    let held = Held::find(&paths, tag)?;
    let dir = held.path();
    let manifest = pack::read_manifest(&dir)?;
    let probe = probe(args, tag, &manifest)?;
    let configuration = configuration(&dir, &manifest)?;
    let machines = Machines::new(start_zygote()?, RunDir::create(&paths)?.into())?;
    let interrupt = Interrupt::watch();
    let draft = Draft::create(&paths, tag, true)?;
    link_files(&dir, draft.path())?;
    let recording = Recording { machines, configuration, probe, paths: &paths, interrupt: &interrupt };
    let report = recording.record(tag, &dir, draft.path(), output)?;
    let place = paths.snapshot(tag).map_err(SnapshotError::from)?;
    let identity = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino())).ok();
    if identity(&place) != identity(&dir) {
        return Err(TraceCommandError::Replaced { tag: tag.to_owned() });
    }
    // Ours was the last hold on the old one, which then goes at once.
    drop(held);
    draft.publish(true)?;
    Ok(report)
}

fn trace_pack(args: &TraceArgs, target: &str, output: &Output) -> Result<Report, TraceCommandError> {
    let paths = Paths::from_env().map_err(SnapshotError::from)?;
    let out = args.out.as_deref().unwrap_or(Path::new(""));
    if out.symlink_metadata().is_ok() && !args.force {
        return Err(PackError::Exists { path: out.to_owned() }.into());
    }
    let place = |source| WorkspaceError::Place { path: out.to_owned(), source };
    let zygote = start_zygote()?;
    let run_dir = Arc::new(RunDir::create(&paths)?);
    let machines = Machines::new(zygote, Arc::clone(&run_dir))?;
    let interrupt = Interrupt::watch();
    let work = Workspace::create(out, &run_dir)?;
    let runtime = super::runtime().map_err(|error| match error {
        CommandError::Runtime(source) => place(source),
        other => place(io::Error::other(other.to_string())),
    })?;
    let (manifest, chunk_size) =
        work.until(&interrupt, || runtime.block_on(take_apart(args, target, &paths, &work, output)))?;
    let members = work.members();
    let probe = probe(args, target, &manifest)?;
    let configuration = configuration(&members, &manifest)?;
    let recording = Recording { machines, configuration, probe, paths: &paths, interrupt: &interrupt };
    let mut report = recording.record(target, &members, &members, output)?;
    let options = pack::options(u64::from(chunk_size), args.level)?;
    work.until(&interrupt, || pack::write(options, &members, manifest, (&work, out), output))?;
    pack::publish(&work, out, args.force)?;
    report.out = Some(out.to_owned());
    Ok(report)
}

/// Unpacks a pack into the workspace; returns its manifest and the size of its chunks.
async fn take_apart(
    args: &TraceArgs,
    target: &str,
    paths: &Paths,
    work: &Workspace,
    output: &Output,
) -> Result<(Manifest, u32), TraceCommandError> {
    let http = packs::http_client();
    let target = packs::find(target, paths, args.hub.hub.as_deref(), &http).await?;
    let store =
        Store::open(target.location().clone(), packs::store_options(paths, &args.cache, &http)).await?;
    if store.manifest().await?.requires.is_foreign() {
        return Err(TraceCommandError::Foreign);
    }
    let progress = Progress::steps(output, "unpacking", u64::from(store.index().stored_chunk_count()));
    let done = |now: forkd_fs::store::FetchProgress| progress.to(u64::from(now.chunks_fetched));
    let manifest = unpack(&store, &work.members(), &done).await?;
    Ok((Manifest::clone(&manifest), store.index().chunk_size()))
}

/// What the trial restores are asked: what the user says, what a recipe says, what was asked when it was built.
fn probe(args: &TraceArgs, name: &str, manifest: &Manifest) -> Result<Probe, TraceCommandError> {
    if let Some(code) = &args.eval {
        return Ok(Probe { code: code.clone(), expect: None });
    }
    if let Some(path) = &args.recipe {
        let recipe = Recipe::load(path).map_err(BuildCommandError::from)?;
        return recipe.probe.ok_or_else(|| TraceCommandError::RecipeWithoutProbe { path: path.clone() });
    }
    match &manifest.probe {
        Some(ManifestProbe { code, expect }) => Ok(Probe { code: code.clone(), expect: expect.clone() }),
        None => Err(TraceCommandError::NoProbe { name: name.to_owned() }),
    }
}

/// The machine's configuration, once this host is known to be able to run it.
fn configuration(dir: &Path, manifest: &Manifest) -> Result<Configuration, TraceCommandError> {
    if manifest.requires.is_foreign() {
        return Err(TraceCommandError::Foreign);
    }
    host::check_cpu(&manifest.requires)?;
    let path = dir.join(snapshot::CONFIGURATION);
    let text = read_at_most(&path, CONFIGURATION_MAX as u64).map_err(file_error("reading", &path))?;
    let configuration = Configuration::parse(&text)?;
    configuration.check_host(KvmKind::detect())?;
    Ok(configuration)
}

fn read_at_most(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
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
        fs::hard_link(from.join(&name), &target).map_err(file_error("linking", &target))?;
    }
    Ok(())
}

/// What every recording needs.
struct Recording<'a> {
    machines: Machines,
    configuration: Configuration,
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
        output: &Output,
    ) -> Result<Report, TraceCommandError> {
        let stored = |name: &str| fs::metadata(dir.join(name)).map_or(0, |metadata| metadata.blocks() * 512);
        let stored = stored(MEMORY) + stored(ROOTFS);
        let old = read_at_most(&dir.join(TRACE), MAX_TRACE_LEN + 1).ok();
        let old = old.and_then(|bytes| Trace::decode(&bytes).ok());
        output.note(format_args!("restoring it {} times to record what a fork touches", TRIALS.len()));
        let scratch = Scratch { dir: &self.paths.cache, mib: self.configuration.scratch_mib };
        let trials = Trials { probe: Some(&self.probe), scratch, interrupt: self.interrupt };
        let new = recording::record(&self.machines, &self.configuration, dir, into, &trials)
            .map_err(|failure| BuildCommandError::of_machine(name, failure))?;
        Ok(Report {
            name: name.to_owned(),
            out: None,
            trials: TRIALS.len(),
            before: old.as_ref().map(|trace| Share::of(trace, stored)),
            common_pages: old.as_ref().map_or(0, |old| common_pages(old, &new)),
            after: Share::of(&new, stored),
        })
    }
}

impl Share {
    fn of(trace: &Trace, stored: u64) -> Share {
        let buckets = trace.regions.iter().map(|region| region.buckets.len()).max().unwrap_or(0);
        let pages = |buckets: std::ops::Range<usize>| -> u64 {
            let ranges = trace.regions.iter().flat_map(|region| region.page_ranges(buckets.clone()));
            ranges.map(|range| u64::from(range.end - range.start)).sum()
        };
        let all = pages(0..buckets);
        let bytes = all * PAGE_SIZE;
        Share {
            pages: all,
            bytes,
            share: if stored == 0 { 0.0 } else { bytes as f64 / stored as f64 },
            buckets: (0..buckets)
                .map(|at| Bucket { name: bucket_name(at), pages: pages(at..at + 1) })
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

fn show(report: &Report) -> String {
    let Report { name, before, after, common_pages, .. } = report;
    let mut rows = vec![["", ">BEFORE", ">AFTER"].map(str::to_owned).to_vec()];
    let mut row = |what: &str, of: &dyn Fn(&Share) -> Option<String>| {
        let before = before.as_ref().and_then(of).unwrap_or_else(|| "-".to_owned());
        rows.push(vec![what.to_owned(), before, of(after).unwrap_or_else(|| "-".to_owned())]);
    };
    row("pages", &|share| Some(share.pages.to_string()));
    row("bytes", &|share| Some(show_size(share.bytes)));
    row("share", &|share| Some(format!("{:.1}%", share.share * 100.0)));
    for (at, bucket) in after.buckets.iter().enumerate() {
        row(&bucket.name, &|share| share.buckets.get(at).map(|bucket| bucket.pages.to_string()));
    }
    let mut text = table(&rows);
    if let Some(before) = before {
        let (kept, of) = (show_share(*common_pages, before.pages), before.pages);
        text.push_str(&format!("{common_pages} of the {of} pages of before are in both ({kept})\n"));
    }
    text.push_str(&match &report.out {
        Some(out) => format!("{name} with the new working set: {}\n", out.display()),
        None => format!("`forkd pack --tag {name} --out FILE` packs it with the new working set\n"),
    });
    text
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
        let share = Share::of(&trace("memory.bin", &[&[1, 2, 3], &[3, 9]]), 40 * PAGE_SIZE);
        assert_eq!((share.pages, share.bytes, share.share), (4, 4 * PAGE_SIZE, 0.1));
        assert_eq!(share.buckets.iter().map(|bucket| bucket.pages).collect::<Vec<_>>(), [3, 2]);
        let nothing = Share::of(&Trace::default(), 0);
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
