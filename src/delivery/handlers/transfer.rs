//! TRANSFER: the chat gets the agent of the new advisor. The latest by time counts; ties go to the later arrival. A
//! transfer to the current advisor has no effect.

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
