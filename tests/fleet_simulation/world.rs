//! The world: its clock, its hosts, and what happens to them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use registry_agent::config::FleetSettings;
use registry_agent::fleet::facts::{InstanceId, LifecycleState, Metadata};
use registry_agent::fleet::memory::Kept;

use super::agent::Agent;
use super::check::{Api, Apis, Check};
use super::group::{Deed, GRACE, GroupModel, Row};
use super::scenario::{Fault, Scenario};
use super::zone::{Change, Targets, Zone};

/// How often the group does something.
const TICK: Duration = Duration::from_secs(5);

pub struct World {
    pub scenario: Scenario,
    pub settings: FleetSettings,
    pub now: Duration,
    pub random: fastrand::Rng,
    pub hosts: Vec<Host>,
    pub index: BTreeMap<InstanceId, usize>,
    pub group: GroupModel,
    pub zone: Zone,
    pub targets: Targets,
    pub api: Apis,
    pub check: Check,
    /// Prints what happens.
    pub tells: bool,
    queue: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    events: u64,
    /// Until when each is broken for everybody.
    pub api_outage: Duration,
    pub metadata_outage: Duration,
    pub upstream_outage: Duration,
    bad_image: Duration,
}

/// One host.
pub struct Host {
    pub id: InstanceId,
    pub up: bool,
    /// When it came up: its clock counts from here.
    pub booted: Duration,
    pub agent: Option<Agent>,
    /// What is on its disk.
    pub disk: Kept,
    /// Its disk is broken, or its image.
    pub broken: bool,
    pub unready_until: Duration,
    pub cut_off_until: Duration,
    pub frozen_until: Duration,
    /// When it died hard, if it did.
    pub died: Option<Duration>,
    /// When EC2 takes it back.
    pub spot: Option<Duration>,
    /// By when its service has to have stopped.
    pub stop: Option<Duration>,
    pub warm_at: Duration,
    pub zone: u8,
    /// How far its wall clock is ahead, or behind.
    pub skew: (Duration, Duration),
    /// What its metadata service would say.
    pub metadata: Metadata,
}

impl Host {
    /// It answers whoever asks whether it is ready.
    pub fn ready(&self, now: Duration) -> bool {
        self.answers(now) && !self.broken && now >= self.unready_until
    }

    /// Its process runs.
    pub fn answers(&self, now: Duration) -> bool {
        self.up && self.agent.is_some() && now >= self.frozen_until
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    Tick,
    Fault(usize),
    Start(usize),
    Crash(usize),
    /// The agent goes on, if nothing else has woken it since.
    Go(usize, u64),
    /// The host's metadata or its own health has changed.
    Notice(usize),
    Serve(Change),
    Back(usize),
    StandbyEnds(usize),
}

impl World {
    pub fn new(scenario: Scenario) -> Self {
        let mut world = Self {
            settings: scenario.settings(),
            group: GroupModel::new(&scenario),
            random: fastrand::Rng::with_seed(scenario.seed ^ 0x5eed),
            now: Duration::ZERO,
            hosts: Vec::new(),
            index: BTreeMap::new(),
            zone: Zone::default(),
            targets: Targets::default(),
            api: Apis::default(),
            check: Check::default(),
            tells: false,
            queue: BinaryHeap::new(),
            events: 0,
            api_outage: Duration::ZERO,
            metadata_outage: Duration::ZERO,
            upstream_outage: Duration::ZERO,
            bad_image: Duration::ZERO,
            scenario,
        };
        for _ in 0..world.scenario.instances {
            let host = world.launch();
            let id = world.hosts[host].id.clone();
            world
                .group
                .enter(&id, LifecycleState::InService, Duration::ZERO);
            // EC2 itself starts no more than so many a second.
            let at = world.seconds(0.1, 5.0_f64.max(f64::from(world.scenario.instances) / 10.0));
            world.after(at, Event::Start(host));
        }
        for fault in 0..world.scenario.faults.len() {
            let at = world.scenario.faults[fault].0;
            world.after(at, Event::Fault(fault));
        }
        world.after(TICK, Event::Tick);
        world
    }

    pub fn run(&mut self) -> Result<(), String> {
        while let Some(Reverse((at, _, event))) = self.queue.pop() {
            if at > self.scenario.end {
                break;
            }
            self.now = at;
            self.happen(event);
            if let Some(broken) = self.check.broken.take() {
                return Err(format!("at {:.1} s: {broken}", at.as_secs_f64()));
            }
        }
        self.check_end();
        self.check.broken.take().map_or(Ok(()), Err)
    }

    pub fn after(&mut self, wait: Duration, event: Event) {
        self.events += 1;
        self.queue
            .push(Reverse((self.now + wait, self.events, event)));
    }

    pub fn seconds(&mut self, least: f64, most: f64) -> Duration {
        Duration::from_secs_f64(least + (most - least) * self.random.f64())
    }

    pub fn tell(&self, what: impl FnOnce() -> String) {
        if self.tells {
            println!("{:8.1} {}", self.now.as_secs_f64(), what());
        }
    }

    fn launch(&mut self) -> usize {
        let number = self.hosts.len();
        let id = InstanceId::new(format!("i-{number:05x}"));
        let warm = self.now + self.seconds(5.0, 90.0);
        let far = Duration::from_hours(3);
        let skew = match self.random.u32(0..10) {
            0 => (far, Duration::ZERO),
            1 => (Duration::ZERO, far),
            _ => (Duration::ZERO, Duration::ZERO),
        };
        self.hosts.push(Host {
            id: id.clone(),
            up: true,
            booted: self.now,
            agent: None,
            disk: Kept::default(),
            broken: self.now < self.bad_image,
            unready_until: self.now,
            cut_off_until: self.now,
            frozen_until: self.now,
            died: None,
            spot: None,
            stop: None,
            warm_at: warm,
            zone: u8::try_from(number % 3).unwrap(),
            skew,
            metadata: Metadata::default(),
        });
        self.index.insert(id.clone(), number);
        self.group
            .members
            .insert(id, Row::new(LifecycleState::Pending, self.now));
        self.group.changed = true;
        number
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick => self.tick(),
            Event::Fault(number) => {
                let fault = self.scenario.faults[number].1;
                self.tell(|| format!("*** {fault:?}"));
                self.check.totals.faults += 1;
                self.befall(fault);
            }
            Event::Start(host) => self.start(host),
            Event::Crash(host) => {
                self.hosts[host].agent = None;
                self.metadata_outage = self.now + Duration::from_mins(2);
            }
            Event::Go(host, turn) => self.go(host, turn),
            Event::Notice(host) => self.notice(host),
            Event::Serve(change) => {
                self.zone.serve(&change);
                self.tell(|| format!("served {change:?}: {:?}", self.zone.served));
                self.check_name(&change);
            }
            Event::Back(host) => {
                self.hosts[host].agent = None;
                self.start(host);
            }
            Event::StandbyEnds(host) => {
                let id = self.hosts[host].id.clone();
                if self
                    .group
                    .members
                    .get(&id)
                    .is_some_and(|row| row.state == LifecycleState::Standby)
                {
                    self.group.enter(&id, LifecycleState::InService, self.now);
                    self.group.desired += 1;
                    self.tell_metadata(host);
                }
            }
        }
    }

    fn tick(&mut self) {
        // Looking at thousands takes time, and nothing happens to them.
        let large = self.hosts.len() > 1_000;
        self.after(if large { TICK * 12 } else { TICK }, Event::Tick);
        for deed in self.group.tick(self.now) {
            self.tell(|| format!("the group: {deed:?}"));
            match deed {
                Deed::Launch => {
                    let host = self.launch();
                    let boot = self.seconds(20.0, 60.0);
                    self.after(boot, Event::Start(host));
                }
                Deed::Kill(id) => {
                    let host = self.index[&id];
                    self.kill(host);
                    // The service looks after targets of type instance itself.
                    self.targets.deregister(&id, self.now);
                }
                Deed::Tell(id) => {
                    let host = self.index[&id];
                    if self.group.attached {
                        self.targets.deregister(&id, self.now);
                    }
                    self.tell_metadata(host);
                }
                Deed::TimedOut(id, transition) => {
                    let host = self.index[&id];
                    self.check_timed_out(host, transition);
                }
            }
        }
        self.status_checks();
        self.check_tick();
    }

    /// EC2's own checks, which find hosts that are dead.
    fn status_checks(&mut self) {
        for host in 0..self.hosts.len() {
            let one = &self.hosts[host];
            let noticed = one
                .died
                .is_some_and(|died| self.now > died + Duration::from_secs(150));
            let Some(row) = self.group.members.get_mut(&one.id) else {
                continue;
            };
            let old = self.now > row.since + GRACE || row.in_service.is_some();
            if noticed && row.healthy && old {
                row.healthy = false;
                self.group.changed = true;
            }
            if self.hosts[host].spot.is_some_and(|at| self.now >= at) && self.hosts[host].up {
                let id = self.hosts[host].id.clone();
                self.check_taken(host);
                self.kill(host);
                self.group.members.remove(&id);
                self.group.changed = true;
            }
        }
    }

    fn kill(&mut self, host: usize) {
        self.hosts[host].up = false;
        self.hosts[host].agent = None;
    }

    fn start(&mut self, host: usize) {
        let now = self.now;
        let seed = self.random.u64(..);
        let one = &mut self.hosts[host];
        if one.up && one.agent.is_none() && now >= one.booted {
            one.agent = Some(Agent::new(one.disk.clone(), seed));
            self.wake(host, now);
        }
    }

    /// What the metadata service knows now; the agent hears of it within its next polls.
    fn tell_metadata(&mut self, host: usize) {
        let now = self.now;
        let one = &mut self.hosts[host];
        let state = self.group.members.get(&one.id).map(|row| row.state.clone());
        one.metadata.target_state = state.map(|state| match state {
            state if state.is_terminating() => LifecycleState::Terminated,
            state if state.is_pending() => LifecycleState::InService,
            state => state,
        });
        let wait = self.metadata_outage.saturating_sub(now) + self.seconds(0.1, 5.0);
        self.after(wait, Event::Notice(host));
    }

    fn notice(&mut self, host: usize) {
        let now = self.now;
        let one = &mut self.hosts[host];
        if let Some(agent) = &mut one.agent {
            agent.metadata = one.metadata.clone();
            self.wake(host, now);
        }
    }

    fn any(&mut self, is: impl Fn(&Self, &Host) -> bool) -> Option<usize> {
        let fitting: Vec<usize> = (0..self.hosts.len())
            .filter(|host| is(self, &self.hosts[*host]))
            .collect();
        if fitting.is_empty() {
            return None;
        }
        Some(fitting[self.random.usize(..fitting.len())])
    }

    fn befall(&mut self, fault: Fault) {
        let now = self.now;
        self.check.disturbed(now, fault);
        let serves = |world: &Self, host: &Host| {
            host.up
                && world
                    .group
                    .members
                    .get(&host.id)
                    .is_some_and(|row| row.state == LifecycleState::InService)
        };
        let up = |_: &Self, host: &Host| host.up;
        let one = match fault {
            Fault::Standby(_) | Fault::Stop | Fault::Spot => self.any(serves),
            _ => self.any(up),
        };
        match (fault, one) {
            (Fault::ApiOutage(lasts), _) => self.api_outage = now + lasts,
            (Fault::Throttle(lasts), _) => self.api.throttled_until = now + lasts,
            (Fault::MetadataOutage(lasts), _) => self.metadata_outage = now + lasts,
            (Fault::UpstreamOutage(lasts), _) => self.upstream_outage = now + lasts,
            (Fault::BadImage(lasts), _) => self.bad_image = now + lasts,
            (Fault::AllUnready(lasts), _) => {
                for host in 0..self.hosts.len() {
                    self.hosts[host].unready_until = now + lasts;
                    self.health_changes(host, lasts);
                }
            }
            (Fault::FatalEverywhere, _) => {
                for host in 0..self.hosts.len() {
                    self.hosts[host].broken = true;
                    self.health_changes(host, Duration::ZERO);
                }
            }
            (Fault::ZoneLoss, _) => {
                for host in 0..self.hosts.len() {
                    if self.hosts[host].zone == 0 && self.hosts[host].up {
                        self.die(host);
                    }
                }
            }
            (Fault::Scale, _) => {
                self.group.desired = self.random.u32(1..=self.group.max);
                // What n is to be goes with it, by whoever scales.
                self.settings.instances = Some(self.group.desired);
            }
            (Fault::Refresh, _) => {
                self.group.refresh = self.group.members.keys().cloned().collect();
            }
            (_, None) => {}
            (Fault::CrashAgent, Some(host)) => {
                self.hosts[host].agent = None;
                let wait = self.seconds(1.0, 20.0);
                self.after(wait, Event::Start(host));
                self.after(wait + Duration::from_millis(1), Event::Notice(host));
            }
            (Fault::Reboot, Some(host)) => {
                self.hosts[host].agent = None;
                let wait = self.seconds(20.0, 60.0);
                self.hosts[host].booted = now + wait;
                self.after(wait, Event::Start(host));
                self.after(wait + Duration::from_millis(1), Event::Notice(host));
            }
            (Fault::KillHost, Some(host)) => self.die(host),
            (Fault::Freeze(lasts), Some(host)) => self.hosts[host].frozen_until = now + lasts,
            (Fault::Partition(lasts), Some(host)) => self.hosts[host].cut_off_until = now + lasts,
            (Fault::Unready(lasts), Some(host)) => {
                self.hosts[host].unready_until = now + lasts;
                self.health_changes(host, lasts);
            }
            (Fault::FatalTwice, _) => {
                for _ in 0..2 {
                    if let Some(host) = self.any(|_, host| host.up && !host.broken) {
                        self.hosts[host].broken = true;
                        self.health_changes(host, Duration::ZERO);
                    }
                }
            }
            (Fault::Fatal, Some(host)) => {
                self.hosts[host].broken = true;
                self.health_changes(host, Duration::ZERO);
            }
            (Fault::Spot, Some(host)) => {
                self.hosts[host].spot = Some(now + Duration::from_mins(2));
                self.after(Duration::from_secs(3), Event::Notice(host));
                // Its agent is started again, and the metadata service does not answer the new one.
                if self.random.bool() {
                    self.after(Duration::from_secs(20), Event::Crash(host));
                    self.after(Duration::from_secs(25), Event::Start(host));
                }
            }
            (Fault::Standby(lasts), Some(host)) => {
                let id = self.hosts[host].id.clone();
                self.group.enter(&id, LifecycleState::Standby, now);
                self.group.desired = self.group.desired.saturating_sub(1);
                if self.group.attached {
                    self.targets.deregister(&id, now);
                }
                self.tell_metadata(host);
                self.after(lasts, Event::StandbyEnds(host));
            }
            (Fault::Stop, Some(host)) => {
                self.hosts[host].stop = Some(now + Duration::from_secs(150));
                self.after(Duration::ZERO, Event::Notice(host));
            }
        }
    }

    fn health_changes(&mut self, host: usize, lasts: Duration) {
        self.after(Duration::from_millis(1), Event::Notice(host));
        self.after(lasts + Duration::from_millis(2), Event::Notice(host));
    }

    fn die(&mut self, host: usize) {
        self.kill(host);
        self.hosts[host].died = Some(self.now);
        self.tell(|| format!("{} dies", self.hosts[host].id));
    }

    /// Whether a call of this host arrives.
    pub fn call(&mut self, host: usize, api: Api) -> bool {
        self.api.count(api, self.now, host);
        let reaches = self.now >= self.api_outage && self.now >= self.hosts[host].cut_off_until;
        let lost = self.scenario.lost > 0 && self.random.u32(0..100) < self.scenario.lost;
        reaches && self.api.allows(api, self.now) && !lost
    }

    /// The change is answered by all servers after a while.
    pub fn propagate(&mut self, id: &InstanceId, change: Change) {
        let delay = self.now + self.seconds(1.0, 60.0);
        let at = self
            .zone
            .synced
            .get(id)
            .copied()
            .unwrap_or_default()
            .max(delay);
        self.zone.synced.insert(id.clone(), at);
        self.after(at - self.now, Event::Serve(change));
    }
}
