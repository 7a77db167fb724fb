//! Catching up after a downtime or an outage, as it is seen: bars on a terminal, a line of the log now and then anywhere
//! else.
//!
//! What BigChat has not told yet is taken to be as much for each hour as what it told so far.

use std::convert::Infallible;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar};
use tokio::time::{Instant, sleep};

use super::parts::Parts;
use crate::journal::{JournalError, Store};
use crate::telemetry::pace::{Rate, RateEstimate, in_words};
use crate::telemetry::terminal::{Terminal, styled};

/// How often it is looked whether there is much to be caught up with, and how far that is.
const LOOK: Duration = Duration::from_secs(1);

/// How often a bar moves.
const FRAME: Duration = Duration::from_millis(200);

/// How often there is a line where no bar can be seen.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Who is so far behind BigChat has been down. (Twice the interval at which it is asked, where that is longer.)
const BEHIND: Duration = Duration::from_secs(60);

/// So many events that wait take some seconds.
const MANY: u32 = 1000;

/// So few are as good as none.
const FEW: u64 = 100;

/// How often all that waits is counted.
const COUNT_EVERY: Duration = Duration::from_secs(10);

/// What a bar shows.
const BAR: &str = "  {prefix:<10}{wide_bar:.cyan/dim}  {msg:<40}";

/// Where it stands at one moment.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    /// How much of the past is still to be read.
    unread: Duration,
    /// Events told since the daemon started.
    told: u64,
    /// Events delivered or failed since the daemon started.
    settled: u64,
    /// Events that wait.
    waiting: u64,
}

/// The way from where it began.
#[derive(Debug)]
struct Course {
    began: Look,
    /// The longest there was to be read.
    to_read: Duration,
    pace: RateEstimate,
}

/// What there is to be seen.
#[derive(Debug, PartialEq)]
struct View {
    read: Duration,
    to_read: Duration,
    delivered: u64,
    /// Events that wait, and those that can be expected of what is not read yet.
    left: u64,
    rate: Rate,
}

impl Course {
    fn new(began: Look) -> Self {
        Self {
            began,
            to_read: began.unread,
            pace: RateEstimate::new(began.at, began.settled),
        }
    }

    fn now(&mut self, look: Look) -> View {
        self.to_read = self.to_read.max(look.unread);
        let read = self.to_read - look.unread;
        let told = look.told - self.began.told;
        let untold = match (read.as_secs_f64(), look.unread.as_secs_f64()) {
            (_, 0.0) => Some(0),
            (0.0, _) => None,
            (read, unread) => Some((told as f64 * unread / read) as u64),
        };
        let left = untold.map(|untold| look.waiting + untold);
        View {
            read,
            to_read: self.to_read,
            delivered: look.settled - self.began.settled,
            left: left.unwrap_or(look.waiting),
            rate: self.pace.now(look.at, look.settled, left),
        }
    }
}

impl View {
    /// Whether less is to be done than before. It is not in an outage, nor where more is told than can be delivered.
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

/// Shows it whenever there is much to be caught up with.
pub(super) async fn show(parts: &Parts, terminal: Option<&Terminal>) -> Infallible {
    loop {
        // A journal that refuses is told of by those who cannot work without it.
        if let Ok(true) = is_far_behind(parts).await {
            catch_up(parts, terminal).await.ok();
        }
        sleep(LOOK).await;
    }
}

/// Shows it until little is left.
async fn catch_up(parts: &Parts, terminal: Option<&Terminal>) -> Result<(), JournalError> {
    let mut watch = Watch::new(parts).await?;
    let began = watch.counted;
    let mut course = Course::new(began);
    let mut shown = match terminal.and_then(Terminal::picture) {
        Some(picture) => Shown::Bars(Bars::new(picture)),
        None => Shown::Lines(None, began.at),
    };
    loop {
        sleep(shown.interval()).await;
        let look = watch.look().await?;
        let view = course.now(look);
        if look.unread.is_zero() && look.waiting < FEW {
            if !matches!(shown, Shown::Lines(None, _)) {
                tracing::info!(
                    delivered = view.delivered,
                    seconds = (look.at - began.at).as_secs(),
                    "caught up"
                );
            }
            return Ok(());
        }
        shown.show(view, look.at);
    }
}

/// How it is seen: bars, or the last line and when it was due.
enum Shown {
    Bars(Bars),
    Lines(Option<View>, Instant),
}

impl Shown {
    fn interval(&self) -> Duration {
        match self {
            Self::Bars(_) => FRAME,
            Self::Lines(..) => LOOK,
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

/// Two bars, as long as there is something to show.
struct Bars([ProgressBar; 3]);

impl Bars {
    fn new(picture: &MultiProgress) -> Self {
        let add = |bar: ProgressBar| picture.add(bar);
        Self([
            // A ^C that somebody types pushes the picture up by a line, which then stays: an empty one.
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

/// How much of the past is still to be read, beyond what is so between two polls.
async fn unread(parts: &Parts) -> Result<Duration, JournalError> {
    let cursor = parts.journal.with(|store| store.source()).await?.cursor;
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

/// Looks where it stands, without having the journal count all that waits each time.
struct Watch<'a> {
    parts: &'a Parts,
    /// When all was counted last.
    counted: Look,
}

impl<'a> Watch<'a> {
    async fn new(parts: &'a Parts) -> Result<Self, JournalError> {
        let counted = count(parts).await?;
        Ok(Self { parts, counted })
    }

    async fn look(&mut self) -> Result<Look, JournalError> {
        let counters = self.parts.metrics.counters();
        let (told, settled) = (counters.told.get(), counters.settled());
        let Look {
            told: told_before,
            settled: settled_before,
            waiting,
            at,
            ..
        } = self.counted;
        let waiting = (waiting + (told - told_before)).saturating_sub(settled - settled_before);
        if waiting < FEW || at.elapsed() >= COUNT_EVERY {
            self.counted = count(self.parts).await?;
            return Ok(self.counted);
        }
        Ok(Look {
            at: Instant::now(),
            unread: unread(self.parts).await?,
            told,
            settled,
            waiting,
        })
    }
}

async fn count(parts: &Parts) -> Result<Look, JournalError> {
    let unread = unread(parts).await?;
    let waiting = parts.journal.with(|store| store.waiting()).await?;
    Ok(Look {
        at: Instant::now(),
        unread,
        told: parts.metrics.counters().told.get(),
        settled: parts.metrics.counters().settled(),
        waiting,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_read_yet_is_taken_to_be_like_what_is() {
        let start = Look {
            at: Instant::now(),
            unread: Duration::from_secs(4000),
            told: 10,
            settled: 5,
            waiting: 7,
        };
        let mut course = Course::new(start);
        let at = |seconds| start.at + Duration::from_secs(seconds);
        let view = course.now(Look {
            at: at(1),
            settled: 6,
            ..start
        });
        assert_eq!(view.delivering(), "1 of about 8, 1.0/s, - left");
        let view = course.now(Look {
            at: at(2),
            unread: Duration::from_secs(3000),
            told: 110,
            settled: 25,
            waiting: 87,
        });
        assert_eq!(view.reading(), "16m 40s of 1h 6m 40s");
        assert_eq!(view.left, 87 + 300);
        assert_eq!(view.delivering(), "20 of about 407, 10/s, 39s left");
        let view = course.now(Look {
            at: at(60),
            unread: Duration::ZERO,
            told: 410,
            settled: 25,
            waiting: 387,
        });
        assert_eq!(view.delivering(), "20 of 407, 0.0/s, - left");
    }

    #[test]
    fn a_line_is_due_only_for_what_goes_on() {
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
            "more is told than is delivered"
        );
    }
}
