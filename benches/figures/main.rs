//! The costs of the daemon itself, without the two APIs.
//!
//! `cargo bench` measures all of them, and `cargo bench -- [--quick] [NAME…]` some. Rates are relative to a bare client
//! in the same run, which sends the same requests to the same server with the same client settings and without a
//! journal. Each figure is printed beside its target. On a busy machine the ratios mean little; the CPU times in
//! parentheses are more reliable.

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
    /// The full size, for published figures.
    Full,
    /// A tenth of it, to see whether a change is an improvement.
    Quick,
}

impl Scale {
    /// The number, or a tenth of it in a quick run.
    pub(crate) fn of(self, many: i64) -> i64 {
        match self {
            Self::Full => many,
            Self::Quick => many / 10,
        }
    }
}

/// Prints a row of the table: the name, the measured value, and its target.
pub(crate) fn row(what: &str, measured: &str, target: &str) {
    println!("| {what} | {measured} | {target} |");
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
    println!("| what | measured | target |\n| --- | --- | --- |");
    for (name, measure) in MEASURES {
        if all || is_wanted(name) {
            measure(scale);
        }
    }
    ExitCode::SUCCESS
}
