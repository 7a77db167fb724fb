//! What fails in `demo --faults`: temporary failures, and one that needs the operator.
//!
//! OurAPI permanently rejects messages that its spam filter dislikes, until the filter is fixed. After that, a retry is
//! enough. Meanwhile both services fail sometimes, and OurAPI is down for a while, which needs no operator.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::simulator::Simulator;
use crate::simulator::fault::{crashed, dropped};

/// The word that the spam filter rejects.
const SPAM: &str = "refund";

/// When the spam filter is fixed; sooner in a short demo.
const FIXED_AT: Duration = Duration::from_secs(60);

/// Probability that a request to either service meets a temporary fault.
const NOW_AND_THEN: f64 = 0.01;

/// The current stage of the mishaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begun,
    Down,
    Up,
    Fixed,
}

/// The mishaps, one after another.
pub(super) struct Mishaps {
    sim: Arc<Simulator>,
    stage: Stage,
    fixed_at: Duration,
}

/// What the operator can try.
pub(super) fn what_to_do(program: &Path, db: &Path) -> String {
    format!(
        "Requests are failing now, and some of the failures need action. The console shows what failed, why, and what to do.
So do these commands in another terminal, while the daemon is running:

    alias bigchat-sync={}; export BIGCHAT_SYNC_DB={}
    bigchat-sync status
    bigchat-sync failed list
    bigchat-sync failed show ID

Ctrl-C ends the demo and starts the comparison.
",
        // The shell reads an alias again when it is used.
        shell_word(&shell_word(&program.to_string_lossy())),
        shell_word(&db.to_string_lossy())
    )
}

/// A text as a shell reads it back.
pub(super) fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    match text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

impl Mishaps {
    /// Starts the lasting faults. `duration` is that of the demo.
    pub(super) fn new(sim: Arc<Simulator>, duration: Duration) -> Self {
        sim.our_api.state().set_spam(Some(SPAM));
        sim.bigchat.upset_at_random(NOW_AND_THEN, crashed());
        sim.our_api.upset_at_random(NOW_AND_THEN, crashed());
        sim.our_api
            .upset_at_random(NOW_AND_THEN, dropped().carried_out());
        Self {
            sim,
            stage: Stage::Begun,
            fixed_at: FIXED_AT.min(duration / 3),
        }
    }

    /// Starts the next mishap if it is due. Returns its announcement.
    pub(super) async fn advance(&mut self, elapsed: Duration) -> io::Result<Option<&'static str>> {
        let (stage, news) = match self.stage {
            Stage::Begun if elapsed > self.fixed_at / 3 => {
                self.sim.our_api.down().await;
                (
                    Stage::Down,
                    "OurAPI goes down; the daemon retries automatically",
                )
            }
            Stage::Down if elapsed > self.fixed_at / 2 => {
                self.sim.our_api.up().await?;
                (Stage::Up, "OurAPI is up again")
            }
            Stage::Up if elapsed > self.fixed_at => {
                self.sim.our_api.state().set_spam(None);
                // Once the filter is fixed, no further failure needs action.
                self.sim.bigchat.state().set_awkward(false);
                self.calm();
                let news = "OurAPI is fixed: retry the failed events (`bigchat-sync failed retry --all`); discard what still fails";
                (Stage::Fixed, news)
            }
            _ => return Ok(None),
        };
        self.stage = stage;
        Ok(Some(news))
    }

    pub(super) async fn end(self) -> io::Result<()> {
        if self.stage == Stage::Down {
            self.sim.our_api.up().await?;
        }
        self.calm();
        Ok(())
    }

    fn calm(&self) {
        self.sim.bigchat.calm();
        self.sim.our_api.calm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_reads_back_what_is_quoted() {
        for text in [
            "/tmp/a.db",
            "a b",
            "it's",
            "$HOME;`x`",
            "new\nline",
            "back\\slash",
        ] {
            // An alias is read twice.
            let twice = shell_word(&shell_word(text));
            let script = format!("word={twice}; eval \"printf %s $word\"");
            let read = std::process::Command::new("sh")
                .args(["-c", &script])
                .output();
            let read = read.expect("a shell");
            assert_eq!(String::from_utf8_lossy(&read.stdout), text);
        }
    }
}
