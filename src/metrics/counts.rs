//! Totals without labels, for the summary in the log and the progress.

/// The counts since the daemon started, or between two moments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Polls, completed or not.
    pub polls: u64,
    /// Polls that failed because of BigChat or the journal.
    pub polls_failed: u64,
    /// New events received.
    pub received: u64,
    pub delivered: u64,
    /// Failed attempts that will be repeated.
    pub attempts_failed: u64,
    /// Events that became dead letters, including those that could not be parsed.
    pub failed: u64,
}

impl Counts {
    /// The counts since an earlier moment.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            polls: self.polls - before.polls,
            polls_failed: self.polls_failed - before.polls_failed,
            received: self.received - before.received,
            delivered: self.delivered - before.delivered,
            attempts_failed: self.attempts_failed - before.attempts_failed,
            failed: self.failed - before.failed,
        }
    }

    /// Whether anything happened. A poll without new events does not count.
    pub fn something_happened(&self) -> bool {
        let Self {
            polls: _,
            polls_failed,
            received,
            delivered,
            attempts_failed,
            failed,
        } = self;
        polls_failed + received + delivered + attempts_failed + failed > 0
    }

    /// Events that are no longer waiting.
    pub fn settled(&self) -> u64 {
        self.delivered + self.failed
    }
}
