//! Between the engine, which reads and writes on a thread of its own, and connections, which wait for each other in the
//! runtime: bounded channels of byte chunks. A side that does not move for a while is given up.

use bytes::Bytes;
use std::io::{self, Read, Write};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::time::timeout;

/// Chunks that may wait in a channel.
pub const WAITING: usize = 4;
/// How long a client may take none of what comes, or give none of what is awaited.
pub const IDLE: Duration = Duration::from_secs(60);

/// The bytes that a client sends, for a thread of the engine.
pub struct ChannelReader {
    chunks: Receiver<io::Result<Bytes>>,
    left: Bytes,
}

/// A reader, and where its bytes go in. When that is dropped the bytes are at their end.
pub fn reader() -> (Sender<io::Result<Bytes>>, ChannelReader) {
    let (sender, chunks) = mpsc::channel(WAITING);
    (sender, ChannelReader { chunks, left: Bytes::new() })
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.left = chunk?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.left.len());
        buffer[..count].copy_from_slice(&self.left.split_to(count));
        Ok(count)
    }
}

/// Takes bytes from a thread of the engine, for a client; as whatever `wrap` makes of them.
pub struct ChannelWriter<T, F> {
    items: Sender<T>,
    wrap: F,
    runtime: Handle,
}

impl<T: Send, F: FnMut(Bytes) -> T> ChannelWriter<T, F> {
    /// To be called in the runtime.
    pub fn new(items: Sender<T>, wrap: F) -> ChannelWriter<T, F> {
        ChannelWriter { items, wrap, runtime: Handle::current() }
    }
}

impl<T: Send, F: FnMut(Bytes) -> T> Write for ChannelWriter<T, F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let item = (self.wrap)(Bytes::copy_from_slice(bytes));
        let sent = self.runtime.block_on(async { timeout(IDLE, self.items.send(item)).await });
        match sent {
            Ok(Ok(())) => Ok(bytes.len()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps the first bytes of a stream, and notes that there were more.
#[derive(Debug)]
pub struct Capped {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether there were more.
    pub cut: bool,
    max: usize,
}

impl Capped {
    /// For so many bytes.
    pub fn new(max: usize) -> Capped {
        Capped { bytes: Vec::new(), cut: false, max }
    }

    /// As many of these as there is room for.
    pub fn keep(&mut self, bytes: &[u8]) {
        let room = self.max.saturating_sub(self.bytes.len()).min(bytes.len());
        self.bytes.extend_from_slice(&bytes[..room]);
        self.cut |= room < bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_arrive_whole_and_in_order() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let (sender, mut reader) = reader();
        let (items, mut taken) = mpsc::channel(WAITING);
        let mut writer = runtime.block_on(async { ChannelWriter::new(items, |bytes| bytes) });
        let copy = std::thread::spawn(move || io::copy(&mut reader, &mut writer).unwrap());
        let sent: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
        let mut received = Vec::new();
        runtime.block_on(async {
            let (all, send) = (sent.clone(), sender);
            tokio::spawn(async move {
                for chunk in all.chunks(777) {
                    send.send(Ok(Bytes::copy_from_slice(chunk))).await.unwrap();
                }
            });
            while let Some(bytes) = taken.recv().await {
                received.extend_from_slice(&bytes);
            }
        });
        assert_eq!(copy.join().unwrap(), 100_000);
        assert!(received == sent);
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let mut capped = Capped::new(3);
        capped.keep(b"ab");
        assert!(!capped.cut);
        capped.keep(b"cd");
        assert_eq!((&capped.bytes[..], capped.cut), (&b"abc"[..], true));
    }
}
