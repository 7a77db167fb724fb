//! Answers that the contract does not allow, and everything failing at once.

mod answers;
mod chaos;
mod contract_deviations;
mod fuzz;
mod odd_answers;
