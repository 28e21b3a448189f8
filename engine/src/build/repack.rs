//! Repacking: a pack of any format version into one of this version.
//!
//! The pack is taken apart in a directory beside the new one, each member checked as far as the old format allows, and
//! put together again as [`crate::build::pack`] does. The predecessor's packs (v1, v2) carry the state of a machine that forkd
//! cannot restore; the new pack says so, and mounts, inspects and unpacks like any other.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_fs::format::{DEFAULT_CHUNK_SIZE, MANIFEST, MEMORY, PACK_VERSION, is_plain_name};
use forkd_fs::legacy::{self, LegacyMember, LegacyPack};
use forkd_fs::manifest::{FOREIGN_VMSTATE, KvmKind, Manifest, ManifestError, Requires};
use forkd_fs::source::redact_url;
use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::writer::PackOptions;
use serde::Serialize;
use tokio::runtime::Handle;

use crate::build::pack::{self, Compression, Files, PackError, PackReport};
use crate::build::unpack::{LEGACY_LIMIT, UnpackPackError, take_out};
use crate::hub::client;
use crate::hub::download::{Download, DownloadError, registered_digest};
use crate::hub::registry::RegistryError;
use crate::interrupt::Interrupt;
use crate::local::paths::Paths;
use crate::local::run_dir::{RunDir, RunDirError};
use crate::local::snapshots::FOREIGN_MACHINE;
use crate::local::workspace::{Workspace, WorkspaceError};
use crate::progress::{Amount, Progress, Task};
use crate::target::{LocatedPack, Target, shown_name};
use forkd_fs::cache::CacheOptions;

/// The predecessor's own manifest in the new pack: it tells of chains and root disks, which ours does not.
const OLD_MANIFEST: &str = "manifest.old.toml";
/// The predecessor's root disk.
const OLD_ROOT_DISK: &str = "rootfs.ext4";

/// Why a pack cannot be repacked.
#[derive(Debug, thiserror::Error)]
pub enum RepackError {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The old pack cannot be read.
    #[error(transparent)]
    Unpack(#[from] UnpackPackError),
    /// The old pack cannot be downloaded.
    #[error(transparent)]
    Download(#[from] DownloadError),
    /// The new pack cannot be written.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The directory to work in.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
    /// A file in it, or the old pack.
    #[error("{}", path.display())]
    Place {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The new pack's path is a directory.
    #[error("{} is a directory", path.display())]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// A link of a chain has a name too long for the new format.
    #[error("its member {member} cannot be named in a pack of format {PACK_VERSION}")]
    Name {
        /// The member.
        member: String,
    },
    /// What the old manifest says does not fit into a new one.
    #[error("its manifest cannot be translated")]
    Manifest(#[source] ManifestError),
}

/// What is to be repacked, and how.
#[derive(Debug)]
pub struct RepackRequest {
    /// The old pack.
    pub target: Target,
    /// What people call it.
    pub name: String,
    /// The new pack.
    pub out: PathBuf,
    /// Replace what is there.
    pub force: bool,
    /// How the new one is compressed.
    pub compression: Compression,
    /// The chunk cache's limits.
    pub cache: CacheOptions,
}

/// What came of it, as `forkd repack --json` shows it.
#[derive(Debug, Serialize)]
pub struct RepackReport {
    /// The old pack.
    pub source: String,
    /// `forkd_pack_version` of the old pack.
    pub source_format: u32,
    /// The machine's name.
    pub tag: String,
    /// Whether its machine can be restored.
    pub forkable: bool,
    /// What the old pack lacks, and what became of what it has.
    pub notes: Vec<String>,
    /// The new pack.
    #[serde(flatten)]
    pub pack: PackReport,
}

/// A pack taken apart.
struct Unpacked {
    format: u32,
    manifest: Manifest,
    notes: Vec<String>,
}

/// An old pack at hand.
enum Input {
    /// One with an index.
    Indexed(Arc<Store>),
    /// One of the predecessor: its file, and what to call it.
    Legacy { file: PathBuf, name: String, _download: Option<Download> },
}

/// Repacks.
pub fn repack(
    paths: &Paths,
    request: &RepackRequest,
    runtime: &Handle,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<RepackReport, RepackError> {
    let options = request.compression.options(DEFAULT_CHUNK_SIZE)?;
    let out = &request.out;
    if out.is_dir() {
        return Err(RepackError::Directory { path: out.clone() });
    }
    if out.symlink_metadata().is_ok() && !request.force {
        return Err(PackError::Exists { path: out.clone() }.into());
    }
    let work = Workspace::create(out, &Arc::new(RunDir::create(paths)?))?;
    work.until(interrupt, || {
        let Unpacked { format, manifest, notes } =
            runtime.block_on(take_apart(paths, request, &work, progress))?;
        let (tag, forkable) = (manifest.tag.clone(), !manifest.requires.is_foreign());
        let pack = put_together(request, &work, options, manifest, progress)?;
        let source = shown_name(&request.name);
        Ok(RepackReport { source, source_format: format, tag, forkable, notes, pack })
    })
}

fn place(path: &Path) -> impl FnOnce(io::Error) -> RepackError {
    let path = path.to_owned();
    move |source| RepackError::Place { path, source }
}

/// The old pack's members in the workspace, and the new pack's manifest.
async fn take_apart(
    paths: &Paths,
    request: &RepackRequest,
    work: &Workspace,
    progress: &dyn Progress,
) -> Result<Unpacked, RepackError> {
    match obtain(paths, request, work, progress).await? {
        Input::Indexed(store) => {
            let manifest = take_out(&store, &work.members(), "unpacking", progress).await;
            let manifest = Manifest::clone(&*manifest.map_err(UnpackPackError::from)?);
            let notes = manifest.requires.is_foreign().then(|| FOREIGN_MACHINE.to_owned());
            Ok(Unpacked { format: manifest.forkd_pack_version, manifest, notes: notes.into_iter().collect() })
        }
        Input::Legacy { file, name, _download } => from_legacy(&file, &name, work, progress),
    }
}

/// Opens the pack; downloads it first when it cannot be read or checked in part.
async fn obtain(
    paths: &Paths,
    request: &RepackRequest,
    work: &Workspace,
    progress: &dyn Progress,
) -> Result<Input, RepackError> {
    let http = client::http_client(paths);
    let located = request.target.locate(paths, &http).await?;
    let location = located.pack().clone();
    let options = client::store_options(paths, request.cache, &http, request.target.hub());
    if let LocatedPack::Registered(resolved) = &located
        && resolved.location.index.is_none()
    {
        match registered_digest(resolved)? {
            Some(digest) => {
                let download = Download::fetch(resolved, Some(digest), paths, &http, progress).await;
                return downloaded(download?, options, resolved.reference.to_string()).await;
            }
            None => progress.note(&format!(
                "the registry has no digest of {}: it is taken as it comes",
                resolved.reference
            )),
        }
    }
    match (Store::open(location.clone(), options).await, &location.source) {
        (Ok(store), _) => Ok(Input::Indexed(store)),
        (Err(OpenError::Legacy { .. }), PackSource::Path(path)) => {
            Ok(Input::Legacy { file: path.clone(), name: path.display().to_string(), _download: None })
        }
        (Err(OpenError::Legacy { .. }), PackSource::Url(url)) => {
            let download = Download::fetch_unknown(&location, work.path(), &http, progress).await;
            downloaded(download?, StoreOptions::default(), redact_url(url)).await
        }
        (Err(error), _) => Err(UnpackPackError::from(error).into()),
    }
}

async fn downloaded(download: Download, options: StoreOptions, name: String) -> Result<Input, RepackError> {
    let file = download.path().to_owned();
    let location = PackLocation { source: PackSource::Path(file.clone()), size: None, index: None };
    match Store::open(location, options).await {
        Ok(store) => Ok(Input::Indexed(store)),
        Err(OpenError::Legacy { .. }) => Ok(Input::Legacy { file, name, _download: Some(download) }),
        Err(error) => Err(UnpackPackError::from(error).into()),
    }
}

/// A file that tells how far it is while it is read.
struct Watched<'a> {
    file: File,
    done: u64,
    task: &'a dyn Task,
}

impl Read for Watched<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(into)?;
        self.done += read as u64;
        self.task.to(self.done);
        Ok(read)
    }
}

fn from_legacy(
    path: &Path,
    name: &str,
    work: &Workspace,
    progress: &dyn Progress,
) -> Result<Unpacked, RepackError> {
    let file = File::open(path).map_err(place(path))?;
    let size = file.metadata().map_err(place(path))?.len();
    let task = progress.begin("unpacking", Amount::Bytes(size));
    let data = Watched { file, done: 0, task: &*task };
    let pack = legacy::unpack_from(Path::new(name), data, &work.unpacked(), LEGACY_LIMIT)
        .map_err(UnpackPackError::from)?;
    for member in &pack.members {
        let new_name = new_name(member)?;
        let from = work.unpacked().join(member.path());
        fs::rename(&from, work.members().join(new_name)).map_err(place(&from))?;
    }
    let format = pack.manifest.forkd_pack_version;
    Ok(Unpacked { format, notes: notes(&pack), manifest: translate(pack) })
}

/// What a member is called in the new pack, whose names are plain: `TAG/NAME` becomes `TAG.NAME`.
fn new_name(member: &LegacyMember) -> Result<String, RepackError> {
    let name = match &member.tag {
        None if member.name == MANIFEST => OLD_MANIFEST.to_owned(),
        None => member.name.to_owned(),
        Some(tag) => format!("{tag}.{}", member.name),
    };
    match is_plain_name(&name) {
        true => Ok(name),
        false => Err(RepackError::Name { member: member.path() }),
    }
}

/// The manifest in the words of this format. What the old one does not say is empty or zero.
fn translate(pack: LegacyPack) -> Manifest {
    let memory = pack.members.iter().filter(|member| member.name == MEMORY).map(|member| member.size);
    let LegacyPack { manifest: old, .. } = &pack;
    Manifest {
        forkd_pack_version: PACK_VERSION,
        tag: old.tag.clone(),
        description: old.description.clone(),
        base_image: old.base_image.clone(),
        created_at: old.created_at.clone(),
        forkd_version: old.forkd_version.clone(),
        requires: Requires {
            memory_mib: memory.max().unwrap_or(0).div_ceil(1 << 20),
            vcpus: 0,
            // Firecracker runs on nothing else.
            kvm_kind: KvmKind::Hardware,
            kernel: String::new(),
            vmstate_version: FOREIGN_VMSTATE,
            cpu_features: Vec::new(),
            cpu_vendor: String::new(),
        },
        files: Vec::new(),
        probe: None,
    }
}

fn notes(pack: &LegacyPack) -> Vec<String> {
    let mut notes = vec![format!("it cannot be forked: {FOREIGN_MACHINE}")];
    notes.push(match pack.members.iter().any(|member| member.name == OLD_ROOT_DISK) {
        true => {
            "its root disk is ext4: a file of the pack, which a mount does not show as rootfs/".to_owned()
        }
        false => "its root disk is not in it".to_owned(),
    });
    if let Some(member) = pack.members.iter().find(|member| member.tag.is_some()) {
        notes.push(format!(
            "members of a chain are named TAG.NAME, as in {}",
            member.path().replace('/', ".")
        ));
    }
    notes.push(format!("its own manifest is {OLD_MANIFEST}"));
    notes
}

fn put_together(
    request: &RepackRequest,
    work: &Workspace,
    options: PackOptions,
    manifest: Manifest,
    progress: &dyn Progress,
) -> Result<PackReport, RepackError> {
    let files = Files { directory: &work.members(), manifest, base: None };
    let summary = pack::write(options, files, (work, &request.out), progress)?;
    // Text from outside has become longer by escapes and the list of files: it must still be one that can be read.
    Manifest::parse(summary.manifest.to_toml().as_bytes()).map_err(RepackError::Manifest)?;
    pack::publish(work, &request.out, request.force)?;
    Ok(PackReport::new(&request.out, &summary))
}
