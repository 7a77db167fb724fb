//! Settings, commands, output and files, as an operator uses them.

mod api_states;
mod bad_settings;
mod commands;
mod demo;
mod documentation;
mod heartbeat;
mod lock;
mod logs;
mod metrics;
mod one_daemon;
mod paths;
mod pause;
mod private;
mod private_logs;
mod resolutions;
mod scaling_advice;
mod service;
mod signals;
mod stalled;
mod status;
mod storage;
mod unwritable;
