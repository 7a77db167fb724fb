//! END: the chat gets its end time. BigChat reports several ENDs for the same conversation, of which the latest counts.
//! Messages after the end are delivered, too.

use crate::domain::conversation::{Desired, Pending};

pub(super) fn fold(desired: &mut Desired, event: &Pending) {
    desired.ended_at = desired.ended_at.max(Some(event.at));
}
