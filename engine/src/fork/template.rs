//! The one place where packs and machines meet: a pack's files become the images that machines map.
//!
//! A *lazy* template reads machine state from an opened pack and lets a pager fill the images while machines run; a
//! *local* one maps the files of a snapshot on disk.

use crate::local::host::{self, HostError};
use crate::local::lineage::{self, Lineage};
use crate::local::snapshots::{
    self, CONFIGURATION_MAX, FOREIGN_MACHINE, MachineConfiguration, SnapshotError, file_error,
};
use crate::picture::timeline::EventRecorder;
use crate::target::BaseUnavailable;
use forkd_fs::index::ChunkId as PackChunk;
use forkd_fs::manifest::{Manifest, ManifestError};
use forkd_fs::prefetch;
use forkd_fs::source::Priority;
use forkd_fs::store::{ChunkData, FetchProgress, OnChunk, ReadError, Store};
use forkd_fs::trace::{Trace, TraceError};
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::memory::{Delta, ImageId, MemoryError, add_run, create_image, longest_runs};
use forkd_vmm::pager::{ImageChunk, ImageShape, Pager, PagerError, PagerStats};
use forkd_vmm::process::MachineStart;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;

mod child_snapshot;
mod hot_pages;
mod provenance;
mod quality;
mod resident;
mod store_pages;

pub use child_snapshot::{SaveChildError, SavedChild};
use hot_pages::HotPages;
use provenance::Provenance;
use quality::FaultCounts;
pub use quality::{FaultFigures, PrefetchFigures};
#[cfg(test)]
pub(crate) use resident::empty_template;
pub use resident::{ResidentError, ResidentTemplate};
pub use store_pages::UnavailableChunk;
use store_pages::{IMAGE_FILES, StorePages};

/// Largest small file that is read whole: vmstate and trace stay well below.
const SMALL_FILE_MAX: u64 = 8 << 20;
/// Threads that load chunks which machines wait for. They mostly wait for the network.
const PAGER_WORKERS: usize = 8;
/// Pause before background filling is tried again after the network failed for its whole deadline.
const FILL_RETRY: Duration = Duration::from_secs(2);

/// A template cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The snapshot's own files.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The machine is another monitor's.
    #[error("{FOREIGN_MACHINE}")]
    Foreign,
    /// The host's processor.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Reading the pack.
    #[error("reading the machine's state from the pack failed")]
    Read(#[from] ReadError),
    /// The trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The pack that a snapshot of a child is a difference from.
    #[error(transparent)]
    Base(#[from] BaseUnavailable),
    /// The pager.
    #[error("the pager cannot start")]
    Pager(#[from] PagerError),
    /// A file of the pack is larger than the machine's memory.
    #[error("the pack's {file} has {found} bytes, but its snapshot.json allows {allowed}")]
    Size {
        /// Which file.
        file: &'static str,
        /// Its size.
        found: u64,
        /// The image's size.
        allowed: u64,
    },
}

/// Where the images of a template are.
enum Images {
    Lazy {
        pager: Arc<Pager>,
        pages: Arc<StorePages>,
        trace: Trace,
        hot: Option<Arc<HotPages>>,
    },
    Local {
        files: Vec<OwnedFd>,
    },
    /// Filled by a source of somebody else's, as machines need them.
    Served {
        pager: Arc<Pager>,
    },
}

/// Fetches until everything is there, or something is damaged.
async fn fetch_all(
    store: &Arc<Store>,
    batches: &[Vec<PackChunk>],
    priority: Priority,
    install: OnChunk<'_>,
) -> Result<(), ReadError> {
    loop {
        match store.fetch(batches, priority, install).await {
            Err(error @ ReadError::Source { .. }) => {
                tracing::warn!(error = crate::chain::chain(&error), "fetching ahead is interrupted");
                tokio::time::sleep(FILL_RETRY).await;
            }
            done => return done,
        }
    }
}

/// Something machines can be forked from.
pub struct Template {
    configuration: MachineConfiguration,
    vmstate: OwnedFd,
    images: Images,
    zero_runs: Vec<Vec<(u64, u64)>>,
    complete: bool,
    /// What its machines have in their memory in place of what the image has: it is of a child's snapshot.
    delta: Option<Delta>,
    /// What it was opened from.
    provenance: Option<Provenance>,
}

impl Template {
    /// Opens a snapshot on this machine's disk.
    pub fn open_local(dir: &Path, host: KvmKind) -> Result<Template, TemplateError> {
        let open = |name: &str| open_file(&dir.join(name));
        let manifest = match manifest_of(dir) {
            Ok(manifest) if manifest.requires.is_foreign() => return Err(TemplateError::Foreign),
            Ok(manifest) => Some(manifest),
            Err(Some(ManifestError::Version { found })) if found < forkd_fs::format::PACK_VERSION => {
                return Err(TemplateError::Foreign);
            }
            // Nothing else about it is of any matter here.
            Err(_) => None,
        };
        manifest.as_ref().map(|manifest| host::check_cpu(&manifest.requires)).transpose()?;
        let configuration = configuration_in(dir, host)?;
        let vmstate = open(snapshots::VMSTATE)?.into();
        let delta = delta_in(dir, &configuration)?;
        let image_dir = lineage::image_dir(dir);
        let mut files = Vec::new();
        for id in images_of(&configuration) {
            let name = IMAGE_FILES[id.index()];
            let file = match id {
                ImageId::Ram => open_file(&image_dir.join(name))?,
                ImageId::RootDisk => open(name)?,
            };
            // Reading past the end of a mapped file kills the reader, so the lengths must agree exactly.
            let found = file.metadata().map_err(file_error("reading the size of", &dir.join(name)))?.len();
            let allowed = configuration.layout.image_bytes(id);
            if found != allowed {
                return Err(TemplateError::Size { file: name, found, allowed });
            }
            files.push(file.into());
        }
        let trace = File::open(dir.join(snapshots::TRACE)).ok();
        let provenance = Provenance::of_snapshot(manifest, Lineage::read(dir)?, trace);
        let (images, zero_runs) = (Images::Local { files }, Vec::new());
        Ok(Template { configuration, vmstate, images, zero_runs, complete: true, delta, provenance })
    }

    /// Opens the snapshot of a child in `dir`, whose base is this pack.
    pub async fn open_on_pack(
        dir: &Path,
        store: Arc<Store>,
        runtime: Handle,
        host: KvmKind,
    ) -> Result<Template, TemplateError> {
        let configuration = configuration_in(dir, host)?;
        let delta = delta_in(dir, &configuration)?;
        let path = dir.join(snapshots::VMSTATE);
        let vmstate = File::open(&path).map_err(file_error("opening", &path))?.into();
        let base = Template::open_pack(store, runtime, host).await?;
        if base.configuration.layout != configuration.layout {
            return Err(SnapshotError::OtherMachine { dir: dir.to_owned() }.into());
        }
        let provenance = Provenance::of_snapshot(manifest_of(dir).ok(), Lineage::read(dir)?, None);
        Ok(Template { configuration, vmstate, delta, provenance, ..base })
    }

    /// Opens a pack whose images will be filled as machines need them.
    pub async fn open_pack(
        store: Arc<Store>,
        runtime: Handle,
        host: KvmKind,
    ) -> Result<Template, TemplateError> {
        hot_pages::ask_early(&store);
        let names = [snapshots::CONFIGURATION, snapshots::VMSTATE, snapshots::TRACE];
        // At once: both lie at the start of the pack, and a pack of a foreign machine need not have the others.
        let (manifest, small) = tokio::join!(store.manifest(), store.read_files(&names, SMALL_FILE_MAX));
        let manifest = manifest?;
        let requires = &manifest.requires;
        if requires.is_foreign() {
            return Err(TemplateError::Foreign);
        }
        host::check_cpu(requires)?;
        let small = small?;
        let [configuration, vmstate, trace] = &small[..] else {
            return Err(ReadError::NoSuchFile { name: snapshots::VMSTATE.to_owned() }.into());
        };
        let configuration =
            MachineConfiguration::parse(&configuration[..configuration.len().min(CONFIGURATION_MAX)])?;
        configuration.check_host(host)?;
        let trace = Trace::decode(trace)?;
        let vmstate_file = create_image("forkd-vmstate", vmstate.len() as u64)?;
        let written = rustix::io::pwrite(&vmstate_file, vmstate, 0);
        written.map_err(|errno| file_error("writing", Path::new("the vmstate"))(errno.into()))?;

        let index = store.index();
        let chunk_bytes = u64::from(index.chunk_size());
        let mut shapes = Vec::new();
        let mut files = Vec::new();
        for id in images_of(&configuration) {
            let file = index.file(IMAGE_FILES[id.index()]);
            let found = file.and_then(|file| index.entry(file)).map_or(0, |entry| entry.size);
            let allowed = configuration.layout.image_bytes(id);
            if found > allowed {
                return Err(TemplateError::Size { file: IMAGE_FILES[id.index()], found, allowed });
            }
            shapes.push((id, ImageShape { bytes: allowed, chunk_bytes }));
            files.push(file);
        }
        let of_images = shapes.iter().map(|(_, shape)| *shape).collect();
        let (unavailable, recorder) = (Mutex::default(), OnceLock::new());
        let faults = FaultCounts::new(&trace, &IMAGE_FILES, chunk_bytes);
        let pages =
            Arc::new(StorePages { store, runtime, files, shapes: of_images, unavailable, recorder, faults });
        let zero_runs = shapes.iter().map(|(id, shape)| zero_runs(&pages, *id, shape)).collect();
        let pager = Arc::new(Pager::new(&shapes, pages.clone(), PAGER_WORKERS)?);
        let hot = HotPages::of_pack(&pages, &trace).map(Arc::new);
        if let Some(hot) = &hot {
            // What the first instructions need. It came with the index: without it every child would fault at once.
            let install =
                |chunk: PackChunk, data: ChunkData| hot.install_chunk(&pager, &pages, chunk.chunk, &data);
            pages.store.fetch(&[hot.first()], Priority::Demand, &install).await?;
        }
        let provenance = Some(Provenance::of_pack(Manifest::clone(&manifest)));
        let images = Images::Lazy { pager, pages, trace, hot };
        let vmstate = vmstate_file;
        Ok(Template { configuration, vmstate, images, zero_runs, complete: false, delta: None, provenance })
    }

    /// A machine whose images `pager` fills from a source of the caller's.
    pub fn served(configuration: MachineConfiguration, vmstate: OwnedFd, pager: Arc<Pager>) -> Template {
        let (images, zero_runs) = (Images::Served { pager }, Vec::new());
        Template { configuration, vmstate, images, zero_runs, complete: false, delta: None, provenance: None }
    }

    /// Fills the images: at once what the trace names, and after `rest_wanted` the rest; then ends all watching. Goes on
    /// trying as long as the network is away; ends early only when chunks are damaged. Returns whether nothing is missing.
    pub fn fill(
        &self,
        rest_wanted: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = Result<bool, ReadError>> + Send + 'static {
        let lazy = match &self.images {
            Images::Lazy { pager, pages, trace, hot } => {
                Some((pager.clone(), pages.clone(), trace.clone(), hot.clone()))
            }
            Images::Local { .. } | Images::Served { .. } => None,
        };
        async move {
            let Some((pager, pages, trace, hot)) = lazy else { return Ok(true) };
            let index = pages.store.index();
            let hot_rest = hot.as_ref().and_then(|hot| hot.rest());
            let working_set = hot_rest.map_or_else(|| prefetch::plan(index, &trace), |rest| vec![rest]);
            let rest = vec![prefetch::remaining(index, &working_set)];
            let install = |chunk: PackChunk, data: ChunkData| {
                if let Some(hot) = hot.as_ref().filter(|hot| hot.file == chunk.file) {
                    hot.install_chunk(&pager, &pages, chunk.chunk, &data);
                    return;
                }
                let Some(id) = pages.image_chunk(chunk) else { return };
                if !pages.is_zero(id)
                    && let Err(error) = pager.install(id, &pages.content(id, data))
                {
                    tracing::error!(?id, %error, "a fetched chunk could not be put in place");
                }
            };
            fetch_all(&pages.store, &working_set, Priority::WorkingSet, &install).await?;
            rest_wanted.await;
            fetch_all(&pages.store, &rest, Priority::Prefetch, &install).await?;
            // Chunks that could not be put in place (memory was short) are loaded when they are needed.
            Ok(pager.complete(|id| pages.is_zero(id)))
        }
    }

    /// Has what machines wait for recorded from now on.
    pub fn record_in(&self, recorder: &Arc<EventRecorder>) {
        if let Images::Lazy { pages, .. } = &self.images {
            pages.recorder.get_or_init(|| Arc::clone(recorder));
        }
    }

    /// After [`Template::fill`] has returned true, machines need no pager at all.
    pub fn set_complete(&mut self) {
        self.complete = true;
    }

    /// What its machines have in place of what the image has.
    pub fn delta(&self) -> Option<&Delta> {
        self.delta.as_ref()
    }

    /// How machines of this template start that have `delta` in place of what the image has.
    pub fn start(&self, delta: Option<&Delta>) -> MachineStart {
        let delta_runs = delta.map_or(0, |delta| delta.runs().len());
        MachineStart::Restore { lazy: !self.complete, zero_runs: self.zero_runs.clone(), delta_runs }
    }

    /// The machine's configuration.
    pub fn configuration(&self) -> &MachineConfiguration {
        &self.configuration
    }

    /// The machine's saved state.
    pub fn vmstate(&self) -> BorrowedFd<'_> {
        self.vmstate.as_fd()
    }

    /// The files to be mapped, in image order.
    pub fn images(&self) -> Vec<BorrowedFd<'_>> {
        match &self.images {
            Images::Lazy { pager, .. } | Images::Served { pager } => {
                ImageId::ALL.iter().filter_map(|id| pager.image_file(*id)).collect()
            }
            Images::Local { files } => files.iter().map(AsFd::as_fd).collect(),
        }
    }

    /// The pager, when images are filled lazily.
    pub fn pager(&self) -> Option<&Arc<Pager>> {
        match &self.images {
            Images::Lazy { pager, .. } | Images::Served { pager } => Some(pager),
            Images::Local { .. } => None,
        }
    }

    /// Counters of the pager.
    pub fn pager_stats(&self) -> PagerStats {
        self.pager().map(|pager| pager.stats()).unwrap_or_default()
    }

    /// Faults that machines had to wait for.
    pub fn fault_figures(&self) -> FaultFigures {
        match &self.images {
            Images::Lazy { pages, .. } => pages.faults.figures(),
            Images::Local { .. } | Images::Served { .. } => FaultFigures::default(),
        }
    }

    /// The pages of the hot set that have been fetched, and how many of them the processes `pids` have mapped.
    pub fn prefetch_figures(&self, pids: &[i32]) -> PrefetchFigures {
        match &self.images {
            Images::Lazy { pager, hot: Some(hot), .. } => quality::measure(pager, &hot.fetched(), pids),
            _ => PrefetchFigures::default(),
        }
    }

    /// How far the pack is fetched.
    pub fn progress(&self) -> FetchProgress {
        match &self.images {
            Images::Lazy { pages, .. } => pages.store.progress(),
            Images::Local { .. } | Images::Served { .. } => FetchProgress::default(),
        }
    }

    /// Chunks that machines wait for and that will not come, since the last call.
    pub fn take_unavailable(&self) -> Vec<UnavailableChunk> {
        match &self.images {
            Images::Lazy { pages, .. } => {
                std::mem::take(&mut *pages.unavailable.lock().unwrap_or_else(PoisonError::into_inner))
            }
            Images::Local { .. } | Images::Served { .. } => Vec::new(),
        }
    }

    /// The file in a pack or snapshot behind an image.
    pub fn image_name(image: ImageId) -> &'static str {
        IMAGE_FILES[image.index()]
    }
}

/// A snapshot's manifest. One unpacked from a pack of the predecessor is of an older version. `None`: it cannot be read.
fn manifest_of(dir: &Path) -> Result<Manifest, Option<ManifestError>> {
    let bytes = snapshots::manifest_bytes(dir).map_err(|_| None)?;
    Manifest::parse(&bytes).map_err(Some)
}

fn open_file(path: &Path) -> Result<File, SnapshotError> {
    File::open(path).map_err(file_error("opening", path))
}

fn configuration_in(dir: &Path, host: KvmKind) -> Result<MachineConfiguration, SnapshotError> {
    let path = dir.join(snapshots::CONFIGURATION);
    let configuration = std::fs::read(&path).map_err(file_error("reading", &path))?;
    let configuration = MachineConfiguration::parse(&configuration)?;
    configuration.check_host(host)?;
    Ok(configuration)
}

/// What a snapshot's memory has in place of what its base's has, where it is a child's.
fn delta_in(dir: &Path, configuration: &MachineConfiguration) -> Result<Option<Delta>, TemplateError> {
    let path = dir.join(lineage::DELTA);
    match File::open(&path) {
        Ok(file) => Ok(Some(Delta::open(file.into(), configuration.layout.ram_bytes())?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error("opening", &path)(error).into()),
    }
}

fn images_of(configuration: &MachineConfiguration) -> impl Iterator<Item = ImageId> + use<> {
    let layout = configuration.layout;
    ImageId::ALL.into_iter().filter(move |id| layout.image_bytes(*id) > 0)
}

/// Runs of chunks that the pack does not store, in bytes of the image, the longest ones.
fn zero_runs(pages: &StorePages, id: ImageId, shape: &ImageShape) -> Vec<(u64, u64)> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for chunk in (0..shape.chunks()).filter(|chunk| pages.is_zero(ImageChunk { image: id, chunk: *chunk })) {
        let start = chunk * shape.chunk_bytes;
        let end = (start + shape.chunk_bytes).min(shape.bytes);
        add_run(&mut runs, start..end);
    }
    longest_runs(runs).into_iter().map(|run| (run.start, run.end)).collect()
}
