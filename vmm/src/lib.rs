//! forkd's KVM monitor.
//!
//! Lower half of forkd: it maps lazily filled guest memory, builds and restores machines, and runs each in a
//! process of its own. It knows nothing of packs or HTTP: whoever forks a machine supplies a [`pager::PageSource`].
#![deny(unsafe_code)]

pub mod acpi;
pub mod arch;
pub mod boot;
pub mod cgroup;
pub mod channel;
pub mod cpuid;
pub mod devices;
pub mod jail;
#[allow(unsafe_code)]
pub mod kvm;
pub mod machine;
#[allow(unsafe_code)]
pub mod memory;
pub mod pager;
pub mod process;
pub mod pvm;
#[allow(unsafe_code)]
pub mod sys;
#[allow(unsafe_code)]
pub mod uffd;
pub mod vcpu;
mod vcpu_loop;
pub mod vmstate;
pub mod zygote;
