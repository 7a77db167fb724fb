//! What the program and its documents say of several processes on one OurAPI: their requests add up.

use crate::harness::process::program;

use bigchat_sync::cli::manual::Chapter;

fn printed(arguments: &[&str]) -> String {
    let output = program()
        .args(arguments)
        .env_clear()
        .output()
        .expect("a process");
    words(&String::from_utf8_lossy(&output.stdout))
}

/// Without line breaks, and without what a manual page adds.
fn words(text: &str) -> String {
    let text = text.replace('\\', "");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn help_says_processes_count_together() {
    let rule = "All processes that use one OurAPI count together";
    for arguments in [&["--help"][..], &["run", "--help"], &["man"]] {
        let said = printed(arguments);
        assert!(said.contains(rule), "{arguments:?}");
        assert!(said.contains("see --our-api-concurrency"), "{arguments:?}");
    }
}

#[test]
fn readme_recommends_no_second_daemon() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"));
    let readme = readme.expect("a README");
    let section = |title: &str| {
        let section = readme.split("\n## ").find(|part| part.starts_with(title));
        words(section.expect(title))
    };
    for (title, part) in [
        ("Settings", "all processes on one OurAPI count together"),
        ("What is promised", "of one process"),
        (
            "How it scales",
            "do not run several daemons side by side on it",
        ),
        ("How it scales", "`check`, `once` and `verify`"),
    ] {
        assert!(sizing.contains(part), "{part}");
    }
    assert!(!sizing.contains("run one per BigChat account, side by side"));
    let settings = words(&Chapter::Settings.text());
    assert!(settings.contains("all processes on one OurAPI count together"));
    assert!(words(&Chapter::Guarantees.text()).contains("of one process"));
}
