//! The picture of a [`super::Recorder`]'s events and of the children's moments. Pure: it gets numbers and makes
//! shapes.

use super::{RecordedEvents, Span};
use crate::picture::sizes::show_size;
use crate::picture::svg::{Anchor, Bar, LegendEntry, PALE, Picture};
use forkd_fs::source::Priority;

/// Children that are drawn.
const CHILDREN_MAX: usize = 32;
/// Where the time axis begins and how long it is.
const LEFT: f64 = 170.0;
const LENGTH: f64 = 1000.0;
const LANE: f64 = 9.0;
const GAP: f64 = 2.0;

const PHASE: &str = "#4e79a7";
const DEMAND: &str = "#e15759";
const PREFETCH: &str = "#76b7b2";
const DECODING: &str = "#b07aa1";
const FAULT: &str = "#f28e2b";
const STARTING: &str = "#bab0ac";
const RUNNING: &str = "#edc948";
const ANSWERING: &str = "#59a14f";

/// A part of a fork that every child needs.
#[derive(Debug, Clone, Copy)]
pub struct Phase {
    /// What it is.
    pub name: &'static str,
    /// When it was under way.
    pub span: Span,
}

/// One child's moments, milliseconds from the start of the process.
#[derive(Debug, Clone)]
pub struct ChildMarks {
    /// Its name.
    pub id: String,
    /// Its first instruction.
    pub first_instruction: Option<f64>,
    /// When it was ready.
    pub ready: Option<f64>,
    /// When its answer was here; `None` also when nothing was asked.
    pub answered: Option<f64>,
}

/// Everything in the picture of one fork.
#[derive(Debug, Clone)]
pub struct TimelineScene {
    /// What was forked.
    pub name: String,
    /// Phases in their order.
    pub phases: Vec<Phase>,
    /// What was recorded.
    pub events: RecordedEvents,
    /// The children.
    pub children: Vec<ChildMarks>,
}

/// A bar in a group of lanes.
struct Item {
    span: Span,
    colour: &'static str,
    tip: String,
}

/// Draws below what is there already.
struct Canvas {
    picture: Picture,
    scale: f64,
    y: f64,
}

impl TimelineScene {
    /// The picture.
    pub fn draw(&self) -> Picture {
        let mut canvas = Canvas { picture: Picture::new(), scale: LENGTH / self.end(), y: 24.0 };
        let title = format!("forkd fork {}, {} children", self.name, self.children.len());
        canvas.line(16, &title);
        for line in self.summary() {
            canvas.line(12, &line);
        }
        let top = canvas.y + 6.0;
        canvas.y = top + 16.0;
        for phase in &self.phases {
            let tip = format!("{}: {}", phase.name, shown(phase.span));
            canvas.group(phase.name, 1, vec![Item { span: phase.span, colour: PHASE, tip }]);
        }
        canvas.group("requests", 12, self.requests());
        let decoding = |span: &Span| Item { span: *span, colour: DECODING, tip: shown(*span) };
        canvas.group("decoding", 6, self.events.decodings.iter().map(decoding).collect());
        canvas.group("demand faults", 16, self.faults());
        for child in self.children.iter().take(CHILDREN_MAX) {
            canvas.group(&child.id, 1, self.child(child));
        }
        canvas.axis(top, self.end());
        canvas.y += 22.0;
        if self.children.len() > CHILDREN_MAX {
            canvas.line(12, &format!("{} more children are not drawn", self.children.len() - CHILDREN_MAX));
        }
        if self.events.left_out > 0 {
            let (most, left_out) = (super::EVENTS_MAX, self.events.left_out);
            canvas.line(12, &format!("capped: {left_out} events after the first {most} were not recorded"));
        }
        let y = canvas.y + 4.0;
        canvas.picture.legend((16.0, y), &legend());
        canvas.picture
    }

    /// The end of the axis.
    fn end(&self) -> f64 {
        let events = &self.events;
        let spans = (events.requests.iter().map(|request| request.span))
            .chain(events.decodings.iter().copied())
            .chain(events.faults.iter().map(|fault| fault.span))
            .chain(self.phases.iter().map(|phase| phase.span));
        let moments =
            self.children.iter().flat_map(|child| [child.first_instruction, child.ready, child.answered]);
        spans.map(|span| span.until).chain(moments.flatten()).fold(1.0, f64::max)
    }

    fn summary(&self) -> Vec<String> {
        let sums = |is_ahead: bool| {
            let of_class =
                self.events.requests.iter().filter(|request| request.priority.is_ahead() == is_ahead);
            of_class.fold((0, 0), |(count, bytes), request| (count + 1, bytes + request.bytes))
        };
        let ((demand, demand_bytes), (prefetch, prefetch_bytes)) = (sums(false), sums(true));
        let (decoded, faults) = (self.events.decodings.len(), &self.events.faults);
        let worst = faults.iter().map(|fault| fault.span.until - fault.span.from).fold(0.0, f64::max);
        let mut lines = vec![
            format!(
                "demand requests: {demand} of {}; prefetch requests: {prefetch} of {}; chunks decoded: {decoded}",
                show_size(demand_bytes),
                show_size(prefetch_bytes)
            ),
            format!("chunks that children waited for: {}", faults.len()),
        ];
        if !faults.is_empty() {
            lines[1].push_str(&format!(", the longest {worst:.1} ms"));
        }
        lines
    }

    fn requests(&self) -> Vec<Item> {
        let item = |request: &super::RequestSpan| {
            let (colour, priority) = match request.priority {
                Priority::Demand => (DEMAND, "demand"),
                Priority::WorkingSet => (PREFETCH, "working set"),
                Priority::Prefetch => (PREFETCH, "prefetch"),
            };
            let tip = format!("{priority}, {}, {}", show_size(request.bytes), shown(request.span));
            Item { span: request.span, colour, tip }
        };
        self.events.requests.iter().map(item).collect()
    }

    fn faults(&self) -> Vec<Item> {
        let item = |fault: &super::FaultSpan| {
            let (chunk, file, waiters) = (fault.chunk, fault.file, fault.waiters);
            let tip = format!("chunk {chunk} of {file} for {waiters} children, {}", shown(fault.span));
            Item { span: fault.span, colour: FAULT, tip }
        };
        self.events.faults.iter().map(item).collect()
    }

    /// A child's way: it can only start when the last phase is over.
    fn child(&self, child: &ChildMarks) -> Vec<Item> {
        let mut from = self.phases.last().map_or(0.0, |phase| phase.span.until);
        let mut items = Vec::new();
        for (at, colour, what) in [
            (child.first_instruction, STARTING, "until its first instruction"),
            (child.ready, RUNNING, "until ready"),
            (child.answered, ANSWERING, "until answered"),
        ] {
            let Some(until) = at else { continue };
            let span = Span { from: from.min(until), until };
            items.push(Item { span, colour, tip: format!("{} {what}: {}", child.id, shown(span)) });
            from = until;
        }
        items
    }
}

impl Canvas {
    fn line(&mut self, size: u32, text: &str) {
        self.picture.text((16.0, self.y), size, Anchor::Start, text);
        self.y += f64::from(size) + 6.0;
    }

    /// Lanes of bars, as many as overlap, `most` at most: what does not fit shares the last one.
    fn group(&mut self, label: &str, most: usize, mut items: Vec<Item>) {
        if items.is_empty() {
            return;
        }
        items.sort_by(|a, b| a.span.from.total_cmp(&b.span.from));
        let lanes = lanes(items.iter().map(|item| item.span), most);
        let count = lanes.iter().max().map_or(1, |last| last + 1);
        self.picture.text((LEFT - 10.0, self.y + LANE - 1.0), 11, Anchor::End, label);
        for (item, lane) in items.iter().zip(lanes) {
            let bar = Bar {
                x: LEFT + item.span.from * self.scale,
                y: self.y + lane as f64 * (LANE + GAP),
                width: (item.span.until - item.span.from) * self.scale,
                height: LANE,
                colour: item.colour,
            };
            self.picture.bar(bar, Some(&item.tip));
        }
        self.y += count as f64 * (LANE + GAP) + 6.0;
    }

    fn axis(&mut self, top: f64, end: f64) {
        let step = step(end);
        let mut at = 0.0;
        while at <= end {
            let x = LEFT + at * self.scale;
            self.picture.upright(x, (top + 4.0, self.y), PALE);
            self.picture.text((x + 2.0, top + 8.0), 10, Anchor::Start, &format!("{at} ms"));
            at += step;
        }
    }
}

fn legend() -> Vec<LegendEntry> {
    [
        (PHASE, "parts that every child needs: registry, index, machine state"),
        (DEMAND, "a request that somebody waits for"),
        (PREFETCH, "a request ahead of need"),
        (DECODING, "a frame being decoded"),
        (FAULT, "a chunk from the first child's fault until it is in place"),
        (STARTING, "a child until its first instruction"),
        (RUNNING, "until it is ready"),
        (ANSWERING, "until its answer is here"),
    ]
    .map(|(colour, text)| LegendEntry { colour, text: text.to_owned() })
    .to_vec()
}

fn shown(span: Span) -> String {
    format!("{:.2} to {:.2} ms", span.from, span.until)
}

/// Which lane each of the spans, sorted by their beginning, goes to.
fn lanes(spans: impl Iterator<Item = Span>, most: usize) -> Vec<usize> {
    let mut ends: Vec<f64> = Vec::new();
    let place = |span: Span| {
        let free = ends.iter().position(|end| *end <= span.from);
        let lane = free.unwrap_or(ends.len()).min(most.saturating_sub(1));
        match ends.get_mut(lane) {
            Some(end) => *end = end.max(span.until),
            None => ends.push(span.until),
        }
        lane
    };
    spans.map(place).collect()
}

/// A round distance of the axis' marks, of which there are about ten.
fn step(end: f64) -> f64 {
    let magnitude = 10f64.powf((end / 10.0).log10().floor());
    let round = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| magnitude * factor * 10.0 >= end);
    (magnitude * round.unwrap_or(10.0)).max(0.1)
}

#[cfg(test)]
mod tests {
    use super::super::FaultSpan;
    use super::*;

    fn span(from: f64, until: f64) -> Span {
        Span { from, until }
    }

    fn scene(children: usize, events: RecordedEvents) -> TimelineScene {
        let child = |number: usize| ChildMarks {
            id: format!("ab12cd-{number}"),
            first_instruction: Some(12.0),
            ready: Some(30.0),
            answered: (number > 1).then_some(50.0),
        };
        let phases = vec![Phase { name: "registry", span: span(0.0, 10.0) }];
        TimelineScene {
            name: "o/n".to_owned(),
            phases,
            events,
            children: (1..=children).map(child).collect(),
        }
    }

    #[test]
    fn bars_share_a_lane_only_when_they_must() {
        let spans = [span(0.0, 5.0), span(1.0, 2.0), span(2.0, 9.0), span(3.0, 4.0), span(6.0, 7.0)];
        assert_eq!(lanes(spans.into_iter(), 9), [0, 1, 1, 2, 0]);
        assert_eq!(lanes(spans.into_iter(), 2), [0, 1, 1, 1, 0]);
        assert!(lanes([].into_iter(), 2).is_empty());
    }

    #[test]
    fn marks_are_round_and_few() {
        for end in [1.0, 3.0, 17.0, 99.0, 100.0, 555.0, 12_345.0, 1e7] {
            let marks = end / step(end);
            assert!((2.0..=10.5).contains(&marks), "{marks} marks for {end} ms");
        }
    }

    #[test]
    fn everything_is_in_the_picture() {
        let request = |priority| super::super::RequestSpan { span: span(1.0, 4.0), bytes: 2048, priority };
        let fault = FaultSpan { span: span(15.0, 25.5), file: "memory.bin", chunk: 77, waiters: 3 };
        let events = RecordedEvents {
            requests: vec![request(Priority::Demand), request(Priority::Prefetch)],
            decodings: vec![span(2.0, 2.5)],
            faults: vec![fault],
            left_out: 0,
        };
        let text = scene(2, events).draw().render();
        for part in [
            "forkd fork o/n, 2 children",
            "registry",
            "chunk 77 of memory.bin for 3 children",
            "10.5 ms",
            "prefetch, 2.0 KiB",
            "ab12cd-2 until answered: 30.00 to 50.00 ms",
        ] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
        assert!(!text.contains("ab12cd-1 until answered") && !text.contains("capped"));
    }

    #[test]
    fn nothing_and_too_much_are_drawn_too() {
        let empty = scene(0, RecordedEvents::default()).draw().render();
        assert!(empty.contains("0 children") && !empty.contains("NaN") && !empty.contains("inf"), "{empty}");
        let much = RecordedEvents { left_out: 7, ..RecordedEvents::default() };
        let text = scene(1000, much).draw().render();
        assert!(text.contains("968 more children are not drawn"), "{text}");
        assert!(text.contains("capped: 7 events after the first 10000 were not recorded"), "{text}");
        assert!(text.len() < 100_000, "{} bytes", text.len());
    }
}
