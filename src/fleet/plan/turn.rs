//! One plan while it is made: what every room needs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::super::facts::{Facts, Group, InstanceId, LifecycleState, Seen, Transition};
use super::super::memory::{Due, Leaving, Memory, Tries, Try};
use super::super::rank::rank;
use super::{Action, Look, Plan, State, Step};
use crate::config::{FleetSettings, Members};

/// How often the group and the own record are looked at, in a fleet of any usual size.
const LOOK: Duration = Duration::from_mins(1);
/// What an account allows, half of it: Route 53 takes ten changes or listings a second, the rest of
/// the account's among them.
const CALLS_A_SECOND: u32 = 5;
/// What an instance needs of each API to join: looks before, the change, and looks until it is seen.
const CALLS_TO_JOIN: u32 = 7;
/// So many may join at once.
const FEW: u32 = 10;
/// So many looks at the group a second, all instances together.
const GROUP_LOOKS_A_SECOND: f64 = 1.67;
/// So many listings of records a second.
const RECORD_LOOKS_A_SECOND: f64 = 0.33;
/// The longest wait between two attempts, where the fleet is not so large that it has to be longer.
const LONGEST_BACKOFF: Duration = Duration::from_mins(1);
/// A spot notice is to have been followed so long before its time.
const SPOT_MARGIN: Duration = Duration::from_secs(20);
/// Spot notices come this long before.
const SPOT_NOTICE: Duration = Duration::from_mins(2);
/// How far apart those wait who act for all, in the order of their rank.
pub(super) const RANK_STEP: Duration = Duration::from_secs(30);
/// A plan is made at least so often.
const LONGEST_SLEEP: Duration = Duration::from_mins(10);

pub(super) struct Turn<'a> {
    pub facts: &'a Facts,
    pub settings: &'a FleetSettings,
    pub memory: Memory,
    steps: Vec<Step>,
    looks: BTreeMap<Look, Duration>,
    next: Duration,
    notes: Vec<String>,
    /// See [`Plan::refused`].
    pub refused: bool,
}

impl<'a> Turn<'a> {
    pub fn new(facts: &'a Facts, memory: Memory, settings: &'a FleetSettings) -> Self {
        Self {
            facts,
            settings,
            memory,
            steps: Vec::new(),
            looks: BTreeMap::new(),
            next: facts.now + LONGEST_SLEEP,
            notes: Vec::new(),
            refused: false,
        }
    }

    pub fn into_plan(self, state: State) -> Plan {
        Plan {
            state,
            steps: self.steps,
            looks: self.looks,
            next: self.next,
            notes: self.notes,
            refused: self.refused,
            memory: self.memory,
        }
    }

    /// What every state begins with: what was said once and counts for good, and a look at the
    /// group every while.
    pub fn remember(&mut self) {
        let (now, own) = (self.facts.now, &self.facts.own.id);
        if self.memory.kept.instance.as_ref() != Some(own) {
            self.memory.kept = super::super::memory::Kept {
                instance: Some(own.clone()),
                ..Default::default()
            };
        }
        let state = self.own_state().cloned();
        self.latch(state.as_ref());
        if state.is_some() && state != Some(LifecycleState::Detached) {
            self.memory.kept.was_member = true;
        }
        // A host that has booted again counts anew.
        let in_service = state == Some(LifecycleState::InService);
        let since = self
            .memory
            .kept
            .in_service_since
            .filter(|since| *since <= now);
        self.memory.kept.in_service_since = in_service.then(|| since.unwrap_or(now));
        if self.memory.target_state != self.facts.metadata.target_state {
            self.memory
                .target_state
                .clone_from(&self.facts.metadata.target_state);
            self.memory.group_since = now;
        }
        if !self.is_held(Transition::Launching) {
            self.memory.pending_since = None;
            self.memory.unready_since = None;
            self.memory.abandon_at = None;
        }
        if self.facts.metadata.rebalance {
            self.note("EC2 recommends to rebalance: this instance may be interrupted soon");
        }
        match &self.settings.members {
            Some(Members::Autoscaling(_)) => {
                self.need(Look::Group, self.memory.group_since);
                let interval = self.paced(LOOK, GROUP_LOOKS_A_SECOND);
                self.every(Look::Group, interval);
            }
            // A list is known.
            Some(Members::Static(_)) | None => {}
        }
    }

    /// That it has to go. Metadata that fails says nothing, so nothing is taken back.
    fn latch(&mut self, state: Option<&LifecycleState>) {
        if self.memory.kept.leaving.is_some() {
            return;
        }
        let now = self.facts.now;
        let target = self.facts.metadata.target_state.as_ref();
        self.memory.kept.leaving = if let Some(left) = self.facts.metadata.spot {
            // A wall clock that is far off must not cost the time that there is.
            let left = if left.is_zero() || left > SPOT_NOTICE {
                SPOT_NOTICE
            } else {
                left
            };
            Some(Leaving {
                why: "EC2 takes this spot instance back".to_owned(),
                deadline: Some(now + left.saturating_sub(SPOT_MARGIN)),
            })
        } else {
            let said = [state, target]
                .into_iter()
                .flatten()
                .find(|state| state.is_terminating());
            said.map(|state| Leaving {
                why: format!("the group says {}", state.as_str()),
                deadline: None,
            })
        };
    }

    /// Told to go: by the group, EC2 or whoever stops the service.
    pub fn is_leaving(&self) -> bool {
        self.memory.kept.leaving.is_some() || self.facts.stop.is_some()
    }

    pub fn group(&self) -> Option<&'a Seen<Arc<Group>>> {
        self.facts.group.as_ref()
    }

    /// Where the group says that this instance is.
    pub fn own_state(&self) -> Option<&'a LifecycleState> {
        let member = self.group()?.is.members.get(&self.facts.own.id);
        member.map(|member| &member.state)
    }

    /// How many instances there are, as far as is known.
    pub fn size(&self) -> u32 {
        let members = self.group().map_or(1, |group| group.is.members.len());
        u32::try_from(members).unwrap_or(u32::MAX)
    }

    /// The group's name in the identifiers of records.
    pub fn group_name(&self) -> &'a str {
        match &self.settings.members {
            Some(Members::Autoscaling(autoscaling)) => &autoscaling.group,
            Some(Members::Static(_)) | None => "static",
        }
    }

    pub fn act(&mut self, action: Action, why: impl Into<String>) {
        self.steps.push(Step {
            action,
            why: why.into(),
        });
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// A plan is made by then.
    pub fn wake(&mut self, at: Duration) {
        self.next = self.next.min(at.max(self.facts.now));
    }

    /// Whether the time has come; if not, a plan is made when it has.
    pub fn is_past(&mut self, at: Duration) -> bool {
        if self.facts.now < at {
            self.wake(at);
        }
        self.facts.now >= at
    }

    /// Whether it was looked at since then; if not, it will be.
    pub fn need(&mut self, what: Look, since: Duration) -> bool {
        let seen = self.seen(what);
        // The last attempt was answered: the next one is the first again.
        if self
            .last_attempt(Try::Look(what))
            .is_some_and(|last| seen >= Some(last))
        {
            self.settled(Try::Look(what));
        }
        if seen >= Some(since) {
            return true;
        }
        let at = match self.memory.tries.get(&Try::Look(what)) {
            Some(tries) => tries.next.max(since),
            None => since.max(self.facts.now),
        };
        let due = self
            .looks
            .get(&what)
            .is_some_and(|due| *due <= self.facts.now);
        if at <= self.facts.now && !due {
            self.tried(Try::Look(what));
        }
        let look = self.looks.entry(what).or_insert(at);
        *look = (*look).min(at);
        self.wake(at);
        false
    }

    /// It is looked at again and again, each time after a wait that is up to half longer or shorter.
    pub fn every(&mut self, what: Look, interval: Duration) {
        let Some(seen) = self.seen(what) else {
            self.need(what, Duration::ZERO);
            return;
        };
        let due = match self.memory.due.get(&what) {
            Some(due) if due.seen == seen => due.at,
            _ => {
                let at = seen + self.jitter(interval, 0.5);
                self.memory.due.insert(what, Due { seen, at });
                at
            }
        };
        self.need(what, due);
    }

    /// When it was looked at last.
    pub fn seen(&self, what: Look) -> Option<Duration> {
        let facts = self.facts;
        match what {
            Look::Group => facts.group.as_ref().map(|seen| seen.at),
            Look::Abandoned => facts.abandoned.as_ref().map(|seen| seen.at),
            Look::OwnTarget => facts.own_target.as_ref().map(|seen| seen.at),
            Look::OwnRecords => facts.own_records.as_ref().map(|seen| seen.at),
            Look::Records => facts.records.as_ref().map(|seen| seen.at),
            Look::Peers => facts.peers.as_ref().map(|seen| seen.at),
        }
    }

    /// Does something whose effect is seen later, unless it was done lately: then after a wait that
    /// grows.
    pub fn attempt(&mut self, what: Try, action: Action, why: impl Into<String>) {
        if self.is_due(what) {
            self.act(action, why);
        }
    }

    /// Whether it is time for an attempt, which is then taken to be made.
    pub fn is_due(&mut self, what: Try) -> bool {
        let tries = self.memory.tries.get(&what);
        let next = tries.map_or(self.facts.now, |tries| tries.next);
        let due = self.is_past(next);
        if due {
            self.tried(what);
        }
        due
    }

    /// The effect was seen.
    pub fn settled(&mut self, what: Try) {
        self.memory.tries.remove(&what);
    }

    /// When it was attempted last, if its effect was not seen since.
    pub fn last_attempt(&self, what: Try) -> Option<Duration> {
        self.memory.tries.get(&what)?.last
    }

    fn tried(&mut self, what: Try) {
        let count = self.memory.tries.get(&what).map_or(0, |tries| tries.count) + 1;
        let (last, next) = (Some(self.facts.now), self.facts.now + self.backoff(count));
        self.memory.tries.insert(what, Tries { count, last, next });
        self.wake(next);
    }

    /// Full jitter, from a second at the least, up to a minute or to what so many instances need.
    pub fn backoff(&mut self, count: u32) -> Duration {
        let longest = match self.group() {
            Some(_) => LONGEST_BACKOFF.max(self.spread()),
            // How many there are is not known, and if they are many, none is to keep the others out.
            None => LONGEST_SLEEP,
        };
        let second = Duration::from_secs(1);
        let cap = (second * 2_u32.saturating_pow(count.min(20))).min(longest);
        second + self.up_to(cap)
    }

    /// How long all instances together need to join, if it is not a few that do.
    pub fn spread(&self) -> Duration {
        Duration::from_secs(1) * self.size().saturating_sub(FEW) * CALLS_TO_JOIN / CALLS_A_SECOND
    }

    /// An interval, or a longer one where so many instances would make more calls than that a
    /// second.
    pub fn paced(&self, interval: Duration, a_second: f64) -> Duration {
        interval.max(Duration::from_secs_f64(f64::from(self.size()) / a_second))
    }

    /// How often the own record is looked at.
    pub fn own_look(&self) -> Duration {
        self.paced(LOOK, RECORD_LOOKS_A_SECOND)
    }

    pub fn up_to(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.memory.random.f64())
    }

    /// Something around `middle`: so large a part of it shorter or longer.
    pub fn jitter(&mut self, middle: Duration, part: f64) -> Duration {
        middle.mul_f64(1.0 - part + 2.0 * part * self.memory.random.f64())
    }

    /// How many serving instances come before this one in what is about `subject`.
    pub fn rank(&self, subject: &str) -> u32 {
        let members = self.group().map(|group| &group.is.members);
        let members = members.into_iter().flatten();
        let serving = members.filter(|(_, member)| member.serves());
        let ids: Vec<&InstanceId> = serving.map(|(id, _)| id).collect();
        rank(subject, &self.facts.own.id, ids)
    }

    /// Whether it is this instance's turn to do what one does for all: the first at once, the next
    /// 30 s later if it is still wanted then, and so on.
    pub fn is_my_turn(&mut self, subject: &'static str) -> bool {
        let now = self.facts.now;
        let since = *self.memory.turns.entry(subject).or_insert(now);
        let wait = RANK_STEP.saturating_mul(self.rank(subject));
        self.is_past(since + wait)
    }
}
