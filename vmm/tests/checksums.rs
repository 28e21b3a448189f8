//! Whatever goes wrong while an image is filled, a machine that ends its hash of all of its memory has the right one, and a
//! machine that cannot have its memory prints nothing. On the real /dev/kvm and userfaultfd.

mod common;

use bytes::Bytes;
use common::{hashing_machine, hypervisor, layout, noise, peripherals, printed, run_until, wrong_pages};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::machine::Machine;
use forkd_vmm::memory::{GuestMemory, ImageId, Mapping, Sharing};
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, Pager, SourceFailure};
use forkd_vmm::uffd::{Uffd, UffdReads};
use forkd_vmm::vmstate::MachineState;
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const RAM: u64 = 8 << 20;
const CHUNK: u64 = 256 << 10;
const CHUNKS: u64 = RAM / CHUNK;
const LIMIT: Duration = Duration::from_secs(20);

/// What happens to one load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error,
    Panic,
    OnePageShort,
    Empty,
    TooLong,
    Late,
}

/// Serves chunks of the full image, after the faults that are planned.
struct Origin {
    full: OwnedFd,
    plan: Mutex<HashMap<u64, Fault>>,
    gone: Mutex<Sender<(u64, Vec<ClientId>)>>,
}

impl Origin {
    fn content(&self, chunk: u64) -> ChunkContent {
        let mut bytes = vec![0; CHUNK as usize];
        rustix::io::pread(&self.full, &mut bytes, chunk * CHUNK).unwrap();
        let zero = bytes.iter().all(|byte| *byte == 0);
        if zero { ChunkContent::Zero } else { ChunkContent::Data(Bytes::from(bytes)) }
    }

    /// The same, but as bytes also where it is zero.
    fn bytes(&self, chunk: u64) -> Bytes {
        match self.content(chunk) {
            ChunkContent::Zero => vec![0; CHUNK as usize].into(),
            ChunkContent::Data(bytes) => bytes,
        }
    }
}

impl PageSource for Origin {
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        let planned = self.plan.lock().unwrap().remove(&chunk.chunk);
        let bytes = || self.bytes(chunk.chunk);
        Ok(match planned {
            None => self.content(chunk.chunk),
            Some(Fault::Late) => {
                std::thread::sleep(Duration::from_millis(5));
                self.content(chunk.chunk)
            }
            Some(Fault::Error) => return Err("the network is gone".into()),
            Some(Fault::Panic) => panic!("a bug, on purpose"),
            Some(Fault::OnePageShort) => ChunkContent::Data(bytes().slice(..CHUNK as usize - 4096)),
            Some(Fault::Empty) => ChunkContent::Data(Bytes::new()),
            Some(Fault::TooLong) => ChunkContent::Data([&bytes()[..], &[7; 4096]].concat().into()),
        })
    }

    fn unavailable(&self, chunk: ImageChunk, waiters: &[ClientId], _failure: SourceFailure) {
        self.gone.lock().unwrap().send((chunk.chunk, waiters.to_vec())).unwrap();
    }
}

/// A saved machine, which pagers can be made for.
struct Saved {
    full: OwnedFd,
    state: MachineState,
    hash: u64,
}

impl Saved {
    fn new() -> Saved {
        let (full, state, hash) = hashing_machine();
        Saved { full, state, hash }
    }

    fn bed(&self, reading: Option<UffdReads>) -> Bed {
        let (sender, gone) = channel();
        let full = self.full.try_clone().unwrap();
        let origin = Arc::new(Origin { full, plan: Mutex::default(), gone: Mutex::new(sender) });
        let shape = ImageShape { bytes: RAM, chunk_bytes: CHUNK };
        let pager = Pager::with_reading(reading, &[(ImageId::Ram, shape)], origin.clone(), 3)
            .expect("these tests need userfaultfd");
        Bed { origin, pager: Arc::new(pager), gone }
    }

    /// A machine on the pager's image, that runs in a thread of its own.
    fn fork(&self, pager: &Pager, client: u64) -> Running {
        let mapping =
            Mapping::of_file(pager.image_file(ImageId::Ram).unwrap(), RAM, Sharing::Private).unwrap();
        let uffd = Uffd::new().unwrap();
        uffd.register(&mapping).unwrap();
        let handed_over = uffd.as_fd().try_clone_to_owned().unwrap();
        pager.attach(ClientId(client), handed_over, vec![mapping.address()]).unwrap();
        let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
        let (peripherals, console) = peripherals(Vec::new());
        let state = self.state.clone();
        let thread = std::thread::spawn(move || {
            let mut machine = Machine::restore(hypervisor(), &state, memory, peripherals).unwrap();
            run_until(&mut machine, Ring::Ready);
            drop((machine, uffd));
        });
        Running { thread, console }
    }
}

struct Bed {
    origin: Arc<Origin>,
    pager: Arc<Pager>,
    gone: Receiver<(u64, Vec<ClientId>)>,
}

struct Running {
    thread: JoinHandle<()>,
    console: File,
}

impl Running {
    fn has_printed(&self) -> bool {
        self.console.metadata().unwrap().len() > 0
    }

    /// What it printed at its end, which must come.
    fn hash(self) -> u64 {
        let deadline = std::time::Instant::now() + LIMIT;
        while !self.thread.is_finished() {
            assert!(std::time::Instant::now() < deadline, "a machine hangs");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.thread.join().unwrap();
        u64::from_le_bytes(printed(self.console).try_into().expect("eight bytes"))
    }
}

#[test]
fn a_machine_without_faults_hashes_what_the_file_has() {
    let saved = Saved::new();
    for reading in [None, Some(UffdReads::MayBlock)] {
        let bed = saved.bed(reading);
        assert_eq!(saved.fork(&bed.pager, 1).hash(), saved.hash);
        assert_eq!(bed.pager.stats().present_chunks, CHUNKS, "all of its memory was read");
    }
}

#[test]
fn a_chunk_that_fails_is_never_made_up_wherever_it_is() {
    let saved = Saved::new();
    for chunk in 0..CHUNKS {
        let third = [Fault::Panic, Fault::Empty, Fault::TooLong][chunk as usize % 3];
        for fault in [Fault::Error, Fault::OnePageShort, third] {
            let bed = saved.bed(None);
            bed.origin.plan.lock().unwrap().insert(chunk, fault);
            let first = saved.fork(&bed.pager, 1);
            let (lost, waiters) = bed.gone.recv_timeout(LIMIT).unwrap();
            assert_eq!((lost, waiters), (chunk, vec![ClientId(1)]), "{fault:?}");
            std::thread::sleep(Duration::from_millis(1));
            assert!(!first.has_printed(), "{fault:?} at {chunk}: a machine went on without its memory");
            assert!(bed.pager.waits().contains_key(&ClientId(1)), "{fault:?} at {chunk}");
            // Whoever comes next has it tried again, and that helps the one that waits as well.
            let second = saved.fork(&bed.pager, 2);
            assert_eq!(first.hash(), saved.hash, "{fault:?} at {chunk}");
            assert_eq!(second.hash(), saved.hash, "{fault:?} at {chunk}: the sibling");
            assert_eq!(bed.pager.failure(), None);
        }
    }
}

#[test]
fn late_chunks_and_chunks_installed_at_the_same_time_are_right() {
    let saved = Saved::new();
    for chunk in 0..CHUNKS {
        let bed = saved.bed(None);
        bed.origin.plan.lock().unwrap().insert(chunk, Fault::Late);
        let child = saved.fork(&bed.pager, 1);
        // Its neighbours and itself, again and again, whole and as single pages, while they are demanded.
        for at in [chunk, (chunk + 1) % CHUNKS, chunk] {
            let (id, bytes) = (ImageChunk { image: ImageId::Ram, chunk: at }, bed.origin.bytes(at));
            for page in (0..CHUNK).step_by(3 * 4096) {
                let page = page as usize..page as usize + 4096;
                let offset = at * CHUNK + page.start as u64;
                bed.pager.install_pages(ImageId::Ram, offset, &bytes[page]).unwrap();
            }
            bed.pager.wake_waiters(id);
            bed.pager.install(id, &bed.origin.content(at)).unwrap();
            bed.pager.install(id, &bed.origin.content(at)).unwrap();
        }
        assert_eq!(child.hash(), saved.hash, "at {chunk}");
        assert_eq!(wrong_pages(bed.pager.image_file(ImageId::Ram).unwrap(), &saved.full), [0; 0]);
    }
}

#[test]
fn everything_at_once_ends_in_right_hashes() {
    let saved = Saved::new();
    for round in 0..12_u64 {
        let bed = saved.bed([None, Some(UffdReads::MayBlock)][round as usize % 2]);
        let late = (0..CHUNKS).filter(|chunk| noise(round * 100 + chunk).is_multiple_of(3));
        bed.origin.plan.lock().unwrap().extend(late.map(|chunk| (chunk, Fault::Late)));
        let (pager, origin) = (Arc::clone(&bed.pager), Arc::clone(&bed.origin));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let pages = std::thread::spawn(move || {
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let page = noise(round << 32 | number) % (RAM / 4096);
                let (chunk, within) = (page * 4096 / CHUNK, (page * 4096 % CHUNK) as usize);
                let bytes = origin.bytes(chunk);
                pager.install_pages(ImageId::Ram, page * 4096, &bytes[within..within + 4096]).unwrap();
                pager.wake_waiters(ImageChunk { image: ImageId::Ram, chunk });
            }
        });
        let children: Vec<_> = (1..=3).map(|client| saved.fork(&bed.pager, client)).collect();
        std::thread::sleep(Duration::from_micros(noise(round) % 8000));
        for number in 0..CHUNKS {
            let id = ImageChunk { image: ImageId::Ram, chunk: (number * 7 + round) % CHUNKS };
            bed.pager.install(id, &bed.origin.content(id.chunk)).unwrap();
        }
        // Ends the watch while machines are in the middle of faults.
        assert!(bed.pager.complete(|_| false));
        let latecomer = saved.fork(&bed.pager, 4);
        for child in children.into_iter().chain([latecomer]) {
            assert_eq!(child.hash(), saved.hash, "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
        pages.join().unwrap();
        assert_eq!(bed.pager.failure(), None);
        assert_eq!(wrong_pages(bed.pager.image_file(ImageId::Ram).unwrap(), &saved.full), [0; 0]);
    }
}

#[test]
fn a_dead_pager_freezes_machines() {
    let saved = Saved::new();
    let bed = saved.bed(None);
    bed.origin.plan.lock().unwrap().insert(CHUNKS / 2, Fault::Error);
    let child = saved.fork(&bed.pager, 1);
    bed.gone.recv_timeout(LIMIT).unwrap();
    let image = bed.pager.image_file(ImageId::Ram).unwrap().try_clone_to_owned().unwrap();
    let pager = Arc::into_inner(bed.pager).unwrap();
    drop(pager);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!child.thread.is_finished() && !child.has_printed(), "it went on without its memory");
    assert_eq!(wrong_pages(&image, &saved.full), [0; 0], "the image has what nobody put there");
}
