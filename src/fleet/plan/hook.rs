//! Lifecycle hooks: heartbeats while one holds this instance, and its completion once.

use std::time::Duration;

use super::super::facts::{Hook, LifecycleState, Transition};
use super::super::memory::Asked;
use super::turn::Turn;
use super::{Action, Look};
use crate::config::Members;

/// So long after a completion the state is read again.
const SETTLES: Duration = Duration::from_secs(2);
/// The longest wait before a completion that has no effect is asked for again.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

impl Turn<'_> {
    /// The configured hooks of the group that hold instances in this transition: any other is
    /// somebody else's to complete.
    fn hooks(&self, transition: Transition) -> Vec<Hook> {
        let Some(Members::Autoscaling(autoscaling)) = &self.settings.members else {
            return Vec::new();
        };
        let hooks = self
            .group()
            .map(|group| &group.is.hooks)
            .into_iter()
            .flatten();
        hooks
            .filter(|hook| hook.transition == transition && autoscaling.hooks.contains(&hook.name))
            .cloned()
            .collect()
    }

    /// Keeps the hook from timing out: every third of its time, not in step with the others.
    pub(super) fn heartbeat(&mut self, transition: Transition) {
        let now = self.facts.now;
        if !self.is_held(transition) {
            self.memory.heartbeats.clear();
            return;
        }
        for hook in self.hooks(transition) {
            if self.memory.kept.hooks.contains_key(&hook.name) {
                continue;
            }
            let third = hook.heartbeat_timeout / 3;
            let due = match self.memory.heartbeats.get(&hook.name) {
                Some(due) => *due,
                // How long it has been held already is not known.
                None => now + self.up_to(third / 4),
            };
            let next = if self.is_past(due) {
                let why = format!("{} holds this instance, which is not done yet", hook.name);
                self.act(
                    Action::Heartbeat {
                        hook: hook.name.clone(),
                    },
                    why,
                );
                now + self.jitter(third, 0.2)
            } else {
                due
            };
            self.wake(next);
            self.memory.heartbeats.insert(hook.name, next);
        }
    }

    /// Completes the hooks that hold this instance. It is asked once, and again only where the
    /// state, read after that, is still the same: a reply that was lost is not a completion that
    /// was.
    pub(super) fn complete(&mut self, transition: Transition, abandon: bool, why: &str) {
        let now = self.facts.now;
        let (Some(state), Some(group)) = (self.own_state().cloned(), self.group()) else {
            return;
        };
        if !self.is_held(transition) {
            return;
        }
        let hooks = self.hooks(transition);
        if hooks.is_empty() {
            self.note_others(transition, why);
        }
        for hook in hooks {
            let asked = self.memory.kept.hooks.get(&hook.name);
            let asked = asked.filter(|asked| asked.state == state).cloned();
            if let Some(asked) = &asked {
                let wait = SETTLES * 2_u32.saturating_pow(asked.times.min(10) - 1);
                let read = asked.at + wait.min(LONGEST_WAIT) + self.up_to(SETTLES);
                // `at` may be of before a reboot.
                if asked.at <= now && group.at < asked.at + wait.min(LONGEST_WAIT) {
                    self.need(Look::Group, read);
                    continue;
                }
            }
            let times = asked
                .as_ref()
                .map_or(0, |asked| asked.times)
                .saturating_add(1);
            // What was asked first stands.
            let abandon = asked.map_or(abandon, |asked| asked.abandon);
            let entry = Asked {
                state: state.clone(),
                abandon,
                at: now,
                times,
            };
            self.memory.kept.hooks.insert(hook.name.clone(), entry);
            self.act(
                Action::CompleteHook {
                    hook: hook.name,
                    abandon,
                },
                why,
            );
            self.need(Look::Group, now + SETTLES);
        }
    }

    /// That only others can end what holds this instance: else it would wait and say nothing.
    fn note_others(&mut self, transition: Transition, why: &str) {
        let (Some(group), Some(Members::Autoscaling(autoscaling))) =
            (self.group(), &self.settings.members)
        else {
            return;
        };
        let hooks = group.is.hooks.iter();
        let others = hooks.filter(|hook| hook.transition == transition);
        let others: Vec<&str> = others.map(|hook| hook.name.as_str()).collect();
        if others.is_empty() {
            return;
        }
        let note = format!(
            "{why}, and held by what is not this agent's to complete: `fleet.autoscaling.hooks` has \
             {}, and the group {}",
            autoscaling.hooks.join(", "),
            others.join(", ")
        );
        self.note(note);
    }

    /// Whether the group says that a hook of this transition holds this instance.
    pub(super) fn is_held(&self, transition: Transition) -> bool {
        match transition {
            Transition::Launching => matches!(
                self.own_state(),
                Some(LifecycleState::PendingWait | LifecycleState::WarmedPendingWait)
            ),
            Transition::Terminating => matches!(
                self.own_state(),
                Some(LifecycleState::TerminatingWait | LifecycleState::WarmedTerminatingWait)
            ),
        }
    }

    /// Whether the completion was asked for in the state that it is in.
    pub(super) fn has_asked(&self) -> bool {
        let mut asked = self.memory.kept.hooks.values();
        asked.any(|asked| Some(&asked.state) == self.own_state())
    }
}
