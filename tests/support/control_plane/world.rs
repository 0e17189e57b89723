//! All that there is in the account, and how it goes on by itself.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use super::elb::TargetGroup;
use super::group::{Group, Phase};
use super::route53::Zone;

/// How long EC2 takes to see that a host is dead.
const STATUS_CHECK: Duration = Duration::from_secs(150);

/// What EC2 does to hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deed {
    /// An instance was launched: whoever plays EC2 boots a host, whose metadata service is there.
    Launched {
        id: String,
        address: IpAddr,
        zone: String,
        metadata: SocketAddr,
    },
    /// An instance is terminated: its host is killed.
    Terminated { id: String },
}

/// A virtual machine.
#[derive(Debug, Clone)]
pub struct Instance {
    pub id: String,
    pub address: IpAddr,
    pub zone: String,
    pub launched: Duration,
    pub running: bool,
    /// When EC2 takes it back.
    pub spot: Option<Duration>,
    /// When EC2 said that it may.
    pub rebalance: Option<Duration>,
    /// When its host died by itself.
    pub died: Option<Duration>,
    /// The group that it left alive.
    pub detached: bool,
    pub tags: BTreeMap<String, String>,
}

/// Everything but the groups.
#[derive(Debug, Clone)]
pub struct Rest {
    /// Since the clock's zero.
    pub now: Duration,
    pub origin: SystemTime,
    pub instances: BTreeMap<String, Instance>,
    pub targets: BTreeMap<String, TargetGroup>,
    pub zones: BTreeMap<String, Zone>,
    /// What was done to hosts, and nobody was told yet.
    pub deeds: Vec<Deed>,
    /// How long Route 53 takes until all its servers know a change.
    pub propagation: Duration,
    numbers: u64,
    pub(super) addresses: fn(u32) -> IpAddr,
}

impl Rest {
    /// An id that was never given before.
    pub fn uuid(&mut self) -> String {
        self.numbers += 1;
        format!("{:08x}-0000-4000-8000-{:012x}", self.numbers, self.numbers)
    }

    pub fn launch(&mut self, zone: String, group: &str) -> String {
        let number = u32::try_from(self.instances.len()).unwrap() + 1;
        let id = format!("i-{number:017x}");
        let tags = [("aws:autoscaling:groupName".to_owned(), group.to_owned())];
        let instance = Instance {
            id: id.clone(),
            address: (self.addresses)(number),
            zone: zone.clone(),
            launched: self.now,
            running: true,
            spot: None,
            rebalance: None,
            died: None,
            detached: false,
            tags: tags.into_iter().filter(|_| !group.is_empty()).collect(),
        };
        self.deeds.push(Deed::Launched {
            id: id.clone(),
            address: instance.address,
            zone,
            // Known when its metadata service was started.
            metadata: SocketAddr::new(instance.address, 0),
        });
        self.instances.insert(id.clone(), instance);
        id
    }

    /// The end of a virtual machine. The load balancer hears of it by itself.
    pub fn end_instance(&mut self, id: &str) {
        let now = self.now;
        if let Some(instance) = self.instances.get_mut(id).filter(|it| it.running) {
            instance.running = false;
            self.deeds.push(Deed::Terminated { id: id.to_owned() });
        }
        for targets in self.targets.values_mut() {
            targets.deregister(id, None, now);
        }
    }
}

/// The account.
#[derive(Debug, Clone)]
pub struct World {
    pub groups: BTreeMap<String, Group>,
    pub rest: Rest,
}

impl World {
    pub fn new(origin: SystemTime, addresses: fn(u32) -> IpAddr) -> Self {
        Self {
            groups: BTreeMap::new(),
            rest: Rest {
                now: Duration::ZERO,
                origin,
                instances: BTreeMap::new(),
                targets: BTreeMap::new(),
                zones: BTreeMap::new(),
                deeds: Vec::new(),
                propagation: Duration::from_secs(30),
                numbers: 0,
                addresses,
            },
        }
    }

    /// Goes on to this moment, through everything that happens on the way, in its order.
    pub fn settle(&mut self, until: Duration, mut changed: impl FnMut(&Self)) {
        loop {
            if self.act() {
                changed(self);
            }
            match self.next() {
                Some(next) if next <= until => self.rest.now = next,
                _ => break,
            }
        }
        self.rest.now = self.rest.now.max(until);
    }

    /// Everything that happens at this moment.
    fn act(&mut self) -> bool {
        let mut changed = false;
        while self.step() {
            changed = true;
        }
        changed
    }

    fn step(&mut self) -> bool {
        let now = self.rest.now;
        for targets in self.rest.targets.values_mut() {
            if targets.step(now) {
                return true;
            }
        }
        for group in self.groups.values_mut() {
            if group.step(&mut self.rest) {
                return true;
            }
        }
        self.take_back() || self.check_hosts()
    }

    /// When something happens next, after this moment.
    fn next(&self) -> Option<Duration> {
        let now = self.rest.now;
        let groups = self.groups.values().filter_map(|it| it.next_after(now));
        let targets = self
            .rest
            .targets
            .values()
            .filter_map(|it| it.next_after(now));
        let hosts = self.rest.instances.values().filter(|it| it.running);
        let hosts = hosts.flat_map(|it| [it.spot, it.died.map(|died| died + STATUS_CHECK)]);
        let hosts = hosts.flatten().filter(|at| *at > now);
        groups.chain(targets).chain(hosts).min()
    }

    /// Spot instances whose time has come. No hook holds them.
    fn take_back(&mut self) -> bool {
        let now = self.rest.now;
        let mut instances = self.rest.instances.values();
        let due = instances.find(|it| it.running && it.spot.is_some_and(|at| at <= now));
        let Some(id) = due.map(|it| it.id.clone()) else {
            return false;
        };
        self.terminate_by_hand(&id);
        true
    }

    /// EC2's status checks, which the group looks at.
    fn check_hosts(&mut self) -> bool {
        let now = self.rest.now;
        for group in self.groups.values_mut() {
            for (id, member) in &mut group.members {
                let died = self.rest.instances.get(id).and_then(|it| it.died);
                let seen = died.is_some_and(|died| now >= died + STATUS_CHECK);
                let graced = member
                    .in_service
                    .is_none_or(|since| now < since + group.grace);
                if seen && member.healthy && (member.phase == Phase::InService && !graced) {
                    member.healthy = false;
                    return true;
                }
            }
        }
        false
    }

    /// Somebody terminates an instance in EC2: no hook holds it, and the group replaces it.
    pub fn terminate_by_hand(&mut self, id: &str) {
        for group in self.groups.values_mut() {
            group.members.remove(id);
        }
        self.rest.end_instance(id);
    }

    /// What the metadata service says of an instance's lifecycle.
    pub fn target_state(&self, id: &str) -> Option<&'static str> {
        let member = self.groups.values().find_map(|group| group.members.get(id));
        match member.map(|member| member.phase) {
            None => {
                let detached = self.rest.instances.get(id).is_some_and(|it| it.detached);
                detached.then_some("Detached")
            }
            Some(Phase::EnteringStandby | Phase::Standby) => Some("Standby"),
            Some(Phase::Detaching) => Some("Detached"),
            Some(phase) if phase.is_terminating() => Some("Terminated"),
            Some(_) => Some("InService"),
        }
    }
}
