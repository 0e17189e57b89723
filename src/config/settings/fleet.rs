//! `fleet`: how this host takes part in a fleet of mirrors.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::Secret;

/// How this host takes part in a fleet. Its default takes part in none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FleetSettings {
    /// How many mirrors there should be. Only said beside what there is, unless `enforce`.
    pub instances: Option<u32>,
    /// Images that are fetched before this instance joins, as `docker pull` names them.
    pub warm: Vec<String>,
    /// Whether a stop of the service leaves the fleet: a restart must not.
    pub leave_on_stop: bool,
    /// Whether the group's desired capacity is raised to `instances`. It is never lowered, and
    /// never goes above the group's maximum.
    pub enforce: bool,
    /// Whether an instance that was started by hand is attached to the group.
    pub attach: bool,
    /// The instances there are.
    pub members: Option<Members>,
    /// Where a load balancer finds this instance.
    pub load_balancer: Option<LoadBalancerSettings>,
    /// Where resolvers find this instance.
    pub dns: Option<DnsSettings>,
}

impl FleetSettings {
    /// Whether there is anything to do: who the members are is known, and where they are found.
    pub fn is_off(&self) -> bool {
        self.members.is_none()
    }
}

/// Who is in the fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Members {
    /// The instances of an autoscaling group.
    Autoscaling(AutoscalingSettings),
    /// These addresses, each an instance; this host's own is among them. Never empty.
    Static(Vec<IpAddr>),
}

/// The autoscaling group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutoscalingSettings {
    /// Its name.
    pub group: String,
    /// Whether an instance that can't be cured asks to be replaced (`SetInstanceHealth`).
    pub report_health: bool,
    /// The fewest healthy instances that may be left while one is replaced, beside half of the
    /// desired capacity. At least 1.
    pub min_healthy: u32,
    /// The lifecycle hooks that are completed; any other is somebody else's.
    pub hooks: Vec<String>,
}

/// The load balancer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadBalancerSettings {
    /// The ARN of its target group.
    pub target_group: String,
}

/// The name that clients resolve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsSettings {
    /// The name, in lower case, without a dot at its end.
    pub name: String,
    /// How long resolvers keep an answer.
    pub ttl: Duration,
    /// Who is asked to change it.
    pub provider: DnsProvider,
}

impl DnsSettings {
    /// The load balancer's name, where the fleet's name leads to it and not to the instances.
    pub fn load_balancer(&self) -> Option<&str> {
        match &self.provider {
            DnsProvider::Route53 {
                policy: DnsPolicy::Alias(target),
                ..
            } => Some(&target.name),
            DnsProvider::Route53 { .. } => None,
            DnsProvider::Rfc2136 { cname, .. } => cname.as_deref(),
        }
    }
}

/// Who changes the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsProvider {
    /// Route 53.
    Route53 {
        /// The hosted zone's id.
        zone: String,
        /// What the name holds.
        policy: DnsPolicy,
        /// The id of the health check that this instance's record depends on.
        health_check: Option<String>,
    },
    /// A server that takes signed UPDATEs (RFC 2136, RFC 8945).
    Rfc2136 {
        /// The zone's primary server.
        server: SocketAddr,
        /// The zone's name.
        zone: String,
        /// The key that signs.
        tsig: TsigSettings,
        /// The load balancer's name, where the name is an alias of it (CNAME).
        cname: Option<String>,
    },
}

/// What a Route 53 name holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsPolicy {
    /// A record for each instance; an answer has up to eight of them.
    Multivalue,
    /// A record for each instance, all of the same weight; an answer has one of them.
    Weighted,
    /// One record, an alias of the load balancer.
    Alias(AliasTarget),
}

/// What an alias leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AliasTarget {
    /// The load balancer's DNS name, in lower case, without a dot at its end. One that begins with
    /// `dualstack.` has IPv6 addresses as well.
    pub name: String,
    /// The id of the hosted zone that this name is in, which is Amazon's.
    pub zone: String,
}

/// A key that signs UPDATEs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TsigSettings {
    /// The key's name, as the server knows it.
    pub name: String,
    /// How it signs.
    pub algorithm: TsigAlgorithm,
    /// The key, in base64.
    pub secret: Secret,
}

/// How an UPDATE is signed (RFC 8945, section 6), by its name in DNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TsigAlgorithm {
    /// SHA-256.
    HmacSha256,
    /// SHA-384.
    HmacSha384,
    /// SHA-512.
    HmacSha512,
}
