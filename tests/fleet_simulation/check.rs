//! The promises, looked at while it happens.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use registry_agent::fleet::facts::{InstanceId, LifecycleState, TargetState, Transition};
use registry_agent::fleet::plan::{Action, State};

use super::scenario::Fault;
use super::world::World;
use super::zone::Change;

/// An instance that could serve for so long, with all APIs within reach, is in the name.
const JOINS_WITHIN: Duration = Duration::from_mins(10);
/// A record is gone so long after the group ceased to list its instance, while the APIs answer and
/// somebody serves; and so much longer for each other one that is to go.
const GONE_WITHIN: Duration = Duration::from_mins(35);
const GONE_EACH: Duration = Duration::from_mins(3);
/// Launches abandoned in an hour: three, and one by whoever looked at the same moment.
const MOST_ABANDONED: usize = 4;
/// An answer that is older says nothing about now.
const PEER_ANSWER: Duration = Duration::from_mins(1);

/// What limits the calls of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Api {
    Autoscaling,
    LoadBalancer,
    Route53,
}

impl Api {
    /// Calls a second.
    pub fn limit(self) -> f64 {
        match self {
            Self::Route53 => 10.0,
            Self::Autoscaling | Self::LoadBalancer => 20.0,
        }
    }

    fn burst(self) -> f64 {
        self.limit() * 5.0
    }
}

/// The account's limits, by a bucket of tokens for each API.
#[derive(Debug, Default)]
pub struct Apis {
    buckets: BTreeMap<Api, (f64, Duration)>,
    /// Calls of each minute.
    minutes: BTreeMap<Api, Vec<u64>>,
    /// Somebody else in the account uses the limits up until then.
    pub throttled_until: Duration,
    pub throttled: u64,
}

impl Apis {
    pub fn count(&mut self, api: Api, now: Duration, _host: usize) {
        let minute = usize::try_from(now.as_secs() / 60).unwrap();
        let minutes = self.minutes.entry(api).or_default();
        minutes.resize(minutes.len().max(minute + 1), 0);
        minutes[minute] += 1;
    }

    pub fn allows(&mut self, api: Api, now: Duration) -> bool {
        let (tokens, at) = self.buckets.entry(api).or_insert((api.burst(), now));
        let more = now.saturating_sub(*at).as_secs_f64() * api.limit();
        (*tokens, *at) = ((*tokens + more).min(api.burst()), now);
        let allows = *tokens >= 1.0 && now >= self.throttled_until;
        if allows {
            *tokens -= 1.0;
        } else {
            self.throttled += 1;
        }
        allows
    }

    /// The most calls of any minute, by API.
    pub fn busiest(&self) -> impl Iterator<Item = (Api, u64)> {
        let minutes = self.minutes.iter();
        minutes.map(|(api, minutes)| (*api, minutes.iter().copied().max().unwrap_or(0)))
    }

    /// Those of the first minutes, and those after.
    pub fn rates(&self, joining: usize) -> Rates {
        let rate = |minutes: &[u64]| {
            let calls: u64 = minutes.iter().sum();
            calls as f64 / (minutes.len().max(1) as f64 * 60.0)
        };
        let split = |minutes: &Vec<u64>| joining.min(minutes.len());
        let each = self.minutes.iter();
        let joining = each
            .clone()
            .map(|(api, minutes)| (*api, rate(&minutes[..split(minutes)])));
        let steady = each.map(|(api, minutes)| (*api, rate(&minutes[split(minutes)..])));
        Rates {
            joining: joining.collect(),
            steady: steady.collect(),
            throttled: self.throttled,
        }
    }
}

/// Calls a second.
pub struct Rates {
    joining: Vec<(Api, f64)>,
    pub steady: Vec<(Api, f64)>,
    throttled: u64,
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((api, joining), (_, steady)) in self.joining.iter().zip(&self.steady) {
            write!(f, "{api:?} {joining:.2}, {steady:.2}; ")?;
        }
        write!(f, "{} throttled", self.throttled)
    }
}

#[derive(Debug, Default)]
pub struct Check {
    /// The first promise that was broken.
    pub broken: Option<String>,
    pub totals: Totals,
    faults: Vec<Fault>,
    /// Until when an API is broken for everybody.
    disturbed_until: Duration,
    /// Since when each host could serve, with all APIs within reach.
    able: BTreeMap<usize, Duration>,
    /// When each was ready last.
    ready: BTreeMap<InstanceId, Duration>,
    /// Since when the owners of records are gone from the group.
    orphans: BTreeMap<InstanceId, Duration>,
    /// When each was answered last.
    answered: BTreeMap<InstanceId, Duration>,
    /// Hosts whose agent has read that EC2 takes them.
    pub heard: BTreeSet<usize>,
    /// Hosts of which a hook ran out.
    ran_out: BTreeSet<usize>,
    /// Completions of each hook of each host: with effect, and without.
    completions: BTreeMap<(usize, String), (u32, u32)>,
    spins: BTreeMap<usize, u32>,
}

/// What happened in all, so that no promise is kept by nothing having happened.
#[derive(Debug, Default, Clone)]
pub struct Totals {
    pub plans: u64,
    pub faults: u64,
    pub heartbeats: u64,
    pub joined: u64,
    pub left: u64,
    pub abandoned: u64,
    pub replaced: u64,
    pub collected: u64,
    pub stepped_back: u64,
    pub lost_completions: u64,
    pub taken: u64,
    pub longest_gone: Duration,
    pub states: BTreeSet<State>,
}

impl Totals {
    pub fn add(&mut self, other: &Self) {
        self.plans += other.plans;
        self.faults += other.faults;
        self.heartbeats += other.heartbeats;
        self.joined += other.joined;
        self.left += other.left;
        self.abandoned += other.abandoned;
        self.replaced += other.replaced;
        self.collected += other.collected;
        self.stepped_back += other.stepped_back;
        self.lost_completions += other.lost_completions;
        self.taken += other.taken;
        self.longest_gone = self.longest_gone.max(other.longest_gone);
        self.states.extend(&other.states);
    }

    pub fn assert_everything_happened(&self, seeds: u64) {
        let many = seeds / 100;
        for (what, count) in [
            ("faults", self.faults),
            ("heartbeats", self.heartbeats),
            ("joined", self.joined),
            ("left", self.left),
            ("abandoned", self.abandoned),
            ("replaced", self.replaced),
            ("collected", self.collected),
            ("taken", self.taken),
            ("stepped back", self.stepped_back),
        ] {
            assert!(count >= many, "only {count} times: {what}");
        }
    }
}

impl Check {
    fn fail(&mut self, broken: impl Into<String>) {
        self.broken.get_or_insert(broken.into());
    }

    pub fn disturbed(&mut self, now: Duration, fault: Fault) {
        self.faults.push(fault);
        if let Fault::ApiOutage(lasts) | Fault::Throttle(lasts) = fault {
            self.disturbed_until = self.disturbed_until.max(now + lasts);
        }
    }

    /// A plan that wants another one at once, and again.
    pub fn spins(&mut self, host: usize, state: State) {
        let spins = self.spins.entry(host).or_default();
        *spins += 1;
        if *spins > 20 {
            self.fail(format!("host {host} plans without end in {state:?}"));
        }
    }

    pub fn rests(&mut self, host: usize) {
        self.spins.remove(&host);
    }

    pub fn failed(&mut self, _host: usize, action: &Action) {
        if matches!(action, Action::CompleteHook { .. }) {
            self.totals.lost_completions += 1;
        }
    }
}

impl World {
    fn could_serve(&self, host: usize) -> bool {
        let one = &self.hosts[host];
        let row = self.group.members.get(&one.id);
        one.ready(self.now)
            && row.is_some_and(|row| row.healthy && row.state == LifecycleState::InService)
            && one.disk.leaving.is_none()
            && one.stop.is_none()
            && one.spot.is_none()
            && self.now >= one.cut_off_until
            && self.now >= self.check.disturbed_until
    }

    /// Whether one could serve for so long that it has to be in the name.
    fn somebody_serves(&self) -> Option<usize> {
        let mut able = self.check.able.iter();
        able.find(|(host, since)| self.now >= **since + JOINS_WITHIN && self.could_serve(**host))
            .map(|(host, _)| *host)
    }

    pub fn check_tick(&mut self) {
        for host in 0..self.hosts.len() {
            if self.hosts[host].up && self.hosts[host].ready(self.now) {
                self.check
                    .ready
                    .insert(self.hosts[host].id.clone(), self.now);
            }
            if self.could_serve(host) {
                let since = *self.check.able.entry(host).or_insert(self.now);
                let id = &self.hosts[host].id;
                let joined = !self.scenario.dns || self.zone.served.contains(id);
                // Ten thousand join at the pace that the account allows.
                let patience =
                    JOINS_WITHIN.max(Duration::from_secs(self.group.members.len() as u64 * 2));
                if self.now >= since + patience && !joined {
                    self.check.fail(format!(
                        "{id} serves for ten minutes and is not in the name"
                    ));
                }
            } else {
                self.check.able.remove(&host);
            }
        }
        self.check_orphans();
        let hour = Duration::from_hours(1);
        let lately = self
            .group
            .abandoned
            .iter()
            .filter(|at| **at + hour > self.now)
            .count();
        if lately > MOST_ABANDONED {
            self.check
                .fail(format!("{lately} launches were abandoned in an hour"));
        }
        for (api, calls) in self.api.busiest() {
            if calls as f64 > api.limit() * 60.0 {
                self.check
                    .fail(format!("{calls} calls of {api:?} in a minute"));
            }
        }
    }

    fn check_orphans(&mut self) {
        let owners = self
            .zone
            .records
            .iter()
            .filter_map(|record| record.owner("mirrors"));
        let orphans: BTreeSet<InstanceId> = owners
            .filter(|owner| !self.group.members.contains_key(owner))
            .collect();
        self.check.orphans.retain(|id, _| orphans.contains(id));
        let patience = GONE_WITHIN + GONE_EACH * u32::try_from(orphans.len()).unwrap();
        for id in orphans {
            let since = *self.check.orphans.entry(id.clone()).or_insert(self.now);
            let Some(host) = self.somebody_serves() else {
                // Nobody is there to do it.
                self.check.orphans.insert(id, self.now);
                continue;
            };
            let since = since.max(self.check.disturbed_until);
            let gone = self.now.saturating_sub(since.max(self.check.able[&host]));
            self.check.totals.longest_gone = self.check.totals.longest_gone.max(gone);
            if gone > patience {
                self.check
                    .fail(format!("{id} is gone for {gone:?} and still in the name"));
            }
        }
    }

    /// What the servers answer has changed.
    pub fn check_name(&mut self, change: &Change) {
        if let Change::Remove(id) = change {
            self.check.answered.insert(id.clone(), self.now);
        }
        if self.zone.served.is_empty()
            && let Some(host) = self.somebody_serves()
        {
            let id = &self.hosts[host].id;
            self.check
                .fail(format!("the name is empty, and {id} serves"));
        }
    }

    /// A record is about to be deleted.
    pub fn check_deletion(&mut self, host: usize, owner: &InstanceId) {
        let own = &self.hosts[host].id;
        if owner != own {
            if self.group.members.contains_key(owner) {
                self.check.fail(format!(
                    "{own} deletes the record of {owner}, which is there"
                ));
            }
            self.check.totals.collected += 1;
            return;
        }
        let state = self.hosts[host].agent.as_ref().map(|agent| agent.state);
        if matches!(
            state,
            Some(State::Suspect | State::Registering | State::PendingWait)
        ) {
            self.check.totals.stepped_back += 1;
            let others = self
                .zone
                .records
                .iter()
                .filter_map(|record| record.owner("mirrors"));
            let mut others = others.filter(|other| other != owner);
            let recent = self.now.saturating_sub(PEER_ANSWER);
            let serves = |other: InstanceId| {
                self.hosts[self.index[&other]].ready(self.now)
                    || self.check.ready.get(&other).is_some_and(|at| *at >= recent)
            };
            if !others.any(serves) {
                self.check.fail(format!(
                    "{owner} steps back, and no other in the name serves"
                ));
            }
        }
    }

    pub fn check_completion(&mut self, host: usize, hook: &str, abandon: bool) {
        let id = self.hosts[host].id.clone();
        let state = self.group.members.get(&id).map(|row| row.state.clone());
        match (hook, state) {
            ("launch", Some(LifecycleState::PendingWait)) if abandon => {
                self.check.totals.abandoned += 1;
                if !self.hosts[host].broken && self.hosts[host].ready(self.now) {
                    self.check
                        .fail(format!("{id} is abandoned, and nothing is wrong with it"));
                }
            }
            ("launch", Some(LifecycleState::PendingWait)) => {
                self.check.totals.joined += 1;
                let named = !self.scenario.dns || self.zone.served.contains(&id);
                let registers = self.scenario.load_balancer && !self.group.attached;
                let target = self.targets.targets.get(&id).map(|(state, _)| *state);
                let found = !registers || matches!(target, Some(TargetState::Healthy));
                if !named || !found {
                    self.check
                        .fail(format!("{id} joins before anybody can find it"));
                }
            }
            ("terminate", Some(LifecycleState::TerminatingWait)) => {
                self.check.totals.left += 1;
                self.check_gone(host, "its hook is completed");
            }
            _ => {}
        }
    }

    pub fn check_completed(&mut self, host: usize, hook: &str, effect: bool) {
        let entry = self
            .check
            .completions
            .entry((host, hook.to_owned()))
            .or_default();
        if effect {
            entry.0 += 1;
        } else {
            entry.1 += 1;
        }
        let (effects, vain) = *entry;
        // One more where the hook ran out a moment before.
        let allowed = if self.scenario.stale {
            3
        } else {
            u32::from(self.check.ran_out.contains(&host))
        };
        if effects > 1 || vain > allowed {
            let id = &self.hosts[host].id;
            self.check.fail(format!(
                "{id} completes {hook} {effects} times and {vain} in vain"
            ));
        }
    }

    /// Nothing may lead to this host any more.
    pub fn check_gone(&mut self, host: usize, why: &str) {
        let one = &self.hosts[host];
        // EC2 and whoever stops a service have a deadline of their own.
        let hurried = one.spot.is_some() || one.stop.is_some_and(|stop| self.now >= stop);
        if hurried {
            return;
        }
        let id = one.id.clone();
        let ttl = self
            .settings
            .dns
            .as_ref()
            .map_or(Duration::ZERO, |dns| dns.ttl);
        let lately = self
            .check
            .answered
            .get(&id)
            .is_some_and(|at| self.now < *at + ttl);
        if self.zone.served.contains(&id) || lately {
            self.check
                .fail(format!("{why}, and resolvers still lead to {id}"));
        }
        if self.targets.is(&id, self.now, true).is_some() {
            self.check
                .fail(format!("{why}, and the load balancer still leads to {id}"));
        }
    }

    /// A hook that ran out under an agent that could have spoken.
    pub fn check_timed_out(&mut self, host: usize, transition: Transition) {
        self.check.ran_out.insert(host);
        let one = &self.hosts[host];
        let disturbed = self.check.faults.iter().any(|fault| {
            matches!(
                fault,
                Fault::ApiOutage(_) | Fault::Throttle(_) | Fault::Partition(_) | Fault::Freeze(_)
            )
        });
        if one.answers(self.now) && !disturbed && self.scenario.lost == 0 {
            let id = &one.id;
            self.check
                .fail(format!("{id} let its {transition:?} hook run out"));
        }
    }

    /// A record is about to be written.
    pub fn check_write(&mut self, host: usize) {
        let told = self.hosts[host].disk.leaving.is_some() || self.hosts[host].stop.is_some();
        let noticed = self.hosts[host]
            .spot
            .is_some_and(|at| self.now + Duration::from_mins(1) > at);
        if told || noticed {
            let id = &self.hosts[host].id;
            self.check.fail(format!("{id} joins, and was told to go"));
        }
    }

    /// EC2 takes a spot instance, two minutes after it said so.
    pub fn check_taken(&mut self, host: usize) {
        let one = &self.hosts[host];
        let notice = self.now.saturating_sub(Duration::from_mins(3));
        let reached = notice
            > one
                .cut_off_until
                .max(one.frozen_until)
                .max(self.check.disturbed_until);
        let named = self
            .zone
            .records
            .iter()
            .any(|record| record.owner("mirrors").as_ref() == Some(&one.id));
        let unheard = self
            .check
            .faults
            .iter()
            .any(|one| matches!(one, Fault::MetadataOutage(_)));
        if reached
            && !unheard
            && self.check.heard.contains(&host)
            && one.answers(self.now)
            && self.scenario.lost == 0
            && named
        {
            let id = &one.id;
            self.check
                .fail(format!("{id} is taken by EC2, and still in the name"));
        }
        self.check.totals.taken += 1;
    }

    pub fn check_raise(&mut self, to: u32) {
        if to <= self.group.desired || to > self.group.max {
            self.check.fail(format!(
                "desired capacity goes from {} to {to}",
                self.group.desired
            ));
        }
    }

    pub fn check_replacement(&mut self, host: usize) {
        self.check.totals.replaced += 1;
        let id = self.hosts[host].id.clone();
        if !self.hosts[host].broken {
            self.check.fail(format!(
                "{id} calls itself unhealthy, and a new one would be no better"
            ));
        }
        let others = self.group.members.iter().filter(|(other, _)| **other != id);
        let unwell = others
            .clone()
            .filter(|(_, row)| !row.healthy || row.state.is_terminating());
        // Who is shown a list without the other can't know.
        let mut lacking = self.scenario.lacking.iter();
        let shown =
            !lacking.any(|(from, to, _)| (*from..*to + Duration::from_secs(5)).contains(&self.now));
        if let Some((other, _)) = unwell.clone().next().filter(|_| shown) {
            self.check.fail(format!(
                "{id} calls itself unhealthy while {other} is being replaced"
            ));
        }
        let left = others.filter(|(_, row)| row.healthy && row.state == LifecycleState::InService);
        let (left, desired) = (left.count(), self.group.desired);
        let least = if desired <= 1 {
            0
        } else {
            desired.div_ceil(2) as usize
        };
        if left < least || desired <= 1 && !self.group.launches_first {
            self.check.fail(format!(
                "{id} calls itself unhealthy, and {left} of {desired} are left"
            ));
        }
        let recent = self.now.saturating_sub(Duration::from_mins(3));
        let peers = self.group.members.iter().filter(|(other, _)| **other != id);
        let peers = peers.filter(|(_, row)| row.state == LifecycleState::InService);
        let (well, sick): (Vec<_>, Vec<_>) = peers
            .map(|(other, _)| self.check.ready.get(other).is_some_and(|at| *at >= recent))
            .partition(|ready| *ready);
        if well.len() < sick.len() {
            self.check.fail(format!(
                "{id} calls itself unhealthy, and so would most of the others"
            ));
        }
    }

    /// An hour after the last fault all is well again.
    pub fn check_end(&mut self) {
        let hopeless = self
            .check
            .faults
            .iter()
            .any(|fault| matches!(fault, Fault::FatalEverywhere | Fault::BadImage(_)));
        let broken = self
            .hosts
            .iter()
            .filter(|host| host.up && host.broken)
            .count();
        let many = broken * 2 >= self.group.desired as usize;
        if hopeless || broken > 0 && many {
            return;
        }
        let serving: BTreeSet<InstanceId> = (0..self.hosts.len())
            .filter(|host| self.could_serve(*host))
            .map(|host| self.hosts[host].id.clone())
            .collect();
        if serving.len() != self.group.desired as usize {
            let (count, desired) = (serving.len(), self.group.desired);
            self.check
                .fail(format!("in the end {count} of {desired} serve"));
        }
        if self.scenario.dns && serving != self.zone.served {
            let served = self.zone.served.clone();
            self.check.fail(format!(
                "in the end {serving:?} serve, and the name has {served:?}"
            ));
        }
        if self.scenario.load_balancer && !self.group.attached {
            for id in serving {
                if self.targets.is(&id, self.now, true) != Some(TargetState::Healthy) {
                    self.check.fail(format!("in the end {id} is no target"));
                }
            }
        }
    }
}
