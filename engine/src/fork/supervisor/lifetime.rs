//! Stopping children and letting them go on, and the end of their time.
//!
//! A paused child is stopped where it stands: its state does not change, it is only shown as paused. Its turn at the start
//! ends by itself, its memory is filled on, and it can be ended.

use super::spec::Deadline;
use super::{Child, Lifetime, OnTimeout, Supervisor};
use crate::local::run_dir::ChildState;
use std::time::{Duration, Instant};

impl Supervisor {
    /// Stops children: all, or the one of that name. Returns how many live.
    pub fn pause(&self, id: Option<&str>) -> usize {
        self.of_those_alive(id, |child| self.stop(child))
    }

    /// Lets children go on: all, or the one of that name. Returns how many live.
    pub fn resume(&self, id: Option<&str>) -> usize {
        self.of_those_alive(id, |child| {
            if let Some(process) = child.process.as_ref().filter(|_| child.paused) {
                process.resume();
                child.paused = false;
                child.overdue = None;
                self.run_dir.note_paused(&child.id, false);
            }
        })
    }

    /// Gives children so much time from now on, or no end to it: all, or the one of that name. Returns how many live.
    pub fn set_lifetime(&self, id: Option<&str>, lifetime: Option<Lifetime>) -> usize {
        let count = self.of_those_alive(id, |child| child.deadline = Deadline::of(lifetime));
        self.wake.call();
        count
    }

    fn of_those_alive(&self, id: Option<&str>, work: impl FnMut(&mut Child)) -> usize {
        let mut children = self.children();
        let meant =
            children.iter_mut().filter(|child| id.is_none_or(|id| id == child.id) && !child.state.is_over());
        meant.map(work).count()
    }

    fn stop(&self, child: &mut Child) {
        if let Some(process) = child.process.as_ref().filter(|_| !child.paused) {
            // Noted first: nobody is to wait for an answer that does not come.
            self.run_dir.note_paused(&child.id, true);
            process.pause();
            child.paused = true;
        }
    }

    /// Ends or pauses children whose time is over. Returns how long it is until the next one's is.
    pub(super) fn end_overdue_children(&self) -> Option<Duration> {
        let (now, mut next) = (Instant::now(), None::<Duration>);
        let mut children = self.children();
        for (at, child) in children.iter_mut().enumerate().filter(|(_, child)| !child.state.is_over()) {
            let Some(deadline) = &child.deadline else { continue };
            let left = deadline.at.saturating_duration_since(now);
            if !left.is_zero() {
                next = Some(next.map_or(left, |next| next.min(left)));
                continue;
            }
            let Lifetime { time, then } = deadline.lifetime;
            let why = format!("its time of {} is over", humantime::format_duration(time));
            child.deadline = None;
            match then {
                OnTimeout::Kill => child.end(ChildState::Killed, Some(why)),
                OnTimeout::Pause => {
                    self.stop(child);
                    child.overdue = Some(why);
                    self.tell(at);
                }
            }
        }
        next
    }
}
