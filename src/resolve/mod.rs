//! Which chat a conversation is, which agent an advisor is, and whether BigChat is still the one that told of them.

pub mod agent;
pub mod chat;
pub mod details;
pub mod restart;
