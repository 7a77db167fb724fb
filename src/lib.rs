//! bigchat-sync keeps OurAPI's chats, agents and messages in step with what happens in BigChat.
//!
//! Data goes one way: [`poller`] → [`journal`] → [`delivery`] → [`handlers`] → [`our_api`]. The poller keeps what
//! BigChat tells, durably, before anything is done with it; delivery takes from the journal what is due and settles
//! what came of it. Either goes on when the other cannot. Decisions are pure and stand by themselves: [`window`],
//! [`dedupe`], [`messages`], [`conversation`], [`retry`].
//!
//! [`sim`] stands in for both services, and [`demo`] shows the daemon at work between them.

pub mod bigchat;
pub mod check;
pub mod cli;
pub mod clock;
pub mod context;
pub mod conversation;
pub mod daemon;
pub mod dedupe;
pub mod delivery;
pub mod demo;
pub mod event;
pub mod failed;
pub mod handlers;
pub mod health;
pub mod http;
pub mod journal;
pub mod log;
pub mod manual;
pub mod messages;
pub mod metrics;
#[cfg(test)]
mod model;
pub mod our_api;
mod output;
pub mod pace;
pub mod poller;
pub mod progress;
pub mod pulse;
pub mod rebuild;
pub mod resolve;
pub mod retry;
pub mod route;
pub mod screen;
pub mod service;
pub mod setback;
pub mod settings;
pub mod sim;
pub mod status;
pub mod summary;
pub mod time;
pub mod user;
pub mod web;
pub mod window;
