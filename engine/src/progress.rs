//! How long work tells its caller how far it is. A leaf: everything may call it.

use std::time::Duration;

/// How often a task's state is passed on while something else is waited for.
const INTERVAL: Duration = Duration::from_millis(100);

/// Takes part in long work by showing it, or not.
pub trait Progress: Send + Sync {
    /// Work called `what` begins; it ends when the returned task is dropped.
    fn begin(&self, what: &str, amount: Amount) -> Box<dyn Task>;
    /// Something that whoever waits should know, as one line.
    fn note(&self, line: &str);
}

/// How much work there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So many bytes.
    Bytes(u64),
    /// So many steps of one kind: files, children.
    Steps(u64),
    /// Nobody knows.
    Unknown,
}

/// Work under way.
pub trait Task: Send + Sync {
    /// So much is done, in the unit of its [`Amount`].
    fn to(&self, done: u64);
    /// There is so much to do, which is only known now.
    fn limit(&self, total: u64);
    /// It is to be called something else.
    fn say(&self, what: &str);
}

/// Waits for `work` and tells `task` meanwhile what `done` says.
pub async fn follow<T>(task: &dyn Task, work: impl Future<Output = T>, done: impl Fn() -> u64) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        match tokio::time::timeout(INTERVAL, &mut work).await {
            Ok(result) => return result,
            Err(_) => task.to(done()),
        }
    }
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: Amount) -> Box<dyn Task> {
        // A box of nothing allocates nothing.
        Box::new(Silent)
    }

    fn note(&self, _: &str) {}
}

impl Task for Silent {
    fn to(&self, _: u64) {}
    fn limit(&self, _: u64) {}
    fn say(&self, _: &str) {}
}
