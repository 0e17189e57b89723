//! Out of the fleet: first nobody is led here, then it is waited until nobody comes, then it ends.

use std::time::Duration;

use super::super::facts::Transition;
use super::turn::Turn;
use super::{Action, State};

/// How much longer than the TTL a resolver may keep an answer.
const TTL_MARGIN: Duration = Duration::from_secs(5);
/// How long running answers may go on when nothing leads here any more: a large layer on a slow
/// line.
const FINISH: Duration = Duration::from_mins(2);
/// How often it is looked whether they have ended.
const FINISH_LOOK: Duration = Duration::from_secs(1);

impl Turn<'_> {
    pub(super) fn drain(&mut self) -> State {
        let now = self.facts.now;
        let left = self.withdraw();
        self.heartbeat(Transition::Terminating);
        let deadline = [
            self.facts.stop,
            self.memory
                .kept
                .leaving
                .as_ref()
                .and_then(|leaving| leaving.deadline),
        ];
        let overdue = match deadline.into_iter().flatten().min() {
            Some(deadline) => self.is_past(deadline),
            None => false,
        };
        let has_own_records = self.has_own_records();
        let ttl = self
            .settings
            .dns
            .as_ref()
            .map_or(Duration::ZERO, |dns| dns.ttl + TTL_MARGIN);
        let unheard = match self.memory.record_gone {
            _ if !has_own_records => true,
            Some(gone) => self.is_past(gone + ttl),
            None => false,
        };
        let left = unheard && left.target;
        if !left && !overdue {
            return State::Drain;
        }
        if self.memory.finishing.is_none() {
            self.act(Action::RefuseUploads, "nothing leads here any more");
        }
        let finishing = *self.memory.finishing.get_or_insert(now);
        if self.facts.signals.running > 0 && !self.is_past(finishing + FINISH) && !overdue {
            self.wake(now + FINISH_LOOK);
            return State::Drain;
        }
        // Never ABANDON: that skips the hooks of others, or keeps the instance.
        self.complete(Transition::Terminating, false, "drained");
        if self.facts.stop.is_some() {
            self.act(Action::LetGo, "drained");
        }
        State::Drain
    }
}
