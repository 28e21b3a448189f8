//! Exceptions that the monitor raises in the guest, because it carries out instructions that raise them.

use crate::kvm::{KvmError, ioctl};
use kvm_ioctls::VcpuFd;

/// An exception (Intel SDM volume 3, "Exception and Interrupt Reference").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exception {
    /// #BP.
    Breakpoint,
    /// #UD.
    InvalidOpcode,
    /// #NM.
    DeviceNotAvailable,
    /// #GP with an error code of zero.
    GeneralProtection,
    /// #PF.
    PageFault {
        /// Goes to CR2.
        address: u64,
        /// Goes to the handler's stack.
        error_code: u32,
    },
}

impl Exception {
    fn vector(self) -> u8 {
        match self {
            Exception::Breakpoint => 3,
            Exception::InvalidOpcode => 6,
            Exception::DeviceNotAvailable => 7,
            Exception::GeneralProtection => 13,
            Exception::PageFault { .. } => 14,
        }
    }

    fn error_code(self) -> Option<u32> {
        match self {
            Exception::GeneralProtection => Some(0),
            Exception::PageFault { error_code, .. } => Some(error_code),
            Exception::Breakpoint | Exception::InvalidOpcode | Exception::DeviceNotAvailable => None,
        }
    }

    /// Has the vCPU enter its handler next. Its general registers must be set before: that forgets exceptions.
    pub fn raise(self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        if let Exception::PageFault { address, .. } = self {
            let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
            sregs.cr2 = address;
            vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        }
        let mut events = vcpu.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
        events.exception.injected = 1;
        events.exception.nr = self.vector();
        events.exception.has_error_code = u8::from(self.error_code().is_some());
        events.exception.error_code = self.error_code().unwrap_or(0);
        vcpu.set_vcpu_events(&events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }
}
