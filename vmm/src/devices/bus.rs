//! What a vCPU reaches through I/O ports and device windows. One bus serves all vCPUs of a machine, each on its own
//! thread: every device has a lock of its own.

use crate::arch;
use crate::devices::cmos::{self, Cmos};
use crate::devices::doorbell::{Doorbell, Ring};
use crate::devices::serial::{Console, IrqLine, SerialPort, SerialPortState};
use crate::devices::virtio::DeviceKind;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, ScratchDisk};
use crate::devices::virtio::console::VirtioConsole;
use crate::devices::virtio::mmio::{RestoreError, Transport, Window, WindowState};
use crate::devices::virtio::net::{Link, Net};
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::kvm::{KvmError, ioctl};
use crate::memory::{GuestMemory, MemoryLayout};
use forkd_abi::doorbell::{COMMAND_PORT, DATA_PORT};
use kvm_ioctls::VmFd;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_superio::serial::Serial;
use vmm_sys_util::eventfd::EventFd;

/// The keyboard controller's command port; 0xfe there is how a PC resets itself.
const KEYBOARD_COMMAND: u16 = 0x64;
const RESET_COMMAND: u8 = 0xfe;

/// Devices could not be made or put back.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// KVM refused an interrupt line.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device's saved state does not fit.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A file descriptor for a device.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A snapshot names a device twice, or more devices than there are windows.
    #[error("the snapshot's list of {count} devices is impossible")]
    Devices {
        /// Devices in it.
        count: usize,
    },
}

/// What a machine is connected to.
#[derive(Debug, Default)]
pub struct Peripherals {
    /// Where console output goes.
    pub console: Option<File>,
    /// What the guest reads at its doorbell.
    pub record: Vec<u8>,
    /// What its scratch disk writes to. A new machine has that disk only with such a file.
    pub scratch: Option<ScratchDisk>,
    /// What its network device is connected to.
    pub link: Option<Link>,
    /// A new machine has a second console, which costs a part of its boot (docs/ARCHITECTURE.md has figures).
    pub second_console: bool,
}

/// The devices that a machine of this layout boots with.
pub fn default_devices(layout: &MemoryLayout, peripherals: &Peripherals) -> Vec<DeviceKind> {
    let disk = (layout.root_disk_bytes > 0).then_some(DeviceKind::Pmem);
    let scratch = peripherals.scratch.as_ref().map(|_| DeviceKind::Block);
    let console = peripherals.second_console.then_some(DeviceKind::Console);
    let always = [DeviceKind::Vsock, DeviceKind::Rng, DeviceKind::Balloon, DeviceKind::Net];
    always.into_iter().chain(disk).chain(scratch).chain(console).collect()
}

/// A device and where it is reached.
struct Slot {
    kind: DeviceKind,
    window: Arc<Mutex<dyn Window>>,
}

/// What devices are made of.
struct Parts {
    console: Console,
    scratch: Option<ScratchDisk>,
    link: Option<Link>,
    /// The memory of a machine that was not restored (see `balloon.rs`).
    gives_back: Option<GuestMemory>,
}

/// What came of a write to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortWrite {
    /// Nothing special.
    Done,
    /// The guest resets itself.
    Reset,
    /// The guest rang the doorbell.
    Rang(Ring),
}

/// See the module's description.
pub struct Bus {
    serial: Mutex<SerialPort>,
    cmos: Mutex<Cmos>,
    doorbell: Mutex<Doorbell>,
    slots: Vec<Slot>,
    vsock: Option<Arc<Mutex<Transport<Vsock>>>>,
    net: Option<Arc<Mutex<Transport<Net>>>>,
    generation: EventFd,
    dropped_writes: AtomicU64,
    /// Devices were restored and have not resumed.
    resume_owed: AtomicBool,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A device that panicked is as consistent as a guest can make it: each is checked on every access.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// The devices of a machine, as after power-on; the serial port as it was saved, if it was.
    pub fn new(
        vm: &VmFd,
        layout: &MemoryLayout,
        memory: &GuestMemory,
        peripherals: Peripherals,
        kinds: &[DeviceKind],
        serial: Option<&SerialPortState>,
    ) -> Result<Bus, BusError> {
        let Peripherals { console, record, scratch, link, .. } = peripherals;
        let console = Console::new(console);
        let gives_back = serial.is_none().then(|| memory.clone());
        let mut parts = Parts { console: console.clone(), scratch, link, gives_back };
        let line = IrqLine(interrupt(vm, arch::SERIAL_IRQ)?);
        let serial = match serial {
            Some(saved) => saved
                .restore(line, console)
                .map_err(|source| BusError::Io { what: "restoring the serial port", source })?,
            None => Serial::new(line, console),
        };
        let mut bus = Bus {
            serial: Mutex::new(serial),
            cmos: Mutex::default(),
            doorbell: Mutex::new(Doorbell::new(record)),
            slots: Vec::new(),
            vsock: None,
            net: None,
            generation: interrupt(vm, arch::GENERATION_IRQ)?,
            dropped_writes: AtomicU64::new(0),
            resume_owed: AtomicBool::new(false),
        };
        let twice = kinds.iter().enumerate().any(|(at, kind)| kinds[..at].contains(kind));
        if twice || kinds.len() > arch::VIRTIO_IRQS.len() {
            return Err(BusError::Devices { count: kinds.len() });
        }
        for (kind, line) in kinds.iter().zip(arch::VIRTIO_IRQS) {
            bus.plug(*kind, layout, memory, interrupt(vm, line)?, &mut parts);
        }
        Ok(bus)
    }

    fn plug(
        &mut self,
        kind: DeviceKind,
        layout: &MemoryLayout,
        memory: &GuestMemory,
        irq: EventFd,
        parts: &mut Parts,
    ) {
        let ram = memory.ram().clone();
        let window: Arc<Mutex<dyn Window>> = match kind {
            DeviceKind::Vsock => {
                let vsock = Arc::new(Mutex::new(Transport::new(Vsock::default(), ram, irq)));
                self.vsock = Some(Arc::clone(&vsock));
                vsock
            }
            DeviceKind::Rng => Arc::new(Mutex::new(Transport::new(Rng, ram, irq))),
            DeviceKind::Pmem => {
                let disk = Pmem::new(layout.root_disk_range());
                Arc::new(Mutex::new(Transport::new(disk, ram, irq)))
            }
            DeviceKind::Block => {
                Arc::new(Mutex::new(Transport::new(Block::new(parts.scratch.take()), ram, irq)))
            }
            DeviceKind::Balloon => {
                Arc::new(Mutex::new(Transport::new(Balloon::new(parts.gives_back.clone()), ram, irq)))
            }
            DeviceKind::Console => {
                Arc::new(Mutex::new(Transport::new(VirtioConsole::new(parts.console.clone()), ram, irq)))
            }
            DeviceKind::Net => {
                let net = Arc::new(Mutex::new(Transport::new(Net::new(parts.link.take()), ram, irq)));
                self.net = Some(Arc::clone(&net));
                net
            }
        };
        self.slots.push(Slot { kind, window });
    }

    /// The kinds of the devices, in window order.
    pub fn kinds(&self) -> Vec<DeviceKind> {
        self.slots.iter().map(|slot| slot.kind).collect()
    }

    /// The vsock device, if there is one.
    pub fn vsock(&self) -> Option<&Arc<Mutex<Transport<Vsock>>>> {
        self.vsock.as_ref()
    }

    /// The network device, if there is one.
    pub fn net(&self) -> Option<&Arc<Mutex<Transport<Net>>>> {
        self.net.as_ref()
    }

    /// State of every device with a window.
    pub fn save(&self) -> Vec<(DeviceKind, WindowState)> {
        self.slots.iter().map(|slot| (slot.kind, lock(&slot.window).save())).collect()
    }

    /// State of the serial port.
    pub fn save_serial(&self) -> SerialPortState {
        SerialPortState::save(&lock(&self.serial))
    }

    /// Puts saved state into the devices of a new machine made with the same kinds.
    pub fn restore(&self, windows: &[(DeviceKind, WindowState)]) -> Result<(), BusError> {
        for (slot, (_, saved)) in self.slots.iter().zip(windows) {
            lock(&slot.window).restore(saved)?;
        }
        self.resume_owed.store(true, Ordering::Release);
        Ok(())
    }

    /// Has restored devices say what they have to, once. After the guest's first exit: an interrupt that waits for a
    /// guest runs its handler before the first instruction, 3 ms where KVM emulates its kernel.
    pub fn resume_devices(&self) {
        if self.resume_owed.load(Ordering::Relaxed) && self.resume_owed.swap(false, Ordering::AcqRel) {
            for slot in &self.slots {
                lock(&slot.window).resume();
            }
        }
    }

    /// Stops devices from working on the guest's memory on the host's behalf, or lets them again.
    pub fn freeze(&self, frozen: bool) {
        for slot in &self.slots {
            lock(&slot.window).freeze(frozen);
        }
    }

    /// Tells the guest's kernel that it is a copy (see `acpi.rs`).
    pub fn announce_generation(&self) {
        if let Err(error) = self.generation.write(1) {
            tracing::error!(%error, "the generation interrupt could not be raised");
        }
    }

    /// The guest writes to an I/O port.
    pub fn port_write(&self, port: u16, bytes: &[u8]) -> PortWrite {
        for byte in bytes {
            match port {
                COMMAND_PORT => {
                    if let Some(ring) = lock(&self.doorbell).write(*byte) {
                        return PortWrite::Rang(ring);
                    }
                }
                KEYBOARD_COMMAND if *byte == RESET_COMMAND => return PortWrite::Reset,
                cmos::INDEX_PORT | cmos::DATA_PORT => lock(&self.cmos).write(port, *byte),
                _ => {
                    if let Some(offset) = serial_register(port)
                        && let Err(error) = lock(&self.serial).write(offset, *byte)
                    {
                        tracing::debug!(?error, "serial port");
                    }
                }
            }
        }
        PortWrite::Done
    }

    /// The guest reads from an I/O port.
    pub fn port_read(&self, port: u16, into: &mut [u8]) {
        match (port, serial_register(port)) {
            (DATA_PORT, _) => lock(&self.doorbell).read(into),
            (cmos::INDEX_PORT | cmos::DATA_PORT, _) => into.fill(lock(&self.cmos).read(port)),
            (_, Some(offset)) => into.fill_with(|| lock(&self.serial).read(offset)),
            // The keyboard controller says that it has nothing and is not busy.
            (KEYBOARD_COMMAND, _) => into.fill(0),
            _ => into.fill(0xff),
        }
    }

    fn window(&self, address: u64) -> Option<(&Mutex<dyn Window>, u64)> {
        let offset = address.checked_sub(arch::MMIO_START)?;
        let slot = usize::try_from(offset / arch::MMIO_WINDOW).ok()?;
        self.slots.get(slot).map(|slot| (&*slot.window, offset % arch::MMIO_WINDOW))
    }

    /// The guest reads where no memory is.
    pub fn mmio_read(&self, address: u64, into: &mut [u8]) {
        match self.window(address) {
            Some((window, offset)) => lock(window).read(offset, into),
            None => into.fill(0xff),
        }
    }

    /// The guest writes where no memory is, or to the read-only root disk.
    pub fn mmio_write(&self, address: u64, bytes: &[u8]) {
        if let Some((window, offset)) = self.window(address) {
            lock(window).write(offset, bytes);
            return;
        }
        let count = self.dropped_writes.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_power_of_two() {
            tracing::warn!(address, count, "dropped a guest's write to read-only or absent memory");
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(arch::SERIAL_PORT).filter(|offset| *offset < 8).map(|offset| offset as u8)
}

fn interrupt(vm: &VmFd, line: u32) -> Result<EventFd, BusError> {
    let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| BusError::Io { what: "creating an eventfd", source })?;
    vm.register_irqfd(&fd, line).map_err(ioctl("KVM_IRQFD"))?;
    Ok(fd)
}
