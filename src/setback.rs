//! Why the delivery of a conversation stopped before its end: data, which is settled like a success.

use crate::bigchat::BigChatError;
use crate::conversation::Failure;
use crate::http::{request_head, response_head};
use crate::journal::JournalError;
use crate::log;
use crate::our_api::{OurApiError, Trouble};

/// Why the delivery of a conversation stopped.
#[derive(Debug)]
pub enum Setback {
    /// OurAPI did not do as asked.
    OurApi {
        /// What became of the request.
        error: OurApiError,
        /// Whether the event itself may have been carried out.
        in_doubt: bool,
    },
    /// BigChat did not tell what is needed.
    BigChat(BigChatError),
    /// The database refuses.
    Journal(JournalError),
    /// OurAPI has lost something, which is built again before this is tried again.
    Rebuilding(&'static str),
}

impl From<JournalError> for Setback {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

impl From<OurApiError> for Setback {
    /// For requests that change nothing. That one of those is refused says nothing of the event.
    fn from(error: OurApiError) -> Self {
        let error = match error.trouble {
            Trouble::Refused => error.but(Trouble::NotCarriedOut),
            _ => error,
        };
        Self::OurApi {
            error,
            in_doubt: false,
        }
    }
}

impl Setback {
    /// For requests that may have changed something.
    pub fn of_write(error: OurApiError) -> Self {
        Self::OurApi {
            in_doubt: error.trouble.in_doubt(),
            error,
        }
    }

    /// Whether OurAPI refuses it for good.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::OurApi { error, .. } if error.trouble == Trouble::Refused)
    }

    /// Whether the event may have been carried out all the same.
    pub fn in_doubt(&self) -> bool {
        matches!(self, Self::OurApi { in_doubt: true, .. })
    }

    /// Whether the event may yet be carried out, long after nobody waits for it any more.
    pub fn is_late(&self) -> bool {
        matches!(self, Self::OurApi { error, .. } if error.trouble == Trouble::Late)
    }

    /// What the log shows of it, unless message text may be logged: nothing of what was sent, nor of what an API answered
    /// to it in words.
    pub fn logged(&self) -> Failure {
        let failure = self.failure();
        let reason = match self {
            Self::OurApi { error, .. } => error.trouble.to_string(),
            _ => failure.reason.clone(),
        };
        Failure {
            reason: log::shown(&failure.reason, |_| &reason).to_owned(),
            request: log::shown(&failure.request, request_head).to_owned(),
            response: log::shown(&failure.response, response_head).to_owned(),
        }
    }

    /// What is kept of it with the event.
    pub fn failure(&self) -> Failure {
        match self {
            Self::OurApi { error, .. } => Failure {
                reason: match (error.trouble, &error.exchange.complaint) {
                    (Trouble::Refused, Some(complaint)) => {
                        format!("{}: {complaint}", error.trouble)
                    }
                    _ => error.trouble.to_string(),
                },
                request: error.exchange.request.clone(),
                response: error.exchange.response.clone(),
            },
            Self::BigChat(error) => {
                let exchange = error.exchange();
                Failure {
                    reason: error.headline().to_owned(),
                    request: exchange.request,
                    response: exchange.response,
                }
            }
            Self::Journal(error) => Failure {
                reason: error.to_string(),
                ..Failure::default()
            },
            Self::Rebuilding(reason) => Failure {
                reason: (*reason).to_owned(),
                ..Failure::default()
            },
        }
    }
}
