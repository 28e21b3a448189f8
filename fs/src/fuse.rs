//! The FUSE adapter: turns kernel requests into calls of [`crate::tree`] and their results into replies. The only file
//! that uses fuser.
//!
//! Requests are dispatched by two threads and answered by tasks, so a read that waits for the network holds up nobody
//! else. Everything the tree shows is immutable but its reports, so the kernel keeps what it has read. Mounting needs
//! no libfuse: root mounts /dev/fuse itself, others go through fusermount3.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{
    AccessFlags, BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request, Session,
    SessionACL,
};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::tree::{Attributes, ChangedName, Kind, MAX_READ, OpenedFile, ROOT, SharedTree};

/// Name of the file system in /proc/mounts where fusermount3 mounts: `fuse.forkd`. What root mounts is plain `fuse`.
pub const SUBTYPE: &str = "forkd";
/// Threads that take requests from the kernel; the work is done by tasks.
const DISPATCH_THREADS: usize = 2;
/// Reads ahead that may be under way at a time.
const MAX_BACKGROUND: u16 = 64;
/// Readahead window; several requests of [`MAX_READ`] keep a sequential reader from waiting for each in turn.
const READAHEAD_KIB: u64 = 4096;
/// `whence` of lseek (uapi/linux/fs.h).
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;
/// The handle of everything that is not a report.
const NO_REPORT: FileHandle = FileHandle(0);

/// Why mounting failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel has no FUSE, or this user may not use it.
    #[error("/dev/fuse cannot be opened")]
    NoFuse(#[source] io::Error),
    /// The mount itself failed.
    #[error("mounting on {} failed", mountpoint.display())]
    Mount {
        /// Where.
        mountpoint: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The threads that answer the kernel could not be started.
    #[error("the mount's threads do not start")]
    Threads(#[source] io::Error),
}

/// A running mount; unmounted when dropped.
#[derive(Debug)]
pub struct MountedTree {
    session: BackgroundSession,
    ended: watch::Receiver<bool>,
}

impl MountedTree {
    /// Mounts `tree` on an existing directory. Tasks that answer reads run on `runtime`.
    ///
    /// Blocks until the kernel has accepted the mount; when it returns, reads are answered.
    pub fn new(
        tree: SharedTree,
        mountpoint: &Path,
        source: &str,
        runtime: Handle,
    ) -> Result<MountedTree, MountError> {
        // Says clearly what fuser would wrap into a text.
        let device = std::fs::File::options().read(true).write(true).open("/dev/fuse");
        drop(device.map_err(MountError::NoFuse)?);
        let (ending, ended) = watch::channel(false);
        let adapter = Adapter {
            ending,
            tree,
            runtime,
            reports: Mutex::default(),
            next_report: AtomicU64::new(1),
            owner: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
        };
        let failed = |source| MountError::Mount { mountpoint: mountpoint.to_owned(), source };
        let session = Session::new(adapter, mountpoint, &config(source)).map_err(failed)?;
        let session = session.spawn().map_err(MountError::Threads)?;
        raise_readahead(mountpoint);
        Ok(MountedTree { session, ended })
    }

    /// Makes the kernel forget what names in the tree led to. Call it after [`crate::tree::Tree::refresh`].
    pub fn forget(&self, changed: Vec<ChangedName>) {
        if changed.is_empty() {
            return;
        }
        let notifier = self.session.notifier();
        // A thread of its own: the kernel may wait for a reply to a lookup in that directory before it returns.
        let forget = move || {
            for ChangedName { directory, name } in changed {
                // Fails for what the kernel does not know; then there is nothing to forget.
                let _ = notifier.inval_entry(INodeNo(directory), OsStr::new(&name));
                let _ = notifier.inval_inode(INodeNo(directory), 0, 0);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("forkd-forget".into()).spawn(forget) {
            tracing::debug!(%error, "changed names show when the kernel looks again");
        }
    }

    /// Completes when somebody else has unmounted it.
    pub async fn ended(&self) {
        // An error means that the adapter is gone: that is the end as well.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Unmounts; files that are open stay readable to their users until closed or until the process ends.
    pub fn unmount(self) -> io::Result<()> {
        self.session.umount_and_join()
    }
}

fn config(source: &str) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        // Commas separate mount options.
        MountOption::FSName(source.replace(|c: char| c == ',' || c.is_control(), "_")),
        MountOption::Subtype(SUBTYPE.to_owned()),
        MountOption::RO,
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    // Others may read what root mounted, as they may read other root-owned files; a user's mount is the user's.
    config.acl = if rustix::process::geteuid().is_root() { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(DISPATCH_THREADS);
    config
}

/// Raises the mount's readahead where /sys allows it; reading is only slower without.
fn raise_readahead(mountpoint: &Path) {
    let Ok(metadata) = std::fs::metadata(mountpoint) else { return };
    let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let knob = format!("/sys/priority/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&knob, READAHEAD_KIB.to_string()) {
        tracing::debug!(%error, knob, "readahead stays as it is");
    }
}

struct Adapter {
    ending: watch::Sender<bool>,
    tree: SharedTree,
    runtime: Handle,
    /// Reports as they were when opened, by handle.
    reports: Mutex<HashMap<u64, Bytes>>,
    next_report: AtomicU64,
    owner: (u32, u32),
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_i32(error.raw_os_error())
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

fn file_attr(attributes: &Attributes, mounter: (u32, u32)) -> FileAttr {
    let modified = attributes.modified;
    let (uid, gid) = attributes.owner.unwrap_or(mounter);
    FileAttr {
        ino: INodeNo(attributes.inode),
        size: attributes.size,
        blocks: attributes.allocated.div_ceil(512),
        atime: modified,
        mtime: modified,
        ctime: modified,
        crtime: UNIX_EPOCH,
        kind: file_type(attributes.kind),
        perm: attributes.permissions,
        nlink: attributes.links,
        uid,
        gid,
        rdev: attributes.device,
        blksize: MAX_READ,
        flags: 0,
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is an optimisation; the values left in place when one is refused work too.
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config
            .set_max_readahead((READAHEAD_KIB * 1024) as u32)
            .or_else(|most| config.set_max_readahead(most));
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS | InitFlags::FUSE_CACHE_SYMLINKS;
        for capability in wanted.iter() {
            let _ = config.add_capabilities(capability);
        }
        Ok(())
    }

    fn destroy(&mut self) {
        let _ = self.ending.send(true);
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        let (tree, owner) = (self.tree.clone(), self.owner);
        self.runtime.spawn(async move {
            match tree.lookup(parent.0, &name).await {
                Ok(found) => reply.entry_with_ttls(
                    &found.valid.max(Duration::from_secs(1)),
                    &found.valid,
                    &file_attr(&found, owner),
                    Generation(0),
                ),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let (tree, owner) = (self.tree.clone(), self.owner);
        self.runtime.spawn(async move {
            match tree.attributes(inode.0).await {
                Ok(found) => reply.attr(&found.valid, &file_attr(&found, owner)),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        let tree = self.tree.clone();
        self.runtime.spawn(async move {
            match tree.link_target(inode.0).await {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.tree.open(inode.0) {
            Ok(OpenedFile::Immutable) => {
                reply.opened(NO_REPORT, FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH)
            }
            Ok(OpenedFile::Report(report)) => {
                let handle = self.next_report.fetch_add(1, Ordering::Relaxed);
                self.reports.lock().expect("no panics while held").insert(handle, report);
                reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if handle != NO_REPORT {
            let report = self.reports.lock().expect("no panics while held").get(&handle.0).cloned();
            let Some(report) = report else { return reply.error(Errno::EBADF) };
            let start = report.len().min(usize::try_from(offset).unwrap_or(usize::MAX));
            return reply.data(&report[start..report.len().min(start.saturating_add(size as usize))]);
        }
        let tree = self.tree.clone();
        self.runtime.spawn(async move {
            match tree.read(inode.0, offset, size).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.reports.lock().expect("no panics while held").remove(&handle.0);
        reply.ok();
    }

    fn lseek(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let data = match whence {
            SEEK_DATA => true,
            SEEK_HOLE => false,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let tree = self.tree.clone();
        self.runtime.spawn(async move {
            match tree.seek(inode.0, offset, data).await {
                Ok(found) => reply.offset(found as i64),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(NO_REPORT, FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let tree = self.tree.clone();
        self.runtime.spawn(async move {
            let entries = match tree.entries_from(inode.0, offset).await {
                Ok(entries) => entries,
                Err(error) => return reply.error(errno(error)),
            };
            for entry in entries {
                if reply.add(INodeNo(entry.inode), entry.next, file_type(entry.kind), &entry.name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.tree.total_bytes().div_ceil(4096);
        let name_len = crate::format::MAX_NAME_LEN as u32;
        reply.statfs(blocks, 0, 0, self.tree.inodes(), 0, 4096, name_len, 4096);
    }

    /// There are none: an empty list, as a local disk answers.
    fn listxattr(&self, _: &Request, _: INodeNo, size: u32, reply: ReplyXattr) {
        match size {
            0 => reply.size(0),
            _ => reply.data(&[]),
        }
    }

    // ENOSYS to these tells the kernel never to ask again.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}

/// The root inode is FUSE's own.
const _: () = assert!(ROOT == 1);
