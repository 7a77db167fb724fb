//! The life of the process: settings, log, the command, a signal, an exit code.

use std::process::ExitCode;
use std::time::Duration;

use bigchat_sync::cli::{self, Cli, Command};
use bigchat_sync::daemon;
use bigchat_sync::settings::{LogFormat, Settings, Tokens};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Whatever hangs, the process ends within 10 s of the signal.
const STOPPED_WITHIN: Duration = Duration::from_millis(9_700);

/// Exit code for a setting that cannot be used.
const BAD_SETTING: u8 = 2;

fn main() -> ExitCode {
    let Cli { command, settings } = Cli::read();
    if let Some(Command::Failed(command)) = command {
        return match cli::failed(&settings.db(), command) {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(error) => complain(&error, 1),
        };
    }
    let tokens = match Tokens::read(|name| std::env::var_os(name)) {
        Ok(tokens) => tokens,
        Err(error) => return complain(&error, BAD_SETTING),
    };
    start_log(settings.log_format());
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&error, 1),
    };
    let outcome = runtime.block_on(work(command, settings, tokens));
    // A look-up of a host name may hang for longer than anybody waits.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&error, 1),
    }
}

async fn work(
    command: Option<Command>,
    settings: Settings,
    tokens: Tokens,
) -> Result<(), daemon::DaemonError> {
    let stopping = CancellationToken::new();
    stop_on_signals(&stopping)?;
    match command {
        None | Some(Command::Run) => daemon::run(settings, tokens, stopping).await,
        Some(Command::Once) => daemon::once(settings, tokens, stopping).await,
        Some(Command::Failed(_)) => Ok(()),
    }
}

/// The first SIGTERM or SIGINT stops the daemon in good order; a second one at once, as a crash would.
fn stop_on_signals(stopping: &CancellationToken) -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let stopping = stopping.clone();
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stopping.is_cancelled() {
                std::process::exit(1);
            }
            tracing::info!("stopping: what is in flight is finished first");
            stopping.cancel();
            std::thread::spawn(|| {
                std::thread::sleep(STOPPED_WITHIN);
                eprintln!(
                    "bigchat-sync: not stopped in time, the disk does not answer: what was in flight is looked up at the next start"
                );
                std::process::exit(1);
            });
        }
    });
    Ok(())
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

fn complain(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("bigchat-sync: {error}");
    ExitCode::from(code)
}
