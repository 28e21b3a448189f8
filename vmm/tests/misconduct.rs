//! Processes of machines that do to the pager what no honest one does: they are named, nobody but themselves waits, and
//! nobody sees a page that is not the snapshot's.

mod common;

use bytes::Bytes;
use common::{hashing_machine, hypervisor, layout, peripherals, printed, run_until, wrong_pages};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::machine::Machine;
use forkd_vmm::memory::{GuestMemory, ImageId, Mapping, Sharing, create_image};
use forkd_vmm::pager::{
    ChunkContent, ClientId, ImageChunk, ImageShape, Misconduct, PageSource, Pager, PagerError, PagerFailure,
    SourceFailure,
};
use forkd_vmm::uffd::{Uffd, UffdReads};
use forkd_vmm::vmstate::MachineState;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use userfaultfd::{FeatureFlags, UffdBuilder};
use vm_memory::{Bytes as _, GuestAddress};

const RAM: u64 = 8 << 20;
const CHUNK: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(20);

struct Origin(OwnedFd);

impl PageSource for Origin {
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        let mut bytes = vec![0; CHUNK as usize];
        rustix::io::pread(&self.0, &mut bytes, chunk.chunk * CHUNK)?;
        Ok(ChunkContent::Data(Bytes::from(bytes)))
    }

    fn unavailable(&self, _chunk: ImageChunk, _waiters: &[ClientId], failure: SourceFailure) {
        eprintln!("unavailable: {failure}");
    }
}

struct Bed {
    full: OwnedFd,
    state: MachineState,
    hash: u64,
    pager: Pager,
}

impl Bed {
    fn new(reading: Option<UffdReads>) -> Bed {
        let (full, state, hash) = hashing_machine();
        let origin = Arc::new(Origin(full.try_clone().unwrap()));
        let shape = ImageShape { bytes: RAM, chunk_bytes: CHUNK };
        let pager = Pager::with_reading(reading, &[(ImageId::Ram, shape)], origin, 2)
            .expect("these tests need userfaultfd");
        Bed { full, state, hash, pager }
    }

    fn map(&self) -> (Mapping, Uffd) {
        let file = self.pager.image_file(ImageId::Ram).unwrap();
        let mapping = Mapping::of_file(file, RAM, Sharing::Private).unwrap();
        let uffd = Uffd::new().unwrap();
        uffd.register(&mapping).unwrap();
        (mapping, uffd)
    }

    fn attach(&self, client: u64, uffd: &Uffd, base: u64) -> Result<(), PagerError> {
        let handed_over = uffd.as_fd().try_clone_to_owned().unwrap();
        self.pager.attach(ClientId(client), handed_over, vec![base]).map(drop)
    }

    /// An honest machine, running in a thread of its own.
    fn sibling(&self, client: u64) -> (JoinHandle<()>, File) {
        let (mapping, uffd) = self.map();
        self.attach(client, &uffd, mapping.address()).unwrap();
        let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
        let (peripherals, console) = peripherals(Vec::new());
        let state = self.state.clone();
        let thread = std::thread::spawn(move || {
            let mut machine = Machine::restore(hypervisor(), &state, memory, peripherals).unwrap();
            run_until(&mut machine, Ring::Ready);
            drop((machine, uffd));
        });
        (thread, console)
    }

    fn assert_a_sibling_is_served(&self, client: u64) {
        let (thread, console) = self.sibling(client);
        wait_for("the sibling's end", || thread.is_finished());
        thread.join().unwrap();
        assert_eq!(printed(console), self.hash.to_le_bytes());
        assert_eq!(wrong_pages(self.pager.image_file(ImageId::Ram).unwrap(), &self.full), [0; 0]);
        assert_eq!(self.pager.failure(), None);
    }

    fn misconduct(&self) -> (ClientId, Misconduct) {
        let mut found = Vec::new();
        wait_for("misconduct to be noticed", || {
            found.extend(self.pager.take_misconduct());
            !found.is_empty()
        });
        found.remove(0)
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reads a byte of guest memory in a thread that may never come back.
fn touch(mapping: Mapping, offset: u64) -> JoinHandle<u8> {
    let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
    std::thread::spawn(move || memory.ram().read_obj::<u8>(GuestAddress(offset)).unwrap())
}

#[test]
fn what_is_handed_over_is_checked() {
    let bed = Bed::new(None);
    let refused = |uffd: OwnedFd, bases: Vec<u64>| match bed.pager.attach(ClientId(1), uffd, bases) {
        Err(PagerError::Misconduct(misconduct)) => misconduct,
        other => panic!("{other:?}"),
    };
    let (pipe, _other_end) = rustix::pipe::pipe().unwrap();
    let memfd = create_image("anon_inode:[userfaultfd]", 4096).unwrap();
    for other in [pipe, memfd, File::open("/dev/null").unwrap().into()] {
        assert_eq!(refused(other, vec![4096]), Misconduct::NotUserfaultfd);
    }
    let (mapping, uffd) = bed.map();
    let copy = || uffd.as_fd().try_clone_to_owned().unwrap();
    let base = mapping.address();
    for bases in [vec![], vec![base, base], vec![0], vec![base + 1], vec![u64::MAX - 4095], vec![1 << 47]] {
        assert_eq!(refused(copy(), bases.clone()), Misconduct::Bases, "{bases:x?}");
    }
    for feature in [FeatureFlags::EVENT_FORK, FeatureFlags::EVENT_REMAP, FeatureFlags::EVENT_REMOVE] {
        let telling = UffdBuilder::new().require_features(feature).create().unwrap();
        let telling = telling.as_fd().try_clone_to_owned().unwrap();
        assert!(matches!(refused(telling, vec![base]), Misconduct::Features { .. }), "{feature:?}");
    }
    bed.attach(1, &uffd, base).unwrap();
    assert_eq!(refused(copy(), vec![base]), Misconduct::Twice);
    // The first one is still served.
    assert_eq!(touch(mapping, 0x1000).join().unwrap(), 0x67);
    bed.assert_a_sibling_is_served(2);
}

#[test]
fn a_userfaultfd_that_was_made_blocking_is_read_without_blocking() {
    let (_mapping, uffd) = Bed::new(None).map();
    assert_eq!(uffd.reading(), UffdReads::NeverBlocks, "this kernel is older than 6.10");
    rustix::fs::fcntl_setfl(&uffd, OFlags::RDWR).unwrap();
    let reader = std::thread::spawn(move || {
        let mut messages = Vec::new();
        uffd.messages(UffdReads::NeverBlocks, &mut messages).unwrap();
        messages
    });
    wait_for("the read to return", || reader.is_finished());
    assert_eq!(reader.join().unwrap(), []);
}

#[test]
fn whoever_makes_its_userfaultfd_blocking_is_named() {
    for reading in [UffdReads::NeverBlocks, UffdReads::MayBlock] {
        let bed = Bed::new(Some(reading));
        let (mapping, uffd) = bed.map();
        bed.attach(1, &uffd, mapping.address()).unwrap();
        rustix::fs::fcntl_setfl(&uffd, OFlags::RDWR).unwrap();
        let victim = touch(mapping, 3 << 20);
        assert_eq!(bed.misconduct(), (ClientId(1), Misconduct::Flags), "{reading:?}");
        assert!(!victim.is_finished());
        bed.assert_a_sibling_is_served(2);
    }
}

#[test]
fn whoever_takes_its_faults_away_from_the_pager_hangs_nobody_but_itself() {
    for reading in [UffdReads::NeverBlocks, UffdReads::MayBlock] {
        let bed = Bed::new(Some(reading));
        let (mapping, uffd) = bed.map();
        bed.attach(1, &uffd, mapping.address()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thief = std::thread::spawn(move || {
            let mut message = [0; 32];
            while !stopped.load(Ordering::Relaxed) {
                rustix::fs::fcntl_setfl(&uffd, OFlags::RDWR | OFlags::NONBLOCK).unwrap();
                let _ = rustix::io::read(&uffd, &mut message);
                rustix::fs::fcntl_setfl(&uffd, OFlags::RDWR).unwrap();
            }
        });
        let memory = Arc::new(GuestMemory::new(&layout(), vec![mapping]).unwrap());
        for page in 0..64 {
            let memory = Arc::clone(&memory);
            let at = GuestAddress(page * CHUNK * 2 % RAM);
            std::thread::spawn(move || memory.ram().read_obj::<u8>(at).unwrap());
        }
        for client in 2..5 {
            bed.assert_a_sibling_is_served(client);
        }
        stop.store(true, Ordering::Relaxed);
        thief.join().unwrap();
    }
}

#[test]
fn faults_outside_of_the_images_are_not_waited_for() {
    let bed = Bed::new(None);
    let (mapping, uffd) = bed.map();
    bed.attach(1, &uffd, mapping.address() + (1 << 30)).unwrap();
    let address = mapping.address() + 0x5000;
    let _victim = touch(mapping, 0x5000);
    assert_eq!(bed.misconduct(), (ClientId(1), Misconduct::Outside { address }));
    bed.assert_a_sibling_is_served(2);
}

#[test]
fn a_machine_that_watches_something_else_does_not_keep_the_pager_busy_for_ever() {
    let bed = Bed::new(None);
    let uffd = Uffd::new().unwrap();
    // Its pages stay missing, however often the image gets them.
    let other = create_image("something else", RAM).unwrap();
    let mapping = Mapping::of_file(&other, RAM, Sharing::Private).unwrap();
    uffd.register(&mapping).unwrap();
    bed.attach(1, &uffd, mapping.address()).unwrap();
    let victim = touch(mapping, 0x9000);
    bed.assert_a_sibling_is_served(2);
    let (client, misconduct) = bed.misconduct();
    assert!(client == ClientId(1) && matches!(misconduct, Misconduct::Spinning { .. }), "{misconduct}");
    assert!(!victim.is_finished());
    let faults = bed.pager.stats().faults;
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bed.pager.stats().faults, faults, "it is still served");
}

#[test]
fn a_page_that_a_machine_without_a_watch_made_is_noticed_before_anybody_goes_on() {
    let bed = Bed::new(None);
    let (mapping, uffd) = bed.map();
    bed.attach(1, &uffd, mapping.address()).unwrap();
    uffd.unregister(mapping.address(), RAM).unwrap();
    let offset = 5 << 20;
    // The kernel now has a zero page in the image that all siblings share.
    assert_eq!(touch(mapping, offset).join().unwrap(), 0);
    assert_eq!(wrong_pages(bed.pager.image_file(ImageId::Ram).unwrap(), &bed.full), [offset]);
    let (sibling, console) = bed.sibling(2);
    wait_for("the damage to be noticed", || bed.pager.failure().is_some());
    let Some(PagerFailure::Damaged(damaged)) = bed.pager.failure() else {
        panic!("{:?}", bed.pager.failure())
    };
    assert_eq!((damaged.image, damaged.offset), (ImageId::Ram, offset));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!sibling.is_finished(), "it went on with a page that is not the snapshot's");
    assert_eq!(printed(console), [0; 0]);
}

#[test]
fn what_a_fork_discards_comes_back_as_the_snapshot_had_it() {
    let bed = Bed::new(None);
    let (mapping, uffd) = bed.map();
    bed.attach(1, &uffd, mapping.address()).unwrap();
    let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
    let (written, untouched) = (GuestAddress(1 << 20), GuestAddress(5 << 20));
    let original = |at: GuestAddress| {
        let mut word = [0; 8];
        rustix::io::pread(&bed.full, &mut word, at.0).unwrap();
        u64::from_le_bytes(word)
    };
    let ram = memory.ram();
    ram.write_obj(!original(written), written).unwrap();
    memory.mapping(ImageId::Ram).unwrap().discard(0, RAM).unwrap();
    // One is in the image, the other comes through the pager.
    assert_eq!(ram.read_obj::<u64>(written).unwrap(), original(written));
    assert_eq!(ram.read_obj::<u64>(untouched).unwrap(), original(untouched));
    assert_ne!((original(written), original(untouched)), (0, 0));
    bed.assert_a_sibling_is_served(2);
}
