//! virtio-blk (virtio 1.2, section 5.2): a scratch disk of the machine's own, for workloads that write more than memory
//! holds. It is a sparse file without a name: empty in every machine, and gone with it.
//!
//! Requests are served in the vCPU's own thread by pread(2) and pwrite(2): data mostly goes to and from the host's
//! page cache, and a guest that waits for its disk needs no second thread to wait with. One notification serves the
//! requests that were in the ring when it came and moves at most `NOTIFY_BYTES`, so the device's lock is held for a
//! bounded time.
//!
//! No flushes are asked for (`VIRTIO_BLK_F_FLUSH` is not offered): a completed write outlives the guest's kernel, and
//! what would lose it ends the machine, and with it the disk, anyway.

use super::device::{DeviceState, VirtioDevice, VirtioError, read_config_bytes, wants_interrupt};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::GuestMemoryMmap;

/// Unit of all addresses and lengths on the disk, bytes (virtio 1.2, section 5.2.4).
pub const SECTOR: u64 = 512;
/// Largest scratch disk, MiB.
pub const SCRATCH_MIB_MAX: u32 = 64 * 1024;

const QUEUE_SIZE: u16 = 128;
/// Most data segments of a request: a ring's descriptors less those of header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Longest segment, bytes.
const SEGMENT_BYTES: u32 = 64 * 1024;
/// Most data of all requests that are served at one notification, bytes. The ring of a driver that keeps to the limits
/// above cannot hold more, as each of its descriptors is one segment.
const NOTIFY_BYTES: usize = QUEUE_SIZE as usize * SEGMENT_BYTES as usize;
/// What is copied at a time, bytes.
const BOUNCE: usize = 64 * 1024;
/// Most sectors of one discard or write-zeroes request (1 GiB).
const ERASE_SECTORS: u32 = 1 << 21;
/// Length of the request header: type, priority, sector.
const HEADER: usize = 16;
/// Length of a discard or write-zeroes segment: sector, number of sectors, flags.
const ERASE_SEGMENT: usize = 16;
/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;
/// Length of the answer to GET_ID.
const ID_BYTES: usize = 20;
const ID: &[u8; ID_BYTES] = b"forkd-scratch\0\0\0\0\0\0\0";

/// The file behind a scratch disk.
#[derive(Debug)]
pub struct ScratchDisk {
    /// Read and written at the disk's offsets.
    pub file: File,
    /// Its length.
    pub bytes: u64,
}

/// How a request ends (virtio 1.2, section 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Io = 1,
    Unsupported = 2,
}

impl From<std::io::Error> for Failure {
    fn from(_: std::io::Error) -> Failure {
        Failure::Io
    }
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Option<ScratchDisk>,
    sectors: u64,
}

impl Block {
    /// A disk on a file; without one every request fails.
    pub fn new(disk: Option<ScratchDisk>) -> Block {
        let sectors = disk.as_ref().map_or(0, |disk| disk.bytes / SECTOR);
        Block { disk, sectors }
    }

    /// Serves one request; returns how many bytes of guest memory were written.
    fn serve(
        &self,
        chain: DescriptorChain<&GuestMemoryMmap>,
        ram: &GuestMemoryMmap,
        budget: &mut usize,
    ) -> Result<u32, VirtioError> {
        let mut request = chain.clone().reader(ram)?;
        let mut data = chain.writer(ram)?;
        // The last byte that may be written is the status, whatever the buffers' borders.
        let Some(room) = data.available_bytes().checked_sub(1) else { return Ok(0) };
        let mut status = data.split_at(room).map_err(|_| virtio_queue::Error::InvalidChain)?;
        let code = match self.execute(&mut request, &mut data, budget) {
            Ok(()) => 0,
            Err(failure) => failure as u8,
        };
        // There is room for it: the chain was split there.
        let _ = status.write_all(&[code]);
        Ok(data.bytes_written() as u32 + 1)
    }

    fn execute(
        &self,
        request: &mut Reader<'_>,
        data: &mut Writer<'_>,
        budget: &mut usize,
    ) -> Result<(), Failure> {
        let disk = self.disk.as_ref().ok_or(Failure::Io)?;
        let mut header = [0; HEADER];
        request.read_exact(&mut header)?;
        let sector = le_u64(&header[8..]);
        match le_u32(&header) {
            blk::VIRTIO_BLK_T_IN => {
                let offset = self.offset(disk, sector, data.available_bytes() as u64)?;
                read(&disk.file, offset, data, budget)
            }
            blk::VIRTIO_BLK_T_OUT => {
                let offset = self.offset(disk, sector, request.available_bytes() as u64)?;
                write(&disk.file, offset, request, budget)
            }
            // Nothing is held back; see the module's description.
            blk::VIRTIO_BLK_T_FLUSH => Ok(()),
            blk::VIRTIO_BLK_T_GET_ID => Ok(data.write_all(&ID[..ID_BYTES.min(data.available_bytes())])?),
            kind @ (blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES) => {
                self.erase(disk, kind, request)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Where a range of the disk lies in its file, if the disk has all of it.
    fn offset(&self, disk: &ScratchDisk, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let capacity = self.sectors.saturating_mul(SECTOR).min(disk.bytes);
        let start = sector.checked_mul(SECTOR).ok_or(Failure::Io)?;
        let end = start.checked_add(bytes).ok_or(Failure::Io)?;
        if bytes.is_multiple_of(SECTOR) && end <= capacity { Ok(start) } else { Err(Failure::Io) }
    }

    fn erase(&self, disk: &ScratchDisk, kind: u32, request: &mut Reader<'_>) -> Result<(), Failure> {
        let mut segment = [0; ERASE_SEGMENT];
        request.read_exact(&mut segment)?;
        let (sectors, flags) = (le_u32(&segment[8..]), le_u32(&segment[12..]));
        if request.available_bytes() > 0 || sectors > ERASE_SECTORS {
            return Err(Failure::Io);
        }
        let how = match (kind, flags) {
            (blk::VIRTIO_BLK_T_DISCARD, 0) | (blk::VIRTIO_BLK_T_WRITE_ZEROES, UNMAP) => {
                FallocateFlags::PUNCH_HOLE
            }
            (blk::VIRTIO_BLK_T_WRITE_ZEROES, 0) => FallocateFlags::ZERO_RANGE,
            _ => return Err(Failure::Unsupported),
        };
        let bytes = u64::from(sectors) * SECTOR;
        let offset = self.offset(disk, le_u64(&segment), bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        match rustix::fs::fallocate(&disk.file, how | FallocateFlags::KEEP_SIZE, offset, bytes) {
            Ok(()) => Ok(()),
            // The driver then writes zeros itself.
            Err(Errno::OPNOTSUPP) => Err(Failure::Unsupported),
            Err(_) => Err(Failure::Io),
        }
    }
}

fn read(file: &File, mut offset: u64, data: &mut Writer<'_>, budget: &mut usize) -> Result<(), Failure> {
    spend(budget, data.available_bytes())?;
    let mut bounce = vec![0; BOUNCE.min(data.available_bytes())];
    while data.available_bytes() > 0 {
        let part = &mut bounce[..BOUNCE.min(data.available_bytes())];
        file.read_exact_at(part, offset)?;
        data.write_all(part)?;
        offset += part.len() as u64;
    }
    Ok(())
}

fn write(file: &File, mut offset: u64, data: &mut Reader<'_>, budget: &mut usize) -> Result<(), Failure> {
    spend(budget, data.available_bytes())?;
    let mut bounce = vec![0; BOUNCE.min(data.available_bytes())];
    while data.available_bytes() > 0 {
        let part = &mut bounce[..BOUNCE.min(data.available_bytes())];
        data.read_exact(part)?;
        file.write_all_at(part, offset)?;
        offset += part.len() as u64;
    }
    Ok(())
}

fn spend(budget: &mut usize, bytes: usize) -> Result<(), Failure> {
    *budget = budget.checked_sub(bytes).ok_or(Failure::Io)?;
    Ok(())
}

fn le_u32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn le_u64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        1 << blk::VIRTIO_BLK_F_SIZE_MAX
            | 1 << blk::VIRTIO_BLK_F_SEG_MAX
            | 1 << blk::VIRTIO_BLK_F_DISCARD
            | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        // struct virtio_blk_config (virtio 1.2, section 5.2.4).
        let mut config = [0; 60];
        config[..8].copy_from_slice(&self.sectors.to_le_bytes());
        let fields = [
            (8, SEGMENT_BYTES),
            (12, SEGMENTS_MAX),
            // Discards: longest, segments of a request, alignment in sectors.
            (36, ERASE_SECTORS),
            (40, 1),
            (44, 8),
            // Zeroes: longest, segments of a request, whether they may free space.
            (48, ERASE_SECTORS),
            (52, 1),
            (56, 1),
        ];
        for (at, value) in fields {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        read_config_bytes(&config, offset, into);
    }

    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        let Some(queue) = queues.get_mut(queue) else { return Ok(false) };
        let chains: Vec<_> = queue.iter(ram)?.collect();
        let used = !chains.is_empty();
        let mut budget = NOTIFY_BYTES;
        for chain in chains {
            let head = chain.head_index();
            let written = self.serve(chain, ram, &mut budget)?;
            queue.add_used(ram, head, written)?;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block { sectors: self.sectors }
    }

    fn restore(&mut self, state: &DeviceState) {
        // The driver knows this capacity. Where the file is shorter, requests fail.
        if let DeviceState::Block { sectors } = state {
            self.sectors = *sectors;
        }
    }
}
