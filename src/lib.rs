//! bigchat-sync keeps OurAPI's chats, agents and messages in sync with BigChat.
//!
//! It is a reconciler over an append-only log. The log defines the desired chats, and the difference is sent to OurAPI.
//!
//! ```text
//! poller ──pages──▶ inbox ──▶ events ──due conversations──▶ scheduler ──▶ reconcile (start, end, message, transfer) ──▶ OurAPI
//!                               ▲                                             │
//!                               └──── committer: offset, observed ◀──reports──┘
//! ```
//!
//! - [`poller`] stores each page of BigChat's events, and ingests them into the [`journal`].
//! - [`domain`] is pure. The events of a conversation add up to the *desired* chat. It is compared with the *observed*
//!   chat, which the journal remembers. If the observed chat may be wrong, the conversation is *stale*, and its chat is
//!   read back first.
//! - [`delivery`] hands out due conversations, sends the difference, and commits the conversation's *offset*. Every
//!   event up to the offset has been delivered, unless there is a *dead letter* for it, or it is to be sent again.
//! - [`bigchat`] and [`our_api`] are the clients. [`http`] sends their requests, and tracks whether each API is up.
//! - [`daemon`] builds, runs and stops all of these. [`console`] serves HTTP, [`cli`] has the commands,
//!   [`metrics`] the counters, and [`telemetry`] the log and the liveness checks.
//!
//! [`simulator`] stands in for both services, and [`demo`] shows the daemon at work between them.
//!
//! # Where to start
//!
//! Begin at these places; the compiler names most of the rest.
//!
//! - **A kind of event:** add it to [`EventKind`](domain::event::EventKind) and [`Payload`](domain::event::Payload). If
//!   it changes the chat, add a file with its fold to `delivery/handlers/`, and its effect to `simulator/compare.rs`; a
//!   new field of `Desired` needs columns (a file in `migrations/`) that `journal/commit.rs` writes and
//!   `journal/queue.rs` reads. If it is stored as a message, extend `EventKind::is_message` and
//!   [`Payload::text`](domain::event::Payload::text). Tests fail until you add its color to
//!   `console/page/console.css`, update `isMessage` in `console/page/parts.js`, and add its line to
//!   `simulator/event.rs` (the [`simulator`] shares no code with the daemon that it checks). No test covers the rest:
//!   add the kind to the lists of kinds in `cli/manual/json.md` and `cli/manual/log.md`, and to `simulator/chance.rs`;
//!   otherwise no demo reports it.
//! - **A setting:** a field of [`Settings`](settings::Settings) with the attributes of its neighbors, and its row in
//!   `cli/manual/settings.md`. The poller, delivery and the console hold a `Settings` already. If `check` or
//!   `verify` uses the field, add it to their lists in `settings_for` in `cli/mod.rs`; otherwise their help hides it.
//! - **A command:** a file in [`cli`], like `cli/resolutions.rs`, which reads the journal, or `cli/pause.rs`, which
//!   writes it; a variant of [`cli::Command`]; its line in `main.rs`; its SQL in [`journal`]; its section in the
//!   manual, usually in `cli/manual/commands.md`, and with `--json` its name in `cli/manual/json.md`.
//! - **A metric:** a counter of the process goes into `metrics/mod.rs`. A gauge, and a counter that the journal keeps,
//!   go into `console/health.rs`; `journal/status.rs` reads the journal for them. A metric that is always present has a
//!   row in `cli/manual/monitoring.md`; any other is described in the chapter on what it measures.
//! - **Another target:** this replaces OurAPI; a second target beside it is not supported. The requests are in
//!   [`our_api`] and `http/route.rs`, and [`ErrorKind`](http::ErrorKind) gives the meaning of each status. The fields
//!   of a chat that change are in [`domain::conversation`], and what OurAPI does to a text is in [`domain::account`].
//!   [`delivery`] creates, changes and lists chats, agents and messages, and `cli/check.rs` asks whether OurAPI works.
//!   Ids are UUIDs throughout. `simulator/our_api.rs` and `simulator/compare.rs` are what the tests compare with.
//!
//! # Glossary
//!
//! One word for one idea, in code, log, console and manual.
//!
//! - **advisor**: a person who answers in BigChat, identified by BigChat's id; in OurAPI an *agent*.
//! - **agent**: a person who answers in OurAPI, found by e-mail address.
//! - **attempt**: one try to deliver an event. A failed one counts towards `--max-attempts` only if a write of another
//!   conversation has succeeded since the event's previous attempt.
//! - **back-off**: the wait before the next attempt: exponential, with full jitter.
//! - **circuit breaker**: per API; after repeated failures, it lets no request pass for some time, and then one at a
//!   time, as a probe.
//! - **conversation**: in BigChat, identified by epoch and id; in OurAPI a *chat*.
//! - **credit**: a message in OurAPI that no delivered event and no dead letter accounts for. A waiting message that
//!   matches it is not sent.
//! - **cursor**: the time up to which BigChat was read, by BigChat's clock.
//! - **dead letter**: an event that cannot be delivered or parsed. It is open until an operator retries or discards it;
//!   a discarded one stays for the retention period. `failed` on the command line.
//! - **denial**: the answer of an API that it does not know a conversation or an advisor, or does not accept an agent.
//!   It is believed once it has been repeated.
//! - **desired**: the chat that the events define.
//! - **discard**: the resolution that gives a dead letter up.
//! - **drift**: a field of a chat in OurAPI that another client, or a daemon with a newer copy of the journal, has
//!   changed.
//! - **epoch**: the time from one restart of BigChat to the next; ids are unique within it.
//! - **event**: one row of the append-only log: START, END, MESSAGE or TRANSFER, or UNREADABLE if it could not be
//!   parsed; never updated, except that `forget` erases its data.
//! - **fingerprint**: hash by which equal events are recognized, because BigChat gives events no id.
//! - **inbox**: the stored pages of the window that is being read.
//! - **ingest**: to append the new events of a stored page to the append-only log.
//! - **newer copy** of the journal: if this database is a restored backup, the original as it was used after the
//!   backup. The daemon may have delivered more events with it.
//! - **observed**: the chat as OurAPI has it, as far as the journal remembers.
//! - **offset**: the last event of a conversation up to which every event is delivered, a dead letter, or to be sent
//!   again (after a retry or a loss).
//! - **outcome unknown**: of a request that may or may not have been carried out.
//! - **overlap**: how far a window reaches back before the cursor, for late events.
//! - **page**: one response of BigChat with events; stored before the next is requested.
//! - **pass**: a verification, in idle time, of every chat that has stored events, none of them waiting
//!   (`--verify-every`).
//! - **poll**: one attempt to read a window, page by page; the next one continues a window that is not read to its end.
//! - **probe**: a request that finds out whether an API is back, or whether BigChat restarted.
//! - **rate limit**: a time before which an API asked not to be called.
//! - **rebuild**: to send again what OurAPI has lost.
//! - **reconcile**: to compare desired with observed, and send the difference.
//! - **retention**: how long delivered and discarded events are stored.
//! - **retry**: the resolution that delivers a dead letter again.
//! - **session**: the time from one start of the daemon to its end.
//! - **stale**: of a conversation whose observed chat may be wrong; it is read back first.
//! - **verify**: to compare a chat in OurAPI with the journal although no event needs it.
//! - **window**: a range of BigChat's time; the poller requests the events of this range.

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
mod mutex;
pub mod our_api;
pub mod poller;
pub mod settings;
pub mod simulator;
pub mod status;
pub mod telemetry;
pub mod user;
pub mod version;
