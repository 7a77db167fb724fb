//! What the program shows while it works: the log, liveness, and terminal output.
//!
//! The content comes from the other modules, such as [`daemon`](crate::daemon) and [`cli`](crate::cli).

pub(crate) mod journal;
pub mod liveness;
pub mod log;
mod output;
pub mod rate;
pub mod terminal;
