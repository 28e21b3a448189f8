//! Machines run on images that are filled while they run, on the real /dev/kvm and userfaultfd.

mod common;

use bytes::Bytes;
use common::{SUM, hypervisor, image, layout, machine, peripherals, printed, run_until};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::machine::Machine;
use forkd_vmm::memory::{GuestMemory, ImageId, Mapping, Sharing};
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, Pager, SourceFailure};
use forkd_vmm::uffd::Uffd;
use forkd_vmm::vmstate::MachineState;
use rustix::fd::{AsFd, OwnedFd};
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const CHUNK: u64 = 64 * 1024;
const RAM: u64 = 8 << 20;

/// Serves chunks of a full image, notes which, and can be made to fail or hang.
struct Origin {
    full: OwnedFd,
    loaded: Mutex<Vec<u64>>,
    failing: AtomicBool,
    hanging: Mutex<()>,
    gone: Mutex<Sender<ImageChunk>>,
}

impl PageSource for Origin {
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        drop(self.hanging.lock().unwrap());
        if self.failing.load(Ordering::Relaxed) && chunk.chunk * CHUNK >= 4 << 20 {
            return Err("the network is gone".into());
        }
        self.loaded.lock().unwrap().push(chunk.chunk);
        let mut bytes = vec![0; CHUNK as usize];
        rustix::io::pread(&self.full, &mut bytes, chunk.chunk * CHUNK)?;
        let zero = bytes.iter().all(|byte| *byte == 0);
        Ok(if zero { ChunkContent::Zero } else { ChunkContent::Data(Bytes::from(bytes)) })
    }

    fn unavailable(&self, chunk: ImageChunk, _waiters: &[ClientId], _failure: SourceFailure) {
        self.gone.lock().unwrap().send(chunk).unwrap();
    }
}

struct Setup {
    origin: Arc<Origin>,
    pager: Pager,
    state: MachineState,
    expected: u32,
}

/// A saved machine whose memory only its origin has. Every page from 2 to 6 MiB starts with its own number, every
/// third 64 KiB chunk of them aside, which is zero.
fn setup() -> (Setup, Receiver<ImageChunk>) {
    let full = image(SUM);
    let mut expected = 0_u32;
    for page in 512..1536_u32 {
        if (page / 16) % 3 != 0 {
            rustix::io::pwrite(&full, &page.to_le_bytes(), u64::from(page) * 4096).unwrap();
            expected = expected.wrapping_add(page);
        }
    }
    let (mut original, _console) = machine(&full, Vec::new());
    run_until(&mut original, Ring::SnapshotHere);
    let state = original.save().unwrap();
    let (sender, gone) = channel();
    let origin = Arc::new(Origin {
        full,
        loaded: Mutex::default(),
        failing: AtomicBool::new(false),
        hanging: Mutex::new(()),
        gone: Mutex::new(sender),
    });
    let shape = ImageShape { bytes: RAM, chunk_bytes: CHUNK };
    let pager =
        Pager::new(&[(ImageId::Ram, shape)], origin.clone(), 2).expect("these tests need userfaultfd");
    (Setup { origin, pager, state, expected }, gone)
}

/// A machine on the pager's image, attached as `client`; the descriptor must be kept while it runs.
fn fork(setup: &Setup, client: u64, zero_runs: &[std::ops::Range<u64>]) -> (Machine, File, Uffd) {
    let file = setup.pager.image_file(ImageId::Ram).unwrap();
    let mapping = Mapping::of_file(file, RAM, Sharing::Private).unwrap();
    let uffd = Uffd::new().unwrap();
    uffd.register(&mapping).unwrap();
    mapping.overlay_zero(zero_runs).unwrap();
    let handed_over = uffd.as_fd().try_clone_to_owned().unwrap();
    setup.pager.attach(ClientId(client), handed_over, vec![mapping.address()]).unwrap();
    let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
    let (peripherals, console) = peripherals(Vec::new());
    (Machine::restore(hypervisor(), &setup.state, memory, peripherals).unwrap(), console, uffd)
}

fn sum(console: File) -> u32 {
    u32::from_le_bytes(printed(console).try_into().expect("four bytes"))
}

#[test]
fn a_fork_runs_before_its_memory_is_there_and_gets_it_right() {
    let (setup, _gone) = setup();
    let (mut child, console, _uffd) = fork(&setup, 1, &[]);
    run_until(&mut child, Ring::Resumed);
    let at_first_instruction = setup.pager.stats().present_chunks;
    assert!(at_first_instruction <= 4, "{at_first_instruction} chunks were needed for the first instruction");
    run_until(&mut child, Ring::Ready);
    assert_eq!(sum(console), setup.expected);
    let stats = setup.pager.stats();
    assert!(stats.present_chunks < stats.chunks, "what is not touched is not loaded: {stats:?}");
    assert_eq!(stats.longest_wait_ms, 0);
}

#[test]
fn siblings_share_what_one_of_them_loaded() {
    let (setup, _gone) = setup();
    std::thread::scope(|scope| {
        let child = |client| {
            let setup = &setup;
            scope.spawn(move || {
                let (mut child, console, _uffd) = fork(setup, client, &[]);
                run_until(&mut child, Ring::Ready);
                sum(console)
            })
        };
        let children: Vec<_> = (1..=4).map(child).collect();
        for child in children {
            assert_eq!(child.join().unwrap(), setup.expected);
        }
    });
    let mut loaded = setup.origin.loaded.lock().unwrap().clone();
    let count = loaded.len();
    loaded.sort_unstable();
    loaded.dedup();
    assert_eq!(loaded.len(), count, "a chunk was loaded twice");
}

#[test]
fn what_is_put_in_ahead_is_not_asked_for() {
    let (setup, _gone) = setup();
    for chunk in 0..RAM / CHUNK {
        let id = ImageChunk { image: ImageId::Ram, chunk };
        let content = setup.origin.load(id).unwrap();
        setup.pager.install(id, &content).unwrap();
    }
    setup.origin.loaded.lock().unwrap().clear();
    assert!(setup.pager.complete(|_| false));
    let (mut child, console, _uffd) = fork(&setup, 1, &[]);
    run_until(&mut child, Ring::Ready);
    assert_eq!(sum(console), setup.expected);
    assert_eq!(setup.pager.stats().faults, 0);
    assert!(setup.origin.loaded.lock().unwrap().is_empty());
}

#[test]
fn zero_runs_never_reach_the_pager() {
    let (setup, _gone) = setup();
    let zero = (2 << 20)..(6 << 20);
    let runs: Vec<_> = (zero.start..zero.end)
        .step_by(CHUNK as usize)
        .filter(|start| (start / CHUNK).is_multiple_of(3))
        .map(|start| start..start + CHUNK)
        .collect();
    let (mut child, console, _uffd) = fork(&setup, 1, &runs);
    run_until(&mut child, Ring::Ready);
    assert_eq!(sum(console), setup.expected);
    let loaded = setup.origin.loaded.lock().unwrap();
    assert!(loaded.iter().all(|chunk| !runs.contains(&(chunk * CHUNK..(chunk + 1) * CHUNK))), "{loaded:?}");
}

#[test]
fn a_hanging_source_stalls_a_fork_and_it_recovers() {
    let (setup, _gone) = setup();
    let (mut child, console, _uffd) = fork(&setup, 1, &[]);
    run_until(&mut child, Ring::Resumed);
    let network_is_away = setup.origin.hanging.lock().unwrap();
    std::thread::scope(|scope| {
        let running = scope.spawn(move || run_until(&mut child, Ring::Ready));
        std::thread::sleep(Duration::from_millis(150));
        assert!(!running.is_finished(), "the fork went on without its memory");
        assert!(setup.pager.stats().longest_wait_ms >= 50);
        assert!(setup.pager.waits().keys().eq([&ClientId(1)]));
        drop(network_is_away);
        running.join().unwrap();
    });
    assert_eq!(sum(console), setup.expected);
}

#[test]
fn a_failing_source_leaves_a_fork_asleep_and_says_so() {
    let (setup, gone) = setup();
    setup.origin.failing.store(true, Ordering::Relaxed);
    let (mut child, console, uffd) = fork(&setup, 1, &[]);
    let running = std::thread::spawn(move || {
        run_until(&mut child, Ring::Ready);
        sum(console)
    });
    let chunk = gone.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(chunk.chunk * CHUNK >= 4 << 20);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!running.is_finished(), "the fork was given something else than its memory");
    assert!(setup.pager.waits().keys().eq([&ClientId(1)]));
    // Its owner would end it. A sibling that needs the same chunk must be told of as well.
    let (mut sibling, _console, sibling_uffd) = fork(&setup, 2, &[]);
    let sibling = std::thread::spawn(move || run_until(&mut sibling, Ring::Ready));
    assert_eq!(gone.recv_timeout(Duration::from_secs(10)).unwrap(), chunk);
    // Here the chunk comes after all, which must wake both with the right content.
    setup.origin.failing.store(false, Ordering::Relaxed);
    let content = setup.origin.load(chunk).unwrap();
    setup.pager.install(chunk, &content).unwrap();
    assert_eq!(running.join().unwrap(), setup.expected);
    sibling.join().unwrap();
    drop((uffd, sibling_uffd));
}
