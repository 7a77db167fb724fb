//! Bad settings: exit code 2, and an error that names the expected form and repeats no secret.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use crate::harness::process::{fed, printed, program};

/// The program's output and exit code, with only these variables in its environment.
fn refused(arguments: &[&str], environment: &[(&str, &str)]) -> (String, Option<i32>) {
    let output = program()
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .expect("a process");
    (printed(&output), output.status.code())
}

/// URLs that are refused, each with a password in it.
const URLS: [&str; 10] = [
    "http://user:S3cret@host",
    "https://S3cret@host/path",
    "ftp://user:S3cret@host",
    "user:S3cret@host",
    "http://user:S3cret",
    "http://user:80/S3cret@host",
    "http:/user:S3cret@host",
    "http://host/?key=S3cret",
    "http://host/#S3cret",
    "http://[S3cret",
];

#[test]
fn bad_url_is_not_repeated() {
    for (flag, variable) in [
        ("--bigchat-url", "BIGCHAT_SYNC_BIGCHAT_URL"),
        ("--our-api-url", "BIGCHAT_SYNC_OUR_API_URL"),
    ] {
        for (url, command) in URLS.into_iter().zip(
            ["run", "once", "check", "status", "unit"]
                .into_iter()
                .cycle(),
        ) {
            let by_flag = refused(&[command, &format!("{flag}={url}")], &[]);
            let by_variable = refused(&[command], &[(variable, url)]);
            assert!(by_variable.0.contains(variable), "{}", by_variable.0);
            for (text, code) in [by_flag, by_variable] {
                assert_eq!(code, Some(2), "{url}: {text}");
                assert!(!text.contains("S3cret"), "{url}: {text}");
                assert!(text.contains(flag), "{url}: {text}");
            }
        }
    }
}

/// A URL in the wrong place is not repeated in the error.
#[test]
fn url_in_the_wrong_place() {
    let url = "http://user:S3cret@host";
    for arguments in [
        &[url][..],
        &["run", url],
        &["--http://user:S3cret@host"],
        &["--listen", url],
        &["--poll-interval", url],
        &["--console-host", url],
        &["--bigchat-url=http://host", url],
        &["status", "--log-format", url],
        &["failed", "show", url],
    ] {
        let (text, code) = refused(arguments, &[]);
        assert_eq!(code, Some(2), "{arguments:?}: {text}");
        assert!(!text.contains("S3cret"), "{arguments:?}: {text}");
    }
}

/// A token in the variable for its file is not repeated in the error.
#[test]
fn token_in_the_file_variable() {
    for token in ["S3cret", "S3cret/with=slash", "a.S3cret"] {
        for name in ["BIGCHAT", "OUR_API", "CONSOLE"] {
            let variable = format!("BIGCHAT_SYNC_{name}_TOKEN_FILE");
            let (text, code) = refused(&["run", "--db=/does/not/exist/db"], &[(&variable, token)]);
            assert_eq!(code, Some(2), "{text}");
            assert!(
                text.contains(&variable) && !text.contains("S3cret"),
                "{text}"
            );
        }
    }
}

/// Unknown variables are named, each with the nearest setting.
#[test]
fn unknown_variable_names_nearest_setting() {
    for (variable, meant, command) in [
        (
            "BIGCHAT_SYNC_POL_INTERVAL",
            "BIGCHAT_SYNC_POLL_INTERVAL",
            "status",
        ),
        (
            "BIGCHAT_SYNC_OURAPI_TOKEN",
            "BIGCHAT_SYNC_OUR_API_TOKEN",
            "man",
        ),
        ("BIGCHAT_SYNC_DB_FILE", "BIGCHAT_SYNC_DB", "status"),
        ("BIGCHAT_SYNC_LISTENER", "BIGCHAT_SYNC_LISTEN", "unit"),
        ("BIGCHAT_SYNC_XYZZY", "--help", "unit"),
    ] {
        let (text, code) = refused(&[command], &[(variable, "S3cret")]);
        assert_eq!(code, Some(2), "{text}");
        for part in [variable, meant] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("S3cret"), "{text}");
    }
    // Variables that Kubernetes sets for a service of this name.
    let service = [
        ("BIGCHAT_SYNC_SERVICE_HOST", "10.0.0.1"),
        ("BIGCHAT_SYNC_PORT", "tcp://10.0.0.1:8268"),
        ("BIGCHAT_SYNC_PORT_8268_TCP_PROTO", "tcp"),
    ];
    assert_eq!(refused(&["unit"], &service).1, Some(0));
}

/// Each error names the expected form.
#[test]
fn bad_value_of_each_setting() {
    let (time, number) = ("such as 500ms, 10s", "a whole number");
    for (arguments, expected) in [
        (&["--poll-interval", "x"][..], time),
        (&["--poll-interval", ""], time),
        (&["--poll-interval", "10"], time),
        (&["--poll-interval", "-5s"], time),
        (&["--retention=30 days ago"], time),
        (&["--request-timeout", "1.5"], time),
        (&["--log-summary", "10 parsecs"], time),
        (&["demo", "--duration", "soon"], time),
        (&["--max-attempts", "many"], number),
        (&["--max-attempts", "-1"], number),
        (&["--max-attempts", ""], number),
        (&["--our-api-concurrency", "257"], "from 1 to 256"),
        (&["--our-api-concurrency", "x"], "from 1 to 256"),
        (&["failed", "list", "--limit", "-1"], number),
        (&["failed", "list", "--limit", "0"], number),
        (&["resolutions", "--limit", "0"], number),
        (&["demo", "--duration", "0s"], "at least 1s"),
        (&["--bigchat-url", "bigchat.example"], "it has no scheme"),
        (&["--our-api-url", "localhost:8266"], "it has no scheme"),
        (&["failed", "show", "x"], number),
        (&["failed", "retry", "1", "x"], number),
        (&["verify", "--conversation", "x"], number),
        (&["demo", "--seed", "-1"], number),
        (&["--since", "yesterday"], "such as 2026-11-22T22:00:00Z"),
        (&["--since", "2026-11-22"], "such as 2026-11-22T22:00:00Z"),
        (&["--listen", "8268"], "127.0.0.1:8268"),
        (&["--listen", ""], "127.0.0.1:8268"),
        (&["--log-format", "xml"], "text, json"),
        (&["--rebuild", "maybe"], "auto, report, off"),
        (&["--verify-every", "sometimes"], "12h or 7d, or off"),
    ] {
        let (text, code) = refused(arguments, &[]);
        assert_eq!(code, Some(2), "{arguments:?}: {text}");
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
}

/// On a terminal, the program without a command says that it is a daemon, and where its database is.
#[test]
fn program_without_a_command() {
    let directory = tempfile::tempdir().expect("a directory");
    let line = format!("{} --db=missing/a.db", program().get_program().display());
    // `script` gives the program a terminal.
    let mut script = Command::new("script");
    script
        .current_dir(directory.path())
        .args(["-qec", &line, "/dev/null"]);
    let text = printed(&fed(&mut script, "").expect("script, of Debian's bsdutils"));
    assert!(text.contains("no command given: running as "), "{text}");
    assert!(text.contains("/missing/a.db"), "{text}");
}

/// A bad value from the environment is reported with its variable, whatever the command line says.
#[test]
fn bad_variable_is_named() {
    let export = ["export", "--since", "2026-11-22T22:00:00Z"];
    for (arguments, name, value) in [
        (
            &["status"][..],
            "BIGCHAT_SYNC_CONSOLE_HOST",
            &b"a.example,b:80"[..],
        ),
        (&["status"], "BIGCHAT_SYNC_POLL_INTERVAL", b"\xff"),
        (&["run"], "BIGCHAT_SYNC_SINCE", b"\xff"),
        (&export, "BIGCHAT_SYNC_SINCE", b"bad"),
    ] {
        let output = program()
            .args(arguments)
            .env_clear()
            // A path need not be UTF-8.
            .env("BIGCHAT_SYNC_DB", OsStr::from_bytes(b"\xff.db"))
            .env(name, OsStr::from_bytes(value))
            .output()
            .expect("a process");
        let text = printed(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(
            text.contains(&format!("environment variable {name}")),
            "{text}"
        );
    }
    // A value on the command line is not blamed on the environment.
    let variable = [("BIGCHAT_SYNC_POLL_INTERVAL", "20s")];
    let (text, _) = refused(&["run", "--poll-interval", "bad"], &variable);
    assert!(!text.contains("environment variable"), "{text}");
}
