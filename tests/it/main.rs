//! What the daemon does, seen from outside, between both simulated services.
//!
//! Each folder holds what its tests show; `harness` has what they share.

mod console;
mod delivery;
mod harness;
mod hostile;
mod operations;
mod polling;
mod restart;
