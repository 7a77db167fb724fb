//! Wrong or stepping clocks: nothing is lost, no window is in BigChat's future, and the poll interval stays the same.

use crate::harness::services::{
    NOW, busy_log, quiet_log, tampering, time, unix, window, with_header,
};
use crate::harness::{run_live_test, run_test, run_with, side_by_side, until};
use bigchat_sync::http::Api;
use bigchat_sync::simulator::bigchat::{Clock, Log, Options, page};
use bigchat_sync::simulator::event::{end, message, start};
use bigchat_sync::simulator::fault::{dropped, slow, status};
use std::time::Duration;

fn log(ahead: i64) -> Options {
    Options {
        clock: Clock::Ahead(ahead),
        awkward: false,
        ..busy_log(31, 40.0, 15)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_clock_an_hour_off() {
    side_by_side([-3600, 3600], async |offset| {
        run_with(log(offset), async |t| {
            for _ in 0..2 {
                let daemon = t.start();
                t.bigchat.reports_more(60).await;
                daemon.stop().await;
                // The `date` header lags by up to a second.
                let ahead = t.cursor().expect("a cursor") - t.now();
                assert!((-20..=0).contains(&ahead), "{offset}: {ahead} s");
            }
            t.bigchat.calms_down();
            t.start();
        })
        .await;
    })
    .await;
}

/// If BigChat's clock steps, nothing is lost, and the polls keep their rate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bigchat_clock_steps() {
    run_live_test(async |t| {
        t.set("--poll-interval", "100ms");
        t.bigchat.open(10, t.now() - 100, 1);
        t.start();
        for (n, offset) in [3600, 0, -3600, 0].into_iter().enumerate() {
            t.bigchat.clock_runs(offset);
            let events = message(10, t.now() - 1, &format!("number {n}"));
            t.bigchat.reports([events]);
            t.agrees().await;
            until("the cursor follows", async || {
                let ahead = t.cursor().expect("a cursor") - t.now();
                (-20..=0).contains(&ahead)
            })
            .await;
            // An hour is read in one window, followed by the usual wait.
            let (before, since) = (t.bigchat.polls(), std::time::Instant::now());
            until("some polls", async || t.bigchat.polls() >= before + 5).await;
            assert!(
                since.elapsed() >= Duration::from_millis(390),
                "{offset}: {:?}",
                since.elapsed()
            );
        }
    })
    .await;
}

/// An event in the future does not move the cursor.
#[tokio::test]
async fn event_of_the_future() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        let events = vec![message(10, now + 86_400, "tomorrow"), end(10, now + 3600)];
        t.bigchat.reports(events);
        let daemon = t.start();
        t.until_events("delivered", 2).await;
        t.bigchat.reports([message(10, now, "today")]);
        t.agrees().await;
        daemon.stop().await;
        assert!(t.cursor() <= Some(t.now()));
    })
    .await;
}

/// One wrong date leaves no gap, and no window is in the future.
#[tokio::test]
async fn one_wrong_date() {
    // The wrong date is in one of the first three responses of a session, or in a later one.
    side_by_side(
        [0, 1, 2, 3]
            .into_iter()
            .flat_map(|nth| [(nth, 86_400 * 365), (nth, -86_400), (nth, 7200)]),
        async |(nth, off)| {
            run_test(async |t| {
                t.once().await;
                t.bigchat.queries();
                let mut asked = 0;
                let date = std::time::UNIX_EPOCH
                    + Duration::from_secs(unix(NOW + 600 + off).unsigned_abs());
                let header = format!("date: {}", httpdate::fmt_http_date(date));
                let url = tampering(&t.bigchat.url(), move |_, answer| {
                    asked += 1;
                    if asked == nth + 1 {
                        with_header(&answer, "date", &header)
                    } else {
                        answer
                    }
                })
                .await;
                t.set("--bigchat-url", &url);
                t.bigchat.clock(NOW + 600);
                t.bigchat.reports([start(42, 0), message(42, 1, "one")]);
                for _ in 0..3 {
                    t.once().await;
                }
                assert_eq!(t.our_api.messages(), ["one"]);
                let queries = t.bigchat.queries();
                let case = format!("answer {nth} by {off} s: {queries:?}");
                assert!(
                    queries[0].starts_with(window(NOW - 5, 0).split('&').next().expect("a start")),
                    "{case}"
                );
                // The cursor is never ahead of the true time.
                let cursor = t.cursor().expect("a cursor");
                assert!(cursor <= NOW + 600, "{case}: {cursor}");
                let last = window(NOW + 595, NOW + 600);
                assert_eq!(queries.last(), Some(&last), "{case}");
            })
            .await;
        },
    )
    .await;
}

/// Details read after a restart are not used for an event from before the restart, even if the clock was wrong.
#[tokio::test]
async fn details_from_after_a_restart() {
    side_by_side([false, true], async |was_ahead| {
        // The details are read before the next poll can notice the restart.
        run_test(async |t| {
            t.set("--poll-interval", "1s")
                .set("--retry-initial", "100ms");
            let daemon = t.start();
            t.until_cursor(NOW).await;
            if was_ahead {
                // The difference is so small that the date is believed immediately.
                t.bigchat.clock(NOW + 500);
                t.until_cursor(NOW + 500).await;
                t.bigchat.further_polls(1).await;
            }
            t.bigchat.clock(NOW + 60);
            t.until_cursor(NOW + 60).await;
            let slow = status(500).after(Duration::from_millis(300));
            t.bigchat.upset("GET /conversations/42", slow);
            t.bigchat.reports([message(42, 2, "of before")]);
            until("its details are asked for", async || {
                t.bigchat.count("GET /conversations/42") == 1
            })
            .await;
            t.bigchat.restarts(42, NOW + 61);
            t.until_events("delivered", 1).await;
            daemon.stop().await;
            assert_eq!(
                t.our_api.chats(),
                ["42 22:00:02 - -"],
                "was ahead: {was_ahead}"
            );
        })
        .await;
    })
    .await;
}

/// Before BigChat has answered, this machine's clock does not move the cursor, because it may be wrong.
#[tokio::test]
async fn machine_clock_behind_and_no_answer() {
    run_live_test(async |t| {
        t.bigchat.clock_runs(500);
        t.once().await;
        let before = t.cursor();
        t.bigchat.outage(Some(dropped()));
        let daemon = t.start();
        until("BigChat is down", async || {
            t.is_up(Api::BigChat) == Some(false)
        })
        .await;
        daemon.stop().await;
        assert_eq!(t.cursor(), before);
        t.bigchat.outage(None);
    })
    .await;
}

/// A new process reads the time since the last poll, although BigChat's clock was ahead at that poll.
#[tokio::test]
async fn clock_corrected_between_processes() {
    // How far the clock was ahead, how long ago that was, and how long ago the event happened.
    side_by_side([(300, 60, 30), (9, 20, 18)], async |(ahead, ago, age)| {
        run_with(quiet_log(Log::default()), async |t| {
            // The poll is made to look `ago` seconds old.
            t.bigchat.clock_runs(ahead - ago);
            t.once().await;
            let millis = ago * 1000;
            t.execute(&format!(
                "UPDATE poll_state SET read_at = read_at - {millis}"
            ));
            t.bigchat.clock_runs(0);
            t.bigchat
                .reports_event(message(1, t.now() - age, "meanwhile"));
            t.once().await;
            assert_eq!(t.our_api.messages(), ["meanwhile"], "{ahead}");
        })
        .await;
    })
    .await;
}

/// When BigChat's clock steps back, the time since the last poll is read, although the cursor is ahead of the new time.
#[tokio::test]
async fn time_before_a_step_back_is_read() {
    run_live_test(async |t| {
        t.set("--poll-interval", "3s").set("--poll-overlap", "1s");
        t.bigchat.clock_runs(300);
        t.start();
        t.until_polled().await;
        t.bigchat.clock_runs(0);
        let stepped = t.now();
        t.bigchat.further_polls(3).await;
        let start = |window: &str| window.split('&').next().map(str::to_owned);
        let queries = t.bigchat.queries();
        let read = queries
            .iter()
            .any(|query| start(query) <= start(&window(stepped, 0)));
        assert!(read, "{stepped}: {queries:?}");
    })
    .await;
}

/// If BigChat's clock is set back beyond the retention, events that were dropped are not delivered again, and others
/// are.
#[tokio::test]
async fn clock_set_back_beyond_the_retention() {
    let options = Options {
        clock: Clock::Still(NOW),
        ..quiet_log(Log::default())
    };
    run_with(options, async |t| {
        t.set("--retention", "1s").set("--max-window", "10s");
        t.bigchat.open(10, NOW - 4, 1);
        let report = |events: [_; 2]| events.into_iter().for_each(|e| t.bigchat.reports_event(e));
        report([start(10, NOW - 4), message(10, NOW - 3, "one")]);
        t.start();
        t.until_events("delivered", 2).await;
        t.execute("UPDATE deliveries SET delivered_at = delivered_at - 7200000");
        t.bigchat.clock(NOW + 200);
        until("the events are dropped", async || {
            t.value::<i64>("SELECT count(*) FROM events") == 0
        })
        .await;
        report([message(10, NOW - 3, "new"), end(10, NOW - 2)]);
        t.our_api.asked();
        t.bigchat.clock(NOW - 1);
        t.until_events("delivered", 4).await;
        let mut messages = t.our_api.messages();
        messages.sort();
        assert_eq!(messages, ["new", "one"]);
        let asked = t.our_api.asked();
        let reads = asked.iter().filter(|line| line.starts_with("GET"));
        assert_eq!(reads.count(), 2, "the chat and its messages: {asked:?}");
    })
    .await;
}

/// An event that BigChat reports again in the overlap is not delivered again, however short the retention.
#[tokio::test]
async fn old_event_repeated_in_the_overlap() {
    run_test(async |t| {
        t.set("--retention", "0s").set("--max-window", "10s");
        t.start();
        t.until_polled().await;
        t.bigchat.clock(NOW + 100);
        t.until_cursor(NOW + 100).await;
        t.bigchat.clock(NOW + 101);
        let events = || [start(42, 0), message(42, 5, "one")];
        t.bigchat.reports(events());
        t.until_events("delivered", 2).await;
        // Old events are dropped after each poll.
        t.bigchat.further_polls(3).await;
        t.bigchat.reports(events());
        t.bigchat.further_polls(3).await;
        until("no event waits", async || t.events("waiting") == 0).await;
        assert_eq!(t.our_api.messages(), ["one"]);
    })
    .await;
}

/// A page waits for BigChat's answer to the probe, and BigChat's clock, which was ahead, is corrected meanwhile. The
/// time since that page is read, by the same process or the next.
#[tokio::test]
async fn clock_corrected_while_a_page_waits() {
    side_by_side([false, true], async |is_killed| {
        run_with(quiet_log(Log::default()), async |t| {
            t.set("--poll-overlap", "1s").set("--retry-max", "1m");
            t.bigchat.clock_runs(300);
            let daemon = t.start();
            until("a poll", async || {
                t.is_ready() && t.value("SELECT polled_at IS NOT NULL FROM poll_state")
            })
            .await;
            let details = "GET /conversations/{id}";
            t.bigchat.upset(details, status(500).always());
            let before = t.bigchat.count(details);
            until("a page waits", async || {
                t.bigchat.count(details) > before + 12
                    && t.value("SELECT count(*) = 1 FROM inbox WHERE NOT ingested")
            })
            .await;
            if is_killed {
                daemon.crash(t).await;
            }
            t.bigchat.clock_runs(0);
            tokio::time::sleep(Duration::from_millis(1500)).await;
            t.bigchat.reports_event(message(1, t.now(), "meanwhile"));
            tokio::time::sleep(Duration::from_secs(4)).await;
            t.bigchat.calm();
            if is_killed {
                t.start();
            }
            t.until_events("delivered", 1).await;
        })
        .await;
    })
    .await;
}

/// A new process reads the time since the last poll began, although that poll took long and BigChat's clock was ahead.
#[tokio::test]
async fn clock_corrected_after_a_slow_poll() {
    run_test(async |t| {
        t.set("--poll-overlap", "1s");
        t.once().await;
        t.bigchat.clock(NOW + 300);
        t.bigchat.reports(page([message(42, 1, "one")], "?page=2"));
        t.bigchat.reports([message(42, 2, "two")]);
        t.bigchat
            .upset("GET /events?page=2", slow(Duration::from_secs(5)));
        t.once().await;
        t.bigchat.queries();
        // Without the error of the clock, the poll began at `NOW`.
        t.bigchat.clock(NOW + 5);
        t.once().await;
        let queries = t.bigchat.queries();
        let start = |window: &str| window.split('&').next().map(str::to_owned);
        assert!(start(&queries[0]) <= start(&window(NOW, 0)), "{queries:?}");
    })
    .await;
}

/// A window that was computed when BigChat's clock was ahead is read to its end by a later process. The time since the
/// window was computed is read.
#[tokio::test]
async fn clock_corrected_within_a_window() {
    run_test(async |t| {
        t.once().await;
        t.bigchat.clock(NOW + 300);
        t.bigchat.reports(page([message(42, 1, "one")], "?page=2"));
        t.bigchat.reports([message(42, 2, "two")]);
        t.bigchat.upset("GET /events?page=2", status(500).times(3));
        t.once().await;
        // Without the error of the clock, the window was computed at `NOW`, and 301 s have passed.
        t.execute("UPDATE poll_state SET window_at = window_at - 301000");
        t.execute("UPDATE poll_state SET read_at = read_at - 301000");
        t.bigchat.clock(NOW + 301);
        t.bigchat.queries();
        t.once().await;
        let queries = t.bigchat.queries();
        assert_eq!(queries[0], "page=2");
        let start = |window: &str| window.split('&').next().map(str::to_owned);
        assert!(start(&queries[1]) <= start(&window(NOW, 0)), "{queries:?}");
    })
    .await;
}

/// Until BigChat has answered, this machine's clock does not determine where reading begins. It begins at `--since`, or
/// 10 s before the first start.
#[tokio::test]
async fn machine_clock_behind_at_the_first_start() {
    side_by_side([(None, 70), (Some(300), 300)], async |(since, age)| {
        run_live_test(async |t| {
            t.bigchat.clock_runs(86_400);
            if let Some(since) = since {
                t.set("--since", &time(t.now() - since));
            }
            t.bigchat.outage(Some(dropped()));
            t.once().await;
            assert_eq!(t.cursor(), None);
            // As if the first start had been a minute ago.
            t.execute("UPDATE poll_state SET read_at = read_at - 60000");
            t.bigchat.outage(None);
            t.bigchat.queries();
            let began = t.now() - age;
            t.once().await;
            let queries = t.bigchat.queries();
            assert_eq!(queries.len(), 1, "{since:?}: {queries:?}");
            let start = |window: &str| window.split('&').next().map(str::to_owned);
            let (earliest, latest) = (window(began - 3, 0), window(began + 3, 0));
            let possible = start(&earliest)..=start(&latest);
            assert!(
                possible.contains(&start(&queries[0])),
                "{since:?}: {queries:?}"
            );
        })
        .await;
    })
    .await;
}
