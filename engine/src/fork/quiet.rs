//! A caller for those who only want the report of a fork.

use crate::fork::run::ForkCaller;
use std::io;
use std::sync::OnceLock;
use tokio::runtime::{Handle, Runtime};

/// Shows nothing, and has a runtime of its own, which starts when a fork asks for it.
#[derive(Debug, Default)]
pub struct QuietCaller {
    runtime: OnceLock<Runtime>,
}

impl ForkCaller for QuietCaller {
    fn runtime(&self) -> io::Result<Handle> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime.handle().clone());
        }
        let runtime = Runtime::new()?;
        Ok(self.runtime.get_or_init(|| runtime).handle().clone())
    }
}
