//! A packet that the guest sent, gathered from its descriptors: Linux puts payloads of more than 32 KiB into several (since
//! 6.17, and in its stable series). Layout: virtio 1.2, section 5.10.6.

use std::io::{self, Read};
use virtio_queue::DescriptorChain;
use virtio_vsock::packet::PKT_HEADER_SIZE;
use vm_memory::GuestMemoryMmap;

/// Longest payload that is taken from the guest in one packet, bytes (Linux sends 64 KiB).
pub(super) const PAYLOAD_MAX: u32 = 64 * 1024;

/// A packet cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum PacketError {
    /// Its descriptors lead outside of memory.
    #[error("its descriptors cannot be read")]
    Chain(#[from] virtio_queue::Error),
    /// It is longer than anybody needs.
    #[error("its payload has {len} bytes")]
    TooLong {
        /// As it says.
        len: u32,
    },
    /// Its descriptors hold less than it says.
    #[error("it is cut short")]
    Short(#[from] io::Error),
}

/// What the guest said. Its length is that of its payload; its source CID is its own, whatever it says.
#[derive(Debug)]
pub(super) struct GuestPacket {
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
    pub(super) payload: Vec<u8>,
}

impl GuestPacket {
    pub(super) fn read(
        ram: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<GuestPacket, PacketError> {
        let mut reader = chain.reader(ram)?;
        let mut header = [0; PKT_HEADER_SIZE];
        reader.read_exact(&mut header)?;
        let part = |at: usize, bytes: usize| {
            header[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let len = part(24, 4) as u32;
        if len > PAYLOAD_MAX {
            return Err(PacketError::TooLong { len });
        }
        let mut payload = vec![0; len as usize];
        reader.read_exact(&mut payload)?;
        Ok(GuestPacket {
            dst_cid: part(8, 8),
            src_port: part(16, 4) as u32,
            dst_port: part(20, 4) as u32,
            kind: part(28, 2) as u16,
            op: part(30, 2) as u16,
            flags: part(32, 4) as u32,
            buf_alloc: part(36, 4) as u32,
            fwd_cnt: part(40, 4) as u32,
            payload,
        })
    }
}
