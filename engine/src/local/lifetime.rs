//! How long a child may live. What its fork is told of it comes over the control socket (`run_dir.rs`), too.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long a child may live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// From its start, or from when it was told so.
    pub time: Duration,
    /// What is done then.
    pub then: OnTimeout,
}

/// What is done with a child whose time is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is killed.
    #[default]
    Kill,
    /// It is paused.
    Pause,
}
