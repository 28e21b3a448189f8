//! What a fault on an image costs: the real pager and userfaultfd, a source that has every chunk in memory. How long a
//! guest waits, with a real source, is for `benches/fault.py` to say.

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use forkd_vmm::memory::{GuestMemory, ImageId, Mapping, MemoryLayout, Sharing};
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, Pager, SourceFailure};
use forkd_vmm::uffd::Uffd;
use rustix::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY_MIB: u64 = 64;
const PAGE: u64 = 4096;
/// As many as a sandbox has.
const WORKERS: usize = 8;
/// The pager keeps the descriptors of machines that have ended.
const CLIENTS_MAX: u64 = 100;

/// The same bytes for every chunk.
struct Warm(Bytes);

impl PageSource for Warm {
    fn load(&self, _chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        Ok(ChunkContent::Data(self.0.clone()))
    }

    fn unavailable(&self, chunk: ImageChunk, _waiters: &[ClientId], failure: SourceFailure) {
        panic!("{chunk:?} is always there: {failure}");
    }
}

/// An image of which nothing is there yet.
struct Image {
    pager: Pager,
    layout: MemoryLayout,
    clients: u64,
}

impl Image {
    fn new(chunk_bytes: u64) -> Image {
        let layout = MemoryLayout::new(MEMORY_MIB, 0).unwrap();
        let shape = ImageShape { bytes: layout.ram_bytes(), chunk_bytes };
        let source = Arc::new(Warm(vec![0x5a; chunk_bytes as usize].into()));
        let pager = Pager::new(&[(ImageId::Ram, shape)], source, WORKERS).expect("userfaultfd is needed");
        Image { pager, layout, clients: 0 }
    }

    /// An image of which everything is there.
    fn filled() -> Image {
        let mut image = Image::new(256 << 10);
        let (memory, _uffd) = image.attach();
        touch(&memory, 256 << 10, u64::MAX);
        image
    }

    /// A machine's view of it, and the watch over it, which must be kept as long.
    fn attach(&mut self) -> (GuestMemory, Uffd) {
        let file = self.pager.image_file(ImageId::Ram).unwrap();
        let mapping = Mapping::of_file(file, self.layout.ram_bytes(), Sharing::Private).unwrap();
        let uffd = Uffd::new().unwrap();
        uffd.register(&mapping).unwrap();
        let handed_over = uffd.as_fd().try_clone_to_owned().unwrap();
        self.clients += 1;
        self.pager.attach(ClientId(self.clients), handed_over, vec![mapping.address()]).unwrap();
        (GuestMemory::new(&self.layout, vec![mapping]).unwrap(), uffd)
    }
}

/// Reads a byte every `step` bytes, at most `count` of them; returns how many and how long they took.
fn touch(memory: &GuestMemory, step: u64, count: u64) -> (u64, Duration) {
    let ram = memory.ram();
    let reads = count.min((MEMORY_MIB << 20) / step);
    let started = Instant::now();
    for read in 0..reads {
        assert_eq!(ram.read_obj::<u8>(GuestAddress(read * step)).unwrap(), 0x5a);
    }
    (reads, started.elapsed())
}

/// Adds up what `round` times until it has timed `wanted`.
fn repeat(wanted: u64, mut round: impl FnMut(u64) -> (u64, Duration)) -> Duration {
    let (mut left, mut total) = (wanted, Duration::ZERO);
    while left > 0 {
        let (done, took) = round(left);
        left -= done;
        total += took;
    }
    total
}

fn faults(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fault");
    for chunk_kib in [64, 256, 1024] {
        group.bench_function(BenchmarkId::new("demand", format!("{chunk_kib} KiB")), |bencher| {
            bencher.iter_custom(|wanted| {
                repeat(wanted, |left| {
                    let mut image = Image::new(chunk_kib << 10);
                    let (memory, _uffd) = image.attach();
                    touch(&memory, chunk_kib << 10, left)
                })
            });
        });
    }
    let mut filled = Image::filled();
    group.bench_function("page present", |bencher| {
        bencher.iter_custom(|wanted| {
            repeat(wanted, |left| {
                if filled.clients > CLIENTS_MAX {
                    filled = Image::filled();
                }
                let (sibling, _uffd) = filled.attach();
                touch(&sibling, PAGE, left)
            })
        });
    });
    group.finish();
}

criterion_group!(benches, faults);
criterion_main!(benches);
