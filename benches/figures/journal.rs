//! The journal's share: what it takes to keep an event, and to claim and settle it, without a daemon around it.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bigchat_sync::conversation::{Outcome, Sent, Settlement, Work};
use bigchat_sync::journal::{Claim, Claimable, Store};
use bigchat_sync::time::Millis;

use crate::backlog::{usual, waiting};
use crate::{Scale, row};

/// How many conversations are claimed ahead, and how many settled together: as the daemon does under load.
const AHEAD: usize = 72;
const TOGETHER: usize = 32;

pub(crate) fn measure(scale: Scale) {
    let conversations = scale.of(5_000);
    let events = conversations * 20;
    let began = Instant::now();
    let (_directory, db) = waiting(conversations, usual);
    let kept = began.elapsed();
    let mut store = Store::open(&db).expect("a database");
    store
        .start_session(Duration::ZERO, Millis::now())
        .expect("a session");
    let mut claimed: VecDeque<Work> = VecDeque::new();
    let (mut settlements, mut settled) = (Vec::new(), 0);
    let began = Instant::now();
    loop {
        settled += i64::try_from(settlements.len()).expect("few");
        let claim = Claim {
            probes: false,
            what: Claimable::All,
            conversations: AHEAD - claimed.len(),
            bytes: usize::MAX,
            put_off: HashMap::new(),
        };
        let claims = store
            .settle_and_claim(&settlements, settled, Some(&claim), Millis::now())
            .expect("it is kept");
        claimed.extend(claims.work);
        settlements = claimed
            .drain(..TOGETHER.min(claimed.len()))
            .map(done)
            .collect();
        if settlements.is_empty() {
            break;
        }
    }
    let delivered = began.elapsed();
    assert_eq!(settled, conversations);
    assert_eq!(store.waiting().expect("a number"), 0);
    let each = |time: Duration| format!("{:.1} µs", time.as_secs_f64() * 1e6 / events as f64);
    row("the journal alone: to keep an event", &each(kept), "");
    row(
        "the journal alone: to claim and settle it",
        &each(delivered),
        "",
    );
}

fn done(work: Work) -> Settlement {
    let outcomes = work
        .events
        .iter()
        .map(|event| event.settled(Outcome::Delivered(Sent::Message)));
    Settlement {
        outcomes: outcomes.collect(),
        conversation: work.conversation,
        finding: None,
    }
}
