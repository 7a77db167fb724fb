//! END: the chat gets its end time. BigChat reports it again and again for the same conversation: the latest counts, and
//! nothing after it is dropped.

use crate::domain::conversation::{Desired, Pending};

pub(super) fn fold(desired: &mut Desired, event: &Pending) {
    desired.ended_at = desired.ended_at.max(Some(event.at));
}
