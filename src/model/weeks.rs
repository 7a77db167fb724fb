//! Simulated weeks: the daemon, this machine's clock and both services in one process and in virtual time, with random
//! faults from a seed. At the end of each week, OurAPI must have exactly what BigChat reported.
//!
//! Every poll, check for work and request of a week happens, but no real time passes between them.
//! `BIGCHAT_SYNC_TEST_WEEKS` sets the number of weeks (default: 1), `BIGCHAT_SYNC_TEST_SEED` the first seed (1), and
//! `BIGCHAT_SYNC_TEST_HOURS` the length of each in hours (3; a full week has 168).
//!
//! Losses from which the daemon cannot recover do not occur. BigChat's responses are not lost, because it may report
//! events only once. OurAPI does not lose data older than the retention period.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use reqwest::{Method, StatusCode};
use rusqlite::types::FromSql;
use rusqlite::{Connection, Params};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use url::{Position, Url};

use crate::cli::Cli;
use crate::console::Console;
use crate::daemon::{self, DaemonError};
use crate::domain::ids::EventId;
use crate::domain::pause::Pause;
use crate::domain::time::{Millis, Timestamp};
use crate::http::{NoResponse, Request, Response, Sending, Transport};
use crate::journal::{Executor, Journal, Operation, Operator, Resolution, Selection, Store};
use crate::mutex::lock;
use crate::settings::{Settings, Tokens, VerifyEvery};
use crate::simulator::bigchat::{BigChat, Clock, Log, Mode, Options};
use crate::simulator::compare::{Report, Rules, compare, expected};
use crate::simulator::event::T0;
use crate::simulator::{self, Api, OurApi, Reply};
use clap::Parser;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// How long the daemon waits for a response.
const TIMEOUT: Duration = Duration::from_secs(4);

/// The time limit for coming to rest after the last fault. It allows for the verification pass in progress and a
/// complete one.
const REST: Duration = Duration::from_secs(3 * 86_400);

/// The parameters of a week.
#[derive(Debug, Clone, Copy)]
struct Week {
    seed: u64,
    length: Duration,
    poll_interval: Duration,
    /// Whether BigChat has a log. If not, it reports each event once.
    log: bool,
    /// Delivered events are deleted within the week. OurAPI may then lose only recent data.
    short_retention: bool,
    /// A failed request is repeated immediately, so that the random jitter of the back-off makes no difference.
    without_jitter: bool,
}

impl Week {
    fn of(seed: u64, length: Duration) -> Self {
        Self {
            seed,
            length,
            poll_interval: if seed.is_multiple_of(2) {
                Duration::from_secs(10)
            } else {
                10 * MINUTE
            },
            log: seed % 4 < 2,
            short_retention: seed % 3 == 2,
            without_jitter: false,
        }
    }

    fn settings(&self) -> Settings {
        let mut settings = Cli::try_parse_from(["bigchat-sync"])
            .expect("defaults")
            .settings;
        if self.without_jitter {
            (settings.retry_initial, settings.retry_max) = (Duration::ZERO, Duration::ZERO);
        }
        settings.poll_interval = self.poll_interval;
        settings.request_timeout = TIMEOUT;
        settings.verify_every = VerifyEvery::Within(self.length / 8);
        settings.retention = if self.short_retention {
            2 * DAY
        } else {
            90 * DAY
        };
        if self.log {
            settings.since = Some(Millis(T0 * 1000));
        }
        settings
    }

    fn bigchat(&self) -> BigChat {
        let (mode, active) = if self.log {
            let log = Log {
                events_per_second: 0.02,
                ..Log::default()
            };
            (Mode::Log(log), 10)
        } else {
            // Each of these conversations has an event at each poll.
            (Mode::Once, if self.poll_interval < MINUTE { 1 } else { 8 })
        };
        BigChat::new(Options {
            seed: self.seed,
            mode,
            active,
            clock: Clock::Still(0),
            ..Options::default()
        })
    }

    /// Runs the week. Returns a line for each upheaval and one for the calm after them, and the result.
    fn live(self) -> (Vec<String>, Result<Report, String>) {
        let start = Millis(T0 * 1000);
        let stage = Stage(Arc::new(Mutex::new(Inner {
            week: self,
            rng: Xoshiro256PlusPlus::seed_from_u64(self.seed),
            store: Store::in_memory(
                Connection::open_in_memory().expect("a database in memory"),
                true,
            )
            .expect("a journal"),
            our_api: OurApi::new(self.seed).in_order(),
            bigchat: self.bigchat(),
            begun: None,
            clock_ahead: 0,
            faults: 0.0,
            bigchat_down: false,
            our_api_down: false,
            in_flight: 0,
            stopping: CancellationToken::new(),
            crash: CancellationToken::new(),
            down_for: Duration::ZERO,
            console: None,
            story: Vec::new(),
        })));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let settings = self.settings();
        let outcome = runtime.block_on(async {
            lock(&stage.0).begun = Some(Instant::now());
            super::set_clock(Some((start, Instant::now())));
            tokio::select! {
                biased;
                outcome = stage.upheavals() => outcome,
                () = stage.run(&settings) => Err("the daemon has ended".to_owned()),
            }
        });
        drop(runtime);
        super::set_clock(None);
        (std::mem::take(&mut lock(&stage.0).story), outcome)
    }
}

/// The environment of the daemon.
#[derive(Clone)]
struct Stage(Arc<Mutex<Inner>>);

struct Inner {
    week: Week,
    rng: Xoshiro256PlusPlus,
    store: Store,
    our_api: OurApi,
    bigchat: BigChat,
    begun: Option<Instant>,
    /// How far this machine's clock is ahead, in milliseconds.
    clock_ahead: i64,
    /// The fraction of requests with a fault.
    faults: f64,
    bigchat_down: bool,
    our_api_down: bool,
    /// Requests that OurAPI has not carried out yet.
    in_flight: usize,
    stopping: CancellationToken,
    crash: CancellationToken,
    /// How long the daemon stays down.
    down_for: Duration,
    /// The console of the running daemon.
    console: Option<Console>,
    story: Vec<String>,
}

/// The fate of a request to OurAPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Answered,
    /// It is never sent.
    Refused,
    /// It is answered with 500, and not carried out.
    Failed,
    /// It is carried out, and the response is lost.
    Lost,
    /// It is carried out after the daemon has given it up.
    Overdue,
}

#[derive(Debug)]
struct OurApiWire(Stage);

#[derive(Debug)]
struct BigChatWire(Stage);

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stage")
    }
}

impl Inner {
    /// The time since the week began.
    fn elapsed(&self) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| begun.elapsed())
    }

    fn set_clocks(&mut self) {
        let seconds = i64::try_from(self.elapsed().as_secs()).expect("weeks");
        self.bigchat.set_clock(Clock::Still(seconds));
    }

    fn record(&mut self, what: impl fmt::Display) {
        let elapsed = self.elapsed().as_secs();
        let (day, hour, minute) = (elapsed / 86_400, elapsed / 3600 % 24, elapsed / 60 % 60);
        self.story
            .push(format!("day {day} {hour:02}:{minute:02} {what}"));
    }

    fn between(&mut self, least: Duration, most: Duration) -> Duration {
        let seconds = self.rng.random_range(least.as_secs()..=most.as_secs());
        // The milliseconds let faults strike at any moment, not only between two steps of the daemon.
        Duration::from_secs(seconds) + Duration::from_millis(self.rng.random_range(0..1000))
    }

    /// Steps this machine's clock.
    fn step_clock(&mut self, ahead: i64) {
        self.clock_ahead = ahead;
        let begun = self.begun.expect("it has begun");
        super::set_clock(Some((Millis(T0 * 1000 + ahead), begun)));
    }

    fn fate(&mut self) -> Fate {
        if self.our_api_down {
            return Fate::Refused;
        }
        if self.faults == 0.0 || !self.rng.random_bool(self.faults) {
            return Fate::Answered;
        }
        let fates = [Fate::Refused, Fate::Failed, Fate::Lost, Fate::Overdue];
        *fates.choose(&mut self.rng).expect("some")
    }

    /// The external id of a chat, recent enough to be restored.
    fn some_chat(&mut self) -> Option<String> {
        let oldest = if self.week.short_retention {
            self.elapsed().saturating_sub(DAY)
        } else {
            Duration::ZERO
        };
        let oldest = T0 + i64::try_from(oldest.as_secs()).expect("weeks");
        let chats = self.our_api.data().chats.iter();
        let recent: Vec<&str> = chats
            .filter(|chat| chat.started_at.and_utc().timestamp() >= oldest)
            .map(|chat| &*chat.external_id)
            .collect();
        recent.choose(&mut self.rng).map(|id| (*id).to_owned())
    }

    /// Retries all failed events as an operator would. Returns how many there were.
    fn retry_failed(&mut self) -> usize {
        let now = Millis::now();
        // This machine's clock may have been ahead when they failed.
        let all = Selection::By {
            reason: None,
            failed_by: Millis(i64::MAX),
        };
        let (mut count, mut after) = (0, Some(EventId(0)));
        while let Some(from) = after {
            let resolved = self.store.resolve_failed(
                &all,
                Resolution::Retry,
                &Operator::Command("operator".to_owned()),
                from,
                now,
            );
            let resolved = resolved.expect("a retry");
            count += resolved.done;
            after = resolved.next;
        }
        count
    }

    fn report(&mut self) -> Report {
        self.set_clocks();
        let rules = Rules::default();
        compare(
            &expected(&self.bigchat.reported(), &rules),
            self.our_api.data(),
            &rules,
        )
    }

    fn value<T: FromSql>(&mut self, query: &str, parameters: impl Params) -> T {
        let connection = self.store.connection();
        let value = connection.query_row(query, parameters, |row| row.get(0));
        value.expect("an answer")
    }

    /// The pages, conversations, attempts and verifications that are left.
    fn what_is_left(&mut self) -> String {
        const LEFT: &str = "SELECT
            (SELECT count(*) FROM inbox) || ' stored pages; due: '
            || (SELECT json_group_array(json_object('conversation', id, 'due_at', due_at, 'waiting', waiting,
                    'chat', chat_id, 'stale', stale_seq, 'fresh', fresh_seq, 'missing', missing, 'drift', drift,
                    'verified_in', verified_in))
                FROM (SELECT * FROM conversations WHERE due_at IS NOT NULL OR waiting > 0 LIMIT 5))
            || '; attempts: '
            || (SELECT json_group_array(json_object('event', event, 'conversation', conversation,
                    'attempts', attempts, 'counted', counted, 'reason', reason))
                FROM (SELECT * FROM attempts WHERE next_at IS NOT NULL LIMIT 5))
            || '; verifications: '
            || (SELECT json_group_array(json_object('id', id, 'requested_at', requested_at, 'ended_at', ended_at,
                    'verified', verified)) FROM verifications)";
        self.value(LEFT, [])
    }

    fn is_at_rest(&mut self) -> bool {
        const NOTHING_LEFT: &str =
            "SELECT NOT EXISTS (SELECT 1 FROM event_states WHERE state = 'waiting')
            AND NOT EXISTS (SELECT 1 FROM inbox)
            AND NOT EXISTS (SELECT 1 FROM conversations WHERE due_at IS NOT NULL OR waiting > 0)";
        self.value(NOTHING_LEFT, [])
    }
}

impl Stage {
    /// Runs the daemon, and starts it again whenever it has stopped or crashed.
    async fn run(&self, settings: &Settings) {
        loop {
            let (stopping, crash) = (CancellationToken::new(), CancellationToken::new());
            {
                let mut inner = lock(&self.0);
                (inner.stopping, inner.crash) = (stopping.clone(), crash.clone());
            }
            let parts = daemon::begin(
                settings.clone(),
                Tokens::default(),
                Journal::over(self.clone()),
                BigChatWire(self.clone()),
                OurApiWire(self.clone()),
                stopping.clone(),
            )
            .await
            .expect("the daemon starts");
            lock(&self.0).console = Some(parts.console());
            tokio::select! {
                biased;
                () = crash.cancelled() => {}
                ended = daemon::poll_and_deliver(&parts) => match ended {
                    Ok(()) => assert!(stopping.is_cancelled(), "the daemon ends only when it is stopped"),
                    Err(error @ DaemonError::Unstored(_)) => panic!("the journal never fails: {error}"),
                    Err(error) => panic!("the daemon ends with an error: {error}"),
                },
            }
            lock(&self.0).console = None;
            drop(parts);
            let down_for = std::mem::take(&mut lock(&self.0).down_for);
            sleep(down_for).await;
        }
    }

    /// Runs the faults of the week, waits until everything is at rest, and returns the result.
    async fn upheavals(&self) -> Result<Report, String> {
        let end = Instant::now() + lock(&self.0).week.length;
        loop {
            let next = lock(&self.0).between(MINUTE, 90 * MINUTE);
            if Instant::now() + next > end {
                break;
            }
            sleep(next).await;
            self.upheaval().await;
        }
        let calm = {
            let mut inner = lock(&self.0);
            inner.step_clock(0);
            (inner.faults, inner.bigchat_down, inner.our_api_down) = (0.0, false, false);
            inner.set_clocks();
            inner.bigchat.set_quiet(true);
            let retried = inner.retry_failed();
            inner.record(format_args!("calm; {retried} dead letters are retried"));
            inner.value::<i64>("SELECT coalesce(max(id), 0) FROM verifications", [])
        };
        let began = Instant::now();
        loop {
            sleep(10 * MINUTE).await;
            let mut inner = lock(&self.0);
            // One pass may follow another immediately, so the chats show which pass verified them.
            let all_verified =
                "SELECT NOT EXISTS (SELECT 1 FROM conversations WHERE verified_in <= ?1)";
            if inner.is_at_rest() && inner.value(all_verified, [calm]) {
                let report = inner.report();
                let failed = inner.store.count_failed().expect("a count");
                return if !report.is_clean() {
                    Err(report.to_string())
                } else if failed != u64::try_from(report.refused).expect("few") {
                    Err(format!(
                        "{failed} dead letters instead of {}",
                        report.refused
                    ))
                } else {
                    Ok(report)
                };
            }
            if began.elapsed() > REST {
                return Err(format!(
                    "the daemon does not come to rest: {}\n{}",
                    inner.what_is_left(),
                    inner.report()
                ));
            }
        }
    }

    async fn upheaval(&self) {
        let number = lock(&self.0).rng.random_range(0..14);
        match number {
            0 | 1 => {
                let mut inner = lock(&self.0);
                inner.down_for = if number == 0 {
                    Duration::ZERO
                } else {
                    inner.between(MINUTE, 2 * HOUR)
                };
                let down_for = inner.down_for;
                inner.record(format_args!(
                    "the daemon crashes and is down for {down_for:?}"
                ));
                inner.crash.cancel();
            }
            2 => {
                let mut inner = lock(&self.0);
                inner.down_for = inner.between(Duration::ZERO, 2 * HOUR);
                let down_for = inner.down_for;
                inner.record(format_args!(
                    "the daemon is stopped and is down for {down_for:?}"
                ));
                inner.stopping.cancel();
            }
            3 => {
                let mut inner = lock(&self.0);
                inner.set_clocks();
                inner.bigchat.restart();
                inner.record("BigChat restarts");
            }
            4 | 5 => {
                let mut inner = lock(&self.0);
                let Some(chat) = inner.some_chat() else {
                    return;
                };
                if number == 4 {
                    inner.our_api.lose_chat(&chat);
                    inner.record(format_args!("OurAPI loses chat {chat}"));
                } else {
                    inner.our_api.lose_message(&chat);
                    inner.record(format_args!("OurAPI loses a message of chat {chat}"));
                }
            }
            6 | 7 => {
                let mut inner = lock(&self.0);
                if inner.week.short_retention {
                    return;
                }
                if number == 6 {
                    inner.our_api.lose_everything();
                    inner.record("OurAPI loses everything");
                } else {
                    inner.our_api.lose_agents();
                    inner.record("OurAPI loses its agents");
                }
            }
            8 => {
                let duration = lock(&self.0).between(MINUTE, 3 * HOUR);
                lock(&self.0).record(format_args!("OurAPI is down for {duration:?}"));
                lock(&self.0).our_api_down = true;
                sleep(duration).await;
                lock(&self.0).our_api_down = false;
            }
            9 => {
                let duration = lock(&self.0).between(MINUTE, 3 * HOUR);
                lock(&self.0).record(format_args!("BigChat is down for {duration:?}"));
                lock(&self.0).bigchat_down = true;
                sleep(duration).await;
                lock(&self.0).bigchat_down = false;
            }
            10 => {
                let (ahead, duration) = {
                    let mut inner = lock(&self.0);
                    let steps = [-HOUR_MS, HOUR_MS, -30_000, 30_000, 40 * 24 * HOUR_MS];
                    let ahead = *steps.choose(&mut inner.rng).expect("some");
                    (ahead, inner.between(Duration::ZERO, HOUR))
                };
                lock(&self.0).record(format_args!(
                    "this machine's clock is {} s ahead, for {duration:?}",
                    ahead / 1000
                ));
                lock(&self.0).step_clock(ahead);
                sleep(duration).await;
                lock(&self.0).step_clock(0);
            }
            11 => {
                let mut inner = lock(&self.0);
                let duration = inner.between(MINUTE, 5 * HOUR);
                let now = Millis::now();
                let pause = Pause {
                    since: now,
                    until: Some(now.plus(duration)),
                };
                inner.store.set_pause(pause).expect("a pause");
                if let Some(console) = &inner.console {
                    console.our_api.set_pause(Some(pause));
                }
                inner.record(format_args!("deliveries are paused for {duration:?}"));
            }
            _ => {
                let (share, duration) = {
                    let mut inner = lock(&self.0);
                    (
                        inner.rng.random_range(0.05..0.6),
                        inner.between(MINUTE, 2 * HOUR),
                    )
                };
                lock(&self.0).record(format_args!(
                    "{share:.2} of the requests fail, for {duration:?}"
                ));
                lock(&self.0).faults = share;
                sleep(duration).await;
                lock(&self.0).faults = 0.0;
            }
        }
    }

    /// Makes OurAPI carry out a request, even if the daemon has ended meanwhile.
    fn carry_out(&self, method: &Method, url: &Url, body: &[u8]) -> Reply {
        let mut inner = lock(&self.0);
        inner.in_flight -= 1;
        let others = inner.in_flight;
        let request = simulator::Request::new(method.as_str(), &url[Position::BeforePath..], body);
        inner.our_api.answer(&request, others)
    }
}

const HOUR_MS: i64 = 3_600_000;

impl Transport for OurApiWire {
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a> {
        let Request { method, body, .. } = request;
        let (url, body) = (request.url.clone(), Vec::from(body.unwrap_or_default()));
        let stage = self.0.clone();
        Box::pin(async move {
            let (fate, latency) = {
                let mut inner = lock(&stage.0);
                (
                    inner.fate(),
                    Duration::from_millis(inner.rng.random_range(5..200)),
                )
            };
            match fate {
                Fate::Refused => {
                    sleep(latency).await;
                    return Err(NoResponse::unreachable("refused"));
                }
                Fate::Failed => {
                    sleep(latency).await;
                    return Ok(response(
                        &Reply::new(500),
                        StatusCode::INTERNAL_SERVER_ERROR,
                        None,
                    ));
                }
                Fate::Answered | Fate::Lost | Fate::Overdue => {}
            }
            lock(&stage.0).in_flight += 1;
            let takes = if fate == Fate::Overdue {
                TIMEOUT + latency * 15
            } else {
                latency
            };
            // The task continues if the daemon ends.
            let carried_out = tokio::spawn({
                let stage = stage.clone();
                async move {
                    sleep(takes).await;
                    stage.carry_out(&method, &url, &body)
                }
            });
            if fate == Fate::Overdue {
                sleep(TIMEOUT).await;
                return Err(NoResponse::timed_out());
            }
            let reply = carried_out.await.expect("no panic");
            if fate == Fate::Lost {
                return Err(NoResponse::lost("lost"));
            }
            let status = StatusCode::from_u16(reply.status).expect("a status");
            Ok(response(&reply, status, None))
        })
    }
}

impl Transport for BigChatWire {
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a> {
        let url = request.url.clone();
        let stage = self.0.clone();
        Box::pin(async move {
            let latency = Duration::from_millis(lock(&stage.0).rng.random_range(5..200));
            sleep(latency).await;
            let mut inner = lock(&stage.0);
            let share = inner.faults;
            if inner.bigchat_down || share > 0.0 && inner.rng.random_bool(share) {
                return Err(NoResponse::unreachable("refused"));
            }
            inner.set_clocks();
            let mut request =
                simulator::Request::new("GET", &url[Position::BeforePath..], Vec::new());
            url.authority().clone_into(&mut request.host);
            let reply = inner.bigchat.answer(&request, 0);
            inner.bigchat.sent(&request, &reply);
            let status = StatusCode::from_u16(reply.status).expect("a status");
            let date = Timestamp::clamped(inner.bigchat.date().timestamp());
            Ok(response(&reply, status, Some(date)))
        })
    }
}

impl Executor for Stage {
    fn execute(&self, operation: Operation) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        operation(&mut lock(&self.0).store);
        Box::pin(std::future::ready(()))
    }
}

fn response(reply: &Reply, status: StatusCode, date: Option<Timestamp>) -> Response {
    Response {
        status,
        date,
        rate_limit: None,
        location: None,
        body: reply.body.clone(),
    }
}

fn number(variable: &str, default: u64) -> u64 {
    let number = std::env::var(variable).ok();
    number.map_or(default, |number| number.parse().expect("a number"))
}

/// Runs weeks with consecutive seeds.
#[test]
fn simulated_weeks_end_without_difference() {
    let first = number("BIGCHAT_SYNC_TEST_SEED", 1);
    let hours = number("BIGCHAT_SYNC_TEST_HOURS", 3);
    let weeks = number("BIGCHAT_SYNC_TEST_WEEKS", 1);
    let length = HOUR * u32::try_from(hours).expect("few hours");
    for seed in first..first + weeks {
        let began = std::time::Instant::now();
        let (story, outcome) = Week::of(seed, length).live();
        match outcome {
            Ok(report) => println!(
                "seed {seed}: {} upheavals, {} chats, {} messages, no difference, {:.1?}",
                story.len() - 1,
                report.chats(),
                report.expected(),
                began.elapsed()
            ),
            Err(difference) => panic!("seed {seed}:\n{}\n{difference}", story.join("\n")),
        }
    }
}

/// The same seed gives the same week.
#[test]
fn simulated_week_can_be_repeated() {
    let week = Week {
        without_jitter: true,
        ..Week::of(3, 2 * HOUR)
    };
    let [first, second] = [(); 2].map(|()| {
        let (story, outcome) = week.live();
        (story, outcome.map(|report| report.to_string()))
    });
    assert!(first.1.is_ok(), "{first:?}");
    assert_eq!(first, second);
}
