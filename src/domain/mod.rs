//! The pure core: the desired chat of a conversation, its difference from OurAPI, and the progress of delivery.
//!
//! Nothing here performs I/O, and only [`time`] reads this machine's clock. The [`journal`](crate::journal) supplies
//! the data, and [`delivery`](crate::delivery) sends the difference.

pub mod account;
pub mod backoff;
pub mod conversation;
pub mod dedupe;
pub mod event;
pub mod ids;
pub mod json;
pub(crate) mod named;
pub mod pause;
pub mod progress;
pub mod text;
pub mod time;
pub mod window;
