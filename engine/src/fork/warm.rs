//! Images that stay in memory between forks: one small daemon an image, which hands its files to every `forkd fork` of the
//! same name that asks. Such a fork opens no pack, decodes nothing and waits for no page.
//!
//! ```text
//! <runtime>/warm/<family>-<key>.sock    SOCK_SEQPACKET; the family says what was named, the key what it was then
//! ```
//! A daemon's own directory is private, but who asks may find one that somebody else made first (in a shared temporary
//! directory): what answers must be a process of the same user.

use crate::fork::template::ResidentTemplate;
use crate::local::paths::{Paths, PathsError};
use forkd_vmm::channel::{Channel, ChannelError};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

mod daemon;
pub mod hold;
mod key;

pub use daemon::WarmDaemon;
pub use key::WarmKeyError;

/// How long a daemon may take to answer; a fork does better without it than waiting for it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// A daemon cannot be started or reached.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// forkd's directories.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The socket.
    #[error("{operation} {} failed", path.display())]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else listens there.
    #[error("{} is answered by a process of user {owner}, not by one of ours", path.display())]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// That process's user id.
        owner: u32,
    },
    /// A daemon that answers nonsense, or nothing.
    #[error("the process {} behind {} does not answer", pid.map_or("of a warm image".to_owned(), |pid| pid.to_string()), path.display())]
    Silent {
        /// Its socket.
        path: PathBuf,
        /// The process, where it could be connected to.
        pid: Option<i32>,
        /// Why, where that is known.
        #[source]
        source: Option<ChannelError>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// The image, to fork from it.
    Image,
    Status,
    Stop,
}

/// What a daemon holds, as `forkd warm --list` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WarmStatus {
    /// What it was loaded from.
    pub name: String,
    /// What that was then: owner/name@version for a package of the hub, otherwise the same.
    pub resolved: String,
    /// The daemon.
    pub pid: u32,
    /// Bytes of memory that its images take.
    pub resident_bytes: u64,
    /// When it was loaded, seconds since 1970.
    pub since_unix: u64,
    /// Forks it was handed to.
    pub forks: u64,
}

/// An image and what is said of it; its files come with it.
#[derive(Debug, Serialize, Deserialize)]
pub struct WarmImage {
    /// What is held.
    pub status: WarmStatus,
    /// The machine.
    pub resident: ResidentTemplate,
}

/// Where the daemon of one image listens, or would.
#[derive(Debug, Clone)]
pub struct WarmSocket(PathBuf);

impl WarmSocket {
    /// All that may have a daemon.
    pub fn all(paths: &Paths) -> Vec<WarmSocket> {
        let entries = fs::read_dir(directory(paths)).into_iter().flatten().flatten();
        let sockets = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()));
        sockets.map(|entry| WarmSocket(entry.path())).collect()
    }

    fn connect(&self) -> Result<Option<(Channel, Pid)>, WarmError> {
        let failed = |errno: Errno| self.failed("connecting to", errno.into());
        let address = SocketAddrUnix::new(&self.0).map_err(failed)?;
        let socket = seqpacket().map_err(failed)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => {
                let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(failed)?;
                if peer.uid != rustix::process::geteuid() {
                    return Err(WarmError::Foreign { path: self.0.clone(), owner: peer.uid.as_raw() });
                }
                Ok(Some((Channel::from_fd(socket), peer.pid)))
            }
            Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
            // As many as may wait for it do.
            Err(Errno::AGAIN) => Err(WarmError::Silent { path: self.0.clone(), pid: None, source: None }),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn ask<A: for<'a> Deserialize<'a>>(
        &self,
        request: &Request,
    ) -> Result<Option<(A, Vec<OwnedFd>)>, WarmError> {
        let Some((channel, pid)) = self.connect()? else { return Ok(None) };
        let pid = Some(pid.as_raw_nonzero().get());
        let silent = |source| WarmError::Silent { path: self.0.clone(), pid, source };
        let sent = channel.send(request, &[]);
        match sent.and_then(|()| channel.receive_until(Instant::now() + ANSWER_TIMEOUT)) {
            Ok(Some(answer)) => Ok(Some(answer)),
            Ok(None) => Err(silent(None)),
            // It is on its way out.
            Err(ChannelError::Closed) => Ok(None),
            Err(error) => Err(silent(Some(error))),
        }
    }

    /// The image, if a daemon holds it.
    pub fn image(&self) -> Result<Option<(WarmImage, Vec<OwnedFd>)>, WarmError> {
        self.ask(&Request::Image)
    }

    /// What the daemon holds, if there is one.
    pub fn status(&self) -> Result<Option<WarmStatus>, WarmError> {
        Ok(self.ask(&Request::Status)?.map(|(status, _)| status))
    }

    /// Ends the daemon. Forks of its image go on. Returns what it held.
    pub fn stop(&self) -> Result<Option<WarmStatus>, WarmError> {
        Ok(self.ask(&Request::Stop)?.map(|(status, _)| status))
    }

    /// Removes the socket of a daemon that is dead. Returns whether it was.
    pub fn remove_if_dead(&self) -> bool {
        matches!(self.connect(), Ok(None)) && fs::remove_file(&self.0).is_ok()
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> WarmError {
        WarmError::Socket { operation, path: self.0.clone(), source }
    }
}

fn directory(paths: &Paths) -> PathBuf {
    paths.runtime.join("warm")
}

/// A socket that waits for nobody: connecting to a process that has been stopped would never end.
fn seqpacket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

#[cfg(test)]
mod tests;
