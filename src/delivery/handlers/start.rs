//! START: the chat gets its start time. The first advisor is in the conversation's details.

use crate::domain::conversation::{Desired, Pending};

pub(super) fn fold(desired: &mut Desired, event: &Pending) {
    desired.started_at.get_or_insert(event.at);
}
