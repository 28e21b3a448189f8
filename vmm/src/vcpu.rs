//! A vCPU's state, taken and given back in the order that the kernel needs.
//!
//! Order matters: SET_REGS clears the pending exceptions that VCPU_EVENTS restores; SREGS carries the APIC base that
//! the LAPIC needs; a TSC deadline set before the TSC never fires. See Documentation/virt/kvm/api.rst of Linux.

use crate::kvm::{Hypervisor, KvmError, KvmKind, ioctl, restore_xsave, save_xsave};
use crate::pvm;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Time stamp counter.
const MSR_TSC: u32 = 0x10;
/// Model-specific registers that matter and are not in KVM_GET_MSR_INDEX_LIST everywhere: STAR, LSTAR, CSTAR,
/// SYSCALL_MASK, KERNEL_GS_BASE, TSC_AUX, TSC_DEADLINE.
const MORE_MSRS: [u32; 7] =
    [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102, 0xc000_0103, MSR_TSC_DEADLINE];

/// A vCPU could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The saved state has more entries than any host knows.
    #[error("the saved vCPU has {found} {what}, over the limit of {max}")]
    TooMany {
        /// Entries of what.
        what: &'static str,
        /// In the snapshot.
        found: usize,
        /// Allowed.
        max: usize,
    },
    /// The guest's clock would run at another speed.
    #[error(
        "the snapshot's time stamp counter runs at {needs} kHz, this host's at {has} kHz, and this processor cannot scale it"
    )]
    TscRate {
        /// The snapshot's rate, kHz.
        needs: u32,
        /// This host's, kHz.
        has: u32,
    },
    /// This host refuses a register value.
    #[error("this host's KVM refuses the value {value:#x} for MSR {index:#x}")]
    MsrRefused {
        /// The register.
        index: u32,
        /// Its saved value.
        value: u64,
    },
}

/// Everything about a vCPU that survives a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    tsc_khz: Option<u32>,
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Takes the state of a vCPU that is not running and has no exit half done.
    pub fn save(hypervisor: &Hypervisor, vm: &VmFd, vcpu: &VcpuFd) -> Result<VcpuState, VcpuError> {
        let mp_state = vcpu.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        let xsave = save_xsave(vm, vcpu)?;
        let xcrs = if hypervisor.kvm().check_extension(Cap::Xcrs) {
            vcpu.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?
        } else {
            kvm_xcrs::default()
        };
        let debug_regs = vcpu.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
        let tsc_khz = vcpu.get_tsc_khz().ok();
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_CPUID2"))?;
        let msrs = save_msrs(hypervisor, vcpu)?;
        let events = vcpu.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
        let cpuid = cpuid.as_slice().to_vec();
        Ok(VcpuState { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, tsc_khz, cpuid, msrs, events })
    }

    /// Gives the state to a new vCPU of `vm`, whose memory must answer already: setting the kvm-clock MSR writes to it.
    pub fn restore(&self, hypervisor: &Hypervisor, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), VcpuError> {
        if let Some(khz) = self.tsc_khz {
            let here = vcpu.get_tsc_khz().unwrap_or(khz);
            // Scaling needs the hardware's help. kvm_pvm's guests do not live by this counter (see `pvm.rs`).
            if hypervisor.kvm().check_extension(Cap::TscControl) {
                vcpu.set_tsc_khz(khz).map_err(ioctl("KVM_SET_TSC_KHZ"))?;
            } else if hypervisor.kind() == KvmKind::Hardware && !same_rate(khz, here) {
                return Err(VcpuError::TscRate { needs: khz, has: here });
            }
        }
        let max = KVM_MAX_CPUID_ENTRIES;
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| VcpuError::TooMany {
            what: "CPUID leaves",
            found: self.cpuid.len(),
            max,
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        vcpu.set_mp_state(self.mp_state).map_err(ioctl("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(ioctl("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        restore_xsave(vm, vcpu, &self.xsave)?;
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs).map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        self.restore_msrs(hypervisor, vcpu)?;
        vcpu.set_vcpu_events(&self.events).map_err(ioctl("KVM_SET_VCPU_EVENTS"))?;
        // Tells the guest's soft lockup detector about the pause; guests without kvm-clock answer EINVAL.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }

    fn restore_msrs(&self, hypervisor: &Hypervisor, vcpu: &VcpuFd) -> Result<(), VcpuError> {
        if self.msrs.len() > KVM_MAX_MSR_ENTRIES {
            let (what, found, max) = ("model-specific registers", self.msrs.len(), KVM_MAX_MSR_ENTRIES);
            return Err(VcpuError::TooMany { what, found, max });
        }
        let (mut deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().copied().partition(|msr| msr.index == MSR_TSC_DEADLINE);
        set_msrs(vcpu, &others)?;
        // Zero: the timer is not set.
        if let (KvmKind::Pvm, Some(deadline)) =
            (hypervisor.kind(), deadline.iter_mut().find(|deadline| deadline.data != 0))
        {
            // Whatever it was: the counter that it was set against is another host's, behind or far ahead of this
            // one's.
            let now = read_msr(vcpu, MSR_TSC)?.unwrap_or(0);
            deadline.data = now.saturating_add(pvm::timer_pause(self.tsc_khz.unwrap_or(0)));
        }
        set_msrs(vcpu, &deadline)
    }

    /// Instruction pointer, for messages.
    pub fn instruction_pointer(&self) -> u64 {
        self.regs.rip
    }
}

/// Whether two rates (kHz) are the same by what a clock discipline makes up for: 250 parts in a million, as Linux'
/// KVM has it.
fn same_rate(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= 250 * u64::from(one)
}

fn save_msrs(hypervisor: &Hypervisor, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, VcpuError> {
    let list = hypervisor.kvm().get_msr_index_list().map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let mut wanted = list.as_slice().to_vec();
    wanted.extend(MORE_MSRS.iter().filter(|index| !list.as_slice().contains(index)));
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            batch.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::TooMany {
            what: "model-specific registers",
            found: entries.len(),
            max: KVM_MAX_MSR_ENTRIES,
        })?;
        let read = vcpu.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
        saved.extend_from_slice(&msrs.as_slice()[..read]);
        // KVM stops at the first register it lists but does not have for this guest: it is left out.
        rest = &rest[(read + usize::from(read < batch.len())).min(rest.len())..];
    }
    Ok(saved)
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, VcpuError> {
    let wanted = [kvm_msr_entry { index, ..Default::default() }];
    let Ok(mut msrs) = Msrs::from_entries(&wanted) else { return Ok(None) };
    let read = vcpu.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
    Ok(msrs.as_slice().first().filter(|_| read == 1).map(|msr| msr.data))
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VcpuError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(|_| VcpuError::TooMany {
            what: "model-specific registers",
            found: rest.len(),
            max: KVM_MAX_MSR_ENTRIES,
        })?;
        let set = vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
        if let Some(refused) = rest.get(set) {
            // Read-only registers are refused even with the value they have.
            let mut probe =
                Msrs::from_entries(&[kvm_msr_entry { index: refused.index, ..Default::default() }])
                    .map_err(|_| VcpuError::MsrRefused { index: refused.index, value: refused.data })?;
            let same = vcpu.get_msrs(&mut probe).is_ok_and(|read| read == 1)
                && probe.as_slice()[0].data == refused.data;
            if !same && refused.data != 0 {
                return Err(VcpuError::MsrRefused { index: refused.index, value: refused.data });
            }
        }
        rest = &rest[(set + 1).min(rest.len())..];
    }
    Ok(())
}
