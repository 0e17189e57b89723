//! An agent: the real planner, and the calls that it asks for, one after the other.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use registry_agent::fleet::facts::{
    Facts, InstanceId, LifecycleState, Metadata, Own, OwnRecords, Peers, Records, Seen, Signals,
    TargetState,
};
use registry_agent::fleet::memory::{Kept, Memory};
use registry_agent::fleet::plan::{Action, Look, State, plan};

use super::check::Api;
use super::world::{Event, World};

pub struct Agent {
    pub memory: Memory,
    pub facts: Option<Facts>,
    pub metadata: Metadata,
    pub state: State,
    todo: VecDeque<Job>,
    /// Which of the events that would let it go on is the last one.
    turn: u64,
    asleep: bool,
}

enum Job {
    Act(Action, String),
    Look(Look),
}

impl Agent {
    pub fn new(disk: Kept, seed: u64) -> Self {
        Self {
            memory: Memory::new(disk, seed),
            facts: None,
            metadata: Metadata::default(),
            state: State::Boot,
            todo: VecDeque::new(),
            turn: 0,
            asleep: true,
        }
    }
}

impl World {
    /// The agent makes a plan at that time, unless it is in the middle of one.
    pub fn wake(&mut self, host: usize, at: Duration) {
        let (now, frozen) = (self.now, self.hosts[host].frozen_until);
        if let Some(agent) = &mut self.hosts[host].agent
            && agent.asleep
        {
            agent.turn += 1;
            let turn = agent.turn;
            self.after(at.max(frozen).saturating_sub(now), Event::Go(host, turn));
        }
    }

    pub fn go(&mut self, host: usize, turn: u64) {
        let now = self.now;
        let frozen = now < self.hosts[host].frozen_until;
        let Some(agent) = self.hosts[host]
            .agent
            .as_mut()
            .filter(|agent| agent.turn == turn)
        else {
            return;
        };
        if frozen {
            agent.asleep = true;
            self.wake(host, now);
            return;
        }
        match agent.todo.pop_front() {
            None => self.plan(host),
            Some(job) => {
                match job {
                    Job::Act(action, why) => self.act(host, action, &why),
                    Job::Look(look) => self.look(host, look),
                }
                let cut_off = now < self.hosts[host].cut_off_until || now < self.api_outage;
                let wait = if cut_off {
                    self.seconds(5.0, 10.0)
                } else {
                    self.seconds(0.02, 0.4)
                };
                let Some(agent) = &mut self.hosts[host].agent else {
                    return;
                };
                agent.turn += 1;
                let turn = agent.turn;
                self.after(wait, Event::Go(host, turn));
            }
        }
    }

    fn plan(&mut self, host: usize) {
        let now = self.now;
        self.observe_itself(host);
        let one = &mut self.hosts[host];
        let (booted, agent) = (one.booted, one.agent.as_mut().expect("it runs"));
        let facts = agent.facts.as_ref().expect("it was observed");
        let plan = plan(facts, &agent.memory, &self.settings);
        self.check.totals.plans += 1;
        one.disk.clone_from(&plan.memory.kept);
        agent.memory = plan.memory;
        let before = std::mem::replace(&mut agent.state, plan.state);
        let own = now - booted;
        let due: Vec<Look> = plan
            .looks
            .iter()
            .filter(|(_, at)| **at <= own)
            .map(|(look, _)| *look)
            .collect();
        agent.todo.extend(
            plan.steps
                .into_iter()
                .map(|step| Job::Act(step.action, step.why)),
        );
        agent.todo.extend(due.into_iter().map(Job::Look));
        agent.asleep = agent.todo.is_empty();
        let next = if agent.asleep {
            (booted + plan.next).max(now + Duration::from_millis(5))
        } else {
            now
        };
        if agent.asleep && booted + plan.next < now + Duration::from_millis(5) {
            self.check.spins(host, plan.state);
        } else {
            self.check.rests(host);
        }
        agent.turn += 1;
        let turn = agent.turn;
        let state = agent.state;
        if before != state {
            self.check.totals.states.insert(state);
            let notes = plan.notes;
            self.tell(|| format!("{} {before:?} -> {state:?} {notes:?}", self.hosts[host].id));
        }
        self.after(next - now, Event::Go(host, turn));
    }

    /// What an agent knows of itself without asking anybody.
    fn observe_itself(&mut self, host: usize) {
        let now = self.now;
        let one = &mut self.hosts[host];
        let ready = one.ready(now);
        let (ahead, behind) = one.skew;
        let spot = one.spot.map(|at| (at + behind).saturating_sub(now + ahead));
        let stop = one.stop.map(|at| at - one.booted);
        let agent = one.agent.as_mut().expect("it runs");
        let facts = agent.facts.get_or_insert_with(|| Facts {
            now: Duration::ZERO,
            own: Own {
                id: one.id.clone(),
                addresses: vec![[10, 0, (host >> 8) as u8, (host & 255) as u8].into()],
            },
            metadata: Metadata::default(),
            signals: Signals {
                ready,
                fatal: None,
                warm: true,
                running: 0,
            },
            stop: None,
            group: None,
            abandoned: None,
            own_target: None,
            own_records: None,
            records: None,
            peers: None,
        });
        facts.now = now - one.booted;
        facts.metadata = agent.metadata.clone();
        facts.metadata.spot = spot
            .filter(|_| now >= self.metadata_outage)
            .or(facts.metadata.spot);
        if facts.metadata.spot.is_some() {
            self.check.heard.insert(host);
        }
        facts.stop = stop;
        facts.signals = Signals {
            ready,
            fatal: one.broken.then(|| "the cache's device is gone".to_owned()),
            warm: now >= one.warm_at && now >= self.upstream_outage,
            running: 0,
        };
    }

    fn look(&mut self, host: usize, look: Look) {
        let now = self.now;
        let own = self.hosts[host].id.clone();
        let at = now - self.hosts[host].booted;
        let answered = match look {
            Look::Group | Look::Abandoned => self.call(host, Api::Autoscaling),
            Look::OwnTarget => self.call(host, Api::LoadBalancer),
            Look::OwnRecords => self.call(host, Api::Route53),
            Look::Records => {
                let pages = self.zone.records.len().div_ceil(300).max(1);
                (0..pages).all(|_| self.call(host, Api::Route53))
            }
            Look::Peers => true,
        };
        if !answered {
            return;
        }
        let age = if self.scenario.stale {
            self.seconds(0.0, 5.0)
        } else {
            Duration::ZERO
        };
        let facts_of = |world: &mut Self, set: &dyn Fn(&mut Facts)| {
            let agent = world.hosts[host].agent.as_mut();
            if let Some(facts) = agent.and_then(|agent| agent.facts.as_mut()) {
                set(facts);
            }
        };
        match look {
            Look::Group => {
                let mut is = self.group.seen(now, age);
                let lacking = self.scenario.lacking.iter();
                for (from, to, which) in lacking {
                    let victim = is.members.keys().nth(*which).cloned();
                    if let Some(victim) =
                        victim.filter(|id| (*from..*to).contains(&now) && *id != own)
                    {
                        let mut without = (*is).clone();
                        without.members.remove(&victim);
                        is = Arc::new(without);
                    }
                }
                facts_of(self, &|facts| {
                    facts.group = Some(Seen {
                        at,
                        is: Arc::clone(&is),
                    });
                });
            }
            Look::Abandoned => {
                let hour = Duration::from_hours(1);
                let lately = self
                    .group
                    .abandoned
                    .iter()
                    .filter(|then| **then + hour > now);
                let is = u32::try_from(lately.count()).unwrap();
                facts_of(self, &|facts| facts.abandoned = Some(Seen { at, is }));
            }
            Look::OwnTarget => {
                let is = self.target(&own);
                facts_of(self, &|facts| facts.own_target = Some(Seen { at, is }));
            }
            Look::OwnRecords => {
                let identifier = Some(format!("ra/mirrors/{own}"));
                let records = self.zone.records.iter();
                let records = records.filter(|record| record.identifier == identifier);
                let records = records.cloned().collect();
                let in_sync = self.zone.synced.get(&own).is_none_or(|at| now >= *at);
                let is = OwnRecords { records, in_sync };
                facts_of(self, &|facts| {
                    facts.own_records = Some(Seen { at, is: is.clone() });
                });
            }
            Look::Records => {
                // A page that failed.
                let complete =
                    self.scenario.lost == 0 || self.random.u32(0..100) >= self.scenario.lost;
                let mut records = self.zone.records.clone();
                if !complete {
                    records.truncate(records.len() / 2);
                }
                let is = Arc::new(Records { records, complete });
                facts_of(self, &|facts| {
                    facts.records = Some(Seen {
                        at,
                        is: Arc::clone(&is),
                    });
                });
            }
            Look::Peers => {
                let is = self.peers(host);
                facts_of(self, &|facts| {
                    facts.peers = Some(Seen { at, is: is.clone() });
                });
            }
        }
    }

    fn target(&mut self, id: &InstanceId) -> Option<TargetState> {
        let ready = self
            .index
            .get(id)
            .is_some_and(|host| self.hosts[*host].ready(self.now));
        self.targets.is(id, self.now, ready)
    }

    fn peers(&mut self, host: usize) -> Peers {
        let now = self.now;
        let facts = self.hosts[host]
            .agent
            .as_ref()
            .and_then(|agent| agent.facts.as_ref());
        let group = facts.and_then(|facts| facts.group.clone());
        let members = group.iter().flat_map(|group| &group.is.members);
        let in_service = members.filter(|(_, member)| member.state == LifecycleState::InService);
        let own = &self.hosts[host].id;
        let asked: BTreeSet<InstanceId> = in_service
            .map(|(id, _)| id.clone())
            .filter(|id| id != own)
            .collect();
        let here = now >= self.hosts[host].cut_off_until;
        let answers = |id: &&InstanceId| {
            let peer = &self.hosts[self.index[*id]];
            here && now >= peer.cut_off_until && peer.ready(now)
        };
        let ready = asked.iter().filter(answers).cloned().collect();
        Peers { asked, ready }
    }

    fn act(&mut self, host: usize, action: Action, why: &str) {
        let now = self.now;
        let id = self.hosts[host].id.clone();
        self.tell(|| format!("{id}: {action:?}: {why}"));
        let api = match &action {
            Action::Heartbeat { .. }
            | Action::CompleteHook { .. }
            | Action::AskForReplacement
            | Action::RaiseDesired { .. }
            | Action::Attach => Some(Api::Autoscaling),
            Action::RegisterTarget | Action::DeregisterTarget => Some(Api::LoadBalancer),
            Action::WriteOwnRecords { .. } | Action::DeleteRecord { .. } => Some(Api::Route53),
            Action::RefuseUploads | Action::LetGo => None,
        };
        if api.is_some_and(|api| !self.call(host, api)) {
            self.check.failed(host, &action);
            return;
        }
        match action {
            Action::Heartbeat { .. } => {
                self.check.totals.heartbeats += 1;
                self.group.heartbeat(&id, now);
            }
            Action::CompleteHook { hook, abandon } => {
                self.check_completion(host, &hook, abandon);
                let effect = self.group.complete(&id, &hook, abandon, now);
                self.check_completed(host, &hook, effect);
            }
            Action::AskForReplacement => {
                self.check_replacement(host);
                let grace = self.group.members.get(&id).and_then(|row| row.in_service);
                if let Some(row) = self.group.members.get_mut(&id)
                    && grace.is_none_or(|since| now >= since + super::group::GRACE)
                {
                    row.healthy = false;
                    self.group.changed = true;
                }
            }
            Action::RaiseDesired { to } => {
                self.check_raise(to);
                self.group.desired = to;
                self.group.changed = true;
            }
            Action::Attach => unreachable!("all are members"),
            Action::RegisterTarget => {
                assert!(!self.group.attached, "the group registers them itself");
                self.targets.register(&id, now);
            }
            Action::DeregisterTarget => self.targets.deregister(&id, now),
            Action::WriteOwnRecords { records } => {
                self.check_write(host);
                let change = self.zone.upsert(&records);
                self.propagate(&id, change);
            }
            Action::DeleteRecord { record } => {
                let owner = record.owner("mirrors").expect("one of ours");
                self.check_deletion(host, &owner);
                if let Some(change) = self.zone.delete(&record) {
                    self.propagate(&owner, change);
                }
            }
            Action::RefuseUploads => {}
            Action::LetGo => {
                self.check_gone(host, "its service stops");
                self.hosts[host].agent = None;
                // Somebody starts it again.
                self.hosts[host].stop = None;
                self.after(Duration::from_mins(1), Event::Back(host));
            }
        }
    }
}
