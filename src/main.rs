//! The life of the process: settings, log, the command, a signal, an exit code.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use bigchat_sync::cli::{Cli, Command, CommandError};
use bigchat_sync::cli::{
    check, conversation, export, failed, forget, manual, pause, resolutions, status, verify,
};
use bigchat_sync::daemon::service;
use bigchat_sync::daemon::{self, DaemonError, Observers};
use bigchat_sync::demo::{self, DemoError};
use bigchat_sync::our_api::lock_is_usable;
use bigchat_sync::settings::{Listen, Settings, Tokens};
use bigchat_sync::telemetry::log::{self, LogFormat};
use bigchat_sync::telemetry::terminal::{Terminal, shown, shown_in_full};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use tokio_util::sync::CancellationToken;

/// The time from the signal to a forced exit. The process ends within 10 s, whatever hangs.
const STOPPED_WITHIN: Duration = Duration::from_millis(9_500);

/// How long the process waits for the log to be written before it exits. A clean stop still ends within
/// [`STOPPED_WITHIN`].
const FLUSHED_WITHIN: Duration = Duration::from_millis(400);

/// The same for an immediate exit.
const FLUSHED_AT_ONCE: Duration = Duration::from_millis(100);

/// Exit code for a setting that cannot be used.
const BAD_SETTING: u8 = 2;

fn main() -> ExitCode {
    let terminal = match Terminal::detect() {
        Ok(terminal) => terminal,
        Err(error) => {
            // Standard error may be closed.
            writeln!(io::stderr(), "bigchat-sync: {error}").ok();
            return ExitCode::FAILURE;
        }
    };
    // With a handler, a write beyond a limit on the size of files (`ulimit -f`) fails as on a full disk, instead of
    // ending the process.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).ok();
    let code = match Cli::read() {
        Ok(cli) => run(cli, &terminal),
        Err(error) if error.use_stderr() => {
            let text = error.render();
            let text = match io::stderr().is_terminal() {
                true => text.ansi().to_string(),
                false => text.to_string(),
            };
            terminal.print_error(&text);
            ExitCode::from(BAD_SETTING)
        }
        // Help or version was requested.
        Err(error) => error.exit(),
    };
    terminal.flush(FLUSHED_WITHIN);
    code
}

fn run(cli: Cli, terminal: &Terminal) -> ExitCode {
    let Cli {
        command,
        settings,
        given,
    } = cli;
    match command {
        Some(Command::Failed(command)) => answer(terminal, failed::run(&settings.db(), command)),
        Some(Command::Conversation(args)) => {
            answer(terminal, conversation::run(&settings.db(), &args))
        }
        Some(Command::Export(args)) => answer(
            terminal,
            export::run(&settings.db(), &args, &mut io::stdout().lock()).map(|()| ""),
        ),
        Some(Command::Forget(args)) => answer(terminal, forget::run(&settings.db(), &args)),
        Some(Command::Resolutions(args)) => {
            answer(terminal, resolutions::run(&settings.db(), &args))
        }
        Some(Command::Status(args)) => match status::run(&args, &settings) {
            Ok((text, well)) => say(terminal, text.as_bytes(), ExitCode::from(u8::from(!well))),
            Err(error) => print_error(terminal, &error, 1),
        },
        Some(Command::Pause(args)) => answer(terminal, pause::pause(&args, &settings.db())),
        Some(Command::Resume) => answer(terminal, pause::resume(&settings.db())),
        Some(Command::Check(args)) => block_on(terminal, async {
            let report = check::run(&settings, Tokens::read(service::variable)).await;
            let code = ExitCode::from(u8::from(!report.all_passed()));
            Ok::<_, io::Error>(say(terminal, report.print(&args)?.as_bytes(), code))
        }),
        Some(Command::Demo(args)) => {
            // The progress bars show what a warning would say.
            let level = if terminal.is_interactive() {
                "error"
            } else {
                "warn"
            };
            log::start(LogFormat::Text, level, terminal);
            block_on(terminal, show(args, settings, terminal))
        }
        None => {
            if io::stderr().is_terminal() {
                terminal.print_error(&format!(
                    "no command given: running as `bigchat-sync run`; see `bigchat-sync help`; database {}\n",
                    shown_in_full(&settings.db())
                ));
            }
            deliver(settings, terminal, daemon::run)
        }
        Some(Command::Run) => deliver(settings, terminal, daemon::run),
        Some(Command::Once) => deliver(settings, terminal, daemon::once),
        Some(Command::Verify(args)) => work(
            settings,
            terminal,
            "warn",
            async |settings, tokens, stopping| {
                let same = verify::run(args, settings, tokens, terminal.clone(), stopping).await?;
                Ok::<_, CommandError>(ExitCode::from(u8::from(!same)))
            },
        ),
        Some(Command::Unit) => match std::env::current_exe() {
            Ok(program) => answer(terminal, manual::unit(&program, &given)),
            Err(error) => print_error(terminal, &error, 1),
        },
        Some(Command::Completions { shell }) => {
            say(terminal, &manual::completions(shell), ExitCode::SUCCESS)
        }
        Some(Command::Man {
            chapter: Some(chapter),
        }) => say(terminal, chapter.text().as_bytes(), ExitCode::SUCCESS),
        Some(Command::Man { chapter: None }) => answer(terminal, manual::man()),
    }
}

/// Runs `job`, which polls and delivers.
fn deliver(
    settings: Settings,
    terminal: &Terminal,
    job: impl AsyncFnOnce(Settings, Tokens, Observers, CancellationToken) -> Result<(), DaemonError>,
) -> ExitCode {
    let observers = Observers::of_process(terminal.clone());
    work(
        settings,
        terminal,
        "info",
        async |settings, tokens, stopping| {
            job(settings, tokens, observers, stopping).await?;
            Ok::<_, DaemonError>(ExitCode::SUCCESS)
        },
    )
}

fn work<E: std::error::Error>(
    settings: Settings,
    terminal: &Terminal,
    level: &str,
    job: impl AsyncFnOnce(Settings, Tokens, CancellationToken) -> Result<ExitCode, E>,
) -> ExitCode {
    let tokens = match Tokens::read(service::variable) {
        Ok(tokens) => tokens,
        Err(error) => return print_error(terminal, &error, BAD_SETTING),
    };
    if let Err(error) = tokens.allow(settings.listen) {
        return print_error(terminal, &error, BAD_SETTING);
    }
    let lock = settings.our_api_lock.as_deref().map(lock_is_usable);
    if let Some(Err(error)) = lock {
        return print_error(terminal, &error, BAD_SETTING);
    }
    log::show_message_text(settings.log_message_text);
    log::start(settings.log_format(), level, terminal);
    for file in &tokens.exposed_files {
        tracing::warn!(
            path = shown(file),
            "all users of this machine have access to a token file; run `chmod 600` on it"
        );
    }
    let stopping = CancellationToken::new();
    if let Err(error) = obey_signals(terminal, &stopping, &tokens, settings.listen) {
        return print_error(terminal, &error, 1);
    }
    let ended = block_on(terminal, async { job(settings, tokens, stopping).await });
    log::report_left_out();
    ended
}

/// The first SIGTERM or SIGINT stops the process cleanly, within [`STOPPED_WITHIN`]. A second one stops it at once, as
/// a crash would. SIGHUP reads the token files again. Separate threads do this, and never wait for the runtime, a disk,
/// the log or a terminal.
fn obey_signals(
    terminal: &Terminal,
    stopping: &CancellationToken,
    tokens: &Tokens,
    listen: Listen,
) -> io::Result<()> {
    let (stopped, deadline) = mpsc::sync_channel::<()>(1);
    let at_the_deadline = terminal.clone();
    spawn("deadline", move || {
        if deadline.recv().is_ok() {
            thread::sleep(STOPPED_WITHIN);
            end(
                &at_the_deadline,
                "not stopped in time, perhaps because a disk does not respond; exiting now; the chats with requests in flight will be read back at the next start",
            );
        }
    })?;
    let (reload, reloads) = mpsc::sync_channel::<()>(1);
    let tokens = tokens.clone();
    spawn("tokens", move || {
        for () in reloads {
            read_again(&tokens, listen);
        }
    })?;
    let (terminal, stopping) = (terminal.clone(), stopping.clone());
    on_signals(
        move || {
            // If a reload is already queued, it will read the current files.
            reload.try_send(()).ok();
        },
        move || {
            // Only the first signal needs to be received, and the channel has room for one.
            stopped.try_send(()).ok();
            stopping.cancel();
            tracing::info!("stopping; requests in flight are finished first");
        },
        move || {
            end(
                &terminal,
                "second signal, exiting now; the chats with requests in flight will be read back at the next start",
            )
        },
    )
}

/// Reads the token files again, and logs the result.
fn read_again(tokens: &Tokens, listen: Listen) {
    let reloaded = tokens.reload(service::variable, listen);
    if reloaded.is_empty() {
        tracing::info!(
            "token files read again; no token has changed (a token in the environment changes only with a restart)"
        );
    }
    for token in reloaded {
        match token {
            Ok(name) => tracing::info!("{name} read again; the new token is in use"),
            Err(error) => {
                tracing::error!(reason = %error, "cannot read a token again; the old one stays in use");
            }
        }
    }
}

/// Ends the process as a crash would, without waiting for anything that could hang.
fn end(terminal: &Terminal, message: &str) -> ! {
    terminal.print_error(&format!("bigchat-sync: {message}\n"));
    terminal.flush(FLUSHED_AT_ONCE);
    signal_hook::low_level::exit(1)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(work)?;
    Ok(())
}

async fn show(
    args: demo::Args,
    settings: Settings,
    terminal: &Terminal,
) -> Result<ExitCode, DemoError> {
    let (stopping, at_once) = (CancellationToken::new(), CancellationToken::new());
    let (hangup, first, second) = (stopping.clone(), stopping.clone(), at_once.clone());
    on_signals(
        // The command has no token files.
        move || hangup.cancel(),
        move || first.cancel(),
        move || second.cancel(),
    )?;
    tokio::select! {
        outcome = demo::run(&args, settings, terminal, &stopping) => match outcome {
            // The reader has closed the pipe.
            Err(DemoError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                Ok(ExitCode::SUCCESS)
            }
            outcome => outcome,
        },
        () = at_once.cancelled() => Err(DemoError::Interrupted),
    }
}

/// Runs a command, and reports an error if it fails.
fn block_on<E: std::error::Error>(
    terminal: &Terminal,
    work: impl Future<Output = Result<ExitCode, E>>,
) -> ExitCode {
    // One thread serves all tasks. Long operations are asynchronous, or have a separate thread (the journal). More
    // threads would spend their time waking each other.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return print_error(terminal, &error, 1),
    };
    let outcome = runtime.block_on(work);
    // A host name look-up may hang for a long time.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| print_error(terminal, &error, 1))
}

/// Calls `first` at the first SIGTERM or SIGINT, or when the terminal is closed, and `second` at the next SIGTERM or
/// SIGINT. Calls `hangup` at each SIGHUP before `first`.
fn on_signals(
    hangup: impl Fn() + Send + 'static,
    first: impl FnOnce() + Send + 'static,
    second: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let had_terminal = has_terminal();
    spawn("signals", move || {
        let mut signals = signals.forever();
        let stops = |signal: &i32| {
            let stops = *signal != SIGHUP || (had_terminal && !has_terminal());
            if !stops {
                hangup();
            }
            stops
        };
        let Some(signal) = signals.by_ref().find(stops) else {
            return;
        };
        let received = Instant::now();
        first();
        let is_another = |again: &i32| {
            let repeated = *again == signal && received.elapsed() < repeats_within(signal);
            *again != SIGHUP && !repeated
        };
        if signals.by_ref().any(|again| is_another(&again)) {
            second();
        }
    })
}

/// Within this time, repetitions of a signal count as one: `timeout` sends its signal to the process and again to its
/// group. A user takes longer for a second Ctrl-C.
fn repeats_within(signal: i32) -> Duration {
    match signal {
        SIGTERM => Duration::from_secs(1),
        _ => Duration::from_millis(100),
    }
}

/// Whether the process has a controlling terminal. Closing it sends SIGHUP.
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

/// Writes what a command returned to standard output, or why it failed to standard error.
fn answer<E: std::error::Error>(
    terminal: &Terminal,
    answer: Result<impl AsRef<[u8]>, E>,
) -> ExitCode {
    match answer {
        Ok(text) => say(terminal, text.as_ref(), ExitCode::SUCCESS),
        Err(error) => print_error(terminal, &error, 1),
    }
}

/// Writes a command's answer to standard output.
fn say(terminal: &Terminal, answer: &[u8], code: ExitCode) -> ExitCode {
    let mut out = io::stdout();
    match out.write_all(answer).and_then(|()| out.flush()) {
        Ok(()) => code,
        // The reader has closed the pipe.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => code,
        Err(error) => print_error(terminal, &error, 1),
    }
}

fn print_error(terminal: &Terminal, error: &dyn std::error::Error, code: u8) -> ExitCode {
    terminal.print_error(&format!("bigchat-sync: {error}\n"));
    ExitCode::from(code)
}
