//! `forkd fork --timeline`: from a fork's report and what was recorded to the picture's file. Callers: `fork.rs`.

use super::fork_report::{ChildReport, ForkReport};
use forkd_engine::chain::chain;
use forkd_engine::picture::timeline::{ChildMarks, Phase, Recorder, Scene, Span};
use std::path::Path;

/// Draws the picture when one is wanted. Children that run are not ended because it cannot be written: that is said,
/// and `false` returned.
pub(super) fn draw(file: Option<&Path>, recorder: Option<&Recorder>, report: &ForkReport) -> bool {
    let (Some(file), Some(recorder)) = (file, recorder) else { return true };
    let written = scene(recorder, report).draw().write(file);
    if let Err(error) = &written {
        tracing::error!(error = chain(error), "the timeline cannot be written");
    }
    written.is_ok()
}

fn scene(recorder: &Recorder, report: &ForkReport) -> Scene {
    let stages = [
        ("registry", report.timeline.registry_ms),
        ("index", report.timeline.index_ms),
        ("machine state", report.timeline.vmstate_ms),
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
    Scene {
        name: report.pack.name.clone(),
        phases: phases.collect(),
        events: recorder.events(),
        children: report.children.iter().map(marks).collect(),
    }
}
