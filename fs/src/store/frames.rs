//! Frames: cut out of a range that is arriving, and decoded.

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};

use crate::index::ChunkRecord;
use crate::source::{RangeBody, SourceError};

/// Decodes a checked frame; `None` unless it gives exactly `plain_len` bytes. Never writes more than that.
pub(super) fn decode(frame: &[u8], plain_len: u32) -> Option<Bytes> {
    thread_local! {
        static DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    DECODER.with_borrow_mut(|decoder| {
        let decoder = match decoder {
            Some(decoder) => decoder,
            None => decoder.insert(zstd::bulk::Decompressor::new().ok()?),
        };
        let mut plain = Vec::with_capacity(plain_len as usize);
        let len = decoder.decompress_to_buffer(frame, &mut plain).ok()?;
        (len == plain_len as usize).then(|| plain.into())
    })
}

/// Cuts a range that is arriving into frames.
pub(super) struct Frames {
    body: RangeBody,
    /// Offset in the pack of the buffer's first byte.
    at: u64,
    buffer: BytesMut,
}

impl Frames {
    /// `body` is a range that begins at `at` in the pack.
    pub(super) fn new(body: RangeBody, at: u64) -> Self {
        Self { body, at, buffer: BytesMut::new() }
    }

    /// The bytes of the frame at `record`, which lies behind those taken before.
    pub(super) async fn take(&mut self, record: &ChunkRecord) -> Result<Bytes, SourceError> {
        while self.at < record.offset {
            if self.buffer.is_empty() {
                self.fill().await?;
            }
            let gap = (record.offset - self.at).min(self.buffer.len() as u64);
            drop(self.buffer.split_to(gap as usize));
            self.at += gap;
        }
        while self.buffer.len() < record.length as usize {
            self.fill().await?;
        }
        self.at += u64::from(record.length);
        Ok(self.buffer.split_to(record.length as usize).freeze())
    }

    async fn fill(&mut self) -> Result<(), SourceError> {
        let piece = self.body.next().await?.expect("a range delivers every byte or an error");
        self.buffer.extend_from_slice(&piece);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_is_exact_and_bounded() {
        let plain = vec![7; 100_000];
        let frame = zstd::bulk::compress(&plain, 3).unwrap();
        assert_eq!(decode(&frame, 100_000).unwrap(), plain);
        assert_eq!(decode(&frame, 99_999), None, "a frame that holds more than the index says");
        assert_eq!(decode(&frame, 100_001), None, "or less");
        assert_eq!(decode(&frame[..frame.len() - 1], 100_000), None);
        assert_eq!(decode(b"not a frame", 11), None);
    }
}
