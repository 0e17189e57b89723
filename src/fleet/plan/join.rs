//! From a launching hook into service, or to its end.

use std::time::Duration;

use super::super::facts::{LifecycleState, Transition};
use super::turn::{RANK_STEP, Turn};
use super::{Look, State};
use crate::fleet::rank::rank;

/// Images that can't be had (their registry is down) are no reason to stay away for longer.
const WARM_PATIENCE: Duration = Duration::from_mins(10);
/// An instance that is not ready by then never will be.
const READY_PATIENCE: Duration = Duration::from_mins(15);
/// So many launches of the group an hour may be abandoned.
const MOST_ABANDONED: u32 = 3;
/// Those who would abandon do not look all at once.
const ABANDON_JITTER: Duration = Duration::from_secs(10);
/// And look again after this, if they may not.
const ABANDON_AGAIN: Duration = Duration::from_mins(5);

impl Turn<'_> {
    /// Ready, then registered, then seen there, then completed: the group never counts an instance
    /// that nobody finds.
    pub(super) fn pending_wait(&mut self) -> State {
        let now = self.facts.now;
        let since = *self.memory.pending_since.get_or_insert(now);
        self.heartbeat(Transition::Launching);
        let unready = if self.facts.signals.ready {
            None
        } else {
            Some(*self.memory.unready_since.get_or_insert(now))
        };
        self.memory.unready_since = unready;
        if self.has_asked() {
            self.complete(Transition::Launching, false, "asked before");
        } else if let Some(fatal) = &self.facts.signals.fatal {
            self.abandon(fatal);
        } else if let Some(unready) = unready {
            if self.is_past(unready + READY_PATIENCE) {
                self.abandon("it has not become ready within 15 minutes");
            }
        } else if !self.facts.signals.warm && !self.is_past(since + WARM_PATIENCE) {
            self.note("images are fetched before it joins");
        } else if self.own_state() == Some(&LifecycleState::WarmedPendingWait) {
            self.complete(
                Transition::Launching,
                false,
                "ready to wait in the warm pool",
            );
        } else if self.advertise() {
            self.complete(
                Transition::Launching,
                false,
                "ready, registered, and seen there",
            );
        }
        State::PendingWait
    }

    /// Gives this instance back, unless so many were that another would be no better.
    fn abandon(&mut self, why: &str) {
        let now = self.facts.now;
        self.step_back(why);
        let at = match self.memory.abandon_at {
            Some(at) => at,
            None => {
                let wait = RANK_STEP.saturating_mul(self.rank_among_pending());
                let at = now + wait + self.up_to(ABANDON_JITTER);
                self.memory.abandon_at = Some(at);
                at
            }
        };
        let looked = self.need(Look::Group, at) & self.need(Look::Abandoned, at);
        let Some(abandoned) = self.facts.abandoned.as_ref().filter(|_| looked) else {
            return;
        };
        if abandoned.is < MOST_ABANDONED {
            self.complete(Transition::Launching, true, why);
            return;
        }
        self.note(format!(
            "can't join ({why}), and stays: {} launches were abandoned in the last hour, so the \
             next one would be no better. Look at the image and the configuration",
            abandoned.is
        ));
        self.memory.abandon_at = Some(now + self.jitter(ABANDON_AGAIN, 0.5));
    }

    fn rank_among_pending(&self) -> u32 {
        let members = self
            .group()
            .map(|group| &group.is.members)
            .into_iter()
            .flatten();
        let pending = members.filter(|(_, member)| member.state.is_pending());
        rank("abandon", &self.facts.own.id, pending.map(|(id, _)| id))
    }
}
