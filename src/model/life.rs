//! One life of the daemon, from its start until it is at rest, with the faults that strike during it.
//!
//! The real daemon runs, with poller, delivery and handlers, on a journal in memory and two services in this process.
//! It runs on one thread, and its clock jumps to the next event that is due, so that the same faults at the same steps
//! always give the same life. A step is one request or one operation of the journal.

use std::fmt;
use std::future::pending;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::{Method, StatusCode};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::script::Scripted;
use super::world::World;
use crate::daemon::{self, DaemonError};
use crate::domain::time::Millis;
use crate::http::{NoResponse, Request, Response, Sending, Transport};
use crate::journal::{Executor, Journal, Operation, Store};
use crate::mutex::lock;
use crate::settings::{Settings, Tokens};
use crate::simulator::compare::{Report, Rules, compare, expected};
use crate::simulator::{self, Api, OurApi, Reply};

/// The wait of a delayed step. It is longer than any step without a fault: before it ends, everything else comes to
/// rest, or one more poll completes.
const WAIT: Duration = Duration::from_millis(2500);

/// How long the daemon waits for a response, and how long it assumes after a time-out that the request may still be
/// carried out.
pub(super) const TIMEOUT: Duration = Duration::from_secs(4);

/// The limit for coming to rest.
const REST_WITHIN: Duration = Duration::from_secs(100);

/// More steps than any life needs. A longer life is stuck in a loop.
const STEPS: usize = 2_000;

/// A step of a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A request to BigChat.
    BigChat,
    /// A request that reads from OurAPI.
    ReadOurApi,
    /// A request that changes OurAPI.
    WriteOurApi,
    /// An operation of the journal that only reads.
    ReadJournal,
    /// An operation of the journal that writes.
    WriteJournal,
}

/// A fault at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Strike {
    /// The request is never sent, so it is not carried out.
    Refused,
    /// The request is not carried out, and is answered with 500.
    Failed,
    /// The request is carried out, and the response is lost.
    Lost,
    /// The request is carried out, and then its sender panics.
    Panicked,
    /// The request is carried out, and the response arrives when everything else is at rest.
    LateResponse,
    /// The request is carried out when everything else is at rest.
    Wait,
    /// The request is carried out after the daemon has given it up, at the last moment that the daemon allows for.
    Overdue,
    /// OurAPI loses everything before the step.
    Wipe,
    /// BigChat restarts before the step.
    Restart,
    /// Before the step, an operator requests that all chats be verified and repaired.
    Verify,
    /// Before the step, the daemon is asked to stop. It is started again afterwards.
    Stop,
}

/// The property that is violated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    /// OurAPI has a message that BigChat never reported, or too many copies, or in another conversation's chat.
    Extra,
    /// A message is delivered according to the journal, but is not in OurAPI.
    Unfounded,
    /// The daemon does not come to rest, or it does and OurAPI then differs from what is expected.
    Different,
}

/// The course of a life.
pub(super) struct Life {
    pub(super) steps: Vec<(Step, String)>,
    /// What would have outlasted the daemon if it had died right after a step.
    pub(super) deaths: Vec<(usize, Arc<World>)>,
    pub(super) wrong: Vec<(Wrong, String)>,
}

/// Runs the daemon in a world. `from` is the first step after which the daemon's death is recorded; with `None`, no
/// death is recorded.
pub(super) fn live(
    world: &World,
    settings: &Settings,
    fate: &[(usize, Strike)],
    from: Option<usize>,
) -> Life {
    let start = world.now.plus(Duration::from_secs(3600));
    let stage = Stage(Arc::new(Mutex::new(Inner {
        store: world.store(),
        our_api: world.our_api.clone(),
        bigchat: world.bigchat.clone(),
        wipes: world.wipes,
        lost_until: settings.idle_pass().map(|_| start),
        fate: fate.to_vec(),
        from,
        stopping: CancellationToken::new(),
        life: Life {
            steps: Vec::new(),
            deaths: Vec::new(),
            wrong: Vec::new(),
        },
    })));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        super::set_clock(Some((start, Instant::now())));
        tokio::select! {
            biased;
            () = stage.come_to_rest() => {}
            () = stage.run(settings) => {}
        }
    });
    drop(runtime);
    super::set_clock(None);
    let mut inner = lock(&stage.0);
    Life {
        steps: std::mem::take(&mut inner.life.steps),
        deaths: std::mem::take(&mut inner.life.deaths),
        wrong: std::mem::take(&mut inner.life.wrong),
    }
}

/// The environment of the daemon.
#[derive(Clone)]
struct Stage(Arc<Mutex<Inner>>);

struct Inner {
    store: Store,
    our_api: OurApi,
    bigchat: Scripted,
    wipes: usize,
    /// A verification pass in idle time that begins after this time finds all losses. `None`: there are no such passes.
    lost_until: Option<Millis>,
    fate: Vec<(usize, Strike)>,
    from: Option<usize>,
    stopping: CancellationToken,
    life: Life,
}

/// The transport to one of the services.
#[derive(Debug)]
struct OurApiWire(Stage);

/// See [`OurApiWire`].
#[derive(Debug)]
struct BigChatWire(Stage);

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stage")
    }
}

impl Stage {
    /// Runs the daemon, and starts it again whenever it has stopped.
    async fn run(&self, settings: &Settings) {
        loop {
            let stopping = CancellationToken::new();
            lock(&self.0).stopping = stopping.clone();
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
            match daemon::poll_and_deliver(&parts).await {
                // A page was not stored yet when the daemon had to end.
                Ok(()) | Err(DaemonError::Unstored(_)) => lock(&self.0).bigchat.client_died(),
                Err(error) => panic!("the daemon ends with an error: {error}"),
            }
            assert!(
                stopping.is_cancelled(),
                "the daemon ends only when it is asked to"
            );
        }
    }

    /// Waits until everything reported is settled, and checks the result.
    async fn come_to_rest(&self) {
        let start = Instant::now();
        loop {
            sleep(Duration::from_millis(500)).await;
            let mut inner = lock(&self.0);
            if inner.is_at_rest() {
                if let Some(lost_until) = inner.lost_until {
                    if !super::is_verified(&mut inner.store, lost_until) {
                        continue;
                    }
                } else if inner.bigchat.nudges < inner.wipes {
                    // A loss in OurAPI is noticed when a lost chat is used, so BigChat reports one more message.
                    inner.bigchat.nudges += 1;
                    continue;
                }
                let report = inner.report();
                if !report.is_clean() {
                    inner.wrong(Wrong::Different, report.to_string());
                }
                return;
            }
            if start.elapsed() > REST_WITHIN {
                inner.wrong(
                    Wrong::Different,
                    "the daemon does not come to rest".to_owned(),
                );
                return;
            }
        }
    }

    /// Carries out a request to OurAPI.
    fn carry_out(&self, number: usize, method: &Method, url: &Url, body: &[u8]) -> Reply {
        let mut inner = lock(&self.0);
        let target = &url[url::Position::BeforePath..];
        let request = simulator::Request::new(method.as_str(), target, body);
        let reply = inner.our_api.answer(&request, 0);
        if method != Method::GET {
            inner.was_written();
            inner.record_death(number);
        }
        reply
    }

    /// Waits before a step is carried out, as long as the fault requires.
    async fn wait(number: usize, strike: Option<Strike>) {
        if number >= STEPS {
            pending::<()>().await;
        }
        if strike == Some(Strike::Wait) {
            sleep(WAIT).await;
        }
    }

    /// Records the next step, and applies its fault if that strikes before the step. Returns the number and the fault.
    fn step(&self, step: Step, what: String) -> (usize, Option<Strike>) {
        let mut inner = lock(&self.0);
        let number = inner.life.steps.len();
        inner.life.steps.push((step, what));
        let strike = inner
            .fate
            .iter()
            .find(|(at, _)| *at == number)
            .map(|(_, strike)| *strike);
        match strike {
            Some(Strike::Wipe) => {
                inner.our_api.lose_everything();
                inner.wipes += 1;
                inner.lost_until = inner.lost_until.map(|_| Millis::now());
            }
            Some(Strike::Restart) => inner.bigchat.restart(),
            Some(Strike::Verify) => {
                let requested = inner.store.request_verification(None, true, Millis::now());
                requested.expect("a request to verify");
            }
            Some(Strike::Stop) => inner.stopping.cancel(),
            _ => {}
        }
        (number, strike)
    }
}

impl Inner {
    fn is_at_rest(&mut self) -> bool {
        const NOTHING_LEFT: &str = "SELECT NOT EXISTS (SELECT 1 FROM event_states WHERE state = 'waiting')
            AND NOT EXISTS (SELECT 1 FROM inbox)
            AND NOT EXISTS (SELECT 1 FROM requested_chats WHERE state IS NULL OR repairing)
            AND NOT EXISTS (SELECT 1 FROM conversations WHERE due_at IS NOT NULL OR waiting > 0)
            AND NOT EXISTS (SELECT 1 FROM conversations, control WHERE external_id IS NOT NULL AND verified_losses < losses)
            AND (SELECT window_start IS NULL FROM poll_state)";
        let connection = self.store.connection();
        let nothing_left = connection.query_row(NOTHING_LEFT, [], |row| row.get(0));
        self.bigchat.has_reported_all() && nothing_left.expect("an answer")
    }

    fn report(&mut self) -> Report {
        let rules = Rules::default();
        let expected = expected(&self.bigchat.reported(), &rules);
        compare(&expected, self.our_api.data(), &rules)
    }

    fn wrong(&mut self, wrong: Wrong, what: String) {
        self.life.wrong.push((wrong, what));
    }

    /// Records the world that would remain if the daemon died after this step.
    fn record_death(&mut self, step: usize) {
        if self.from.is_none_or(|from| step < from) {
            return;
        }
        let world = World::of(
            &mut self.store,
            self.our_api.clone(),
            self.bigchat.clone(),
            self.wipes,
            Millis::now(),
        );
        let last = self.life.deaths.last();
        if last.is_none_or(|(_, last)| **last != world) {
            self.life.deaths.push((step, Arc::new(world)));
        }
    }

    /// Called after a change of OurAPI.
    fn was_written(&mut self) {
        let report = self.report();
        let wrong = report.agents.iter().any(|agent| agent.contains("twice"))
            || report.lines.iter().any(|line| {
                !line.extra.is_empty()
                    || line
                        .differences
                        .iter()
                        .any(|difference| difference.contains("expected"))
            });
        if wrong {
            self.wrong(Wrong::Extra, report.to_string());
        }
    }

    /// Called after a change of the journal.
    fn was_stored(&mut self) {
        let connection = self.store.connection();
        self.bigchat.arrived(|body| {
            let is_stored = "SELECT EXISTS (SELECT 1 FROM inbox WHERE body = ?1)";
            connection
                .query_row(is_stored, [body], |row| row.get(0))
                .expect("an answer")
        });
        if self.wipes > 0 {
            return;
        }
        // The conversation does not matter here: `Wrong::Extra` covers messages in the wrong chat.
        const DELIVERED: &str = "SELECT event_at, data ->> 'message', count(*) FROM event_states
             WHERE kind = 'MESSAGE' AND state = 'delivered' GROUP BY event_at, data";
        let mut statement = connection.prepare_cached(DELIVERED).expect("a statement");
        let mut rows = statement.query([]).expect("rows");
        while let Some(row) = rows.next().expect("a row") {
            let at: i64 = row.get(0).expect("a time");
            let text: String = row.get(1).expect("a text");
            let count: u32 = row.get(2).expect("a count");
            let held = self.our_api.data().messages.values().flatten();
            let held = held
                .filter(|held| held.sent_at.and_utc().timestamp() == at && held.text == text.trim())
                .count();
            if held < count as usize {
                let what =
                    format!("{text:?} is delivered {count} times, and OurAPI has it {held} times");
                self.life.wrong.push((Wrong::Unfounded, what));
            }
        }
    }
}

fn answer(status: StatusCode, body: Vec<u8>) -> Response {
    Response {
        status,
        date: None,
        rate_limit: None,
        location: None,
        body,
    }
}

impl Transport for OurApiWire {
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a> {
        let Request { method, body, .. } = request;
        let (url, body) = (request.url.clone(), Vec::from(body.unwrap_or_default()));
        let stage = self.0.clone();
        let kind = if method == Method::GET {
            Step::ReadOurApi
        } else {
            Step::WriteOurApi
        };
        let (number, strike) = stage.step(
            kind,
            format!("{method} {}", &url[url::Position::BeforePath..]),
        );
        Box::pin(async move {
            match strike {
                Some(Strike::Refused) => return Err(NoResponse::unreachable("refused")),
                Some(Strike::Failed) => {
                    return Ok(answer(StatusCode::INTERNAL_SERVER_ERROR, Vec::new()));
                }
                _ => Stage::wait(number, strike).await,
            }
            if strike == Some(Strike::Overdue) {
                tokio::spawn(async move {
                    sleep(TIMEOUT * 2 - Duration::from_millis(1)).await;
                    stage.carry_out(number, &method, &url, &body);
                });
                sleep(TIMEOUT).await;
                return Err(NoResponse::timed_out());
            }
            let reply = stage.carry_out(number, &method, &url, &body);
            match strike {
                Some(Strike::Lost) => return Err(NoResponse::lost("lost")),
                // This does not print the panic.
                Some(Strike::Panicked) => resume_unwind(Box::new("panicked")),
                Some(Strike::LateResponse) => sleep(WAIT).await,
                _ => {}
            }
            let status = StatusCode::from_u16(reply.status).expect("a status");
            Ok(answer(status, reply.body))
        })
    }
}

impl Transport for BigChatWire {
    fn send<'a>(&'a self, request: Request<'a>) -> Sending<'a> {
        let url = request.url.clone();
        let stage = self.0.clone();
        let (number, strike) =
            stage.step(Step::BigChat, url[url::Position::BeforePath..].to_owned());
        lock(&stage.0).bigchat.on_request(&url);
        Box::pin(async move {
            match strike {
                Some(Strike::Failed) => {
                    return Ok(answer(StatusCode::INTERNAL_SERVER_ERROR, Vec::new()));
                }
                _ => Stage::wait(number, strike).await,
            }
            let answer = {
                let mut inner = lock(&stage.0);
                let answer = inner.bigchat.answer(&url);
                if url.path() == "/events" {
                    inner.record_death(number);
                }
                answer
            };
            if strike == Some(Strike::LateResponse) {
                sleep(WAIT).await;
            }
            Ok(answer)
        })
    }
}

impl Executor for Stage {
    fn execute(&self, operation: Operation) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let (number, strike) = self.step(Step::ReadJournal, String::new());
        Box::pin(async move {
            Self::wait(number, strike).await;
            let mut inner = lock(&self.0);
            let before = inner.store.connection().total_changes();
            operation(&mut inner.store);
            if inner.store.connection().total_changes() != before {
                inner.life.steps[number].0 = Step::WriteJournal;
                inner.was_stored();
                inner.record_death(number);
            }
        })
    }
}
