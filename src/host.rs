//! This host's container engines, wired to the mirror: facts -> plan -> apply -> verify.
//!
//! - [`facts`] is what is on this host, as data that can be saved; [`observe`] reads it.
//! - [`plan`] is pure: facts and settings in, the difference out. It can be printed, tested from
//!   recorded facts, and tried on another machine.
//! - `apply` is the only place that changes anything, with a journal to take it back.
//! - [`install`] is about the agent's own units.

pub mod facts;
pub mod install;
pub mod plan;
