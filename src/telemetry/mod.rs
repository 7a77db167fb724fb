//! What the program shows of itself while it works: the log, signs of life, and what is written to a terminal.
//! What it means is left to [`daemon`](crate::daemon), [`console`](crate::console) and [`cli`](crate::cli).

pub(crate) mod journal;
pub mod liveness;
pub mod log;
mod output;
pub mod pace;
pub mod terminal;
