//! One machine: its VM, vCPUs, memory and devices; booting, restoring, running, saving.

use crate::acpi::{self, AcpiError};
use crate::arch::{self, EnterError};
use crate::boot::{self, BootError, BootFiles};
use crate::cpuid;
use crate::devices::bus::{Bus, BusError, Peripherals, default_devices};
use crate::devices::doorbell::Ring;
use crate::devices::virtio::net;
use crate::devices::virtio::vsock::backend::Backend;
use crate::kvm::{Hypervisor, KvmError, KvmKind, ioctl};
use crate::memory::{GuestMemory, MemoryError, MemoryLayout};
use crate::pvm;
use crate::vcpu::{VcpuError, VcpuState};
use crate::vcpu_loop;
pub use crate::vcpu_loop::{AfterRing, StopReason, VcpuRunError};
use crate::vmstate::MachineState;
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

/// A machine could not be made, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// vCPU state.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Entry state.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// Devices.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The machine's description.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Its vCPUs stopped.
    #[error(transparent)]
    Run(#[from] VcpuRunError),
    /// The thread for vsock's host side.
    #[error("vsock cannot be served")]
    Vsock(#[source] io::Error),
    /// The thread for the network's host side.
    #[error("the network cannot be served")]
    Net(#[source] io::Error),
    /// A number of vCPUs that no machine has.
    #[error("{vcpus} vCPUs are not possible: a machine has 1 to {}", arch::VCPUS_MAX)]
    Vcpus {
        /// What was asked for.
        vcpus: usize,
    },
    /// The snapshot does not fit this program.
    #[error("the snapshot has {found} {what}, this forkd makes machines with {expected}")]
    Shape {
        /// Number of what.
        what: &'static str,
        /// In the snapshot.
        found: usize,
        /// Here.
        expected: usize,
    },
    /// The snapshot needs another kind of host.
    #[error(
        "the snapshot was made on {} KVM and this host has {} KVM",
        made_on.name(),
        here.name()
    )]
    Kind {
        /// Of the snapshot.
        made_on: KvmKind,
        /// Of this host.
        here: KvmKind,
    },
}

/// See the module's description.
pub struct Machine {
    hypervisor: Hypervisor,
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    memory: GuestMemory,
    layout: MemoryLayout,
    bus: Bus,
    /// ACPI tables describe it: its kernel knows the generation device.
    described: bool,
}

/// What a machine starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineShape {
    /// Sizes of its memory.
    pub layout: MemoryLayout,
    /// Number of vCPUs, 1 to [`arch::VCPUS_MAX`].
    pub vcpus: u8,
}

impl Machine {
    /// A new machine whose vCPUs are in their reset state. Callers set the first one's registers.
    pub fn new(
        hypervisor: Hypervisor,
        shape: MachineShape,
        memory: GuestMemory,
        peripherals: Peripherals,
    ) -> Result<Machine, MachineError> {
        let MachineShape { layout, vcpus: count } = shape;
        check_vcpus(count.into())?;
        let vm = hypervisor.create_vm(&layout, &memory)?;
        let kinds = default_devices(&layout, &peripherals);
        let bus = Bus::new(&vm, &layout, &memory, peripherals, &kinds, None)?;
        if hypervisor.kind() == KvmKind::Pvm {
            pvm::watch_syscall_entry(&vm)?;
        }
        let supported = hypervisor.supported_cpuid()?;
        let mut vcpus = Vec::with_capacity(count.into());
        for id in 0..count {
            let vcpu = vm.create_vcpu(id.into()).map_err(ioctl("KVM_CREATE_VCPU"))?;
            let leaves = cpuid::for_vcpu(&supported, hypervisor.kind(), id, count);
            vcpu.set_cpuid2(&leaves).map_err(ioctl("KVM_SET_CPUID2"))?;
            vcpus.push(vcpu);
        }
        Ok(Machine { hypervisor, vm, vcpus, memory, layout, bus, described: false })
    }

    /// A new machine about to execute a Linux kernel's first instruction.
    pub fn boot(
        hypervisor: Hypervisor,
        shape: MachineShape,
        memory: GuestMemory,
        files: &mut BootFiles,
        more_command_line: &str,
        peripherals: Peripherals,
    ) -> Result<Machine, MachineError> {
        let mut machine = Machine::new(hypervisor, shape, memory, peripherals)?;
        machine.described = true;
        let (ram, devices) = (machine.memory.ram(), machine.bus.kinds());
        let line = boot::command_line(machine.hypervisor.kind(), more_command_line);
        acpi::write_generation(ram)?;
        let rsdp = acpi::write_tables(ram, shape.vcpus, &devices)?;
        let entry = boot::load(ram, &shape.layout, files, &line, rsdp)?;
        arch::enter_linux(machine.vcpu(), ram, entry)?;
        Ok(machine)
    }

    /// A machine as it was saved. Its memory must answer already.
    pub fn restore(
        hypervisor: Hypervisor,
        state: &MachineState,
        memory: GuestMemory,
        peripherals: Peripherals,
    ) -> Result<Machine, MachineError> {
        if state.kind != hypervisor.kind() {
            return Err(MachineError::Kind { made_on: state.kind, here: hypervisor.kind() });
        }
        check_vcpus(state.vcpus.len())?;
        if state.irqchips.len() != 3 {
            let (what, found, expected) = ("interrupt controllers", state.irqchips.len(), 3);
            return Err(MachineError::Shape { what, found, expected });
        }
        let layout = state.layout;
        let vm = hypervisor.create_vm(&layout, &memory)?;
        let kinds: Vec<_> = state.windows.iter().map(|(kind, _)| *kind).collect();
        let bus = Bus::new(&vm, &layout, &memory, peripherals, &kinds, Some(&state.serial))?;
        let mut vcpus = Vec::with_capacity(state.vcpus.len());
        for id in 0..state.vcpus.len() as u64 {
            vcpus.push(vm.create_vcpu(id).map_err(ioctl("KVM_CREATE_VCPU"))?);
        }
        for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
            saved.restore(&hypervisor, &vm, vcpu)?;
        }
        vm.set_pit2(&state.pit).map_err(ioctl("KVM_SET_PIT2"))?;
        // With this flag set, KVM would move the guest's clock ahead by the snapshot's age.
        let mut clock = state.clock;
        clock.flags &= !KVM_CLOCK_REALTIME;
        vm.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))?;
        for chip in &state.irqchips {
            vm.set_irqchip(chip).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        bus.restore(&state.windows)?;
        Ok(Machine { hypervisor, vm, vcpus, memory, layout, bus, described: state.described })
    }

    /// Gives a restored machine a generation of its own and has its kernel hear of it. One that has no ACPI tables
    /// has none.
    pub fn renew_generation(&self) -> Result<(), MachineError> {
        if self.described {
            acpi::write_generation(self.memory.ram())?;
            // Emulated, the kernel's way from the interrupt to its random numbers takes longer than all else that a
            // copy does before it is ready. The agent reseeds them in any case.
            if self.hypervisor.kind() == KvmKind::Hardware {
                self.bus.announce_generation();
            }
        }
        Ok(())
    }

    /// The thread that serves the guest's vsock, to be started by the caller; none if the machine has no vsock.
    pub fn vsock_backend(&self, listener: UnixListener) -> Result<Option<Backend>, MachineError> {
        let backend = |device| Backend::new(listener, Arc::clone(device)).map_err(MachineError::Vsock);
        self.bus.vsock().map(backend).transpose()
    }

    /// The thread that serves the guest's network, to be started by the caller; none if the machine has no link.
    pub fn net_backend(&self) -> Result<Option<net::backend::Backend>, MachineError> {
        self.bus.net().map_or(Ok(None), net::backend::Backend::new).map_err(MachineError::Net)
    }

    /// Runs the guest until `on_ring` stops it or it resets itself; its first vCPU on this thread.
    pub fn run(&mut self, on_ring: impl FnMut(Ring) -> AfterRing + Send) -> Result<StopReason, MachineError> {
        self.bus.freeze(false);
        let (ram, kind) = (self.memory.ram(), self.hypervisor.kind());
        let stopped = vcpu_loop::run(&mut self.vcpus, &self.vm, &self.bus, ram, kind, on_ring);
        // Devices' own threads go on, but may not touch memory that is about to be saved.
        self.bus.freeze(true);
        Ok(stopped?)
    }

    /// Everything about the stopped machine except its memory.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let windows = self.bus.save();
        let saved = self.vcpus.iter().map(|vcpu| VcpuState::save(&self.hypervisor, &self.vm, vcpu));
        let vcpus = saved.collect::<Result<_, _>>()?;
        let pit = self.vm.get_pit2().map_err(ioctl("KVM_GET_PIT2"))?;
        let clock = self.vm.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?;
        let mut irqchips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.vm.get_irqchip(&mut chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
            irqchips.push(chip);
        }
        Ok(MachineState {
            layout: self.layout,
            kind: self.hypervisor.kind(),
            vcpus,
            clock,
            pit,
            irqchips,
            serial: self.bus.save_serial(),
            windows,
            described: self.described,
        })
    }

    /// The first vCPU, to be looked at or set up while it does not run.
    pub fn vcpu(&self) -> &VcpuFd {
        &self.vcpus[0]
    }

    /// All vCPUs, as [`Machine::vcpu`] gives the first.
    pub fn vcpus(&self) -> &[VcpuFd] {
        &self.vcpus
    }

    /// The machine's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

fn check_vcpus(vcpus: usize) -> Result<(), MachineError> {
    if (1..=usize::from(arch::VCPUS_MAX)).contains(&vcpus) {
        Ok(())
    } else {
        Err(MachineError::Vcpus { vcpus })
    }
}
