//! A service at work: an [`Api`] with its faults and a record of requests. The requests come from
//! [`Server`](super::Server) or from a caller in this process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;

use super::exchange::{Api, Reply, Request};
use super::fault::{Answer, Delay, Fault, fits};
use super::watch::Watch;

/// A gauge of how many callers are inside now, with the maximum so far.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    now: AtomicUsize,
    max: AtomicUsize,
}

/// Counts as inside until dropped.
pub(super) struct Inside<'a>(&'a Gauge, usize);

impl Gauge {
    pub(super) fn enter(&self) -> Inside<'_> {
        let before = self.now.fetch_add(1, Relaxed);
        self.max.fetch_max(before + 1, Relaxed);
        Inside(self, before)
    }

    pub(super) fn now(&self) -> usize {
        self.now.load(Relaxed)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Relaxed);
    }
}

/// A request received.
#[derive(Clone, Debug)]
pub struct Asked {
    /// See [`Request::line`].
    pub line: String,
    pub at: Instant,
    pub request: Request,
}

struct Plans {
    rng: Xoshiro256PlusPlus,
    faults: Vec<(String, Fault)>,
    /// The patterns of all faults so far, and whether a request has met one of that pattern.
    met: BTreeMap<String, bool>,
    rates: Vec<(f64, Fault)>,
    outage: Option<Fault>,
    injected: u64,
    /// `None`: not recorded.
    asked: Option<Vec<Asked>>,
    /// How many of these were returned by [`Service::asked`].
    returned: usize,
    total: u64,
    latency: Duration,
    watch: Watch,
}

struct Shared<A> {
    api: Mutex<A>,
    plans: Mutex<Plans>,
    held: watch::Sender<bool>,
    /// Counts the calls of `resume`. Each paused request waits for the next.
    resumed: watch::Sender<u64>,
    open: Gauge,
    carrying_out: Gauge,
    connected: Gauge,
}

/// A service. A clone is another handle to the same service.
pub struct Service<A>(Arc<Shared<A>>);

impl<A> Clone for Service<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// A panic elsewhere in a test must not be hidden by a poisoned lock.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<A: Api> Service<A> {
    /// Creates a service without faults. `seed` determines the random ones.
    pub fn new(api: A, seed: u64) -> Self {
        Self(Arc::new(Shared {
            api: Mutex::new(api),
            plans: Mutex::new(Plans {
                rng: Xoshiro256PlusPlus::seed_from_u64(seed),
                faults: Vec::new(),
                met: BTreeMap::new(),
                rates: Vec::new(),
                outage: None,
                injected: 0,
                asked: Some(Vec::new()),
                returned: 0,
                total: 0,
                latency: Duration::ZERO,
                watch: Watch::default(),
            }),
            held: watch::Sender::new(false),
            resumed: watch::Sender::new(0),
            open: Gauge::default(),
            carrying_out: Gauge::default(),
            connected: Gauge::default(),
        }))
    }

    /// The service itself, to read and to change. No request is answered while it is locked.
    pub fn state(&self) -> MutexGuard<'_, A> {
        lock(&self.0.api)
    }

    fn plans(&self) -> MutexGuard<'_, Plans> {
        lock(&self.0.plans)
    }

    pub(super) fn connected_gauge(&self) -> &Gauge {
        &self.0.connected
    }

    /// Reports to an observer from now on.
    pub fn watched(&self, watch: Watch) {
        self.plans().watch = watch;
    }

    /// Sets how long it takes to carry out a request.
    pub fn set_latency(&self, latency: Duration) {
        self.plans().latency = latency;
    }

    /// Requests that match the pattern meet this fault. If several faults match, the first one that is not used up
    /// applies. A pattern is the beginning of a request's line, such as `GET /chats?external_id=42`, in which `*`
    /// stands for anything and `{id}` for one segment of a path. `POST /chats` matches only that path.
    pub fn upset(&self, pattern: &str, fault: Fault) {
        let mut plans = self.plans();
        plans.met.entry(pattern.to_owned()).or_default();
        plans.faults.push((pattern.to_owned(), fault));
    }

    /// Each request meets this fault with this probability, in addition to the faults set before.
    pub fn upset_at_random(&self, probability: f64, fault: Fault) {
        self.plans().rates.push((probability, fault));
    }

    /// Every request meets this fault. `None` ends the outage.
    pub fn outage(&self, fault: Option<Fault>) {
        self.plans().outage = fault;
    }

    /// Holds every request before it is processed, or releases them.
    pub fn hold(&self, hold: bool) {
        self.0.held.send_replace(hold);
    }

    /// Releases paused requests.
    pub fn resume(&self) {
        self.0.resumed.send_modify(|times| *times += 1);
    }

    /// Ends all faults.
    pub fn calm(&self) {
        let mut plans = self.plans();
        plans.faults.clear();
        plans.rates.clear();
        plans.outage = None;
        drop(plans);
        self.hold(false);
        self.resume();
    }

    /// How many requests are paused, or are overdue and not carried out yet.
    pub fn pausing(&self) -> usize {
        self.0.resumed.receiver_count()
    }

    /// How many faults have struck.
    pub fn injected(&self) -> u64 {
        self.plans().injected
    }

    /// How many faults have not struck yet, without random ones.
    pub fn faults_left(&self) -> usize {
        self.plans()
            .faults
            .iter()
            .map(|(_, fault)| fault.times)
            .sum()
    }

    /// The patterns of faults that no request has met, even if they were ended.
    pub fn unmet(&self) -> Vec<String> {
        let plans = self.plans();
        let unmet = plans.met.iter().filter(|(_, met)| !**met);
        unmet.map(|(pattern, _)| pattern.clone()).collect()
    }

    /// Requests not answered yet, including held and paused ones.
    pub fn open_requests(&self) -> usize {
        self.0.open.now()
    }

    /// Connections that are open now.
    pub fn connected(&self) -> usize {
        self.0.connected.now()
    }

    /// The maximum number of requests carried out concurrently so far. A request does not count while it is held or
    /// delayed.
    pub fn max_at_once(&self) -> usize {
        self.0.carrying_out.max.load(Relaxed)
    }

    /// How many requests there were.
    pub fn total(&self) -> u64 {
        self.plans().total
    }

    /// Starts or stops recording requests, for [`asked`](Self::asked) and [`count`](Self::count). Earlier ones are
    /// forgotten.
    pub fn record(&self, record: bool) {
        let mut plans = self.plans();
        plans.asked = record.then(Vec::new);
        (plans.returned, plans.total) = (0, 0);
    }

    /// The lines of the requests since the previous call.
    pub fn asked(&self) -> Vec<String> {
        let mut plans = self.plans();
        let all = plans.asked.as_deref().unwrap_or_default();
        let (new, count) = (&all[plans.returned..], all.len());
        let lines = new.iter().map(|asked| asked.line.clone()).collect();
        plans.returned = count;
        lines
    }

    /// All requests that match the pattern; see [`upset`](Self::upset).
    pub fn ever_asked(&self, pattern: &str) -> Vec<Asked> {
        let plans = self.plans();
        let all = plans.asked.iter().flatten();
        let fitting = all.filter(|asked| fits(&asked.line, pattern));
        fitting.cloned().collect()
    }

    /// How many requests match the pattern.
    pub fn count(&self, pattern: &str) -> usize {
        let plans = self.plans();
        let all = plans.asked.iter().flatten();
        all.filter(|asked| fits(&asked.line, pattern)).count()
    }

    /// Answers a request, or applies its fault. `None`: the connection is to be closed. If the future is dropped, the
    /// client has gone.
    pub async fn answer(&self, request: Request) -> Option<Reply> {
        let _open = self.0.open.enter();
        let line = self.plans().record(&request);
        if *self.0.held.borrow() {
            // This fails only if there is no sender, but `self` has one.
            self.0.held.subscribe().wait_for(|held| !held).await.ok();
        }
        let fault = self.plans().strikes(line, &request);
        match fault {
            None => Some(self.usual(&request).await),
            Some(fault) if fault.detached => {
                let (service, waits) = (self.clone(), self.0.resumed.subscribe());
                let answer = tokio::spawn(async move {
                    let reply = service.strike(&request, fault).await;
                    drop(waits);
                    reply
                });
                answer.await.ok().flatten()
            }
            Some(fault) => self.strike(&request, fault).await,
        }
    }

    async fn strike(&self, request: &Request, fault: Fault) -> Option<Reply> {
        let mut reply = None;
        if fault.carried_out {
            reply = Some(self.carry_out(request).await);
        }
        match fault.delay {
            Delay::No => {}
            Delay::For(delay) => tokio::time::sleep(delay).await,
            // This cannot fail, because `self` has a sender.
            Delay::Paused => drop(self.0.resumed.subscribe().changed().await),
        }
        let retry = fault.retry_date.map(|seconds| {
            let date = self.state().date() + TimeDelta::seconds(seconds);
            httpdate::fmt_http_date(date.into())
        });
        Some(match fault.answer {
            Answer::None => return None,
            Answer::Usual => match reply {
                Some(reply) => self.send(request, reply),
                None => self.usual(request).await,
            },
            Answer::Instead(instead) => {
                let headers = retry.map(|date| ("retry-after".to_owned(), date));
                let mut instead = instead;
                instead.headers.extend(headers);
                self.send(request, instead)
            }
            Answer::CutOff => {
                let whole =
                    reply.map_or_else(|| br#"{"detail": "cut"}"#.to_vec(), |reply| reply.body);
                // This body can be cut, even if the usual one is empty.
                let part = if whole.len() < 2 {
                    b"{"
                } else {
                    &whole[..whole.len() / 2]
                };
                let cut = Reply {
                    missing: (whole.len() - part.len().min(whole.len())).max(1),
                    body: part.to_vec(),
                    closes: true,
                    ..Reply::new(200).with("content-type", "application/json")
                };
                self.send(request, cut)
            }
        })
    }

    async fn usual(&self, request: &Request) -> Reply {
        let reply = self.carry_out(request).await;
        self.send(request, reply)
    }

    async fn carry_out(&self, request: &Request) -> Reply {
        let inside = self.0.carrying_out.enter();
        let (latency, watch) = {
            let plans = self.plans();
            (
                plans.latency,
                plans.watch.is_on().then(|| plans.watch.clone()),
            )
        };
        if latency.is_zero() {
            // Lets other requests that have arrived start, so that they count as concurrent.
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(latency).await;
        }
        let mut api = self.state();
        let reply = api.answer(request, inside.1);
        if let Some(watch) = watch {
            watch.report(api.carried_out(request, &reply));
        }
        reply
    }

    /// Completes a reply with its date, and reports it.
    fn send(&self, request: &Request, mut reply: Reply) -> Reply {
        let mut api = self.state();
        if reply.header("date").is_none() {
            let date = httpdate::fmt_http_date(api.date().into());
            reply.headers.push(("date".to_owned(), date));
        }
        let happening = api.sent(request, &reply);
        drop(api);
        if happening.is_some() {
            self.plans().watch.report(happening);
        }
        reply
    }
}

impl Plans {
    /// Counts a request; returns its line if it is recorded.
    fn record(&mut self, request: &Request) -> Option<String> {
        self.total += 1;
        let asked = self.asked.as_mut()?;
        let line = request.line();
        asked.push(Asked {
            line: line.clone(),
            at: Instant::now(),
            request: request.clone(),
        });
        Some(line)
    }

    /// The fault that a request meets, if there is one.
    fn strikes(&mut self, line: Option<String>, request: &Request) -> Option<Fault> {
        let mut fault = self.outage.clone();
        if fault.is_none() && !self.faults.is_empty() {
            let line = line.unwrap_or_else(|| request.line());
            let mut faults = self.faults.iter_mut();
            let hit = faults.find(|(pattern, fault)| fault.times > 0 && fits(&line, pattern));
            if let Some((pattern, hit)) = hit {
                self.met.insert(pattern.clone(), true);
                hit.times -= 1;
                fault = Some(hit.clone());
            }
        }
        if fault.is_none() {
            let rng = &mut self.rng;
            let mut rates = self.rates.iter();
            let hit = rates.find(|(probability, _)| rng.random_bool(*probability));
            fault = hit.map(|(_, fault)| fault.clone());
        }
        self.injected += u64::from(fault.is_some());
        fault
    }
}
