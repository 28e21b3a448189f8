//! The daemon's side of an image that stays in memory.

use super::{Request, WarmError, WarmImage, WarmSocket, WarmStatus, seqpacket};
use crate::fork::template::Template;
use crate::local::paths::Paths;
use forkd_vmm::channel::Channel;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, SocketFlags};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long somebody who connected may take to ask.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a daemon that nobody asks looks whether its socket still has its name: two that start at once, or a cleanup
/// between them, can take it from one, which would hold its image on unseen.
const NAME_CHECK: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// Pause when the host, or this process, has no descriptor or memory for a connection.
const SCARCITY_PAUSE: Duration = Duration::from_millis(100);
/// Connections that wait.
const BACKLOG: i32 = 128;

/// Holds one image and hands it out. Its socket goes when it is dropped.
pub struct WarmDaemon {
    address: WarmSocket,
    listener: OwnedFd,
    /// Of the socket's file: another daemon may take its place.
    inode: u64,
    handed: WarmImage,
    files: Vec<OwnedFd>,
}

impl WarmDaemon {
    /// Listens in the place of whoever held the image before, or what had its name; they are ended. From now on forks find it.
    pub fn start(
        paths: &Paths,
        address: WarmSocket,
        name: String,
        resolved: String,
        template: &Template,
    ) -> Result<WarmDaemon, WarmError> {
        let (resident, files) =
            template.resident().map_err(|error| address.failed("opening the images for", error))?;
        paths.create_runtime(Path::new("warm"))?;
        let unborn = WarmSocket(address.0.with_extension(format!("new{}", std::process::id())));
        // Left by a dead process with our number.
        let _ = fs::remove_file(&unborn.0);
        let announced = announce(paths, &unborn, &address);
        let (listener, inode) = announced.inspect_err(|_| drop(fs::remove_file(&unborn.0)))?;
        let since_unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let resident_bytes = template.resident_bytes();
        let pid = std::process::id();
        let status = WarmStatus { name, resolved, pid, resident_bytes, since_unix, forks: 0 };
        Ok(WarmDaemon { address, listener, inode, handed: WarmImage { status, resident }, files })
    }

    /// What is held.
    pub fn status(&self) -> &WarmStatus {
        &self.handed.status
    }

    /// Hands the image out until told to stop, or until nobody can find it any more.
    pub fn serve(&mut self) -> Result<(), WarmError> {
        loop {
            let Some(peer) = self.accept()? else {
                if !is_at(&self.address.0, self.inode) {
                    return Ok(());
                }
                continue;
            };
            // Who asks and does not wait for the answer, or says nothing, is none of ours to care for.
            let Ok(Some((request, _))) = peer.receive_until(Instant::now() + ASK_TIMEOUT) else { continue };
            if self.answer(&peer, &request) {
                return Ok(());
            }
        }
    }

    /// The next who asks; `None` where that cannot be had now.
    fn accept(&self) -> Result<Option<Channel>, WarmError> {
        let failed = |errno: Errno| self.address.failed("accepting on", errno.into());
        let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&NAME_CHECK)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(peer) => Ok(Some(Channel::from_fd(peer))),
            Err(Errno::INTR | Errno::CONNABORTED | Errno::AGAIN) => Ok(None),
            Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS)) => {
                tracing::warn!(%errno, "a fork that asks for the warm image waits");
                std::thread::sleep(SCARCITY_PAUSE);
                Ok(None)
            }
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Returns whether it was the last one.
    fn answer(&mut self, peer: &Channel, request: &Request) -> bool {
        match request {
            Request::Image => {
                let fds: Vec<_> = self.files.iter().map(AsFd::as_fd).collect();
                self.handed.status.forks += u64::from(peer.send(&self.handed, &fds).is_ok());
            }
            Request::Status => drop(peer.send(&self.handed.status, &[])),
            Request::Stop => {
                self.remove_socket();
                drop(peer.send(&self.handed.status, &[]));
                return true;
            }
        }
        false
    }

    /// Removes the socket, unless a successor has its place.
    fn remove_socket(&self) {
        remove_socket(&self.address.0, self.inode);
    }

    /// What removes the socket from wherever the process is ended.
    pub fn remover(&self) -> impl Fn() + Send + 'static {
        let (path, inode) = (self.address.0.clone(), self.inode);
        move || remove_socket(&path, inode)
    }
}

impl Drop for WarmDaemon {
    fn drop(&mut self) {
        self.remove_socket();
    }
}

/// Puts a socket in the place of `address`, and ends who held what had its name. Returns the socket's inode number too.
fn announce(paths: &Paths, unborn: &WarmSocket, address: &WarmSocket) -> Result<(OwnedFd, u64), WarmError> {
    let listener = seqpacket().map_err(|errno| address.failed("making", errno.into()))?;
    let bound = SocketAddrUnix::new(&unborn.0)
        .and_then(|at| rustix::net::bind(&listener, &at))
        .and_then(|()| rustix::net::listen(&listener, BACKLOG));
    bound.map_err(|errno| unborn.failed("listening on", errno.into()))?;
    let inode = fs::metadata(&unborn.0).map_err(|error| unborn.failed("reading", error))?.ino();
    let before: Vec<_> =
        address.family(paths).iter().filter_map(|address| address.connect().ok().flatten()).collect();
    fs::rename(&unborn.0, &address.0).map_err(|error| address.failed("creating", error))?;
    for (before, _) in before {
        // It may be on its way out already.
        let _ = before.send(&Request::Stop, &[]);
    }
    Ok((listener, inode))
}

fn remove_socket(path: &Path, inode: u64) {
    if is_at(path, inode) {
        let _ = fs::remove_file(path);
    }
}

fn is_at(path: &Path, inode: u64) -> bool {
    fs::metadata(path).is_ok_and(|found| found.ino() == inode)
}
