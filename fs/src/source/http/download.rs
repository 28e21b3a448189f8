//! Objects on hosts without byte ranges: downloaded once, from start to end, into a file without a name that all
//! readers of the object share. The download goes on by itself, over broken connections too, until it is complete or
//! its last reader is gone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::Response;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout_at;

use super::error::HttpError;
use super::object::Object;
use super::retry::{PROGRESS, Retries};
use crate::source::priority::Priority;

/// Most bytes handed to a reader at a time.
const PIECE: u64 = 512 << 10;
/// Bytes of the disk left to others; a twentieth of a smaller disk.
const LARGEST_RESERVE: u64 = 256 << 20;
/// How often in a row a download may break off without having got any further.
const FRUITLESS: u32 = 8;

/// An object being downloaded whole.
#[derive(Debug)]
pub(super) struct WholeDownload {
    shared: Arc<Shared>,
    task: Mutex<AbortHandle>,
}

#[derive(Debug)]
struct Shared {
    object: Arc<Object>,
    file: File,
    directory: PathBuf,
    received: watch::Sender<Received>,
}

/// How far the download is.
#[derive(Debug, Clone)]
struct Received {
    /// Bytes in the file.
    have: u64,
    /// Bytes received since the last mark; [`PROGRESS`] of them set it anew. Bytes received once more count: a
    /// connection that had to start again is alive too.
    unmarked: u64,
    mark: Instant,
    end: Option<End>,
    /// What the last attempt met, until bytes come again.
    trouble: Option<Arc<HttpError>>,
}

#[derive(Debug, Clone)]
enum End {
    Complete,
    Failed(Arc<HttpError>),
}

impl WholeDownload {
    /// Goes on with `first`, an answer with the whole object.
    pub(super) fn start(object: Arc<Object>, first: Response) -> Result<Self, HttpError> {
        let directory = object.client.download_dir();
        let file = std::fs::create_dir_all(&directory).and_then(|()| tempfile::tempfile_in(&directory));
        let file = file.map_err(|source| HttpError::TemporaryFile {
            url: object.route.label(),
            directory: directory.clone(),
            source,
        })?;
        let size = object.size();
        tracing::warn!(
            url = object.route.start(),
            size,
            "the host serves no byte ranges: downloading the whole object"
        );
        let received = Received { have: 0, unmarked: 0, mark: Instant::now(), end: None, trouble: None };
        let shared = Arc::new(Shared { object, file, directory, received: watch::channel(received).0 });
        let task = Mutex::new(shared.clone().spawn(Some(first)));
        Ok(Self { shared, task })
    }

    /// A reader arrives: a download that was given up is taken up again, unless the object is another one now.
    pub(super) fn enter(&self) {
        let mut task = self.task.lock().expect("no panics while held");
        let given_up = |received: &mut Received| match &received.end {
            Some(End::Failed(error)) if !matches!(**error, HttpError::Replaced { .. }) => {
                (received.end, received.trouble, received.mark) = (None, None, Instant::now());
                true
            }
            _ => false,
        };
        if self.shared.received.send_if_modified(given_up) {
            *task = self.shared.clone().spawn(None);
        }
    }

    /// Some of the bytes `at..end`, at least one, as soon as they are there. Fails when the download does, or makes no
    /// progress for `deadline`, counted from `since` at the earliest.
    pub(super) async fn read(
        &self,
        at: u64,
        end: u64,
        since: Instant,
        deadline: Duration,
    ) -> Result<Bytes, HttpError> {
        let have = self.wait(at, since, deadline).await?;
        if have <= at {
            let (url, wanted) = (self.shared.object.route.label(), format!("{at}-{}", end - 1));
            return Err(HttpError::OutOfRange { url, wanted });
        }
        let len = (have.min(end) - at).min(PIECE) as usize;
        let shared = self.shared.clone();
        let read = move || {
            let mut piece = vec![0; len];
            shared.file.read_exact_at(&mut piece, at).map(|()| piece)
        };
        let piece = tokio::task::spawn_blocking(read).await.map_err(io::Error::other).and_then(|read| read);
        Ok(piece.map_err(|source| self.shared.failed_file(source))?.into())
    }

    /// Waits for the end of the download.
    pub(super) async fn complete(&self, since: Instant, deadline: Duration) -> Result<(), HttpError> {
        self.wait(u64::MAX, since, deadline).await.map(drop)
    }

    /// Waits until there are more than `at` bytes or all of them; returns how many there are.
    async fn wait(&self, at: u64, since: Instant, deadline: Duration) -> Result<u64, HttpError> {
        let mut received = self.shared.received.subscribe();
        loop {
            let now = received.borrow_and_update().clone();
            let url = || self.shared.object.route.label();
            match now.end {
                _ if now.have > at => return Ok(now.have),
                Some(End::Complete) => return Ok(now.have),
                Some(End::Failed(last)) => return Err(HttpError::Download { url: url(), last }),
                None => {}
            }
            let since = since.max(now.mark);
            if timeout_at((since + deadline).into(), received.changed()).await.is_err() {
                let waited = since.elapsed();
                return Err(match now.trouble {
                    Some(last) => HttpError::Download { url: url(), last },
                    None => HttpError::TooSlow { url: url(), got: now.unmarked, waited },
                });
            }
        }
    }
}

impl Drop for WholeDownload {
    fn drop(&mut self) {
        self.task.lock().expect("no panics while held").abort();
    }
}

impl Shared {
    fn spawn(self: Arc<Self>, first: Option<Response>) -> AbortHandle {
        tokio::spawn(async move { self.download(first).await }).abort_handle()
    }

    async fn download(self: Arc<Self>, mut first: Option<Response>) {
        let object = &self.object;
        let mut retries =
            Retries::new(object.deadline(Priority::Demand).max(object.deadline(Priority::Prefetch)));
        let (mut failing, mut fruitless, mut furthest) = (false, 0, self.received.borrow().have);
        let end = loop {
            let (before, again) = (self.received.borrow().have, retries.after_wrong_answer());
            let Err(error) = self.attempt(first.take(), again, &mut failing).await else {
                break End::Complete;
            };
            let reached = self.received.borrow().have;
            let too_long = matches!(error, HttpError::WrongLength { wanted, got, .. } if got > wanted);
            if too_long || (before == 0 && matches!(error, HttpError::WrongLength { .. })) {
                // It may have been something else, and nothing of that may be held against the next answer. Of an
                // answer that ends early, but began with the bytes that were there, what is new stays.
                self.received.send_modify(|received| received.have = before);
            }
            let (error, mark) = (Arc::new(error), self.received.borrow().mark);
            let further = reached > furthest && !too_long;
            if further {
                furthest = reached;
                retries.reset();
            }
            fruitless = if further { 0 } else { fruitless + 1 };
            self.received.send_modify(|received| received.trouble = Some(error.clone()));
            object.note_failure(&mut failing, &error);
            match retries.next_pause(mark, &error).filter(|_| fruitless <= FRUITLESS) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => {
                    object.unlearn_after(&error);
                    break End::Failed(error);
                }
            }
        };
        object.note_recovery(&mut failing);
        self.received.send_modify(|received| received.end = Some(end));
    }

    /// Receives the object from its start, skipping what is there already. `again`: after an answer that was not one to
    /// what was asked.
    async fn attempt(
        self: &Arc<Self>,
        first: Option<Response>,
        again: bool,
        failing: &mut bool,
    ) -> Result<(), HttpError> {
        let (object, idle) = (&self.object, self.object.idle(Priority::Prefetch));
        let mut response = match first {
            Some(first) => first,
            None => object.ask_whole(idle, again).await?,
        };
        self.check_size()?;
        let mut at = 0;
        while let Some(piece) = object.piece(idle, &mut response).await? {
            object.note_recovery(failing);
            self.check_length(at + piece.len() as u64)?;
            self.take(at, &piece).await?;
            at += piece.len() as u64;
        }
        let have = self.received.borrow().have;
        match object.size() {
            Some(size) if at < size => {
                Err(HttpError::WrongLength { url: object.route.label(), wanted: size, got: at })
            }
            Some(_) => Ok(()),
            None if at < have => object.check_size(have).and_then(|()| object.check_size(at)),
            None => object.check_size(at),
        }
    }

    /// Keeps what is new of `piece`, which lies at `at`; what is not new must be what came before.
    async fn take(self: &Arc<Self>, at: u64, piece: &Bytes) -> Result<(), HttpError> {
        let have = self.received.borrow().have;
        let known = have.saturating_sub(at).min(piece.len() as u64) as usize;
        let (shared, piece_) = (self.clone(), piece.clone());
        let work = move || {
            let mut before = vec![0; known];
            shared.file.read_exact_at(&mut before, at)?;
            shared.file.write_all_at(&piece_[known..], at + known as u64)?;
            Ok(before == piece_[..known])
        };
        let done = tokio::task::spawn_blocking(work).await.map_err(io::Error::other).and_then(|done| done);
        if !done.map_err(|source| self.failed_file(source))? {
            let (url, detail) = (self.object.route.label(), "other bytes came the second time".into());
            return Err(HttpError::Replaced { url, detail });
        }
        self.received.send_modify(|received| {
            received.have = have.max(at + piece.len() as u64);
            received.unmarked += piece.len() as u64;
            received.trouble = None;
            if received.unmarked >= PROGRESS {
                (received.unmarked, received.mark) = (0, Instant::now());
            }
        });
        Ok(())
    }

    /// Refuses to receive more than the object has, than anybody downloads whole unasked, and than the disk can spare.
    fn check_length(&self, len: u64) -> Result<(), HttpError> {
        let limit = self.object.client.options().download_limit;
        let url = || self.object.route.label();
        match self.object.size() {
            Some(size) if len > size => Err(HttpError::WrongLength { url: url(), wanted: size, got: len }),
            _ if len > limit => Err(HttpError::NoRanges { url: url(), limit }),
            _ => self.check_room(0),
        }
    }

    /// Says before a download rather than at its end that the disk is too full for it.
    fn check_size(&self) -> Result<(), HttpError> {
        let limit = self.object.client.options().download_limit;
        match self.object.size() {
            Some(size) if size > limit => Err(HttpError::NoRanges { url: self.object.route.label(), limit }),
            Some(size) => self.check_room(size.saturating_sub(self.received.borrow().have)),
            None => Ok(()),
        }
    }

    fn check_room(&self, missing: u64) -> Result<(), HttpError> {
        let room = rustix::fs::fstatvfs(&self.file).map_err(|error| self.failed_file(error.into()))?;
        let (free, all) = (room.f_bavail, room.f_blocks);
        let reserve = LARGEST_RESERVE.min(all.saturating_mul(room.f_frsize) / 20);
        if missing.saturating_add(reserve) > free.saturating_mul(room.f_frsize) {
            return Err(self.failed_file(io::Error::from(rustix::io::Errno::NOSPC)));
        }
        Ok(())
    }

    fn failed_file(&self, source: io::Error) -> HttpError {
        HttpError::TemporaryFile { url: self.object.route.label(), directory: self.directory.clone(), source }
    }
}
