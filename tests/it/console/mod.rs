//! The console: its API, its access control, and the page in a browser.

mod api;
mod in_browser;
mod legible;
mod readable;
mod web;
