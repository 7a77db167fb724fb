//! HTTP: health endpoints and metrics for machines, and a console for people.
//!
//! The console shows state and passes on resolutions and pauses. The daemon works whether or not it can listen. Reads
//! use their own connection to the database, not the journal's thread, which the daemon needs. `guard` refuses requests
//! without the token if one is set, changes by other users of this machine if none is set, and web pages of other
//! sites.

mod api;
mod connections;
pub(crate) mod guard;
mod health;
mod login;
mod page;

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
use crate::journal::{Journal, JournalError, OpenError, Resolution, Storage, Store};
use crate::metrics::Metrics;
use crate::our_api::OurApi;
use crate::settings::{Settings, Token};
use crate::status::Status;
use crate::telemetry::liveness::Liveness;
use login::Login;

/// How long to wait before a port in use is tried again.
const TAKEN: Duration = Duration::from_secs(30);

/// How long a status may be reused.
const FRESH: Duration = Duration::from_millis(500);

/// The parts of the daemon that the console shows or notifies.
#[derive(Debug)]
pub struct Console {
    pub settings: Settings,
    pub apis: Apis,
    pub our_api: Arc<OurApi>,
    /// Changes go through the daemon's own connection.
    pub journal: Arc<Journal>,
    pub storage: Arc<Storage>,
    pub metrics: Arc<Metrics>,
    pub liveness: Arc<Liveness>,
    /// Notified when events are to be delivered again.
    pub work_available: Arc<Notify>,
}

/// The state behind all responses.
#[derive(Debug)]
pub(crate) struct Web {
    pub(crate) console: Console,
    /// The names accepted as `Host`, besides addresses and localhost.
    names: Vec<String>,
    /// Without a token, every user of this machine may read, and the daemon's own user and root may do everything.
    login: Login,
    /// Opened by the first read.
    reader: OnceCell<Journal>,
    status: Mutex<Option<(Instant, Arc<Status>)>>,
}

#[derive(Debug, Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("the operating system reports an error: {0}")]
    System(#[from] io::Error),
    /// The daemon itself cannot write to its database, and has reported that.
    #[error("the journal cannot be written: {0}")]
    Refused(String),
}

impl IntoResponse for ReadError {
    fn into_response(self) -> Response {
        error(StatusCode::SERVICE_UNAVAILABLE, &self.to_string())
    }
}

impl Web {
    /// Reads from the latest state of the database, without blocking writers.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Store) -> Result<T, JournalError> + Send + 'static,
    ) -> Result<T, ReadError> {
        let reader = self.reader.get_or_try_init(|| self.open_reader()).await?;
        // If the caller is gone by now, the read is skipped, because it would only delay other reads and shutdown.
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

    /// The status, perhaps a moment old.
    pub(crate) async fn status(&self) -> Result<Arc<Status>, ReadError> {
        // The lock is held during the read, so that concurrent callers share one status.
        let mut status = self.status.lock().await;
        if let Some((at, status)) = &*status
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(status));
        }
        let db = self.console.settings.db();
        let read = move |store: &mut Store| Status::read(store, db, Millis::now());
        let read = self.read(read).await;
        let refusal = self.console.storage.refusal();
        let read = match (read, refusal) {
            (Ok(mut status), Some(refusal)) => {
                status.journal_refuses(&refusal);
                status
            }
            (Err(_), Some(refusal)) => return Err(ReadError::Refused(refusal.reason)),
            (read, None) => read?,
        };
        let read = Arc::new(read);
        *status = Some((Instant::now(), Arc::clone(&read)));
        Ok(read)
    }

    /// Makes the next caller get a new status.
    pub(crate) async fn forget_status(&self) {
        *self.status.lock().await = None;
    }
}

/// The listener, or where to open it.
#[derive(Debug)]
pub enum Listener {
    /// It is to be opened at this address, as soon as that is possible.
    At(SocketAddr),
    /// It is open already.
    Open(std::net::TcpListener),
}

/// Serves until `closing` is cancelled. The first token gives full access, the second read access.
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
            tracing::error!(reason = %error, "cannot listen; console and metrics are off");
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

/// Listens at an address as soon as that is possible.
async fn bind(address: SocketAddr) -> TcpListener {
    let mut refused = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::error!(
                        %address, reason = %error,
                        "cannot listen; the daemon works without console and metrics, and tries again every {} s; {}",
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
            "another program is listening there, perhaps another bigchat-sync; stop it, or set another address with --listen"
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address; set another one with --listen"
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not use that port; set a port of 1024 or above with --listen"
        }
        _ => "set another address with --listen, or `off`",
    }
}

fn router(web: Arc<Web>) -> Router {
    let for_all = Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .route("/api/login", post(login::login))
        .merge(page::router());
    let for_known = Router::new()
        .route("/metrics", get(health::metrics))
        .route(guard::LOGOUT, post(login::logout))
        .route("/api/status", get(api::status))
        .route("/api/activity", get(api::activity))
        .route("/api/failed", get(api::failed))
        .route("/api/failed/{id}", get(api::event))
        .route("/api/pause", post(api::pause))
        .route("/api/resume", post(api::resume))
        .route("/api/search", get(api::search))
        .route("/api/conversations/{key}", get(api::conversation))
        .route("/api/resolutions", get(api::resolutions));
    let resolutions = [Resolution::Retry, Resolution::Discard, Resolution::Undo];
    let for_known = resolutions
        .into_iter()
        .fold(for_known, |router, resolution| {
            let path = format!("/api/failed/{}", resolution.name());
            router.route(&path, api::resolving(resolution))
        })
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&web),
            guard::authenticate,
        ));
    for_all
        .merge(for_known)
        .fallback(|| async { error(StatusCode::NOT_FOUND, "this path does not exist") })
        .method_not_allowed_fallback(|| async {
            error(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path does not accept that method",
            )
        })
        .layer(middleware::from_fn_with_state(
            Arc::clone(&web),
            guard::csrf_guard,
        ))
        .with_state(web)
}

/// An error response with a message.
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

    /// A read whose caller is gone is skipped.
    #[tokio::test]
    async fn abandoned_read_is_skipped() {
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
        let our_api = OurApi::new(
            Arc::clone(&apis.our_api),
            &settings,
            CancellationToken::new(),
        );
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
        let (release, waits) = mpsc::channel::<()>();
        let (done, read) = mpsc::channel();
        let slow = web.read(move |_| {
            waits.recv().ok();
            Ok(())
        });
        let abandoned = async {
            let done = done.clone();
            let asked = web.read(move |_| Ok(done.send("an abandoned read").ok()));
            timeout(Duration::from_millis(1), asked)
                .await
                .expect_err("it has to wait");
            drop(release);
        };
        let (slow, ()) = tokio::join!(slow, abandoned);
        slow.expect("it is read");
        let last = web.read(move |_| Ok(done.send("the last one").ok())).await;
        last.expect("it is read");
        assert_eq!(read.try_iter().collect::<Vec<_>>(), ["the last one"]);
    }
}
