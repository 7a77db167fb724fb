//! Faults of a simulated service: at random, by script, or as an outage of everything.
//!
//! A fault strikes before a request is carried out, or after: then it was carried out and nobody is told. Both services take
//! it as a middleware. What was lost by it is noted by whoever answered: a response that is replaced loses its extensions.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{ConnectInfo, Request, State},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::watch;

use super::http::{Clock, Connection, Refused, lock, route};

/// Whether a fault strikes before the request is carried out or after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Nothing was done.
    Before,
    /// It was done; the answer is lost.
    After,
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is closed without an answer.
    Drop,
    /// Nothing happens for so long; then the request goes on. Before: a client that gave up by then has done nothing.
    Hang(Duration),
    /// The same, until [`Faults::go_on`].
    Pause,
    /// The request goes on after so long even if the client has given up by then, as with the real services.
    Late(Duration),
    /// This status. 500 as from an unhandled error, others with a `detail`.
    Status(u16),
    /// This status (429, 503) with a Retry-After.
    RetryLater(u16, RetryAfter),
    /// 200 with a page of HTML, as from a proxy's sign-in.
    Html,
    /// An answer that breaks off halfway through its body.
    CutOff,
    /// 200, as JSON, with this body: empty, huge, or not what was agreed.
    Body(String),
}

/// A Retry-After in either of its forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryAfter {
    /// A number of seconds.
    Seconds(u64),
    /// The date, by the service's clock, so many seconds from now.
    Date(i64),
}

struct Scripted {
    target: String,
    when: When,
    fault: Fault,
    times: u32,
}

struct Plans {
    rng: StdRng,
    script: VecDeque<Scripted>,
    rates: Vec<(f64, When, Fault)>,
    outage: Option<Fault>,
    injected: u64,
}

/// The faults of one service; a clone is another handle to the same.
#[derive(Clone)]
pub struct Faults {
    plans: Arc<Mutex<Plans>>,
    held: watch::Sender<bool>,
    /// Counts how often what pauses was told to go on; each that pauses listens.
    goes_on: watch::Sender<u64>,
    clock: Clock,
}

impl Faults {
    pub(super) fn new(seed: u64, clock: Clock) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        let plans = Plans {
            rng,
            script: VecDeque::new(),
            rates: Vec::new(),
            outage: None,
            injected: 0,
        };
        Self {
            plans: Arc::new(Mutex::new(plans)),
            held: watch::Sender::new(false),
            goes_on: watch::Sender::new(0),
            clock,
        }
    }

    /// The next `times` requests to `target` meet this fault. A target is a route as [`Traffic`](super::Traffic) counts it,
    /// `POST /chats/{id}/messages`, or the beginning of some with a star: `POST *`, `*`. Faults of one target queue up.
    pub fn script(&self, target: &str, when: When, fault: Fault, times: u32) {
        lock(&self.plans).script.push_back(Scripted {
            target: target.to_owned(),
            when,
            fault,
            times,
        });
    }

    /// Each request meets this fault with this probability, on top of what was set before.
    pub fn rate(&self, probability: f64, when: When, fault: Fault) {
        lock(&self.plans)
            .rates
            .push((probability.clamp(0.0, 1.0), when, fault));
    }

    /// Every request meets this fault, before being carried out; `None` ends the outage.
    pub fn outage(&self, fault: Option<Fault>) {
        lock(&self.plans).outage = fault;
    }

    /// Holds every request, before it is carried out, until let go.
    pub fn hold(&self, hold: bool) {
        self.held.send_replace(hold);
    }

    /// How many requests pause, or are late and not carried out yet.
    pub fn paused(&self) -> usize {
        self.goes_on.receiver_count()
    }

    /// Lets go on what pauses.
    pub fn go_on(&self) {
        self.goes_on.send_modify(|times| *times += 1);
    }

    async fn pause(&self) {
        // Only fails without a sender, and this is one.
        self.goes_on.subscribe().changed().await.ok();
    }

    /// No more faults of any kind.
    pub fn clear(&self) {
        let mut plans = lock(&self.plans);
        plans.script.clear();
        plans.rates.clear();
        plans.outage = None;
        self.hold(false);
        self.go_on();
    }

    /// How many faults have struck.
    pub fn injected(&self) -> u64 {
        lock(&self.plans).injected
    }

    /// How many scripted ones are left.
    pub fn left(&self) -> u32 {
        lock(&self.plans)
            .script
            .iter()
            .map(|scripted| scripted.times)
            .sum()
    }

    fn next(&self, route: &str) -> Option<(When, Fault)> {
        let mut guard = lock(&self.plans);
        let plans = &mut *guard;
        let hits = |target: &str| {
            let prefix = target.strip_suffix('*');
            prefix.map_or(target == route, |prefix| route.starts_with(prefix))
        };
        let chosen = if let Some(fault) = &plans.outage {
            Some((When::Before, fault.clone()))
        } else if let Some(at) = plans
            .script
            .iter()
            .position(|scripted| scripted.times > 0 && hits(&scripted.target))
        {
            let scripted = &mut plans.script[at];
            scripted.times -= 1;
            let chosen = (scripted.when, scripted.fault.clone());
            plans.script.retain(|scripted| scripted.times > 0);
            Some(chosen)
        } else {
            let rng = &mut plans.rng;
            let struck = plans
                .rates
                .iter()
                .find(|(probability, ..)| rng.random_bool(*probability));
            struck.map(|(_, when, fault)| (*when, fault.clone()))
        };
        plans.injected += u64::from(chosen.is_some());
        chosen
    }

    async fn answer(
        &self,
        fault: Fault,
        carried_out: Option<Response>,
        connection: &Connection,
    ) -> Response {
        let as_type = |kind: &'static str, body: String| {
            ([(header::CONTENT_TYPE, kind)], body).into_response()
        };
        match fault {
            Fault::Drop | Fault::Hang(_) | Fault::Pause | Fault::Late(_) => {
                connection.cut();
                StatusCode::OK.into_response()
            }
            Fault::Status(500) => Refused::unhandled().into_response(),
            Fault::Status(status) => refuse(status),
            Fault::RetryLater(status, after) => {
                let after = match after {
                    RetryAfter::Seconds(seconds) => seconds.to_string(),
                    RetryAfter::Date(seconds) => {
                        let date = self.clock.now() + chrono::TimeDelta::seconds(seconds);
                        httpdate::fmt_http_date(date.into())
                    }
                };
                ([(header::RETRY_AFTER, after)], refuse(status)).into_response()
            }
            Fault::Html => as_type(
                "text/html",
                "<!doctype html><title>Sign in</title><p>Please sign in.".to_owned(),
            ),
            Fault::Body(body) => as_type("application/json", body),
            Fault::CutOff => {
                let body = match carried_out {
                    Some(response) => to_bytes(response.into_body(), usize::MAX)
                        .await
                        .unwrap_or_default(),
                    None => Bytes::from_static(br#"{"detail": "it ends here"}"#),
                };
                // A body of which a part can be sent, even if the true one was empty.
                let part = if body.len() < 2 {
                    Bytes::from_static(b"{")
                } else {
                    body.slice(..body.len() / 2)
                };
                let length = body.len().max(part.len() + 1);
                // Without the pause in between, the error overtakes what is still to be sent.
                let end = async {
                    tokio::task::yield_now().await;
                    Err(io::Error::from(io::ErrorKind::ConnectionReset))
                };
                let cut = stream::iter([Ok(part)]).chain(stream::once(end));
                let headers = [
                    (header::CONTENT_TYPE, "application/json".to_owned()),
                    (header::CONTENT_LENGTH, length.to_string()),
                ];
                (headers, Body::from_stream(cut)).into_response()
            }
        }
    }
}

fn refuse(status: u16) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    Refused::new(status, status.canonical_reason().unwrap_or("Refused")).into_response()
}

/// The middleware.
pub(super) async fn inject(
    State(faults): State<Faults>,
    ConnectInfo(connection): ConnectInfo<Connection>,
    request: Request,
    next: Next,
) -> Response {
    // Only fails without a sender, and `faults` is one.
    if faults
        .held
        .subscribe()
        .wait_for(|held| !held)
        .await
        .is_err()
    {
        connection.cut();
    }
    match faults.next(&route(request.method(), request.uri().path())) {
        None => next.run(request).await,
        Some((When::Before, Fault::Hang(time))) => {
            tokio::time::sleep(time).await;
            next.run(request).await
        }
        Some((When::After, Fault::Hang(time))) => {
            let response = next.run(request).await;
            tokio::time::sleep(time).await;
            response
        }
        Some((_, Fault::Late(time))) => {
            let waits = faults.goes_on.subscribe();
            let late = tokio::spawn(async move {
                tokio::time::sleep(time).await;
                let response = next.run(request).await;
                drop(waits);
                response
            });
            match late.await {
                Ok(response) => response,
                Err(_) => Refused::unhandled().into_response(),
            }
        }
        Some((When::Before, Fault::Pause)) => {
            faults.pause().await;
            next.run(request).await
        }
        Some((When::After, Fault::Pause)) => {
            let response = next.run(request).await;
            faults.pause().await;
            response
        }
        Some((When::Before, fault)) => faults.answer(fault, None, &connection).await,
        Some((When::After, fault)) => {
            let response = next.run(request).await;
            faults.answer(fault, Some(response), &connection).await
        }
    }
}
