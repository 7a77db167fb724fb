//! What is said at the end: whether OurAPI holds what BigChat told, with the figures, and the exit code.

use std::fmt;
use std::process::ExitCode;

use super::chaos::Score;
use super::tally::{count, per_event};
use crate::simulator::compare::Report;

/// What the comparison does not tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Events that BigChat told.
    pub events: usize,
    /// Requests that OurAPI got.
    pub requests: usize,
    /// The most of them that it carried out at once.
    pub at_once: usize,
    /// Failed events in the daemon's journal, those included that somebody has given up.
    pub failed: usize,
    /// Events that still wait there.
    pub waiting: usize,
    /// What struck meanwhile, if anything was to.
    pub chaos: Option<Struck>,
}

/// What has struck, and what of BigChat's telling was lost by it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Struck {
    /// What was done to the services and the daemon.
    pub score: Score,
    /// How many requests met a fault.
    pub faults: u64,
    /// Events that were told and reached nobody, those among them that a killed daemon had not kept.
    pub lost: usize,
}

/// How the demo came out. Its `Display` is what is to be printed.
#[derive(Clone, Debug)]
pub struct Verdict {
    figures: Figures,
    report: Report,
    wrong: Vec<String>,
}

impl Verdict {
    /// Judges. Nothing told is wrong, too: nothing would have been shown.
    pub fn new(report: Report, figures: Figures) -> Self {
        let mut wrong = Vec::new();
        if figures.events == 0 {
            wrong.push("nothing was told".to_owned());
        }
        if !report.is_clean() {
            wrong.push("OurAPI does not hold what BigChat told".to_owned());
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
            wrong.push("more than 1 request at once".to_owned());
        }
        Self {
            figures,
            report,
            wrong,
        }
    }

    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty()
    }

    /// 0 if nothing is wrong, else 1.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(u8::from(!self.is_good()))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures {
            events,
            requests,
            at_once,
            failed,
            ..
        } = self.figures;
        writeln!(f, "{}\n", self.report)?;
        if failed > 0 && failed == self.report.refused {
            writeln!(
                f,
                "{} failed, and rightly so: OurAPI stores none of under 2 characters\n",
                count(self.report.refused, "message")
            )?;
        }
        if let Some(Struck {
            score,
            faults,
            lost,
        }) = self.figures.chaos
        {
            let unstored = score.unstored.min(lost);
            writeln!(
                f,
                "{score}, {faults} faults injected\n\
                 {} told that never reached the journal: {} in answers that were lost or with a BigChat that restarted, {unstored} that the daemon had not kept yet when it was killed\n\
                 {} whose start or agent nobody knew any more\n",
                count(lost, "event"),
                lost - unstored,
                count(self.report.fallbacks(), "chat"),
            )?;
        }
        let at_once = match at_once {
            0 | 1 => "never more than 1 at once".to_owned(),
            more => format!("up to {more} at once"),
        };
        let wrong = if self.is_good() {
            "no difference".to_owned()
        } else {
            self.wrong.join("; ")
        };
        write!(
            f,
            "{}, {} told, {} to OurAPI{}, {at_once}, {wrong}",
            count(self.report.chats(), "conversation"),
            count(events, "event"),
            count(requests, "request"),
            per_event(requests, events),
        )
    }
}
