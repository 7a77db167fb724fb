//! The requests to BigChat, and what of its responses is ingested.

mod clocks;
mod paging;
