//! The requests to BigChat, and the events ingested from its responses.

mod clocks;
mod paging;
