//! Events of the services for an optional observer.

use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

/// What a service did.
#[derive(Clone, Debug)]
pub enum Happening {
    /// BigChat reported new events. The value has the conversation of each.
    Reported(Vec<i64>),
    /// BigChat answered a request for events with an error.
    Failed,
    /// OurAPI answered a request.
    Answered(Answered),
    /// A fault began in a service or in the daemon. The value describes it.
    Struck(String),
}

/// A request that OurAPI answered.
#[derive(Clone, Debug)]
pub struct Answered {
    /// Method and path, with `{id}` for each id.
    pub route: String,
    /// The `external_id` of the chat that it names, if there is such a chat.
    pub chat: Option<String>,
    /// The name of the agent that its body names, if there is such an agent.
    pub agent: Option<String>,
    pub body: Value,
    pub status: u16,
}

/// The receiver of what the services do.
#[derive(Clone, Debug, Default)]
pub struct Watch(Option<UnboundedSender<Happening>>);

impl Watch {
    pub fn to(observer: UnboundedSender<Happening>) -> Self {
        Self(Some(observer))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Reports to the observer, if there is one.
    pub fn report(&self, happening: Option<Happening>) {
        if let (Some(observer), Some(happening)) = (&self.0, happening) {
            // An observer that has stopped is ignored.
            observer.send(happening).ok();
        }
    }
}
