//! `fleet`, but for the host's own name (`fleet.dns.hosts`).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::super::error::{KeyPath, quoted};
use super::super::fragment::{
    AliasFragment, AutoscalingFragment, DnsFragment, FleetFragment, LoadBalancerFragment,
    PolicyFragment, Rfc2136Fragment, Route53Fragment, TsigFragment,
};
use super::super::settings::{
    AliasTarget, AutoscalingSettings, DnsPolicy, DnsProvider, DnsSettings, FleetSettings,
    LoadBalancerSettings, Members, TsigAlgorithm, TsigSettings,
};
use super::Conversion;
use crate::oci::ImageName;

/// Where DNS servers listen.
const DNS_PORT: u16 = 53;
/// How long resolvers keep an answer, in seconds.
const DEFAULT_TTL: u64 = 30;
/// Bytes of a name: 253, less `_registry-agent.`.
const LONGEST_NAME: usize = 237;
/// A name that is kept for longer can't be left within a hook's longest time.
const LONGEST_TTL: Duration = Duration::from_hours(1);

impl Conversion<'_> {
    pub(super) fn fleet(&mut self, said: FleetFragment) -> Option<FleetSettings> {
        let remarks = self.remarks.len();
        let unused = needs_members(&said);
        let members = self.members(said.autoscaling, said.peers);
        let load_balancer = said.load_balancer.and_then(|said| self.load_balancer(said));
        let dns = self.fleet_dns(said.dns.unwrap_or_default());
        let warm = self.warm(said.warm.unwrap_or_default());
        if members.is_none() && self.remarks.len() == remarks && self.complete {
            for key in unused {
                let message = "says how to take part in a fleet, and nothing says in which: add \
                               `fleet.autoscaling` or `fleet.peers`";
                self.refuse::<()>(&KeyPath::of(key), message);
            }
        }
        let listed = matches!(members, Some(Members::Static(_)));
        for (key, said) in [
            ("fleet.enforce", said.enforce),
            ("fleet.attach", said.attach),
        ] {
            if listed && said == Some(true) {
                let message =
                    "is about an autoscaling group, and `fleet.peers` is a list: remove one";
                self.refuse::<()>(&KeyPath::of(key), message);
            }
        }
        if said.enforce == Some(true) && said.instances.is_none() && self.complete && !listed {
            let message = "raises the group to `fleet.instances`, which is missing: add it";
            self.refuse::<()>(&KeyPath::of("fleet.enforce"), message);
        }
        (self.remarks.len() == remarks).then_some(FleetSettings {
            instances: said.instances,
            warm,
            leave_on_stop: said.leave_on_stop.unwrap_or(false),
            enforce: said.enforce.unwrap_or(false),
            attach: said.attach.unwrap_or(false),
            members,
            load_balancer,
            dns,
        })
    }

    fn members(
        &mut self,
        autoscaling: Option<AutoscalingFragment>,
        peers: Option<Vec<String>>,
    ) -> Option<Members> {
        match (autoscaling, peers) {
            (None, None) => None,
            (Some(autoscaling), None) => self.autoscaling(autoscaling),
            (None, Some(peers)) => self.peers(&peers),
            (Some(_), Some(_)) => {
                let message = "is given beside `fleet.autoscaling`: either the group says who the \
                               mirrors are, or this list does";
                self.refuse(&KeyPath::of("fleet.peers"), message)
            }
        }
    }

    fn autoscaling(&mut self, said: AutoscalingFragment) -> Option<Members> {
        let here = KeyPath::of("fleet.autoscaling");
        // A slash would end it within the records' identifiers, and no record is ours then.
        let fits = |name: &str| {
            (1..=100).contains(&name.len()) && !name.contains(|c: char| c == '/' || c.is_control())
        };
        let group = match said.group {
            Some(group) if fits(&group) => Some(group),
            Some(group) => {
                let message = format!(
                    "{} can't be used: must be a group's name of up to 100 bytes without slashes",
                    quoted(&group)
                );
                self.refuse(&here.key("group"), message)
            }
            None if self.complete => {
                self.refuse(&here, "`group` is missing: the autoscaling group's name")
            }
            None => None,
        };
        let default = || {
            vec![
                "registry-agent-launch".into(),
                "registry-agent-terminate".into(),
            ]
        };
        Some(Members::Autoscaling(AutoscalingSettings {
            group: group?,
            report_health: said.report_health.unwrap_or(true),
            min_healthy: said.min_healthy.unwrap_or(1),
            hooks: said.hooks.unwrap_or_else(default),
        }))
    }

    fn peers(&mut self, said: &[String]) -> Option<Members> {
        let list = KeyPath::of("fleet.peers");
        let (mut peers, mut seen) = (Vec::new(), BTreeSet::new());
        for (index, said) in said.iter().enumerate() {
            let here = list.item(index);
            let Ok(peer) = said.parse::<IpAddr>() else {
                let message = format!("{} is not an IP address", quoted(said));
                self.refuse::<()>(&here, message);
                continue;
            };
            if !seen.insert(peer) {
                let message = format!("{peer} is there already: name each mirror once");
                self.refuse::<()>(&here, message);
            }
            peers.push(peer);
        }
        if said.is_empty() {
            return self.refuse(&list, "is empty: must be the IP addresses of all mirrors");
        }
        Some(Members::Static(peers))
    }

    fn load_balancer(&mut self, said: LoadBalancerFragment) -> Option<LoadBalancerSettings> {
        let here = KeyPath::of("fleet.load_balancer");
        match said.target_group {
            Some(arn) if arn.starts_with("arn:") && arn.contains(":targetgroup/") => {
                Some(LoadBalancerSettings { target_group: arn })
            }
            Some(said) => {
                let message = format!(
                    "{} is not a target group's ARN, such as \
                     arn:aws:elasticloadbalancing:REGION:ACCOUNT:targetgroup/NAME/ID",
                    quoted(&said)
                );
                self.refuse(&here.key("target_group"), message)
            }
            None if self.complete => self.refuse(&here, "`target_group` is missing: its ARN"),
            None => None,
        }
    }

    fn fleet_dns(&mut self, said: DnsFragment) -> Option<DnsSettings> {
        match (said.route53, said.rfc2136) {
            (None, None) => None,
            (Some(route53), None) => self.route53(route53),
            (None, Some(rfc2136)) => self.rfc2136(rfc2136),
            (Some(_), Some(_)) => {
                let message = "holds both `route53` and `rfc2136`: the fleet has one name";
                self.refuse(&KeyPath::of("fleet.dns"), message)
            }
        }
    }

    fn route53(&mut self, said: Route53Fragment) -> Option<DnsSettings> {
        let here = KeyPath::of("fleet.dns.route53");
        let zone = self.hosted_zone(&here, said.zone);
        let (name, ttl) = self.name_and_ttl(&here, said.name, said.ttl);
        let policy = said.policy.unwrap_or(PolicyFragment::Multivalue);
        let balanced = policy == PolicyFragment::Alias;
        if balanced && said.health_check.is_some() {
            let message = "is about an instance's record, and with `policy: alias` there is none";
            self.refuse::<()>(&here.key("health_check"), message);
        }
        if !balanced && said.alias.is_some() {
            let message = "says where an alias leads, and without `policy: alias` there is none";
            self.refuse::<()>(&here.key("alias"), message);
        }
        let health_check = said
            .health_check
            .map(|id| self.health_check(&here.key("health_check"), id));
        let policy = match policy {
            PolicyFragment::Multivalue => Some(DnsPolicy::Multivalue),
            PolicyFragment::Weighted => Some(DnsPolicy::Weighted),
            PolicyFragment::Alias => self.alias(&here, said.alias).map(DnsPolicy::Alias),
        };
        Some(DnsSettings {
            name: name?,
            ttl: ttl?,
            provider: DnsProvider::Route53 {
                zone: zone?,
                policy: policy?,
                health_check: match health_check {
                    Some(id) => Some(id?),
                    None => None,
                },
            },
        })
    }

    fn hosted_zone(&mut self, here: &KeyPath, said: Option<String>) -> Option<String> {
        let is_id = |id: &str| {
            (1..=32).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric())
        };
        let zone = self.required(here, "zone", said)?;
        if is_id(&zone) {
            return Some(zone);
        }
        let message = format!(
            "{} is not a hosted zone's id: must be letters and digits, such as \
             Z0123456789ABCDEFGHIJ",
            quoted(&zone)
        );
        self.refuse(&here.key("zone"), message)
    }

    fn health_check(&mut self, here: &KeyPath, id: String) -> Option<String> {
        let fits = |c: char| c.is_ascii_hexdigit() || c == '-';
        if (1..=64).contains(&id.len()) && id.chars().all(fits) {
            return Some(id);
        }
        let message = format!(
            "{} is not a health check's id, such as 0123abcd-0123-4567-89ab-0123456789ab",
            quoted(&id)
        );
        self.refuse(here, message)
    }

    fn alias(&mut self, route53: &KeyPath, said: Option<AliasFragment>) -> Option<AliasTarget> {
        let here = route53.key("alias");
        if said.is_none() && self.complete {
            let message = "`alias` is missing: the load balancer that `policy: alias` leads to";
            return self.refuse(route53, message);
        }
        let said = said?;
        let name = self.required(&here, "name", said.name);
        let name = name.and_then(|name| self.host_name(&here.key("name"), &name));
        let zone = self.hosted_zone(&here, said.zone);
        Some(AliasTarget {
            name: name?,
            zone: zone?,
        })
    }

    fn rfc2136(&mut self, said: Rfc2136Fragment) -> Option<DnsSettings> {
        let here = KeyPath::of("fleet.dns.rfc2136");
        let server = self.required(&here, "server", said.server);
        let server = server.and_then(|server| {
            let alone = || Some(SocketAddr::new(server.parse().ok()?, DNS_PORT));
            server.parse().ok().or_else(alone).or_else(|| {
                let message = format!(
                    "{} is not an IP address, perhaps with a port (192.0.2.53, 192.0.2.53:53)",
                    quoted(&server)
                );
                self.refuse(&here.key("server"), message)
            })
        });
        let zone = self.required(&here, "zone", said.zone);
        let zone = zone.and_then(|zone| self.host_name(&here.key("zone"), &zone));
        let (name, ttl) = self.name_and_ttl(&here, said.name, said.ttl);
        if let (Some(zone), Some(name)) = (&zone, &name)
            && name != zone
            && !name.ends_with(&format!(".{zone}"))
        {
            let message = format!("{} is not within the zone {zone}", quoted(name));
            self.refuse::<()>(&here.key("name"), message);
        }
        // So that there is room for the name of its TXT records.
        if let Some(name) = &name
            && name.len() > LONGEST_NAME
        {
            let message = format!("is longer than {LONGEST_NAME} bytes");
            self.refuse::<()>(&here.key("name"), message);
        }
        let cname = said
            .cname
            .map(|cname| self.host_name(&here.key("cname"), &cname));
        if cname.is_some() && name.is_some() && name == zone {
            let message = "can't be at the zone's own name, which holds other records: use a name \
                           below it";
            self.refuse::<()>(&here.key("cname"), message);
        }
        let tsig = self.tsig(&here, said.tsig);
        Some(DnsSettings {
            name: name?,
            ttl: ttl?,
            provider: DnsProvider::Rfc2136 {
                server: server?,
                zone: zone?,
                tsig: tsig?,
                cname: match cname {
                    Some(cname) => Some(cname?),
                    None => None,
                },
            },
        })
    }

    fn tsig(&mut self, server: &KeyPath, said: Option<TsigFragment>) -> Option<TsigSettings> {
        let here = server.key("tsig");
        if said.is_none() && self.complete {
            let message = "`tsig` is missing: an UPDATE that nobody signs could be anybody's";
            return self.refuse(server, message);
        }
        let said = said?;
        let name = self.required(&here, "name", said.name);
        let name = name.and_then(|name| self.host_name(&here.key("name"), &name));
        let file = self.required(&here, "secret_file", said.secret_file);
        let secret = file.and_then(|file| {
            let path = here.key("secret_file");
            let secret = self.password_file(&path, &file)?;
            if STANDARD
                .decode(secret.reveal())
                .is_ok_and(|key| !key.is_empty())
            {
                return Some(secret);
            }
            self.refuse(&path, "the file does not hold a key in base64")
        });
        Some(TsigSettings {
            name: name?,
            algorithm: said.algorithm.unwrap_or(TsigAlgorithm::HmacSha256),
            secret: secret?,
        })
    }

    fn name_and_ttl(
        &mut self,
        here: &KeyPath,
        name: Option<String>,
        ttl: Option<String>,
    ) -> (Option<String>, Option<Duration>) {
        let name = self.required(here, "name", name);
        let name = name.and_then(|name| self.host_name(&here.key("name"), &name));
        let path = here.key("ttl");
        let least = Duration::from_secs(1);
        let ttl = self.duration(&path.to_string(), ttl, DEFAULT_TTL, least);
        let ttl = ttl.and_then(|ttl| {
            if ttl.subsec_nanos() == 0 && ttl <= LONGEST_TTL {
                return Some(ttl);
            }
            self.refuse(&path, "must be whole seconds, at most 1h")
        });
        (name, ttl)
    }

    fn warm(&mut self, said: Vec<String>) -> Vec<String> {
        for (index, image) in said.iter().enumerate() {
            if let Err(error) = image.parse::<ImageName>() {
                let here = KeyPath::of("fleet.warm").item(index);
                self.refuse::<()>(&here, format!("is not an image: {error}"));
            }
        }
        said
    }

    fn required(&mut self, here: &KeyPath, key: &str, said: Option<String>) -> Option<String> {
        if said.is_none() && self.complete {
            self.refuse::<()>(here, format!("`{key}` is missing"));
        }
        said
    }
}

/// What was said that means something in a fleet alone.
fn needs_members(said: &FleetFragment) -> Vec<&'static str> {
    let dns = said.dns.as_ref();
    let said = [
        ("fleet.instances", said.instances.is_some()),
        ("fleet.warm", said.warm.is_some()),
        ("fleet.leave_on_stop", said.leave_on_stop.is_some()),
        ("fleet.enforce", said.enforce.is_some()),
        ("fleet.attach", said.attach.is_some()),
        ("fleet.load_balancer", said.load_balancer.is_some()),
        (
            "fleet.dns.route53",
            dns.is_some_and(|dns| dns.route53.is_some()),
        ),
        (
            "fleet.dns.rfc2136",
            dns.is_some_and(|dns| dns.rfc2136.is_some()),
        ),
    ];
    said.into_iter()
        .filter(|(_, said)| *said)
        .map(|(key, _)| key)
        .collect()
}
