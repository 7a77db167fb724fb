//! `bigchat-sync forget`: erases the text of a conversation.

use std::path::Path;

use super::{CommandError, confirm};
use crate::domain::ids::Epoch;
use crate::domain::time::Millis;
use crate::journal::{ConversationRow, Forgotten, Store};
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

/// Erases the conversation. Returns what to print.
pub fn run(db: &Path, args: &Args) -> Result<String, CommandError> {
    let id = args.id;
    let mut store = Store::open_shared(db)?;
    let mut epochs = store.epochs_of(id)?;
    epochs.retain(|epoch| args.epoch.is_none_or(|wanted| epoch.0 == wanted));
    let epoch = match epochs[..] {
        [] => return Err(CommandError::NothingToForget(id)),
        [epoch] => epoch,
        _ => return Err(CommandError::Ambiguous { id, epochs }),
    };
    if !args.yes {
        confirm(
            &format!("Erase the text of conversation {id} (epoch {epoch}), for good?"),
            &format!("erase conversation {id} for good"),
            "nothing was erased",
        )?;
    }
    let forgotten = store.forget(epoch, id, &user::of_process(), Millis::now())?;
    let is_log_empty = store.overwrite_erased()?;
    if forgotten.is_on_new_page {
        return Err(CommandError::OnNewPage);
    }
    if !is_log_empty {
        return Err(CommandError::InLog);
    }
    let rows = store.conversations_of(id)?;
    let row = rows.iter().find(|row| row.epoch == epoch);
    Ok(text(id, epoch, forgotten, row))
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
    text += &match row.map(|row| (&row.external_id, &row.chat_id)) {
        Some((Some(external_id), Some(chat))) => format!(
            "OurAPI still has its chat {external_id} (id {chat}) with all messages; erase it there\n"
        ),
        // Its creation may have succeeded, or it was believed lost.
        Some((Some(external_id), None)) => format!(
            "OurAPI may have its chat {external_id}; look for this external id, and erase the chat there\n"
        ),
        _ => String::new(),
    };
    text += "backups of the database, and logs written with --log-message-text, still contain the text\n";
    text
}
