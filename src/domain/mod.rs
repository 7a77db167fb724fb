//! The pure core: what a conversation should look like in OurAPI, what differs, and what has been delivered.
//!
//! Nothing here performs I/O or reads a clock. Where the data comes from is the journal's business, what is sent is
//! [`delivery`](crate::delivery)'s.

pub mod account;
pub mod backoff;
pub mod conversation;
pub mod dedupe;
pub mod event;
pub mod ids;
pub mod json;
pub mod progress;
pub mod text;
pub mod time;
pub mod window;
