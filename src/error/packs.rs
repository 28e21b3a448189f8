//! The rows of `error`'s table for packs, hubs and mounts.

use forkd_fs::fuse::MountError;
use forkd_fs::index::IndexError;
use forkd_fs::source::{HttpError, SourceError};
use forkd_fs::store::{OpenError, ReadError};
use forkd_fs::unpack::UnpackError;
use forkd_fs::writer::WriteError;

use super::row::{self, Row};
use forkd_engine::build::pack::PackError;
use forkd_engine::build::pack_base::BaseError;
use forkd_engine::build::pull::PullError;
use forkd_engine::build::repack::RepackError;
use forkd_engine::build::unpack::UnpackPackError;
use forkd_engine::build::whole::WholeError;
use forkd_engine::chain::plain;
use forkd_engine::hub::download::DownloadError;
use forkd_engine::hub::mount::MountHubError;
use forkd_engine::hub::publish::PublishError;
use forkd_engine::hub::registry::RegistryError;
use forkd_engine::hub::release::ReleaseError;
use forkd_engine::hub::serve::ServeError;
use forkd_engine::inspect::diff::{DiffError, SideError};
use forkd_engine::inspect::pack::InspectError;
use forkd_engine::local::mounts::MountsError;
use forkd_engine::local::run_dir::RunDirError;
use forkd_engine::local::snapshots::SnapshotError;
use forkd_engine::local::workspace::WorkspaceError;
use forkd_engine::reference::InvalidReference;
use forkd_engine::target::TargetError;

pub(super) fn snapshot(error: &SnapshotError) -> Row {
    let row = Row::failed("use the snapshot", "");
    match error {
        SnapshotError::Paths(error) => row::paths(error),
        SnapshotError::Unknown { .. } => row.hint("`forkd snapshots` lists what there is"),
        SnapshotError::Exists { .. } => row.hint("choose another --tag, or replace it with --force"),
        SnapshotError::Host { .. } => {
            row.hint("build the recipe on this host, or fork it on one of the other kind")
        }
        SnapshotError::File { .. }
        | SnapshotError::Configuration(_)
        | SnapshotError::Format { .. }
        | SnapshotError::Lineage { .. }
        | SnapshotError::LineageFormat { .. }
        | SnapshotError::OtherMachine { .. }
        | SnapshotError::Layout(_)
        | SnapshotError::Vcpus { .. }
        | SnapshotError::Scratch { .. } => row,
    }
}

pub(super) fn reference(_: &InvalidReference) -> Row {
    Row::usage("find the package", "").hint("a package is owner/name or owner/name@version")
}

pub(super) fn registry(error: &RegistryError) -> Row {
    let row = Row::failed("find the package", "");
    match error {
        RegistryError::NoHub => Row::usage("find a hub", "")
            .hint("pass --hub URL or set FORKD_HUB_URL; `forkd hub serve DIR` makes a hub of a folder"),
        RegistryError::Address { .. } => Row::usage("find the hub", ""),
        RegistryError::Fetch(error) => hint_of_http(Row::failed("read the hub's registry", ""), error),
        RegistryError::Read { .. } | RegistryError::TooLong { .. } | RegistryError::Syntax { .. } => {
            Row::failed("read the hub's registry", "")
                .hint("--hub takes a registry.json or the folder it is in")
        }
        RegistryError::Schema { .. } => {
            Row::failed("read the hub's registry", "").hint("a newer forkd may read it")
        }
        RegistryError::UnknownPackage { near, .. } if near.is_empty() => {
            row.hint("`forkd images --hub` lists what there is")
        }
        RegistryError::UnknownPackage { near, .. } => {
            row.hint(format!("did you mean {}?", near.join(" or ")))
        }
        RegistryError::UnknownVersion { versions, .. } => {
            row.hint(format!("there is {}", versions.join(", ")))
        }
        RegistryError::NotHosted { recipe: Some(recipe), .. } => {
            row.hint(format!("build it: forkd build {}", plain(recipe)))
        }
        RegistryError::NotHosted { recipe: None, .. } => row.hint("the publisher has to name where it is"),
        RegistryError::Entry { .. } => row.hint("the publisher has to mend the registry"),
    }
}

fn hint_of_http(row: Row, error: &HttpError) -> Row {
    match error {
        HttpError::Deadline { last, .. } => hint_of_http(row, last),
        HttpError::Connect { .. } | HttpError::Stalled { .. } | HttpError::Transfer { .. } => {
            row.hint("check that the server runs and can be reached from here")
        }
        HttpError::NoRanges { .. } => row.hint("download the pack and name the file instead"),
        HttpError::Replaced { .. } => row.hint("run the command again to use the new one"),
        HttpError::Denied { .. } => row.hint(
            "for a host you name, forkd sends the user and password in its URL, the token in FORKD_HUB_TOKEN, or its \
             entry in ~/.netrc",
        ),
        HttpError::Untrusted { .. } => row.hint(
            "if you trust the host, add its CA to the system's certificates or name its PEM file in SSL_CERT_FILE",
        ),
        HttpError::Downgrade { .. } => row.hint("the publisher has to mend the redirect"),
        HttpError::TemporaryFile { .. } => row.hint("make room there, or point XDG_CACHE_HOME elsewhere"),
        HttpError::Download { last, .. } => hint_of_http(row, last),
        HttpError::WrongRange { .. }
        | HttpError::WrongLength { .. }
        | HttpError::Encoded { .. }
        | HttpError::BodyLength { .. } => {
            row.hint("the host, or a proxy on the way, does not send what it is asked for: ask its operator")
        }
        HttpError::NotFound { .. }
        | HttpError::Url { .. }
        | HttpError::Client(_)
        | HttpError::TooSlow { .. }
        | HttpError::Busy { .. }
        | HttpError::Status { .. }
        | HttpError::OutOfRange { .. }
        | HttpError::Redirects { .. }
        | HttpError::Queued { .. }
        | HttpError::TooLong { .. } => row,
    }
}

pub(super) fn open(error: &OpenError) -> Row {
    let row = Row::failed("open the pack", "");
    match error {
        OpenError::Source { source: SourceError::Http(error), .. } => hint_of_http(row, error),
        OpenError::Source { source: SourceError::File(_), .. } => {
            row.hint("give a pack's file, its URL, or owner/name with --hub")
        }
        OpenError::Legacy { .. } => row.hint(
            "`forkd unpack` and `forkd repack` read it whole; its machine is Firecracker's and cannot be forked",
        ),
        OpenError::Truncated { .. } => row.hint("download or copy it again"),
        OpenError::IndexDigest { .. } => {
            row.hint("the pack was changed after it was registered: do not trust it, tell its publisher")
        }
        OpenError::NoBase { hint, .. } => row.hint(hint_of_base(hint)),
        OpenError::BaseReplaced { .. } => row.hint(
            "only the pack that the delta was made of will do, whatever it is called: get it from who made the delta",
        ),
        OpenError::Index { source: IndexError::Unsupported { .. }, .. } => row.hint("a newer forkd may read it"),
        OpenError::NotAPack { .. } | OpenError::Index { .. } => row,
    }
}

/// What to do about a base that is nowhere. `called` is what the delta says about it.
fn hint_of_base(called: &str) -> String {
    let called = plain(called);
    let place = match called.as_str() {
        "" => "ask for it where the delta is from".to_owned(),
        url if url.contains("://") => format!("it was at {url} when the delta was made"),
        name => format!("put it beside the delta as {name}"),
    };
    format!("{place}, or name with --hub a hub that has it under any name")
}

pub(super) fn read(error: &ReadError) -> Row {
    let row = Row::failed("read the pack", "");
    match error {
        ReadError::Source { source, .. } => match &**source {
            SourceError::Http(error) => hint_of_http(row, error),
            SourceError::File(_) => row,
        },
        ReadError::Corrupt { .. } => {
            row.hint("the host serves damaged data: download or publish the pack again")
        }
        ReadError::NoBase { .. } => row.hint(hint_of_base("")),
        ReadError::Decode { .. }
        | ReadError::NoSuchFile { .. }
        | ReadError::NoSuchChunk { .. }
        | ReadError::TooLarge { .. }
        | ReadError::Manifest(_)
        | ReadError::Stopped => row,
    }
}

pub(super) fn inspect(error: &InspectError) -> Row {
    match error {
        InspectError::Registry(error) => registry(error),
        InspectError::Open(error) => open(error),
        InspectError::Read(error) => read(error),
        InspectError::Legacy(_) => Row::failed("unpack", ""),
        InspectError::Picture(_) => row::picture(),
    }
}

pub(super) fn serve(error: &ServeError) -> Row {
    let row = Row::failed("serve the hub", "");
    match error {
        ServeError::Root { .. } => row.hint("`forkd hub publish PACK --hub DIR --name O/N` makes the folder"),
        ServeError::Listen { .. } => {
            row.hint("choose another address with --listen; port 0 takes a free one")
        }
        ServeError::AccessLog { .. } => row,
    }
}

pub(super) fn diff(error: &DiffError) -> Row {
    let row = Row::failed("compare", "");
    match error {
        DiffError::NoBase { .. } => {
            Row::usage("compare", "").hint("name what to compare it with: forkd diff TARGET BASE")
        }
        DiffError::Difference { .. } => {
            row.hint("pack it and compare the pack: forkd pack --tag TAG --out FILE, forkd diff FILE BASE")
        }
        DiffError::BaseAway { .. } => row.hint("name it: forkd diff TARGET BASE"),
        DiffError::Target(TargetError::Reference(error)) => reference(error),
        DiffError::Target(TargetError::Registry(error)) => registry(error),
        DiffError::Target(TargetError::Open(error)) => open(error),
        DiffError::Target(TargetError::Snapshot(error)) => snapshot(error),
        DiffError::Side(SideError::Pack(error)) => read(error),
        DiffError::Picture(_) => row::picture(),
        DiffError::Target(TargetError::NoSuchPath { .. })
        | DiffError::Side(SideError::File { .. })
        | DiffError::Stopped => row,
    }
}

pub(super) fn publish(error: &PublishError) -> Row {
    let row = Row::failed("publish the pack", "");
    match error {
        PublishError::Version { .. } => {
            Row::usage("publish the pack", "").hint("`latest` moves by itself; use v1, v2 or the like")
        }
        PublishError::Release(ReleaseError::AssetName { .. }) => {
            row.hint("rename it: letters, digits, `.`, `_` and `-`")
        }
        PublishError::Release(ReleaseError::AssetSize { .. }) => {
            row.hint("host it elsewhere: `forkd hub publish` without --github copies it into a folder")
        }
        PublishError::Release(ReleaseError::Quote { .. }) => row,
        PublishError::Exists { .. } => row.hint("leave --version out to take the next one"),
        PublishError::Open(error) => open(error),
        PublishError::Read(error) => read(error),
        PublishError::Registry(error) => Row { what: "publish the pack", ..registry(error) },
        PublishError::Io { .. } | PublishError::TooLong { .. } => row,
    }
}

pub(super) fn mount(error: &MountHubError) -> Row {
    let row = Row::failed("mount the hub", "");
    match error {
        MountHubError::Registry(error) => registry(error),
        MountHubError::Fuse(MountError::NoFuse(_)) => row
            .hint("load the fuse module (modprobe fuse) and run as root or as a user who may open /dev/fuse"),
        MountHubError::Fuse(MountError::Mount { .. } | MountError::Threads(_)) => row,
        MountHubError::Mounts(error) => mounts(error),
    }
}

pub(super) fn mounts(error: &MountsError) -> Row {
    let row = Row::failed("mount the hub", "");
    match error {
        MountsError::Mountpoint { .. } => {
            row.hint("the mountpoint must be an existing directory: mkdir it first")
        }
        MountsError::NotEmpty { .. } => row.hint("choose an empty directory"),
        MountsError::InUse { .. } => row.hint("use that mount, or `forkd umount` it first"),
        MountsError::NotMounted { .. } => Row::failed("unmount", ""),
        MountsError::Busy { .. } => Row::failed("unmount", "").hint("close them, or use --lazy"),
        MountsError::Unmount { .. } => Row::failed("unmount", ""),
        MountsError::Paths(error) => row::paths(error),
        MountsError::MountInfo(_) | MountsError::Record { .. } => row,
    }
}

pub(super) fn pack(error: &PackError) -> Row {
    let row = Row::failed("pack the snapshot", "");
    match error {
        PackError::Snapshot(error) => snapshot(error),
        PackError::Exists { .. } => row.hint("replace it with --force"),
        PackError::Chunk { .. } | PackError::Write(WriteError::ChunkSize { .. }) => {
            Row::usage("pack the snapshot", "")
                .hint("--chunk takes a power of two from 64KiB to 4MiB; 256KiB is the default")
        }
        PackError::Workspace(error) => workspace(row, error),
        PackError::Base(error) => base(error),
        PackError::Write(WriteError::BaseChunkSize { .. }) => {
            Row::usage("pack the snapshot", "").hint("leave --chunk out: a delta has the chunks of its base")
        }
        PackError::Write(WriteError::Base(error)) => Row { what: "read the base", ..read(error) },
        PackError::Whole(error) => whole(row, error),
        PackError::Manifest { .. } => row.hint("only snapshots of this forkd can be packed; build it again"),
        PackError::Write(
            WriteError::Refused { .. }
            | WriteError::Read { .. }
            | WriteError::Changed { .. }
            | WriteError::Write { .. }
            | WriteError::TooManyChunks { .. }
            | WriteError::Compress(_),
        ) => row,
    }
}

/// What a delta is to be packed against.
fn base(error: &BaseError) -> Row {
    const WHAT: &str = "pack a delta";
    match error {
        BaseError::Unknown { .. } => Row::usage(WHAT, "").hint("name a pack with --base FILE|URL|REF"),
        BaseError::Snapshot { .. } => Row::usage(WHAT, "").hint(
            "pack the base first, with `forkd pack --tag TAG --out FILE`, and name that file with --base",
        ),
        BaseError::Output { .. } => Row::usage(WHAT, "").hint("name another file with --out"),
        BaseError::Lineage(error) => snapshot(error),
        BaseError::Reference(error) => reference(error),
        BaseError::Registry(error) => registry(error),
        BaseError::Open(error) => Row { what: "open the base", ..open(error) },
    }
}

/// For a command that takes the files of a snapshot that is stored as a difference.
pub(super) fn whole(row: Row, error: &WholeError) -> Row {
    match error {
        WholeError::Base(error) => open(&error.source),
        WholeError::Snapshot(error) => snapshot(error),
        WholeError::Runtime(_) => row::threads(),
        WholeError::Delta(_) | WholeError::Unpack(_) => row,
    }
}

/// For a command that makes a pack.
pub(super) fn workspace(row: Row, error: &WorkspaceError) -> Row {
    match error {
        WorkspaceError::RunDir(RunDirError::Paths(error)) => row::paths(error),
        WorkspaceError::RunDir(_) => row,
        WorkspaceError::Place { .. } => row.hint("--out needs an existing directory that can be written to"),
    }
}

pub(super) fn unpack(error: &UnpackPackError) -> Row {
    let row = Row::failed("unpack", "");
    match error {
        UnpackPackError::Open(error) => open(error),
        UnpackPackError::Read(error) => read(error),
        UnpackPackError::Snapshot(error) => snapshot(error),
        UnpackPackError::Unpack(UnpackError::Read { source, .. }) => read(source),
        UnpackPackError::Unpack(UnpackError::Digest { .. }) => {
            row.hint("the pack was built wrong: tell its publisher")
        }
        UnpackPackError::Unpack(UnpackError::Write { source, .. })
            if source.kind() == std::io::ErrorKind::StorageFull =>
        {
            row.hint("make room there, or point XDG_DATA_HOME to a larger disk")
        }
        UnpackPackError::Unpack(UnpackError::Mismatch { .. } | UnpackError::Write { .. })
        | UnpackPackError::Legacy(_) => row,
    }
}

pub(super) fn repack(error: &RepackError) -> Row {
    const WHAT: &str = "repack";
    let row = Row::failed(WHAT, "");
    match error {
        RepackError::Registry(error) => registry(error),
        RepackError::RunDir(error) => row::run_dir(error),
        RepackError::Unpack(error) => Row { what: WHAT, ..unpack(error) },
        RepackError::Download(error) => download(row, error),
        RepackError::Pack(error) => Row { what: WHAT, ..pack(error) },
        RepackError::Workspace(error) => workspace(row, error),
        RepackError::Place { .. } => row.hint("--out needs an existing directory that can be written to"),
        RepackError::Directory { .. } => Row::usage(WHAT, "").hint("--out takes the new pack's file"),
        RepackError::Name { .. } | RepackError::Manifest(_) => row,
    }
}

pub(super) fn pull(error: &PullError) -> Row {
    let row = Row::failed("pull", "");
    match error {
        PullError::Registry(error) => registry(error),
        PullError::Open(error) => open(error),
        PullError::Unpack(error) => unpack(error),
        PullError::Snapshot(error) => snapshot(error),
        PullError::Download(error) => download(row, error),
    }
}

fn download(row: Row, error: &DownloadError) -> Row {
    match error {
        DownloadError::Source(SourceError::Http(error)) => hint_of_http(row, error),
        DownloadError::Digest { .. } => {
            row.hint("the pack was changed after it was registered: do not trust it, tell its publisher")
        }
        DownloadError::File { .. } => row.hint("make room there, or point XDG_CACHE_HOME elsewhere"),
        DownloadError::BadDigest { .. } => row.hint("the publisher has to mend the registry"),
        DownloadError::TooLarge { .. } | DownloadError::Source(SourceError::File(_)) => row,
    }
}
