//! The console's API, in JSON. Reads use the console's own connection to the database. Only resolutions and pauses go
//! through the daemon's journal; events are resolved a few hundred at a time, so that delivery never waits long.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, post};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::json;

use super::guard::Client;
use super::{ReadError, Web, error};
use crate::domain::ids::{ConversationId, EventId};
use crate::domain::pause::Pause;
use crate::domain::time::Millis;
use crate::journal::{Operator, Reason, Resolution, Search, Selection};
use crate::settings::LONGEST;

/// The longest period of activity, in hours.
const HOURS: u32 = 7 * 24;

/// The maximum length of a search text, in characters.
const MAX_QUERY: usize = 200;

/// How long a request resolves events before it reports progress.
const AT_ONCE: Duration = Duration::from_secs(5);

type Answer = Result<Response, RequestError>;

#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{0}")]
    BadRequest(String),
    #[error("there is no {0} {1}; it may have been dropped after the retention period")]
    NotThere(&'static str, i64),
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        match self {
            Self::Read(error) => error.into_response(),
            Self::BadRequest(what) => error(StatusCode::BAD_REQUEST, &what),
            Self::NotThere(..) => error(StatusCode::NOT_FOUND, &self.to_string()),
        }
    }
}

impl From<QueryRejection> for RequestError {
    fn from(rejection: QueryRejection) -> Self {
        Self::BadRequest(rejection.body_text())
    }
}

impl From<PathRejection> for RequestError {
    fn from(rejection: PathRejection) -> Self {
        Self::BadRequest(rejection.body_text())
    }
}

impl From<JsonRejection> for RequestError {
    fn from(rejection: JsonRejection) -> Self {
        Self::BadRequest(rejection.body_text())
    }
}

/// `GET /api/status`: the same as `bigchat-sync status --json`.
pub(super) async fn status(State(web): State<Arc<Web>>) -> Answer {
    Ok(Json(&*web.status().await?).into_response())
}

#[derive(Deserialize)]
pub(super) struct Span {
    hours: Option<u32>,
}

/// `GET /api/activity?hours=6`: how many events were received, delivered and dead-lettered, in intervals of a minute or
/// more.
pub(super) async fn activity(
    State(web): State<Arc<Web>>,
    span: Result<Query<Span>, QueryRejection>,
) -> Answer {
    let minutes = span?.hours.unwrap_or(6).clamp(1, HOURS) * 60;
    let activity = web
        .read(move |store| store.activity(minutes, Millis::now()))
        .await?;
    Ok(Json(activity).into_response())
}

#[derive(Deserialize)]
pub(super) struct OfReason {
    reason: Option<String>,
    after: Option<EventId>,
}

/// `GET /api/failed`: how many events have failed, by reason. With `?reason=…&after=ID`: the failed events of that
/// reason, one page at a time.
pub(super) async fn failed(
    State(web): State<Arc<Web>>,
    which: Result<Query<OfReason>, QueryRejection>,
) -> Answer {
    let Query(OfReason { reason, after }) = which?;
    let Some(reason) = reason else {
        let status = web.status().await?;
        let (groups, total) = (&status.figures.failed_by_reason, status.figures.failed);
        let grouped: u64 = groups.iter().map(|group| group.count).sum();
        let more = grouped < total;
        let now = status.now;
        return Ok(
            Json(json!({ "groups": groups, "total": total, "more": more, "now": now }))
                .into_response(),
        );
    };
    let after = after.unwrap_or_default();
    let page = web
        .read(move |store| store.failed_for(&reason, after))
        .await?;
    Ok(Json(page).into_response())
}

/// `GET /api/failed/{id}`: an event with all its details, whether or not it has failed.
pub(super) async fn event(
    State(web): State<Arc<Web>>,
    id: Result<Path<EventId>, PathRejection>,
) -> Answer {
    let Path(id) = id?;
    let event = web.read(move |store| store.whole_event(id)).await?;
    let event = event.ok_or(RequestError::NotThere("event", id.0))?;
    Ok(Json(event).into_response())
}

/// Which failed events to resolve. Exactly one of the fields is set.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    ids: Option<BTreeSet<EventId>>,
    reason: Option<String>,
    all: Option<bool>,
    /// With a reason or `all`: only events that had failed by then, not those that have failed since.
    failed_by: Option<Millis>,
    /// Only events after this one.
    #[serde(default)]
    after: EventId,
}

impl Which {
    fn selection(self) -> Result<(Selection, EventId), RequestError> {
        let after = self.after;
        let failed_by = self.failed_by.unwrap_or(Millis(i64::MAX));
        let selection = match (self.ids, self.reason, self.all) {
            (Some(ids), None, None) => Selection::Ids(ids),
            (None, reason @ Some(_), None) | (None, reason @ None, Some(true)) => {
                let reason = reason.map(Reason::Is);
                Selection::By { reason, failed_by }
            }
            _ => {
                let what = r#"exactly one of "ids", "reason" and "all": true is required"#;
                return Err(RequestError::BadRequest(what.to_owned()));
            }
        };
        Ok((selection, after))
    }
}

/// `POST /api/failed/retry`, `/discard` and `/undo`: resolves failed events.
pub(super) fn resolving(resolution: Resolution) -> MethodRouter<Arc<Web>> {
    post(
        move |State(web): State<Arc<Web>>,
              Extension(client): Extension<Client>,
              which: Result<Json<Which>, JsonRejection>| async move {
            resolve(&web, client, which?.0, resolution).await
        },
    )
}

/// Answers with the number of events resolved and, if more are left, the event after which to continue.
async fn resolve(web: &Web, client: Client, which: Which, resolution: Resolution) -> Answer {
    let who = Operator::Console(client.0);
    let (selection, mut after) = which.selection()?;
    let (begun, mut done) = (Instant::now(), 0);
    let next = loop {
        let (selection, who) = (selection.clone(), who.clone());
        let resolved = web
            .console
            .journal
            .with(move |store| {
                store.resolve_failed(&selection, resolution, &who, after, Millis::now())
            })
            .await
            .map_err(ReadError::from)?;
        done += resolved.done;
        match resolved.next {
            Some(next) if begun.elapsed() < AT_ONCE => after = next,
            next => break next,
        }
    };
    tracing::info!(
        resolution = resolution.name(),
        events = done,
        "failed events resolved in the console"
    );
    web.forget_status().await;
    if resolution == Resolution::Retry && done > 0 {
        web.console.work_available.notify_one();
    }
    Ok(Json(json!({ "done": done, "next": next })).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Length {
    /// Absent: until an operator resumes.
    seconds: Option<u64>,
}

/// `POST /api/pause`: pauses deliveries, for the given number of seconds if there is one.
pub(super) async fn pause(
    State(web): State<Arc<Web>>,
    length: Result<Json<Length>, JsonRejection>,
) -> Answer {
    let length = length?.0.seconds.map(Duration::from_secs);
    if length.is_some_and(|length| length.is_zero() || length > LONGEST) {
        let what = "\"seconds\" must be at least 1 and at most 100 years";
        return Err(RequestError::BadRequest(what.to_owned()));
    }
    let pause = Pause::begin(length, Millis::now());
    let our_api = Arc::clone(&web.console.our_api);
    let paused = web.console.journal.with(move |store| {
        store.set_pause(pause)?;
        our_api.set_pause(Some(pause));
        Ok(())
    });
    paused.await.map_err(ReadError::from)?;
    web.forget_status().await;
    Ok(Json(json!({ "paused": pause })).into_response())
}

/// `POST /api/resume`: ends the pause, if there is one.
pub(super) async fn resume(State(web): State<Arc<Web>>) -> Answer {
    let our_api = Arc::clone(&web.console.our_api);
    let ended = web.console.journal.with(move |store| {
        if let Some(pause) = store.pause()? {
            store.end_pause(pause, Millis::now())?;
        }
        our_api.set_pause(None);
        Ok(())
    });
    ended.await.map_err(ReadError::from)?;
    web.console.work_available.notify_one();
    web.forget_status().await;
    Ok(Json(json!({ "paused": null })).into_response())
}

#[derive(Deserialize)]
pub(super) struct Text {
    q: Option<String>,
}

/// `GET /api/search?q=…`: conversations by id, chat, external id, or an agent's name or e-mail address; without a text,
/// the latest ones. A number may also be the id of an event.
pub(super) async fn search(
    State(web): State<Arc<Web>>,
    text: Result<Query<Text>, QueryRejection>,
) -> Answer {
    let text = text?.0.q.unwrap_or_default();
    let text: String = text.chars().take(MAX_QUERY).collect();
    let wanted = Search::read(&text, &web.console.settings.external_id_prefix);
    let read = web.read(move |store| {
        let found = store.find_conversations(&wanted)?;
        Ok((found, store.found_event(&wanted)?))
    });
    let ((rows, more), event) = read.await?;
    Ok(Json(json!({ "conversations": rows, "more": more, "event": event })).into_response())
}

#[derive(Deserialize)]
pub(super) struct After {
    after: Option<EventId>,
}

/// `GET /api/conversations/{key}?after=ID`: a conversation by its key in the journal, and its events, one page at a
/// time.
pub(super) async fn conversation(
    State(web): State<Arc<Web>>,
    key: Result<Path<ConversationId>, PathRejection>,
    after: Result<Query<After>, QueryRejection>,
) -> Answer {
    let (Path(key), after) = (key?, after?.after.unwrap_or_default());
    let read = web.read(move |store| {
        let Some(conversation) = store.conversation_row(key)? else {
            return Ok(None);
        };
        Ok(Some((conversation, store.events_of(key, after)?)))
    });
    let (conversation, events) = read
        .await?
        .ok_or(RequestError::NotThere("conversation", key.0))?;
    Ok(
        Json(json!({ "conversation": conversation, "events": events.rows, "next": events.next }))
            .into_response(),
    )
}

#[derive(Deserialize)]
pub(super) struct Before {
    before: Option<i64>,
}

/// `GET /api/resolutions?before=ID`: how failed events were resolved, the latest first.
pub(super) async fn resolutions(
    State(web): State<Arc<Web>>,
    before: Result<Query<Before>, QueryRejection>,
) -> Answer {
    let before = before?.before;
    let page = web
        .read(move |store| store.resolutions_before(before))
        .await?;
    Ok(Json(page).into_response())
}
