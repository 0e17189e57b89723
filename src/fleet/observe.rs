//! Looks: each one bounded, and one that fails changes nothing in the facts.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;

use super::autoscaling::Autoscaling;
use super::aws::{self, AwsError};
use super::boot;
use super::calls::Calls;
use super::dns::{Dns, DnsError};
use super::elb::LoadBalancer;
use super::facts::{Facts, Group, InstanceId, Own, Peers, Seen, TargetState};
use super::peers::{Prober, chosen};
use super::plan::Look;
use crate::config::{DnsProvider, FleetSettings, Members};

/// The fleet part can't begin.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("{0}")]
    Imds(#[from] super::imds::ImdsError),
    #[error("{0}")]
    Aws(#[from] AwsError),
    #[error("{0}")]
    Dns(#[from] DnsError),
    #[error("can't ask over TLS: {0}")]
    Tls(rustls::Error),
    #[error(
        "no address that the metadata service gives this instance is listened on (`listen` is {0})"
    )]
    NotReachable(SocketAddr),
    #[error("no address of `fleet.peers` is this host's: add it")]
    NotListed,
    #[error(
        "several addresses of `fleet.peers` are this host's ({0}): have `listen` name the one that is \
         this instance"
    )]
    Several(String),
}

/// All that is asked and told.
pub(super) struct Clients {
    pub autoscaling: Option<Autoscaling>,
    pub load_balancer: Option<LoadBalancer>,
    pub dns: Option<Dns>,
    pub prober: Prober,
}

impl Clients {
    /// Makes those that the settings need.
    pub async fn connect(settings: &FleetSettings, prober: Prober) -> Result<Self, ConnectError> {
        let route53 = settings
            .dns
            .as_ref()
            .is_some_and(|dns| matches!(dns.provider, DnsProvider::Route53 { .. }));
        let group = match &settings.members {
            Some(Members::Autoscaling(autoscaling)) => Some(autoscaling.group.as_str()),
            Some(Members::Static(_)) | None => None,
        };
        let needs_aws = route53 || group.is_some() || settings.load_balancer.is_some();
        let config = if needs_aws {
            Some(aws::config().await?)
        } else {
            None
        };
        let dns = match &settings.dns {
            Some(dns) => Some(Dns::new(dns, group_name(settings), config.as_ref()).await?),
            None => None,
        };
        let config = config.as_ref();
        let load_balancer = settings.load_balancer.as_ref();
        Ok(Self {
            autoscaling: group
                .zip(config)
                .map(|(name, config)| Autoscaling::new(config, name)),
            load_balancer: load_balancer
                .zip(config)
                .map(|(said, config)| LoadBalancer::new(config, &said.target_group)),
            dns,
            prober,
        })
    }
}

/// The group's name in the identifiers of records.
pub(super) fn group_name(settings: &FleetSettings) -> &str {
    match &settings.members {
        Some(Members::Autoscaling(autoscaling)) => &autoscaling.group,
        Some(Members::Static(_)) | None => "static",
    }
}

/// Which of the list this host is: the one that it listens on, or the one that it has.
pub(super) fn own_of(list: &[IpAddr], listen: SocketAddr) -> Result<Own, ConnectError> {
    let own = if list.contains(&listen.ip()) {
        listen.ip()
    } else {
        match list
            .iter()
            .filter(|address| is_here(**address))
            .collect::<Vec<_>>()[..]
        {
            [own] => *own,
            [] => return Err(ConnectError::NotListed),
            ref several => {
                let several: Vec<String> = several.iter().map(ToString::to_string).collect();
                return Err(ConnectError::Several(several.join(", ")));
            }
        }
    };
    Ok(Own {
        id: InstanceId::new(own.to_string()),
        addresses: vec![own],
    })
}

/// Whether this host has an address: then its kernel sends from it what goes to it. Netlink would
/// say so too, which the unit may not use, and a socket can be bound to any address where the system
/// is set up so (`ip_nonlocal_bind`).
fn is_here(address: IpAddr) -> bool {
    if address.is_loopback() {
        return true;
    }
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        // Sends nothing: it chooses a route, and with it an address.
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address)
}

/// Those of an instance's addresses that the registry listens on.
pub(super) fn reachable(addresses: Vec<IpAddr>, listen: SocketAddr) -> Vec<IpAddr> {
    let listens = |address: &IpAddr| match listen.ip() {
        IpAddr::V6(any) if any.is_unspecified() => true,
        any if any.is_unspecified() => address.is_ipv4(),
        one => one == *address,
    };
    addresses.into_iter().filter(listens).collect()
}

/// Looks for the planner.
pub(super) struct Observer {
    own: InstanceId,
    /// Where peers were seen to be; what is gone from the group is forgotten.
    addresses: BTreeMap<InstanceId, Vec<IpAddr>>,
    /// All targets, where they were looked at.
    targets: BTreeMap<InstanceId, TargetState>,
    random: fastrand::Rng,
}

impl Observer {
    pub fn new(own: InstanceId) -> Self {
        Self {
            own,
            addresses: BTreeMap::new(),
            targets: BTreeMap::new(),
            random: fastrand::Rng::new(),
        }
    }

    /// All targets, as far as they were looked at.
    pub fn targets(&self) -> &BTreeMap<InstanceId, TargetState> {
        &self.targets
    }

    /// Looks once.
    pub async fn look(
        &mut self,
        what: Look,
        facts: &mut Facts,
        settings: &FleetSettings,
        clients: &Clients,
        calls: &mut Calls,
    ) {
        let at = boot::now();
        match what {
            Look::Group => {
                if let Some(is) = self.group(settings, clients, calls).await {
                    let is = Arc::new(is);
                    self.forget(&is);
                    facts.group = Some(Seen { at, is });
                }
            }
            Look::Abandoned => {
                let Some(autoscaling) = &clients.autoscaling else {
                    facts.abandoned = Some(Seen { at, is: 0 });
                    return;
                };
                let asked = autoscaling.abandoned();
                if let Some(is) = calls.make("DescribeScalingActivities", asked).await {
                    facts.abandoned = Some(Seen { at, is });
                }
            }
            Look::OwnTarget => {
                let Some(load_balancer) = &clients.load_balancer else {
                    return;
                };
                let asked = load_balancer.own(&self.own);
                if let Some(is) = calls.make("DescribeTargetHealth", asked).await {
                    facts.own_target = Some(Seen { at, is });
                }
            }
            Look::OwnRecords => {
                let Some(dns) = &clients.dns else { return };
                let asked = dns.own_records(&self.own);
                if let Some(is) = calls.make("own records", asked).await {
                    facts.own_records = Some(Seen { at, is });
                }
            }
            Look::Records => self.records(facts, settings, clients, calls).await,
            Look::Peers => {
                if let Some(is) = self.peers(facts, settings, clients, calls).await {
                    facts.peers = Some(Seen { at, is });
                }
            }
        }
    }

    async fn group(
        &self,
        settings: &FleetSettings,
        clients: &Clients,
        calls: &mut Calls,
    ) -> Option<Group> {
        if let Some(Members::Static(list)) = &settings.members {
            return Some(Group::of_a_list(list));
        }
        let load_balancer = settings.load_balancer.as_ref();
        let target_group = load_balancer.map(|said| said.target_group.as_str());
        let asked = clients.autoscaling.as_ref()?.group(&self.own, target_group);
        calls.make("DescribeAutoScalingGroups", asked).await
    }

    fn forget(&mut self, group: &Group) {
        self.addresses
            .retain(|id, _| group.members.contains_key(id));
        self.targets.retain(|id, _| group.members.contains_key(id));
    }

    async fn records(
        &mut self,
        facts: &mut Facts,
        settings: &FleetSettings,
        clients: &Clients,
        calls: &mut Calls,
    ) {
        let at = boot::now();
        let Some(dns) = &clients.dns else { return };
        let Some(is) = calls.make("records", dns.records()).await else {
            return;
        };
        for record in &is.records {
            if let Some(owner) = record.owner(group_name(settings)) {
                self.addresses.insert(owner, record.addresses.clone());
            }
        }
        let is = Arc::new(is);
        facts.records = Some(Seen { at, is });
    }

    /// Peers are asked by themselves, where DNS or the list says where they are. Where neither does,
    /// the load balancer asks them all the time.
    async fn peers(
        &mut self,
        facts: &mut Facts,
        settings: &FleetSettings,
        clients: &Clients,
        calls: &mut Calls,
    ) -> Option<Peers> {
        let group = facts.group.as_ref().map(|seen| Arc::clone(&seen.is));
        if let Some(Members::Static(list)) = &settings.members {
            let asked = chosen(&self.own, group.as_deref(), None, &mut self.random);
            let all = list
                .iter()
                .map(|address| (InstanceId::new(address.to_string()), vec![*address]));
            return Some(clients.prober.ready(asked, &all.collect()).await);
        }
        if clients.dns.is_some() && facts.records.is_none() {
            self.records(facts, settings, clients, calls).await;
        }
        let records = facts.records.as_ref().map(|seen| &*seen.is);
        let records = records.map(|records| (records, group_name(settings)));
        let asked = chosen(&self.own, group.as_deref(), records, &mut self.random);
        let known = asked.iter().any(|id| self.addresses.contains_key(id));
        match &clients.load_balancer {
            Some(load_balancer) if !known => {
                let targets = load_balancer.targets(None);
                self.targets = calls.make("DescribeTargetHealth", targets).await?;
                let healthy = Some(&TargetState::Healthy);
                let ready = asked.iter().filter(|id| self.targets.get(*id) == healthy);
                let ready = ready.cloned().collect();
                Some(Peers { asked, ready })
            }
            _ => Some(clients.prober.ready(asked, &self.addresses).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_the_one_of_the_list_that_it_has_or_listens_on() {
        let list: Vec<IpAddr> = ["203.0.113.1", "127.0.0.9", "203.0.113.2"]
            .map(|it| it.parse().unwrap())
            .into();
        let any = "0.0.0.0:5000".parse().unwrap();
        let own = own_of(&list, any).unwrap();
        assert_eq!(own.id.as_str(), "127.0.0.9");
        assert_eq!(own.addresses, [list[1]]);
        let listens = own_of(&list, "203.0.113.2:5000".parse().unwrap()).unwrap();
        assert_eq!(listens.id.as_str(), "203.0.113.2");
        let error = own_of(&list[2..], any).unwrap_err();
        assert!(matches!(error, ConnectError::NotListed), "{error}");
        let two: Vec<IpAddr> = ["127.0.0.9", "127.0.0.8"]
            .map(|it| it.parse().unwrap())
            .into();
        let error = own_of(&two, any).unwrap_err().to_string();
        assert!(error.contains("127.0.0.9, 127.0.0.8"), "{error}");
    }

    #[test]
    fn only_where_it_listens_is_it_reached() {
        let all: Vec<IpAddr> = ["10.0.0.1", "2001:db8::1"]
            .map(|it| it.parse().unwrap())
            .into();
        for (listen, expected) in [
            ("[::]:5000", &all[..]),
            ("0.0.0.0:5000", &all[..1]),
            ("[2001:db8::1]:5000", &all[1..]),
            ("127.0.0.1:5000", &[]),
        ] {
            let reached = reachable(all.clone(), listen.parse().unwrap());
            assert_eq!(reached, expected, "{listen}");
        }
    }
}
