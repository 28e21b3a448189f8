//! One machine: its VM, vCPU, memory and devices; booting, restoring, running, saving. Callers: `process.rs`, tests.

use crate::arch::{self, EnterError};
use crate::boot::{self, BootError};
use crate::devices::cmos::{self, Cmos};
use crate::devices::doorbell::{self, Doorbell, Ring};
use crate::devices::serial::{Console, IrqLine, SerialPort, SerialSnapshot};
use crate::devices::virtio::mmio::{RestoreError, Transport, Window};
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::backend::Backend;
use crate::devices::virtio::vsock::{Vsock, VsockSnapshot};
use crate::kvm::{Hypervisor, KvmError, KvmKind, ioctl};
use crate::memory::{GuestMemory, MemoryError, MemoryLayout};
use crate::pvm::{self, PvmError};
use crate::snapshot::MachineState;
use crate::vcpu::{VcpuError, VcpuState};
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::serial::Serial;
use vmm_sys_util::eventfd::EventFd;

/// The keyboard controller's command port; 0xfe there is how a PC resets itself.
const KEYBOARD_COMMAND: u16 = 0x64;
const RESET_COMMAND: u8 = 0xfe;

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
    /// Device state.
    #[error(transparent)]
    Device(#[from] RestoreError),
    /// kvm_pvm.
    #[error(transparent)]
    Pvm(#[from] PvmError),
    /// A file descriptor for a device.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
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
    /// The vCPU stopped in a way that nobody knows.
    #[error("the vCPU stopped with {exit}")]
    Exit {
        /// How.
        exit: String,
    },
    /// KVM_RUN failed.
    #[error("KVM_RUN failed")]
    Run(#[source] vmm_sys_util::errno::Error),
}

/// What a machine is connected to.
#[derive(Debug, Default)]
pub struct Peripherals {
    /// Where console output goes.
    pub console: Option<File>,
    /// Where clients of the guest's vsock ports connect.
    pub vsock: Option<UnixListener>,
    /// What the guest reads at its doorbell.
    pub record: Vec<u8>,
}

/// Why [`Machine::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The callback asked for it.
    Asked,
    /// The guest reset itself or crashed so hard that its CPU did.
    Reset,
}

/// Whether to go on after a ring of the doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Run on.
    Continue,
    /// Leave [`Machine::run`], the instruction done.
    Stop,
}

/// See the module's description.
pub struct Machine {
    hypervisor: Hypervisor,
    vm: VmFd,
    vcpu: VcpuFd,
    memory: GuestMemory,
    layout: MemoryLayout,
    devices: Devices,
}

struct Devices {
    serial: SerialPort,
    cmos: Cmos,
    doorbell: Doorbell,
    windows: Vec<Arc<Mutex<dyn Window>>>,
    vsock: Arc<Mutex<Transport<Vsock>>>,
    dropped_writes: u64,
}

impl Machine {
    /// A new machine whose vCPU is in its reset state. Callers set its registers.
    pub fn new(
        hypervisor: Hypervisor,
        layout: MemoryLayout,
        memory: GuestMemory,
        peripherals: Peripherals,
    ) -> Result<Machine, MachineError> {
        let vm = hypervisor.create_vm(&layout, &memory)?;
        let devices = Devices::new(&vm, &layout, &memory, peripherals, None)?;
        if hypervisor.kind() == KvmKind::Pvm {
            pvm::watch_syscall_entry(&vm)?;
        }
        let vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&hypervisor.supported_cpuid()?).map_err(ioctl("KVM_SET_CPUID2"))?;
        Ok(Machine { hypervisor, vm, vcpu, memory, layout, devices })
    }

    /// A new machine about to execute a Linux kernel's first instruction.
    pub fn boot(
        hypervisor: Hypervisor,
        layout: MemoryLayout,
        memory: GuestMemory,
        kernel: &mut File,
        more_command_line: &str,
        peripherals: Peripherals,
    ) -> Result<Machine, MachineError> {
        let machine = Machine::new(hypervisor, layout, memory, peripherals)?;
        let (kind, windows) = (machine.hypervisor.kind(), machine.devices.windows.len());
        let line = boot::command_line(kind, windows, more_command_line);
        let entry = boot::load(machine.memory.ram(), &layout, kernel, &line)?;
        arch::enter_linux(&machine.vcpu, machine.memory.ram(), entry)?;
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
        let shape = |what, found, expected| {
            if found == expected { Ok(()) } else { Err(MachineError::Shape { what, found, expected }) }
        };
        shape("vCPUs", state.vcpus.len(), 1)?;
        shape("interrupt controllers", state.irqchips.len(), 3)?;
        let layout = state.layout;
        let vm = hypervisor.create_vm(&layout, &memory)?;
        let mut devices = Devices::new(&vm, &layout, &memory, peripherals, Some(state))?;
        shape("virtio devices", state.windows.len(), devices.windows.len())?;
        let vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
        state.vcpus[0].restore(&hypervisor, &vm, &vcpu)?;
        vm.set_pit2(&state.pit).map_err(ioctl("KVM_SET_PIT2"))?;
        // With this flag set, KVM would move the guest's clock ahead by the snapshot's age.
        let mut clock = state.clock;
        clock.flags &= !KVM_CLOCK_REALTIME;
        vm.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))?;
        for chip in &state.irqchips {
            vm.set_irqchip(chip).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        devices.restore(state)?;
        Ok(Machine { hypervisor, vm, vcpu, memory, layout, devices })
    }

    /// The thread that serves the guest's vsock, to be started by the caller.
    pub fn vsock_backend(&self, listener: UnixListener) -> Result<Backend, MachineError> {
        Backend::new(listener, Arc::clone(&self.devices.vsock))
            .map_err(|source| MachineError::Io { what: "serving vsock", source })
    }

    /// Runs the guest on this thread until `on_ring` stops it or it resets itself.
    pub fn run(&mut self, mut on_ring: impl FnMut(Ring) -> Flow) -> Result<Stop, MachineError> {
        loop {
            let ram = self.memory.ram();
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, bytes)) => match self.devices.port_write(port, bytes) {
                    PortWrite::Done => {}
                    PortWrite::Reset => return Ok(Stop::Reset),
                    PortWrite::Rang(ring) => {
                        if on_ring(ring) == Flow::Stop {
                            self.finish_instruction();
                            return Ok(Stop::Asked);
                        }
                    }
                },
                Ok(VcpuExit::IoIn(port, bytes)) => self.devices.port_read(port, bytes),
                Ok(VcpuExit::MmioRead(address, bytes)) => self.devices.mmio_read(address, bytes),
                Ok(VcpuExit::MmioWrite(address, bytes)) => self.devices.mmio_write(address, bytes),
                Ok(VcpuExit::X86Wrmsr(exit)) => {
                    let (index, value) = (exit.index, exit.data);
                    *exit.error = 0;
                    pvm::write_msr(&self.vcpu, ram, index, value)?;
                }
                Ok(VcpuExit::InternalError) if self.hypervisor.kind() == KvmKind::Pvm => {
                    pvm::mend_instruction(&mut self.vcpu, ram)?;
                }
                Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Ok(Stop::Reset),
                Ok(exit) => return Err(MachineError::Exit { exit: format!("{exit:?}") }),
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                Err(error) => return Err(MachineError::Run(error)),
            }
        }
    }

    /// KVM completes an I/O instruction only when it is entered again; this enters it and comes straight back.
    fn finish_instruction(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        let _interrupted = self.vcpu.run().map(|_| ());
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Everything about the stopped machine except its memory.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let vcpus = vec![VcpuState::save(&self.hypervisor, &self.vm, &self.vcpu)?];
        let pit = self.vm.get_pit2().map_err(ioctl("KVM_GET_PIT2"))?;
        let clock = self.vm.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?;
        let mut irqchips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.vm.get_irqchip(&mut chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
            irqchips.push(chip);
        }
        let lock =
            |window: &Arc<Mutex<dyn Window>>| window.lock().unwrap_or_else(PoisonError::into_inner).save();
        let mut vsock = self.devices.vsock.lock().unwrap_or_else(PoisonError::into_inner);
        let vsock_state = vsock.with_device(|device, _, _| (device.save(), Ok(false)));
        drop(vsock);
        Ok(MachineState {
            layout: self.layout,
            kind: self.hypervisor.kind(),
            vcpus,
            clock,
            pit,
            irqchips,
            serial: SerialSnapshot::save(&self.devices.serial),
            windows: self.devices.windows.iter().map(lock).collect(),
            vsock: vsock_state,
        })
    }

    /// The vCPU, to be looked at or set up while it does not run.
    pub fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// The machine's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

enum PortWrite {
    Done,
    Reset,
    Rang(Ring),
}

impl Devices {
    fn new(
        vm: &VmFd,
        layout: &MemoryLayout,
        memory: &GuestMemory,
        peripherals: Peripherals,
        state: Option<&MachineState>,
    ) -> Result<Devices, MachineError> {
        let console = Console::new(peripherals.console);
        let serial_irq = IrqLine(interrupt(vm, arch::SERIAL_IRQ)?);
        let serial = match state {
            Some(state) => state
                .serial
                .restore(serial_irq, console)
                .map_err(|source| MachineError::Io { what: "restoring the serial port", source })?,
            None => Serial::new(serial_irq, console),
        };
        let irq = |slot: usize| interrupt(vm, arch::VIRTIO_IRQS[slot]);
        let ram = || memory.ram().clone();
        let saved: Option<&VsockSnapshot> = state.map(|state| &state.vsock);
        let vsock = Arc::new(Mutex::new(Transport::new(Vsock::new(saved), ram(), irq(0)?)));
        let rng = Arc::new(Mutex::new(Transport::new(Rng, ram(), irq(1)?)));
        let mut windows: Vec<Arc<Mutex<dyn Window>>> = vec![vsock.clone(), rng];
        let disk = layout.root_disk_range();
        if !disk.is_empty() {
            windows.push(Arc::new(Mutex::new(Transport::new(Pmem::new(disk), ram(), irq(2)?))));
        }
        let doorbell = Doorbell::new(peripherals.record);
        Ok(Devices { serial, cmos: Cmos::default(), doorbell, windows, vsock, dropped_writes: 0 })
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), MachineError> {
        for (window, saved) in self.windows.iter().zip(&state.windows) {
            window.lock().unwrap_or_else(PoisonError::into_inner).restore(saved)?;
        }
        // Tells the guest about streams that ended with the snapshot.
        let mut vsock = self.vsock.lock().unwrap_or_else(PoisonError::into_inner);
        vsock.with_device(|device, queues, ram| ((), device.pump(queues, ram)));
        Ok(())
    }

    fn port_write(&mut self, port: u16, bytes: &[u8]) -> PortWrite {
        for byte in bytes {
            match port {
                doorbell::COMMAND_PORT => {
                    if let Some(ring) = self.doorbell.write(*byte) {
                        return PortWrite::Rang(ring);
                    }
                }
                KEYBOARD_COMMAND if *byte == RESET_COMMAND => return PortWrite::Reset,
                cmos::INDEX_PORT | cmos::DATA_PORT => self.cmos.write(port, *byte),
                _ => {
                    if let Some(offset) = serial_register(port)
                        && let Err(error) = self.serial.write(offset, *byte)
                    {
                        tracing::debug!(?error, "serial port");
                    }
                }
            }
        }
        PortWrite::Done
    }

    fn port_read(&mut self, port: u16, into: &mut [u8]) {
        match (port, serial_register(port)) {
            (doorbell::DATA_PORT, _) => self.doorbell.read(into),
            (cmos::INDEX_PORT | cmos::DATA_PORT, _) => into.fill(self.cmos.read(port)),
            (_, Some(offset)) => into.fill_with(|| self.serial.read(offset)),
            // The keyboard controller says that it has nothing and is not busy.
            (KEYBOARD_COMMAND, _) => into.fill(0),
            _ => into.fill(0xff),
        }
    }

    fn window(&self, address: u64) -> Option<(&Arc<Mutex<dyn Window>>, u64)> {
        let offset = address.checked_sub(arch::MMIO_START)?;
        let slot = usize::try_from(offset / arch::MMIO_WINDOW).ok()?;
        self.windows.get(slot).map(|window| (window, offset % arch::MMIO_WINDOW))
    }

    fn mmio_read(&mut self, address: u64, into: &mut [u8]) {
        match self.window(address) {
            Some((window, offset)) => {
                window.lock().unwrap_or_else(PoisonError::into_inner).read(offset, into);
            }
            None => into.fill(0xff),
        }
    }

    fn mmio_write(&mut self, address: u64, bytes: &[u8]) {
        if let Some((window, offset)) = self.window(address) {
            window.lock().unwrap_or_else(PoisonError::into_inner).write(offset, bytes);
            return;
        }
        // Writes to the read-only root disk arrive here too.
        self.dropped_writes += 1;
        if self.dropped_writes.is_power_of_two() {
            tracing::warn!(
                address,
                count = self.dropped_writes,
                "dropped a guest's write to read-only or absent memory"
            );
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(arch::SERIAL_PORT).filter(|offset| *offset < 8).map(|offset| offset as u8)
}

fn interrupt(vm: &VmFd, line: u32) -> Result<EventFd, MachineError> {
    let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| MachineError::Io { what: "creating an eventfd", source })?;
    vm.register_irqfd(&fd, line).map_err(ioctl("KVM_IRQFD"))?;
    Ok(fd)
}
