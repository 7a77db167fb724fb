//! What the daemon costs beside the two APIs: `cargo bench`, or `cargo bench -- [--quick] [NAME…]` for some of it.
//!
//! Rates are ratios within one run, against a bare client that makes the same requests to the same server with the same
//! client settings and no journal. Each figure stands beside what it should reach. On a busy machine ratios say little;
//! the times on the processor, in brackets, say more.

mod backlog;
mod bare;
mod idle;
mod journal;
mod large;
mod process;
mod prompt;
mod server;
mod slow;
mod verifying;

use std::process::ExitCode;

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// What the figures are about.
    Full,
    /// A tenth of it or less, to see that a change goes the right way.
    Quick,
}

impl Scale {
    /// So many; a tenth of them where it has to be quick.
    pub(crate) fn of(self, many: i64) -> i64 {
        match self {
            Self::Full => many,
            Self::Quick => many / 10,
        }
    }
}

/// Prints a row of the table: what, what was measured, and what it should reach.
pub(crate) fn row(what: &str, measured: &str, reach: &str) {
    println!("| {what} | {measured} | {reach} |");
}

type Measure = fn(Scale);

const MEASURES: [(&str, Measure); 13] = [
    ("backlog-1", backlog::measure_one),
    ("backlog-8", backlog::measure_eight),
    ("merging", backlog::measure_merging),
    ("steady", backlog::measure_steady),
    ("journal", journal::measure),
    ("large", large::measure),
    ("memory", large::measure_memory),
    ("prompt", prompt::measure),
    ("pruning", prompt::measure_pruning),
    ("idle", idle::measure),
    ("verifying", verifying::measure),
    ("slow-api", slow::measure_api),
    ("slow-disk", slow::measure_disk),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, rest @ ..] = &arguments[..]
        && mode == bare::MODE
    {
        bare::main(rest);
        return ExitCode::SUCCESS;
    }
    let is_wanted = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let scale = if is_wanted("--quick") {
        Scale::Quick
    } else {
        Scale::Full
    };
    let all = !MEASURES.iter().any(|(name, _)| is_wanted(name));
    println!("| what | measured | reach |\n| --- | --- | --- |");
    for (name, measure) in MEASURES {
        if all || is_wanted(name) {
            measure(scale);
        }
    }
    ExitCode::SUCCESS
}
