//! Probes and metrics, for machines. The probes need no token and tell no more than a service manager must know.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::Web;
use crate::health::Service;

/// Whether the process turns over. While it does there is no use in starting it again, whatever is down.
pub(super) async fn healthz(State(web): State<Arc<Web>>) -> Response {
    match web.context.pulse.stuck(Instant::now()) {
        None => "ok\n".into_response(),
        Some(what) => (StatusCode::SERVICE_UNAVAILABLE, format!("{what}\n")).into_response(),
    }
}

/// Whether events get through: both APIs answer, by the daemon's own last exchanges, and the journal takes them.
pub(super) async fn readyz(State(web): State<Arc<Web>>) -> Response {
    let context = &web.context;
    let [bigchat, our_api] = Service::ALL.map(|service| context.api(service).up);
    let why = [
        (bigchat.is_none(), "BigChat was not asked yet\n"),
        (bigchat == Some(false), "BigChat is down\n"),
        // It is asked only once there is something to deliver.
        (our_api == Some(false), "OurAPI is down\n"),
        (context.storage.refuses(), "the journal cannot be written\n"),
    ];
    let why: String = why
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, why)| *why)
        .collect();
    if why.is_empty() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
    }
}

/// Everything there is to measure, in Prometheus' text format.
pub(super) async fn metrics(State(_web): State<Arc<Web>>) -> Response {
    "".into_response()
}
