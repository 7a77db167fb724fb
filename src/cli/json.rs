//! `--json`: one style for all commands and the console's API.
//!
//! - The output is one object; a list is one of its fields, never the top-level value. `export` prints one object per
//!   line.
//! - A name is a whole word of the glossary, in `snake_case`. `conversation` is BigChat's id of a conversation; `event`
//!   is the journal's id of an event, which the `failed` commands take.
//! - A point in time is RFC 3339 in UTC with `Z`: to the second if it is by BigChat's clock, to the millisecond if it
//!   is by this machine's. Its name ends in `_at` or `_since`, or is `at`, `now`, `since`, `from` or `until`.
//! - A length of time or a size is a number whose name ends in its unit: `_s`, `_ms` or `_bytes`; a rate ends in
//!   `_per_minute`.
//! - A field that has no value is `null`, not missing.
//! - A new version may add fields. If it renames or removes one, its release notes say so.

use serde::Serialize;

/// An object as `--json` prints it.
pub(super) fn text(object: &impl Serialize) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(object)? + "\n")
}
