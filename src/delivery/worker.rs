//! The state that all workers share.

use std::collections::HashSet;
use std::ops::Deref;
use std::sync::Mutex;

use super::Delivery;
use super::agents::Agents;
use crate::domain::conversation::Pending;
use crate::domain::ids::ConversationId;
use crate::domain::progress::Claim;
use crate::mutex::lock;

#[derive(Debug)]
pub(super) struct Worker {
    delivery: Delivery,
    pub(super) agents: Agents,
    /// Chats whose fields were read, but whose messages cannot be read.
    unreadable: Mutex<HashSet<ConversationId>>,
}

impl Deref for Worker {
    type Target = Delivery;

    fn deref(&self) -> &Delivery {
        &self.delivery
    }
}

impl Worker {
    pub(super) fn new(delivery: Delivery) -> Self {
        Self {
            agents: Agents::new(&delivery),
            delivery,
            unreadable: Mutex::default(),
        }
    }

    /// Records that the chat's messages cannot be read. Its fields were read.
    pub(super) fn record_unreadable(&self, conversation: ConversationId) {
        lock(&self.unreadable).insert(conversation);
    }

    pub(super) fn is_unreadable(&self, conversation: ConversationId) -> bool {
        lock(&self.unreadable).contains(&conversation)
    }

    /// Whether a waiting event may have been delivered although it has not failed: with a newer copy of this database,
    /// or before OurAPI lost the chat, if the chat found since then was not read.
    pub(super) fn may_be_delivered(&self, claim: &Claim, event: &Pending) -> bool {
        event.id <= self.session.replay_until.get() || event.restored && !claim.is_read
    }

    /// Whether a waiting message may have been delivered.
    pub(super) fn is_outcome_unknown(&self, claim: &Claim, event: &Pending) -> bool {
        event.payload.kind().is_message()
            && (claim.may_be_carried_out(event) || self.may_be_delivered(claim, event))
    }
}
