//! What BigChat is asked, and what of its answers is ingested.

mod clocks;
mod paging;
