//! BigChat: the client, the clock, the epochs (from one restart to the next), and the details of conversations and
//! advisors, which are checked to be of the requested epoch. The [`poller`](crate::poller) chooses the windows.

mod client;
pub mod clock;
pub mod details;
pub mod epoch;
mod epochs;
mod source;

pub use client::{Advisor, BigChat, Details, Page, canonical_query, window_query};
use epochs::Epochs;
pub use source::{Source, SourceError};
