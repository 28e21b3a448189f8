//! What came of a fork. Its JSON form is a contract of `forkd fork --json`.

use crate::fork::ask::ChildOutcome;
use crate::fork::supervisor::{Child, Milestone, Supervisor, milliseconds_since};
use crate::fork::template::{FaultFigures, PrefetchFigures, Template};
use crate::fork::warm::WarmStatus;
use crate::local::run_dir::PublishedPort;
use crate::network::wire::{KeptNetwork, NetworkStatus};
use crate::picture::timeline::{ChildMarks, EventRecorder, Phase, Span, TimelineScene};
use forkd_vmm::memory::PAGE_BYTES;
use rustix::fd::BorrowedFd;
use serde::Serialize;

/// The whole report.
#[derive(Debug, Serialize)]
pub struct ForkReport {
    /// The pack.
    pub pack: ForkedPackReport,
    /// When the parts that every child needs were there, ms from process start.
    pub timeline: ForkTimeline,
    /// The children.
    pub children: Vec<ChildReport>,
    /// Bytes of the pack that had been fetched when the first child reached each point.
    pub fetched: FetchedBytes,
    /// Memory while all children were alive.
    pub memory: MemoryReport,
    /// Faults that children had to wait for.
    pub faults: FaultReport,
    /// What was fetched ahead of need.
    pub prefetch: PrefetchReport,
}

/// The pack, and what it cost.
#[derive(Debug, Serialize)]
pub struct ForkedPackReport {
    /// Reference, path or tag.
    pub name: String,
    /// Size of the pack; 0 for a local snapshot.
    pub bytes_total: u64,
    /// Bytes fetched when the report was made.
    pub bytes_fetched: u64,
    /// Requests made until then.
    pub requests: u64,
    /// The image in memory that was used instead of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm: Option<WarmReport>,
}

/// An image that `forkd warm` holds.
#[derive(Debug, Serialize)]
pub struct WarmReport {
    /// What it was loaded from: owner/name@version, path or tag.
    pub resolved: String,
    /// When, seconds since 1970.
    pub since_unix: u64,
}

impl From<WarmStatus> for WarmReport {
    fn from(WarmStatus { resolved, since_unix, .. }: WarmStatus) -> WarmReport {
        WarmReport { resolved, since_unix }
    }
}

impl ForkedPackReport {
    /// Of a fork of `template` so far.
    pub fn of(name: String, template: &Template, warm: Option<WarmReport>) -> ForkedPackReport {
        let progress = template.progress();
        ForkedPackReport {
            name,
            bytes_total: progress.bytes_total,
            bytes_fetched: progress.bytes_fetched,
            requests: progress.requests,
            warm,
        }
    }
}

/// Milliseconds from process start.
#[derive(Debug, Default, Serialize)]
pub struct ForkTimeline {
    /// The registry was read.
    pub registry_ms: Option<f64>,
    /// The pack's index was verified.
    pub index_ms: Option<f64>,
    /// The machine's state was there.
    pub vmstate_ms: Option<f64>,
}

/// One child. Times are milliseconds from process start.
#[derive(Debug, Serialize)]
pub struct ChildReport {
    /// Its name.
    pub id: String,
    /// Process id.
    pub pid: i32,
    /// It executed the instruction after the snapshot.
    pub first_instruction_ms: Option<f64>,
    /// It was unique and ready.
    pub ready_ms: Option<f64>,
    /// Its answer was here.
    pub answered_ms: Option<f64>,
    /// What it answered.
    pub answer: Option<String>,
    /// Exit code of an `--exec`.
    pub exit_code: Option<i32>,
    /// Why there is no answer.
    pub error: Option<String>,
    /// Its network, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStatus>,
    /// Its published ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishedPort>,
}

/// Bytes fetched.
#[derive(Debug, Serialize)]
pub struct FetchedBytes {
    /// At the first child's first instruction.
    pub at_first_instruction: Option<u64>,
    /// When the first child was ready.
    pub at_ready: Option<u64>,
    /// When the first answer was here.
    pub at_answered: Option<u64>,
}

/// Faults that children had to wait for.
#[derive(Debug, Serialize)]
pub struct FaultReport {
    /// All of them.
    pub demand: u64,
    /// Chunks that were loaded for them.
    pub demand_chunks: u64,
    /// Those on a page that the trace names, which came too late.
    pub on_traced_pages: u64,
    /// Those in a chunk that the trace touches.
    pub in_traced_chunks: u64,
}

/// The working set's pages that were fetched ahead of need (`hotset`).
#[derive(Debug, Serialize)]
pub struct PrefetchReport {
    /// How many.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How many of them any of the children has mapped: at least those that were touched. Null when none was looked at.
    pub touched_pages: Option<u64>,
    /// Their bytes.
    pub touched_bytes: Option<u64>,
    /// Children that were looked at, the first ones.
    pub children: usize,
}

impl FaultReport {
    /// Of a fork so far.
    pub fn of(template: &Template) -> FaultReport {
        let FaultFigures { demand, on_traced_pages, in_traced_chunks } = template.fault_figures();
        let demand_chunks = template.pager_stats().demand_chunks;
        FaultReport { demand, demand_chunks, on_traced_pages, in_traced_chunks }
    }
}

impl PrefetchReport {
    /// Looks at the processes `pids`.
    pub fn measure(template: &Template, pids: &[i32]) -> PrefetchReport {
        let PrefetchFigures { pages, touched, children } = template.prefetch_figures(pids);
        let touched_bytes = touched.map(|pages| pages * PAGE_BYTES);
        PrefetchReport { pages, bytes: pages * PAGE_BYTES, touched_pages: touched, touched_bytes, children }
    }
}

/// Memory, KiB.
#[derive(Debug, Serialize)]
pub struct MemoryReport {
    /// Mean proportional set size of a child (`smaps_rollup`); its share of the image is in it.
    pub pss_kib_per_child: Option<u64>,
    /// Mean memory of a child that it has written: `Anonymous` of `smaps_rollup`. These are pages in memory of its process's
    /// heap and stacks, of zero ranges of the guest's memory, and its copies of pages of images; a huge page counts whole.
    /// So do those that its zygote had written before it forked the child, half a MiB that all children share: with many of
    /// them this is more than the PSS has of it. Not counted are pages of images and programs that it has only read, though
    /// nobody else may map them, zero ranges that it has only read (the kernel's zero page), hugetlbfs, and what is swapped
    /// out, which is not in the PSS either.
    pub private_kib_per_child: Option<u64>,
    /// What the shared images take.
    pub image_kib: u64,
}

impl MemoryReport {
    /// Looks at the processes `pids` and the image files.
    pub fn measure(pids: &[i32], images: &[BorrowedFd<'_>]) -> MemoryReport {
        let rollups: Vec<_> = pids
            .iter()
            .filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok())
            .collect();
        let blocks =
            images.iter().filter_map(|image| rustix::fs::fstat(image).ok()).map(|stat| stat.st_blocks as u64);
        // st_blocks counts 512 bytes.
        MemoryReport::of(&rollups, blocks.sum::<u64>() / 2)
    }

    fn of(rollups: &[String], image_kib: u64) -> MemoryReport {
        let mean = |field: &str| {
            let sum: u64 = rollups.iter().map(|text| kib(text, field)).sum();
            sum.checked_div(rollups.len() as u64)
        };
        MemoryReport { pss_kib_per_child: mean("Pss:"), private_kib_per_child: mean("Anonymous:"), image_kib }
    }
}

fn kib(rollup: &str, field: &str) -> u64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

impl ForkReport {
    /// Of the children as they are now, and what came of what they were asked, in the same order.
    pub fn new(
        supervisor: &Supervisor,
        pack: ForkedPackReport,
        started_ns: u64,
        timeline: ForkTimeline,
        outcomes: Vec<ChildOutcome>,
        look_at_prefetched: bool,
    ) -> ForkReport {
        let since = |moment: &Milestone| milliseconds_since(started_ns, moment.at_ns);
        let children = supervisor.children();
        let pids: Vec<_> =
            children.iter().filter(|child| !child.state.is_over()).map(|child| child.pid).collect();
        let earliest = |moments: &mut dyn Iterator<Item = Milestone>| {
            moments.min_by_key(|moment| moment.at_ns).map(|moment| moment.fetched)
        };
        let fetched = FetchedBytes {
            at_first_instruction: earliest(&mut children.iter().filter_map(|child| child.first_instruction)),
            at_ready: earliest(&mut children.iter().filter_map(|child| child.ready)),
            at_answered: earliest(
                &mut outcomes.iter().filter(|outcome| outcome.error.is_none()).map(|o| o.at),
            ),
        };
        let shown = |(child, outcome): (&Child, ChildOutcome)| ChildReport {
            id: child.id.clone(),
            pid: child.pid,
            first_instruction_ms: child.first_instruction.as_ref().map(since),
            ready_ms: child.ready.as_ref().map(since),
            answered_ms: outcome.error.is_none().then(|| since(&outcome.at)),
            answer: outcome.answer,
            exit_code: outcome.exit_code,
            error: outcome.error,
            network: child.network.as_ref().map(KeptNetwork::status),
            ports: child.ports.clone(),
        };
        ForkReport {
            pack,
            timeline,
            fetched,
            memory: MemoryReport::measure(&pids, &supervisor.template().images()),
            faults: FaultReport::of(supervisor.template()),
            prefetch: PrefetchReport::measure(
                supervisor.template(),
                if look_at_prefetched { &pids } else { &[] },
            ),
            children: children.iter().zip(outcomes).map(shown).collect(),
        }
    }

    /// As a picture, with what was recorded on the way.
    pub fn scene(&self, recorder: &EventRecorder) -> TimelineScene {
        let stages = [
            ("registry", self.timeline.registry_ms),
            ("index", self.timeline.index_ms),
            ("machine state", self.timeline.vmstate_ms),
        ];
        let mut from = 0.0;
        let phases = stages.into_iter().filter_map(|(name, until)| {
            let span = Span { from, until: until? };
            from = span.until;
            Some(Phase { name, span })
        });
        let marks = |child: &ChildReport| ChildMarks {
            id: child.id.clone(),
            first_instruction: child.first_instruction_ms,
            ready: child.ready_ms,
            answered: child.answered_ms,
        };
        TimelineScene {
            name: self.pack.name.clone(),
            phases: phases.collect(),
            events: recorder.events(),
            children: self.children.iter().map(marks).collect(),
        }
    }

    /// Whether any child failed, or ended with an exit code other than 0.
    pub fn has_failures(&self) -> bool {
        self.children.iter().any(|child| child.error.is_some() || child.exit_code.unwrap_or(0) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_is_what_was_written_and_not_what_is_mapped_alone() {
        // A single fork of a snapshot on this disk: nobody else maps the image pages that it has read.
        let rollup = "55d0c0000000-7ffd3f5f7000 ---p 00000000 00:00 0                          [rollup]\n\
            Rss:               33276 kB\nPss:               31704 kB\nPss_Anon:           1436 kB\n\
            Shared_Clean:       1960 kB\nShared_Dirty:          0 kB\nPrivate_Clean:     29880 kB\n\
            Private_Dirty:      1436 kB\nReferenced:        33276 kB\nAnonymous:          1436 kB\n\
            AnonHugePages:         0 kB\nSwap:                 12 kB\nSwapPss:              12 kB\n";
        let alone = MemoryReport::of(&[rollup.to_owned()], 5);
        assert_eq!((alone.pss_kib_per_child, alone.private_kib_per_child), (Some(31704), Some(1436)));
        let two = MemoryReport::of(
            &[rollup.to_owned(), rollup.replace("Anonymous:          1436", "Anonymous: 1438")],
            5,
        );
        assert_eq!((two.private_kib_per_child, two.image_kib), (Some(1437), 5));
        assert_eq!(MemoryReport::of(&[], 0).private_kib_per_child, None);
    }
}
