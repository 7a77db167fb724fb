//! The display of the demo: bars on a terminal, else a line per second. [`tally`](super::tally) decides what is shown.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar};

use super::tally::{Line, Snapshot, Tally, headings};
use crate::telemetry::rate::Rate;
use crate::telemetry::terminal::{Terminal, styled};

/// The time between two frames.
pub(super) const FRAME: Duration = Duration::from_millis(100);

/// How many lines are shown: the latest ones.
const LINES: usize = 8;

/// Over how many frames the lines of a poll are spread. Its events arrive together, too fast to be read.
const SPREAD: usize = 8;

/// Time between two lines without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// How many lines are printed under one pair of headings: about a screen.
const LINES_PER_HEADING: u32 = 20;

/// Bars on a terminal, or lines.
pub(super) enum Show {
    Bars(Bars),
    Lines {
        terminal: Terminal,
        next: Duration,
        printed: u32,
    },
}

impl Show {
    /// Starts the display.
    pub(super) fn new(terminal: &Terminal, duration: Duration) -> Self {
        match terminal.bars() {
            Some(bars) => Self::Bars(Bars::new(bars, duration)),
            None => Self::Lines {
                terminal: terminal.clone(),
                next: LINE_EVERY,
                printed: 0,
            },
        }
    }

    pub(super) fn push(&mut self, line: Line) {
        if let Self::Bars(bars) = self {
            bars.coming.push_back(line);
        }
    }

    /// Shows the current figures.
    pub(super) async fn frame(
        &mut self,
        elapsed: Duration,
        tally: &Tally,
        snapshot: &Snapshot,
    ) -> io::Result<()> {
        match self {
            Self::Bars(bars) => bars.draw(elapsed, tally, snapshot),
            Self::Lines {
                terminal,
                next,
                printed,
            } if elapsed >= *next => {
                *next = elapsed + LINE_EVERY;
                if *printed % LINES_PER_HEADING == 0 {
                    let [owners, headings] = headings();
                    terminal
                        .say(&format!("{:6}{owners}\n{:>6}{headings}", "", "time"))
                        .await?;
                }
                *printed += 1;
                let line = format!(
                    "{:>4} s{}  {}",
                    elapsed.as_secs(),
                    tally.figures(snapshot),
                    snapshot.chaos()
                );
                terminal.say(line.trim_end()).await?;
            }
            Self::Lines { .. } => {}
        }
        Ok(())
    }

    /// Shows that BigChat reports nothing new from now on, and that the last events are being delivered.
    pub(super) async fn finishing(&mut self) -> io::Result<()> {
        const WAITING: &str = "delivering the last events";
        match self {
            Self::Bars(bars) => bars.time.set_message(WAITING),
            Self::Lines { terminal, .. } => terminal.say(WAITING).await?,
        }
        Ok(())
    }
}

/// A time bar, the figures, and the latest lines.
pub(super) struct Bars {
    all: Vec<ProgressBar>,
    duration: Duration,
    time: ProgressBar,
    figures: ProgressBar,
    chaos: ProgressBar,
    lines: Vec<ProgressBar>,
    /// Lines not shown yet.
    coming: VecDeque<Line>,
    shown: VecDeque<Line>,
}

impl Bars {
    fn new(bars: &MultiProgress, duration: Duration) -> Self {
        let mut all = Vec::new();
        let mut add = |template: &str| {
            let bar = bars.add(styled(template));
            bar.set_length(millis(duration));
            bar.tick();
            all.push(bar.clone());
            bar
        };
        // A ^C typed by the user pushes the bars up by one line, which stays on the screen. The first bar is empty, so
        // that this line is empty, too.
        add(" ");
        let time = add("  {wide_bar:.cyan/dim}  {msg}");
        add(" ");
        for heading in headings() {
            add("{wide_msg:.cyan}").set_message(heading);
        }
        let figures = add("{wide_msg}");
        let chaos = add("  {wide_msg}");
        add(" ");
        let lines = std::iter::repeat_with(|| add("{prefix:.dim}{wide_msg}"));
        let lines = lines.take(LINES).collect();
        Self {
            all,
            duration,
            time,
            figures,
            chaos,
            lines,
            coming: VecDeque::new(),
            shown: VecDeque::new(),
        }
    }

    fn draw(&mut self, elapsed: Duration, tally: &Tally, snapshot: &Snapshot) {
        self.time.set_position(millis(elapsed));
        if elapsed < self.duration {
            let rate = Rate {
                per_second: tally.events() as f64 / elapsed.as_secs_f64().max(1.0),
                time_left: Some(self.duration - elapsed),
            };
            self.time.set_message(format!("{rate}"));
        }
        self.figures.set_message(tally.figures(snapshot));
        self.chaos.set_message(snapshot.chaos());
        let now = self.coming.len().div_ceil(SPREAD);
        self.shown.extend(self.coming.drain(..now));
        self.shown.drain(..self.shown.len().saturating_sub(LINES));
        for (bar, Line { who, what }) in self.lines.iter().zip(&self.shown) {
            bar.set_prefix(format!("  {who:<17}"));
            bar.set_message(what.clone());
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.all.iter().for_each(ProgressBar::finish_and_clear);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
