//! What the children of a fork are to be.

use super::error::StartError;
use crate::fork::forward::ports::PortMap;
use crate::fork::variables::Variables;
use crate::local::lifetime::Lifetime;
use crate::network::wire::NetworkMode;
use forkd_vmm::cgroup::Limits;
use forkd_vmm::memory::MemoryLayout;
use forkd_vmm::zygote::Zygote;
use std::collections::BTreeMap;
use std::time::Instant;

/// What the children of a fork are to be.
#[derive(Debug)]
pub struct ChildrenSpec {
    /// How many.
    pub count: u32,
    /// Their environments.
    pub variables: Variables,
    /// Their networks.
    pub network: NetworkMode,
    /// What each may take of the host.
    pub limits: ResourceLimits,
    /// Their ports that the fork forwards.
    pub publish: Vec<PortMap>,
    /// How long each may live, if there is an end to it.
    pub lifetime: Option<Lifetime>,
    /// Whether other processes of this user can list and end them.
    pub reachable: bool,
    /// What whoever has them forked notes of them, for those who find them.
    pub labels: BTreeMap<String, String>,
}

/// One child, without anything of its own.
impl Default for ChildrenSpec {
    fn default() -> ChildrenSpec {
        let (variables, network) = (Variables::default(), NetworkMode::None);
        ChildrenSpec {
            count: 1,
            variables,
            network,
            limits: ResourceLimits::default(),
            publish: Vec::new(),
            lifetime: None,
            reachable: true,
            labels: BTreeMap::new(),
        }
    }
}

/// What is left of a child's time.
#[derive(Debug)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    pub(super) lifetime: Lifetime,
}

impl Deadline {
    pub(super) fn of(lifetime: Option<Lifetime>) -> Option<Deadline> {
        let lifetime = lifetime?;
        // A time that long is none.
        Some(Deadline { at: Instant::now().checked_add(lifetime.time)?, lifetime })
    }
}

/// What each child may take of the host, where that was asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct ResourceLimits {
    /// Memory, MiB; otherwise what its guest was promised, and a little more.
    pub memory_mib: Option<u64>,
    /// Processors; otherwise as many as it can get.
    pub cpus: Option<f64>,
}

impl ResourceLimits {
    /// Nobody is to believe in a limit that is not there.
    pub(super) fn check(&self, zygote: &Zygote) -> Result<(), StartError> {
        let controllers = zygote.cgroups().map_or(&[][..], |cgroups| &cgroups.controllers);
        let asked =
            [(self.memory_mib.is_some(), "memory", "memory"), (self.cpus.is_some(), "processors", "cpu")];
        for (asked, resource, controller) in asked {
            if asked && !controllers.contains(&controller) {
                return Err(StartError::NoLimit { resource, controller });
            }
        }
        Ok(())
    }

    pub(super) fn limits(&self, id: &str, layout: &MemoryLayout) -> Limits {
        let limits = Limits::of(id.to_owned(), layout);
        let memory_bytes = self.memory_mib.map_or(limits.memory_bytes, |mib| mib << 20);
        Limits { memory_bytes, cpus: self.cpus, ..limits }
    }
}
