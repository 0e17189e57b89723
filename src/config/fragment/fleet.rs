//! What may be said of a fleet.

use schemars::JsonSchema;
use serde::Deserialize;

use super::super::settings::TsigAlgorithm;

/// How this host takes part in a fleet of mirrors. Without `autoscaling` and `peers` it takes part
/// in none.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FleetFragment {
    /// How many mirrors there should be; shown beside how many there are. Default: what the group
    /// wants, or as many as `peers` names.
    #[schemars(range(min = 1))]
    pub instances: Option<u32>,
    /// Images that are fetched before this instance joins, as `docker pull` names them. Default:
    /// none.
    pub warm: Option<Vec<String>>,
    /// Whether a stop of the service leaves the fleet first. A restart then does too. Default:
    /// false.
    pub leave_on_stop: Option<bool>,
    /// Whether the group's desired capacity is raised to `instances`: never above its maximum, and
    /// never lowered. Default: false.
    pub enforce: Option<bool>,
    /// Whether an instance that was started by hand is attached to the group. Default: false.
    pub attach: Option<bool>,
    /// The autoscaling group that this instance is in.
    pub autoscaling: Option<AutoscalingFragment>,
    /// Instead of a group: the IP addresses of all mirrors, this host's own among them.
    pub peers: Option<Vec<String>>,
    /// The load balancer that leads to the mirrors.
    pub load_balancer: Option<LoadBalancerFragment>,
    /// The names by which registries are found.
    pub dns: Option<DnsFragment>,
}

/// The autoscaling group that this instance is in.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AutoscalingFragment {
    /// Its name.
    #[schemars(example = &"mirrors")]
    pub group: Option<String>,
    /// Whether an instance that can't be cured says so to the group, which replaces it. Default:
    /// true.
    pub report_health: Option<bool>,
    /// The fewest healthy instances that have to be left for that, beside half of the group's
    /// desired capacity. Default: 1.
    #[schemars(range(min = 1))]
    pub min_healthy: Option<u32>,
    /// The lifecycle hooks of the group that are this agent's to complete. Default:
    /// registry-agent-launch and registry-agent-terminate.
    pub hooks: Option<Vec<String>>,
}

/// The load balancer that leads to the mirrors.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadBalancerFragment {
    /// The ARN of its target group. Where it is attached to the group, the group registers
    /// instances, and the agent only looks.
    #[schemars(
        example = &"arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/mirrors/0123456789abcdef"
    )]
    pub target_group: Option<String>,
}

/// The names by which registries are found.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DnsFragment {
    /// The fleet's name, in Amazon Route 53.
    pub route53: Option<Route53Fragment>,
    /// The fleet's name, in any DNS server that takes signed UPDATEs.
    pub rfc2136: Option<Rfc2136Fragment>,
    /// A name of this host's own registry, for this host alone.
    pub hosts: Option<HostsFragment>,
}

/// The fleet's name, in Amazon Route 53.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Route53Fragment {
    /// The id of its hosted zone, public or private.
    #[schemars(example = &"Z0123456789ABCDEFGHIJ")]
    pub zone: Option<String>,
    /// The name. It holds records with set identifiers of the agents' own, and no others.
    #[schemars(example = &"docker-mirror.example.com")]
    pub name: Option<String>,
    /// What the name holds. Default: multivalue.
    pub policy: Option<PolicyFragment>,
    /// For `alias`: the load balancer.
    pub alias: Option<AliasFragment>,
    /// The id of a Route 53 health check that this instance's record depends on. Its checkers are
    /// outside of any VPC, so one that asks a private address fails for ever. Default: none.
    #[schemars(example = &"0123abcd-0123-4567-89ab-0123456789ab")]
    pub health_check: Option<String>,
    /// How long resolvers keep an answer. Default: 30s.
    #[schemars(example = &"30s")]
    pub ttl: Option<String>,
}

/// What the name holds.
#[derive(Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PolicyFragment {
    /// A record for each instance; an answer has up to eight of them.
    Multivalue,
    /// A record for each instance, all of the same weight; an answer has one of them.
    Weighted,
    /// One record, an alias of the load balancer: instances are found through that alone.
    Alias,
}

/// The load balancer that an alias leads to.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AliasFragment {
    /// Its DNS name. If it begins with `dualstack.`, the alias is of type AAAA as well as A.
    #[schemars(example = &"internal-mirrors-1234567890.eu-west-1.elb.amazonaws.com")]
    pub name: Option<String>,
    /// Its canonical hosted zone's id, which is Amazon's.
    #[schemars(example = &"Z32O12XQLNTSW2")]
    pub zone: Option<String>,
}

/// The fleet's name, in any DNS server that takes signed UPDATEs (RFC 2136).
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rfc2136Fragment {
    /// The zone's primary server: an IP address, and a port if it is not 53.
    #[schemars(example = &"192.0.2.53", example = &"192.0.2.53:53")]
    pub server: Option<String>,
    /// The zone.
    #[schemars(example = &"example.com")]
    pub zone: Option<String>,
    /// The name, within the zone. TXT records at `_registry-agent.<name>` say what of it is whose.
    #[schemars(example = &"docker-mirror.example.com")]
    pub name: Option<String>,
    /// A load balancer's name: the name is then an alias of it (CNAME), and not the instances' own.
    /// Default: none, so the name holds the addresses of the instances.
    #[schemars(example = &"balancer.example.net")]
    pub cname: Option<String>,
    /// How long resolvers keep an answer. Default: 30s.
    #[schemars(example = &"30s")]
    pub ttl: Option<String>,
    /// The key that signs.
    pub tsig: Option<TsigFragment>,
}

/// A key that signs UPDATEs (TSIG, RFC 8945).
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TsigFragment {
    /// Its name, as the server knows it.
    #[schemars(example = &"registry-agent")]
    pub name: Option<String>,
    /// How it signs. Default: hmac-sha256.
    pub algorithm: Option<TsigAlgorithm>,
    /// A file that holds the key in base64 and nothing else; a path that does not begin with `/` is
    /// beside the file that says it.
    #[schemars(example = &"/etc/registry-agent/tsig.key")]
    pub secret_file: Option<String>,
}

/// A name of this host's own registry, in `/etc/hosts`.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct HostsFragment {
    /// The name. Default: none.
    #[schemars(example = &"docker-local.example.com")]
    pub name: Option<String>,
}
