//! Answers that the contract does not allow, and everything failing at once.

mod answers;
mod chaos;
mod fuzz;
mod odd_answers;
mod strangers;
