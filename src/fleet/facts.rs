//! What was seen: of this instance, the group, the load balancer and DNS.
//!
//! Facts are data, and can be saved: `plan` on somebody's facts gives on any machine what it gave
//! there. What can't be seen is what was seen last, with its time, or absent: nothing is ever
//! inferred from an API that does not answer.
//!
//! All times are since this host booted (`CLOCK_BOOTTIME`), so that they mean the same after a
//! restart of the agent; the one wall clock that matters is a spot notice's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Everything that a plan is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// Now.
    pub now: Duration,
    /// Who this instance is.
    pub own: Own,
    /// What the metadata service says. Where it fails, what it said last.
    pub metadata: Metadata,
    /// What the agent says of itself.
    pub signals: Signals,
    /// Somebody stops the service, and `fleet.leave_on_stop` is set: what time there is for leaving.
    pub stop: Option<Duration>,
    /// The autoscaling group, or what stands for it: [`Group::of_a_list`].
    pub group: Option<Seen<Arc<Group>>>,
    /// How many launches of the group were abandoned in the last hour, by its scaling activities:
    /// an instance that was abandoned leaves nothing else behind, and its successor knows nothing.
    pub abandoned: Option<Seen<u32>>,
    /// This instance in the target group; absent within, where it is not registered.
    pub own_target: Option<Seen<Option<TargetState>>>,
    /// The records of the name that are this instance's own.
    pub own_records: Option<Seen<OwnRecords>>,
    /// All records of the name.
    pub records: Option<Seen<Arc<Records>>>,
    /// The peers that were asked from here whether they are ready.
    pub peers: Option<Seen<Peers>>,
}

/// What was seen, and when the question was asked: what happened later can't be in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seen<T> {
    /// When it was asked.
    pub at: Duration,
    /// The answer.
    pub is: T,
}

/// An instance: EC2's id (`i-0123456789abcdef0`), or its address in a static list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(Arc<str>);

impl InstanceId {
    /// The id as it is said elsewhere.
    pub fn new(id: impl Into<Arc<str>>) -> Self {
        Self(id.into())
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// This instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Own {
    /// Its id.
    pub id: InstanceId,
    /// The addresses at which clients reach it, at most one of a family.
    pub addresses: Vec<IpAddr>,
}

/// What the instance metadata service says (`IMDSv2`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// `autoscaling/target-lifecycle-state`; absent where the service has none (404).
    pub target_state: Option<LifecycleState>,
    /// `spot/instance-action`: how long from now until EC2 acts, by this host's wall clock; zero
    /// where that is past. Nothing where there is no notice (404).
    pub spot: Option<Duration>,
    /// `events/recommendations/rebalance`: EC2 may take this instance soon. A group with capacity
    /// rebalancing replaces it by itself, so this is only said.
    pub rebalance: bool,
}

/// What the agent says of itself. That it lives at all is a third signal, which never gets here: the
/// watchdog restarts an agent that hangs, and that is always the first remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signals {
    /// It can serve what it has, by a real request through its own address. No upstream, S3, DNS,
    /// AWS or metadata service that fails makes it false.
    pub ready: bool,
    /// Something that only a new instance would cure, in a sentence: the cache's device is gone, the
    /// own port fails through three restarts, a configuration that can't be used.
    pub fatal: Option<String>,
    /// The images of `fleet.warm` are there, or there are none.
    pub warm: bool,
    /// Requests that are being answered.
    pub running: u32,
}

/// Where an instance is in an autoscaling group. Texts are Amazon's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum LifecycleState {
    /// It starts.
    Pending,
    /// A launching hook holds it.
    PendingWait,
    /// The hook was completed.
    PendingProceed,
    /// It is one of those that the group counts.
    InService,
    /// It goes.
    Terminating,
    /// A terminating hook holds it.
    TerminatingWait,
    /// The hook was completed.
    TerminatingProceed,
    /// It is gone.
    Terminated,
    /// Somebody takes it out of service for a while.
    EnteringStandby,
    /// It is out of service for a while.
    Standby,
    /// It leaves the group and goes on running.
    Detaching,
    /// It has left the group.
    Detached,
    /// A launching hook holds it on its way into a warm pool.
    WarmedPendingWait,
    /// A terminating hook holds it on its way out of a warm pool.
    WarmedTerminatingWait,
    /// Any other state of a warm pool.
    Warmed(String),
    /// A state that this version does not know: nothing is done in it.
    Unknown(String),
}

impl LifecycleState {
    /// A launching hook waits, or will.
    pub fn is_pending(&self) -> bool {
        matches!(
            self,
            Self::Pending | Self::PendingWait | Self::PendingProceed
        )
    }

    /// It goes, and does not come back.
    pub fn is_terminating(&self) -> bool {
        matches!(
            self,
            Self::Terminating
                | Self::TerminatingWait
                | Self::TerminatingProceed
                | Self::Terminated
                | Self::WarmedTerminatingWait
        )
    }

    /// Amazon's text.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Pending => "Pending",
            Self::PendingWait => "Pending:Wait",
            Self::PendingProceed => "Pending:Proceed",
            Self::InService => "InService",
            Self::Terminating => "Terminating",
            Self::TerminatingWait => "Terminating:Wait",
            Self::TerminatingProceed => "Terminating:Proceed",
            Self::Terminated => "Terminated",
            Self::EnteringStandby => "EnteringStandby",
            Self::Standby => "Standby",
            Self::Detaching => "Detaching",
            Self::Detached => "Detached",
            Self::WarmedPendingWait => "Warmed:Pending:Wait",
            Self::WarmedTerminatingWait => "Warmed:Terminating:Wait",
            Self::Warmed(text) | Self::Unknown(text) => text,
        }
    }
}

impl From<String> for LifecycleState {
    fn from(text: String) -> Self {
        match text.as_str() {
            "Pending" => Self::Pending,
            "Pending:Wait" => Self::PendingWait,
            "Pending:Proceed" => Self::PendingProceed,
            "InService" => Self::InService,
            "Terminating" => Self::Terminating,
            "Terminating:Wait" => Self::TerminatingWait,
            "Terminating:Proceed" => Self::TerminatingProceed,
            "Terminated" => Self::Terminated,
            "EnteringStandby" => Self::EnteringStandby,
            "Standby" => Self::Standby,
            "Detaching" => Self::Detaching,
            "Detached" => Self::Detached,
            "Warmed:Pending:Wait" => Self::WarmedPendingWait,
            "Warmed:Terminating:Wait" => Self::WarmedTerminatingWait,
            _ if text.starts_with("Warmed:") => Self::Warmed(text),
            _ => Self::Unknown(text),
        }
    }
}

impl From<LifecycleState> for String {
    fn from(state: LifecycleState) -> Self {
        state.as_str().to_owned()
    }
}

/// An autoscaling group (`DescribeAutoScalingGroups`, `DescribeLifecycleHooks`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// The fewest instances that it keeps.
    pub min: u32,
    /// The instances that it wants.
    pub desired: u32,
    /// The most that it may have.
    pub max: u32,
    /// Whether a replacement is launched before what it replaces is terminated
    /// (`InstanceMaintenancePolicy` of at least 100 percent healthy).
    pub launches_first: bool,
    /// Whether the target group of the settings is attached to it: then it registers instances, and
    /// an agent that did so too would fight it.
    pub registers_targets: bool,
    /// Its lifecycle hooks.
    pub hooks: Vec<Hook>,
    /// Its instances.
    pub members: BTreeMap<InstanceId, Member>,
    /// Whether every page of it was read.
    pub complete: bool,
}

impl Group {
    /// What stands for a group where there is none: the instances of a list, which are always in
    /// service as far as anybody can say.
    pub fn of_a_list<'a>(addresses: impl IntoIterator<Item = &'a IpAddr>) -> Self {
        let member = |address: &IpAddr| {
            let member = Member {
                state: LifecycleState::InService,
                healthy: true,
                zone: None,
            };
            (InstanceId::new(address.to_string()), member)
        };
        let members: BTreeMap<_, _> = addresses.into_iter().map(member).collect();
        let count = u32::try_from(members.len()).unwrap_or(u32::MAX);
        Self {
            min: count,
            desired: count,
            max: count,
            launches_first: false,
            registers_targets: false,
            hooks: Vec::new(),
            members,
            complete: true,
        }
    }

    /// How many of its instances are in service and healthy.
    pub fn healthy(&self) -> usize {
        let members = self.members.values();
        members.filter(|member| member.serves()).count()
    }
}

/// A lifecycle hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Its name.
    pub name: String,
    /// Which instances it holds.
    pub transition: Transition,
    /// How long it holds one without a heartbeat: 30 to 7200 s.
    pub heartbeat_timeout: Duration,
}

/// Which instances a hook holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transition {
    /// Those that start.
    Launching,
    /// Those that go.
    Terminating,
}

/// An instance of the group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Where it is.
    pub state: LifecycleState,
    /// `HealthStatus` is `Healthy`.
    pub healthy: bool,
    /// Its availability zone; absent in a static list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
}

impl Member {
    /// In service and healthy.
    pub fn serves(&self) -> bool {
        self.healthy && self.state == LifecycleState::InService
    }
}

/// A target's state (`DescribeTargetHealth`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetState {
    /// Registered, and its first checks are not over.
    Initial,
    /// Gets requests.
    Healthy,
    /// Registered, and gets none: `unhealthy`, `unused`, `unavailable`, or anything new.
    Unhealthy,
    /// Deregistered, and its connections go on: `draining`, `unhealthy.draining`.
    Draining,
}

/// This instance's own records of the name; where the name leads to the load balancer, the fleet's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnRecords {
    /// As they are in the zone.
    pub records: Vec<Record>,
    /// Whether all of the zone's servers answer so (`GetChange`: `INSYNC`).
    pub in_sync: bool,
}

/// The records of the name, of types A and AAAA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Records {
    /// All of them, also those of others.
    pub records: Vec<Record>,
    /// Whether every page was read.
    pub complete: bool,
}

/// One record set of the name, with everything that an exact delete has to name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Whose it is: Route 53's set identifier, or the `id=` of the TXT that was written with it
    /// (RFC 2136). Ours are `ra/<group>/<instance-id>`, and `ra/<group>` for the one that leads to
    /// the load balancer; any other is never touched.
    pub identifier: Option<String>,
    /// Its addresses, all of one family.
    pub addresses: Vec<IpAddr>,
    /// The load balancer's name, which it leads to instead of addresses: an alias, or a CNAME.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// How long resolvers keep it; zero where its target says that.
    pub ttl: Duration,
    /// How Route 53 chooses between it and others of the name.
    pub routing: Routing,
    /// The id of Route 53's health check that it depends on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<String>,
}

impl Record {
    /// The instance whose record it is, if it is one of this group's.
    pub fn owner(&self, group: &str) -> Option<InstanceId> {
        let rest = self.identifier.as_deref()?.strip_prefix("ra/")?;
        let id = rest.strip_prefix(group)?.strip_prefix('/')?;
        (!id.is_empty() && !id.contains('/')).then(|| InstanceId::new(id))
    }
}

/// How a name with several records is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Routing {
    /// All of them (RFC 2136).
    Plain,
    /// Up to eight of them (`MultiValueAnswer`).
    Multivalue,
    /// One of them, by this weight.
    Weighted(u8),
    /// By another policy, which this version never writes.
    Other,
}

/// The peers that were asked whether they are ready, and those that were.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    /// Who was asked.
    pub asked: BTreeSet<InstanceId>,
    /// Who was ready.
    pub ready: BTreeSet<InstanceId>,
}
