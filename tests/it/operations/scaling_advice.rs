//! The advice in help and documents on several processes with one OurAPI: their requests add up.

use bigchat_sync::cli::manual::Chapter;

use super::commands::stdout_of;

/// The text on one line, without the backslashes of a manual page.
fn words(text: &str) -> String {
    let text = text.replace('\\', "");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn help_says_processes_count_together() {
    let rule = "All processes that use one OurAPI count together";
    for arguments in [&["--help"][..], &["run", "--help"], &["man"]] {
        let text = words(&stdout_of(arguments));
        assert!(text.contains(rule), "{arguments:?}");
        assert!(text.contains("see --our-api-concurrency"), "{arguments:?}");
    }
}

#[test]
fn documents_recommend_no_second_daemon() {
    let readme = include_str!("../../../README.md");
    let sizing = readme
        .split("\n## ")
        .find(|part| part.starts_with("Size it"));
    let sizing = words(sizing.expect("a section on sizing"));
    for part in [
        "concurrent requests corrupt it within a minute",
        "With a `--db` other than the daemon's, `once` and `verify` cannot detect the daemon",
    ] {
        assert!(sizing.contains(part), "{part}");
    }
    assert!(!sizing.contains("run one per BigChat account, side by side"));
    let settings = words(&Chapter::Settings.text());
    assert!(settings.contains("all processes on one OurAPI count together"));
    assert!(words(&Chapter::Guarantees.text()).contains("of one process"));
}
