//! START: the chat gets its start time. BigChat tells in the conversation's details who had it first.

use crate::domain::conversation::{Desired, Pending};

pub(super) fn fold(desired: &mut Desired, event: &Pending) {
    desired.started_at.get_or_insert(event.at);
}
