//! What BigChat knows of conversations and advisors, and whether it has restarted since.

pub mod details;
pub mod epochs;
pub mod restart;
pub mod source;
