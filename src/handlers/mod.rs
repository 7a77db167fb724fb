//! The handlers, one for each kind of event, and the order in which a conversation's events go to them.
//!
//! A handler may run again at any time: it brings OurAPI to what the event says, and finds most of it there. What
//! events say of the chat itself is put together and sent as one change; messages follow in order of arrival.

mod check;
mod end;
mod message;
mod start;
mod transfer;

use uuid::Uuid;

use crate::context::Context;
use crate::conversation::{Check, Conversation, Finding, Sent, Waiting, Work};
use crate::event::What;
use crate::resolve::agent;
use crate::resolve::chat::{self, Agent, Hindsight};
use crate::setback::Setback;
use crate::time::Timestamp;

/// What came of a piece of work.
#[derive(Debug)]
pub struct Handled {
    /// The conversation as it is now.
    pub conversation: Conversation,
    /// The events that were delivered, or refused for good. The others were not tried.
    pub done: Vec<(Waiting, Result<Sent, Setback>)>,
    /// What stopped the work before its end.
    pub stopped: Option<Stopped>,
    /// How many writes OurAPI carried out.
    pub writes: u32,
    /// What was found where the chat was only to be compared with the journal; nothing, if that failed.
    pub finding: Option<(Check, Option<Finding>)>,
}

/// Delivers the events of a conversation, until it is done, fails, or the daemon is to stop; or compares its chat with
/// the journal, if that is what is asked for.
pub async fn handle(context: &Context, work: Work) -> Handled {
    let Work {
        conversation,
        events,
        check,
    } = work;
    let mut handled = Handled {
        conversation,
        done: Vec::new(),
        stopped: None,
        writes: 0,
        finding: None,
    };
    let done = match check {
        Some(check) => handled.check(context, check).await,
        None => handled.run(context, events).await,
    };
    handled.stopped = done.err();
    handled
}

/// What stopped a piece of work before its end.
#[derive(Debug)]
pub struct Stopped {
    /// At which event; `None`: at the chat itself.
    pub at: Option<Waiting>,
    /// Why.
    pub why: Setback,
}

impl Stopped {
    fn at(event: Waiting, why: Setback) -> Self {
        let at = Some(event);
        Self { at, why }
    }

    /// Before any of these events.
    fn before(events: &[Waiting], why: Setback) -> Self {
        let at = events.first().cloned();
        Self { at, why }
    }
}

impl Handled {
    async fn check(&mut self, context: &Context, check: Check) -> Result<(), Stopped> {
        let found = if check.dry_run {
            check::look(context, &self.conversation, check.rebuild).await
        } else {
            self.rebuild(context, check.rebuild).await
        };
        let (finding, outcome) = match found {
            Ok(finding) => (Some(finding), Ok(())),
            Err(why) => (None, Err(Stopped { at: None, why })),
        };
        self.finding = Some((check, finding));
        outcome
    }

    async fn rebuild(&mut self, context: &Context, rebuild: i64) -> Result<Finding, Setback> {
        agent::forget_if_lost_in(context, rebuild, self.conversation.chat.agent).await?;
        check::put_right(context, self, true).await
    }

    async fn run(&mut self, context: &Context, events: Vec<Waiting>) -> Result<(), Stopped> {
        let earliest = events.iter().map(|event| event.at).min();
        let chat = &self.conversation.chat;
        let mut found_otherwise = false;
        if chat.seen < context.losses() && (chat.id.is_some() || events.is_empty()) {
            let (losses, before) = (context.losses(), chat.id);
            let finding = check::put_right(context, self, context.settings.rebuild)
                .await
                .map_err(|setback| Stopped::before(&events, setback))?;
            self.conversation.chat.seen = losses;
            let replaced = before.is_some() && self.conversation.chat.id != before;
            found_otherwise = replaced || finding.messages > 0;
        }
        let (messages, changes): (Vec<Waiting>, Vec<Waiting>) = events
            .into_iter()
            .partition(|event| matches!(event.what, What::Message { .. }));
        self.all_changes(context, changes, earliest).await?;
        if found_otherwise {
            // What waits is claimed anew: history that waits again comes first, in order of arrival.
            return Ok(());
        }
        self.all_messages(context, messages, earliest).await
    }

    /// All changes at once; one by one if one of them has failed before, or if OurAPI refuses them together, so that it is
    /// known which it is.
    async fn all_changes(
        &mut self,
        context: &Context,
        changes: Vec<Waiting>,
        earliest: Option<Timestamp>,
    ) -> Result<(), Stopped> {
        let together = changes.len() > 1 && changes.iter().all(|event| event.attempts.tries == 0);
        if together {
            match self
                .change_chat(context, &changes, Agent::Known, earliest)
                .await
            {
                Ok(sent) => {
                    for event in changes {
                        self.delivered(event, sent);
                    }
                    return Ok(());
                }
                Err(setback) if setback.is_refusal() => {}
                Err(setback) => return Err(Stopped::before(&changes, setback)),
            }
        }
        for event in changes {
            if context.stopping.is_cancelled() {
                return Ok(());
            }
            let change = std::slice::from_ref(&event);
            match self
                .change_chat(context, change, Agent::Known, earliest)
                .await
            {
                Ok(sent) => self.delivered(event, sent),
                Err(setback) if setback.is_refusal() => self.done.push((event, Err(setback))),
                Err(setback) => return Err(Stopped::at(event, setback)),
            }
        }
        Ok(())
    }

    async fn change_chat(
        &mut self,
        context: &Context,
        changes: &[Waiting],
        agent: Agent,
        earliest: Option<Timestamp>,
    ) -> Result<Sent, Setback> {
        let mut next = self.conversation.clone();
        for event in changes {
            match &event.what {
                What::Start => start::apply(&mut next, event),
                What::End => end::apply(&mut next, event),
                What::Transfer { advisor } => transfer::apply(&mut next, event, *advisor),
                What::Message { .. } => {}
            }
        }
        let hindsight = Hindsight {
            possible: changes.iter().any(|event| context.may_be_there(event.id))
                || context.session.interrupted.contains(&next.id),
            transfer: next.said.transfer != self.conversation.said.transfer,
        };
        match chat::reconcile(context, &mut next, agent, earliest, hindsight).await {
            Ok(writes) => {
                self.writes += writes;
                let sent = match (writes, self.conversation.chat.id) {
                    (0, _) => Sent::Nothing,
                    (_, before) if before != next.chat.id => Sent::Chat,
                    _ => Sent::Change,
                };
                self.conversation = next;
                Ok(sent)
            }
            Err(setback) => {
                // What was learnt of the chat and of BigChat stays; what the events say is said again next time.
                next.said = self.conversation.said;
                next.said.ended_at = next.said.ended_at.max(next.chat.ended_at);
                next.chat.unsure |= setback.in_doubt();
                self.conversation = next;
                Err(setback)
            }
        }
    }

    async fn all_messages(
        &mut self,
        context: &Context,
        messages: Vec<Waiting>,
        earliest: Option<Timestamp>,
    ) -> Result<(), Stopped> {
        if messages.is_empty() || context.stopping.is_cancelled() {
            return Ok(());
        }
        let Conversation {
            started_at, chat, ..
        } = &self.conversation;
        let started_before = started_at.is_none() && chat.started_at > earliest;
        let lost_agent = chat.agent.is_none() && chat.unsure;
        if chat.id.is_none() || started_before || lost_agent {
            match self.change_chat(context, &[], Agent::Known, earliest).await {
                Ok(_) => {}
                // What is not to be changed keeps no message from its chat.
                Err(setback) if setback.is_refusal() && self.conversation.chat.id.is_some() => {
                    let failure = setback.logged();
                    tracing::warn!(
                        conversation = self.conversation.bigchat_id,
                        chat = self.conversation.chat.id.map(tracing::field::display),
                        reason = %failure.reason, request = %failure.request, response = %failure.response,
                        "its chat stays as it is"
                    );
                }
                // Refused without a chat, the first one fails; the others try for themselves.
                Err(setback) if setback.is_refusal() => {
                    let first = messages.into_iter().next();
                    self.done.extend(first.map(|first| (first, Err(setback))));
                    return Ok(());
                }
                Err(setback) => return Err(Stopped::before(&messages, setback)),
            }
        }
        let Some(chat) = self.conversation.chat.id else {
            return Ok(());
        };
        let sent = self.send_messages(context, chat, messages).await;
        if context.settings.rebuild && self.conversation.chat.id != Some(chat) {
            // What was sent to the chat that is gone is gone with it, and waits again.
            self.done.retain(|(event, result)| {
                result.is_err() || !matches!(event.what, What::Message { .. })
            });
        }
        sent
    }

    async fn send_messages(
        &mut self,
        context: &Context,
        chat: Uuid,
        messages: Vec<Waiting>,
    ) -> Result<(), Stopped> {
        // Before any is sent: what is sent from here on must not be taken for what stood there.
        let looked_up = message::look_up(context, &mut self.conversation, &messages)
            .await
            .map_err(|setback| Stopped::before(&messages, setback))?;
        let looked_up = looked_up.as_ref();
        let target = context.our_api.message_target(chat);
        for mut event in messages {
            if context.stopping.is_cancelled() {
                return Ok(());
            }
            let conversation = &mut self.conversation;
            match message::deliver(context, conversation, &target, &event, looked_up).await {
                Ok(writes) => {
                    self.writes += writes;
                    let sent = if writes > 0 {
                        Sent::Message
                    } else {
                        Sent::Nothing
                    };
                    self.delivered(event, sent);
                }
                Err(setback) if setback.is_refusal() => self.done.push((event, Err(setback))),
                Err(setback) => {
                    // Looked up, it is in doubt only if it was sent since.
                    event.attempts.in_doubt &= looked_up.is_none();
                    return Err(Stopped::at(event, setback));
                }
            }
        }
        Ok(())
    }

    fn delivered(&mut self, event: Waiting, sent: Sent) {
        tracing::debug!(
            conversation = self.conversation.bigchat_id,
            event = event.id,
            kind = %event.what.kind(),
            at = %event.at,
            chat = self.conversation.chat.id.map(tracing::field::display),
            sent = sent.name(),
            "delivered"
        );
        self.done.push((event, Ok(sent)));
    }
}

#[cfg(test)]
mod tests {
    use crate::conversation::{Attempts, Chat, Conversation, DetailsState, Said, Waiting};
    use crate::event::What;
    use crate::time::Timestamp;

    pub(super) fn conversation() -> Conversation {
        Conversation {
            id: 1,
            epoch: 1,
            bigchat_id: 1,
            started_at: None,
            first_advisor: None,
            details: DetailsState::Unread,
            said: Said::default(),
            chat: Chat::default(),
        }
    }

    pub(super) fn waiting(id: i64, at: i64, what: What) -> Waiting {
        Waiting {
            id,
            at: Timestamp::clamped(at),
            what,
            attempts: Attempts::default(),
        }
    }
}
