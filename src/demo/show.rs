//! How the demo is seen: a picture that moves on a terminal, a line a second anywhere else. What is shown is left to
//! [`tally`](super::tally).

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar};

use super::tally::{Line, Looked, ROWS, Tally};
use crate::telemetry::pace::{Rate, in_words};
use crate::telemetry::terminal::{Terminal, styled};

/// How often the picture changes.
pub(super) const FRAME: Duration = Duration::from_millis(100);

/// How many of the last lines are seen.
const LINES: usize = 8;

/// A poll's events arrive at once and could not be read so: what there is to say of them is spread over about so many
/// frames, until the next poll.
const SPREAD: usize = 8;

/// How often there is a line where there is no picture.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// The show that is on.
pub(super) enum Show {
    Picture(Picture),
    Lines {
        terminal: Terminal,
        duration: Duration,
        next: Duration,
    },
}

impl Show {
    /// Begins to show what goes on.
    pub(super) fn new(terminal: &Terminal, duration: Duration) -> Self {
        match terminal.picture() {
            Some(picture) => Self::Picture(Picture::new(picture, duration)),
            None => Self::Lines {
                terminal: terminal.clone(),
                duration,
                next: LINE_EVERY,
            },
        }
    }

    /// Something happened.
    pub(super) fn tell(&mut self, line: Line) {
        if let Self::Picture(picture) = self {
            picture.coming.push_back(line);
        }
    }

    /// A moment has passed.
    pub(super) async fn frame(
        &mut self,
        elapsed: Duration,
        tally: &Tally,
        looked: &Looked,
    ) -> io::Result<()> {
        match self {
            Self::Picture(picture) => picture.draw(elapsed, tally, looked),
            Self::Lines {
                terminal,
                duration,
                next,
            } if elapsed >= *next => {
                *next = elapsed + LINE_EVERY;
                terminal
                    .say(&format!(
                        "{:>3} s of {}  {}",
                        elapsed.as_secs(),
                        in_words(*duration),
                        tally.sentence(looked)
                    ))
                    .await?;
            }
            Self::Lines { .. } => {}
        }
        Ok(())
    }

    /// Nothing new is told from now on; what was told is waited for.
    pub(super) async fn finishing(&mut self) -> io::Result<()> {
        const WAITING: &str = "waiting for what is still on its way";
        match self {
            Self::Picture(picture) => picture.time.set_message(WAITING),
            Self::Lines { terminal, .. } => terminal.say(WAITING).await?,
        }
        Ok(())
    }
}

/// A time bar, counters, and what happened last.
pub(super) struct Picture {
    all: Vec<ProgressBar>,
    duration: Duration,
    time: ProgressBar,
    rows: Vec<ProgressBar>,
    lines: Vec<ProgressBar>,
    /// What happened and is not shown yet.
    coming: VecDeque<Line>,
    shown: VecDeque<Line>,
}

impl Picture {
    fn new(bars: &MultiProgress, duration: Duration) -> Self {
        let mut all = Vec::new();
        let mut add = |template: &str| {
            let bar = bars.add(styled(template));
            bar.set_length(millis(duration));
            bar.tick();
            all.push(bar.clone());
            bar
        };
        // A ^C that somebody types pushes the picture up by a line, which then stays: an empty one.
        add(" ");
        let time = add("  {wide_bar:.cyan/dim}  {msg}");
        add(" ");
        let rows = std::iter::repeat_with(|| add("{prefix:>14.cyan}  {wide_msg}"));
        let rows = rows.take(ROWS).collect();
        add(" ");
        let lines = std::iter::repeat_with(|| add("{prefix:.dim}{wide_msg}"));
        let lines = lines.take(LINES).collect();
        Self {
            all,
            duration,
            time,
            rows,
            lines,
            coming: VecDeque::new(),
            shown: VecDeque::new(),
        }
    }

    fn draw(&mut self, elapsed: Duration, tally: &Tally, looked: &Looked) {
        self.time.set_position(millis(elapsed));
        if elapsed < self.duration {
            let rate = Rate {
                per_second: tally.events() as f64 / elapsed.as_secs_f64().max(1.0),
                time_left: Some(self.duration - elapsed),
            };
            self.time.set_message(format!("told {rate}"));
        }
        for (bar, (what, how_much)) in self.rows.iter().zip(tally.rows(looked)) {
            bar.set_prefix(what);
            bar.set_message(how_much);
        }
        let now = self.coming.len().div_ceil(SPREAD);
        self.shown.extend(self.coming.drain(..now));
        self.shown.drain(..self.shown.len().saturating_sub(LINES));
        for (bar, Line { took, who, what }) in self.lines.iter().zip(&self.shown) {
            let took = took.map(|took| format!("{} ms", took.as_millis()));
            bar.set_prefix(format!("{:>9}  {who:<17}", took.unwrap_or_default()));
            bar.set_message(what.clone());
        }
    }
}

impl Drop for Picture {
    fn drop(&mut self) {
        self.all.iter().for_each(ProgressBar::finish_and_clear);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
