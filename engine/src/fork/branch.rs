//! One branching, from the child that the user named to the report on its branches. Its supervisor does it; the branches
//! are asked from here.

use crate::chain::chain;
use crate::fork::ask::{ChildReply, ChildRequest, ask_one};
use crate::fork::children::ChildrenError;
use crate::fork::supervisor::milliseconds_since;
use crate::fork::variables::Variables;
use crate::local::branches::{BranchRequest, BranchedChild};
use crate::local::paths::Paths;
use crate::local::run_dir::ForkDir;
use crate::progress::{Amount, Progress};
use forkd_vmm::process::monotonic_ns;
use serde::Serialize;

/// What is to be branched, and what its branches are asked.
#[derive(Debug)]
pub struct Branching {
    /// The child.
    pub child: String,
    /// How many branches.
    pub count: u32,
    /// Their environments, beyond what they have from the child.
    pub variables: Variables,
    /// What each branch is asked.
    pub request: ChildRequest,
    /// When the caller began, CLOCK_MONOTONIC, ns: the report's times count from then.
    pub started_ns: u64,
}

/// What came of it. Its JSON form is a contract of `forkd branch --json`.
#[derive(Debug, Serialize)]
pub struct BranchReport {
    /// The child that was branched.
    pub parent: String,
    /// How long it stood still, ms.
    pub pause_ms: f64,
    /// Memory that its branches share with each other and not with the image, bytes.
    pub copied_bytes: u64,
    /// In how many ranges that lies.
    pub ranges: u64,
    /// The branches.
    pub children: Vec<BranchOutcome>,
}

/// One branch. Times are ms from the start of the caller.
#[derive(Debug, Serialize)]
pub struct BranchOutcome {
    /// Its name.
    pub id: String,
    /// Process id of its machine.
    pub pid: i32,
    /// Its first instruction.
    pub first_instruction_ms: Option<f64>,
    /// It was unique and ready for requests.
    pub ready_ms: Option<f64>,
    /// It had answered.
    pub answered_ms: Option<f64>,
    /// What it answered: what was printed, and the value.
    pub answer: Option<String>,
    /// The value alone, of code.
    pub value: Option<String>,
    /// Exit code of a program.
    pub exit_code: Option<i32>,
    /// Why there is no answer, or why the code failed.
    pub error: Option<String>,
}

impl BranchReport {
    /// Whether a branch failed, or what it was asked.
    pub fn has_failures(&self) -> bool {
        let failed =
            |child: &BranchOutcome| child.error.is_some() || child.exit_code.is_some_and(|code| code != 0);
        self.children.iter().any(failed)
    }
}

/// Branches, and asks each branch.
///
/// # Errors
/// [`ChildrenError`] as its variants say.
pub fn branch(
    paths: &Paths,
    branching: &Branching,
    progress: &dyn Progress,
) -> Result<BranchReport, ChildrenError> {
    let Branching { child, count, variables, request, started_ns } = branching;
    let fork = ForkDir::of_child(paths, child)?;
    let environments = (1..=u64::from(*count)).map(|number| variables.of_child(number)).collect();
    let task = progress.begin("branches", Amount::Steps(u64::from(*count)));
    let branched = fork.branch(&BranchRequest { child: child.clone(), environments })?;
    let children = std::thread::scope(|scope| {
        let fork = &fork;
        let ask = |branch| scope.spawn(move || outcome(fork, branch, request, *started_ns));
        let asking: Vec<_> = branched.branches.into_iter().map(ask).collect();
        let answers = asking.into_iter().zip(1..).map(|(asked, number)| {
            let outcome = asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            task.to(number);
            outcome
        });
        answers.collect()
    });
    let (parent, pause_ms) = (child.clone(), branched.pause_ms);
    Ok(BranchReport {
        parent,
        pause_ms,
        copied_bytes: branched.copied_bytes,
        ranges: branched.ranges,
        children,
    })
}

fn outcome(fork: &ForkDir, branch: BranchedChild, request: &ChildRequest, started_ns: u64) -> BranchOutcome {
    let since = |at: Option<u64>| at.map(|at| milliseconds_since(started_ns, at));
    let BranchedChild { id, pid, first_instruction_ns, ready_ns, error } = branch;
    let asked = match error {
        Some(error) => Err(error),
        None if ready_ns.is_none() => Err("it was not ready in time".to_owned()),
        None => ask_one(&fork.socket(&id), request).map_err(|error| chain(&error)),
    };
    let answered_ns = asked.is_ok().then(monotonic_ns);
    let (reply, error) = match asked {
        Ok(reply) => (reply, None),
        Err(error) => (ChildReply::default(), Some(error)),
    };
    BranchOutcome {
        id,
        pid,
        first_instruction_ms: since(first_instruction_ns),
        ready_ms: since(ready_ns),
        answered_ms: since(answered_ns),
        answer: reply.answer,
        value: reply.value,
        exit_code: reply.exit_code,
        error: error.or(reply.error),
    }
}
