//! Compressing chunks, on threads of their own.

use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender};

use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use super::error::WriteError;
use super::output::Frame;
use crate::digest::Digest;

/// A chunk waiting for a thread.
pub(super) struct Job {
    pub(super) plain: Vec<u8>,
    pub(super) reply: Sender<io::Result<Frame>>,
}

/// What makes the frames of a pack of this zstd level.
pub(super) fn compressor(level: i32) -> Result<Compressor<'static>, WriteError> {
    let mut compressor = Compressor::new(level).map_err(WriteError::Compress)?;
    // Lets `zstd -t` find damage; costs four bytes a chunk.
    compressor.set_parameter(CParameter::ChecksumFlag(true)).map_err(WriteError::Compress)?;
    Ok(compressor)
}

/// Compresses until there is nothing left to do.
pub(super) fn compress_jobs(queue: &Mutex<Receiver<Job>>, compressor: &mut Compressor<'static>) {
    loop {
        let job = queue.lock().expect("receiving does not panic").recv();
        let Ok(Job { plain, reply }) = job else { return };
        let frame = compressor.compress(&plain).map(|bytes| Frame {
            digest: Digest::of(&bytes),
            bytes,
            plain_len: plain.len() as u32,
        });
        let _ = reply.send(frame);
    }
}
