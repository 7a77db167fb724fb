//! The version. A build receives its commit in two environment variables:
//!
//! ```sh
//! BIGCHAT_SYNC_BUILD_COMMIT=$(git rev-parse --short=12 HEAD) BIGCHAT_SYNC_BUILD_DATE=$(git log -1 --format=%cs) cargo build --release
//! ```

use std::sync::LazyLock;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit of the build; `None`: unknown.
pub const COMMIT: Option<&str> = option_env!("BIGCHAT_SYNC_BUILD_COMMIT");

/// The date of the commit.
pub const DATE: Option<&str> = option_env!("BIGCHAT_SYNC_BUILD_DATE");

/// Version, commit and date, for people.
pub fn text() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| of(VERSION, [COMMIT, DATE]));
    &TEXT
}

fn of(version: &str, build: [Option<&str>; 2]) -> String {
    let build: Vec<&str> = build.into_iter().flatten().collect();
    match &build[..] {
        [] => version.to_owned(),
        build => format!("{version} ({})", build.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_commit_is_left_out() {
        assert_eq!(of("0.2.0", [None, None]), "0.2.0");
        assert_eq!(of("0.2.0", [Some("984749f"), None]), "0.2.0 (984749f)");
        let all = [Some("984749f"), Some("2026-11-26")];
        assert_eq!(of("0.2.0", all), "0.2.0 (984749f 2026-11-26)");
    }
}
