//! What the simulated services do, as they do it, for whoever watches. Nobody has to.

use std::time::Instant;

use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

use super::bigchat::Told;

/// What a service did.
#[derive(Clone, Debug)]
pub enum Happening {
    /// BigChat told of these, each for the first time.
    Told(Vec<Told>),
    /// BigChat answered a request for events with an error of its own.
    Failed,
    /// OurAPI answered a request.
    Answered(Answered),
    /// Something strikes either service, or the daemon: in words.
    Struck(String),
}

/// A request that OurAPI answered.
#[derive(Clone, Debug)]
pub struct Answered {
    /// As [`Traffic`](super::Traffic) counts it.
    pub route: String,
    /// The `external_id` of the chat that it names, if there is such a chat.
    pub chat: Option<String>,
    /// The name of the agent that its body names, if there is such an agent.
    pub agent: Option<String>,
    /// What it said.
    pub body: Value,
    /// What became of it.
    pub status: u16,
}

/// Where a service tells what it does, and when that was.
#[derive(Clone, Debug, Default)]
pub struct Watch(Option<UnboundedSender<(Instant, Happening)>>);

impl Watch {
    /// Tells it there.
    pub fn to(watcher: UnboundedSender<(Instant, Happening)>) -> Self {
        Self(Some(watcher))
    }

    /// Tells what happened, if anybody watches; only then it is put together.
    pub(crate) fn tell(&self, happening: impl FnOnce() -> Happening) {
        if let Some(watcher) = &self.0 {
            // Who has stopped watching misses nothing.
            watcher.send((Instant::now(), happening())).ok();
        }
    }
}
