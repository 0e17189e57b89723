//! This host's container engines, wired to the mirror: facts -> plan -> apply -> verify.
//!
//! - [`facts`] is what is on this host, as data that can be saved; [`observe`] reads it.
//! - [`plan`] is pure: facts and settings in, the difference out. It can be printed, tested from
//!   recorded facts, and tried on another machine.
//! - [`apply`] is the only place that changes anything, with a [`journal`] to take it back, and
//!   [`verify`] asks the daemons whether it is so; [`write`] is how a file is changed.
//! - [`watch`] does all of it again whenever the mirror comes or goes, [`rollback`] for the last time.
//! - [`live`] is this host as it is, for the verbs and the loop; [`install`] is about the agent's own
//!   units, and [`agent_unit`] reads what an administrator has made of the agent's.

pub mod agent_unit;
pub mod apply;
pub mod docker_api;
pub mod facts;
pub mod install;
pub mod journal;
pub mod live;
pub mod lock;
pub mod observe;
pub mod plan;
mod program;
pub mod read;
pub mod rollback;
pub mod system;
pub mod verify;
pub mod watch;
pub mod write;
