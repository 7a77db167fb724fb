//! TRANSFER: the chat gets the agent of the new advisor. The latest TRANSFER by time counts; of two at the same time,
//! the later arrival. A TRANSFER to the current advisor has no effect.

use crate::domain::conversation::{Desired, Pending, Transfer};
use crate::domain::ids::AdvisorId;

pub(super) fn fold(desired: &mut Desired, event: &Pending, advisor: i64) {
    let transfer = Transfer {
        at: event.at,
        event: event.id,
        advisor: AdvisorId(advisor),
    };
    desired.transfer = desired.transfer.max(Some(transfer));
}
