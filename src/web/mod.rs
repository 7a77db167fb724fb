//! The daemon over HTTP, for whoever runs it: probes and metrics for machines, a console for people.
//!
//! It shows and it passes on decisions; it decides nothing, and the daemon does its work whether it can listen or not.
//! What it reads goes through a connection of its own to the database, never through the journal's thread, which the
//! daemon needs. [`guard`] keeps strangers out: other machines, other users with the token missing, and web pages of
//! others in the browser of somebody who may come in.

mod connections;
pub(crate) mod guard;
mod login;
mod probes;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use secrecy::SecretString;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use login::Login;

/// How long to wait before a port that was taken is tried again.
const TAKEN: Duration = Duration::from_secs(30);

/// No request needs more: ids of some thousand events.
const MAX_BODY: usize = 64 << 10;

/// What the answers are made from.
#[derive(Debug)]
pub(crate) struct Web {
    /// The daemon's.
    pub(crate) context: Arc<Context>,
    /// By which names it may be asked, besides addresses and localhost.
    names: Vec<String>,
    /// `None`: whoever can reach it may do everything.
    login: Option<Login>,
}

/// Where to listen.
#[derive(Debug)]
pub enum Door {
    /// There, as soon as nobody else does.
    At(SocketAddr),
    /// Here already.
    Open(std::net::TcpListener),
}

/// Serves until it is to close. Whoever has the token, or anybody if there is none, may do what the console can.
pub(crate) async fn serve(
    context: Arc<Context>,
    door: Door,
    token: Option<SecretString>,
    closing: CancellationToken,
) {
    let Some(opened) = closing.run_until_cancelled(open(door)).await else {
        return;
    };
    let (listener, address) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::error!(%error, "cannot listen: there is neither console nor metrics");
            return;
        }
    };
    tracing::info!(%address, "console at http://{address}/");
    let web = Arc::new(Web {
        names: context.settings.console_host.clone(),
        context,
        login: token.map(|token| Login::new(token, address.port())),
    });
    connections::accept(listener, router(web), closing).await;
}

async fn open(door: Door) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = match door {
        Door::At(address) => bind(address).await,
        Door::Open(listener) => {
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
                        %address, %error,
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
        .route("/api/login", post(login::login));
    let for_known = Router::new()
        .route("/metrics", get(probes::metrics))
        .route("/api/logout", post(login::logout))
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&web),
            guard::identify,
        ));
    for_all
        .merge(for_known)
        .fallback(|| async { error(StatusCode::NOT_FOUND, "there is nothing here") })
        .method_not_allowed_fallback(|| async {
            error(StatusCode::METHOD_NOT_ALLOWED, "this cannot be done here")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&web),
            guard::guard,
        ))
        .with_state(web)
}

/// An answer that says what is wrong.
pub(crate) fn error(status: StatusCode, what: &str) -> Response {
    (status, Json(json!({ "error": what }))).into_response()
}
