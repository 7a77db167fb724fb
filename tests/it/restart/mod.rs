//! The daemon, BigChat or OurAPI stops and starts again, and nothing is lost or duplicated.

mod daemon;
mod failover;
mod kills;
mod power;
mod stopping;
mod upheavals;
