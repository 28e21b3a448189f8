//! Progress bars on stderr; nothing at all when stderr is not a terminal or `--json` was asked for.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::Output;

/// One bar or spinner; cleared when dropped, so errors print on a clean line.
///
/// It starts no thread of its own: call [`Progress::to`] or [`Progress::say`] to redraw.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar over `total` bytes.
    pub fn bytes(output: &Output, what: &str, total: u64) -> Progress {
        let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        Progress::with(output, what, ProgressBar::new(total), style)
    }

    /// A bar over `total` steps of one kind (files, children).
    pub fn steps(output: &Output, what: &str, total: u64) -> Progress {
        Progress::with(output, what, ProgressBar::new(total), "{msg} {wide_bar} {pos}/{len} {elapsed}")
    }

    /// Work of unknown length.
    pub fn spinner(output: &Output, what: &str) -> Progress {
        Progress::with(output, what, ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}")
    }

    fn with(output: &Output, what: &str, bar: ProgressBar, template: &str) -> Progress {
        let shown = !output.is_json() && std::io::stderr().is_terminal();
        bar.set_draw_target(if shown {
            ProgressDrawTarget::stderr_with_hz(10)
        } else {
            ProgressDrawTarget::hidden()
        });
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Progress { bar }
    }

    /// Sets how much there is to do, when that is only known later.
    pub fn limit(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// Sets how much is done.
    pub fn to(&self, done: u64) {
        self.bar.set_position(done);
    }

    /// Changes the text in front of the bar.
    pub fn say(&self, what: impl Into<String>) {
        self.bar.set_message(what.into());
        self.bar.tick();
    }

    /// Waits for `work` and shows `done` meanwhile.
    pub async fn follow<T>(&self, work: impl Future<Output = T>, done: impl Fn() -> u64) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(Progress::INTERVAL, &mut work).await {
                Ok(result) => return result,
                Err(_) => self.to(done()),
            }
        }
    }

    /// How often a caller that polls should call [`Progress::to`].
    pub const INTERVAL: Duration = Duration::from_millis(100);
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
