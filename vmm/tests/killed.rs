//! Machines as processes, killed at random moments while their image is filled: their siblings hash all of their memory and
//! get it right, what was printed is right, and the owner's descriptors are as many as before.

mod common;

use bytes::Bytes;
use common::{hashing_machine, layout, noise, printed, wrong_pages};
use forkd_vmm::cgroup::Limits;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::memory::{ImageId, create_image};
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, Pager, SourceFailure};
use forkd_vmm::process::{MachineFiles, MachineProcess, MachineReport, MachineSpec, MachineStart};
use forkd_vmm::vmstate::MachineState;
use forkd_vmm::zygote::Zygote;
use rustix::fd::{AsFd, OwnedFd};
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const NAME: &str = "siblings_of_killed_machines_have_their_memory";
const RAM: u64 = 8 << 20;
const CHUNK: u64 = 64 << 10;
const ROUNDS: u64 = 12;
const CHILDREN: u64 = 6;
const LIMIT: Duration = Duration::from_secs(30);

/// cargo-nextest asks for a list first and then for one test by name; cargo test just runs.
fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let has = |wanted: &str| arguments.iter().any(|argument| argument == wanted);
    if has("--list") {
        if !has("--ignored") {
            println!("{NAME}: test");
        }
        return;
    }
    if has("--ignored") {
        return;
    }
    siblings_of_killed_machines_have_their_memory();
    println!("test {NAME} ... ok");
}

/// Serves chunks, each after a moment, so that kills find machines waiting.
struct Origin {
    full: OwnedFd,
    loads: AtomicU64,
    failed: Mutex<Vec<ImageChunk>>,
}

impl Origin {
    fn new(full: &OwnedFd, round: u64) -> Arc<Origin> {
        let full = full.try_clone().unwrap();
        Arc::new(Origin { full, loads: AtomicU64::new(round << 20), failed: Mutex::default() })
    }

    fn content(&self, chunk: ImageChunk) -> ChunkContent {
        let mut bytes = vec![0; CHUNK as usize];
        rustix::io::pread(&self.full, &mut bytes, chunk.chunk * CHUNK).unwrap();
        ChunkContent::Data(Bytes::from(bytes))
    }

    /// What failed comes after all, as from an owner with a second source.
    fn put_in_what_failed(&self, pager: &Pager) {
        for chunk in std::mem::take(&mut *self.failed.lock().unwrap()) {
            pager.install(chunk, &self.content(chunk)).unwrap();
        }
    }
}

impl PageSource for Origin {
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        let number = self.loads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(noise(number) % 800));
        if noise(number + 1).is_multiple_of(17) {
            return Err("the network is gone for a moment".into());
        }
        Ok(self.content(chunk))
    }

    fn unavailable(&self, chunk: ImageChunk, _waiters: &[ClientId], _failure: SourceFailure) {
        self.failed.lock().unwrap().push(chunk);
    }
}

struct Child {
    process: MachineProcess,
    console: File,
    killed: bool,
    ready: bool,
    over: bool,
}

fn siblings_of_killed_machines_have_their_memory() {
    // Before the first thread.
    let zygote = Zygote::start().unwrap();
    let (full, state, hash) = hashing_machine();
    let dir = tempfile::tempdir().unwrap();
    let before = open_descriptors();
    let (mut survivors, mut killed, mut killed_waiting) = (0, 0, 0);
    for round in 0..ROUNDS {
        let origin = Origin::new(&full, round);
        let shape = ImageShape { bytes: RAM, chunk_bytes: CHUNK };
        let pager =
            Pager::new(&[(ImageId::Ram, shape)], origin.clone(), 2).expect("this test needs userfaultfd");
        let mut children: Vec<_> =
            (0..CHILDREN).map(|number| spawn(&zygote, &pager, &state, dir.path(), number)).collect();
        let (mut number, deadline) = (round * 1000, Instant::now() + LIMIT);
        while !children.iter().all(|child| child.ready || child.over) {
            assert!(Instant::now() < deadline, "machines hang: {:?}", pager.stats());
            number += 1;
            // Half of them live, whatever happens.
            let victim = CHILDREN / 2 + noise(number) % (CHILDREN / 2);
            let child = &mut children[victim as usize];
            if !child.killed && noise(number + 7).is_multiple_of(8) {
                killed_waiting += u64::from(pager.waits().contains_key(&ClientId(victim)));
                child.process.kill();
                child.killed = true;
            }
            origin.put_in_what_failed(&pager);
            for (id, child) in children.iter_mut().enumerate().filter(|(_, child)| !child.over) {
                follow(child, &pager, ClientId(id as u64));
            }
        }
        for child in children {
            child.process.kill();
            killed += u64::from(child.killed);
            let text = printed(child.console);
            assert!(child.killed || text.len() == 8, "a machine ended without its hash: {text:?}");
            assert!(hash.to_le_bytes().starts_with(&text), "round {round}: {text:x?} instead of {hash:x}");
            survivors += u64::from(text.len() == 8);
        }
        assert_eq!(wrong_pages(pager.image_file(ImageId::Ram).unwrap(), &full), [0; 0], "round {round}");
        assert_eq!((pager.failure(), pager.take_misconduct()), (None, vec![]));
    }
    println!(
        "{ROUNDS} rounds of {CHILDREN}: {survivors} hashes, {killed} killed, {killed_waiting} of them waiting"
    );
    assert!(killed > 0 && survivors >= ROUNDS * CHILDREN / 2 && killed_waiting > 0);
    // Workers of the last pager may still be in their last load.
    let deadline = Instant::now() + LIMIT;
    while open_descriptors() > before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(open_descriptors(), before, "descriptors are left");
}

fn spawn(zygote: &Zygote, pager: &Pager, state: &MachineState, dir: &std::path::Path, number: u64) -> Child {
    let encoded = state.encode().unwrap();
    let vmstate = create_image("vmstate", encoded.len() as u64).unwrap();
    rustix::io::pwrite(&vmstate, &encoded, 0).unwrap();
    let socket = dir.join(format!("{number}.sock"));
    let _ = std::fs::remove_file(&socket);
    let vsock = UnixListener::bind(&socket).unwrap();
    let console = tempfile::tempfile().unwrap();
    let spec = MachineSpec {
        layout: layout(),
        limits: Limits::of(format!("killed{}-{number}", std::process::id()), &layout()),
        record: Vec::new(),
        start: MachineStart::Restore { lazy: true, zero_runs: Vec::new(), delta_runs: 0 },
        scratch_bytes: 0,
        waits_at_first_instruction: false,
        mac: None,
    };
    let files = MachineFiles {
        images: vec![pager.image_file(ImageId::Ram).unwrap()],
        start: vmstate.as_fd(),
        console: console.as_fd(),
        vsock: vsock.as_fd(),
        scratch: None,
        initrd: None,
        wire: None,
        delta: None,
    };
    let process = zygote.spawn(&spec, &files).unwrap();
    Child { process, console, killed: false, ready: false, over: false }
}

fn follow(child: &mut Child, pager: &Pager, id: ClientId) {
    let soon = Instant::now() + Duration::from_micros(200);
    match child.process.channel.receive_until::<MachineReport>(soon) {
        Ok(None) => {}
        Ok(Some((MachineReport::Attached { bases }, mut fds))) => {
            pager.attach(id, fds.remove(0), bases).unwrap();
        }
        Ok(Some((MachineReport::Rang { ring, .. }, _))) => child.ready |= ring == Ring::Ready,
        Ok(Some((report, _))) => panic!("a machine says {report:?}"),
        Err(_) => {
            assert!(child.killed, "a machine ended by itself");
            child.over = true;
            pager.detach(id);
        }
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
