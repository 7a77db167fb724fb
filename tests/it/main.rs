//! What the daemon does, seen from outside: against fakes of single answers and against the simulated services.

mod daemon;
mod harness;
mod kills;
mod losses;
mod poison;
mod stopping;
mod upheavals;
