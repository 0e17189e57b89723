//! What is known of the fleet, for people and machines.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::Row;
use crate::config::{FleetSettings, Members};
use crate::fleet::drive::View;
use crate::fleet::facts::{Facts, InstanceId, Member, TargetState};

/// Instances that are told of: an answer is bounded.
const MOST: usize = 500;

/// A fleet, as one of its instances knows it. What it does not know is absent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FleetStatus {
    /// Where this instance is: `boot`, `pending_wait`, `registering`, `serving`, `drain`...
    pub state: String,
    /// Its id.
    pub instance: Option<String>,
    /// The autoscaling group; absent where a list says who the instances are.
    pub group: Option<String>,
    /// The name that clients resolve.
    pub name: Option<String>,
    /// Why it could not begin yet.
    pub blocked: Option<String>,
    /// Why it was told to go.
    pub leaving: Option<String>,
    /// How many instances there should be.
    pub wanted: Option<u32>,
    /// How many are in service and healthy.
    pub healthy: Option<usize>,
    /// The fewest, the wanted and the most instances of the group.
    pub capacity: Option<Capacity>,
    /// Seconds since the group was looked at.
    pub seen_seconds_ago: Option<u64>,
    /// The instances, the first 500.
    pub instances: Vec<InstanceStatus>,
    /// How many more there are.
    pub more: usize,
    /// What it waits for, in sentences.
    pub notes: Vec<String>,
    /// What was done last, the newest last.
    pub taken: Vec<Taken>,
    /// What is looked at next, and in how many seconds.
    pub looks: Vec<(String, u64)>,
    /// What can't be asked now, and why.
    pub failing: Vec<(String, String)>,
}

/// The bounds of a group.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Capacity {
    /// The fewest instances that it keeps.
    pub min: u32,
    /// The instances that it wants.
    pub desired: u32,
    /// The most that it may have.
    pub max: u32,
}

/// An instance. What is not known of it is absent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// Its id.
    pub id: String,
    /// Whether it is this one.
    pub own: bool,
    /// Its zone.
    pub zone: Option<String>,
    /// The group's word for where it is.
    pub lifecycle_state: String,
    /// Whether the group calls it healthy.
    pub healthy: bool,
    /// Its state in the target group, `none` where it is not in it.
    pub target: Option<String>,
    /// Whether the name leads to it.
    pub in_dns: Option<bool>,
    /// Seconds since it came into service.
    pub age_seconds: Option<u64>,
    /// The agent's version.
    pub version: Option<String>,
}

/// Something that was done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Taken {
    /// What.
    pub action: String,
    /// Why.
    pub why: String,
    /// Seconds since then.
    pub seconds_ago: u64,
}

impl FleetStatus {
    /// What this view shows now.
    pub fn new(view: &View, settings: &FleetSettings) -> Self {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        let facts = view.facts.as_ref();
        let seen = facts.and_then(|facts| facts.group.as_ref());
        let group = seen.map(|seen| &seen.is);
        let members = group.into_iter().flat_map(|group| &group.members);
        let instances: Vec<InstanceStatus> = facts
            .into_iter()
            .flat_map(|facts| members.clone().map(move |(id, member)| (facts, id, member)))
            .map(|(facts, id, member)| instance(view, facts, settings, (id, member), now))
            .take(MOST)
            .collect();
        let ago = |at: Duration| now.saturating_sub(at).as_secs();
        let name = |members: &Members| match members {
            Members::Autoscaling(autoscaling) => Some(autoscaling.group.clone()),
            Members::Static(_) => None,
        };
        Self {
            state: view.state.as_str().to_owned(),
            instance: facts.map(|facts| facts.own.id.to_string()),
            group: settings.members.as_ref().and_then(name),
            name: settings.dns.as_ref().map(|dns| dns.name.clone()),
            blocked: view.blocked.clone(),
            leaving: view.leaving.clone(),
            wanted: settings.instances.or(group.map(|group| group.desired)),
            healthy: group.map(|group| group.healthy()),
            capacity: group.map(|group| Capacity {
                min: group.min,
                desired: group.desired,
                max: group.max,
            }),
            seen_seconds_ago: seen.map(|seen| ago(seen.at)),
            more: group.map_or(0, |group| group.members.len() - instances.len()),
            instances,
            notes: view.notes.clone(),
            taken: view
                .taken
                .iter()
                .map(|(at, step)| Taken {
                    action: step.action.describe(),
                    why: step.why.clone(),
                    seconds_ago: ago(*at),
                })
                .collect(),
            looks: view
                .looks
                .iter()
                .map(|(look, at)| (look.as_str().to_owned(), at.saturating_sub(now).as_secs()))
                .collect(),
            failing: view
                .failing
                .iter()
                .map(|(what, why)| ((*what).to_owned(), why.clone()))
                .collect(),
        }
    }

    /// What people read of it.
    pub(super) fn rows(&self) -> Vec<Row> {
        let of = match (&self.group, &self.instance) {
            (Some(group), Some(own)) => format!("{own} of the group {group}: {}", self.state),
            (Some(group), None) => format!("an instance of the group {group}: {}", self.state),
            (None, Some(own)) => format!("{own} of a list: {}", self.state),
            (None, None) => format!("one of a list: {}", self.state),
        };
        let mut rows = vec![("fleet", of)];
        if let (Some(healthy), Some(wanted)) = (self.healthy, self.wanted) {
            let bounds = self.capacity.filter(|_| self.group.is_some());
            let bounds = bounds.map(|Capacity { min, desired, max }| {
                format!("; the group has {min} to {max}, and wants {desired}")
            });
            let bounds = bounds.unwrap_or_default();
            rows.push(("", format!("{healthy} healthy of {wanted} wanted{bounds}")));
        }
        rows.extend(self.blocked.iter().map(|why| ("blocked", why.clone())));
        rows.extend(self.leaving.iter().map(|why| ("leaving", why.clone())));
        rows.extend(self.table().into_iter().map(|line| ("", line)));
        if self.more > 0 {
            rows.push(("", format!("and {} more", self.more)));
        }
        rows.extend(self.notes.iter().map(|note| ("note", note.clone())));
        let failing = self.failing.iter();
        rows.extend(failing.map(|(what, why)| ("failing", format!("{what}: {why}"))));
        rows
    }

    fn table(&self) -> Vec<String> {
        if self.instances.is_empty() {
            return Vec::new();
        }
        let head = [
            "INSTANCE", "ZONE", "STATE", "HEALTH", "TARGET", "DNS", "AGE", "VERSION",
        ];
        let mut lines = vec![head.map(str::to_owned)];
        lines.extend(self.instances.iter().map(InstanceStatus::cells));
        let widths: [usize; 8] = std::array::from_fn(|column| {
            let cells = lines.iter().map(|line| line[column].chars().count());
            cells.max().unwrap_or_default()
        });
        let padded = |line: [String; 8]| {
            let cells = line.iter().zip(widths);
            let cells: Vec<String> = cells
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            cells.join("  ").trim_end().to_owned()
        };
        lines.into_iter().map(padded).collect()
    }

    /// What the running agent does, and will, for its place in the fleet.
    pub fn plan(&self) -> String {
        let mut text = String::new();
        let mut line = |it: String| {
            text.push_str(&it);
            text.push('\n');
        };
        for (name, value) in self.rows() {
            line(format!("{name:<10} {value}"));
        }
        for Taken {
            action,
            why,
            seconds_ago,
        } in &self.taken
        {
            let ago = humantime::format_duration(Duration::from_secs(*seconds_ago));
            line(format!("{:<10} {action}, {ago} ago: {why}", "done"));
        }
        for (look, seconds) in &self.looks {
            let wait = humantime::format_duration(Duration::from_secs(*seconds));
            line(format!("{:<10} looks at {look} in {wait}", "next"));
        }
        text
    }
}

impl InstanceStatus {
    fn cells(&self) -> [String; 8] {
        let own = if self.own { " *" } else { "" };
        let age = |seconds| humantime::format_duration(Duration::from_secs(seconds)).to_string();
        [
            format!("{}{own}", self.id),
            self.zone.clone().unwrap_or_default(),
            self.lifecycle_state.clone(),
            if self.healthy { "healthy" } else { "unhealthy" }.to_owned(),
            self.target.clone().unwrap_or_default(),
            match self.in_dns {
                Some(true) => "yes".to_owned(),
                Some(false) => "no".to_owned(),
                None => String::new(),
            },
            self.age_seconds.map(age).unwrap_or_default(),
            self.version.clone().unwrap_or_default(),
        ]
    }
}

fn instance(
    view: &View,
    facts: &Facts,
    settings: &FleetSettings,
    (id, member): (&InstanceId, &Member),
    now: Duration,
) -> InstanceStatus {
    let own = *id == facts.own.id;
    let group = match &settings.members {
        Some(Members::Autoscaling(autoscaling)) => autoscaling.group.as_str(),
        Some(Members::Static(_)) | None => "static",
    };
    let own_target = facts
        .own_target
        .as_ref()
        .filter(|_| own)
        .map(|seen| seen.is);
    let target = own_target.or_else(|| view.targets.get(id).map(|target| Some(*target)));
    let own_records = facts.own_records.as_ref().filter(|_| own);
    let own_records = own_records.map(|seen| (seen.at, !seen.is.records.is_empty()));
    let all = facts.records.as_ref().filter(|seen| seen.is.complete);
    let all = all.map(|seen| {
        let mut owners = seen
            .is
            .records
            .iter()
            .filter_map(|record| record.owner(group));
        (seen.at, owners.any(|owner| owner == *id))
    });
    // The younger of the two.
    let in_dns = own_records.into_iter().chain(all).max_by_key(|(at, _)| *at);
    InstanceStatus {
        id: id.to_string(),
        own,
        zone: member.zone.as_deref().map(str::to_owned),
        lifecycle_state: member.state.as_str().to_owned(),
        healthy: member.healthy,
        target: target.map(|target| target.map_or("none", target_text).to_owned()),
        in_dns: in_dns.map(|(_, is_in)| is_in),
        age_seconds: view
            .in_service_since
            .filter(|_| own)
            .map(|since| now.saturating_sub(since).as_secs()),
        version: own.then(|| env!("CARGO_PKG_VERSION").to_owned()),
    }
}

fn target_text(state: TargetState) -> &'static str {
    match state {
        TargetState::Initial => "initial",
        TargetState::Healthy => "healthy",
        TargetState::Unhealthy => "unhealthy",
        TargetState::Draining => "draining",
    }
}
