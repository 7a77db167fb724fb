//! BigChat: its client and its clock, its epochs (from one restart to the next), and what it knows of conversations and
//! advisors: an answer is always about the epoch asked for. Which windows are requested is left to [`crate::poller`].

mod client;
pub mod clock;
pub mod details;
pub mod epoch;
mod epochs;
mod source;

pub use client::{Advisor, BigChat, Details, Page, canonical_query, window_query};
pub use epochs::Epochs;
pub use source::{Source, SourceError};
