//! n: how many mirrors there should be, beside how many the group keeps.

use std::time::Duration;

use super::super::memory::Try;
use super::turn::Turn;
use super::{Action, Look, State};
use crate::fleet::facts::LifecycleState;

/// What the group wants was seen so lately when it is raised.
const RECENT: Duration = Duration::from_secs(5);

impl Turn<'_> {
    /// Says how n and the group differ, and raises its desired capacity where that is configured:
    /// never above its maximum, and never down, which would end somebody's instances.
    pub(super) fn look_after_capacity(&mut self) {
        let (Some(wanted), Some(group)) = (self.settings.instances, self.group()) else {
            return;
        };
        let group = &group.is;
        if wanted <= group.desired {
            self.memory.turns.remove("desired");
            self.settled(Try::Desired);
            return;
        }
        let to = wanted.min(group.max);
        if wanted > group.max {
            self.note(format!(
                "fleet.instances is {wanted}, and the group has at most {}: raise its maximum",
                group.max
            ));
        }
        if !self.settings.enforce {
            self.note(format!(
                "fleet.instances is {wanted}, and the group wants {}: raise it, or set fleet.enforce",
                group.desired
            ));
        } else if to > group.desired && group.complete && self.is_my_turn("desired") {
            // What somebody has raised since is not to be lowered.
            if !self.need(Look::Group, self.facts.now.saturating_sub(RECENT)) {
                return;
            }
            let why = format!(
                "fleet.instances is {wanted}, and the group wants {}",
                group.desired
            );
            self.attempt(Try::Desired, Action::RaiseDesired { to }, why);
        }
    }

    /// The group does not have this instance: it was started by hand, or it was taken out.
    pub(super) fn outside(&mut self) -> State {
        let complete = self.group().is_some_and(|group| group.is.complete);
        let full = self
            .group()
            .is_some_and(|group| group.is.desired >= group.is.max);
        // A listing that lacks it says nothing; this does.
        if self.facts.metadata.target_state == Some(LifecycleState::Detached) {
            self.withdraw();
        }
        if !self.settings.attach {
            self.note("the group does not have this instance: attach it, or set fleet.attach");
        } else if self.memory.kept.was_member {
            self.note("this instance was taken out of the group, and is not attached again");
        } else if full {
            self.note("the group has its maximum of instances: this one can't be attached");
        } else if complete && self.facts.signals.ready && self.facts.signals.fatal.is_none() {
            let why = "it was started by hand, and fleet.attach is set";
            self.attempt(Try::Attach, Action::Attach, why);
        }
        State::Outside
    }
}
