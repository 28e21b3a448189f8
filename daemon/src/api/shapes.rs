//! The JSON of sandboxes.

use crate::sandboxes::{FoundSandbox, MarkedFork};
use forkd_engine::local::run_dir::ChildStatus;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// A sandbox: one copy of a machine.
#[derive(Debug, Serialize, ToSchema)]
pub struct Sandbox {
    /// Its name.
    pub id: String,
    /// Where it stands: starting, running, stalled, ready, paused.
    pub state: &'static str,
    /// What it was made from, as it was named.
    pub image: String,
    /// What that was then: owner/name@version for a package of the hub.
    pub forked_from: Option<String>,
    /// When it was asked for, seconds since 1970.
    pub created_unix: u64,
    /// Milliseconds until its time is over; null without an end.
    pub expires_in_ms: Option<u64>,
    /// What its maker noted.
    pub metadata: BTreeMap<String, String>,
    /// The sandbox that it was branched from.
    pub parent: Option<String>,
    /// Its addresses, if it has a network.
    pub network: Option<Addresses>,
    /// Why it stalls, or was paused.
    pub error: Option<String>,
    /// From the request to its first instruction, ms; only in the answer to that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_instruction_ms: Option<f64>,
    /// From the request until it was ready, ms; only in the answer to that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_ms: Option<f64>,
}

/// Addresses of a sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub struct Addresses {
    /// Its Ethernet address.
    pub mac: String,
    /// Its IPv4 address.
    pub address: String,
    /// The other end.
    pub host_address: String,
}

impl Sandbox {
    /// One of a fork.
    pub fn of(fork: &MarkedFork, child: &ChildStatus) -> Sandbox {
        let network = child.network.as_ref().map(|network| Addresses {
            mac: network.mac.clone(),
            address: network.address.to_string(),
            host_address: network.host_address.to_string(),
        });
        Sandbox {
            id: child.id.clone(),
            state: child.state.name(),
            image: fork.status.pack.clone(),
            forked_from: fork.status.forked_from.clone(),
            created_unix: fork.mark.created_unix,
            expires_in_ms: child.expires_in_ms,
            metadata: fork.mark.metadata.clone(),
            parent: child.parent.clone(),
            network,
            error: child.error.clone(),
            first_instruction_ms: None,
            ready_ms: None,
        }
    }

    /// One that was found.
    pub fn found(found: &FoundSandbox) -> Sandbox {
        Sandbox::of(&found.fork, &found.child)
    }
}

/// What is done with a sandbox whose time is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is ended.
    #[default]
    Kill,
    /// It is paused.
    Pause,
}

impl From<OnTimeout> for forkd_engine::local::lifetime::OnTimeout {
    fn from(then: OnTimeout) -> Self {
        match then {
            OnTimeout::Kill => Self::Kill,
            OnTimeout::Pause => Self::Pause,
        }
    }
}
