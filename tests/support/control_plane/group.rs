//! An autoscaling group: it launches, holds, replaces and terminates, as its user guide says.

use std::collections::BTreeMap;
use std::time::Duration;

use super::elb::TargetGroup;
use super::world::Rest;

mod grow;

/// The longest that a hook holds an instance, whatever heartbeats it gets.
const LONGEST_HOLD: Duration = Duration::from_hours(48);

/// Where an instance is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Pending,
    PendingWait,
    PendingProceed,
    InService,
    EnteringStandby,
    Standby,
    Detaching,
    Terminating,
    TerminatingWait,
    TerminatingProceed,
    TerminatingRetained,
}

impl Phase {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::PendingWait => "Pending:Wait",
            Self::PendingProceed => "Pending:Proceed",
            Self::InService => "InService",
            Self::EnteringStandby => "EnteringStandby",
            Self::Standby => "Standby",
            Self::Detaching => "Detaching",
            Self::Terminating => "Terminating",
            Self::TerminatingWait => "Terminating:Wait",
            Self::TerminatingProceed => "Terminating:Proceed",
            Self::TerminatingRetained => "Terminating:Retained",
        }
    }

    pub fn is_pending(self) -> bool {
        matches!(
            self,
            Self::Pending | Self::PendingWait | Self::PendingProceed
        )
    }

    pub fn is_terminating(self) -> bool {
        matches!(
            self,
            Self::Terminating
                | Self::TerminatingWait
                | Self::TerminatingProceed
                | Self::TerminatingRetained
        )
    }
}

/// Which instances a hook holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    Launching,
    Terminating,
}

impl Transition {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Launching => "autoscaling:EC2_INSTANCE_LAUNCHING",
            Self::Terminating => "autoscaling:EC2_INSTANCE_TERMINATING",
        }
    }
}

/// A lifecycle hook.
#[derive(Debug, Clone)]
pub struct Hook {
    pub name: String,
    pub transition: Transition,
    /// How long it holds an instance without a heartbeat.
    pub timeout: Duration,
    /// Whether its time that runs out means `CONTINUE`; else `ABANDON`.
    pub continues: bool,
}

impl Hook {
    /// How long it holds an instance in all.
    pub fn global_timeout(&self) -> Duration {
        (self.timeout * 100).min(LONGEST_HOLD)
    }
}

/// A hook that holds an instance.
#[derive(Debug, Clone)]
pub struct Hold {
    pub hook: String,
    pub token: String,
    /// When it lets go by itself, and when it does whatever is said.
    pub until: Duration,
    pub last: Duration,
}

/// An instance of the group.
#[derive(Debug, Clone)]
pub struct Member {
    pub phase: Phase,
    /// Since when it is there.
    pub since: Duration,
    pub healthy: bool,
    pub in_service: Option<Duration>,
    pub protected: bool,
    pub holds: Vec<Hold>,
    pub zone: String,
    /// The activity that goes on with it.
    activity: usize,
}

/// Something that the group does, as its history shows it.
#[derive(Debug, Clone)]
pub struct Activity {
    pub id: String,
    pub description: String,
    pub cause: String,
    pub status: &'static str,
    pub message: Option<String>,
    pub began: Duration,
    pub ended: Option<Duration>,
}

/// A rolling replacement of all instances.
#[derive(Debug, Clone)]
pub struct Refresh {
    pub id: String,
    pub status: &'static str,
    pub began: Duration,
    pub ended: Option<Duration>,
    /// The instances that were there, and those of them that are still to go.
    pub old: Vec<String>,
    pub queue: Vec<String>,
    /// Of the desired capacity, in percent.
    pub min_healthy: u64,
    /// One more is launched before one goes.
    pub launches_first: bool,
    /// How long after `InService` the next one waits.
    pub warmup: Duration,
}

/// The group.
#[derive(Debug, Clone)]
pub struct Group {
    pub name: String,
    pub min: u32,
    pub desired: u32,
    pub max: u32,
    pub hooks: Vec<Hook>,
    pub members: BTreeMap<String, Member>,
    /// `InstanceMaintenancePolicy`: at least and at most so many percent healthy while it replaces.
    pub maintenance: Option<(u32, u32)>,
    /// The ARNs of target groups that it registers its instances in.
    pub target_groups: Vec<String>,
    /// So long after `InService` calls that respect it can't make an instance unhealthy.
    pub grace: Duration,
    pub zones: Vec<String>,
    pub tags: BTreeMap<String, String>,
    /// `InstanceLifecyclePolicy`: an abandoned termination leaves the instance there.
    pub retains_abandoned: bool,
    /// How long EC2 takes to start an instance.
    pub launch_takes: Duration,
    /// `Launch` and `Terminate` are suspended: it does nothing by itself.
    pub suspended: bool,
    pub activities: Vec<Activity>,
    pub refreshes: Vec<Refresh>,
    pub created: Duration,
}

impl Group {
    pub fn new(name: &str, min: u32, desired: u32, max: u32) -> Self {
        Self {
            name: name.to_owned(),
            min,
            desired,
            max,
            hooks: Vec::new(),
            members: BTreeMap::new(),
            maintenance: None,
            target_groups: Vec::new(),
            grace: Duration::ZERO,
            zones: vec!["us-east-1a".to_owned(), "us-east-1b".to_owned()],
            tags: BTreeMap::new(),
            retains_abandoned: false,
            launch_takes: Duration::ZERO,
            suspended: false,
            activities: Vec::new(),
            refreshes: Vec::new(),
            created: Duration::ZERO,
        }
    }

    /// With a hook, whose time that runs out means `ABANDON`.
    #[must_use]
    pub fn hook(mut self, name: &str, transition: Transition, timeout: Duration) -> Self {
        self.hooks.push(Hook {
            name: name.to_owned(),
            transition,
            timeout,
            continues: false,
        });
        self
    }

    /// Whether a replacement comes before what it replaces goes.
    pub fn launches_first(&self) -> bool {
        matches!(self.maintenance, Some((100.., 101..)))
    }

    pub fn arn(&self) -> String {
        format!(
            "arn:aws:autoscaling:us-east-1:123456789012:autoScalingGroup:\
             00000000-0000-4000-8000-000000000000:autoScalingGroupName/{}",
            self.name
        )
    }

    /// One step of its life at this moment. Whether anything changed.
    pub fn step(&mut self, rest: &mut Rest) -> bool {
        self.move_members(rest)
            || (!self.suspended && (self.replace(rest) || self.refresh(rest) || self.resize(rest)))
    }

    /// When something happens by itself after this moment.
    pub fn next_after(&self, now: Duration) -> Option<Duration> {
        let mut due: Vec<Duration> = Vec::new();
        for member in self.members.values() {
            due.extend(member.holds.iter().map(|hold| hold.until));
            if member.phase == Phase::Pending {
                due.push(member.since + self.launch_takes);
            }
            if let Some(since) = member.in_service {
                due.push(since + self.grace);
                due.extend(self.refreshes.last().map(|refresh| since + refresh.warmup));
            }
        }
        due.into_iter().filter(|at| *at > now).min()
    }

    fn enter(&mut self, id: &str, phase: Phase, now: Duration) {
        if let Some(member) = self.members.get_mut(id) {
            (member.phase, member.since) = (phase, now);
            member.holds.clear();
        }
    }

    /// Puts an instance there, or takes it away, with its entry in the history.
    pub fn begin(&mut self, id: &str, phase: Phase, what: &str, cause: &str, rest: &mut Rest) {
        let activity = Activity {
            id: rest.uuid(),
            description: format!("{what}: {id}"),
            cause: cause.to_owned(),
            status: "InProgress",
            message: None,
            began: rest.now,
            ended: None,
        };
        self.activities.push(activity);
        let activity = self.activities.len() - 1;
        let zone = rest.instances.get(id).map(|it| it.zone.clone());
        let member = self.members.entry(id.to_owned()).or_insert_with(|| Member {
            phase,
            since: rest.now,
            healthy: true,
            in_service: None,
            protected: false,
            holds: Vec::new(),
            zone: zone.unwrap_or_default(),
            activity,
        });
        member.activity = activity;
        self.enter(id, phase, rest.now);
    }

    fn end(&mut self, id: &str, status: &'static str, message: Option<String>, now: Duration) {
        if let Some(activity) = self.activity(id) {
            (activity.status, activity.message, activity.ended) = (status, message, Some(now));
        }
    }

    fn activity(&mut self, id: &str) -> Option<&mut Activity> {
        let activity = self.members.get(id)?.activity;
        self.activities.get_mut(activity)
    }

    /// The last entry of the history that is about this instance.
    pub fn last_activity(&self, id: &str) -> Option<&Activity> {
        self.activities.get(self.members.get(id)?.activity)
    }

    pub fn launch(&mut self, cause: &str, rest: &mut Rest) -> String {
        // The zone with the fewest, as the group balances them.
        let count = |zone: &String| self.members.values().filter(|it| &it.zone == zone).count();
        let zone = self.zones.iter().min_by_key(|zone| count(zone)).cloned();
        let id = rest.launch(zone.unwrap_or_default(), &self.name);
        self.begin(
            &id,
            Phase::Pending,
            "Launching a new EC2 instance",
            cause,
            rest,
        );
        id
    }

    /// Begins to terminate one: it leaves its target groups first.
    pub fn terminate(&mut self, id: &str, cause: &str, rest: &mut Rest) {
        self.leave_target_groups(id, rest);
        self.begin(
            id,
            Phase::Terminating,
            "Terminating EC2 instance",
            cause,
            rest,
        );
        if let Some(activity) = self.activity(id) {
            activity.status = "WaitingForELBConnectionDraining";
        }
    }

    /// Out of the target groups that the group itself looks after.
    pub fn leave_target_groups(&self, id: &str, rest: &mut Rest) {
        for arn in &self.target_groups {
            if let Some(targets) = rest.targets.get_mut(arn) {
                targets.deregister(id, None, rest.now);
            }
        }
    }

    fn drains(&self, id: &str, rest: &Rest) -> bool {
        let mut attached = self
            .target_groups
            .iter()
            .filter_map(|arn| rest.targets.get(arn));
        attached.any(|targets: &TargetGroup| targets.has(id))
    }

    /// Holds it by all hooks of the transition at once. Whether there are any.
    fn hold(&mut self, id: &str, transition: Transition, rest: &mut Rest) -> bool {
        let now = rest.now;
        let hooks = self
            .hooks
            .iter()
            .filter(|hook| hook.transition == transition);
        let holds: Vec<Hold> = hooks
            .map(|hook| Hold {
                hook: hook.name.clone(),
                token: rest.uuid(),
                until: now + hook.timeout,
                last: now + hook.global_timeout(),
            })
            .collect();
        let held = !holds.is_empty();
        let (wait, proceed) = match transition {
            Transition::Launching => (Phase::PendingWait, Phase::PendingProceed),
            Transition::Terminating => (Phase::TerminatingWait, Phase::TerminatingProceed),
        };
        self.enter(id, if held { wait } else { proceed }, now);
        if let Some(activity) = self.activity(id) {
            activity.status = if held {
                "MidLifecycleAction"
            } else {
                "InProgress"
            };
        }
        if let Some(member) = self.members.get_mut(id) {
            member.holds = holds;
        }
        held
    }

    /// A hook lets go of an instance: `CONTINUE` waits for the other hooks, `ABANDON` does not.
    pub fn let_go(&mut self, id: &str, hook: &str, continues: bool, why: &str, rest: &mut Rest) {
        let now = rest.now;
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        let Some(at) = member.holds.iter().position(|hold| hold.hook == hook) else {
            return;
        };
        let hold = member.holds.remove(at);
        let (phase, done) = (member.phase, member.holds.is_empty());
        match (phase, continues) {
            (Phase::PendingWait, true) if done => self.enter(id, Phase::PendingProceed, now),
            (Phase::PendingWait, false) => {
                let message = format!(
                    "Instance failed to complete user's Lifecycle Action: Lifecycle Action with \
                     token {} was abandoned: {why}",
                    hold.token
                );
                self.end(id, "Cancelled", Some(message), now);
                self.begin(
                    id,
                    Phase::TerminatingProceed,
                    "Terminating EC2 instance",
                    "an instance was abandoned",
                    rest,
                );
            }
            (Phase::TerminatingWait, false) if self.retains_abandoned => {
                self.enter(id, Phase::TerminatingRetained, now);
            }
            (Phase::TerminatingWait, continues) if done || !continues => {
                self.enter(id, Phase::TerminatingProceed, now);
            }
            _ => {}
        }
    }

    fn move_members(&mut self, rest: &mut Rest) -> bool {
        let now = rest.now;
        for id in self.members.keys().cloned().collect::<Vec<_>>() {
            let member = &self.members[&id];
            let overdue = member.holds.iter().find(|hold| hold.until <= now);
            if let Some(hook) = overdue.map(|hold| hold.hook.clone()) {
                let continues = self.hooks.iter().any(|it| it.name == hook && it.continues);
                self.let_go(&id, &hook, continues, "Heartbeat Timeout", rest);
                return true;
            }
            match member.phase {
                Phase::Pending if now >= member.since + self.launch_takes => {
                    self.hold(&id, Transition::Launching, rest);
                }
                Phase::PendingProceed => {
                    self.enter(&id, Phase::InService, now);
                    self.end(&id, "Successful", None, now);
                    if let Some(member) = self.members.get_mut(&id) {
                        member.in_service = Some(now);
                    }
                    for arn in &self.target_groups {
                        if let Some(targets) = rest.targets.get_mut(arn) {
                            targets.register(&id, None, now);
                        }
                    }
                }
                Phase::EnteringStandby if !self.drains(&id, rest) => {
                    self.enter(&id, Phase::Standby, now);
                    self.end(&id, "Successful", None, now);
                }
                Phase::Detaching if !self.drains(&id, rest) => {
                    self.end(&id, "Successful", None, now);
                    self.members.remove(&id);
                }
                Phase::Terminating if !self.drains(&id, rest) => {
                    self.hold(&id, Transition::Terminating, rest);
                }
                Phase::TerminatingProceed => {
                    self.end(&id, "Successful", None, now);
                    self.members.remove(&id);
                    rest.end_instance(&id);
                }
                _ => continue,
            }
            return true;
        }
        false
    }
}
