//! `bigchat-sync forget`: erases the text of a conversation.

use std::io::{self, IsTerminal};
use std::path::Path;

use thiserror::Error;

use super::ask;
use crate::domain::ids::Epoch;
use crate::domain::time::Millis;
use crate::journal::{ConversationRow, Forgotten, JournalError, OpenError, Search, Store};
use crate::settings::number;
use crate::user;

/// Which conversation.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// BigChat's id of the conversation.
    #[arg(value_name = "ID", value_parser = number::<i64>, allow_negative_numbers = true)]
    id: i64,

    /// Epoch of the conversation; required if BigChat gave the id to several conversations. `conversation ID` shows the
    /// epochs.
    #[arg(long, value_name = "N", value_parser = number::<i64>)]
    epoch: Option<i64>,

    /// Do not ask for confirmation. Required without a terminal.
    #[arg(long)]
    yes: bool,
}

/// Why not everything was erased.
#[derive(Debug, Error)]
pub enum ForgetError {
    /// The database cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The database cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal has no such conversation.
    #[error(
        "no event of conversation {0} was ever received, or none in that epoch; nothing was erased"
    )]
    NoSuchConversation(i64),
    /// Several conversations have the id.
    #[error(
        "several conversations have the id {id}, one in each of the epochs {}; choose one with --epoch (`bigchat-sync conversation {id}` shows them)",
        list(.epochs)
    )]
    Ambiguous { id: i64, epochs: Vec<Epoch> },
    /// There is no terminal.
    #[error(
        "this would erase conversation {0} for good, and there is no terminal for the confirmation; add --yes"
    )]
    NoTerminal(i64),
    /// The operator did not agree.
    #[error("nothing was erased")]
    NotConfirmed,
    /// The operator cannot be asked.
    #[error("the terminal cannot be read: {0}")]
    Terminal(#[from] io::Error),
    /// Erased, except on one page.
    #[error(
        "erased, except on a page of the poll in progress, which is dropped when that poll ends; run the command again then"
    )]
    OnNewPage,
    /// Erased, except in the write-ahead log.
    #[error(
        "erased, but another process (a backup, for example) reads an old state of the database, so that the text may still be in the -wal file; run the command again when that process has ended"
    )]
    InLog,
}

fn list(epochs: &[Epoch]) -> String {
    let epochs: Vec<String> = epochs.iter().map(ToString::to_string).collect();
    epochs.join(", ")
}

/// Erases the conversation. Returns what to print.
pub fn run(db: &Path, args: &Args) -> Result<String, ForgetError> {
    let id = args.id;
    let mut store = Store::open_shared(db)?;
    let mut epochs = store.epochs_of(id)?;
    epochs.retain(|epoch| args.epoch.is_none_or(|wanted| epoch.0 == wanted));
    let epoch = match epochs[..] {
        [] => return Err(ForgetError::NoSuchConversation(id)),
        [epoch] => epoch,
        _ => return Err(ForgetError::Ambiguous { id, epochs }),
    };
    if !args.yes {
        confirm(id, epoch)?;
    }
    let forgotten = store.forget(epoch, id, &user::of_process(), Millis::now())?;
    let is_log_empty = store.overwrite_erased()?;
    if forgotten.is_on_new_page {
        return Err(ForgetError::OnNewPage);
    }
    if !is_log_empty {
        return Err(ForgetError::InLog);
    }
    let (rows, _) = store.find_conversations(&Search::Conversation(id))?;
    let row = rows.iter().find(|row| row.epoch == epoch.0);
    Ok(text(id, epoch, forgotten, row))
}

fn confirm(id: i64, epoch: Epoch) -> Result<(), ForgetError> {
    if !io::stdin().is_terminal() {
        return Err(ForgetError::NoTerminal(id));
    }
    let question = format!("Erase the text of conversation {id} (epoch {epoch}), for good?");
    match ask(&question)? {
        true => Ok(()),
        false => Err(ForgetError::NotConfirmed),
    }
}

fn text(id: i64, epoch: Epoch, forgotten: Forgotten, row: Option<&ConversationRow>) -> String {
    let Forgotten {
        before,
        events,
        unparsed,
        ..
    } = forgotten;
    let mut text = match before {
        Some(at) => format!(
            "conversation {id} of epoch {epoch} was already forgotten at {at}; none of its text is left\n"
        ),
        None => format!(
            "conversation {id} of epoch {epoch} is forgotten: the text of its {} events was erased\n",
            events + unparsed
        ),
    };
    if let Some((external_id, chat)) =
        row.and_then(|row| row.external_id.as_ref().zip(row.chat_id.as_ref()))
    {
        text += &format!(
            "OurAPI still has its chat {external_id} (id {chat}) with all messages; erase it there\n"
        );
    }
    text += "backups of the database, and logs written with --log-message-text, still contain the text\n";
    text
}
