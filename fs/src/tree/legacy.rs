//! A predecessor's pack below one VERSION: fetched whole by the first look, its members as files; those of a chain
//! (layout 2) in a directory a tag.
//!
//! Fetching takes as long as it takes, and a reader in a FUSE request cannot be killed: each request waits for its
//! deadline and is then told to try again, while fetching goes on.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::OnceCell;

use super::inode::Kind;
use super::slot::Slot;
use crate::digest::Digest;
use crate::legacy::whole::{WholeError, WholePack};
use crate::store::{PackLocation, StoreOptions};

/// The members of a predecessor's pack, once they are here.
#[derive(Debug, Default)]
pub(super) struct LegacyNode {
    whole: Arc<OnceCell<WholePack>>,
    /// Held by the task that fetches it.
    fetching: Arc<tokio::sync::Mutex<()>>,
    /// Whether the pack turned out to be one of the predecessor's.
    known: AtomicBool,
}

/// A member or a directory: kind, size, bytes that are not holes, links.
pub(super) type MemberAttributes = (Kind, u64, u64, u32);

impl LegacyNode {
    pub(super) fn get(&self) -> Option<&WholePack> {
        self.whole.get()
    }

    /// Whether there is no need to ask the store what kind of pack it is.
    pub(super) fn is_known(&self) -> bool {
        self.known.load(Relaxed)
    }

    pub(super) fn make_known(&self) {
        self.known.store(true, Relaxed);
    }

    /// The pack, fetched by whoever comes first; a failure is tried again by the next one.
    pub(super) async fn fetch(
        &self,
        location: &PackLocation,
        sha256: Option<Digest>,
        options: &StoreOptions,
    ) -> Result<&WholePack, WholeError> {
        if let Some(whole) = self.whole.get() {
            return Ok(whole);
        }
        let not_yet = || WholeError::NotYet { location: location.describe() };
        // One task at a time, however many readers come and give up.
        let Ok(alone) = self.fetching.clone().try_lock_owned() else {
            let _ = tokio::time::timeout(options.demand_deadline, self.fetching.lock()).await;
            return self.whole.get().ok_or_else(not_yet);
        };
        let (cell, place, own_options) = (self.whole.clone(), location.clone(), options.clone());
        // A task of its own: it goes on when this request has given up.
        let fetching = tokio::spawn(async move {
            let _alone = alone;
            let directory = own_options.http.download_dir();
            cell.get_or_try_init(|| WholePack::fetch(&place, sha256, &own_options, directory)).await.map(drop)
        });
        match tokio::time::timeout(options.demand_deadline, fetching).await {
            Ok(done) => done.unwrap_or(Err(WholeError::Stopped))?,
            Err(_) => return Err(not_yet()),
        }
        self.whole.get().ok_or(WholeError::Stopped)
    }
}

/// The tags of a chain, in the order of their first members.
fn tags(whole: &WholePack) -> Vec<&str> {
    let mut tags: Vec<&str> = Vec::new();
    for tag in whole.pack.members.iter().filter_map(|member| member.tag.as_deref()) {
        if !tags.contains(&tag) {
            tags.push(tag);
        }
    }
    tags
}

/// The tag at a position.
fn tag_at(whole: &WholePack, position: u32) -> Result<&str, Errno> {
    tags(whole).get(position as usize).copied().ok_or(Errno::STALE)
}

/// What is in the directory of a tag, or in the version's own: slot, kind, name.
pub(super) fn names(whole: &WholePack, tag: Option<u32>) -> Result<Vec<(Slot, Kind, OsString)>, Errno> {
    let own = tag.map(|position| tag_at(whole, position)).transpose()?;
    let members = (0..).zip(&whole.pack.members).filter(|(_, member)| member.tag.as_deref() == own);
    let mut names: Vec<_> =
        members.map(|(position, member)| (Slot::Member(position), Kind::File, member.name.into())).collect();
    if own.is_none() {
        let directories = (0..).zip(tags(whole));
        names.extend(directories.map(|(position, tag)| (Slot::Tag(position), Kind::Directory, tag.into())));
    }
    Ok(names)
}

/// The directory of a tag.
pub(super) fn tag(whole: &WholePack, position: u32) -> Result<MemberAttributes, Errno> {
    tag_at(whole, position).map(|_| (Kind::Directory, 0, 0, 2))
}

/// A member.
pub(super) fn member(whole: &WholePack, position: u32) -> Result<MemberAttributes, Errno> {
    let member = position as usize;
    let size = whole.pack.members.get(member).ok_or(Errno::STALE)?.size;
    Ok((Kind::File, size, whole.allocated(member), 1))
}

pub(super) async fn read(whole: &WholePack, position: u32, offset: u64, len: u32) -> Result<Bytes, Errno> {
    let member = position as usize;
    if member >= whole.pack.members.len() {
        return Err(Errno::STALE);
    }
    let read = whole.read(member, offset, u64::from(len)).await;
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

pub(super) fn seek(whole: &WholePack, position: u32, offset: u64, data: bool) -> Result<u64, Errno> {
    whole.seek(position as usize, offset, data)
}
