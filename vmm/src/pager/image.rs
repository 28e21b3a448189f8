//! One image: its memfd, the pager's own mapping of it, and which chunks are there.

use super::error::{DamagedPage, PagerError};
use super::source::ChunkContent;
use crate::memory::{ImageId, Mapping, PAGE_BYTES, Sharing, create_image};
use crate::uffd::Uffd;
use rustix::fd::OwnedFd;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const ZERO_PAGE: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];

/// Shape of one image.
#[derive(Debug, Clone, Copy)]
pub struct ImageShape {
    /// Length, bytes; a multiple of the page size.
    pub bytes: u64,
    /// Bytes filled at a time; a multiple of the page size.
    pub chunk_bytes: u64,
}

impl ImageShape {
    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.bytes.div_ceil(self.chunk_bytes)
    }

    /// Where a chunk lies in the image; the last one may be shorter.
    pub fn range(&self, chunk: u64) -> Range<u64> {
        let start = chunk * self.chunk_bytes;
        start..(start + self.chunk_bytes).min(self.bytes)
    }
}

#[derive(Debug)]
pub(super) struct Image {
    id: ImageId,
    pub(super) shape: ImageShape,
    pub(super) file: OwnedFd,
    /// Nobody may read it where it is not filled: the reader would wait for itself.
    alias: Mapping,
    present: Vec<AtomicBool>,
    present_chunks: AtomicU64,
}

impl Image {
    pub(super) fn new(id: ImageId, shape: ImageShape, uffd: &Uffd) -> Result<Image, PagerError> {
        assert!(
            shape.bytes.is_multiple_of(PAGE_BYTES) && shape.chunk_bytes.is_multiple_of(PAGE_BYTES),
            "whole pages only"
        );
        let file = create_image(id.file_name(), shape.bytes)?;
        let alias = Mapping::of_file(&file, shape.bytes, Sharing::Shared)?;
        uffd.register(&alias)?;
        let present = (0..shape.chunks()).map(|_| AtomicBool::new(false)).collect();
        Ok(Image { id, shape, file, alias, present, present_chunks: AtomicU64::new(0) })
    }

    pub(super) fn is_present(&self, chunk: u64) -> bool {
        self.present.get(chunk as usize).is_some_and(|present| present.load(Ordering::Acquire))
    }

    pub(super) fn present_chunks(&self) -> u64 {
        self.present_chunks.load(Ordering::Relaxed)
    }

    /// Puts a chunk in place, which must be whole: nothing is ever made up.
    pub(super) fn fill(&self, uffd: &Uffd, chunk: u64, content: &ChunkContent) -> Result<(), PagerError> {
        let range = self.shape.range(chunk);
        let expected = range.end - range.start;
        match content {
            ChunkContent::Zero => {
                for offset in uffd.zero(&self.alias, range.start, expected)? {
                    self.compare(offset, &ZERO_PAGE)?;
                }
            }
            ChunkContent::Data(data) if data.len() as u64 == expected => self.put(uffd, range.start, data)?,
            ChunkContent::Data(data) => {
                return Err(PagerError::Length { bytes: data.len() as u64, expected });
            }
        }
        if !self.present[chunk as usize].swap(true, Ordering::AcqRel) {
            self.present_chunks.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Puts whole pages in place.
    pub(super) fn put(&self, uffd: &Uffd, offset: u64, bytes: &[u8]) -> Result<(), PagerError> {
        for existing in uffd.copy(&self.alias, offset, bytes)? {
            let at = (existing - offset) as usize;
            self.compare(existing, &bytes[at..at + PAGE_BYTES as usize])?;
        }
        Ok(())
    }

    /// Checks a page that was there already. Two of our threads put the same content there; anything else came from a
    /// machine that got rid of its watch.
    fn compare(&self, offset: u64, expected: &[u8]) -> Result<(), PagerError> {
        let mut page = ZERO_PAGE;
        let read = rustix::io::pread(&self.file, &mut page, offset).map_err(PagerError::Compare)?;
        if read == page.len() && page == expected {
            return Ok(());
        }
        Err(DamagedPage { image: self.id, offset }.into())
    }
}
