//! Before this instance calls itself unhealthy: everything that has to hold, looked at twice.
//!
//! A replacement costs a healthy fleet nothing, and a sick one its last instances: so it is asked
//! for only where everything else is well, one at a time, and by one that has peers to judge by.

use std::time::Duration;

use super::super::facts::{Group, LifecycleState, Peers};
use super::Action;
use super::Look;
use super::turn::Turn;
use crate::config::Members;
use crate::fleet::rank::rank;

/// Something is fatal for so long before anything is asked: longer than what the group says of the
/// others can be out of date.
const LASTING: Duration = Duration::from_mins(3);
/// The youngest instance that may be replaced.
const LEAST_AGE: Duration = Duration::from_mins(10);
/// The second look is up to so long after the first.
const SECOND_LOOK: Duration = Duration::from_mins(1);
/// So long after it has asked it is looked whether the group has heard.
const SETTLES: Duration = Duration::from_secs(10);
/// How often it is tried again where something does not hold.
const AGAIN: Duration = Duration::from_mins(1);

impl Turn<'_> {
    /// Something is fatal: another one serves instead, and this one is replaced, if the guard lets
    /// it.
    pub(super) fn suspect(&mut self) {
        let now = self.facts.now;
        let fatal = self.facts.signals.fatal.clone().unwrap_or_default();
        self.step_back(&fatal);
        let since = *self.memory.fatal_since.get_or_insert(now);
        let lasting = since + LASTING;
        let own = self
            .group()
            .and_then(|group| group.is.members.get(&self.facts.own.id));
        if self.memory.kept.replacement_asked && own.is_none_or(|own| !own.healthy) {
            self.note(format!("{fatal}; it has asked to be replaced, and waits"));
            return;
        }
        if !self.is_past(lasting) {
            return;
        }
        let from = self.memory.second_look.unwrap_or(lasting);
        if !(self.need(Look::Group, from) & self.need(Look::Peers, from)) {
            return;
        }
        if let Some(reason) = self.forbids() {
            self.refused = true;
            self.note(format!("{fatal}; it does not ask to be replaced: {reason}"));
            // All over again, and not at once.
            self.memory.second_look = None;
            let again = now + self.jitter(AGAIN, 0.5);
            self.memory.fatal_since = Some(again.saturating_sub(LASTING));
            return;
        }
        if self.memory.second_look.is_none() {
            let at = now + self.up_to(SECOND_LOOK);
            self.memory.second_look = Some(at);
            self.need(Look::Group, at);
            self.need(Look::Peers, at);
            return;
        }
        self.memory.kept.replacement_asked = true;
        self.memory.second_look = None;
        // Asked for in vain, by a call that was lost, it starts from the beginning.
        self.memory.fatal_since = Some(now);
        self.act(Action::AskForReplacement, fatal);
        self.need(Look::Group, now + SETTLES);
    }

    /// Why this instance must not ask to be replaced; nothing if it may.
    fn forbids(&self) -> Option<String> {
        let Some(Members::Autoscaling(autoscaling)) = &self.settings.members else {
            return Some("nobody would replace it: there is no autoscaling group".to_owned());
        };
        if !autoscaling.report_health {
            return Some("fleet.autoscaling.report_health is false".to_owned());
        }
        let (group, peers) = (&self.group()?.is, &self.facts.peers.as_ref()?.is);
        if !group.complete {
            return Some("the group was not seen whole".to_owned());
        }
        let age = self.memory.kept.in_service_since;
        if age.is_none_or(|since| self.facts.now.saturating_sub(since) <= LEAST_AGE) {
            return Some("it is in service for less than 10 minutes".to_owned());
        }
        self.in_flight(group).or_else(|| match group.desired {
            0 | 1 if group.launches_first => None,
            0 | 1 => {
                Some("it is the only one, and the group terminates before it launches".to_owned())
            }
            _ => too_few(group, autoscaling.min_healthy)
                .or_else(|| isolated(peers))
                .or_else(|| self.not_first(group, peers)),
        })
    }

    fn in_flight(&self, group: &Group) -> Option<String> {
        let others = group
            .members
            .iter()
            .filter(|(id, _)| **id != self.facts.own.id);
        for (id, member) in others {
            let moving = member.state.is_pending() || member.state.is_terminating();
            if moving || !member.healthy {
                return Some(format!("{id} is being replaced"));
            }
        }
        let in_service =
            |member: &&super::super::facts::Member| member.state == LifecycleState::InService;
        let here = group.members.values().filter(in_service).count();
        (here < group.desired as usize)
            .then(|| format!("{here} of {} instances are in service", group.desired))
    }

    /// Peers that do not answer may be as sick as this one: one of us asks.
    fn not_first(&self, group: &Group, peers: &Peers) -> Option<String> {
        let sick = peers.asked.difference(&peers.ready);
        let sick = sick.filter(|id| group.members.contains_key(id));
        let before = rank("suspect", &self.facts.own.id, sick);
        (before > 0).then(|| "another one that does not answer comes first".to_owned())
    }
}

fn too_few(group: &Group, min_healthy: u32) -> Option<String> {
    let left = group.healthy().saturating_sub(1);
    let least = min_healthy.max(group.desired.div_ceil(2)) as usize;
    // Of two, one is half.
    (left < least)
        .then(|| format!("{left} healthy instances would be left, and {least} have to be"))
}

fn isolated(peers: &Peers) -> Option<String> {
    let answered = peers.ready.len();
    let of = peers.asked.len();
    (of == 0 || answered * 2 < of).then(|| {
        format!("{answered} of {of} peers answer from here: it may be this host that is cut off")
    })
}
