//! Clocks that are wrong or step: nothing is lost, no window lies in BigChat's future, and nothing is asked without pause.

use std::time::Duration;

use bigchat_sync::sim::bigchat::{Log, Mode, NextPage, Options};
use bigchat_sync::sim::our_api;

use crate::daemon::{agrees, end, message, more_told, scripted, seconds, sim};
use crate::fakes::{self, NOW, Scene, start, status, window};
use crate::harness::{side_by_side, until};

fn log(clock_offset: i64) -> Options {
    Options {
        seed: 31,
        clock_offset,
        awkward: false,
        mode: Mode::Log(Log {
            events_per_second: 40.0,
            page_size: 15,
            ..Log::default()
        }),
        ..Options::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_this_machine_is_an_hour_off_nothing_is_lost() {
    side_by_side([-3600, 3600], async |offset| {
        let (sim, bench) = sim(log(offset), our_api::Options::default()).await;
        for _ in 0..2 {
            let daemon = bench.start();
            more_told(&sim, 60).await;
            daemon.stop().await;
            // A second at the most, by which the `date` header lags.
            let ahead = bench.cursor().expect("a cursor") - seconds(&sim);
            assert!((-20..=0).contains(&ahead), "{offset}: {ahead} s");
        }
        sim.bigchat.set_quiet(true);
        let daemon = bench.start();
        agrees(&sim, &bench).await;
        daemon.stop().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_of_bigchat_that_steps_loses_nothing_and_is_polled_at_the_same_rate() {
    let (sim, bench) = sim(
        Options {
            quiet: true,
            ..Options::default()
        },
        our_api::Options::default(),
    )
    .await;
    let bench = bench.set("--poll-interval", "100ms");
    sim.bigchat.open(10, seconds(&sim) - 100, 1);
    let daemon = bench.start();
    for (n, offset) in [3600, 0, -3600, 0].into_iter().enumerate() {
        sim.bigchat.clock.set_offset(offset);
        let told = message(10, seconds(&sim) - 1, &format!("number {n}"));
        sim.bigchat.push_page(vec![told], NextPage::None);
        agrees(&sim, &bench).await;
        until("the cursor follows", async || {
            let ahead = bench.cursor().expect("a cursor") - seconds(&sim);
            (-20..=0).contains(&ahead)
        })
        .await;
        // An hour is read in one window, and then it waits again.
        let (before, since) = (sim.bigchat.polls(), std::time::Instant::now());
        until("some polls", async || sim.bigchat.polls() >= before + 5).await;
        assert!(
            since.elapsed() >= Duration::from_millis(390),
            "{offset}: {:?}",
            since.elapsed()
        );
    }
    daemon.stop().await;
}

#[tokio::test]
async fn an_event_of_the_future_does_not_drag_the_cursor_along() {
    let (sim, bench) = scripted(our_api::Options::default()).await;
    let now = seconds(&sim);
    sim.bigchat.open(10, now - 100, 1);
    let told = vec![message(10, now + 86_400, "tomorrow"), end(10, now + 3600)];
    sim.bigchat.push_page(told, NextPage::None);
    let daemon = bench.start();
    bench.until_events("delivered", 2).await;
    sim.bigchat
        .push_page(vec![message(10, now, "today")], NextPage::None);
    agrees(&sim, &bench).await;
    daemon.stop().await;
    assert!(bench.cursor() <= Some(seconds(&sim)));
}

#[tokio::test]
async fn one_wrong_date_leaves_no_gap_and_asks_for_no_future() {
    // Before each of the answers that a session begins with, and at a later one.
    side_by_side(
        [0, 1, 2, 3]
            .into_iter()
            .flat_map(|nth| [(nth, 86_400 * 365), (nth, -86_400), (nth, 7200)]),
        async |(nth, off)| {
            let scene = Scene::new().await;
            scene.bench.once().await;
            scene.bigchat.queries();
            let mut asked = 0;
            let date = std::time::UNIX_EPOCH
                + Duration::from_secs(fakes::unix(NOW + 600 + off).unsigned_abs());
            let header = format!("date: {}", httpdate::fmt_http_date(date));
            let url = fakes::tampering(&scene.bigchat.url(), move |_, answer| {
                asked += 1;
                if asked == nth + 1 {
                    fakes::with_header(&answer, "date", &header)
                } else {
                    answer
                }
            })
            .await;
            let scene = scene.set("--bigchat-url", &url);
            scene.bigchat.clock(NOW + 600);
            scene
                .bigchat
                .tells([start(42, 0), fakes::message(42, 1, "one")]);
            for _ in 0..3 {
                scene.bench.once().await;
            }
            assert_eq!(scene.our_api.messages(), ["one"]);
            let queries = scene.bigchat.queries();
            let case = format!("answer {nth} by {off} s: {queries:?}");
            assert!(
                queries[0].starts_with(window(NOW - 5, 0).split('&').next().expect("a start")),
                "{case}"
            );
            // What was read up to is never later than the time it was.
            let cursor = scene.bench.cursor().expect("a cursor");
            assert!(cursor <= fakes::unix(NOW + 600), "{case}: {cursor}");
            let last = window(NOW + 595, NOW + 600);
            assert_eq!(queries.last(), Some(&last), "{case}");
        },
    )
    .await;
}

#[tokio::test]
async fn details_of_after_a_restart_are_not_believed_whatever_the_clock_said_before() {
    side_by_side([false, true], async |was_ahead| {
        // The details come before the next poll could tell.
        let scene = Scene::new()
            .await
            .set("--poll-interval", "1s")
            .set("--retry-initial", "100ms");
        let daemon = scene.bench.start();
        let until_read = async |at| {
            until("it is read up to then", async || {
                scene.bench.is_ready() && scene.bench.cursor() == Some(fakes::unix(at))
            })
            .await;
        };
        until_read(NOW).await;
        if was_ahead {
            // By so little that it is believed at once.
            scene.bigchat.clock(NOW + 500);
            until_read(NOW + 500).await;
            scene.bigchat.further_polls(1).await;
        }
        scene.bigchat.clock(NOW + 60);
        until_read(NOW + 60).await;
        let slow = status(500).after(Duration::from_millis(300));
        scene.bigchat.upset("GET /conversations/42", slow);
        scene.bigchat.tells([fakes::message(42, 2, "of before")]);
        until("its details are asked for", async || {
            scene.bigchat.count("GET /conversations/42") == 1
        })
        .await;
        scene.bigchat.restarts(42, NOW + 61);
        scene.bench.until_events("delivered", 1).await;
        daemon.stop().await;
        assert_eq!(
            scene.our_api.chats(),
            ["42 22:00:02 - -"],
            "was ahead: {was_ahead}"
        );
    })
    .await;
}
