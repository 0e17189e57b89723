//! Elastic Load Balancing: target groups, whose targets are checked, get requests, and drain.

use std::collections::BTreeMap;
use std::time::Duration;

use super::wire::{ApiError, Params};
use super::world::World;
use super::xml::{leaf, leaf_of, members, node};

/// What its health checks have found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Initial,
    Healthy,
    Unhealthy,
}

/// A registered target.
#[derive(Debug, Clone)]
pub struct Target {
    pub status: Status,
    /// Since when `status` holds.
    pub entered: Duration,
    /// Whether checks pass, and since when they do or do not.
    pub passes: bool,
    pub since: Duration,
    /// Since when it is deregistered.
    pub draining: Option<Duration>,
}

/// A target group.
#[derive(Debug, Clone)]
pub struct TargetGroup {
    pub name: String,
    pub port: u16,
    pub protocol: &'static str,
    /// Targets are instances; else addresses.
    pub of_instances: bool,
    /// A listener of a load balancer uses it: else nobody checks its targets.
    pub in_use: bool,
    /// The deregistration delay.
    pub delay: Duration,
    /// How long checks have to pass, or to fail, until the target is what they say.
    pub healthy_after: Duration,
    pub unhealthy_after: Duration,
    /// How long an unhealthy target's connections go on (`unhealthy.draining`).
    pub unhealthy_drains: Duration,
    pub targets: BTreeMap<(String, u16), Target>,
    /// Where requests of health checks go; without it, a test says how they end.
    pub check_path: Option<String>,
}

impl TargetGroup {
    pub fn new(name: &str, port: u16) -> Self {
        Self {
            name: name.to_owned(),
            port,
            protocol: "TCP",
            of_instances: true,
            in_use: true,
            delay: Duration::from_mins(5),
            healthy_after: Duration::from_secs(30),
            unhealthy_after: Duration::from_secs(20),
            unhealthy_drains: Duration::ZERO,
            targets: BTreeMap::new(),
            check_path: None,
        }
    }

    pub fn arn(&self) -> String {
        format!(
            "arn:aws:elasticloadbalancing:us-east-1:123456789012:targetgroup/{}/0123456789abcdef",
            self.name
        )
    }

    /// One that drains is checked anew, one that is registered stays as it is.
    pub fn register(&mut self, id: &str, port: Option<u16>, now: Duration) {
        let key = (id.to_owned(), port.unwrap_or(self.port));
        if self
            .targets
            .get(&key)
            .is_some_and(|it| it.draining.is_none())
        {
            return;
        }
        let target = Target {
            status: Status::Initial,
            entered: now,
            passes: self.check_path.is_none(),
            since: now,
            draining: None,
        };
        self.targets.insert(key, target);
    }

    /// One that nobody uses goes at once: nothing has to drain.
    pub fn deregister(&mut self, id: &str, port: Option<u16>, now: Duration) {
        for ((target, at), state) in &mut self.targets {
            if target == id && port.is_none_or(|port| port == *at) {
                state.draining.get_or_insert(now);
            }
        }
        self.step(now);
    }

    /// Whether it is registered, or drains yet.
    pub fn has(&self, id: &str) -> bool {
        self.targets.keys().any(|(target, _)| target == id)
    }

    /// How checks of this target end from now on.
    pub fn says(&mut self, key: &(String, u16), passes: bool, now: Duration) {
        if let Some(target) = self.targets.get_mut(key).filter(|it| it.passes != passes) {
            (target.passes, target.since) = (passes, now);
        }
    }

    /// The same for all ports of an instance or address.
    pub fn says_all(&mut self, id: &str, passes: bool, now: Duration) {
        let keys = self.targets.keys().filter(|(target, _)| target == id);
        for key in keys.cloned().collect::<Vec<_>>() {
            self.says(&key, passes, now);
        }
    }

    fn due(&self, target: &Target) -> Option<(Duration, Status)> {
        match (target.status, target.passes) {
            (Status::Initial | Status::Unhealthy, true) => {
                Some((target.since + self.healthy_after, Status::Healthy))
            }
            (Status::Initial | Status::Healthy, false) => {
                Some((target.since + self.unhealthy_after, Status::Unhealthy))
            }
            (Status::Healthy, true) | (Status::Unhealthy, false) => None,
        }
    }

    fn drained(&self, target: &Target) -> Option<Duration> {
        let delay = if self.in_use {
            self.delay
        } else {
            Duration::ZERO
        };
        target.draining.map(|since| since + delay)
    }

    /// What its checks and its time have changed. Whether anything did.
    pub fn step(&mut self, now: Duration) -> bool {
        let before = self.targets.len();
        let group = self.clone();
        self.targets
            .retain(|_, it| group.drained(it).is_none_or(|at| now < at));
        let mut changed = self.targets.len() != before;
        for target in self.targets.values_mut().filter(|_| group.in_use) {
            let due = group.due(target).filter(|(at, _)| *at <= now);
            if let Some((at, status)) = due {
                (target.status, target.entered) = (status, at);
                changed = true;
            }
        }
        changed
    }

    /// When something happens by itself after this moment.
    pub fn next_after(&self, now: Duration) -> Option<Duration> {
        let targets = self.targets.values();
        let due = targets.flat_map(|it| [self.drained(it), self.due(it).map(|(at, _)| at)]);
        due.flatten().filter(|at| *at > now).min()
    }

    /// State, reason and description, as `DescribeTargetHealth` says them.
    pub fn state(
        &self,
        key: &(String, u16),
        running: bool,
        now: Duration,
    ) -> (&'static str, Option<[&'static str; 2]>) {
        let Some(target) = self.targets.get(key) else {
            let what = [
                "Target.NotRegistered",
                "Target is not registered to the target group",
            ];
            return ("unused", Some(what));
        };
        if target.draining.is_some() {
            let what = [
                "Target.DeregistrationInProgress",
                "Target deregistration is in progress",
            ];
            return ("draining", Some(what));
        }
        if !self.in_use {
            let what = [
                "Target.NotInUse",
                "Target group is not configured to receive traffic from the load balancer",
            ];
            return ("unused", Some(what));
        }
        if !running {
            return (
                "unused",
                Some(["Target.InvalidState", "Target is in the stopped state"]),
            );
        }
        match target.status {
            Status::Healthy => ("healthy", None),
            Status::Initial => (
                "initial",
                Some([
                    "Elb.RegistrationInProgress",
                    "Target registration is in progress",
                ]),
            ),
            Status::Unhealthy => {
                let drains = now < target.entered + self.unhealthy_drains;
                let state = if drains {
                    "unhealthy.draining"
                } else {
                    "unhealthy"
                };
                (
                    state,
                    Some(["Target.FailedHealthChecks", "Health checks failed"]),
                )
            }
        }
    }

    fn describe(&self) -> String {
        let balancer = self.in_use.then(|| {
            "arn:aws:elasticloadbalancing:us-east-1:123456789012:loadbalancer/net/mirrors/0123456789abcdef".to_owned()
        });
        [
            leaf("TargetGroupArn", self.arn()),
            leaf("TargetGroupName", &self.name),
            leaf("Protocol", self.protocol),
            leaf("Port", self.port),
            leaf("VpcId", "vpc-00000000"),
            leaf(
                "HealthCheckProtocol",
                if self.check_path.is_some() {
                    "HTTP"
                } else {
                    "TCP"
                },
            ),
            leaf("HealthCheckPort", "traffic-port"),
            leaf("HealthCheckEnabled", true),
            leaf_of("HealthCheckPath", self.check_path.as_ref()),
            members("LoadBalancerArns", balancer),
            leaf(
                "TargetType",
                if self.of_instances { "instance" } else { "ip" },
            ),
        ]
        .concat()
    }
}

/// `Targets.member.N.Id` and `.Port`.
fn targets(params: &Params) -> Result<Vec<(String, Option<u16>)>, ApiError> {
    let mut found = Vec::new();
    while let Some(id) = params.get(&format!("Targets.member.{}.Id", found.len() + 1)) {
        let port = params.number(&format!("Targets.member.{}.Port", found.len() + 1))?;
        let port = port.map(u16::try_from).transpose();
        let port = port.map_err(|_| ApiError::validation("Port must be between 1 and 65535"))?;
        found.push((id.to_owned(), port));
    }
    Ok(found)
}

fn not_found() -> ApiError {
    ApiError::new(
        400,
        "TargetGroupNotFound",
        "One or more target groups not found",
    )
}

/// Answers a call with what goes into its result.
pub fn answer(world: &mut World, operation: &str, params: &Params) -> Result<String, ApiError> {
    match operation {
        "RegisterTargets" => register(world, params),
        "DeregisterTargets" => deregister(world, params),
        "DescribeTargetHealth" => describe_health(world, params),
        "DescribeTargetGroups" => describe_groups(world, params),
        _ => Err(ApiError::new(
            400,
            "InvalidAction",
            format!("The action {operation} is not valid for this web service."),
        )),
    }
}

fn register(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["TargetGroupArn", "Targets"])?;
    let (arn, wanted) = (params.need("TargetGroupArn")?, targets(params)?);
    let group = world.rest.targets.get_mut(arn).ok_or_else(not_found)?;
    if wanted.is_empty() {
        return Err(ApiError::validation(
            "At least one target must be specified",
        ));
    }
    for (id, _) in &wanted {
        let instance = world.rest.instances.get(id);
        if group.of_instances && instance.is_none() {
            return Err(ApiError::validation(format!(
                "Instance ID '{id}' is not valid"
            )));
        }
        if group.of_instances && instance.is_some_and(|it| !it.running) {
            let what = format!(
                "The following targets are not in a running state and cannot be registered: '{id}'"
            );
            return Err(ApiError::new(400, "InvalidTarget", what));
        }
        if !group.of_instances && id.parse::<std::net::IpAddr>().is_err() {
            let what = format!("The IP address '{id}' is not a valid IPv4 or IPv6 address");
            return Err(ApiError::validation(what));
        }
    }
    for (id, port) in wanted {
        group.register(&id, port, world.rest.now);
    }
    Ok(String::new())
}

fn deregister(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["TargetGroupArn", "Targets"])?;
    let (arn, wanted) = (params.need("TargetGroupArn")?, targets(params)?);
    let group = world.rest.targets.get_mut(arn).ok_or_else(not_found)?;
    for (id, port) in wanted {
        // Also of one that is not there: that is what was asked for.
        group.deregister(&id, port, world.rest.now);
    }
    Ok(String::new())
}

fn describe_health(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["TargetGroupArn", "Targets"])?;
    let (arn, wanted) = (params.need("TargetGroupArn")?, targets(params)?);
    let group = world.rest.targets.get(arn).ok_or_else(not_found)?;
    let keys: Vec<(String, u16)> = if wanted.is_empty() {
        group.targets.keys().cloned().collect()
    } else {
        let key = |(id, port): (String, Option<u16>)| (id, port.unwrap_or(group.port));
        wanted.into_iter().map(key).collect()
    };
    let describe = |key: &(String, u16)| {
        let instance = world.rest.instances.get(&key.0);
        let running = !group.of_instances || instance.is_some_and(|it| it.running);
        let (state, why) = group.state(key, running, world.rest.now);
        let why = why.map(|[reason, text]| leaf("Reason", reason) + &leaf("Description", text));
        node("Target", leaf("Id", &key.0) + &leaf("Port", key.1))
            + &leaf("HealthCheckPort", key.1)
            + &node(
                "TargetHealth",
                leaf("State", state) + &why.unwrap_or_default(),
            )
    };
    Ok(members(
        "TargetHealthDescriptions",
        keys.iter().map(describe),
    ))
}

fn describe_groups(world: &mut World, params: &Params) -> Result<String, ApiError> {
    params.only(&["TargetGroupArns", "Names", "Marker", "PageSize"])?;
    let (arns, names) = (params.list("TargetGroupArns"), params.list("Names"));
    let all = &world.rest.targets;
    let found: Vec<&TargetGroup> = all
        .iter()
        .filter(|(arn, group)| {
            (arns.is_empty() || arns.contains(&arn.as_str()))
                && (names.is_empty() || names.contains(&group.name.as_str()))
        })
        .map(|(_, group)| group)
        .collect();
    if found.len() < arns.len().max(names.len()) {
        return Err(not_found());
    }
    let size = usize::try_from(params.number("PageSize")?.unwrap_or(400)).unwrap();
    let from = match params.get("Marker") {
        Some(marker) => found
            .iter()
            .position(|it| it.name == marker)
            .ok_or_else(|| ApiError::validation(format!("'{marker}' is not a valid marker")))?,
        None => 0,
    };
    let page = found
        .iter()
        .skip(from)
        .take(size)
        .map(|group| group.describe());
    let next = found.get(from + size).map(|group| &group.name);
    Ok(members("TargetGroups", page) + &leaf_of("NextMarker", next))
}
