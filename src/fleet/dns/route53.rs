//! The fleet's name in Amazon Route 53.
//!
//! Ownership is the set identifier. A name whose records have one can't also have records without,
//! and Route 53 refuses what would mix them: so a record that somebody else has put under the name
//! is never overwritten, and says so in the error.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aws_sdk_route53::Client;
use aws_sdk_route53::config::retry::RetryConfig;
use aws_sdk_route53::config::timeout::TimeoutConfig;
use aws_sdk_route53::config::{Builder, Region};
use aws_sdk_route53::types::{
    AliasTarget, Change, ChangeAction, ChangeBatch, ChangeStatus, ResourceRecord,
    ResourceRecordSet, RrType,
};
use tokio::time::Instant;

use self::error::{Asker, is_not_so};
use super::{DnsError, check_ours, check_own, identifier, shared_identifier};
use crate::config::{AliasTarget as Balancer, DnsPolicy};
use crate::fleet::facts::{InstanceId, OwnRecords, Record, Records, Routing};

mod error;

/// To accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// For one request: those for changes have been seen to take seconds when many are made.
const OPERATION: Duration = Duration::from_secs(20);
/// Record sets in one answer; Route 53 gives no more.
const PAGE: i32 = 300;
/// Pages of one listing. A zone has 10,000 record sets unless Amazon allows more.
const MOST_PAGES: usize = 200;
/// So long a change needs at most, usually, until all servers answer so.
const PROPAGATION: Duration = Duration::from_mins(1);

/// The name, and who asks for it.
#[derive(Debug)]
pub(super) struct Route53 {
    client: Client,
    zone: String,
    /// In lower case, without a dot at its end.
    name: String,
    group: String,
    balancer: Option<Balancer>,
    since: Instant,
    known: Mutex<Known>,
}

/// What one call leaves to the next.
#[derive(Debug, Default)]
struct Known {
    /// The identifier of this instance's records.
    identifier: Option<String>,
    /// This instance's records as they were seen last, unless they were changed since.
    own: Option<Vec<Record>>,
    /// The last change of them, if it was not seen everywhere yet.
    change: Option<String>,
}

/// Where a listing begins.
#[derive(Debug, Clone, PartialEq)]
struct Place {
    name: String,
    kind: Option<RrType>,
    identifier: Option<String>,
}

impl Route53 {
    pub(super) fn new(
        aws: &aws_config::SdkConfig,
        zone: &str,
        name: &str,
        group: &str,
        policy: &DnsPolicy,
    ) -> Self {
        let mut config = Builder::from(aws)
            // The plan repeats, at the pace of the whole fleet.
            .retry_config(RetryConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT)
                    .operation_timeout(OPERATION)
                    .build(),
            );
        if aws.region().is_none() {
            // It is the same everywhere.
            config = config.region(Region::from_static("us-east-1"));
        }
        let balancer = match policy {
            DnsPolicy::Alias(balancer) => Some(balancer.clone()),
            DnsPolicy::Multivalue | DnsPolicy::Weighted => None,
        };
        Self {
            client: Client::from_conf(config.build()),
            zone: zone.to_owned(),
            name: name.to_owned(),
            group: group.to_owned(),
            balancer,
            since: Instant::now(),
            known: Mutex::default(),
        }
    }

    pub(super) async fn own_records(&self, own: &InstanceId) -> Result<OwnRecords, DnsError> {
        let identifier = self.identifier(own);
        let change = {
            let mut known = self.known();
            known.identifier = Some(identifier.clone());
            known.change.clone()
        };
        let sets = self.sets_of(&identifier).await?;
        let records = match &self.balancer {
            Some(balancer) => Self::shared_record(balancer, &sets),
            None => sets.iter().map(Self::record).collect(),
        };
        self.known().own = Some(records.clone());
        let in_sync = match change {
            Some(change) => self.is_everywhere(&change).await?,
            // What this process has not changed was changed before; if that was a deletion, and
            // a moment ago, some servers may not know yet.
            None => !records.is_empty() || self.since.elapsed() >= PROPAGATION,
        };
        Ok(OwnRecords { records, in_sync })
    }

    pub(super) async fn records(&self) -> Result<Records, DnsError> {
        let mut records = Vec::new();
        let mut next = Some(Place {
            name: self.name.clone(),
            kind: None,
            identifier: None,
        });
        for _ in 0..MOST_PAGES {
            let Some(place) = next else { break };
            let (sets, following) = self.page(&place, PAGE).await?;
            records.extend(sets.iter().map(Self::record));
            if following.as_ref() == Some(&place) {
                let what = self.what("listing");
                let message = "the next page is the same one".to_owned();
                return Err(DnsError::Status {
                    what,
                    code: "IsTruncated".to_owned(),
                    message,
                });
            }
            next = following;
        }
        Ok(Records {
            records,
            complete: next.is_none(),
        })
    }

    pub(super) async fn write_own(
        &self,
        own: &InstanceId,
        records: &[Record],
    ) -> Result<(), DnsError> {
        let what = self.what("UPSERT");
        check_own(&what, &self.group, own, records)?;
        let known = self.known().own.clone();
        let before = match known {
            Some(before) => before,
            None => self.own_records(own).await?.records,
        };
        let mut changes = Vec::new();
        // Of a family that is no more, or of another policy, which no UPSERT changes.
        for old in before.iter().filter(|old| old.routing != Routing::Other) {
            let stays = |new: &Record| kind(new) == kind(old) && new.routing == old.routing;
            if old.target.is_none() && !records.iter().any(stays) {
                changes.push((ChangeAction::Delete, self.set(&what, old)?));
            }
        }
        for record in records {
            match (&record.target, &self.balancer) {
                (Some(target), Some(balancer)) if *target == balancer.name => {
                    let sets = self.aliases(&what, balancer)?;
                    changes.extend(sets.into_iter().map(|set| (ChangeAction::Upsert, set)));
                }
                (None, None) => changes.push((ChangeAction::Upsert, self.set(&what, record)?)),
                _ => {
                    let reason = "the record is not of the policy that is configured".to_owned();
                    return Err(DnsError::Foreign { what, reason });
                }
            }
        }
        // What is known of them counts no more, whatever comes of this.
        self.known().own = None;
        let change = self.change(&what, changes).await?;
        let mut known = self.known();
        known.identifier = Some(self.identifier(own));
        known.change = Some(change);
        Ok(())
    }

    pub(super) async fn delete(&self, record: &Record) -> Result<(), DnsError> {
        let what = self.what("DELETE");
        check_ours(&what, &self.group, record)?;
        let set = self.set(&what, record)?;
        let own = self.known().identifier == record.identifier;
        if own {
            self.known().own = None;
        }
        match self.change(&what, vec![(ChangeAction::Delete, set)]).await {
            Ok(change) if own => self.known().change = Some(change),
            Ok(_) => {}
            Err(error) if is_not_so(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn identifier(&self, own: &InstanceId) -> String {
        match self.balancer {
            Some(_) => shared_identifier(&self.group),
            None => identifier(&self.group, own),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn what(&self, request: &str) -> String {
        let (name, zone) = (&self.name, &self.zone);
        format!("Route 53's {request} of {name} in the zone {zone}")
    }

    /// The record sets with an identifier, A and AAAA: in one request where all of type A that come
    /// behind it fit into the answer.
    async fn sets_of(&self, identifier: &str) -> Result<Vec<ResourceRecordSet>, DnsError> {
        let place = |kind: RrType| Place {
            name: self.name.clone(),
            kind: Some(kind),
            identifier: Some(identifier.to_owned()),
        };
        let is_it = |set: &ResourceRecordSet| set.set_identifier() == Some(identifier);
        let (mut sets, next) = self.page(&place(RrType::A), PAGE).await?;
        sets.retain(is_it);
        if next.is_some() && !sets.iter().any(|set| set.r#type == RrType::Aaaa) {
            let (mut more, _) = self.page(&place(RrType::Aaaa), 1).await?;
            more.retain(is_it);
            sets.extend(more);
        }
        Ok(sets)
    }

    /// The address records of the name on one page, and where the next page begins, if the name goes
    /// on there. A listing goes on with whatever name is next in the zone, which is not ours.
    async fn page(
        &self,
        place: &Place,
        most: i32,
    ) -> Result<(Vec<ResourceRecordSet>, Option<Place>), DnsError> {
        let what = self.what("listing");
        let request = self.client.list_resource_record_sets();
        let page = request
            .hosted_zone_id(&self.zone)
            .start_record_name(&place.name)
            .set_start_record_type(place.kind.clone())
            .set_start_record_identifier(place.identifier.clone())
            .max_items(most)
            .send()
            .await
            .map_err(|error| Asker::new(&what, "route53:ListResourceRecordSets").error(&error))?;
        let next = page.next_record_name.filter(|_| page.is_truncated);
        let next = next.map(|name| Place {
            name,
            kind: page.next_record_type,
            identifier: page.next_record_identifier,
        });
        let is_ours = |set: &ResourceRecordSet| {
            self.is_the_name(&set.name) && matches!(set.r#type, RrType::A | RrType::Aaaa)
        };
        let mut sets = page.resource_record_sets;
        sets.retain(is_ours);
        Ok((sets, next.filter(|next| self.is_the_name(&next.name))))
    }

    fn is_the_name(&self, listed: &str) -> bool {
        plain(listed).eq_ignore_ascii_case(&self.name)
    }

    /// One batch, all of it or nothing; the id of the change.
    async fn change(
        &self,
        what: &str,
        changes: Vec<(ChangeAction, ResourceRecordSet)>,
    ) -> Result<String, DnsError> {
        let mut batch = ChangeBatch::builder();
        for (action, set) in changes {
            let change = Change::builder().action(action).resource_record_set(set);
            batch = batch.changes(change.build().map_err(|error| invalid(what, &error))?);
        }
        let batch = batch.build().map_err(|error| invalid(what, &error))?;
        let request = self.client.change_resource_record_sets();
        let answer = request
            .hosted_zone_id(&self.zone)
            .change_batch(batch)
            .send()
            .await
            .map_err(|error| Asker::new(what, "route53:ChangeResourceRecordSets").error(&error))?;
        let change = answer.change_info.map(|info| info.id);
        change.ok_or_else(|| DnsError::Status {
            what: what.to_owned(),
            code: "200".to_owned(),
            message: "the answer names no change".to_owned(),
        })
    }

    /// Whether all servers answer by a change.
    async fn is_everywhere(&self, change: &str) -> Result<bool, DnsError> {
        let what = format!("{} ({change})", self.what("GetChange"));
        let request = self.client.get_change().id(change);
        let answer = request
            .send()
            .await
            .map_err(|error| Asker::new(&what, "route53:GetChange").error(&error))?;
        let status = answer.change_info.map(|info| info.status);
        let everywhere = status == Some(ChangeStatus::Insync);
        let mut known = self.known();
        if everywhere && known.change.as_deref() == Some(change) {
            known.change = None;
        }
        Ok(everywhere)
    }

    fn record(set: &ResourceRecordSet) -> Record {
        let routing = match (set.weight, set.multi_value_answer, &set.set_identifier) {
            (Some(weight), ..) => u8::try_from(weight).map_or(Routing::Other, Routing::Weighted),
            (None, Some(true), _) => Routing::Multivalue,
            (None, _, None) => Routing::Plain,
            (None, _, Some(_)) => Routing::Other,
        };
        let values = set.resource_records().iter();
        let ttl = u64::try_from(set.ttl.unwrap_or_default()).unwrap_or_default();
        let target = set.alias_target.as_ref();
        Record {
            identifier: set.set_identifier.clone(),
            addresses: values.filter_map(|one| one.value.parse().ok()).collect(),
            target: target.map(|target| plain(&target.dns_name).to_ascii_lowercase()),
            ttl: Duration::from_secs(ttl),
            routing,
            health_check: set.health_check_id.clone(),
        }
    }

    /// The one record that leads to the load balancer, if it is there in all its types.
    fn shared_record(balancer: &Balancer, sets: &[ResourceRecordSet]) -> Vec<Record> {
        let mut records = sets.iter().map(Self::record);
        let Some(first) = records.next() else {
            return Vec::new();
        };
        let whole = sets.len() == kinds(balancer).len() && records.all(|record| record == first);
        if whole { vec![first] } else { Vec::new() }
    }

    /// The record sets that lead to the load balancer. That it is well is not looked at: a name that
    /// leads to it is better than none.
    fn aliases(&self, what: &str, balancer: &Balancer) -> Result<Vec<ResourceRecordSet>, DnsError> {
        let target = AliasTarget::builder()
            .dns_name(&balancer.name)
            .hosted_zone_id(&balancer.zone)
            .evaluate_target_health(false)
            .build()
            .map_err(|error| invalid(what, &error))?;
        let sets = kinds(balancer).iter().map(|kind| {
            ResourceRecordSet::builder()
                .name(&self.name)
                .r#type(kind.clone())
                .set_identifier(shared_identifier(&self.group))
                .weight(1)
                .alias_target(target.clone())
                .build()
                .map_err(|error| invalid(what, &error))
        });
        sets.collect()
    }

    /// The record set of a record with addresses, with everything that a DELETE has to name.
    fn set(&self, what: &str, record: &Record) -> Result<ResourceRecordSet, DnsError> {
        let (weight, multivalue) = match record.routing {
            Routing::Multivalue => (None, Some(true)),
            Routing::Weighted(weight) => (Some(i64::from(weight)), None),
            Routing::Plain | Routing::Other => {
                let reason = format!(
                    "the record {} has a routing policy that is not ours: somebody has changed it \
                     by hand; delete it by hand",
                    record.identifier.as_deref().unwrap_or_default()
                );
                let what = what.to_owned();
                return Err(DnsError::Foreign { what, reason });
            }
        };
        let mut set = ResourceRecordSet::builder()
            .name(&self.name)
            .r#type(kind(record))
            .set_set_identifier(record.identifier.clone())
            .ttl(i64::try_from(record.ttl.as_secs()).unwrap_or(i64::MAX))
            .set_weight(weight)
            .set_multi_value_answer(multivalue)
            .set_health_check_id(record.health_check.clone());
        for address in &record.addresses {
            let value = ResourceRecord::builder().value(address.to_string());
            set = set.resource_records(value.build().map_err(|error| invalid(what, &error))?);
        }
        set.build().map_err(|error| invalid(what, &error))
    }
}

/// The types of an alias: Amazon gives a load balancer with IPv6 addresses a second name.
fn kinds(balancer: &Balancer) -> &'static [RrType] {
    if balancer.name.starts_with("dualstack.") {
        &[RrType::A, RrType::Aaaa]
    } else {
        &[RrType::A]
    }
}

fn kind(record: &Record) -> RrType {
    match record.addresses.first() {
        Some(IpAddr::V6(_)) => RrType::Aaaa,
        Some(IpAddr::V4(_)) | None => RrType::A,
    }
}

/// A name without the dot at its end.
fn plain(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

fn invalid(what: &str, error: &dyn std::error::Error) -> DnsError {
    DnsError::Status {
        what: what.to_owned(),
        code: "not sent".to_owned(),
        message: error.to_string(),
    }
}
