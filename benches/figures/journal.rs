//! The journal alone, without a daemon: the time to store an event, and to claim it and commit its delivery.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bigchat_sync::domain::progress::{
    Due, Effect, EventOutcome, Observation, Outcome, Report, Work, advance,
};
use bigchat_sync::domain::time::Millis;
use bigchat_sync::journal::{ClaimRequest, Intervals, Store};

use crate::backlog::{usual, waiting};
use crate::{Scale, row};

/// How many conversations are claimed and committed together, as the daemon does under load.
const TOGETHER: usize = 256;

pub(crate) fn measure(scale: Scale) {
    let conversations = scale.of(5_000);
    let events = conversations * 20;
    let began = Instant::now();
    let (_directory, db) = waiting(conversations, usual);
    let stored = began.elapsed();
    let mut store = Store::open(&db).expect("a database");
    let session = store
        .start_session(Intervals::default(), Millis::now())
        .expect("a session");
    let mut delivered = 0;
    let began = Instant::now();
    loop {
        let request = ClaimRequest {
            verifications_only: false,
            idle_pass: None,
            probe: false,
            conversations: TOGETHER,
            bytes: usize::MAX,
            exclude: HashSet::new(),
            session: session.id,
            clock_set_back: false,
            request_timeout: Duration::ZERO,
            max_wait: Duration::MAX,
        };
        let claimed = store.claim(&request, Millis::now()).expect("a claim");
        let reports: Vec<Report> = claimed.work.into_iter().map(done).collect();
        if reports.is_empty() {
            break;
        }
        delivered += i64::try_from(reports.len()).expect("few");
        store
            .commit(&reports, session.id, Millis::now())
            .expect("it is committed");
    }
    let committed = began.elapsed();
    assert_eq!(delivered, conversations);
    assert_eq!(store.waiting().expect("a number"), 0);
    let each =
        |time: std::time::Duration| format!("{:.2} µs", time.as_secs_f64() * 1e6 / events as f64);
    row("the journal alone: store an event", &each(stored), "");
    row(
        "the journal alone: claim an event and commit its delivery",
        &each(committed),
        "≤ 0.5 µs",
    );
}

fn done(work: Work) -> Report {
    let outcomes: Vec<EventOutcome> = work
        .events
        .iter()
        .map(|event| EventOutcome::of(event, Outcome::Delivered(Effect::MessageAdded)))
        .collect();
    Report {
        advance: advance(&work.claim, &work.events, &outcomes),
        conversation: work.conversation,
        claim: work.claim,
        outcomes,
        consumed: Vec::new(),
        observation: Observation::None,
        becomes_stale: false,
        due: Due::IfWaiting,
        writes_succeeded: 0,
        verify: None,
        found: None,
        drift: None,
        missing: None,
    }
}
