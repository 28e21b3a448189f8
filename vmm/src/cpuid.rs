//! What a guest's CPUID instruction shows: the host's supported leaves, with each vCPU's place among its siblings, and
//! without what a lazily filled machine must not have. Also tells which features a snapshot needs and a host lacks.
//! Leaves: Intel SDM volume 2, "CPUID"; KVM's: Documentation/virt/kvm/x86/cpuid.rst.

use crate::kvm::{Hypervisor, KvmError, KvmKind};
use crate::pvm;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};

/// KVM_FEATURE_ASYNC_PF, KVM_FEATURE_ASYNC_PF_VMEXIT and KVM_FEATURE_ASYNC_PF_INT: with them a guest's read of a
/// missing page becomes a write by a kernel worker, and so a private copy of what siblings could share.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
const KVM_FEATURES: u32 = 0x4000_0001;
/// KVM emulates this timer with its in-kernel APIC but does not list it.
const TSC_DEADLINE: u32 = 1 << 24;
/// The hypervisor's own leaves, from 0x4000_0000, can be read. KVM before Linux 6.14 leaves it to its callers to say
/// so; a guest that is not told looks for no kvm-clock and measures its TSC with timers, which fails on a busy host.
const HYPERVISOR: u32 = 1 << 31;
/// Several logical processors in the package.
const HYPER_THREADING: u32 = 1 << 28;
/// Most of /proc/cpuinfo that is read, bytes: one processor takes two thousand.
const CPUINFO_MAX: u64 = 16 << 10;

/// Leaves for vCPU `id` of `vcpus` on a KVM of this kind.
pub fn for_vcpu(supported: &CpuId, kind: KvmKind, id: u8, vcpus: u8) -> CpuId {
    let mut cpuid = supported.clone();
    let hidden = match kind {
        KvmKind::Hardware => ASYNC_PAGE_FAULTS,
        KvmKind::Pvm => ASYNC_PAGE_FAULTS | pvm::HYPERCALLS,
    };
    let (id, vcpus) = (u32::from(id), u32::from(vcpus));
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => {
                leaf.ebx = leaf.ebx & 0xffff | id << 24 | vcpus << 16;
                leaf.ecx |= TSC_DEADLINE | HYPERVISOR;
                leaf.edx = leaf.edx & !HYPER_THREADING | if vcpus > 1 { HYPER_THREADING } else { 0 };
            }
            4 => leaf.eax = leaf.eax & 0x3ff | (vcpus.next_power_of_two() - 1) << 26,
            0xb | 0x1f => topology(leaf, id, vcpus, id_bits),
            KVM_FEATURES => leaf.eax &= !hidden,
            0x8000_0008 => leaf.ecx = leaf.ecx & !0xf0ff | id_bits << 12 | (vcpus - 1),
            0x8000_001d => leaf.eax &= !(0xfff << 14),
            0x8000_001e => {
                leaf.eax = id;
                leaf.ebx = id;
                leaf.ecx = 0;
            }
            _ => {}
        }
    }
    with_core_level(cpuid, id, vcpus, id_bits)
}

/// KVM since Linux 6.2 lists only the first level of a topology leaf that it has.
fn with_core_level(cpuid: CpuId, id: u32, vcpus: u32, id_bits: u32) -> CpuId {
    let mut leaves = cpuid.as_slice().to_vec();
    for function in [0xb, 0x1f] {
        let levels = leaves.iter().filter(|leaf| leaf.function == function).count();
        if levels == 1 {
            let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            let mut cores = kvm_cpuid_entry2 { function, index: 1, flags, ..Default::default() };
            topology(&mut cores, id, vcpus, id_bits);
            leaves.push(cores);
        }
    }
    // More than KVM takes are none: it has room for 256 and lists some forty.
    CpuId::from_entries(&leaves).unwrap_or(cpuid)
}

/// One thread a core, all cores in one package.
fn topology(leaf: &mut kvm_cpuid_entry2, id: u32, vcpus: u32, id_bits: u32) {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let (shift, count, kind) = match leaf.index {
        0 => (0, 1, THREADS),
        1 => (id_bits, vcpus, CORES),
        _ => (0, 0, 0),
    };
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (shift, count, kind | leaf.index, id);
}

/// A feature bit by its place.
struct Feature(u32, u32, Register, u32, &'static str);

#[derive(Clone, Copy, PartialEq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

/// What user programs choose their code by, named as /proc/cpuinfo names it.
const FEATURES: [Feature; 43] = [
    Feature(1, 0, Edx, 25, "sse"),
    Feature(1, 0, Edx, 26, "sse2"),
    Feature(1, 0, Ecx, 0, "sse3"),
    Feature(1, 0, Ecx, 1, "pclmulqdq"),
    Feature(1, 0, Ecx, 9, "ssse3"),
    Feature(1, 0, Ecx, 12, "fma"),
    Feature(1, 0, Ecx, 13, "cx16"),
    Feature(1, 0, Ecx, 19, "sse4_1"),
    Feature(1, 0, Ecx, 20, "sse4_2"),
    Feature(1, 0, Ecx, 22, "movbe"),
    Feature(1, 0, Ecx, 23, "popcnt"),
    Feature(1, 0, Ecx, 25, "aes"),
    Feature(1, 0, Ecx, 26, "xsave"),
    Feature(1, 0, Ecx, 28, "avx"),
    Feature(1, 0, Ecx, 29, "f16c"),
    Feature(1, 0, Ecx, 30, "rdrand"),
    Feature(7, 0, Ebx, 3, "bmi1"),
    Feature(7, 0, Ebx, 5, "avx2"),
    Feature(7, 0, Ebx, 8, "bmi2"),
    Feature(7, 0, Ebx, 9, "erms"),
    Feature(7, 0, Ebx, 16, "avx512f"),
    Feature(7, 0, Ebx, 17, "avx512dq"),
    Feature(7, 0, Ebx, 18, "rdseed"),
    Feature(7, 0, Ebx, 19, "adx"),
    Feature(7, 0, Ebx, 21, "avx512ifma"),
    Feature(7, 0, Ebx, 28, "avx512cd"),
    Feature(7, 0, Ebx, 29, "sha_ni"),
    Feature(7, 0, Ebx, 30, "avx512bw"),
    Feature(7, 0, Ebx, 31, "avx512vl"),
    Feature(7, 0, Ecx, 1, "avx512vbmi"),
    Feature(7, 0, Ecx, 6, "avx512_vbmi2"),
    Feature(7, 0, Ecx, 8, "gfni"),
    Feature(7, 0, Ecx, 9, "vaes"),
    Feature(7, 0, Ecx, 10, "vpclmulqdq"),
    Feature(7, 0, Ecx, 11, "avx512_vnni"),
    Feature(7, 0, Ecx, 12, "avx512_bitalg"),
    Feature(7, 0, Ecx, 14, "avx512_vpopcntdq"),
    Feature(7, 0, Edx, 23, "avx512_fp16"),
    Feature(7, 0, Edx, 24, "amx_tile"),
    Feature(7, 1, Eax, 4, "avx_vnni"),
    Feature(7, 1, Eax, 5, "avx512_bf16"),
    Feature(0x8000_0001, 0, Ecx, 5, "abm"),
    Feature(0x8000_0001, 0, Edx, 27, "rdtscp"),
];

/// A host's processor, as its guests see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCpu {
    /// Its maker, as CPUID spells it.
    pub vendor: String,
    /// Its features, as /proc/cpuinfo names them.
    pub features: Vec<&'static str>,
}

impl HostCpu {
    /// The processor that machines of this host are shown.
    pub fn of(hypervisor: &Hypervisor) -> Result<HostCpu, KvmError> {
        if hypervisor.kind() == KvmKind::Pvm {
            // There a guest's user programs execute CPUID natively: they see the host's bits, whatever KVM is told.
            return Ok(HostCpu::of_description(&first_processor()));
        }
        let supported = hypervisor.supported_cpuid()?;
        let leaves = supported.as_slice();
        Ok(HostCpu { vendor: vendor(leaves), features: features(leaves) })
    }

    fn of_description(text: &str) -> HostCpu {
        let value = |key: &str| {
            let line =
                text.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let flags: Vec<_> = value("flags").split(' ').collect();
        let names = FEATURES.iter().map(|feature| feature.4);
        // The kernel's old name for SSE3.
        let shown = |name: &&str| flags.contains(name) || *name == "sse3" && flags.contains(&"pni");
        HostCpu { vendor: value("vendor_id").to_owned(), features: names.filter(shown).collect() }
    }
}

/// What the kernel says of the first processor; all are alike.
fn first_processor() -> String {
    let Ok(file) = File::open("/proc/cpuinfo") else { return String::new() };
    let lines = BufReader::new(file.take(CPUINFO_MAX)).lines();
    lines
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .fold(String::new(), |text, line| text + &line + "\n")
}

/// Names of the features that these leaves show.
fn features(leaves: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    let shown = |Feature(function, index, register, bit, _): &&Feature| {
        leaves.iter().any(|leaf| {
            let value = match register {
                Eax => leaf.eax,
                Ebx => leaf.ebx,
                Ecx => leaf.ecx,
                Edx => leaf.edx,
            };
            leaf.function == *function && leaf.index == *index && value >> bit & 1 == 1
        })
    };
    FEATURES.iter().filter(shown).map(|feature| feature.4).collect()
}

/// The processor's maker, as leaf 0 spells it; empty when it is missing.
fn vendor(leaves: &[kvm_cpuid_entry2]) -> String {
    let spelled = |leaf: &kvm_cpuid_entry2| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    let bytes = leaves.iter().find(|leaf| leaf.function == 0).map(spelled).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    #[test]
    fn every_vcpu_knows_its_place() {
        let leaves = [leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0xb, 2)];
        let supported = CpuId::from_entries(&leaves).unwrap();
        let cpuid = for_vcpu(&supported, KvmKind::Hardware, 2, 3);
        let shown = cpuid.as_slice();
        assert_eq!((shown[0].ebx >> 24, shown[0].ebx >> 16 & 0xff), (2, 3));
        assert!(shown[0].edx & HYPER_THREADING != 0);
        assert_eq!(shown[0].ecx & (TSC_DEADLINE | HYPERVISOR), TSC_DEADLINE | HYPERVISOR);
        assert_eq!((shown[1].eax, shown[1].ebx, shown[1].ecx, shown[1].edx), (0, 1, 0x100, 2));
        assert_eq!((shown[2].eax, shown[2].ebx, shown[2].ecx, shown[2].edx), (2, 3, 0x201, 2));
        assert_eq!((shown[3].ebx, shown[3].ecx), (0, 2));
        let listed = CpuId::from_entries(&[leaf(0xb, 0)]).unwrap();
        assert_eq!(
            for_vcpu(&listed, KvmKind::Hardware, 2, 3).as_slice()[1].ebx,
            3,
            "the level of cores is added"
        );
        let alone = for_vcpu(&supported, KvmKind::Hardware, 0, 1);
        assert_eq!(alone.as_slice()[0].edx & HYPER_THREADING, 0);
    }

    #[test]
    fn asynchronous_page_faults_are_hidden() {
        let supported =
            CpuId::from_entries(&[kvm_cpuid_entry2 { eax: u32::MAX, ..leaf(KVM_FEATURES, 0) }]).unwrap();
        let shown = |kind| for_vcpu(&supported, kind, 0, 1).as_slice()[0].eax;
        assert_eq!(shown(KvmKind::Hardware), !ASYNC_PAGE_FAULTS);
        assert_eq!(shown(KvmKind::Pvm), !(ASYNC_PAGE_FAULTS | pvm::HYPERCALLS));
    }

    #[test]
    fn the_kernel_s_description_is_understood() {
        let cpu = HostCpu::of_description(
            "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 pni avx2\nbugs\t: none\n",
        );
        assert_eq!((cpu.vendor.as_str(), cpu.features), ("AuthenticAMD", vec!["sse2", "sse3", "avx2"]));
        let here = HostCpu::of_description(&first_processor());
        assert!(!here.vendor.is_empty() && here.features.contains(&"sse2"), "{here:?}");
    }

    #[test]
    fn features_have_names() {
        let mut leaves = [leaf(1, 0), leaf(7, 0)];
        leaves[0].ecx = 1 << 28;
        leaves[1].ebx = 1 << 5;
        assert_eq!(features(&leaves), ["avx", "avx2"]);
        assert!(features(&[]).is_empty());
    }
}
