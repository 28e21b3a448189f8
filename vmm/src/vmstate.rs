//! The saved state of a machine and its encoding, `vmstate`.
//!
//! ```text
//! 0   magic "FORKDVM1"
//! 8   version    u32 LE   (VERSION)
//! 12  length     u32 LE   bytes of the body, at most BODY_MAX
//! 16  sha256     32 bytes of the body
//! 48  body       postcard encoding of MachineState
//! ```
//! KVM structures are stored as the kernel defines them (arch/x86/include/uapi/asm/kvm.h).

use crate::devices::serial::SerialPortState;
use crate::devices::virtio::DeviceKind;
use crate::devices::virtio::mmio::WindowState;
use crate::kvm::KvmKind;
use crate::memory::{MemoryError, MemoryLayout};
use crate::vcpu::VcpuState;
use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const MAGIC: &[u8; 8] = b"FORKDVM1";
/// Version of the body's layout.
pub const VERSION: u32 = 2;
/// Largest body, bytes: eight vCPUs with the largest register state fit many times.
pub const BODY_MAX: usize = 4 << 20;
const HEADER: usize = 48;

/// Everything about a machine except its memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// Sizes of its memory.
    pub layout: MemoryLayout,
    /// Kind of KVM it was made on.
    pub kind: KvmKind,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) clock: kvm_clock_data,
    pub(crate) pit: kvm_pit_state2,
    pub(crate) irqchips: Vec<kvm_irqchip>,
    pub(crate) serial: SerialPortState,
    pub(crate) windows: Vec<(DeviceKind, WindowState)>,
    /// Whether ACPI tables, and with them the generation page, are in its memory.
    pub(crate) described: bool,
}

/// A `vmstate` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VmstateError {
    /// No magic, too short, or cut off.
    #[error("this is not a forkd vmstate, or it is cut off ({bytes} bytes)")]
    NotVmstate {
        /// Its length.
        bytes: usize,
    },
    /// Another version.
    #[error("this vmstate has version {found}; this forkd reads version {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The digest differs.
    #[error("the vmstate is damaged: its sha256 does not match")]
    Damaged,
    /// The body does not decode.
    #[error("the vmstate does not decode")]
    Malformed(#[source] postcard::Error),
    /// Sizes that no machine has.
    #[error("the vmstate describes an impossible machine")]
    Layout(#[from] MemoryError),
    /// Too large to be encoded.
    #[error("the machine's state takes {bytes} bytes, over the limit of {BODY_MAX}")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
}

impl MachineState {
    /// The `vmstate` file of this state.
    pub fn encode(&self) -> Result<Vec<u8>, VmstateError> {
        let body = postcard::to_stdvec(self).map_err(VmstateError::Malformed)?;
        if body.len() > BODY_MAX {
            return Err(VmstateError::TooLarge { bytes: body.len() });
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(Sha256::digest(&body));
        bytes.extend(body);
        Ok(bytes)
    }

    /// Reads a `vmstate` file.
    pub fn decode(bytes: &[u8]) -> Result<MachineState, VmstateError> {
        let not_vmstate = VmstateError::NotVmstate { bytes: bytes.len() };
        let Some((header, body)) = bytes.split_at_checked(HEADER) else { return Err(not_vmstate) };
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if header[..8] != MAGIC[..] {
            return Err(not_vmstate);
        }
        if word(8) != VERSION {
            return Err(VmstateError::Version { found: word(8) });
        }
        if word(12) as usize != body.len() || body.len() > BODY_MAX {
            return Err(not_vmstate);
        }
        if Sha256::digest(body)[..] != header[16..] {
            return Err(VmstateError::Damaged);
        }
        let state: MachineState = postcard::from_bytes(body).map_err(VmstateError::Malformed)?;
        state.layout.check()?;
        Ok(state)
    }
}
