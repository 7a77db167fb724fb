//! The result of the demo: whether OurAPI has what BigChat reported, with the figures, and the exit code.

use std::fmt;
use std::process::ExitCode;

use super::chaos::Score;
use crate::simulator::compare::{Report, count};

/// Terminal codes for bold text on and off.
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";

/// Figures besides the comparison.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Events that BigChat reported.
    pub events: usize,
    /// The polls that failed, and their events.
    pub failed_polls: FailedPolls,
    /// Requests to OurAPI.
    pub requests: usize,
    /// The most requests that OurAPI carried out at once.
    pub at_once: usize,
    /// Failed events in the daemon's journal, including discarded ones.
    pub failed: usize,
    /// Events that are still waiting in the journal.
    pub waiting: usize,
    /// The faults, with `--chaos`.
    pub chaos: Option<Struck>,
}

/// Polls that BigChat answered with an error. If BigChat stores its events, it reports them again.
#[derive(Clone, Copy, Debug, Default)]
pub struct FailedPolls {
    pub count: usize,
    /// Whether BigChat stores its events.
    pub reported_again: bool,
}

impl fmt::Display for FailedPolls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            count: polls,
            reported_again,
        } = *self;
        write!(f, "BigChat failed {}: ", count(polls, "poll"))?;
        f.write_str(match reported_again {
            true => "their events were reported again",
            false => "it does not report their events again, so they are not recoverable, and not counted",
        })
    }
}

/// The faults, and the events lost because of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Struck {
    /// The faults of the services and the daemon.
    pub score: Score,
    /// How many requests met a fault.
    pub faults: u64,
    /// Events that were reported and never stored, including those that a killed daemon had not stored.
    pub lost: usize,
}

#[derive(Clone, Debug)]
pub struct DemoResult {
    figures: Figures,
    report: Report,
    wrong: Vec<String>,
}

impl DemoResult {
    /// Evaluates the comparison. A run without events fails too, because it shows nothing.
    pub fn new(report: Report, figures: Figures) -> Self {
        let mut wrong = Vec::new();
        if figures.events == 0 {
            wrong.push("BigChat reported no event".to_owned());
        }
        if !report.is_clean() {
            wrong.push("OurAPI does not have what BigChat reported".to_owned());
        }
        if figures.waiting > 0 {
            wrong.push(format!("{} still waiting", count(figures.waiting, "event")));
        }
        let (failed, refused) = (figures.failed, report.refused);
        if failed != refused {
            wrong.push(format!(
                "{} failed, of which {refused} can never be stored",
                count(failed, "event")
            ));
        }
        if figures.at_once > 1 {
            wrong.push(format!("up to {} requests at once", figures.at_once));
        }
        Self {
            figures,
            report,
            wrong,
        }
    }

    /// Whether there is no difference and nothing else is wrong.
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty()
    }

    /// 0 if nothing is wrong, else 1.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(u8::from(!self.is_good()))
    }

    /// The text to print: the details, and the summary, which is bold on a terminal.
    pub fn text(&self, is_bold: bool) -> String {
        let (details, summary) = (self.details(), self.summary());
        match is_bold {
            true => format!("{details}\n\n{BOLD}{summary}{PLAIN}"),
            false => format!("{details}\n\n{summary}"),
        }
    }

    /// The result in one line.
    fn summary(&self) -> String {
        let Figures {
            events, requests, ..
        } = self.figures;
        let result = match self.is_good() {
            true => "No difference".to_owned(),
            false => format!("FAILED, {}", self.wrong.join("; ")),
        };
        format!(
            "{result}: {}, {}, {}{}, never more than {} at once",
            count(self.report.chats(), "conversation"),
            count(events, "event"),
            count(requests, "request"),
            per_event(requests, events),
            self.figures.at_once.max(1),
        )
    }

    /// What differs, and what is not counted as a difference.
    fn details(&self) -> String {
        let mut lines = vec![self.report.to_string()];
        let Figures {
            failed,
            failed_polls,
            ..
        } = self.figures;
        if failed > 0 && failed == self.report.refused {
            lines.push(format!(
                "{} failed, as expected: OurAPI does not store messages shorter than 2 characters",
                count(failed, "message")
            ));
        }
        if let Some(Struck {
            score,
            faults,
            lost,
        }) = self.figures.chaos
        {
            lines.push(format!("{score}, {faults} faults injected"));
            let why = if failed_polls.reported_again {
                "BigChat restarted and lost its log before they were stored".to_owned()
            } else {
                let unstored = score.unstored.min(lost);
                format!(
                    "{} in responses that were lost or from a BigChat that restarted, {unstored} not stored yet when the daemon was killed",
                    lost - unstored
                )
            };
            lines.push(format!(
                "{} not recoverable, and not counted: {why}",
                count(lost, "event")
            ));
            lines.push(format!(
                "{} with a start or an agent that BigChat no longer knew: a substitute is accepted",
                count(self.report.fallbacks(), "chat"),
            ));
        } else if failed_polls.count > 0 {
            lines.push(failed_polls.to_string());
        }
        lines.join("\n")
    }
}

/// Requests per event, in parentheses.
fn per_event(requests: usize, events: usize) -> String {
    if events == 0 {
        return String::new();
    }
    format!(" ({:.2} per event)", requests as f64 / events as f64)
}
