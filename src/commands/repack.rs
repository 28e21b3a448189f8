//! `forkd repack`: a pack of any format version into one of this version.
//!
//! The pack is taken apart in a directory beside the new one, each member checked as far as the old format allows, and
//! put together again as `forkd pack` does. The predecessor's packs (v1, v2) carry the state of a machine that forkd
//! cannot restore; the new pack says so, and mounts, inspects and unpacks like any other.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use forkd_fs::format::{MANIFEST, MEMORY, PACK_VERSION, is_plain_name};
use forkd_fs::legacy::{self, LegacyMember, LegacyPack};
use forkd_fs::manifest::{FOREIGN_VMSTATE, KvmKind, Manifest, ManifestError, Requires};
use forkd_fs::source::redact_url;
use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::unpack::unpack;
use serde::Serialize;

use super::pack::{self, PackError};
use super::pull::PullError;
use super::unpack::{LEGACY_LIMIT, UnpackCommandError};
use crate::cli::RepackArgs;
use crate::download::Download;
use crate::error::CommandError;
use crate::output::Output;
use crate::packs::{self, Target};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::registry::{Resolved, whole_digest};
use crate::run_dir::RunDir;
use crate::snapshot::FOREIGN_MACHINE;
use crate::tools::Interrupt;
use crate::workspace::{Workspace, WorkspaceError};

/// The predecessor's own manifest in the new pack: it tells of chains and root disks, which ours does not.
const OLD_MANIFEST: &str = "manifest.old.toml";
/// The predecessor's root disk.
const OLD_ROOT_DISK: &str = "rootfs.ext4";

/// Why a pack cannot be repacked.
#[derive(Debug, thiserror::Error)]
pub enum RepackError {
    /// The old pack cannot be read.
    #[error(transparent)]
    Unpack(#[from] UnpackCommandError),
    /// The old pack cannot be downloaded.
    #[error(transparent)]
    Pull(#[from] PullError),
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

/// What `forkd repack --json` prints.
#[derive(Debug, Serialize)]
struct Report {
    source: String,
    source_format: u32,
    tag: String,
    /// Whether `forkd fork` can restore its machine.
    forkable: bool,
    /// What the old pack lacks, and what became of what it has.
    notes: Vec<String>,
    #[serde(flatten)]
    pack: pack::Report,
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
pub fn run(args: &RepackArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let options = pack::options(args.chunk, args.level).map_err(RepackError::from)?;
    let out = &args.out;
    if out.is_dir() {
        return Err(RepackError::Directory { path: out.clone() }.into());
    }
    if out.symlink_metadata().is_ok() && !args.force {
        return Err(RepackError::from(PackError::Exists { path: out.clone() }).into());
    }
    let runtime = super::runtime()?;
    let interrupt = Interrupt::watch();
    let run_dir = RunDir::create(&Paths::from_env()?)?;
    let work = Workspace::create(out, &Arc::new(run_dir)).map_err(RepackError::from)?;
    let report = work.until(&interrupt, || -> Result<Report, CommandError> {
        let Unpacked { format, manifest, notes } = runtime.block_on(take_apart(args, &work, output))?;
        let (tag, forkable) = (manifest.tag.clone(), !manifest.requires.is_foreign());
        let pack = put_together(args, &work, options, manifest, output)?;
        let source = redact(&args.target);
        Ok(Report { source, source_format: format, tag, forkable, notes, pack })
    })?;
    for note in &report.notes {
        output.note(format!("note: {note}"));
    }
    output.report(&report, |report| {
        report.pack.line(&format!("repacked {} (v{})", report.source, report.source_format))
    });
    Ok(ExitCode::SUCCESS)
}

fn place(path: &Path) -> impl FnOnce(io::Error) -> RepackError {
    let path = path.to_owned();
    move |source| RepackError::Place { path, source }
}

fn redact(target: &str) -> String {
    if target.contains("://") { redact_url(target) } else { target.to_owned() }
}

/// The old pack's members in the workspace, and the new pack's manifest.
async fn take_apart(args: &RepackArgs, work: &Workspace, output: &Output) -> Result<Unpacked, CommandError> {
    match obtain(args, work, output).await? {
        Input::Indexed(store) => {
            let progress = Progress::bytes(output, "unpacking", store.index().stored_bytes());
            let done = |now: forkd_fs::store::FetchProgress| {
                let share = f64::from(now.chunks_fetched) / f64::from(now.chunks_total.max(1));
                progress.to((store.index().stored_bytes() as f64 * share) as u64);
            };
            let manifest = unpack(&store, &work.members(), &done).await;
            let manifest = Manifest::clone(&*manifest.map_err(UnpackCommandError::from)?);
            let notes = manifest.requires.is_foreign().then(|| FOREIGN_MACHINE.to_owned());
            Ok(Unpacked { format: manifest.forkd_pack_version, manifest, notes: notes.into_iter().collect() })
        }
        Input::Legacy { file, name, _download } => Ok(from_legacy(&file, &name, work, output)?),
    }
}

/// Opens the pack; downloads it first when it cannot be read or checked in part.
async fn obtain(args: &RepackArgs, work: &Workspace, output: &Output) -> Result<Input, CommandError> {
    let (paths, http) = (Paths::from_env()?, packs::http_client());
    let target = packs::find(&args.target, &paths, args.hub.hub.as_deref(), &http).await?;
    let location = target.location().clone();
    let options = match &target {
        Target::Direct(PackLocation { source: PackSource::Path(_), .. }) => StoreOptions::default(),
        _ => packs::store_options(&paths, &args.cache, &http),
    };
    if let Target::Hub(resolved) = &target
        && resolved.location.index.is_none()
    {
        match digest_of(resolved)? {
            Some(digest) => {
                let download = Download::fetch(resolved, Some(digest), &paths, &http, output).await;
                return downloaded(download.map_err(PullError::from)?, resolved.reference.to_string()).await;
            }
            None => output.note(format!(
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
            let download = Download::fetch_unknown(&location, work.path(), &http, output).await;
            downloaded(download.map_err(PullError::from)?, redact_url(url)).await
        }
        (Err(error), _) => Err(RepackError::from(UnpackCommandError::from(error)).into()),
    }
}

fn digest_of(resolved: &Resolved) -> Result<Option<forkd_fs::digest::Digest>, PullError> {
    let bad = |_| PullError::BadDigest { reference: resolved.reference.to_string() };
    whole_digest(&resolved.entry).transpose().map_err(bad)
}

async fn downloaded(download: Download, name: String) -> Result<Input, CommandError> {
    let file = download.path().to_owned();
    let location = PackLocation { source: PackSource::Path(file.clone()), size: None, index: None };
    match Store::open(location, StoreOptions::default()).await {
        Ok(store) => Ok(Input::Indexed(store)),
        Err(OpenError::Legacy { .. }) => Ok(Input::Legacy { file, name, _download: Some(download) }),
        Err(error) => Err(RepackError::from(UnpackCommandError::from(error)).into()),
    }
}

/// A file that moves a progress bar while it is read.
struct Watched<'a> {
    file: File,
    done: u64,
    progress: &'a Progress,
}

impl Read for Watched<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(into)?;
        self.done += read as u64;
        self.progress.to(self.done);
        Ok(read)
    }
}

fn from_legacy(path: &Path, name: &str, work: &Workspace, output: &Output) -> Result<Unpacked, RepackError> {
    let file = File::open(path).map_err(place(path))?;
    let size = file.metadata().map_err(place(path))?.len();
    let progress = Progress::bytes(output, "unpacking", size);
    let data = Watched { file, done: 0, progress: &progress };
    let pack = legacy::unpack_from(Path::new(name), data, &work.unpacked(), LEGACY_LIMIT)
        .map_err(UnpackCommandError::from)?;
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
    args: &RepackArgs,
    work: &Workspace,
    options: forkd_fs::writer::PackOptions,
    manifest: Manifest,
    output: &Output,
) -> Result<pack::Report, CommandError> {
    let summary = pack::write(options, &work.members(), manifest, (work, &args.out), output)
        .map_err(RepackError::from)?;
    // Text from outside has become longer by escapes and the list of files: it must still be one that can be read.
    Manifest::parse(summary.manifest.to_toml().as_bytes()).map_err(RepackError::Manifest)?;
    pack::publish(work, &args.out, args.force).map_err(RepackError::from)?;
    Ok(pack::Report::new(&args.out, &summary))
}
