//! What fails in `demo --faults`: some of it mends itself, and some of it only somebody who sees it.
//!
//! OurAPI refuses messages for good that its spam filter dislikes, until the filter is mended: from then on a retry is all
//! it takes. Meanwhile both services fail now and then, and OurAPI is down for a while, all of which needs nobody.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::simulator::Simulator;
use crate::simulator::fault::{crashed, dropped};

/// What the spam filter dislikes.
const SPAM: &str = "refund";

/// When the spam filter is mended; sooner, where the demo is short.
const MENDED_AT: Duration = Duration::from_secs(60);

/// How often a request to either service meets a fault that needs nobody.
const NOW_AND_THEN: f64 = 0.01;

/// How far the mishaps have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begun,
    Down,
    Up,
    Mended,
}

/// The mishaps, one after another.
pub(super) struct Mishaps {
    sim: Arc<Simulator>,
    stage: Stage,
    mended_at: Duration,
}

/// What somebody who runs it can try.
pub(super) fn what_to_do(program: &Path, db: &Path) -> String {
    format!(
        "Things go wrong now, and somebody has to mend one of them: that is you. What failed, why, and what to do about it
is in the console, and beside the running daemon in another terminal:

    alias bigchat-sync={}; export BIGCHAT_SYNC_DB={}
    bigchat-sync status
    bigchat-sync failed list
    bigchat-sync failed show ID

Ctrl-C ends it, and compares.
",
        // The shell reads an alias again when it is used.
        shell_word(&shell_word(&program.to_string_lossy())),
        shell_word(&db.to_string_lossy())
    )
}

/// A text as a shell reads it back.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    match text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

impl Mishaps {
    /// Begins with what fails from the start. `duration`: of the demo.
    pub(super) fn new(sim: Arc<Simulator>, duration: Duration) -> Self {
        sim.our_api.state().set_spam(Some(SPAM));
        sim.bigchat.upset_at_random(NOW_AND_THEN, crashed());
        sim.our_api.upset_at_random(NOW_AND_THEN, crashed());
        sim.our_api
            .upset_at_random(NOW_AND_THEN, dropped().carried_out());
        Self {
            sim,
            stage: Stage::Begun,
            mended_at: MENDED_AT.min(duration / 3),
        }
    }

    /// Goes on to what is due next. Returns what there is to tell of it.
    pub(super) async fn go_on(&mut self, elapsed: Duration) -> io::Result<Option<&'static str>> {
        let (stage, news) = match self.stage {
            Stage::Begun if elapsed > self.mended_at / 3 => {
                self.sim.our_api.down().await;
                (Stage::Down, "OurAPI goes down.")
            }
            Stage::Down if elapsed > self.mended_at / 2 => {
                self.sim.our_api.up().await?;
                (Stage::Up, "OurAPI is up again.")
            }
            Stage::Up if elapsed > self.mended_at => {
                self.sim.our_api.state().set_spam(None);
                // What was mended stays so from now on, and nobody has to do it again and again.
                self.sim.bigchat.state().set_awkward(false);
                self.calm();
                let news = "Somebody has mended OurAPI: what it refused and should take it takes now, once it is tried again.";
                (Stage::Mended, news)
            }
            _ => return Ok(None),
        };
        self.stage = stage;
        Ok(Some(news))
    }

    /// All is well again.
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
