//! bigchat-sync keeps OurAPI's chats, agents and messages in step with what happens in BigChat.
//!
//! It is a reconciler over an append-only log. The log says what should be; what differs in OurAPI is sent.
//!
//! ```text
//! poller ──pages──▶ inbox ──▶ events ──due conversations──▶ scheduler ──▶ reconcile (start, end, message, transfer) ──▶ OurAPI
//!                               ▲                                             │
//!                               └──── committer: offset, observed ◀──reports──┘
//! ```
//!
//! - [`poller`] stores each page of BigChat's events, and ingests them into the [`journal`].
//! - [`domain`] is pure: the events of a conversation add up to the *desired* chat; against the *observed* one, which the
//!   journal remembers, that gives the difference. If what is remembered may be wrong, the conversation is *stale*, and its
//!   chat is read back first.
//! - [`delivery`] hands out what is due, sends the difference, and commits the conversation's *offset*: events up to it are
//!   delivered, unless a *dead letter* says otherwise.
//! - [`bigchat`] and [`our_api`] are the clients; [`http`] carries their requests, and knows of each API whether it is up.
//! - [`daemon`] builds all that, runs it and stops it; [`console`] answers over HTTP, [`cli`] has a file for each command,
//!   [`metrics`] what is measured, [`telemetry`] the log and the signs of life.
//!
//! [`simulator`] stands in for both services, and [`demo`] shows the daemon at work between them.

pub mod bigchat;
pub mod cli;
pub mod console;
pub mod daemon;
pub mod delivery;
pub mod demo;
pub mod domain;
pub mod http;
pub mod journal;
pub mod metrics;
#[cfg(test)]
mod model;
pub mod our_api;
pub mod poller;
pub mod settings;
pub mod simulator;
pub mod telemetry;
pub mod user;
