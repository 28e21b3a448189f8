//! Progress bars on stderr; nothing at all when stderr is not a terminal or `--json` was asked for.

use std::io::IsTerminal;

use forkd_engine::progress::{Amount, Progress, Task};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Output;

impl Progress for Output {
    fn begin(&self, what: &str, amount: Amount) -> Box<dyn Task> {
        let (bar, template) = match amount {
            Amount::Bytes(total) => {
                (ProgressBar::new(total), "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            }
            Amount::Steps(total) => (ProgressBar::new(total), "{msg} {wide_bar} {pos}/{len} {elapsed}"),
            Amount::Unknown => (ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}"),
        };
        let shown = !self.is_json() && std::io::stderr().is_terminal();
        bar.set_draw_target(if shown {
            ProgressDrawTarget::stderr_with_hz(10)
        } else {
            ProgressDrawTarget::hidden()
        });
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Box::new(Bar(bar))
    }

    fn note(&self, line: &str) {
        Output::note(self, line);
    }
}

/// One bar or spinner; cleared when dropped, so errors print on a clean line.
///
/// It starts no thread of its own: each call redraws it.
struct Bar(ProgressBar);

impl Task for Bar {
    fn to(&self, done: u64) {
        self.0.set_position(done);
    }

    fn limit(&self, total: u64) {
        self.0.set_length(total);
    }

    fn say(&self, what: &str) {
        self.0.set_message(what.to_owned());
        self.0.tick();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
