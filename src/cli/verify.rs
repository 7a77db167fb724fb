//! `bigchat-sync verify`: requests a verification through the database, and shows its progress and result.
//!
//! If a daemon is running, it does the work, because it limits the requests to OurAPI. Otherwise this process takes its
//! place until the work is done. The lock on the database determines which.

use std::io;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::table::{Row, counted, table};
use super::{CommandError, json};
use crate::daemon::{self, DaemonError};
use crate::delivery::RunMode;
use crate::domain::ids::VerificationId;
use crate::domain::progress::FieldDifference;
use crate::domain::time::Millis;
use crate::journal::{Difference, Journal, OpenError, STORAGE_PAUSE, Store, VerificationProgress};
use crate::settings::{Settings, Tokens, number};
use crate::status;
use crate::telemetry::rate::RateEstimate;
use crate::telemetry::terminal::{Terminal, styled};

/// How often the progress is read.
const FRAME: Duration = Duration::from_millis(200);

/// How often a line is printed if there is no terminal for a bar.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What the bar shows.
const BAR: &str = "  {wide_bar:.cyan/dim}  {prefix}\n  {msg}";

/// What to know before fields are repaired.
const WARNING: &str = "\ndo not repair if this database is an older copy and BigChat reports each event only once: the copy lacks the latest TRANSFERs, and the repair may undo them";

/// Maximum number of listed differences.
const LISTED: u32 = 100;

/// Which chats to verify, and whether to repair them.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Verify only the conversation with this BigChat id, in every epoch that has such an id [default: all chats].
    #[arg(long, value_name = "ID", value_parser = number::<i64>, allow_hyphen_values = true)]
    conversation: Option<i64>,

    /// Send what is missing, and overwrite what differs from the events.
    #[arg(long)]
    repair: bool,

    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Verifies chats, and repairs them if requested. Returns whether there was no difference.
pub async fn run(
    args: Args,
    settings: Settings,
    tokens: Tokens,
    terminal: Terminal,
    stopping: CancellationToken,
) -> Result<bool, CommandError> {
    let journal = Journal::start(Store::open_shared(&settings.db())?)?;
    let repair = args.repair;
    let conversation = args.conversation;
    let requested = journal
        .with(move |store| store.request_verification(conversation, repair, Millis::now()))
        .await?;
    let verification = match (requested, conversation) {
        (Some(verification), _) => verification,
        (None, Some(id)) => return Err(CommandError::NoSuchChat(id)),
        (None, None) => {
            report(&args, &terminal, &VerificationProgress::default(), &[]).await?;
            return Ok(true);
        }
    };
    let stop = stopping.child_token();
    let mode = match repair {
        true => RunMode::Requested,
        false => RunMode::Verifications,
    };
    let working = async {
        let worked = work(settings, tokens, &stop, mode).await;
        // The work has ended, so there is nothing to watch.
        stop.cancel();
        worked
    };
    let watching = async {
        let watched = watch(&journal, verification, &terminal, args.json, &stop).await;
        stop.cancel();
        watched
    };
    let (worked, watched) = tokio::join!(working, watching);
    let is_done = watched.as_ref().is_ok_and(VerificationProgress::is_done);
    // After an error, too: a request that only reports is withdrawn, or the daemon would continue it. A repair is left
    // to the daemon.
    let differences = journal
        .with(move |store| {
            let differences = store.differences(verification, LISTED)?;
            if is_done || !repair {
                store.withdraw_verification(verification)?;
            }
            Ok(differences)
        })
        .await;
    worked?;
    let (progress, differences) = (watched?, differences?);
    if is_done || args.json {
        report(&args, &terminal, &progress, &differences).await?;
    }
    match (is_done, repair) {
        (true, _) => Ok(differences.is_empty()),
        (false, true) => Err(CommandError::Interrupted(
            "interrupted; the daemon finishes the repair, now or when it next runs",
        )),
        (false, false) => Err(CommandError::Interrupted(
            "interrupted; nothing was changed",
        )),
    }
}

/// Takes the place of the daemon if none is running, or when the running one stops.
async fn work(
    settings: Settings,
    tokens: Tokens,
    stop: &CancellationToken,
    mode: RunMode,
) -> Result<(), DaemonError> {
    while !stop.is_cancelled() {
        match daemon::verify(settings.clone(), tokens.clone(), stop.clone(), mode).await {
            Err(DaemonError::Open(OpenError::InUse(_))) => {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = sleep(STORAGE_PAUSE) => {}
                }
            }
            ended => return ended,
        }
    }
    Ok(())
}

/// Shows the progress until everything is done or the work ends.
async fn watch(
    journal: &Journal,
    verification: VerificationId,
    terminal: &Terminal,
    json: bool,
    stop: &CancellationToken,
) -> Result<VerificationProgress, CommandError> {
    let bar = terminal
        .bars()
        .filter(|_| !json)
        .map(|bars| bars.add(styled(BAR)));
    let mut last_line = Instant::now();
    let mut estimate: Option<RateEstimate> = None;
    let mut waited_for = None;
    loop {
        let (progress, waits_for) = journal
            .with(move |store| {
                let progress = store.verification_progress(verification)?;
                Ok((progress, status::our_api_waits_for(store, Millis::now())?))
            })
            .await?;
        let left = progress.left + progress.repairing + progress.waiting;
        let all = progress.chats() + progress.messages.max(progress.waiting) + progress.repairing;
        let (now, done) = (Instant::now(), all.saturating_sub(left));
        let estimate = estimate.get_or_insert_with(|| RateEstimate::new(now, done));
        let rate = estimate.now(now, done, Some(left));
        if progress.is_done() || stop.is_cancelled() {
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            return Ok(progress);
        }
        if waits_for != waited_for {
            match (&waits_for, &bar) {
                (Some(reason), None) => tracing::warn!("verification waits: {reason}"),
                (None, None) => tracing::warn!("verification continues"),
                // The bar shows it.
                (_, Some(_)) => {}
            }
            waited_for.clone_from(&waits_for);
        }
        match &bar {
            Some(bar) => {
                bar.set_length(all);
                bar.set_position(done);
                bar.set_prefix(rate.to_string());
                bar.set_message(match &waits_for {
                    Some(reason) => format!("{}; {reason}", sentence(&progress)),
                    None => sentence(&progress),
                });
            }
            None if !json && last_line.elapsed() >= LINE_EVERY => {
                say(terminal, &format!("{}, {rate}", sentence(&progress))).await?;
                last_line = Instant::now();
            }
            None => {}
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = sleep(FRAME) => {}
        }
    }
}

fn sentence(progress: &VerificationProgress) -> String {
    format!(
        "{} of {} verified, {} to send again",
        progress.verified,
        counted(progress.chats(), "chat"),
        counted(progress.waiting, "event")
    )
}

async fn report(
    args: &Args,
    terminal: &Terminal,
    progress: &VerificationProgress,
    differences: &[Difference],
) -> Result<(), CommandError> {
    let text = match args.json {
        true => as_json(progress, differences, args.repair)?,
        false => as_table(progress, differences, args.repair),
    };
    // The terminal ends the line itself.
    say(terminal, text.trim_end()).await
}

/// Writes a text to standard output. If the reader has closed the pipe, the exit code still shows the result.
async fn say(terminal: &Terminal, text: &str) -> Result<(), CommandError> {
    match terminal.say(text).await {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CommandError::Output(error)),
        _ => Ok(()),
    }
}

fn as_json(
    progress: &VerificationProgress,
    differences: &[Difference],
    repair: bool,
) -> serde_json::Result<String> {
    let differences: Vec<_> = differences
        .iter()
        .map(|difference| {
            json!({
                "external_id": difference.external_id,
                "chat": difference.state,
                "messages_missing": difference.messages,
                "fields": difference.fields,
                "not_repaired": difference.not_repaired,
            })
        })
        .collect();
    json::text(&json!({
        "chats": progress.chats(),
        "chats_missing": progress.missing,
        "chats_differing": progress.differing,
        "messages_missing": progress.messages,
        "repaired": repair && progress.is_done() && progress.not_repaired == 0,
        "complete": progress.is_done(),
        "differences": differences,
    }))
}

fn as_table(progress: &VerificationProgress, differences: &[Difference], repair: bool) -> String {
    let chats = progress.chats();
    let VerificationProgress {
        missing,
        differing,
        messages,
        not_repaired,
        ..
    } = progress;
    if differences.is_empty() {
        return format!(
            "{} verified: OurAPI has everything that was delivered",
            counted(chats, "chat")
        );
    }
    let rows = differences.iter().map(|difference| Row {
        cells: [
            difference.external_id.clone(),
            difference.state.clone(),
            difference.messages.to_string(),
        ],
        text: None,
    });
    let header = ["chat", "state", "messages missing"];
    let mut end = match (repair, not_repaired) {
        (true, 0) => "everything was repaired".to_owned(),
        (true, _) => format!(
            "{} could not be repaired completely",
            counted(*not_repaired, "chat")
        ),
        (false, _) => {
            "nothing was changed; add --repair to send what is missing and overwrite what differs"
                .to_owned()
        }
    };
    if !repair && *differing > 0 {
        end += WARNING;
    }
    let fields = differences.iter().flat_map(|difference| {
        let line = |field: &FieldDifference| {
            let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
            format!(
                "chat {}: {} is {} in OurAPI, {} in this database\n",
                difference.external_id,
                field.field,
                value(&field.found),
                value(&field.recorded)
            )
        };
        let not_repaired = difference.not_repaired.map(|why| {
            format!(
                "chat {}: not completely repaired: {why}\n",
                difference.external_id
            )
        });
        difference.fields.iter().map(line).chain(not_repaired)
    });
    let fields: String = fields.collect();
    format!(
        "{}\n{fields}{} verified: {missing} missing, {differing} with differences, {} missing; {end}",
        table(header, &rows.collect::<Vec<_>>()),
        counted(chats, "chat"),
        counted(*messages, "message")
    )
}
