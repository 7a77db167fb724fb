//! Tests of the daemon from outside, between both simulated services.
//!
//! Each folder is one topic. `harness` is shared by all tests.

mod console;
mod delivery;
mod harness;
mod hostile;
mod operations;
mod polling;
mod restart;
