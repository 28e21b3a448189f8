//! Machines are saved at the doorbell and restored as private copies, on the real /dev/kvm.

mod common;

use common::{COUNTER, READ_RECORD, hypervisor, image, layout, machine, peripherals, printed, run_until};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::machine::{Machine, MachineError};
use forkd_vmm::memory::{GuestMemory, Mapping, Sharing};
use forkd_vmm::vmstate::{MachineState, VmstateError};
use proptest::prelude::*;
use rustix::fd::OwnedFd;
use std::fs::File;

fn fork(image: &OwnedFd, state: &MachineState) -> (Machine, File) {
    let mapping = Mapping::of_file(image, layout().ram_bytes(), Sharing::Private).unwrap();
    let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
    let (peripherals, console) = peripherals(Vec::new());
    (Machine::restore(hypervisor(), state, memory, peripherals).unwrap(), console)
}

fn word(image: &OwnedFd) -> u32 {
    let mut bytes = [0; 4];
    rustix::io::pread(image, &mut bytes, common::WORD).unwrap();
    u32::from_le_bytes(bytes)
}

fn saved() -> (OwnedFd, MachineState) {
    let image = image(COUNTER);
    let (mut original, _console) = machine(&image, Vec::new());
    assert_eq!(run_until(&mut original, Ring::SnapshotHere), [Ring::SnapshotHere]);
    let state = original.save().unwrap();
    (image, state)
}

#[test]
fn forks_go_on_behind_the_doorbell_and_share_nothing_they_write() {
    let (image, state) = saved();
    let state = MachineState::decode(&state.encode().unwrap()).unwrap();
    rustix::io::pwrite(&image, &100_u32.to_le_bytes(), common::WORD).unwrap();
    for _ in 0..3 {
        let (mut child, console) = fork(&image, &state);
        // The first thing a fork does is the ring behind the snapshot.
        assert_eq!(run_until(&mut child, Ring::Ready), [Ring::Resumed, Ring::Ready]);
        assert_eq!(printed(console), [105], "a sibling's write was seen");
    }
    assert_eq!(word(&image), 100, "a fork's write reached the image");
}

#[test]
fn the_original_goes_on_too() {
    let image = image(COUNTER);
    let (mut original, console) = machine(&image, Vec::new());
    run_until(&mut original, Ring::SnapshotHere);
    original.save().unwrap();
    assert_eq!(run_until(&mut original, Ring::Ready), [Ring::Resumed, Ring::Ready]);
    assert_eq!(printed(console), [5]);
    assert_eq!(word(&image), 5);
}

#[test]
fn a_fork_of_a_fork_runs() {
    let (image, state) = saved();
    let (mut child, _console) = fork(&image, &state);
    run_until(&mut child, Ring::Resumed);
    let again = child.save().unwrap();
    let (mut grandchild, console) = fork(&image, &again);
    assert_eq!(run_until(&mut grandchild, Ring::Ready), [Ring::Ready]);
    assert_eq!(printed(console), [5]);
}

#[test]
fn guests_read_their_record() {
    let image = image(READ_RECORD);
    let (mut machine, console) = machine(&image, b"who am I".to_vec());
    run_until(&mut machine, Ring::Ready);
    assert_eq!(printed(console), b"who am I");
}

#[test]
fn a_snapshot_of_another_kind_of_kvm_is_refused() {
    let (image, mut state) = saved();
    use forkd_vmm::kvm::KvmKind;
    state.kind = if state.kind == KvmKind::Pvm { KvmKind::Hardware } else { KvmKind::Pvm };
    let mapping = Mapping::of_file(&image, layout().ram_bytes(), Sharing::Private).unwrap();
    let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
    let refused = Machine::restore(hypervisor(), &state, memory, peripherals(Vec::new()).0);
    assert!(matches!(refused, Err(MachineError::Kind { .. })));
}

#[test]
fn damaged_vmstates_are_refused() {
    let bytes = saved().1.encode().unwrap();
    assert!(bytes.len() < 64 * 1024, "a one-vCPU state takes {} bytes", bytes.len());
    for cut in [0, 7, 47, 48, bytes.len() - 1] {
        let refused = MachineState::decode(&bytes[..cut]);
        assert!(matches!(refused, Err(VmstateError::NotVmstate { .. })), "cut at {cut}");
    }
    let mut newer = bytes.clone();
    newer[8] = 99;
    assert!(matches!(MachineState::decode(&newer), Err(VmstateError::Version { found: 99 })));
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(MachineState::decode(&flipped), Err(VmstateError::Damaged)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a hostile body decodes to, decoding neither panics nor takes memory beyond its size.
    #[test]
    fn hostile_bodies_do_not_panic(body in proptest::collection::vec(any::<u8>(), 0..4096)) {
        use sha2::{Digest, Sha256};
        let mut bytes = b"FORKDVM1".to_vec();
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(Sha256::digest(&body));
        bytes.extend(&body);
        let _ = MachineState::decode(&bytes);
    }
}
