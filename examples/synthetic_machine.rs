//! Makes a local snapshot of a machine whose guest is thirty instructions, for the benches: no kernel, no agent, nothing
//! that varies from run to run.
//!
//! ```text
//! synthetic_machine DIR MEMORY_MIB TOUCHED_MIB REST_PERCENT (hot|bare|timed)
//! ```
//!
//! The guest rings "resumed", reads one word of every page from 2 MiB to TOUCHED_MIB, and rings "ready". All these pages
//! are noise, and REST_PERCENT of the mebibytes behind them; the others are zero. `hot` adds the trace and hot pages that
//! `forkd build` would record, `bare` leaves the trace empty, so that every chunk is loaded when it is touched. `timed` is
//! bare, and its guest prints after every read how long it took by its own time stamp counter, in units of 16 ticks, four
//! bytes each. The counter's frequency goes to stdout as JSON.

use forkd_engine::local::snapshots::{self, MachineConfiguration};
use forkd_fs::manifest::{KvmKind as ManifestKind, Manifest, Requires};
use forkd_fs::trace::{PageRun, RegionTrace, Trace};
use forkd_vmm::devices::bus::Peripherals;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::kvm::{Hypervisor, KvmKind};
use forkd_vmm::machine::{AfterRing, Machine, MachineShape};
use forkd_vmm::memory::{GuestMemory, Mapping, MemoryLayout, PAGE_BYTES, Sharing};
use forkd_vmm::vmstate::VERSION;
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
/// Where the page tables and the code lie.
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
const CODE: u64 = 0x1_0000;
/// Where the task register points as KVM leaves it: kvm_pvm's emulator looks there whether the guest may use a port.
const TASK_SEGMENT: u64 = 0;
/// The first page that the guest reads; the instructions below contain it.
const FIRST_TOUCHED: u64 = 2 * MIB;
/// What one page directory maps.
const TOUCHED_MIB_MAX: u64 = 1024;

/// Rings 1 and 2; rsi = FIRST_TOUCHED.
const HEAD: &[u8] = &[
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x01, 0xee, 0xb0, 0x02,
    0xee, // mov dx, 0xfd00; mov al, 1; out; mov al, 2; out
    0x48, 0xc7, 0xc6, 0x00, 0x00, 0x20, 0x00, // mov rsi, FIRST_TOUCHED
];
/// Reads a word.
const READ: &[u8] = &[0x03, 0x06];
/// Reads a word and prints how long that took.
const READ_TIMED: &[u8] = &[
    0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, // rdtsc; shl rdx, 32
    0x48, 0x8d, 0x3c, 0x10, // lea rdi, [rax + rdx]
    0x0f, 0xae, 0xe8, 0x8b, 0x0e, 0x0f, 0xae, 0xe8, // lfence; mov ecx, [rsi]; lfence
    0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, // rdtsc; shl rdx, 32; or rax, rdx
    0x48, 0x29, 0xf8, 0x48, 0xc1, 0xe8, 0x04, // sub rax, rdi; shr rax, 4
    0x66, 0xba, 0xf8, 0x03, 0xef, // mov dx, 0x3f8; out dx, eax
];
/// rsi += 4096.
const NEXT_PAGE: &[u8] = &[0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00];
/// Rings 3; waits for its end.
const TAIL: &[u8] = &[
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee, // mov dx, 0xfd00; mov al, 3; out dx, al
    0xf3, 0x90, 0xeb, 0xfc, // pause; jmp back to it
];

type Failure = Box<dyn Error>;

struct Wanted {
    dir: PathBuf,
    memory_mib: u64,
    touched_mib: u64,
    rest_percent: u64,
    hot: bool,
    timed: bool,
}

impl Wanted {
    fn from_arguments() -> Result<Wanted, Failure> {
        let arguments: Vec<_> = std::env::args().skip(1).collect();
        let [dir, memory, touched, rest, kind] = &arguments[..] else {
            return Err(
                "usage: synthetic_machine DIR MEMORY_MIB TOUCHED_MIB REST_PERCENT (hot|bare|timed)".into()
            );
        };
        let wanted = Wanted {
            dir: dir.into(),
            memory_mib: memory.parse()?,
            touched_mib: touched.parse()?,
            rest_percent: rest.parse()?,
            hot: kind == "hot",
            timed: kind == "timed",
        };
        let touched_at_most = wanted.memory_mib.min(TOUCHED_MIB_MAX);
        if !(3..=touched_at_most).contains(&wanted.touched_mib) {
            return Err(format!("such a machine touches 3 to {touched_at_most} MiB").into());
        }
        Ok(wanted)
    }

    fn code(&self) -> Vec<u8> {
        let read = if self.timed { READ_TIMED } else { READ };
        let end = (self.touched_mib * MIB) as u32;
        let compare = [&[0x48, 0x81, 0xfe][..], &end.to_le_bytes()].concat();
        let jump_bytes = 2;
        let back = read.len() + NEXT_PAGE.len() + compare.len() + jump_bytes;
        let jump_if_below = [0x72, (back as u8).wrapping_neg()];
        [HEAD, read, NEXT_PAGE, &compare, &jump_if_below, TAIL].concat()
    }
}

/// Numbers that look random, the same for the same machine and others for another.
fn noise(memory_mib: u64, mebibyte: u64) -> Vec<u8> {
    let mut state = (memory_mib << 32 | (mebibyte + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(word).take((MIB / 8) as usize).flatten().collect()
}

fn write_memory(wanted: &Wanted) -> Result<File, Failure> {
    let path = wanted.dir.join(snapshots::MEMORY);
    let memory = File::options().create(true).truncate(true).read(true).write(true).open(path)?;
    memory.set_len(wanted.memory_mib * MIB)?;
    // Present, writable, for the user; the directory's entries are 2 MiB pages.
    memory.write_all_at(&(TABLES[1] | 7).to_le_bytes(), TABLES[0])?;
    memory.write_all_at(&(TABLES[2] | 7).to_le_bytes(), TABLES[1])?;
    for page in 0..512_u64 {
        memory.write_all_at(&(page << 21 | 0x87).to_le_bytes(), TABLES[2] + page * 8)?;
    }
    memory.write_all_at(&wanted.code(), CODE)?;
    for mebibyte in FIRST_TOUCHED / MIB..wanted.memory_mib {
        let rest = mebibyte - mebibyte.min(wanted.touched_mib);
        let share = |count: u64| count * wanted.rest_percent / 100;
        if mebibyte < wanted.touched_mib || share(rest + 1) > share(rest) {
            memory.write_all_at(&noise(wanted.memory_mib, mebibyte), mebibyte * MIB)?;
        }
    }
    Ok(memory)
}

/// Starts in ring 3 with I/O privilege: such a guest needs no kernel, and none of kvm_pvm's quirks matter to it.
fn enter(machine: &Machine) -> Result<(), Failure> {
    let vcpu = machine.vcpu();
    let mut state = vcpu.get_mp_state()?;
    state.mp_state = 0;
    vcpu.set_mp_state(state)?;
    let mut system = vcpu.get_sregs()?;
    (system.cr0, system.cr3, system.cr4, system.efer) = (0x8005_0033, TABLES[0], 0x620, 0xd01);
    let mut code = system.cs;
    (code.base, code.limit, code.selector, code.type_) = (0, u32::MAX, 0x33, 11);
    (code.present, code.dpl, code.s, code.l, code.db, code.g) = (1, 3, 1, 1, 0, 1);
    let mut data = code;
    (data.selector, data.type_, data.l, data.db) = (0x2b, 3, 0, 1);
    system.cs = code;
    (system.ss, system.ds, system.es, system.fs, system.gs) = (data, data, data, data, data);
    vcpu.set_sregs(&system)?;
    let mut registers = vcpu.get_regs()?;
    (registers.rip, registers.rsp, registers.rflags) = (CODE, 0x2_0000, 0x3002);
    Ok(vcpu.set_regs(&registers)?)
}

fn trace(wanted: &Wanted, memory: &File) -> Result<(), Failure> {
    let own = TABLES.into_iter().chain([TASK_SEGMENT, CODE]).map(|at| (at / PAGE_BYTES) as u32);
    let touched = (FIRST_TOUCHED / PAGE_BYTES) as u32..(wanted.touched_mib * MIB / PAGE_BYTES) as u32;
    let buckets = vec![PageRun::from_pages(own), PageRun::from_pages(touched)];
    let region = RegionTrace { file: snapshots::MEMORY.to_owned(), buckets };
    let trace = Trace { regions: if wanted.hot { vec![region] } else { Vec::new() } };
    fs::write(wanted.dir.join(snapshots::TRACE), trace.encode()?)?;
    if wanted.hot {
        let mut pages = vec![0; trace.page_count() as usize * PAGE_BYTES as usize];
        for (into, (_, page)) in pages.chunks_exact_mut(PAGE_BYTES as usize).zip(trace.pages()) {
            memory.read_exact_at(into, u64::from(page) * PAGE_BYTES)?;
        }
        fs::write(wanted.dir.join(snapshots::HOTSET), pages)?;
    }
    Ok(())
}

fn describe(wanted: &Wanted, layout: MemoryLayout, kind: KvmKind) -> Result<(), Failure> {
    let configuration = serde_json::to_vec_pretty(&MachineConfiguration::new(layout, 1, kind, 0))?;
    fs::write(wanted.dir.join(snapshots::CONFIGURATION), configuration)?;
    let manifest = Manifest {
        probe: None,
        forkd_pack_version: forkd_fs::format::PACK_VERSION,
        tag: Path::file_name(&wanted.dir).unwrap_or_default().to_string_lossy().into_owned(),
        description: format!("{} MiB, {} of them touched", wanted.memory_mib, wanted.touched_mib),
        base_image: String::new(),
        created_at: "2026-01-01T00:00:00Z".to_owned(),
        forkd_version: env!("CARGO_PKG_VERSION").to_owned(),
        requires: Requires {
            memory_mib: wanted.memory_mib,
            vcpus: 1,
            kvm_kind: match kind {
                KvmKind::Pvm => ManifestKind::Pvm,
                KvmKind::Hardware => ManifestKind::Hardware,
            },
            kernel: "none".to_owned(),
            vmstate_version: VERSION,
            cpu_features: Vec::new(),
            cpu_vendor: String::new(),
        },
        files: Vec::new(),
    };
    Ok(fs::write(wanted.dir.join(snapshots::MANIFEST), manifest.to_toml())?)
}

fn main() -> Result<(), Failure> {
    let wanted = Wanted::from_arguments()?;
    fs::create_dir_all(&wanted.dir)?;
    let memory_file = write_memory(&wanted)?;
    let layout = MemoryLayout::new(wanted.memory_mib, 0)?;
    let mapping = Mapping::of_file(&memory_file, layout.ram_bytes(), Sharing::Shared)?;
    let memory = GuestMemory::new(&layout, vec![mapping])?;
    let peripherals =
        Peripherals { console: None, record: Vec::new(), scratch: None, link: None, second_console: false };
    let kind = KvmKind::detect();
    let mut machine =
        Machine::new(Hypervisor::open(kind)?, MachineShape { layout, vcpus: 1 }, memory, peripherals)?;
    enter(&machine)?;
    machine.run(|ring| if ring == Ring::SnapshotHere { AfterRing::Stop } else { AfterRing::Continue })?;
    fs::write(wanted.dir.join(snapshots::VMSTATE), machine.save()?.encode()?)?;
    println!("{{\"tsc_khz\": {}}}", machine.vcpu().get_tsc_khz()?);
    drop(machine);
    trace(&wanted, &memory_file)?;
    describe(&wanted, layout, kind)
}
