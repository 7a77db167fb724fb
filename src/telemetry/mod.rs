//! What the program shows while it works: the log, liveness, and terminal output. The meaning is left to
//! [`daemon`](crate::daemon), [`console`](crate::console) and [`cli`](crate::cli).

pub(crate) mod journal;
pub mod liveness;
pub mod log;
mod output;
pub mod rate;
pub mod terminal;
