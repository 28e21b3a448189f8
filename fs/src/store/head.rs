//! The start of a pack, asked for beside its index and read from while it arrives: the small members and the first
//! hot pages lie there.

use bytes::Bytes;
use tokio::sync::watch;

use crate::source::{Priority, Source};

/// The first bytes of a pack. Dropping it ends the request.
#[derive(Debug)]
pub(super) struct Head {
    len: u64,
    arrived: Option<watch::Receiver<Arrived>>,
}

#[derive(Debug)]
struct Arrived {
    bytes: Vec<u8>,
    /// No more will come.
    ended: bool,
}

impl Head {
    /// Nothing.
    pub(super) fn none() -> Head {
        Head { len: 0, arrived: None }
    }

    /// Asks for the first `len` bytes, which the caller bounds. Inside a runtime.
    pub(super) fn fetch(source: &Source, len: u64) -> Head {
        if len == 0 {
            return Head::none();
        }
        let nothing = Arrived { bytes: Vec::with_capacity(len as usize), ended: false };
        let (sender, arrived) = watch::channel(nothing);
        let mut body = source.stream_at(0, len, Priority::Demand);
        tokio::spawn(async move {
            // Only a short cut: whoever needs what is missing asks for it again, and sees the error.
            while let Ok(Some(piece)) = body.next().await {
                if sender.is_closed() {
                    break;
                }
                sender.send_modify(|arrived| arrived.bytes.extend_from_slice(&piece));
            }
            sender.send_modify(|arrived| arrived.ended = true);
        });
        Head { len, arrived: Some(arrived) }
    }

    /// Bytes that were asked for.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Waits for the `len` bytes at `offset`. `None` when they will not come.
    pub(super) async fn bytes(&self, offset: u64, len: u32) -> Option<Bytes> {
        let mut arrived = self.arrived.clone()?;
        let range = offset as usize..offset as usize + len as usize;
        let arrived =
            arrived.wait_for(|arrived| arrived.ended || arrived.bytes.len() >= range.end).await.ok()?;
        arrived.bytes.get(range).map(Bytes::copy_from_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::FileSource;
    use std::io::Write;

    #[tokio::test]
    async fn what_does_not_come_is_not_waited_for() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 1000]).unwrap();
        let source = Source::File(FileSource::open(file.path()).unwrap());
        let head = Head::fetch(&source, 1000);
        assert_eq!(head.bytes(990, 10).await.unwrap(), [7; 10][..]);
        assert_eq!(head.bytes(990, 11).await, None);
        let failing = Head::fetch(&source, 2000);
        assert_eq!(failing.bytes(0, 2000).await, None);
        assert_eq!(Head::none().bytes(0, 0).await, None);
    }
}
