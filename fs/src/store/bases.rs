//! The packs that a delta takes chunks from: finding them. Which pack is meant is decided by the digest of its index
//! alone. Every frame that is read of it is checked against the delta's own index, as all frames are.

use std::path::Path;
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::time::timeout;

use super::error::OpenError;
use super::location::{PackLocation, PackSource};
use super::options::StoreOptions;
use crate::digest::Digest;
use crate::format::is_plain_name;
use crate::index::{BasePack, Index};
use crate::source::{Priority, Source};

/// How long a base is looked for whose frames are all in the disk cache.
const PATIENCE: Duration = Duration::from_secs(2);

/// A pack that frames are read from.
#[derive(Debug)]
pub(super) struct Holder {
    /// `None` of a base that is nowhere, and whose frames are all in the disk cache.
    pub(super) source: Option<Source>,
    /// Where a base was found.
    pub(super) place: Option<PackLocation>,
    /// Whether its frames go into the disk cache: local packs are as near as that is.
    pub(super) is_cached: bool,
}

impl Holder {
    pub(super) fn new(source: Source) -> Holder {
        let is_cached = matches!(source, Source::Http(_));
        Holder { source: Some(source), place: None, is_cached }
    }

    /// One whose frames are looked for in the disk cache alone.
    fn away() -> Holder {
        Holder { source: None, place: None, is_cached: true }
    }
}

/// Why a place is not the base's.
enum Miss {
    /// Another pack is there.
    Other { found: Digest },
    /// Nothing can be read there.
    Unread { why: String },
}

/// Finds the bases of a delta at `location`, all at once, in the order of its index.
pub(super) async fn find(
    index: &Index,
    location: &PackLocation,
    options: &StoreOptions,
) -> Result<Vec<Holder>, OpenError> {
    let numbered = (1..).zip(index.bases());
    try_join_all(numbered.map(|(pack, base)| find_one(index, pack, base, location, options))).await
}

async fn find_one(
    index: &Index,
    pack: u8,
    base: &BasePack,
    location: &PackLocation,
    options: &StoreOptions,
) -> Result<Holder, OpenError> {
    if index.held_by(pack).0 == 0 {
        return Ok(Holder::away());
    }
    let search = search(base, location, options);
    // Where nothing has to be read of it, it is not waited for: its host may be away.
    if is_all_cached(index, pack, options) {
        return Ok(timeout(PATIENCE, search).await.ok().and_then(Result::ok).unwrap_or_else(Holder::away));
    }
    match search.await {
        Err(_) if options.open_without_bases => Ok(Holder::away()),
        found => found,
    }
}

async fn search(
    base: &BasePack,
    location: &PackLocation,
    options: &StoreOptions,
) -> Result<Holder, OpenError> {
    let (mut tried, mut replaced) = (Vec::new(), None);
    let mut look = async |places: Vec<PackLocation>| {
        for place in places {
            match open_if_it_is(base, &place, options).await {
                Ok(source) => return Some(Holder { place: Some(place), ..Holder::new(source) }),
                Err(Miss::Other { found }) => replaced = Some((place.describe(), found)),
                Err(Miss::Unread { why }) => tried.push(format!("{}: {why}", place.describe())),
            }
        }
        None
    };
    if let Some(holder) = look(beside(base, location).into_iter().collect()).await {
        return Ok(holder);
    }
    if let Some(finder) = &options.bases
        && let Some(holder) = look(finder.find(base).await).await
    {
        return Ok(holder);
    }
    let hinted = base.hint.contains("://").then(|| at(PackSource::Url(base.hint.clone())));
    if let Some(holder) = look(hinted.into_iter().collect()).await {
        return Ok(holder);
    }
    let (location, sha256, hint) = (location.describe(), base.index.sha256, base.hint.clone());
    Err(match replaced {
        Some((place, found)) => OpenError::BaseReplaced { location, base: sha256, place, found },
        None => OpenError::NoBase { location, base: sha256, hint, tried },
    })
}

fn at(source: PackSource) -> PackLocation {
    PackLocation { source, size: None, index: None }
}

/// The file of the base's name beside the delta. The name is a plain one, so that no pack leads anywhere else.
fn beside(base: &BasePack, delta: &PackLocation) -> Option<PackLocation> {
    if !is_plain_name(&base.hint) {
        return None;
    }
    match &delta.source {
        PackSource::Path(path) => {
            let place = path.parent().unwrap_or(Path::new("")).join(&base.hint);
            place.is_file().then(|| at(PackSource::Path(place)))
        }
        PackSource::Url(url) => {
            let (folder, _) = url.split(['?', '#']).next()?.rsplit_once('/')?;
            Some(at(PackSource::Url(format!("{folder}/{}", base.hint))))
        }
    }
}

/// Opens what is at `place` if it is the base.
async fn open_if_it_is(
    base: &BasePack,
    place: &PackLocation,
    options: &StoreOptions,
) -> Result<Source, Miss> {
    let unread = |error| Miss::Unread { why: crate::chain::chain(&error) };
    let source = options.source(place).map_err(unread)?;
    match place.index {
        Some(pin) if pin.sha256 != base.index.sha256 => return Err(Miss::Other { found: pin.sha256 }),
        Some(_) if matches!(source, Source::Http(_)) => return Ok(source),
        _ => {}
    }
    // Reading past its end would be an error: another pack is shorter as often as not.
    let end = base.index.offset + base.index.length;
    let size = source.size().await.map_err(unread)?;
    let len = base.index.length.min(size.saturating_sub(base.index.offset));
    let bytes = match len {
        0 => bytes::Bytes::new(),
        len => source.read_at(base.index.offset, len, Priority::Demand).await.map_err(unread)?,
    };
    match Digest::of(&bytes) {
        found if found == base.index.sha256 && size >= end => Ok(source),
        found => Err(Miss::Other { found }),
    }
}

fn is_all_cached(index: &Index, pack: u8, options: &StoreOptions) -> bool {
    let Some(cache) = &options.cache else { return false };
    let frames = index.files().flat_map(|(file, _)| index.stored_chunks(file)).map(|(_, record)| record);
    frames.filter(|record| record.pack == pack).all(|record| cache.contains(record.digest))
}
