//! BigChat restarts and reuses its ids. OurAPI loses its data, is down, and recovers.

use crate::harness::process::Process;
use crate::harness::services::{BigChat, NOW, seeded};
use crate::harness::{Test, run_live_test, run_test, run_with, side_by_side, until};
use bigchat_sync::simulator::bigchat::{NextPage, Options, Page, raw};
use bigchat_sync::simulator::event::{message, start, transfer};
use bigchat_sync::simulator::fault::{
    Fault, crashed, cut_off, dropped, html, paused, slow, status,
};
use std::time::Duration;

/// Repeated restarts of BigChat do not mix up epochs.
#[tokio::test]
async fn bigchat_restarts_again_and_again() {
    run_with(seeded(11), async |t| {
        let daemon = t.start();
        for _ in 0..3 {
            t.bigchat.reports_more(40).await;
            t.bigchat.restarts_between_polls().await;
        }
        t.bigchat.reports_more(40).await;
        t.bigchat.calms_down();
        t.agrees().await;
        daemon.stop().await;
        assert_eq!(t.restarts(), 3);
    })
    .await;
}

/// A restart is noticed even if only a message is reported after it.
#[tokio::test]
async fn restart_while_daemon_is_stopped() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.reports_event(message(1, now, "of before"));
        t.once().await;
        t.bigchat.restart();
        let now = t.now();
        t.bigchat.reports_event(message(1, now, "of after"));
        t.once().await;
        let report = t.compare();
        assert!(report.is_clean(), "{report}");
        assert_eq!(report.fallbacks(), 0);
        assert_eq!(t.our_api.chats().len(), 2);
    })
    .await;
}

/// Lets this many requests for events pass. The next one waits for [`Test::resume`].
fn pause_after(faults: &BigChat, passing: usize) {
    let as_ever = slow(Duration::ZERO);
    faults.upset("GET /events", as_ever.times(passing));
    faults.upset("GET /events", paused());
}

/// Waits until the daemon has received the first of two pages, with a message of conversation 2 and one of 3, and has
/// requested the second.
async fn half_a_poll(t: &Test) -> &BigChat {
    let faults = &t.bigchat;
    faults.hold(true);
    pause_after(faults, 1);
    let now = t.now();
    t.bigchat.open(2, now - 100, 1);
    t.bigchat.open(3, now - 100, 2);
    let of_before = vec![message(2, now, "of before"), message(3, now, "of before")];
    let next = NextPage::Usual;
    t.bigchat.reports(Page::Events(of_before, next));
    faults.hold(false);
    until("half a poll", async || faults.pausing() == 1).await;
    faults
}

/// A restart between two pages does not mix up epochs.
#[tokio::test]
async fn restart_between_two_pages() {
    run_live_test(async |t| {
        t.start();
        t.until_polled().await;
        // BigChat restarts between the first page and the second one.
        let faults = half_a_poll(t).await;
        t.bigchat.restart();
        let now = t.now();
        // The new epoch has used the ids up to 2 so far.
        t.bigchat.open(2, now, 1);
        let of_after = vec![message(1, now, "of after"), message(2, now, "of after")];
        t.bigchat.reports(of_after);
        faults.resume();
        t.agrees().await;
        assert_eq!(t.our_api.chats().len(), 4);
    })
    .await;
}

/// A page that is refused after a restart does not mix up epochs.
#[tokio::test]
async fn restart_before_a_refused_page() {
    run_live_test(async |t| {
        t.start();
        t.until_polled().await;
        let faults = half_a_poll(t).await;
        t.bigchat.restart();
        for _ in 0..3 {
            t.bigchat.reports(raw("no page"));
        }
        let now = t.now();
        t.bigchat.open(2, now, 1);
        let of_after = vec![message(1, now, "of after"), message(2, now, "of after")];
        t.bigchat.reports(of_after);
        faults.resume();
        t.until_events("delivered", 4).await;
        t.agrees().await;
        assert_eq!(t.our_api.chats().len(), 4);
    })
    .await;
}

/// One 404 for the details of a conversation does not put a page of the new epoch into the old one.
#[tokio::test]
async fn stray_404_after_a_restart() {
    run_live_test(async |t| {
        t.start();
        let now = t.now();
        t.bigchat.open(2, now - 100, 1);
        t.bigchat.reports([message(2, now, "of before")]);
        t.until_events("delivered", 1).await;
        t.bigchat.hold(true);
        t.bigchat.restart();
        t.bigchat.open(2, now, 1);
        t.bigchat.upset("GET /conversations/2", status(404));
        t.bigchat.reports([message(2, now, "of after")]);
        t.bigchat.hold(false);
        t.until_events("delivered", 2).await;
        t.agrees().await;
        assert_eq!(t.our_api.chats().len(), 2);
    })
    .await;
}

/// Reports messages of a conversation on two pages. The second page begins with the last message of the first, as if
/// the pages had shifted. BigChat restarts before the next poll.
async fn restart_among_shifted_pages(t: &Test, conversation: i64) {
    let faults = &t.bigchat;
    faults.hold(true);
    pause_after(faults, 2);
    let now = t.now();
    let say = |text| message(conversation, now, text);
    t.bigchat
        .reports(Page::Events(vec![say("one"), say("two")], NextPage::Usual));
    t.bigchat.reports([say("two"), say("three")]);
    faults.hold(false);
    until("the third request", async || faults.pausing() == 1).await;
    t.bigchat.restart();
    faults.resume();
}

/// If pages shift before a restart, no message is stored twice.
#[tokio::test]
async fn pages_shift_before_a_restart() {
    run_live_test(async |t| {
        t.differs("scripted pages imitate a log that shifts");
        t.start();
        t.until_polled().await;
        t.bigchat.open(3, t.now() - 100, 2);
        restart_among_shifted_pages(t, 3).await;
        t.until_events("delivered", 3).await;
        let held: Vec<_> = t.our_api.data().messages.into_values().collect();
        let texts: Vec<_> = held.iter().flatten().map(|message| &message.text).collect();
        assert_eq!(texts, ["one", "two", "three"]);
    })
    .await;
}

/// A page belongs to the epoch that is verified after the page has arrived.
#[tokio::test]
async fn page_before_a_restart() {
    run_live_test(async |t| {
        t.differs("scripted pages imitate a log that shifts");
        t.start();
        t.until_polled().await;
        t.bigchat.restart();
        until("the restart is noticed", async || t.restarts() == 1).await;
        // Each epoch has this conversation, and the times are those of the restart, so nothing on the page shows its
        // epoch.
        restart_among_shifted_pages(t, 1).await;
        t.until_events("delivered", 3).await;
        until("the restart is noticed", async || t.restarts() == 2).await;
        // No command shows the epoch of an event.
        let epochs: i64 = t.value(
            "SELECT min(c.epoch) * max(c.epoch) FROM event_states e
         JOIN conversations c ON c.id = e.conversation",
        );
        assert_eq!(epochs, 4, "all of them of the second epoch");
    })
    .await;
}

/// A page belongs to the epoch before the restart although BigChat restarted within the second that `date` may lag, and
/// knows the conversation again: the conversation started later, or the page repeats a message of the previous epoch.
#[tokio::test]
async fn restart_right_after_a_page() {
    side_by_side([(5, false), (1, true)], async |(started, repeats)| {
        run_test(async |t| {
            t.start();
            let known = message(42, NOW - 3, "one");
            t.delivers([start(42, 0), known.clone()]).await;
            t.bigchat.hold(true);
            pause_after(&t.bigchat, 1);
            let new = message(42, NOW - 1, "two");
            let events = [repeats.then_some(known), Some(new)];
            let events = events.into_iter().flatten().collect();
            t.bigchat.reports(Page::Events(events, NextPage::Usual));
            t.bigchat.hold(false);
            until("the page is served", async || t.bigchat.pausing() == 1).await;
            t.bigchat.clock(NOW + 10);
            t.bigchat.state().restart_at(NOW + 1);
            t.bigchat.open(42, NOW + started, 8);
            t.bigchat.resume();
            t.until_events("delivered", 3).await;
            assert_eq!(t.restarts(), 1);
            assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1"], "{started}");
            assert_eq!(t.our_api.messages(), ["one", "two"], "{started}");
        })
        .await;
    })
    .await;
}

/// As long as BigChat may have restarted and does not answer for its conversations, its events wait.
#[tokio::test]
async fn no_details_after_a_restart() {
    run_live_test(async |t| {
        t.set("--retry-max", "1m");
        let daemon = Process::start(t);
        let now = t.now();
        t.bigchat.open(2, now - 100, 1);
        t.bigchat.reports([message(2, now, "of before")]);
        t.until_events("delivered", 1).await;
        t.bigchat.hold(true);
        t.bigchat.restart();
        t.bigchat.open(2, now, 1);
        // Of 40 polls, which take two seconds.
        t.bigchat
            .upset("GET /conversations/{id}", status(500).times(240));
        t.bigchat.reports([message(2, now, "of after")]);
        t.bigchat.hold(false);
        t.until_events("delivered", 2).await;
        t.agrees().await;
        assert_eq!(daemon.lines_with("new events wait until it does"), 1);
        assert!(daemon.stop().await.success());
        assert_eq!(t.our_api.chats().len(), 2);
    })
    .await;
}

/// Chats that OurAPI has lost are rebuilt.
#[tokio::test]
async fn losses_of_all_kinds() {
    run_with(
        Options {
            active: 8,
            ..seeded(13)
        },
        async |t| {
            t.start();
            t.bigchat.reports_more(80).await;
            t.our_api.loses_everything();
            t.bigchat.reports_more(40).await;
            t.our_api.loses_agents();
            t.bigchat.reports_more(40).await;
            t.our_api.loses_chat("1");
            let now = t.now();
            t.bigchat.reports_event(message(1, now, "are you there?"));
            t.bigchat.reports_more(80).await;
            t.bigchat.calms_down();
        },
    )
    .await;
}

/// An OurAPI that answers 404 to everything is down, and nothing counts as lost.
#[tokio::test]
async fn our_api_answers_404_to_everything() {
    run_with(seeded(14), async |t| {
        let daemon = t.start();
        t.bigchat.reports_more(40).await;
        t.our_api.outage(Some(status(404)));
        t.bigchat.reports_more(40).await;
        t.our_api.outage(None);
        t.bigchat.calms_down();
        t.agrees().await;
        daemon.stop().await;
        assert_eq!(t.losses(), 0);
    })
    .await;
}

/// Outages spend no attempts, and are probed with one request at a time.
#[tokio::test]
async fn outages_of_each_kind() {
    for (fault, what) in [
        (dropped(), "connections dropped"),
        (crashed(), "500"),
        (status(401), "401"),
        (status(503), "503"),
        (html(), "HTML"),
    ] {
        run_with(
            Options {
                awkward: false,
                ..seeded(15)
            },
            async |t| {
                t.set("--max-attempts", "1").set("--retry-max", "40ms");
                let daemon = t.start();
                t.bigchat.reports_more(30).await;
                t.our_api.outage(Some(fault));
                let before = t.our_api.total();
                until("probes", async || t.our_api.total() > before + 20).await;
                t.bigchat.reports_more(30).await;
                t.our_api.outage(None);
                t.bigchat.calms_down();
                t.agrees().await;
                daemon.stop().await;
                assert_eq!(t.events("failed"), 0, "{what}");
                assert_eq!(t.our_api.max_at_once(), 1, "{what}");
            },
        )
        .await;
    }
}

/// Memory does not grow during an outage, and no burst of requests follows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_requests_of_outage() {
    run_live_test(async |t| {
        t.set("--retry-max", "1s");
        let now = t.now();
        t.our_api.outage(Some(status(503)));
        let daemon = Process::start(t);
        let report = |poll: i64, count: i64| {
            let event = |n: i64| {
                let text = format!("number {n} of {poll} {}", "x".repeat(10_000));
                message(10 + n, now - 5, &text)
            };
            t.bigchat.reports((0..count).map(event));
        };
        (10..30).for_each(|id| t.bigchat.open(id, now - 100, 1));
        report(0, 20);
        t.until_events("waiting", 20).await;
        let before = daemon.mebibytes("VmRSS");
        for poll in 1..=40 {
            report(poll, 20);
        }
        t.until_events("waiting", 41 * 20).await;
        let probes = t.our_api.total();
        until("more probes", async || t.our_api.total() > probes + 3).await;
        let grown = daemon.mebibytes("VmRSS").saturating_sub(before);
        assert!(
            grown < 8,
            "8 MB are waiting, and memory has grown by {grown} MiB"
        );
        assert_eq!(t.our_api.max_at_once(), 0, "none was carried out");
        assert_eq!(t.counted_attempts(), 0);
        // The waiting events are not all sent at once after the outage.
        t.our_api.outage(None);
        t.agrees().await;
        assert_eq!(t.our_api.max_at_once(), 1);
        assert!(daemon.stop().await.success());
        assert_eq!(t.events("failed"), 0);
    })
    .await;
}

#[tokio::test]
async fn faults_of_all_kinds() {
    run_with(seeded(16), async |t| {
        t.set("--request-timeout", "300ms");
        let often = [dropped(), crashed(), cut_off(), html()].map(|fault| (0.02, fault));
        let seldom = (0.003, slow(Duration::from_millis(600)));
        for (probability, fault) in often.into_iter().chain([seldom]) {
            t.our_api.upset_at_random(probability, fault.clone());
            t.our_api.upset_at_random(probability, fault.carried_out());
        }
        t.our_api
            .upset_at_random(0.01, status(429).header("retry-after", "0"));
        t.bigchat.upset_at_random(0.05, crashed());
        t.bigchat.upset_at_random(0.05, dropped());
        let daemon = t.start();
        t.bigchat.reports_more(400).await;
        t.bigchat.calms_down();
        t.our_api.calm();
        t.bigchat.calm();
        t.agrees().await;
        daemon.stop().await;
        assert!(t.our_api.injected() > 20);
    })
    .await;
}

/// A BigChat that answers 404 to everything is down, and no conversation counts as gone.
#[tokio::test]
async fn bigchat_answers_404_to_everything() {
    run_live_test(async |t| {
        let faults = &t.bigchat;
        let (now, route) = (t.now(), "GET /conversations/{id}");
        faults.upset(route, crashed().times(1_000));
        t.bigchat.open(10, now - 100, 7);
        t.bigchat.reports_event(message(10, now - 5, "hello"));
        t.once().await;
        assert_eq!(t.events("waiting"), 1);
        faults.calm();
        faults.outage(Some(status(404)));
        let daemon = t.start();
        until("attempts fail", async || t.attempts() > 3).await;
        faults.outage(None);
        t.agrees().await;
        daemon.stop().await;
        assert_eq!(t.compare().fallbacks(), 0);
    })
    .await;
}

/// A clock set back after a restart does not mix up epochs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clock_set_back_after_restart() {
    run_live_test(async |t| {
        let now = t.now();
        t.bigchat.open(10, now - 100, 1);
        t.bigchat.reports([message(10, now, "of before")]);
        t.start();
        t.agrees().await;
        t.bigchat.clock_runs(60);
        t.bigchat.restart();
        t.bigchat.open(10, t.now(), 2);
        let events = vec![message(10, t.now(), "of after")];
        t.bigchat.reports(events);
        t.until_events("delivered", 2).await;
        t.agrees().await;
        assert_eq!(t.restarts(), 1);
        t.bigchat.clock_runs(-3600);
        let events = vec![message(10, t.now(), "after the step")];
        t.bigchat.reports(events);
        t.until_events("delivered", 3).await;
    })
    .await;
}

/// A few 404s within a poll interval are not believed, and use no attempts.
#[tokio::test]
async fn stray_404s_of_bigchat() {
    run_test(async |t| {
        t.set("--poll-interval", "1s").set("--max-attempts", "1");
        t.bigchat.upset("GET /advisors/7", status(404).times(3));
        t.bigchat
            .upset("GET /conversations/43", status(404).times(2));
        t.bigchat.open(44, 2, 7);
        t.bigchat.open(45, 3, 7);
        let daemon = t.start();
        let starts = (42..=45).map(|id| start(id, id - 42));
        let all = starts.chain([message(43, 30, "first")]);
        t.delivers(all.collect::<Vec<_>>()).await;
        daemon.stop().await;
        assert_eq!(t.bigchat.faults_left(), 0);
        assert!(t.our_api.chats().iter().all(|chat| !chat.ends_with(" -")));
    })
    .await;
}

/// An advisor that BigChat did not know is requested again after the daemon restarts.
#[tokio::test]
async fn unknown_advisor_in_next_session() {
    run_test(async |t| {
        t.differs("BigChat does not know the advisor at first");
        t.bigchat.upset("GET /advisors/8", status(404).always());
        let daemon = t.start();
        t.delivers([start(42, 0), transfer(42, 3, 8)]).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - -"]);
        t.bigchat.calm();
        let daemon = t.start();
        t.delivers([start(43, 1), transfer(43, 4, 8)]).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats()[1], "43 22:00:01 - a1");
    })
    .await;
}

/// `status` promises that a pass sets the agent only if there are passes.
#[tokio::test]
async fn advice_about_an_unknown_advisor() {
    side_by_side(
        [("24h", true), ("off", false)],
        async |(every, has_pass)| {
            run_test(async |t| {
                t.differs("BigChat does not know the advisor");
                t.set("--verify-every", every);
                t.bigchat.upset("GET /advisors/7", status(404).always());
                let daemon = t.start();
                t.delivers([start(42, 0)]).await;
                daemon.stop().await;
                let output = t.program("status").output().expect("a process");
                let text = String::from_utf8_lossy(&output.stdout);
                assert!(text.contains("`bigchat-sync verify --repair`"), "{text}");
                assert_eq!(text.contains("next pass"), has_pass, "{text}");
            })
            .await;
        },
    )
    .await;
}

/// Stray 404s for the first conversation do not hide a restart.
#[tokio::test]
async fn stray_404s_before_a_restart() {
    run_test(async |t| {
        let first = status(404).times(3);
        t.bigchat.upset("GET /conversations/1", first);
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 2, "of before")])
            .await;
        until("conversation 1 is known", async || {
            t.bigchat.further_polls(1).await;
            // No command lists a conversation without events.
            t.value::<i64>("SELECT count(*) FROM conversations WHERE bigchat_id = 1") > 0
        })
        .await;
        // Conversation 1 has a new start, 42 is unknown, and advisor 7 is another one.
        t.bigchat.restarts(2, 100);
        t.bigchat.advisor(7, "Carl", "carl@x.test");
        t.delivers([start(2, 100), message(2, 101, "of after")])
            .await;
        daemon.stop().await;
        assert_eq!(t.our_api.count("POST /agents"), 2);
        assert_eq!(t.our_api.chats(), ["42 22:00:00 - a1", "2 22:01:40 - a2"]);
    })
    .await;
}

/// BigChat serves a page, restarts, and delivery notices the restart before the page arrives.
async fn page_arrives_after_a_restart(t: &Test, page: impl Into<Page>) {
    restart_during_a_poll(t, paused().carried_out(), page).await;
}

/// BigChat restarts during a poll, and delivery notices the restart before the poll ends.
async fn restart_during_a_poll(t: &Test, poll: Fault, page: impl Into<Page>) {
    let command = |name| {
        let output = t.program(name).output().expect("a process");
        assert!(output.status.success(), "{output:?}");
    };
    t.once().await;
    command("pause");
    t.start();
    t.bigchat.reports([message(42, 5, "one")]);
    t.until_events("waiting", 1).await;
    let faults = &t.bigchat;
    faults.hold(true);
    faults.upset("GET /events", poll);
    faults.date("Sun, 22 Nov 2026 22:10:00 GMT");
    t.bigchat.reports(page);
    faults.hold(false);
    until("the page is served", async || faults.pausing() == 1).await;
    t.bigchat.clock(700);
    t.bigchat.restarts(42, 695);
    command("resume");
    until("the restart is noticed", async || t.restarts() == 1).await;
}

/// A page that arrives after the restart was noticed belongs to the epoch in which it was served.
#[tokio::test]
async fn late_page_of_the_previous_epoch() {
    run_test(async |t| {
        page_arrives_after_a_restart(t, [message(42, 6, "two")]).await;
        t.bigchat.resume();
        t.until_events("delivered", 2).await;
        assert_eq!(t.our_api.chats(), ["42 22:00:05 - -"]);
    })
    .await;
}

/// A START on a page that arrives so late is not mistaken for another restart.
#[tokio::test]
async fn late_start_of_the_previous_epoch() {
    run_test(async |t| {
        page_arrives_after_a_restart(t, [start(1, -3600)]).await;
        t.bigchat
            .upset("GET /conversations/{id}", crashed().always());
        t.bigchat.resume();
        t.until_events("delivered", 2).await;
        assert_eq!(t.restarts(), 1);
    })
    .await;
}

/// BigChat restarts, and its clock is set back by some minutes, as on a machine that boots with a wrong clock. Details
/// that are read before the next poll are not those of a conversation of before.
#[tokio::test]
async fn late_details_after_a_restart_that_sets_the_clock_back() {
    run_test(async |t| {
        let command = |name| {
            let output = t.program(name).output().expect("a process");
            assert!(output.status.success(), "{output:?}");
        };
        // Both advisors are known.
        t.bigchat.reports([start(42, 0), transfer(42, 3, 8)]);
        t.once().await;
        command("pause");
        t.start();
        // The response with its START was lost.
        t.bigchat.reports([message(43, 5, "of before")]);
        t.until_events("waiting", 1).await;
        t.bigchat.further_polls(2).await;
        t.bigchat.hold(true);
        t.bigchat.upset("GET /events", paused());
        t.bigchat.hold(false);
        until("a poll is in flight", async || t.bigchat.pausing() == 1).await;
        t.bigchat.clock(200);
        t.bigchat.restarts(43, 150);
        t.bigchat.open(43, 150, 8);
        command("resume");
        t.until_events("delivered", 3).await;
        t.bigchat.resume();
        until("the restart is noticed", async || t.restarts() == 1).await;
        assert_eq!(t.our_api.chats()[1], "43 22:00:05 - -");
    })
    .await;
}

/// An unusable record of a conversation does not show that BigChat no longer knows it.
#[tokio::test]
async fn unusable_record_after_a_restart() {
    run_test(async |t| {
        t.differs("the record is unusable");
        restart_during_a_poll(t, paused(), [message(43, 696, "of after")]).await;
        t.bigchat.date("Sun, 22 Nov 2026 22:11:40 GMT");
        t.bigchat
            .upset("GET /conversations/43", status(200).body("null").always());
        t.bigchat.resume();
        t.until_events("delivered", 2).await;
        // No command shows it before the next event.
        let epoch: i64 = t.value("SELECT epoch FROM conversations WHERE bigchat_id = 43");
        assert_eq!(epoch, 2);
    })
    .await;
}

/// After a restart, BigChat is not asked again about what it denied before.
#[tokio::test]
async fn denials_of_an_earlier_epoch() {
    run_test(async |t| {
        t.differs("BigChat does not know the advisors");
        t.bigchat.upset("GET /advisors/7", status(404).always());
        t.bigchat
            .upset("GET /conversations/43", status(404).always());
        let daemon = t.start();
        t.delivers([start(42, 0), message(43, 2, "of before")])
            .await;
        // No command shows the denials of conversations.
        let denials = || t.value::<i64>("SELECT count(*) FROM denials");
        assert_eq!(denials(), 2);
        t.bigchat.calm();
        t.bigchat.clock(700);
        t.bigchat.restarts(42, 695);
        t.delivers([message(42, 696, "of after")]).await;
        daemon.stop().await;
        assert_eq!(t.restarts(), 1);
        assert_eq!(denials(), 0);
    })
    .await;
}

/// A restart that also sets BigChat's clock back does not mix up epochs.
#[tokio::test]
async fn clock_set_back_by_a_restart() {
    let cases = [-3600, -300, -5].map(|offset| [(offset, false), (offset, true)]);
    side_by_side(cases.concat(), async |(offset, new_process)| {
        run_live_test(async |t| {
            let daemon = t.start();
            // The epoch has been verified.
            t.bigchat.further_polls(3).await;
            let faults = half_a_poll(t).await;
            if new_process {
                daemon.crash(t).await;
            }
            t.bigchat.clock_runs(offset);
            t.bigchat.restart();
            let now = t.now();
            t.bigchat.open(1, now, 1);
            t.bigchat.open(2, now, 1);
            let of_after = vec![message(1, now, "of after"), message(2, now, "of after")];
            t.bigchat.reports(of_after);
            faults.resume();
            if new_process {
                t.start();
            }
            t.until_events("delivered", 4).await;
            t.agrees().await;
            assert_eq!(t.our_api.chats().len(), 4, "{offset} {new_process}");
        })
        .await;
    })
    .await;
}

/// A restart that also sets BigChat's clock far ahead does not mix up epochs.
#[tokio::test]
async fn clock_set_ahead_by_a_restart() {
    run_live_test(async |t| {
        t.start();
        t.bigchat.further_polls(3).await;
        let events = |text| [1, 2].map(|id| message(id, t.now(), text));
        t.bigchat.open(2, t.now() - 100, 1);
        t.bigchat.reports(events("of before"));
        t.until_events("delivered", 2).await;
        // BigChat restarts before it answers a poll.
        t.bigchat.upset("GET /events", paused());
        until("a poll", async || t.bigchat.pausing() == 1).await;
        t.bigchat.clock_runs(3600);
        t.bigchat.restart();
        t.bigchat.open(2, t.now(), 1);
        t.bigchat.reports(events("of after"));
        t.bigchat.resume();
        t.until_events("delivered", 4).await;
        t.agrees().await;
        assert_eq!(t.our_api.chats().len(), 4);
    })
    .await;
}

/// A restart just before conversation 1 becomes known is noticed.
#[tokio::test]
async fn restart_before_conversation_1_is_known() {
    run_test(async |t| {
        t.bigchat.forgets_conversation(1);
        let daemon = t.start();
        t.delivers([start(42, 0), message(42, 2, "of before")])
            .await;
        t.bigchat.upset("GET /conversations/1", paused());
        until("conversation 1 is requested", async || {
            t.bigchat.pausing() == 1
        })
        .await;
        t.bigchat.clock(700);
        t.bigchat.restarts(42, 695);
        t.bigchat.resume();
        t.bigchat.further_polls(2).await;
        t.delivers([message(42, 696, "of after")]).await;
        daemon.stop().await;
        assert_eq!(t.our_api.chats().len(), 2);
    })
    .await;
}

/// `status` lists an advisor whose agent OurAPI does not accept after a restart of BigChat, too, or if another advisor
/// has the same address.
#[tokio::test]
async fn refused_agent_is_listed_in_each_epoch() {
    side_by_side([false, true], async |restarts| {
        run_test(async |t| {
            t.differs("OurAPI does not accept the agent");
            t.our_api.upset("POST /agents", status(422).always());
            t.start();
            t.delivers([start(42, 0)]).await;
            let (shown, _) = t.status();
            assert_eq!(
                shown["without_agent"][0]["advisors"],
                serde_json::json!([7])
            );
            if restarts {
                t.bigchat.clock(700);
                t.bigchat.restarts(42, 695);
                t.delivers([start(42, 695)]).await;
                assert_eq!(t.restarts(), 1);
            } else {
                t.bigchat.advisor(8, "Ann", "ann@x.test");
                t.bigchat.open(44, 5, 8);
                t.delivers([start(44, 5)]).await;
            }
            assert!(t.our_api.chats()[1].ends_with(" - -"), "it has no agent");
            let expected = if restarts { vec![7] } else { vec![7, 8] };
            let (shown, _) = t.status();
            let listed = &shown["without_agent"][0]["advisors"];
            assert_eq!(*listed, serde_json::json!(expected), "restarts: {restarts}");
        })
        .await;
    })
    .await;
}
