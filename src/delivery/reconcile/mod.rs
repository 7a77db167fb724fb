//! Reconciling a conversation: sends the difference between the desired and the observed chat.
//!
//! The journal's record of the chat may be wrong after a write of unknown outcome, a crash, a loss in OurAPI, or the
//! use of an older copy of the database. The conversation is then *stale*, and there is one remedy: the chat is read
//! back, and its messages are accounted for. The claim ends with that; the next claim sends missing and waiting events.

mod create;
mod read_back;
mod verify;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::read_back::Refreshed;
use super::Delivery;
use super::attempts::AttemptError;
use super::handlers::{self, message};
use crate::bigchat::details;
use crate::domain::account::MessageKey;
use crate::domain::conversation::{Conversation, Desired, FieldSet, Fields, Pending};
use crate::domain::ids::EventId;
use crate::domain::progress::{
    Claim, Effect, Missing, Observation, VerificationResult, Verify, Work,
};
use crate::http::{ApiError, ErrorKind, Resource};
use crate::mutex::lock;
use crate::settings::MessageAuthor;

/// A piece of work in progress, and finally its result.
#[derive(Debug)]
pub(super) struct Reconciliation {
    delivery: Arc<Delivery>,
    pub(super) conversation: Conversation,
    pub(super) events: Arc<[Pending]>,
    pub(super) claim: Claim,
    /// The events delivered or permanently rejected. The others were not attempted, except in the request that failed
    /// (see `stopped`).
    pub(super) done: Vec<(EventId, Result<Effect, AttemptError>)>,
    /// Set if the work ended early.
    pub(super) stopped: Option<Stopped>,
    pub(super) observation: Observation,
    pub(super) consumed: Vec<MessageKey>,
    /// How many writes OurAPI carried out.
    pub(super) writes: u32,
    pub(super) verify: Option<Verify>,
    /// What the verification found, once it has succeeded.
    pub(super) found: Option<VerificationResult>,
    /// The drift that is not overwritten; `None`: the chat was not read.
    pub(super) drift: Option<FieldSet>,
    pub(super) missing: Option<Missing>,
}

impl Reconciliation {
    /// Whether the failed request may still be carried out.
    pub(super) fn is_timeout(&self) -> bool {
        let stopped = self.stopped.as_ref();
        stopped.is_some_and(|stopped| stopped.error.is_timeout())
    }
}

/// Why the work ended early.
#[derive(Debug)]
pub(super) struct Stopped {
    /// The event that failed, or the one that was not sent because a change of the chat failed; `None`: no event.
    pub(super) at: Option<EventId>,
    pub(super) error: AttemptError,
    pub(super) step: Step,
}

/// The step that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The chat was read, but its messages could not be compared: OurAPI does not return them, or the journal has an
    /// invalid one.
    ComparingMessages,
    /// A change of the chat that no waiting event requests. The event `at` was not sent.
    ChangingChat,
    Other,
}

impl Stopped {
    fn at(event: Option<EventId>, error: AttemptError) -> Self {
        Self {
            at: event,
            error,
            step: Step::Other,
        }
    }

    fn during(self, step: Step) -> Self {
        Self { step, ..self }
    }
}

/// Delivers the events of a conversation until they are done, one fails, or the daemon is to stop. A verification ends
/// early if `give_way` is cancelled before the chat's messages have been read; if it is cancelled later, the
/// verification is completed. A panic is a failure.
pub(super) async fn reconcile(
    delivery: Arc<Delivery>,
    work: Work,
    give_way: &CancellationToken,
) -> Reconciliation {
    let Work {
        conversation,
        events,
        claim,
        verify,
    } = work;
    let mut reconciliation = Reconciliation {
        delivery,
        conversation,
        events,
        claim,
        done: Vec::new(),
        stopped: None,
        observation: Observation::None,
        consumed: Vec::new(),
        writes: 0,
        verify,
        found: None,
        drift: None,
        missing: None,
    };
    let work = async {
        match verify {
            Some(verify) => Box::pin(reconciliation.verify(verify, give_way)).await,
            None => reconciliation.deliver().await,
        }
    };
    // Each step is recorded once it is done, so what is recorded counts even after a panic.
    reconciliation.stopped = match AssertUnwindSafe(work).catch_unwind().await {
        Ok(ended) => ended.err(),
        Err(_) => Some(reconciliation.panicked()),
    };
    reconciliation
}

impl Reconciliation {
    /// Handles a panic as a failure of the first event that is not done. Changes of the chat precede messages.
    fn panicked(&self) -> Stopped {
        let is_done = |event: &&Pending| self.done.iter().any(|(id, _)| *id == event.id);
        let left = self.events.iter().filter(|event| !is_done(event));
        let first = left.min_by_key(|event| event.payload.kind().is_message());
        let at = first.map(|event| event.id);
        tracing::error!(
            conversation = self.conversation.bigchat_id,
            event = at.map(|at| at.0),
            "a panic interrupted the work on a conversation; its chat is read back before anything else is sent"
        );
        self.delivery.metrics.panicked();
        Stopped::at(at, AttemptError::Panicked)
    }

    async fn deliver(&mut self) -> Result<(), Stopped> {
        if self.is_stale() {
            return Box::pin(self.read_back()).await;
        }
        // Rare futures are boxed, so that the one polled for each message stays small.
        Box::pin(self.change_chat()).await?;
        if self.observation != Observation::None && self.observation != Observation::Created {
            return Ok(());
        }
        self.send_messages().await
    }

    /// The latest event that may have been delivered without a record in this journal.
    fn replay_until(&self) -> EventId {
        self.delivery.session.replay_until.get()
    }

    /// Whether what OurAPI has lost is sent again.
    fn rebuilds(&self) -> bool {
        self.delivery.settings.rebuild.restores()
    }

    /// Whether the journal's record of the chat may be wrong.
    fn is_stale(&self) -> bool {
        self.conversation.observed.chat.is_some()
            && (self.claim.became_stale || self.claim.is_lost || self.must_be_read())
    }

    /// Whether the chat may have some of the events, and was not read yet.
    fn must_be_read(&self) -> bool {
        // A chat recorded as unreadable has unreadable messages, but its fields were read. A change needs only the
        // fields.
        let must_be_read = |event: &Pending| {
            self.claim.may_be_delivered(event, self.replay_until())
                && (event.payload.kind().is_message()
                    || !lock(&self.delivery.unreadable).contains(&self.conversation.id))
        };
        // Once the messages have been read, a message whose outcome is still unknown has a credit, unless an equal
        // message of the claim has it. If neither has one, the messages have not been read since the attempt that may
        // have sent this one: for example, because OurAPI failed to return them while this one was waiting behind a
        // full claim.
        let is_unresolved = |event: &Pending| {
            let has_credit = |other: &Pending| {
                other.uses_credit(self.replay_until()) && other.key() == event.key()
            };
            event.payload.kind().is_message()
                && event.attempts.outcome_unknown
                && !self.events.iter().any(has_credit)
        };
        self.events.iter().any(is_unresolved)
            || !self.claim.is_read && self.events.iter().any(must_be_read)
    }

    /// Writes the desired fields of the chat: all changes at once, or one by one if one of them has failed before or
    /// OurAPI rejects them together.
    async fn change_chat(&mut self) -> Result<(), Stopped> {
        let changes: Vec<Pending> = self
            .events
            .iter()
            .filter(|event| !event.payload.kind().is_message())
            .cloned()
            .collect();
        let has_failed = changes.iter().any(|event| event.attempts.failed > 0);
        if changes.len() < 2 || !has_failed {
            match self.write_chat(&changes).await {
                Err(error) if error.is_rejection() && changes.len() > 1 => {}
                written => return self.changed(&changes, written).map(drop),
            }
        }
        for event in changes {
            if self.delivery.stopping.is_cancelled() {
                break;
            }
            let change = std::slice::from_ref(&event);
            let written = self.write_chat(change).await;
            if !self.changed(change, written)? {
                break;
            }
        }
        Ok(())
    }

    /// Records the result of writing `changes`, which is never a rejection if there are several. Returns whether
    /// another may follow.
    fn changed(
        &mut self,
        changes: &[Pending],
        written: Result<Option<Effect>, AttemptError>,
    ) -> Result<bool, Stopped> {
        match (written, changes) {
            (Ok(None), _) => return Ok(false),
            (Ok(Some(effect)), _) => {
                let done = changes.iter().map(|event| (event.id, Ok(effect)));
                self.done.extend(done);
            }
            (Err(error), []) if error.is_rejection() => self.unchangeable(error),
            (Err(error), [event, ..]) if error.is_rejection() => {
                self.done.push((event.id, Err(error)));
            }
            (Err(error), [event, ..]) => return Err(Stopped::at(Some(event.id), error)),
            (Err(error), []) => {
                let at = self.events.first().map(|event| event.id);
                return Err(Stopped::at(at, error).during(Step::ChangingChat));
            }
        }
        Ok(true)
    }

    /// Handles the rejection of a change that no waiting event requests. An existing chat stays as it is and still gets
    /// messages. Without a chat, the first waiting event fails. If no event is waiting, there is no chat until the next
    /// event.
    fn unchangeable(&mut self, error: AttemptError) {
        if self.conversation.observed.chat.is_none() {
            if let Some(first) = self.events.first() {
                self.done.push((first.id, Err(error)));
                return;
            }
            self.observation = Observation::Read(None);
        }
        let failure = error.logged();
        tracing::warn!(
            conversation = self.conversation.bigchat_id, chat = self.logged_chat(),
            reason = %failure.reason, request = %failure.request, response = %failure.response,
            "OurAPI rejects a change to a chat; the chat is not changed until the conversation's next event or verification"
        );
    }

    /// Folds `changes` and writes the difference. Returns `None` if the changes were not made, because an existing
    /// chat was adopted or the chat is lost.
    async fn write_chat(&mut self, changes: &[Pending]) -> Result<Option<Effect>, AttemptError> {
        let observed = &self.conversation.observed;
        let is_needed = !self.events.is_empty()
            || observed.chat.is_some()
            || observed.external_id.is_some() && (self.rebuilds() || self.claim.is_rewound);
        if !is_needed {
            if self.claim.is_lost {
                // No part of the chat exists, and none is desired.
                self.observation = Observation::Read(None);
            }
            return Ok(Some(Effect::Nothing));
        }
        let mut desired = self.folded(changes);
        if self.needs_details(&desired) {
            details::read(&self.delivery.source, &mut self.conversation).await?;
            desired = self.folded(changes);
        }
        let fields = self.fields(&desired, changes).await?;
        let effect = match self.conversation.observed.chat {
            Some(chat) => self.patch(chat, &desired, &fields).await?,
            None => self.create(&desired, &fields).await?,
        };
        if effect.is_some() {
            self.conversation.desired = desired;
        }
        Ok(effect)
    }

    /// The desired chat after `changes`.
    fn folded(&self, changes: &[Pending]) -> Desired {
        let mut desired = self.conversation.desired;
        for event in changes {
            handlers::fold(&mut desired, event);
        }
        desired
    }

    async fn patch(
        &mut self,
        chat: Uuid,
        desired: &Desired,
        fields: &Fields,
    ) -> Result<Option<Effect>, AttemptError> {
        let observed = &mut self.conversation.observed;
        let change = observed.diff(fields);
        if change.is_empty() {
            observed.apply(fields, desired.advisor());
            return Ok(Some(Effect::Nothing));
        }
        let Err(error) = self.delivery.our_api.change_chat(chat, &change).await else {
            observed.apply(fields, desired.advisor());
            self.writes += 1;
            return Ok(Some(Effect::ChatChanged));
        };
        match error.kind {
            ErrorKind::NotFound(Resource::Chat) => self.chat_missing(error).await.map(|()| None),
            ErrorKind::NotFound(Resource::Agent) => {
                Err(self.agent_missing(fields.agent, error).await)
            }
            _ => Err(AttemptError::Write(error)),
        }
    }

    /// Handles a not-found response for the chat. The chat counts as gone only if OurAPI's list confirms it. If it was
    /// just created, the attempt counts as failed, so that the chat is not created again without a back-off.
    async fn chat_missing(&mut self, error: ApiError) -> Result<(), AttemptError> {
        match self.refresh().await? {
            Refreshed::Gone => {
                let is_new = self.observation == Observation::Created;
                self.gone(self.rebuilds()).await?;
                match is_new {
                    true => Err(AttemptError::DataLost("OurAPI has lost the new chat")),
                    false => Ok(()),
                }
            }
            // The list has the chat.
            Refreshed::Ours(_) => Err(AttemptError::Write(
                error.with_kind(ErrorKind::OutcomeUnknown { timed_out: false }),
            )),
        }
    }

    /// Handles a not-found response for an agent. If the loss is confirmed, the advisor's agent is written again. The
    /// lost agent stays recorded until then, so that a chat that still has it does not count as changed by another
    /// client. Without an advisor, the chat is at once recorded as having no agent.
    async fn agent_missing(&mut self, agent: Option<Uuid>, error: ApiError) -> AttemptError {
        let error = self.delivery.agents.missing(agent, error).await;
        if matches!(error, AttemptError::DataLost(_)) {
            let Conversation {
                desired, observed, ..
            } = &mut self.conversation;
            observed.agent = observed.agent.filter(|_| desired.advisor().is_some());
            observed.advisor = None;
        }
        error
    }

    async fn send_messages(&mut self) -> Result<(), Stopped> {
        let Some(chat) = self.conversation.observed.chat else {
            return Ok(());
        };
        let author = match self.delivery.settings.message_author {
            MessageAuthor::None => None,
            MessageAuthor::Agent => self.conversation.observed.agent,
        };
        let events = Arc::clone(&self.events);
        for event in events.iter() {
            let Some(text) = event.payload.text() else {
                continue;
            };
            if self.delivery.stopping.is_cancelled() {
                return Ok(());
            }
            if event.uses_credit(self.replay_until()) {
                self.consumed.extend(event.key());
                self.done.push((event.id, Ok(Effect::Nothing)));
                continue;
            }
            let sent = message::send(&self.delivery.our_api, chat, event, text, author).await;
            let Err(error) = sent else {
                self.writes += 1;
                self.done.push((event.id, Ok(Effect::MessageAdded)));
                continue;
            };
            let error = match error.kind {
                ErrorKind::NotFound(Resource::Chat) => {
                    match Box::pin(self.chat_missing(error)).await {
                        Ok(()) => return Ok(()),
                        Err(error) => error,
                    }
                }
                ErrorKind::NotFound(Resource::Agent) => {
                    Box::pin(self.agent_missing(author, error)).await
                }
                _ => AttemptError::Write(error),
            };
            if error.is_rejection() {
                self.done.push((event.id, Err(error)));
            } else {
                return Err(Stopped::at(Some(event.id), error));
            }
        }
        Ok(())
    }
}
