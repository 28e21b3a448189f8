//! Whether this host's processor can go on with a snapshot, which was warmed on another: programs in it chose their code by
//! what CPUID showed them.

use forkd_fs::manifest::Requires;
use forkd_vmm::cpuid::HostCpu;
use forkd_vmm::kvm::{Hypervisor, KvmError, KvmKind};

/// The host cannot run the snapshot.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Features that the guest may be using.
    #[error("this host's CPU lacks what the snapshot needs: {}", missing.join(" "))]
    Features {
        /// Their names.
        missing: Vec<String>,
    },
    /// Another maker: registers and errata differ in ways no feature bit tells.
    #[error("the snapshot was made on a {needs} CPU, and this host has {has}")]
    Vendor {
        /// The snapshot's.
        needs: String,
        /// The host's.
        has: String,
    },
}

/// The processor that this host's machines see.
pub fn cpu() -> Result<HostCpu, KvmError> {
    HostCpu::of(&Hypervisor::open(KvmKind::detect())?)
}

/// Refuses a snapshot that this host's processor cannot go on with, by name.
pub fn check_cpu(requires: &Requires) -> Result<(), HostError> {
    if requires.cpu_features.is_empty() && requires.cpu_vendor.is_empty() {
        Ok(())
    } else {
        compare(requires, &cpu()?)
    }
}

fn compare(requires: &Requires, host: &HostCpu) -> Result<(), HostError> {
    if !requires.cpu_vendor.is_empty() && requires.cpu_vendor != host.vendor {
        return Err(HostError::Vendor { needs: requires.cpu_vendor.clone(), has: host.vendor.clone() });
    }
    let lacking = requires.cpu_features.iter().filter(|name| !host.features.contains(&name.as_str()));
    let missing: Vec<_> = lacking.cloned().collect();
    if missing.is_empty() { Ok(()) } else { Err(HostError::Features { missing }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forkd_fs::manifest::KvmKind;

    fn requires(vendor: &str, features: &[&str]) -> Requires {
        Requires {
            memory_mib: 1,
            vcpus: 1,
            kvm_kind: KvmKind::Hardware,
            kernel: String::new(),
            vmstate_version: 2,
            cpu_features: features.iter().map(|name| (*name).to_owned()).collect(),
            cpu_vendor: vendor.to_owned(),
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let host = HostCpu { vendor: "GenuineIntel".to_owned(), features: vec!["sse2", "avx"] };
        assert!(compare(&requires("GenuineIntel", &["avx"]), &host).is_ok());
        assert!(compare(&requires("", &[]), &host).is_ok());
        let error = compare(&requires("GenuineIntel", &["sse2", "avx2", "amx_tile"]), &host).unwrap_err();
        assert!(error.to_string().ends_with(": avx2 amx_tile"), "{error}");
        assert!(matches!(
            compare(&requires("AuthenticAMD", &["sse2"]), &host),
            Err(HostError::Vendor { .. })
        ));
    }
}
