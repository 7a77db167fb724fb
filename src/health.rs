//! Whether the two APIs are up, as the daemon's own exchanges with them tell: nobody asks them for that.
//!
//! The daemon says so here when it notices; what is here is kept in the journal by [`keep`], for whoever asks how things
//! stand, whether the daemon runs or not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::http::{Http, Latest};
use crate::journal::{Api, JournalError};
use crate::time::Millis;

/// How often it is looked whether there is something to keep.
const LOOK: Duration = Duration::from_secs(1);

/// How often it is kept when an API was last asked, as long as nothing else changes.
const KEPT_EVERY: Duration = Duration::from_secs(10);

/// How much of an answer is told along with it, in characters.
const MAX_RESPONSE: usize = 200;

/// One of the two APIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// BigChat.
    BigChat,
    /// OurAPI.
    OurApi,
}

impl Service {
    /// Both of them.
    pub const ALL: [Self; 2] = [Self::BigChat, Self::OurApi];

    /// What people call it.
    pub fn title(self) -> &'static str {
        match self {
            Self::BigChat => "BigChat",
            Self::OurApi => "OurAPI",
        }
    }

    /// The setting that says where it is.
    pub fn flag(self) -> &'static str {
        match self {
            Self::BigChat => "--bigchat-url",
            Self::OurApi => "--our-api-url",
        }
    }

    /// Its name in the journal.
    pub fn name(self) -> &'static str {
        match self {
            Self::BigChat => "bigchat",
            Self::OurApi => "our_api",
        }
    }
}

/// Whether an API is up.
#[derive(Debug, Default)]
pub struct Health(Mutex<State>);

#[derive(Debug, Default, Clone)]
struct State {
    up: Option<bool>,
    since: Option<Millis>,
    trouble: Option<String>,
}

impl Health {
    /// It answered well.
    pub fn well(&self, now: Millis) {
        self.note(true, None, now);
    }

    /// It is down since then, for this reason: what it means, and what was answered.
    pub fn down(&self, reason: &str, response: &str, since: Millis) {
        let response: String = response.chars().take(MAX_RESPONSE).collect();
        self.note(false, Some(format!("{reason}: {response}")), since);
    }

    /// Whether it is known to be down.
    pub fn is_down(&self) -> bool {
        self.state().up == Some(false)
    }

    /// Takes over how it was when the last session ended.
    pub fn recall(&self, api: &Api) {
        *self.state() = State {
            up: api.up,
            since: api.since,
            trouble: api.trouble.clone(),
        };
    }

    /// How it is now, with the latest exchange.
    pub fn api(&self, http: &Http) -> Api {
        let State { up, since, trouble } = self.state().clone();
        let latest = http.latest();
        Api {
            up,
            since,
            trouble,
            asked_at: latest.as_ref().map(|latest| latest.at),
            request: latest.as_ref().map(Latest::request),
            response: latest.map(|latest| match latest.answer {
                Ok(status) => status.to_string(),
                Err(error) => error,
            }),
        }
    }

    fn note(&self, up: bool, trouble: Option<String>, now: Millis) {
        let mut state = self.state();
        if state.up != Some(up) {
            state.since = Some(now);
        }
        state.up = Some(up);
        state.trouble = trouble;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the journal takes what those have for it who write to it again and again.
#[derive(Debug, Default)]
pub struct Storage {
    /// It refuses the poller.
    pub polling: AtomicBool,
    /// It refuses delivery.
    pub delivery: AtomicBool,
}

impl Storage {
    /// Delivery could not use it.
    pub fn delivery_failed(&self, error: &JournalError) {
        if !self.delivery.swap(true, Ordering::Relaxed) {
            tracing::error!(reason = %error, "the journal cannot be written; pausing deliveries until it can");
        }
    }

    /// Delivery could use it.
    pub fn recovered(&self) {
        if self.delivery.load(Ordering::Relaxed) {
            self.delivery.store(false, Ordering::Relaxed);
            tracing::info!("the journal can be written again");
        }
    }

    /// Whether it refuses anybody.
    pub fn refuses(&self) -> bool {
        self.polling.load(Ordering::Relaxed) || self.delivery.load(Ordering::Relaxed)
    }
}

/// Takes over how both APIs were when the last session ended.
///
/// What was down is not known to be down where nothing will ask it, or where something else is asked now.
async fn recall(context: &Context) {
    for service in Service::ALL {
        let here = context.http(service).base().to_string();
        let recalled = context.journal.with(move |store| {
            let api = store.api(service.name())?;
            let is_this = api
                .request
                .as_ref()
                .is_some_and(|asked| asked.contains(&here));
            let is_asked = service == Service::BigChat || store.is_any_waiting()?;
            if is_this && (api.up == Some(true) || is_asked) {
                return Ok(api);
            }
            store.forget_api(service.name())?;
            Ok(Api::default())
        });
        // A disk that refuses is told of by those who cannot work without it.
        if let Ok(api) = recalled.await {
            context.health(service).recall(&api);
        }
    }
}

/// Keeps how both APIs are, whenever that changes, until `work` is done.
pub async fn keep<T>(context: &Context, work: impl Future<Output = T>) -> T {
    recall(context).await;
    let done = CancellationToken::new();
    let work = async {
        let outcome = work.await;
        done.cancel();
        outcome
    };
    let (outcome, ()) = tokio::join!(work, keep_until(context, &done));
    outcome
}

async fn keep_until(context: &Context, done: &CancellationToken) {
    let mut kept = Service::ALL.map(|_| Api::default());
    loop {
        let last = done.is_cancelled();
        let now = Service::ALL.map(|service| context.api(service));
        let news = now.iter().zip(&kept).any(|(now, kept)| !is_as(now, kept));
        if news || last {
            // Both at once: where the journal refuses, nobody waits for that twice.
            let names = Service::ALL.map(Service::name);
            let to_note: Vec<_> = names.into_iter().zip(now.clone()).collect();
            let noted = context.journal.with(move |store| store.note_apis(&to_note));
            if noted.await.is_ok() {
                kept = now;
            }
        }
        if last {
            return;
        }
        tokio::select! {
            () = done.cancelled() => {}
            () = sleep(LOOK) => {}
        }
    }
}

/// Whether nothing is worth keeping that was not kept.
fn is_as(api: &Api, kept: &Api) -> bool {
    let recent = |at: Option<Millis>| at.unwrap_or_default();
    (api.up, &api.trouble) == (kept.up, &kept.trouble)
        && recent(api.asked_at).since(recent(kept.asked_at)) < KEPT_EVERY
}
