//! A simulated BigChat: conversations, advisors and events that random numbers make up, and that tests can script.
//!
//! In [`Mode::Once`] it behaves as the real one, which makes events up at each poll and tells each once; in [`Mode::Log`]
//! as a usual vendor, whose log gives the same events for the same window. Either way it remembers what it told whom, and
//! whether the answer went out, which is what the comparison works from. This is the handle and the routes; what happens
//! is `world`'s to decide.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::Response,
};
use serde_json::{Value, json};
use url::form_urlencoded;

use super::{
    faults::{Faults, inject},
    http::{Clock, Refused, Server, Traffic, invalid, lock, parse_time, reply},
    world::{World, event},
};

pub use super::world::{Advisor, Log, Mode, NextPage, Options, Told};

#[derive(Clone, Copy, Debug)]
struct RequestNumber(u64);

/// Marks the answer that tells events, as long as nothing has replaced it.
#[derive(Clone)]
struct Intact;

/// A running simulated BigChat; stops when it is dropped.
pub struct BigChat {
    /// What goes wrong.
    pub faults: Faults,
    /// What it was asked.
    pub traffic: Traffic,
    /// Its own clock.
    pub clock: Clock,
    world: Arc<Mutex<World>>,
    server: Server,
}

impl BigChat {
    /// Starts it; port 0 takes a free one.
    pub async fn start(address: SocketAddr, options: Options) -> io::Result<Self> {
        let (clock, traffic, keep_alive) = (
            Clock::ahead(options.clock_offset),
            Traffic::default(),
            options.keep_alive,
        );
        let faults = Faults::new(options.seed, clock.clone());
        let world = Arc::new(Mutex::new(World::new(options, clock.clone())));
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&world))
            .layer(middleware::from_fn_with_state(faults.clone(), inject))
            .layer(middleware::from_fn_with_state(Arc::clone(&world), envelope));
        let server = Server::start(address, router, &traffic, keep_alive).await?;
        Ok(Self {
            faults,
            traffic,
            clock,
            world,
            server,
        })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// Stops it, and waits until it has.
    pub async fn shutdown(self) -> io::Result<()> {
        self.server.down().await
    }

    /// Cuts all connections and refuses new ones, until it is up again. Meanwhile nothing happens.
    pub async fn down(&self) -> io::Result<()> {
        lock(&self.world).set_down(true);
        self.server.down().await
    }

    /// Is there again, where it was.
    pub async fn up(&self) -> io::Result<()> {
        lock(&self.world).set_down(false);
        self.server.up().await.map(drop)
    }

    /// Everything told so far, in order of telling; of a log, everything in it.
    pub fn told(&self) -> Vec<Told> {
        lock(&self.world).told()
    }

    /// An event of a test's own: told on the next page, or put in the log. A conversation not known yet starts with it.
    pub fn push(&self, conversation_id: i64, name: &str, event_at: i64, data: Value) {
        self.push_raw(event(conversation_id, name, event_at, data));
    }

    /// The same with anything for an event, understood or not.
    pub fn push_raw(&self, event: Value) {
        lock(&self.world).push(event);
    }

    /// A whole page: in [`Mode::Once`] exactly what the next request gets, in [`Mode::Log`] put in the log.
    pub fn push_page(&self, events: Vec<Value>, next: NextPage) {
        lock(&self.world).push_page(events, next);
    }

    /// Nothing, or again something, happens by itself from now on.
    pub fn set_quiet(&self, quiet: bool) {
        lock(&self.world).set_quiet(quiet);
    }

    /// Whether some messages are awkward from now on.
    pub fn set_awkward(&self, awkward: bool) {
        lock(&self.world).set_awkward(awkward);
    }

    /// So often (0 to 1) the last page of a poll names an earlier one as the next.
    pub fn set_circles(&self, probability: f64) {
        lock(&self.world).circles = probability.clamp(0.0, 1.0);
    }

    /// What the latest request for events told, as far as nothing equal was told before: nobody can have it but from
    /// that answer.
    pub fn latest(&self) -> Vec<Told> {
        lock(&self.world).latest()
    }

    /// What the latest request for events told has reached nobody: who asked was killed before it was kept. Of a log that
    /// stays it will be told again; else it is lost. Returns how many events that were.
    pub fn unsay_latest(&self) -> usize {
        lock(&self.world).unsay()
    }

    /// An advisor of the current run.
    pub fn advisor(&self, advisor_id: i64) -> Option<Arc<Advisor>> {
        lock(&self.world).advisors.get(&advisor_id).cloned()
    }

    /// Opens a conversation of which nothing has been told.
    pub fn open(&self, conversation_id: i64, started_at: i64, first_advisor: i64) {
        lock(&self.world).open_scripted(conversation_id, started_at, first_advisor);
    }

    /// Restarts at once: everything is forgotten, and ids begin at 1 again, for others. What is scripted and not told yet
    /// is told by the next run; in a log it is forgotten, too.
    pub fn restart(&self) {
        lock(&self.world).restart();
    }

    /// Restarts just before the next poll's first page, so that no poll is half of one run and half of the next.
    pub fn restart_at_next_poll(&self) {
        lock(&self.world).restart_at_poll = true;
    }

    /// The current run, from 1.
    pub fn run(&self) -> u32 {
        lock(&self.world).run
    }

    /// The number of the latest poll, as in [`Told::poll`]; of a log, too.
    pub fn polls(&self) -> u64 {
        lock(&self.world).poll
    }
}

async fn answer(
    State(world): State<Arc<Mutex<World>>>,
    Extension(RequestNumber(number)): Extension<RequestNumber>,
    request: Request,
) -> Result<Response, Refused> {
    let mut world = lock(&world);
    let parts: Vec<&str> = request.uri().path().split('/').skip(1).collect();
    match (request.method(), parts.as_slice()) {
        (&Method::GET, ["events"]) => events(&mut world, &request, number),
        (&Method::GET, ["conversations", id]) => world
            .details(integer(["path", "conversation_id"], id)?)
            .map(|details| reply(StatusCode::OK, &details))
            .ok_or_else(|| Refused::not_found("Conversation not found")),
        (&Method::GET, ["advisors", id]) => world
            .advisors
            .get(&integer(["path", "advisor_id"], id)?)
            .map(|advisor| reply(StatusCode::OK, advisor.as_ref()))
            .ok_or_else(|| Refused::not_found("Advisor not found")),
        (_, ["events"] | ["conversations" | "advisors", _]) => Err(Refused::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "Method Not Allowed",
        )),
        _ => Err(Refused::not_found("Not Found")),
    }
}

fn events(world: &mut World, request: &Request, number: u64) -> Result<Response, Refused> {
    let query = request.uri().query().unwrap_or_default();
    // Of several the last counts.
    let given = |name: &str| {
        let values = form_urlencoded::parse(query.as_bytes()).filter(|(key, _)| key == name);
        values.last().map(|(_, value)| value.into_owned())
    };
    let time = |name: &str| {
        let Some(text) = given(name) else {
            return Ok(None);
        };
        let message = "Input should be a valid datetime or date";
        let (time, offset) = parse_time(&text).ok_or_else(|| {
            Refused::invalid(vec![invalid(
                "datetime_from_date_parsing",
                ["query", name],
                message,
                &text.into(),
            )])
        })?;
        Ok(Some(time.and_utc().timestamp() - i64::from(offset)))
    };
    let window = (time("start_at")?, time("end_at")?);
    let page = given("page").map_or(Ok(0), |text| integer(["query", "page"], &text))?;
    let (events, next) = world
        .page(number, window, page)
        .ok_or_else(Refused::unhandled)?;
    let first = || {
        let parts = query.split('&').filter(|part| !part.starts_with("page="));
        parts.collect::<Vec<_>>().join("&")
    };
    let next = match next {
        NextPage::None => None,
        NextPage::Url(url) => Some(Err(url)),
        NextPage::Same => Some(Ok(query.to_owned())),
        NextPage::First => Some(Ok(first())),
        NextPage::Usual => {
            // The real one appends, even where there is a `page` already.
            let kept = if world.in_log() {
                first()
            } else {
                query.to_owned()
            };
            Some(Ok(format!("{kept}&page={}", page + 1)))
        }
    };
    let next = next.map(|next| {
        next.map_or_else(
            |url| url,
            |query| {
                let host = request.headers().get(header::HOST);
                let host = host.and_then(|host| host.to_str().ok()).unwrap_or_default();
                format!("http://{host}{}?{query}", request.uri().path())
            },
        )
    });
    let mut response = reply(
        StatusCode::OK,
        &json!({ "nextPageUrl": next, "events": events }),
    );
    response.extensions_mut().insert(Intact);
    Ok(response)
}

fn integer(place: [&str; 2], text: &str) -> Result<i64, Refused> {
    let message = "Input should be a valid integer, unable to parse string as an integer";
    text.parse()
        .map_err(|_| Refused::invalid(vec![invalid("int_parsing", place, message, &text.into())]))
}

/// Numbers the request, dates the answer, and notes whether what it tells went out.
async fn envelope(
    State(world): State<Arc<Mutex<World>>>,
    mut request: Request,
    next: Next,
) -> Response {
    let for_events = request.uri().path() == "/events";
    let number = lock(&world).request();
    request.extensions_mut().insert(RequestNumber(number));
    let mut response = next.run(request).await;
    let mut world = lock(&world);
    world.answered(number, response.extensions().get::<Intact>().is_some());
    if for_events && response.status().is_server_error() {
        world.failed();
    }
    if let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(world.date().into())) {
        response.headers_mut().insert(header::DATE, date);
    }
    response
}
