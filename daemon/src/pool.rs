//! Supervisors that wait ready, so that a fork is one message: their processes are started and their zygotes are in the
//! jail.

use crate::order::{ForkAnswer, ForkOrder};
use crate::supervise::ROLE;
use forkd_engine::local::daemon::OnExit;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

/// Longest answer of a supervisor, bytes.
const ANSWER_MAX: u64 = 4 << 20;

/// A fork could not be had of a supervisor.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Its process.
    #[error("a supervisor cannot be started")]
    Start(#[source] io::Error),
    /// The order.
    #[error("the supervisor cannot be told what to fork")]
    Order(#[source] io::Error),
    /// It is gone.
    #[error("the supervisor ended without an answer")]
    Gone,
    /// It answers nonsense.
    #[error("the supervisor cannot be understood")]
    Malformed(#[source] serde_json::Error),
}

/// See the module's description.
pub struct Pool {
    ready: Mutex<VecDeque<ReadySupervisor>>,
    wanted: usize,
    program: PathBuf,
}

struct ReadySupervisor {
    process: Child,
    stream: UnixStream,
}

impl Pool {
    /// One that keeps so many ready. To be called in a runtime.
    pub fn start(wanted: usize) -> io::Result<Arc<Pool>> {
        let program = std::env::current_exe()?;
        let pool = Arc::new(Pool { ready: Mutex::default(), wanted, program });
        pool.fill();
        Ok(pool)
    }

    /// Has a supervisor fork.
    ///
    /// # Errors
    /// [`PoolError`] as its variants say.
    pub async fn fork(self: &Arc<Pool>, order: &ForkOrder) -> Result<ForkAnswer, PoolError> {
        let mut supervisor = self.take().map_err(PoolError::Start)?;
        let mut line = serde_json::to_vec(order).map_err(PoolError::Malformed)?;
        line.push(b'\n');
        if supervisor.stream.write_all(&line).await.is_err() {
            // Somebody ended it while it waited.
            supervisor = self.new_supervisor().map_err(PoolError::Start)?;
            supervisor.stream.write_all(&line).await.map_err(PoolError::Order)?;
        }
        let answer = read_answer(&mut supervisor.stream).await;
        self.let_go(supervisor, order.on_exit);
        // Not before: a new supervisor's start would be in the way of the children's.
        self.fill();
        answer
    }

    fn take(&self) -> io::Result<ReadySupervisor> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        ready.map_or_else(|| self.new_supervisor(), Ok)
    }

    /// Has as many ready again as are wanted.
    fn fill(&self) {
        loop {
            let count = self.ready.lock().unwrap_or_else(PoisonError::into_inner).len();
            if count >= self.wanted {
                return;
            }
            match self.new_supervisor() {
                Ok(supervisor) => {
                    self.ready.lock().unwrap_or_else(PoisonError::into_inner).push_back(supervisor);
                }
                Err(error) => {
                    tracing::warn!(%error, "no supervisor can be had ready");
                    return;
                }
            }
        }
    }

    fn new_supervisor(&self) -> io::Result<ReadySupervisor> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let process = Command::new(&self.program)
            .arg(ROLE)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(ReadySupervisor { process, stream: UnixStream::from_std(ours)? })
    }

    /// It goes by itself; this process only has to hear of it.
    fn let_go(&self, supervisor: ReadySupervisor, on_exit: OnExit) {
        let ReadySupervisor { mut process, stream } = supervisor;
        // Its end is what tells a supervisor that the daemon's has come.
        let held = (on_exit == OnExit::End).then_some(stream);
        tokio::spawn(async move {
            let _held = held;
            match process.wait().await {
                Ok(status) if status.success() => {}
                Ok(status) => tracing::warn!(%status, "a supervisor has failed"),
                Err(error) => tracing::warn!(%error, "a supervisor's end cannot be waited for"),
            }
        });
    }
}

async fn read_answer(stream: &mut UnixStream) -> Result<ForkAnswer, PoolError> {
    let mut line = Vec::new();
    let read = BufReader::new(stream.take(ANSWER_MAX)).read_until(b'\n', &mut line).await;
    match read {
        Ok(_) if line.last() == Some(&b'\n') => serde_json::from_slice(&line).map_err(PoolError::Malformed),
        Ok(_) | Err(_) => Err(PoolError::Gone),
    }
}
