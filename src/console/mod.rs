//! The daemon over HTTP, for whoever runs it: probes and metrics for machines, a console for people.
//!
//! It shows and it passes on resolutions; it decides nothing, and the daemon does its work whether it can listen or not.
//! What it reads goes through a connection of its own to the database, never through the journal's thread, which the
//! daemon needs. `guard` keeps strangers out: other machines, other users with the token missing, and web pages of
//! others in the browser of somebody who may come in.

mod api;
mod connections;
pub(crate) mod guard;
mod login;
mod page;
mod probes;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use serde_json::json;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Notify, OnceCell};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::domain::time::Millis;
use crate::http::Apis;
use crate::journal::{Journal, JournalError, OpenError, Storage, Store};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::settings::{Settings, Token};
use crate::status::Status;
use crate::telemetry::liveness::Liveness;
use login::Login;

/// How long to wait before a port that was taken is tried again.
const TAKEN: Duration = Duration::from_secs(30);

/// For how long a status is as good as a new one.
const FRESH: Duration = Duration::from_millis(500);

/// What the console shows of the daemon, and whom it notifies.
#[derive(Debug)]
pub struct Console {
    pub settings: Settings,
    pub apis: Apis,
    pub our_api: Arc<OurApi>,
    /// What changes something goes through the daemon's own connection.
    pub journal: Arc<Journal>,
    pub storage: Arc<Storage>,
    pub metrics: Arc<Metrics>,
    pub liveness: Arc<Liveness>,
    /// Notified of events to be delivered again.
    pub work_available: Arc<Notify>,
}

/// What the answers are made from.
#[derive(Debug)]
pub(crate) struct Web {
    pub(crate) console: Console,
    /// By which names it may be asked, besides addresses and localhost.
    names: Vec<String>,
    /// Without a token everybody on this machine may read, and the daemon's own user and root may do everything.
    login: Login,
    /// Opened when it is first needed.
    reader: OnceCell<Journal>,
    status: Mutex<Option<(Instant, Arc<Status>)>>,
}

/// Why something could not be read.
#[derive(Debug, Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the operating system refuses: {0}")]
    System(#[from] io::Error),
}

impl IntoResponse for ReadError {
    fn into_response(self) -> Response {
        error(StatusCode::SERVICE_UNAVAILABLE, &self.to_string())
    }
}

impl Web {
    /// Reads from the database, in its latest state, and keeps nobody waiting who writes to it.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Store) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, ReadError> {
        let reader = self.reader.get_or_try_init(|| self.open_reader()).await?;
        // Who has gone waits for nothing: what they asked would be read after all, and keep others, and the stop, waiting.
        let asking = Arc::new(());
        let asked = Arc::downgrade(&asking);
        let read = reader.with(move |store| match asked.upgrade() {
            Some(_) => operation(store),
            None => Err(JournalError::Closed),
        });
        let read = read.await;
        drop(asking);
        Ok(read?)
    }

    async fn open_reader(&self) -> Result<Journal, ReadError> {
        let db = self.console.settings.db();
        let store = tokio::task::spawn_blocking(move || Store::open_reader(&db));
        Ok(Journal::start(store.await.map_err(io::Error::other)??)?)
    }

    /// How things stand; as of a moment ago, if somebody has just asked.
    pub(crate) async fn status(&self) -> Result<Arc<Status>, ReadError> {
        // Held meanwhile: who asks at the same time gets the same answer.
        let mut status = self.status.lock().await;
        if let Some((at, status)) = &*status
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(status));
        }
        let settings = &self.console.settings;
        let settings = settings.clone();
        let read = move |store: &mut Store| Status::read(store, &settings, Millis::now());
        let read = Arc::new(self.read(read).await?);
        *status = Some((Instant::now(), Arc::clone(&read)));
        Ok(read)
    }

    /// Something has changed: whoever asks next gets a new status.
    pub(crate) async fn forget_status(&self) {
        *self.status.lock().await = None;
    }
}

/// Where to listen.
#[derive(Debug)]
pub enum Listener {
    /// There, as soon as nobody else does.
    At(SocketAddr),
    /// Here already.
    Open(std::net::TcpListener),
}

/// Serves until it is to close. The first token allows everything, the second to read.
pub(crate) async fn serve(
    console: Console,
    listener: Listener,
    tokens: [Token; 2],
    closing: CancellationToken,
) {
    let Some(opened) = closing.run_until_cancelled(open(listener)).await else {
        return;
    };
    let (listener, address) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::error!(reason = %error, "cannot listen: there is neither console nor metrics");
            return;
        }
    };
    tracing::info!(%address, "console at http://{address}/");
    let web = Arc::new(Web {
        names: console.settings.console_host.clone(),
        console,
        login: Login::new(tokens, address.port()),
        reader: OnceCell::new(),
        status: Mutex::default(),
    });
    connections::accept(listener, router(web), closing).await;
}

async fn open(listener: Listener) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = match listener {
        Listener::At(address) => bind(address).await,
        Listener::Open(listener) => {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)?
        }
    };
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Listens at an address, once it can be had.
async fn bind(address: SocketAddr) -> TcpListener {
    let mut refused = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::error!(
                        %address, reason = %error,
                        "cannot listen: the daemon works without console and metrics and tries again every {} s; {}",
                        TAKEN.as_secs(), remedy(&error)
                    );
                }
            }
        }
        sleep(TAKEN).await;
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "something else listens there, another bigchat-sync perhaps: end it, or set another address with --listen"
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address: set another one with --listen"
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not: set a port from 1024 on with --listen"
        }
        _ => "set another address with --listen, or `off`",
    }
}

fn router(web: Arc<Web>) -> Router {
    let for_all = Router::new()
        .route("/healthz", get(probes::healthz))
        .route("/readyz", get(probes::readyz))
        .route("/api/login", post(login::login))
        .merge(page::router());
    let for_known = Router::new()
        .route("/metrics", get(probes::metrics))
        .route(guard::LOGOUT, post(login::logout))
        .route("/api/status", get(api::status))
        .route("/api/activity", get(api::activity))
        .route("/api/failed", get(api::failed))
        .route("/api/failed/retry", post(api::retry))
        .route("/api/failed/discard", post(api::discard))
        .route("/api/failed/undo", post(api::undo))
        .route("/api/failed/{id}", get(api::event))
        .route("/api/pause", post(api::pause))
        .route("/api/resume", post(api::resume))
        .route("/api/search", get(api::search))
        .route("/api/conversations/{key}", get(api::conversation))
        .route("/api/resolutions", get(api::resolutions))
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&web),
            guard::authenticate,
        ));
    for_all
        .merge(for_known)
        .fallback(|| async { error(StatusCode::NOT_FOUND, "there is nothing here") })
        .method_not_allowed_fallback(|| async {
            error(StatusCode::METHOD_NOT_ALLOWED, "this cannot be done here")
        })
        .layer(middleware::from_fn_with_state(
            Arc::clone(&web),
            guard::csrf_guard,
        ))
        .with_state(web)
}

/// An answer that says what is wrong.
pub(crate) fn error(status: StatusCode, what: &str) -> Response {
    (status, Json(json!({ "error": what }))).into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use clap::Parser;
    use rusqlite::Connection;
    use tokio::time::timeout;
    use url::Url;

    use super::*;
    use crate::cli::Cli;
    use crate::http::{Api, Http, Network};

    fn journal() -> Journal {
        let connection = Connection::open_in_memory().expect("a database");
        Journal::start(Store::in_memory(connection, true).expect("a schema")).expect("a thread")
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_read() {
        let settings = Cli::try_parse_from(["bigchat-sync"])
            .expect("good flags")
            .settings;
        let http = |api, url: &Url| {
            let network = Network::new(url, Duration::from_secs(1)).expect("a client");
            let retry = settings.retry();
            Arc::new(Http::new(
                api,
                network,
                url.clone(),
                Token::default(),
                retry,
            ))
        };
        let apis = Apis {
            bigchat: http(Api::BigChat, &settings.bigchat_url),
            our_api: http(Api::OurApi, &settings.our_api_url),
        };
        let our_api = OurApi::new(Arc::clone(&apis.our_api), 1, settings.request_timeout);
        let console = Console {
            apis,
            our_api: Arc::new(our_api),
            journal: Arc::new(journal()),
            liveness: Arc::new(Liveness::new(settings.request_timeout, Instant::now())),
            storage: Arc::default(),
            metrics: Arc::default(),
            work_available: Arc::default(),
            settings,
        };
        let web = Web {
            console,
            names: Vec::new(),
            login: Login::new([Token::default(), Token::default()], 0),
            reader: OnceCell::new_with(Some(journal())),
            status: Mutex::default(),
        };
        let (go_on, waits) = mpsc::channel::<()>();
        let (tell, read) = mpsc::channel();
        let slow = web.read(move |_| {
            waits.recv().ok();
            Ok(())
        });
        let impatient = async {
            let tell = tell.clone();
            let asked = web.read(move |_| Ok(tell.send("what nobody waits for").ok()));
            timeout(Duration::from_millis(1), asked)
                .await
                .expect_err("it has to wait");
            drop(go_on);
        };
        let (slow, ()) = tokio::join!(slow, impatient);
        slow.expect("it is read");
        let last = web.read(move |_| Ok(tell.send("the last one").ok())).await;
        last.expect("it is read");
        assert_eq!(read.try_iter().collect::<Vec<_>>(), ["the last one"]);
    }
}
