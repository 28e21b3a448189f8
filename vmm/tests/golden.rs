//! A vmstate of every version that this forkd reads, kept as a file: when its layout changes by accident, these tests
//! fail; when it changes on purpose, `vmstate::VERSION` does too and a new file is made with
//! `cargo test -p forkd-vmm --test golden -- --ignored`.

mod common;

use common::{COUNTER, image, layout, machine_of, run_until};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::machine::MachineShape;
use forkd_vmm::vmstate::{MachineState, VERSION};
use std::path::PathBuf;

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/vmstate-{VERSION}"))
}

#[test]
fn the_kept_vmstate_is_still_read_and_written_the_same() {
    let path = golden();
    let bytes = std::fs::read(&path).unwrap_or_else(|error| {
        panic!("{}: {error}; a new version of the layout needs a new file", path.display())
    });
    let state = MachineState::decode(&bytes).unwrap();
    assert_eq!(state.layout, layout());
    assert!(state.encode().unwrap() == bytes, "the layout has changed, but not its version");
}

#[test]
#[ignore = "writes the file that the other test reads"]
fn keep_a_vmstate() {
    let (mut machine, _console) =
        machine_of(MachineShape { layout: layout(), vcpus: 2 }, &image(COUNTER), Vec::new());
    run_until(&mut machine, Ring::SnapshotHere);
    std::fs::write(golden(), machine.save().unwrap().encode().unwrap()).unwrap();
}
