//! The requests to OurAPI: which are sent, which are repeated, and which are not.

mod failures;
mod handlers;
mod late;
mod losses;
mod passes;
mod poison;
mod stale;
mod verify;
