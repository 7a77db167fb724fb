//! What the program and its README say of several processes on one OurAPI: their requests add up.

use std::process::Command;

fn printed(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_bigchat-sync"))
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
fn help_and_manual_say_that_processes_count_together() {
    let rule = "All processes that use one OurAPI count together";
    for arguments in [&["--help"][..], &["run", "--help"], &["man"]] {
        let said = printed(arguments);
        assert!(said.contains(rule), "{arguments:?}");
        assert!(said.contains("see --our-api-concurrency"), "{arguments:?}");
    }
}

#[test]
fn readme_recommends_no_daemons_side_by_side() {
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
        assert!(section(title).contains(part), "{title}: {part}");
    }
    assert!(!section("How it scales").contains("run one per BigChat account, side by side"));
}
