//! The edge to /dev/kvm: opening it, telling its kind, memory slots, and the few ioctls that kvm-ioctls marks unsafe.

use crate::memory::{GuestMemory, MemoryLayout};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, Xsave, kvm_pit_config,
    kvm_userspace_memory_region, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use vmm_sys_util::errno;
use vmm_sys_util::fam::FamStruct;

/// Where KVM keeps its three-page TSS on Intel; any address below 4 GiB outside of RAM and devices will do.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// The one-page identity map, beside it.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Largest XSAVE area that is accepted, bytes (AMX needs 11 KiB).
pub const XSAVE_MAX: usize = 64 * 1024;

/// What kind of KVM a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmKind {
    /// Intel VMX or AMD SVM.
    Hardware,
    /// `kvm_pvm`: guests run without VMX or SVM, supervisor code emulated (see `pvm.rs`).
    Pvm,
}

impl KvmKind {
    /// The kind of this host's KVM, by which vendor module serves it.
    pub fn detect() -> KvmKind {
        let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        if loaded("kvm_pvm") && !loaded("kvm_intel") && !loaded("kvm_amd") {
            KvmKind::Pvm
        } else {
            KvmKind::Hardware
        }
    }

    /// Name as written into manifests.
    pub fn name(self) -> &'static str {
        match self {
            KvmKind::Hardware => "hardware",
            KvmKind::Pvm => "pvm",
        }
    }
}

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// /dev/kvm cannot be opened.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] errno::Error),
    /// The interface is not the one this program was written for.
    #[error("/dev/kvm speaks API version {found}, not 12")]
    ApiVersion {
        /// What it speaks.
        found: i32,
    },
    /// A needed capability is missing.
    #[error("this host's KVM lacks {capability}")]
    Lacks {
        /// Its name.
        capability: &'static str,
    },
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// Why.
        #[source]
        source: errno::Error,
    },
    /// A saved XSAVE area does not fit this host.
    #[error("the saved floating point state has {found} bytes, but this host uses {expected}")]
    XsaveSize {
        /// In the snapshot.
        found: usize,
        /// Here.
        expected: usize,
    },
}

/// Turns an ioctl's failure into a [`KvmError`].
pub(crate) fn ioctl(name: &'static str) -> impl Fn(errno::Error) -> KvmError {
    move |source| KvmError::Ioctl { ioctl: name, source }
}

/// An open /dev/kvm.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
    kind: KvmKind,
}

impl AsFd for Hypervisor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self` keeps the descriptor open, and the borrow is bound to it.
        unsafe { BorrowedFd::borrow_raw(self.kvm.as_raw_fd()) }
    }
}

impl Hypervisor {
    /// Opens /dev/kvm and checks what every machine needs.
    pub fn open(kind: KvmKind) -> Result<Hypervisor, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::Open)?;
        let found = kvm.get_api_version();
        if found != 12 {
            return Err(KvmError::ApiVersion { found });
        }
        let needed = [
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Pit2, "an in-kernel timer"),
            (Cap::UserMemory, "user memory slots"),
            (Cap::Irqfd, "irqfd"),
        ];
        for (cap, capability) in needed {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks { capability });
            }
        }
        Ok(Hypervisor { kvm, kind })
    }

    /// What kind of KVM this is.
    pub fn kind(&self) -> KvmKind {
        self.kind
    }

    /// The raw handle, for system-wide ioctls.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// CPUID leaves that guests may be shown (0.7 ms on kvm_pvm: asked for once, then part of the snapshot).
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))
    }

    /// A VM whose memory slots are in place. Slots come before the interrupt controller: afterwards each
    /// costs 6-7 ms on kvm_pvm, where KVM waits for a grace period.
    pub fn create_vm(&self, layout: &MemoryLayout, memory: &GuestMemory) -> Result<VmFd, KvmError> {
        let vm = self.kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        set_memory_slots(&vm, layout, memory)?;
        vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;
        Ok(vm)
    }
}

fn set_memory_slots(vm: &VmFd, layout: &MemoryLayout, memory: &GuestMemory) -> Result<(), KvmError> {
    for (number, slot) in layout.slots().iter().enumerate() {
        let mapping = memory.mapping(slot.image).ok_or(KvmError::Lacks { capability: "a mapped image" })?;
        let region = kvm_userspace_memory_region {
            slot: number as u32,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.guest_address,
            memory_size: slot.bytes,
            userspace_addr: mapping.range(slot.offset, slot.bytes),
        };
        // SAFETY: `range` checked that the slot lies in its mapping, the layout's slots do not overlap, and the machine
        // keeps `memory` alive as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// A vCPU's floating point and vector state, as KVM passes it. It is sized for one VM and can be used again.
#[derive(Debug)]
pub struct XsaveBuffer {
    area: Xsave,
    bytes: usize,
}

impl XsaveBuffer {
    /// A buffer of the size that this VM's state has.
    pub fn new(vm: &VmFd) -> Result<XsaveBuffer, KvmError> {
        let fixed = size_of::<kvm_xsave>();
        let needed = (vm.check_extension_int(Cap::Xsave2).max(0) as usize).max(fixed);
        let more = (needed - fixed).div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>());
        let too_large = |_| KvmError::XsaveSize { found: needed, expected: XSAVE_MAX };
        Ok(XsaveBuffer { area: Xsave::new(more).map_err(too_large)?, bytes: needed.next_multiple_of(4) })
    }

    /// Takes the state of a vCPU of the VM.
    pub fn save(&mut self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 reports for this VM.
        unsafe { vcpu.get_xsave2(&mut self.area) }.map_err(ioctl("KVM_GET_XSAVE2"))
    }

    /// Gives the state to a vCPU of the VM.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        // SAFETY: the buffer is as large as KVM_CAP_XSAVE2 says this VM reads.
        unsafe { vcpu.set_xsave2(&self.area) }.map_err(ioctl("KVM_SET_XSAVE"))
    }

    /// The state as the memory image that XSAVE writes.
    pub fn image(&mut self) -> &mut [u8] {
        let area = self.area.as_mut_fam_struct_ptr();
        // SAFETY: the further words follow the region without a gap (both are u32 in a `repr(C)` struct), the wrapper
        // has allocated `bytes` for both together, and the slice borrows it. Any bytes are words.
        unsafe { std::slice::from_raw_parts_mut((&raw mut (*area).xsave.region).cast(), self.bytes) }
    }
}

/// A vCPU's floating point and vector state.
pub fn save_xsave(vm: &VmFd, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
    let mut buffer = XsaveBuffer::new(vm)?;
    buffer.save(vcpu)?;
    let fam = buffer.area.as_fam_struct_ref();
    Ok(fam.xsave.region.iter().chain(buffer.area.as_slice()).copied().collect())
}

/// Loads what [`save_xsave`] returned, perhaps on another host.
pub fn restore_xsave(vm: &VmFd, vcpu: &VcpuFd, words: &[u32]) -> Result<(), KvmError> {
    let mut buffer = XsaveBuffer::new(vm)?;
    let (found, expected) = (size_of_val(words), buffer.bytes);
    if found > XSAVE_MAX || found > expected || found < size_of::<kvm_xsave>() {
        return Err(KvmError::XsaveSize { found, expected });
    }
    let (region, more) = words.split_at(size_of::<kvm_xsave>() / 4);
    // SAFETY: only the plain data of the header struct is written; its length field stays as it is.
    unsafe { buffer.area.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
    buffer.area.as_mut_slice()[..more.len()].copy_from_slice(more);
    buffer.restore(vcpu)
}

/// The sub-error of the KVM_EXIT_INTERNAL_ERROR that was just returned.
pub fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: any bit pattern is a valid u32; the union member is the one KVM filled for this exit reason.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}
