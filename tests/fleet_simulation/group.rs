//! The autoscaling group: it launches, holds, replaces, terminates.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use registry_agent::fleet::facts::{Group, Hook, InstanceId, LifecycleState, Member, Transition};

/// How long health is not looked at after a launch.
pub const GRACE: Duration = Duration::from_mins(5);

#[derive(Debug)]
pub struct GroupModel {
    pub min: u32,
    pub desired: u32,
    pub max: u32,
    pub launches_first: bool,
    pub attached: bool,
    pub hook_timeout: Duration,
    pub members: BTreeMap<InstanceId, Row>,
    /// When launches were abandoned.
    pub abandoned: Vec<Duration>,
    /// What readers saw lately, the newest last.
    seen: Vec<(Duration, Arc<Group>)>,
    pub changed: bool,
    /// Instances that a refresh replaces, one after the other.
    pub refresh: Vec<InstanceId>,
}

#[derive(Debug)]
pub struct Row {
    pub state: LifecycleState,
    pub healthy: bool,
    /// When it came into its state.
    pub since: Duration,
    pub in_service: Option<Duration>,
    /// When the hook that holds it gives up, and for good.
    pub held: Option<(Duration, Duration)>,
    pub heartbeats: u32,
}

impl Row {
    pub fn new(state: LifecycleState, now: Duration) -> Self {
        Self {
            state,
            healthy: true,
            since: now,
            in_service: None,
            held: None,
            heartbeats: 0,
        }
    }

    fn enter(&mut self, state: LifecycleState, now: Duration) {
        self.state = state;
        self.since = now;
        self.held = None;
    }
}

/// What the group does to hosts.
#[derive(Debug)]
pub enum Deed {
    Launch,
    Kill(InstanceId),
    /// Its metadata says something new.
    Tell(InstanceId),
    /// A hook was not completed in time.
    TimedOut(InstanceId, Transition),
}

impl GroupModel {
    pub fn enter(&mut self, id: &InstanceId, state: LifecycleState, now: Duration) {
        if let Some(row) = self.members.get_mut(id) {
            if state == LifecycleState::InService {
                row.in_service = Some(now);
            }
            row.enter(state, now);
            self.changed = true;
        }
    }

    pub fn hold(&mut self, id: &InstanceId, state: LifecycleState, now: Duration) {
        self.enter(id, state, now);
        let timeout = self.hook_timeout;
        if let Some(row) = self.members.get_mut(id) {
            row.held = Some((now + timeout, now + timeout * 100));
            row.heartbeats = 0;
        }
    }

    pub fn heartbeat(&mut self, id: &InstanceId, now: Duration) {
        let timeout = self.hook_timeout;
        if let Some(Row {
            held: Some((until, last)),
            heartbeats,
            ..
        }) = self.members.get_mut(id)
        {
            *heartbeats += 1;
            *until = (now + timeout).min(*last);
        }
    }

    /// Whether it had an effect.
    pub fn complete(&mut self, id: &InstanceId, hook: &str, abandon: bool, now: Duration) -> bool {
        let Some(row) = self.members.get(id) else {
            return false;
        };
        match (&row.state, hook, abandon) {
            (LifecycleState::PendingWait, "launch", false) => {
                self.enter(id, LifecycleState::PendingProceed, now);
            }
            (LifecycleState::PendingWait, "launch", true) => {
                self.abandoned.push(now);
                self.enter(id, LifecycleState::TerminatingProceed, now);
            }
            (LifecycleState::TerminatingWait, "terminate", _) => {
                self.enter(id, LifecycleState::TerminatingProceed, now);
            }
            _ => return false,
        }
        true
    }

    /// What readers see: at most a second old, and older if they get an old copy.
    pub fn seen(&mut self, now: Duration, age: Duration) -> Arc<Group> {
        let second = Duration::from_secs(1);
        let old = self.seen.last().is_none_or(|(at, _)| now >= *at + second);
        if self.changed && old {
            let group = Arc::new(self.shown());
            self.seen.push((now, group));
            self.changed = false;
            let keep = now.saturating_sub(Duration::from_secs(20));
            while self.seen.len() > 1 && self.seen[1].0 < keep {
                self.seen.remove(0);
            }
        }
        let wanted = now.saturating_sub(age);
        let at = self
            .seen
            .iter()
            .rposition(|(at, _)| *at <= wanted)
            .unwrap_or(0);
        Arc::clone(&self.seen[at].1)
    }

    fn shown(&self) -> Group {
        let hook = |name: &str, transition| Hook {
            name: name.to_owned(),
            transition,
            heartbeat_timeout: self.hook_timeout,
        };
        let member = |row: &Row| Member {
            state: row.state.clone(),
            healthy: row.healthy,
            zone: None,
        };
        let members = self.members.iter();
        Group {
            min: self.min,
            desired: self.desired,
            max: self.max,
            launches_first: self.launches_first,
            registers_targets: self.attached,
            hooks: vec![
                hook("launch", Transition::Launching),
                hook("terminate", Transition::Terminating),
            ],
            members: members.map(|(id, row)| (id.clone(), member(row))).collect(),
            complete: true,
        }
    }

    /// A few seconds of its life.
    pub fn tick(&mut self, now: Duration) -> Vec<Deed> {
        let mut deeds = Vec::new();
        self.move_on(now, &mut deeds);
        self.replace(now, &mut deeds);
        self.resize(now, &mut deeds);
        deeds
    }

    fn move_on(&mut self, now: Duration, deeds: &mut Vec<Deed>) {
        let moving = self
            .members
            .iter()
            .filter(|(_, row)| row.state != LifecycleState::InService);
        let moving: Vec<InstanceId> = moving.map(|(id, _)| id.clone()).collect();
        for id in moving {
            let row = &self.members[&id];
            let overdue = row.held.is_some_and(|(until, _)| now >= until);
            match row.state {
                LifecycleState::Pending => self.hold(&id, LifecycleState::PendingWait, now),
                LifecycleState::PendingWait if overdue => {
                    deeds.push(Deed::TimedOut(id.clone(), Transition::Launching));
                    self.enter(&id, LifecycleState::TerminatingProceed, now);
                }
                LifecycleState::PendingProceed => self.enter(&id, LifecycleState::InService, now),
                LifecycleState::Terminating => {
                    self.hold(&id, LifecycleState::TerminatingWait, now);
                }
                LifecycleState::TerminatingWait if overdue => {
                    deeds.push(Deed::TimedOut(id.clone(), Transition::Terminating));
                    self.enter(&id, LifecycleState::TerminatingProceed, now);
                }
                LifecycleState::TerminatingProceed => {
                    self.members.remove(&id);
                    self.changed = true;
                    deeds.push(Deed::Kill(id));
                }
                _ => {}
            }
        }
    }

    fn terminate(&mut self, id: &InstanceId, now: Duration, deeds: &mut Vec<Deed>) {
        self.enter(id, LifecycleState::Terminating, now);
        deeds.push(Deed::Tell(id.clone()));
    }

    fn serving(&self) -> usize {
        let rows = self.members.values();
        rows.filter(|row| row.healthy && row.state == LifecycleState::InService)
            .count()
    }

    fn coming(&self) -> usize {
        self.members
            .values()
            .filter(|row| row.healthy && row.state.is_pending())
            .count()
    }

    /// The unhealthy, and what a refresh replaces.
    fn replace(&mut self, now: Duration, deeds: &mut Vec<Deed>) {
        let bad = self.members.iter().filter(|(_, row)| {
            !row.healthy && (row.state == LifecycleState::InService || row.state.is_pending())
        });
        let bad: Vec<InstanceId> = bad.map(|(id, _)| id.clone()).collect();
        let enough =
            |group: &Self| !group.launches_first || group.serving() >= group.desired as usize;
        for id in bad {
            if enough(self) {
                self.terminate(&id, now, deeds);
            }
        }
        let busy = self.members.values().any(|row| row.state.is_pending());
        let going = self.members.values().any(|row| row.state.is_terminating());
        while let Some(id) = self.refresh.last().cloned() {
            let there = self
                .members
                .get(&id)
                .is_some_and(|row| row.state == LifecycleState::InService);
            if !there {
                self.refresh.pop();
                continue;
            }
            let whole = self.serving() >= self.desired as usize && !busy && !going;
            let spare = self.serving() > self.desired as usize;
            let may = if self.launches_first { spare } else { whole };
            if may {
                self.refresh.pop();
                self.terminate(&id, now, deeds);
            }
            break;
        }
    }

    fn resize(&mut self, now: Duration, deeds: &mut Vec<Deed>) {
        let extra = usize::from(self.launches_first && !self.refresh.is_empty());
        let have = self.serving() + self.coming();
        let wanted = self.desired as usize + extra;
        if have < wanted {
            deeds.push(Deed::Launch);
        } else if self.serving() > wanted.max(self.desired as usize) {
            let oldest = self
                .members
                .iter()
                .filter(|(_, row)| row.healthy && row.state == LifecycleState::InService);
            let oldest = oldest
                .min_by_key(|(_, row)| row.in_service)
                .map(|(id, _)| id.clone());
            if let Some(id) = oldest {
                self.terminate(&id, now, deeds);
            }
        }
    }
}

impl GroupModel {
    pub fn new(scenario: &super::scenario::Scenario) -> Self {
        Self {
            min: 0,
            desired: scenario.instances,
            max: scenario.max,
            launches_first: scenario.launches_first,
            attached: scenario.attached,
            hook_timeout: scenario.hook_timeout,
            members: BTreeMap::new(),
            abandoned: Vec::new(),
            seen: Vec::new(),
            changed: true,
            refresh: Vec::new(),
        }
    }
}
