//! Tests of the daemon from outside, between both simulated services.
//!
//! Each folder covers one topic; all tests share `harness`.

mod console;
mod delivery;
mod harness;
mod hostile;
mod operations;
mod polling;
mod restart;
