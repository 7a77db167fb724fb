//! Answers that the contract does not allow, and everything failing at once.

mod answers;
mod chaos;
mod odd_answers;
mod strangers;
