//! What the daemon does, seen from outside: against fakes of single answers and against the simulated services.

mod chaos;
mod clocks;
mod daemon;
mod demo;
mod failover;
mod failures;
mod fakes;
mod handlers;
mod harness;
mod hostile;
mod kills;
mod late;
mod logs;
mod losses;
mod metrics;
mod paging;
mod poison;
mod process;
mod rebuild;
mod service;
mod status;
mod stopping;
mod storage;
mod upheavals;
mod web;
