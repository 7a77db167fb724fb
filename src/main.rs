//! The life of the process: settings, log, the command, a signal, an exit code.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use bigchat_sync::cli::{Cli, Command};
use bigchat_sync::daemon::{self, Onlookers};
use bigchat_sync::demo::{self, DemoError};
use bigchat_sync::screen::{Screen, shown};
use bigchat_sync::settings::{LogFormat, Settings, Tokens};
use bigchat_sync::{check, failed, log, manual, rebuild, service, status};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::fmt::MakeWriter;

/// Whatever hangs, the process ends within 10 s of the signal.
const STOPPED_WITHIN: Duration = Duration::from_millis(9_700);

/// Exit code for a setting that cannot be used.
const BAD_SETTING: u8 = 2;

fn main() -> ExitCode {
    let Cli {
        command,
        settings,
        given,
    } = Cli::read();
    match command {
        Some(Command::Failed(command)) => match failed::run(&settings.db(), command) {
            Ok(text) => say(text.as_bytes(), ExitCode::SUCCESS),
            Err(error) => complain(&error, 1),
        },
        Some(Command::Status(args)) => {
            match status::run(&args, &settings.db(), settings.poll_interval) {
                Ok((text, well)) => say(text.as_bytes(), ExitCode::from(u8::from(!well))),
                Err(error) => complain(&error, 1),
            }
        }
        Some(Command::Check) => block_on(async {
            let report = check::run(&settings, Tokens::read(service::variable)).await;
            let code = ExitCode::from(u8::from(!report.is_well()));
            Ok::<_, io::Error>(say(report.to_string().as_bytes(), code))
        }),
        Some(Command::Demo(args)) => {
            let screen = Screen::detect();
            // What a warning would say is part of the picture.
            let level = if screen.is_picture() { "error" } else { "warn" };
            log::start(LogFormat::Text, level, screen.log());
            block_on(show(args, settings, screen))
        }
        None | Some(Command::Run) => {
            let onlookers = Onlookers::of_process();
            let log = onlookers.log();
            work(settings, log, "info", |settings, tokens, stopping| {
                daemon::run(settings, tokens, onlookers, stopping)
            })
        }
        Some(Command::Once) => {
            let onlookers = Onlookers::of_process();
            let log = onlookers.log();
            work(settings, log, "info", |settings, tokens, stopping| {
                daemon::once(settings, tokens, onlookers, stopping)
            })
        }
        Some(Command::Rebuild(args)) => {
            let screen = Screen::detect();
            let log = screen.log();
            work(settings, log, "warn", |settings, tokens, stopping| {
                rebuild::run(args, settings, tokens, screen, stopping)
            })
        }
        Some(Command::Unit) => match std::env::current_exe() {
            Ok(program) => match manual::unit(&program, &given) {
                Ok(unit) => say(unit.as_bytes(), ExitCode::SUCCESS),
                Err(error) => complain(&error, 1),
            },
            Err(error) => complain(&error, 1),
        },
        Some(Command::Completions { shell }) => say(&manual::completions(shell), ExitCode::SUCCESS),
        Some(Command::Man) => match manual::man() {
            Ok(page) => say(&page, ExitCode::SUCCESS),
            Err(error) => complain(&error, 1),
        },
    }
}

fn work<F, W, E>(
    settings: Settings,
    log: W,
    level: &str,
    job: impl FnOnce(Settings, Tokens, CancellationToken) -> F,
) -> ExitCode
where
    F: Future<Output = Result<(), E>>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
    E: std::error::Error + From<io::Error>,
{
    let tokens = match Tokens::read(service::variable) {
        Ok(tokens) => tokens,
        Err(error) => return complain(&error, BAD_SETTING),
    };
    if let Err(error) = tokens.allow(settings.listen) {
        return complain(&error, BAD_SETTING);
    }
    log::start(settings.log_format(), level, log);
    for file in &tokens.exposed_files {
        tracing::warn!(
            path = shown(file),
            "all users of this machine have access to this token file; chmod 600"
        );
    }
    let ended = block_on(async {
        let stopping = CancellationToken::new();
        let stop = stopping.clone();
        let first = move || {
            stop.cancel();
            std::thread::spawn(end_in_time);
        };
        let second = || {
            eprintln!(
                "bigchat-sync: a second signal: ended at once; what was in flight is looked up at the next start"
            );
            std::process::exit(1)
        };
        on_signals(first, second)?;
        job(settings, tokens, stopping).await?;
        Ok::<_, E>(ExitCode::SUCCESS)
    });
    log::tell_left_out();
    ended
}

fn end_in_time() {
    std::thread::sleep(STOPPED_WITHIN);
    eprintln!(
        "bigchat-sync: not stopped in time, as when a disk does not answer: what was in flight is looked up at the next start"
    );
    std::process::exit(1);
}

async fn show(args: demo::Args, settings: Settings, screen: Screen) -> Result<ExitCode, DemoError> {
    let (stopping, at_once) = (CancellationToken::new(), CancellationToken::new());
    let (first, second) = (stopping.clone(), at_once.clone());
    on_signals(move || first.cancel(), move || second.cancel())?;
    tokio::select! {
        outcome = demo::run(&args, settings, &screen, &stopping) => outcome,
        () = at_once.cancelled() => Err(DemoError::Interrupted),
    }
}

/// Does the work of a command, and complains if it comes to nothing.
fn block_on<E: std::error::Error>(work: impl Future<Output = Result<ExitCode, E>>) -> ExitCode {
    // One thread serves all: what takes long is waiting, or has a thread of its own (the journal). More would spend their
    // time on waking each other.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return complain(&error, 1),
    };
    let outcome = runtime.block_on(work);
    // A look-up of a host name may hang for longer than anybody waits.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| complain(&error, 1))
}

/// The first SIGTERM or SIGINT is for stopping in good order, a second one for stopping at once, as a crash would.
fn on_signals(
    first: impl FnOnce() + Send + 'static,
    second: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    tokio::spawn(async move {
        let mut signalled = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        signalled().await;
        tracing::info!("stopping: what is in flight is finished first");
        first();
        signalled().await;
        second();
    });
    Ok(())
}

/// Writes a command's answer to standard output.
fn say(answer: &[u8], code: ExitCode) -> ExitCode {
    let mut out = io::stdout();
    match out.write_all(answer).and_then(|()| out.flush()) {
        Ok(()) => code,
        // Who reads it has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => code,
        Err(error) => complain(&error, 1),
    }
}

fn complain(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("bigchat-sync: {error}");
    ExitCode::from(code)
}
