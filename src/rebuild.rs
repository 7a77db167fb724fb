//! `bigchat-sync rebuild`: asks, through the database, for chats to be compared with the journal and put right, and shows
//! how far that is.
//!
//! OurAPI is asked by the daemon where one runs, since it bounds all requests to OurAPI; where none does, this
//! process takes its place until the work is done. It knows which by the lock on the database: whoever has it delivers.

use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::conversation::ChatFound;
use crate::daemon::{self, DaemonError};
use crate::journal::{
    Journal, JournalError, Lacking, OpenError, RebuildProgress, STORAGE_PAUSE, Scope, Store,
};
use crate::pace::Pace;
use crate::screen::{Screen, styled};
use crate::settings::{LiveTokens, Settings, number};
use crate::time::Millis;

/// How often it is looked how far it is.
const FRAME: Duration = Duration::from_millis(200);

/// How often there is a line where no bar can be seen.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What the bar shows.
const BAR: &str = "  {wide_bar:.cyan/dim}  {prefix}\n  {msg}";

/// How many chats that lack something are listed.
const LISTED: u32 = 100;

/// What to compare.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,

    /// Only tell what is missing; change nothing, in OurAPI or in the journal.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The chat of this conversation, by BigChat's id; of each run of BigChat that had one.
    #[arg(long, value_name = "ID", value_parser = number::<i64>, allow_hyphen_values = true)]
    conversation: Option<i64>,

    /// Every chat.
    #[arg(long)]
    all: bool,
}

/// Why it came to nothing.
#[derive(Debug, Error)]
pub enum RebuildError {
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database refuses.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// This process cannot take the daemon's place.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The operating system refuses, or nothing can be shown.
    #[error("the operating system refuses: {0}")]
    System(#[from] std::io::Error),
    /// The journal knows of no such chat.
    #[error("no chat is known of conversation {0}: nothing was delivered for it yet")]
    NoSuchChat(i64),
    /// Interrupted.
    #[error("{0}")]
    Interrupted(&'static str),
}

/// Has chats compared and put right, and tells what came of it.
pub async fn run(
    args: Args,
    settings: Settings,
    tokens: LiveTokens,
    screen: Screen,
    stopping: CancellationToken,
) -> Result<(), RebuildError> {
    let journal = Journal::start(Store::open_beside(&settings.db())?)?;
    let (scope, dry_run) = (args.scope(), args.dry_run);
    let asked = journal
        .with(move |store| store.ask_rebuild(scope, dry_run, Millis::now()))
        .await?;
    let rebuild = match (asked, scope) {
        (Some(rebuild), _) => rebuild,
        (None, Scope::Conversation(id)) => return Err(RebuildError::NoSuchChat(id)),
        (None, Scope::All) => {
            return Ok(screen
                .say("no chat is known: nothing was delivered yet")
                .await?);
        }
    };
    let stop = stopping.child_token();
    let working = async {
        let worked = work(settings, tokens, &stop, dry_run).await;
        // Nobody does it any more: it is not waited for.
        stop.cancel();
        worked
    };
    let watching = async {
        let watched = watch(&journal, rebuild, &screen, &stop).await;
        stop.cancel();
        watched
    };
    let (worked, watched) = tokio::join!(working, watching);
    worked?;
    let progress = watched?;
    if !progress.is_done() && !dry_run {
        return Err(RebuildError::Interrupted(
            "interrupted; the daemon goes on with it, now or when it next runs",
        ));
    }
    let lacking = journal
        .with(move |store| {
            let lacking = store.lacking(rebuild, LISTED)?;
            store.withdraw_rebuild(rebuild)?;
            Ok(lacking)
        })
        .await?;
    if !progress.is_done() {
        return Err(RebuildError::Interrupted(
            "interrupted; nothing was changed",
        ));
    }
    Ok(screen.say(&report(&progress, &lacking, dry_run)).await?)
}

impl Args {
    fn scope(&self) -> Scope {
        self.which
            .conversation
            .map_or(Scope::All, Scope::Conversation)
    }
}

/// Takes the daemon's place where none runs, also if one stops meanwhile.
async fn work(
    settings: Settings,
    tokens: LiveTokens,
    stop: &CancellationToken,
    dry_run: bool,
) -> Result<(), DaemonError> {
    while !stop.is_cancelled() {
        match daemon::rebuild(settings.clone(), tokens.clone(), stop.clone(), dry_run).await {
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

/// Shows how far it is until it is done, or nobody works on it any more.
async fn watch(
    journal: &Journal,
    rebuild: i64,
    screen: &Screen,
    stop: &CancellationToken,
) -> Result<RebuildProgress, RebuildError> {
    let bar = screen.picture().map(|picture| picture.add(styled(BAR)));
    let mut last_line = Instant::now();
    let mut pace: Option<Pace> = None;
    loop {
        let progress = journal
            .with(move |store| store.rebuild_progress(rebuild))
            .await?;
        let left = (progress.chats - progress.compared) + progress.waiting;
        let all = progress.chats + progress.messages.max(progress.waiting);
        let (now, done) = (Instant::now(), all.saturating_sub(left));
        let pace = pace.get_or_insert_with(|| Pace::new(now, done));
        let rate = pace.now(now, done, Some(left));
        if progress.is_done() || stop.is_cancelled() {
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            return Ok(progress);
        }
        match &bar {
            Some(bar) => {
                bar.set_length(all);
                bar.set_position(done);
                bar.set_prefix(rate.to_string());
                bar.set_message(sentence(&progress));
            }
            None if last_line.elapsed() >= LINE_EVERY => {
                screen
                    .say(&format!("{}, {rate}", sentence(&progress)))
                    .await?;
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

fn sentence(progress: &RebuildProgress) -> String {
    format!(
        "{} of {} chats compared, {} events on their way",
        progress.compared, progress.chats, progress.waiting
    )
}

fn report(progress: &RebuildProgress, lacking: &[Lacking], dry_run: bool) -> String {
    let RebuildProgress {
        chats,
        missing,
        differing,
        messages,
        ..
    } = progress;
    if lacking.is_empty() {
        return format!("{chats} chats compared: OurAPI holds all that was delivered");
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["chat", "was", "messages missing"]);
    for Lacking {
        external_id,
        finding,
    } in lacking
    {
        let was = match finding.chat {
            ChatFound::There => "there",
            ChatFound::Differs => "not as it should be",
            ChatFound::Missing => "missing",
        };
        table.add_row([external_id, was, &finding.messages.to_string()]);
    }
    let end = if dry_run {
        "nothing was changed; the same without --dry-run puts it right"
    } else {
        "what was missing is built again"
    };
    format!(
        "{}\n\n{chats} chats compared: {missing} missing, {differing} not as they should be, {messages} messages missing; {end}",
        table.trim_fmt()
    )
}
