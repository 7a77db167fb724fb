//! Progress of catching up after downtime or an outage: bars on a terminal, else a line in the log from time to time.
//!
//! The estimate assumes that BigChat has as many events per hour for the unread time as for the time already read.

use std::convert::Infallible;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar};
use tokio::time::{Instant, sleep};

use super::parts::Parts;
use crate::journal::{JournalError, Store};
use crate::telemetry::rate::{Rate, RateEstimate, in_words};
use crate::telemetry::terminal::{Terminal, styled};

/// How often to check whether the daemon is far behind, and how far.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// How often a bar is drawn.
const FRAME: Duration = Duration::from_millis(200);

/// How often a line is logged if there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The distance behind BigChat from which progress is shown, unless twice the poll interval is longer.
const BEHIND: Duration = Duration::from_secs(60);

/// The number of waiting events from which progress is shown. Delivering them takes several seconds.
const MANY: u32 = 1000;

/// The display ends when fewer than this many events are waiting.
const FEW: u64 = 100;

/// How often all waiting events are counted.
const COUNT_EVERY: Duration = Duration::from_secs(10);

/// The format of a bar.
const BAR: &str = "  {prefix:<10}{wide_bar:.cyan/dim}  {msg:<40}";

/// Progress at one moment.
#[derive(Debug, Clone, Copy)]
struct Snapshot {
    at: Instant,
    /// The time still to be read.
    unread: Duration,
    /// Events received since the daemon started.
    received: u64,
    /// Events delivered or failed since the daemon started.
    settled: u64,
    waiting: u64,
}

/// Progress since the display began.
#[derive(Debug)]
struct Course {
    began: Snapshot,
    /// The longest time that was left to read.
    to_read: Duration,
    rate: RateEstimate,
}

/// The figures to show.
#[derive(Debug, PartialEq)]
struct View {
    read: Duration,
    to_read: Duration,
    delivered: u64,
    /// Waiting events, and those expected in the unread time.
    left: u64,
    rate: Rate,
}

impl Course {
    fn new(began: Snapshot) -> Self {
        Self {
            began,
            to_read: began.unread,
            rate: RateEstimate::new(began.at, began.settled),
        }
    }

    fn now(&mut self, snapshot: Snapshot) -> View {
        self.to_read = self.to_read.max(snapshot.unread);
        let read = self.to_read - snapshot.unread;
        let received = snapshot.received - self.began.received;
        let unread_events = match (read.as_secs_f64(), snapshot.unread.as_secs_f64()) {
            (_, 0.0) => Some(0),
            (0.0, _) => None,
            (read, unread) => Some((received as f64 * unread / read) as u64),
        };
        let left = unread_events.map(|unread_events| snapshot.waiting + unread_events);
        View {
            read,
            to_read: self.to_read,
            delivered: snapshot.settled - self.began.settled,
            left: left.unwrap_or(snapshot.waiting),
            rate: self.rate.now(snapshot.at, snapshot.settled, left),
        }
    }
}

impl View {
    /// Whether less is left than before. This is false in an outage, and while events are received faster than
    /// delivered.
    fn is_further_than(&self, before: &Self) -> bool {
        self.left < before.left || self.unread() < before.unread()
    }

    fn unread(&self) -> Duration {
        self.to_read - self.read
    }

    fn reading(&self) -> String {
        format!("{} of {}", in_words(self.read), in_words(self.to_read))
    }

    fn delivering(&self) -> String {
        let about = if self.unread().is_zero() {
            ""
        } else {
            "about "
        };
        let all = self.delivered + self.left;
        format!("{} of {about}{all}, {}", self.delivered, self.rate)
    }
}

/// Shows the progress whenever the daemon is far behind.
pub(super) async fn show(parts: &Parts, terminal: Option<&Terminal>) -> Infallible {
    let mut checked = None;
    loop {
        let counts = parts.metrics.counts();
        let polled = (counts.polls, counts.received);
        if checked.replace(polled) != Some(polled) {
            // Polling and delivery report a journal that cannot be read.
            if let Ok(true) = is_far_behind(parts).await {
                catch_up(parts, terminal).await.ok();
            }
        }
        sleep(CHECK_EVERY).await;
    }
}

/// Shows the progress until little is left.
async fn catch_up(parts: &Parts, terminal: Option<&Terminal>) -> Result<(), JournalError> {
    let mut watch = Watch::new(parts).await?;
    let began = watch.counted;
    let mut course = Course::new(began);
    let mut shown = match terminal.and_then(Terminal::bars) {
        Some(bars) => Shown::Bars(Bars::new(bars)),
        None => Shown::Lines(None, began.at),
    };
    loop {
        sleep(shown.interval()).await;
        let snapshot = watch.snapshot().await?;
        let view = course.now(snapshot);
        if snapshot.unread.is_zero() && snapshot.waiting < FEW {
            if !matches!(shown, Shown::Lines(None, _)) {
                tracing::info!(
                    delivered = view.delivered,
                    seconds = (snapshot.at - began.at).as_secs(),
                    "caught up"
                );
            }
            return Ok(());
        }
        shown.show(view, snapshot.at);
    }
}

/// The display: bars, or the last line logged and the time at which a line was last due.
enum Shown {
    Bars(Bars),
    Lines(Option<View>, Instant),
}

impl Shown {
    fn interval(&self) -> Duration {
        match self {
            Self::Bars(_) => FRAME,
            Self::Lines(..) => CHECK_EVERY,
        }
    }

    fn show(&mut self, view: View, now: Instant) {
        match self {
            Self::Bars(bars) => bars.show(&view),
            Self::Lines(last, due) if now - *due >= LINE_EVERY => {
                *due = now;
                if last.as_ref().is_none_or(|last| view.is_further_than(last)) {
                    tracing::info!(
                        delivered = view.delivered,
                        left = view.left,
                        per_second = (view.rate.per_second * 10.0).round() / 10.0,
                        seconds_left = view.rate.time_left.map(|left| left.as_secs()),
                        unread_seconds = view.unread().as_secs(),
                        "catching up"
                    );
                    *last = Some(view);
                }
            }
            Self::Lines(..) => {}
        }
    }
}

/// Two bars, each shown as long as it has something to show, below an empty one.
struct Bars([ProgressBar; 3]);

impl Bars {
    fn new(bars: &MultiProgress) -> Self {
        let add = |bar: ProgressBar| bars.add(bar);
        Self([
            // A ^C typed by the user pushes the bars up by one line, which stays on the screen. The first bar is empty,
            // so that this line is empty, too.
            add(styled(" ")),
            add(styled(BAR).with_prefix("read")),
            add(styled(BAR).with_prefix("delivered")),
        ])
    }

    fn show(&self, view: &View) {
        let Self([empty, read, delivered]) = self;
        empty.tick();
        if view.unread().is_zero() {
            read.finish_and_clear();
        } else {
            read.set_length(view.to_read.as_secs());
            read.set_position(view.read.as_secs());
            read.set_message(view.reading());
        }
        delivered.set_length(view.delivered + view.left);
        delivered.set_position(view.delivered);
        delivered.set_message(view.delivering());
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.0.iter().for_each(ProgressBar::finish_and_clear);
    }
}

async fn is_far_behind(parts: &Parts) -> Result<bool, JournalError> {
    if !unread(parts).await?.is_zero() {
        return Ok(true);
    }
    let waiting = |store: &mut Store| store.waiting();
    Ok(parts.journal.with(waiting).await? >= u64::from(MANY))
}

/// How much of the past is still to be read, beyond the normal distance between two polls.
async fn unread(parts: &Parts) -> Result<Duration, JournalError> {
    let cursor = parts.journal.with(|store| store.poll_state()).await?.cursor;
    let seconds = match (parts.source.clock().now(), cursor) {
        (Some(now), Some(cursor)) => u64::try_from(now.unix() - cursor.unix()).unwrap_or(0),
        _ => 0,
    };
    let unread = Duration::from_secs(seconds);
    let usual = BEHIND.max(parts.settings.poll_interval * 2);
    Ok(if unread < usual {
        Duration::ZERO
    } else {
        unread
    })
}

/// Takes snapshots without making the journal count all waiting events each time.
struct Watch<'a> {
    parts: &'a Parts,
    /// The snapshot of the latest full count.
    counted: Snapshot,
}

impl<'a> Watch<'a> {
    async fn new(parts: &'a Parts) -> Result<Self, JournalError> {
        let counted = count(parts).await?;
        Ok(Self { parts, counted })
    }

    async fn snapshot(&mut self) -> Result<Snapshot, JournalError> {
        let counts = self.parts.metrics.counts();
        let (received, settled) = (counts.received, counts.settled());
        let Snapshot {
            received: received_before,
            settled: settled_before,
            waiting,
            at,
            ..
        } = self.counted;
        let waiting =
            (waiting + (received - received_before)).saturating_sub(settled - settled_before);
        if waiting < FEW || at.elapsed() >= COUNT_EVERY {
            self.counted = count(self.parts).await?;
            return Ok(self.counted);
        }
        Ok(Snapshot {
            at: Instant::now(),
            unread: unread(self.parts).await?,
            received,
            settled,
            waiting,
        })
    }
}

async fn count(parts: &Parts) -> Result<Snapshot, JournalError> {
    let unread = unread(parts).await?;
    let waiting = parts.journal.with(|store| store.waiting()).await?;
    let counts = parts.metrics.counts();
    Ok(Snapshot {
        at: Instant::now(),
        unread,
        received: counts.received,
        settled: counts.settled(),
        waiting,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unread time is assumed to have as many events as time already read.
    #[test]
    fn estimate_of_unread_events() {
        let start = Snapshot {
            at: Instant::now(),
            unread: Duration::from_secs(4000),
            received: 10,
            settled: 5,
            waiting: 7,
        };
        let mut course = Course::new(start);
        let at = |seconds| start.at + Duration::from_secs(seconds);
        let view = course.now(Snapshot {
            at: at(1),
            settled: 6,
            ..start
        });
        assert_eq!(view.delivering(), "1 of about 8, 1.0/s, - left");
        let view = course.now(Snapshot {
            at: at(2),
            unread: Duration::from_secs(3000),
            received: 110,
            settled: 25,
            waiting: 87,
        });
        assert_eq!(view.reading(), "16m 40s of 1h 6m 40s");
        assert_eq!(view.left, 87 + 300);
        assert_eq!(view.delivering(), "20 of about 407, 10/s, 39s left");
        let view = course.now(Snapshot {
            at: at(60),
            unread: Duration::ZERO,
            received: 410,
            settled: 25,
            waiting: 387,
        });
        assert_eq!(view.delivering(), "20 of 407, 0.0/s, - left");
    }

    #[test]
    fn line_is_due_while_progress_lasts() {
        let view = |read, left| View {
            read: Duration::from_secs(read),
            to_read: Duration::from_secs(100),
            delivered: 0,
            left,
            rate: Rate {
                per_second: 0.0,
                time_left: None,
            },
        };
        assert!(view(20, 90).is_further_than(&view(10, 50)));
        assert!(view(100, 40).is_further_than(&view(100, 50)));
        assert!(!view(100, 50).is_further_than(&view(100, 50)), "an outage");
        assert!(
            !view(100, 60).is_further_than(&view(100, 50)),
            "more is received than delivered"
        );
    }
}
