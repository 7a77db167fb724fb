//! `--our-api-lock`: several daemons on one machine take turns with one OurAPI, which accepts one request at a time.

use std::fs::{self, File};
use std::time::Duration;

use bigchat_sync::settings::Tokens;
use bigchat_sync::simulator::bigchat::{Log, Mode, Options};
use bigchat_sync::simulator::compare::{Rules, compare, expected};
use bigchat_sync::simulator::event::message;
use bigchat_sync::simulator::fault::overdue;
use bigchat_sync::simulator::{self, ANY_PORT, Starting};
use tokio::time::{sleep, timeout};

use crate::harness::process::{Process, Signal, printed};
use crate::harness::services::BigChat;
use crate::harness::web::{client, sent};
use crate::harness::{Bench, Test, run_live_test, until};

/// A daemon between its own BigChat and the OurAPI of the test.
struct Neighbour {
    bigchat: BigChat,
    bench: Bench,
    prefix: String,
}

impl Neighbour {
    async fn new(t: &Test, seed: u64, quiet: bool) -> Self {
        // BigChat stores its events, so that a daemon that dies before it has stored them can read them again.
        let log = Log {
            events_per_second: 3.0,
            ..Log::default()
        };
        let options = Options {
            seed,
            quiet,
            awkward: false,
            mode: if quiet { Mode::Once } else { Mode::Log(log) },
            ..Options::default()
        };
        let mut starting = Starting::new().expect("a thread");
        let bigchat = starting.listen(ANY_PORT, simulator::BigChat::new(options));
        let bigchat = BigChat(bigchat.await.expect("a port"));
        let bench = Bench::new(&bigchat.url(), &t.our_api.url());
        let prefix = format!("n{seed}-");
        bench.set("--our-api-lock", &lock_file(t));
        bench.set("--external-id-prefix", &prefix);
        Self {
            bigchat,
            bench,
            prefix,
        }
    }
}

fn lock_file(t: &Bench) -> String {
    t.directory().join("our-api.lock").display().to_string()
}

/// The differences between OurAPI and the reports of all BigChats.
fn difference(t: &Test, neighbours: &[Neighbour]) -> Option<String> {
    let mut all = expected(&[], &Rules::default());
    for Neighbour {
        bigchat, prefix, ..
    } in neighbours
    {
        let rules = Rules {
            prefix: prefix.clone(),
            ..Rules::default()
        };
        let one = expected(&bigchat.reported(), &rules);
        all.chats.extend(one.chats);
        for (email, names) in one.names {
            all.names.entry(email).or_default().extend(names);
        }
    }
    let report = compare(&all, &t.our_api.data(), &Rules::default());
    (!report.is_clean() || report.chats() == 0).then(|| report.to_string())
}

/// Waits until OurAPI has what all BigChats reported.
async fn agree(t: &Test, neighbours: &[Neighbour]) {
    let mut last = None;
    let agreed = timeout(Duration::from_secs(60), async {
        loop {
            last = difference(t, neighbours);
            if last.is_none() {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    });
    let agreed = agreed.await.is_ok();
    assert!(agreed, "{}", last.unwrap_or_default());
}

#[tokio::test]
async fn three_daemons_take_turns() {
    run_live_test(async |t| {
        t.differs("other daemons write to this OurAPI; they are compared together");
        let mut neighbours = Vec::new();
        for seed in [21, 22, 23] {
            neighbours.push(Neighbour::new(t, seed, false).await);
        }
        let start = |neighbour: &Neighbour| Process::start(&neighbour.bench);
        let mut daemons: Vec<Process> = neighbours.iter().map(start).collect();
        for neighbour in &neighbours {
            neighbour.bigchat.reports_more(8).await;
        }
        // One of them dies during its work, and starts again.
        let dead = daemons.remove(0);
        dead.signal(Signal::KILL);
        dead.ended().await;
        daemons.push(start(&neighbours[0]));
        for neighbour in &neighbours {
            neighbour.bigchat.reports_more(6).await;
            neighbour.bigchat.calms_down();
        }
        agree(t, &neighbours).await;
        assert_eq!(t.our_api.max_at_once(), 1);
        assert!(!t.our_api.has_stumbled());
        for daemon in daemons {
            assert!(daemon.stop().await.success());
        }
    })
    .await;
}

/// The other daemons wait until the last request of a dead one has ended.
#[tokio::test]
async fn daemon_dies_during_request() {
    run_live_test(async |t| {
        t.differs("other daemons write to this OurAPI; they are compared together");
        let mut neighbours = Vec::new();
        for seed in [21, 22] {
            let neighbour = Neighbour::new(t, seed, true).await;
            neighbour.bench.set("--request-timeout", "4s");
            let now = neighbour.bigchat.now();
            neighbour.bigchat.open(10, now - 100, 1);
            neighbours.push(neighbour);
        }
        let report = |neighbour: &Neighbour, text: &str| {
            let now = neighbour.bigchat.now();
            neighbour.bigchat.reports([message(10, now - 1, text)]);
        };
        let [one, other] = &neighbours[..] else {
            panic!("two")
        };
        let alive = Process::start(&other.bench);
        let dead = Process::start(&one.bench);
        one.bigchat.further_polls(1).await;
        other.bigchat.further_polls(1).await;
        // OurAPI carries the request out even though the client is dead.
        let at_work = overdue(Duration::from_secs(2));
        t.our_api.upset("POST /chats/{id}/messages", at_work);
        report(one, "from the dead");
        until("OurAPI is at work", async || t.our_api.pausing() == 1).await;
        let asked = t.our_api.total();
        report(other, "from the living");
        other.bench.until_events("waiting", 1).await;
        assert_eq!(
            t.our_api.total(),
            asked,
            "the other daemon waits for its turn"
        );
        dead.signal(Signal::KILL);
        dead.ended().await;
        other.bench.until_events("delivered", 1).await;
        assert_eq!(alive.lines_with("the last holder of the lock ended"), 1);
        let restarted = Process::start(&one.bench);
        agree(t, &neighbours).await;
        assert_eq!(t.our_api.max_at_once(), 1);
        for daemon in [alive, restarted] {
            assert!(daemon.stop().await.success());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_wait_is_no_attempt() {
    run_live_test(async |t| {
        let path = lock_file(t);
        t.set("--our-api-lock", &path);
        let lock = File::create(&path).expect("a file");
        lock.lock().expect("it is free");
        let (daemon, url) = t.start_listening(Tokens::default());
        t.bigchat.open(10, t.now() - 100, 1);
        t.bigchat.reports([message(10, t.now() - 1, "in turn")]);
        t.until_events("waiting", 1).await;
        let client = client();
        let waited = async || {
            let answer = sent(client.get(format!("{url}/metrics"))).await;
            let text = answer.text().await.expect("a text");
            let series = "bigchat_sync_our_api_lock_wait_seconds_total ";
            let value = text.lines().find_map(|line| line.strip_prefix(series));
            value.expect("a sample").parse::<f64>().expect("a number")
        };
        until("the time is counted", async || waited().await > 0.0).await;
        // The stop does not wait for the lock, although it would wait up to 8 s for a request.
        let began = std::time::Instant::now();
        daemon.stop().await;
        assert!(began.elapsed() < Duration::from_secs(5));
        assert_eq!(t.our_api.total(), 0);
        let (attempts, clean) = (
            t.value::<i64>("SELECT count(*) FROM attempts"),
            t.value::<bool>("SELECT clean_end FROM control"),
        );
        assert_eq!((attempts, clean), (0, true));
        assert!(
            t.status().0["our_api"]["state"] == "unknown",
            "nor an outage"
        );
        drop(lock);
        t.once().await;
    })
    .await;
}

#[tokio::test]
async fn file_with_content_is_never_locked() {
    run_live_test(async |t| {
        let path = t.directory().join("diary");
        fs::write(&path, "Dear diary").expect("a file");
        t.set("--our-api-lock", &path.display().to_string());
        for (command, code) in [("run", 2), ("once", 2), ("check", 1)] {
            let refused = t.program(command).output().expect("a process");
            let text = printed(&refused);
            assert_eq!(refused.status.code(), Some(code), "{text}");
            assert!(text.contains("--our-api-lock"), "{text}");
            assert!(text.contains("it is not a lock file"), "{text}");
        }
        let content = fs::read_to_string(&path).expect("a file");
        assert_eq!(content, "Dear diary");
    })
    .await;
}
