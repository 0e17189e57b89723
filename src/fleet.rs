//! This host's place in a fleet of mirrors: observe -> plan -> apply.
//!
//! - [`facts`] is what was seen of the group, the load balancer, DNS and this instance, as data
//!   that can be saved.
//! - [`plan`] is pure: facts, what is remembered and settings in; what has to be done, why, and what
//!   has to be looked at next out. It has no clock and no randomness of its own.
//! - [`memory`] is what one plan leaves to the next. A part of it outlives the process, and is on
//!   the disk (`kept`) before the plan that made it is carried out.
//! - [`rank`] says who of several instances acts first, without a word between them.
//! - [`drive`] does this for ever: look at what the last plan says is due (`observe`); plan; write
//!   what is kept if it differs; carry out the steps in their order, each attempted once (`apply`);
//!   sleep until the plan's next moment, or until metadata, health or a stop request changes.
//!   Nothing is reported back: what a step has done is seen by the next look, so a reply that is
//!   lost, and a crash between two steps, are nothing special.
//! - `metadata` and `signals` are what is heard without being looked at: what EC2 plans for this
//!   instance (by `imds`), and whether it serves at its own address.
//! - `autoscaling`, `elb` and [`dns`] are the APIs; `calls` bounds and counts what they are asked,
//!   `aws` is what AWS's have in common, and `peers` asks other agents.

mod apply;
mod autoscaling;
mod aws;
mod boot;
mod calls;
pub mod dns;
pub mod drive;
mod elb;
pub mod facts;
mod imds;
mod kept;
pub mod memory;
mod metadata;
mod observe;
mod peers;
pub mod plan;
pub mod rank;
mod signals;

pub use drive::Fleet;
