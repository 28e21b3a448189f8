//! The register window of a virtio-mmio device (virtio 1.2, section 4.2.2, version 2).

use super::device::{DeviceState, VirtioDevice};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "fork".
const VENDOR: u32 = 0x6b72_6f66;

/// A device's window as the bus sees it.
pub trait Window: Send {
    /// The guest reads registers or configuration.
    fn read(&mut self, offset: u64, into: &mut [u8]);
    /// The guest writes them.
    fn write(&mut self, offset: u64, bytes: &[u8]);
    /// Registers, queues and the device's own state, for a snapshot.
    fn save(&self) -> WindowState;
    /// Puts them back; a queue that does not fit is refused.
    fn restore(&mut self, state: &WindowState) -> Result<(), RestoreError>;
    /// The restored machine is about to run.
    fn resume(&mut self);
    /// The machine has stopped, or goes on: while it is stopped its host side does not touch its memory.
    fn freeze(&mut self, frozen: bool);
}

/// A window's state does not fit its device.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another number of queues.
    #[error("the snapshot has {found} queues for virtio device {device}, which has {expected}")]
    Queues {
        /// Device ID.
        device: u32,
        /// In the snapshot.
        found: usize,
        /// Here.
        expected: usize,
    },
    /// A queue's saved state is impossible.
    #[error("the snapshot's queue {queue} of virtio device {device} is not usable")]
    Queue {
        /// Device ID.
        device: u32,
        /// Which queue.
        queue: usize,
        /// Why.
        #[source]
        source: virtio_queue::Error,
    },
}

/// What of a window survives a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowState {
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<SavedQueue>,
    device: DeviceState,
}

impl Default for WindowState {
    fn default() -> WindowState {
        WindowState {
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            interrupt_status: 0,
            config_generation: 0,
            queues: Vec::new(),
            device: DeviceState::Stateless,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

/// A device, its queues and its registers.
pub struct Transport<D> {
    device: D,
    queues: Vec<Queue>,
    ram: GuestMemoryMmap,
    interrupt: EventFd,
    state: WindowState,
    frozen: bool,
}

impl<D: VirtioDevice> Transport<D> {
    /// A window that raises `interrupt`.
    pub fn new(device: D, ram: GuestMemoryMmap, interrupt: EventFd) -> Transport<D> {
        let queues = fresh_queues(&device);
        Transport { device, queues, ram, interrupt, state: WindowState::default(), frozen: false }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Lets the host side of the device work on its queues. `work` returns whether to interrupt the driver.
    pub fn with_device<R>(
        &mut self,
        work: impl FnOnce(&mut D, &mut [Queue], &GuestMemoryMmap) -> (R, Result<bool, super::VirtioError>),
    ) -> R {
        let active = self.state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !self.frozen;
        let queues = if active { &mut self.queues[..] } else { &mut [] };
        let (result, outcome) = work(&mut self.device, queues, &self.ram);
        self.conclude(outcome);
        result
    }

    /// The device's configuration has changed: the driver is to read it again.
    pub fn config_changed(&mut self) {
        self.state.config_generation = self.state.config_generation.wrapping_add(1);
        if self.state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.raise(reg::VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn conclude(&mut self, outcome: Result<bool, super::VirtioError>) {
        match outcome {
            Ok(false) => {}
            Ok(true) => self.raise(reg::VIRTIO_MMIO_INT_VRING),
            Err(error) => {
                tracing::warn!(device = self.device.id(), %error, "virtio device needs a reset");
                self.state.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                self.raise(reg::VIRTIO_MMIO_INT_CONFIG);
            }
        }
    }

    fn raise(&mut self, bit: u32) {
        self.state.interrupt_status |= bit;
        if let Err(error) = self.interrupt.write(1) {
            tracing::error!(%error, "an interrupt could not be raised");
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.state.queue_select as usize)
    }

    fn read_register(&self, offset: u32) -> u32 {
        let queue = self.queue();
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.id(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.state.device_features_select {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size().into()),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| queue.ready().into()),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.state.interrupt_status,
            reg::VIRTIO_MMIO_STATUS => self.state.status,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.state.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.state.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.state.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.state.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value as usize),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.state.interrupt_status &= !value,
            reg::VIRTIO_MMIO_STATUS => self.set_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_queue_register(&mut self, offset: u32, value: u32) {
        // Queues are laid out before the driver says it is ready, and not again until a reset.
        if self.state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            return;
        }
        let ram = &self.ram;
        let Some(queue) = self.queues.get_mut(self.state.queue_select as usize) else { return };
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            reg::VIRTIO_MMIO_QUEUE_READY => {
                queue.set_ready(value == 1);
                if value == 1 && !queue.is_valid(ram) {
                    queue.set_ready(false);
                }
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn accept_features(&mut self, value: u32) {
        let (shift, keep) = match self.state.driver_features_select {
            0 => (0, !0_u64 << 32),
            1 => (32, !0_u64 >> 32),
            _ => return,
        };
        let accepted = self.state.driver_features & keep | u64::from(value) << shift;
        self.state.driver_features = accepted & self.offered_features();
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.device.reset();
            self.queues = fresh_queues(&self.device);
            self.state = WindowState::default();
        } else {
            let was_active = self.state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
            self.state.status = value | self.state.status & VIRTIO_CONFIG_S_NEEDS_RESET;
            if value & VIRTIO_CONFIG_S_DRIVER_OK != 0 && !was_active {
                self.device.activate(self.state.driver_features);
            }
        }
    }

    fn notify(&mut self, queue: usize) {
        let usable = VIRTIO_CONFIG_S_DRIVER_OK;
        let status = self.state.status & (usable | VIRTIO_CONFIG_S_NEEDS_RESET);
        if status == usable && self.queues.get(queue).is_some_and(|queue| queue.ready()) {
            let outcome = self.device.notify(queue, &mut self.queues, &self.ram);
            self.conclude(outcome);
        }
    }
}

impl<D: VirtioDevice> Window for Transport<D> {
    fn read(&mut self, offset: u64, into: &mut [u8]) {
        let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
        if let Some(offset) = offset.checked_sub(config) {
            self.device.read_config(offset, into);
        } else if into.len() == 4 {
            into.copy_from_slice(&self.read_register(offset as u32).to_le_bytes());
        } else {
            into.fill(0);
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            self.device.write_config(offset, bytes);
        } else if let Ok(bytes) = bytes.try_into() {
            self.write_register(offset as u32, u32::from_le_bytes(bytes));
        }
    }

    fn save(&self) -> WindowState {
        let queues = self.queues.iter().map(|queue| SavedQueue::from(queue.state())).collect();
        WindowState { queues, device: self.device.save(), ..self.state.clone() }
    }

    fn restore(&mut self, state: &WindowState) -> Result<(), RestoreError> {
        let device = self.device.id();
        let (found, expected) = (state.queues.len(), self.queues.len());
        if found != expected {
            return Err(RestoreError::Queues { device, found, expected });
        }
        let mut queues = Vec::with_capacity(expected);
        for (position, saved) in state.queues.iter().enumerate() {
            let max_size = self.device.queue_sizes()[position];
            let queue = Queue::try_from(saved.state(max_size)).map_err(|source| RestoreError::Queue {
                device,
                queue: position,
                source,
            })?;
            queues.push(queue);
        }
        self.queues = queues;
        self.state = WindowState { queues: Vec::new(), device: DeviceState::Stateless, ..state.clone() };
        self.device.restore(&state.device);
        if self.state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.device.activate(self.state.driver_features);
        }
        Ok(())
    }

    fn resume(&mut self) {
        if self.device.is_reconfigured() {
            self.config_changed();
        }
        self.with_device(|device, queues, ram| ((), device.resume(queues, ram)));
        // One that was on its way when the machine was saved may not have arrived.
        if self.state.interrupt_status != 0 {
            self.raise(0);
        }
    }

    fn freeze(&mut self, frozen: bool) {
        let thaws = std::mem::replace(&mut self.frozen, frozen) && !frozen;
        if thaws {
            // What the host side had for the driver meanwhile.
            self.with_device(|device, queues, ram| ((), device.resume(queues, ram)));
        }
    }
}

fn fresh_queues(device: &impl VirtioDevice) -> Vec<Queue> {
    // Sizes are constants of this crate: powers of two that Queue accepts.
    device.queue_sizes().iter().filter_map(|size| Queue::new(*size).ok()).collect()
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> SavedQueue {
        SavedQueue {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl SavedQueue {
    fn state(&self, max_size: u16) -> QueueState {
        QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx_enabled,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        }
    }
}
