//! This host's place in a fleet of mirrors: observe -> plan -> apply.
//!
//! - [`facts`] is what was seen of the group, the load balancer, DNS and this instance, as data
//!   that can be saved.
//! - [`plan`] is pure: facts, what is remembered and settings in; what has to be done, why, and what
//!   has to be looked at next out. It has no clock and no randomness of its own.
//! - [`memory`] is what one plan leaves to the next. A part of it outlives the process, and is on
//!   the disk before the plan that made it is carried out.
//! - [`dns`] looks at the name that clients resolve, and changes it.
//! - [`rank`] says who of several instances acts first, without a word between them.
//!
//! Whoever drives it does this for ever: read [`memory::Kept`]; look at what the last plan says is
//! due; [`plan::plan`]; write `Kept` if it differs; carry out the steps in their order, each
//! attempted once; sleep until the plan's next moment, or until metadata, health or a stop request
//! changes. Nothing is reported back: what a step has done is seen by the next look, so a reply that
//! is lost, and a crash between two steps, are nothing special.

use crate::config::FleetSettings;

pub mod dns;
pub mod facts;
pub mod memory;
pub mod plan;
pub mod rank;

/// Why this version can't do what is configured: nothing observes and applies yet. An agent that
/// served all the same would look like a member of a fleet that never hears of it.
pub fn not_yet(settings: &FleetSettings) -> Option<&'static str> {
    (!settings.is_off()).then_some(
        "this version does not take part in a fleet yet: remove `fleet.autoscaling` or `fleet.peers`, \
         and what goes with them",
    )
}
