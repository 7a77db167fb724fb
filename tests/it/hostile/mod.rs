//! Responses that the contract does not allow, and everything failing at the same time.

mod answers;
mod chaos;
mod contract_deviations;
mod fuzz;
mod odd_answers;
