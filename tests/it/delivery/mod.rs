//! What is sent to OurAPI, what is sent again, and what is not.

mod failures;
mod handlers;
mod late;
mod losses;
mod passes;
mod poison;
mod stale;
mod verify;
