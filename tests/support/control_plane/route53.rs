//! Route 53: hosted zones, changed by whole batches, which its servers know a while later.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use roxmltree::{Document, Node};

use super::wire::{ApiError, Params};
use super::world::{Rest, World};
use super::xml::{child, date, leaf, leaf_of, node, text_of};

mod batch;

use batch::{apply, read_change};

/// The most record sets of a listing's page.
const LARGEST_PAGE: usize = 300;

/// How a record set is chosen among others of its name and type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    Simple,
    Weighted(u8),
    Multivalue,
    /// Another one, by the element that says so, which this control plane only keeps.
    Other(String, String),
}

/// Where an alias leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    pub zone: String,
    pub name: String,
    pub evaluates: bool,
}

/// A resource record set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordSet {
    /// In lower case, with the dot at its end.
    pub name: String,
    pub kind: String,
    pub identifier: Option<String>,
    pub policy: Policy,
    /// Seconds.
    pub ttl: Option<u64>,
    /// Their order means nothing.
    pub values: Vec<String>,
    pub alias: Option<Alias>,
    pub health_check: Option<String>,
}

/// A batch that was accepted.
#[derive(Debug, Clone)]
pub struct Change {
    pub id: String,
    pub submitted: Duration,
    /// When all servers know it.
    pub in_sync: Duration,
    pub comment: Option<String>,
}

/// A hosted zone.
#[derive(Debug, Clone)]
pub struct Zone {
    pub id: String,
    /// With the dot at its end.
    pub name: String,
    pub records: Vec<RecordSet>,
    pub changes: Vec<Change>,
    /// What all servers know, and since when.
    served: Vec<(Duration, Vec<RecordSet>)>,
}

impl Zone {
    pub fn new(id: &str, name: &str) -> Self {
        let set = |kind: &str, ttl, values: &[&str]| RecordSet {
            name: absolute(name),
            kind: kind.to_owned(),
            identifier: None,
            policy: Policy::Simple,
            ttl: Some(ttl),
            values: values.iter().map(|&it| it.to_owned()).collect(),
            alias: None,
            health_check: None,
        };
        let soa = "ns-1.awsdns-1.com. awsdns-hostmaster.amazon.com. 1 7200 900 1209600 86400";
        let servers = ["ns-1.awsdns-1.com.", "ns-2.awsdns-2.net."];
        let records = vec![set("NS", 172_800, &servers), set("SOA", 900, &[soa])];
        Self {
            id: id.to_owned(),
            name: absolute(name),
            served: vec![(Duration::ZERO, records.clone())],
            records,
            changes: Vec::new(),
        }
    }

    /// What every server answers for a name and type at this moment, with the TTL: all record sets,
    /// whichever of them an answer would have.
    pub fn answers(&self, name: &str, kind: &str, now: Duration) -> Vec<(IpAddr, u32)> {
        let wanted = self.served(name, now).filter(|it| it.kind == kind);
        let addresses = wanted.flat_map(|set| {
            let ttl = u32::try_from(set.ttl.unwrap_or(60)).unwrap_or(u32::MAX);
            set.values.iter().map(move |value| (value.parse(), ttl))
        });
        addresses
            .filter_map(|(address, ttl)| Some((address.ok()?, ttl)))
            .collect()
    }

    /// Whether there is anything of that name.
    pub fn knows(&self, name: &str, now: Duration) -> bool {
        self.served(name, now).next().is_some()
    }

    fn served(&self, name: &str, now: Duration) -> impl Iterator<Item = &RecordSet> {
        let known = self.served.iter().rev().find(|(at, _)| *at <= now);
        let name = absolute(name);
        let records = known.into_iter().flat_map(|(_, records)| records);
        records.filter(move |it| it.name == name)
    }

    fn commit(
        &mut self,
        records: Vec<RecordSet>,
        comment: Option<String>,
        rest: &mut Rest,
    ) -> &Change {
        let id = format!("C{}", rest.uuid().replace('-', "").to_uppercase());
        // In the order in which they were made.
        let last = self.changes.last().map_or(Duration::ZERO, |it| it.in_sync);
        let in_sync = last.max(rest.now + rest.propagation);
        self.served.push((in_sync, records.clone()));
        self.records = records;
        self.changes.push(Change {
            id,
            submitted: rest.now,
            in_sync,
            comment,
        });
        self.changes.last().expect("it was pushed just now")
    }
}

/// A name in lower case, with the dot at its end.
fn absolute(name: &str) -> String {
    let name = name.to_lowercase();
    if name.ends_with('.') {
        name
    } else {
        name + "."
    }
}

/// Names are sorted by their labels from the end.
fn order(set: &RecordSet) -> (Vec<String>, String, String) {
    (
        labels(&set.name),
        set.kind.clone(),
        set.identifier.clone().unwrap_or_default(),
    )
}

fn labels(name: &str) -> Vec<String> {
    absolute(name)
        .trim_end_matches('.')
        .rsplit('.')
        .map(str::to_owned)
        .collect()
}

fn invalid_input(message: impl Into<String>) -> ApiError {
    ApiError::new(400, "InvalidInput", message)
}

/// Answers a call: the operation's name, and what is in its answer.
pub fn answer(
    world: &mut World,
    method: &str,
    path: &str,
    query: &str,
    body: &str,
) -> (&'static str, Result<String, ApiError>) {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match (method, parts.as_slice()) {
        ("POST", ["2013-04-01", "hostedzone", zone, "rrset"]) => {
            ("ChangeResourceRecordSets", change(world, zone, body))
        }
        ("GET", ["2013-04-01", "hostedzone", zone, "rrset"]) => {
            let query = Params::parse(query.as_bytes());
            ("ListResourceRecordSets", list(world, zone, &query))
        }
        ("GET", ["2013-04-01", "change", id]) => ("GetChange", get_change(world, id)),
        _ => {
            let what = format!("Could not find resource for {method} {path}");
            (
                "",
                Err(ApiError::new(404, "UnknownOperationException", what)),
            )
        }
    }
}

fn zone<'a>(zones: &'a mut BTreeMap<String, Zone>, id: &str) -> Result<&'a mut Zone, ApiError> {
    zones.get_mut(id).ok_or_else(|| {
        ApiError::new(
            404,
            "NoSuchHostedZone",
            format!("No hosted zone found with ID: {id}"),
        )
    })
}

fn describe_change(rest: &Rest, change: &Change) -> String {
    let status = if rest.now < change.in_sync {
        "PENDING"
    } else {
        "INSYNC"
    };
    let inner = leaf("Id", format!("/change/{}", change.id))
        + &leaf("Status", status)
        + &leaf("SubmittedAt", date(rest.origin, change.submitted))
        + &leaf_of("Comment", change.comment.as_ref());
    node("ChangeInfo", inner)
}

fn get_change(world: &mut World, id: &str) -> Result<String, ApiError> {
    let mut changes = world.rest.zones.values().flat_map(|zone| &zone.changes);
    let found = changes.find(|change| change.id == id);
    let none = || {
        let what = format!("A change with the specified change ID {id} does not exist.");
        ApiError::new(404, "NoSuchChange", what)
    };
    found
        .map(|change| describe_change(&world.rest, change))
        .ok_or_else(none)
}

fn change(world: &mut World, id: &str, body: &str) -> Result<String, ApiError> {
    let malformed = |what: String| ApiError::new(400, "MalformedInput", what);
    let document = Document::parse(body).map_err(|error| malformed(error.to_string()))?;
    let root = document.root_element();
    if root.tag_name().name() != "ChangeResourceRecordSetsRequest" {
        return Err(malformed(
            "ChangeBatch is not valid, expected ChangeResourceRecordSetsRequest".to_owned(),
        ));
    }
    let batch = child(root, "ChangeBatch").ok_or_else(|| malformed("no ChangeBatch".to_owned()))?;
    let changes = child(batch, "Changes").map(|it| it.children().filter(Node::is_element));
    let changes: Vec<(&str, RecordSet)> = changes
        .into_iter()
        .flatten()
        .map(read_change)
        .collect::<Result<_, _>>()?;
    let comment = text_of(batch, "Comment").map(str::to_owned);
    let mut zones = std::mem::take(&mut world.rest.zones);
    let result = zone(&mut zones, id).and_then(|zone| {
        let records = apply(zone, &changes)?;
        let change = zone.commit(records, comment, &mut world.rest).clone();
        Ok(describe_change(&world.rest, &change))
    });
    world.rest.zones = zones;
    result
}

fn list(world: &mut World, id: &str, query: &Params) -> Result<String, ApiError> {
    let most = match query.get("maxitems") {
        Some(text) => text
            .parse()
            .map_err(|_| invalid_input(format!("maxitems {text} is not a number")))?,
        None => LARGEST_PAGE,
    };
    let [name, kind, identifier] = ["name", "type", "identifier"].map(|it| query.get(it));
    if kind.is_some() && name.is_none() || identifier.is_some() && kind.is_none() {
        let what = "The input is not valid: a type goes with a name, an identifier with a type";
        return Err(invalid_input(what));
    }
    let zone = zone(&mut world.rest.zones, id)?;
    let mut records = zone.records.clone();
    records.sort_by_key(order);
    if let Some(name) = name {
        let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
        let from = (labels(name), text(kind), text(identifier));
        records.retain(|set| order(set) >= from);
    }
    let most = most.min(LARGEST_PAGE);
    let next = records.get(most);
    let next = [
        leaf("IsTruncated", next.is_some()),
        leaf_of("NextRecordName", next.map(|it| &it.name)),
        leaf_of("NextRecordType", next.map(|it| &it.kind)),
        leaf_of(
            "NextRecordIdentifier",
            next.and_then(|it| it.identifier.as_ref()),
        ),
        leaf("MaxItems", most),
    ];
    let described: String = records.iter().take(most).map(describe).collect();
    Ok(node("ResourceRecordSets", described) + &next.concat())
}

fn describe(set: &RecordSet) -> String {
    let policy = match &set.policy {
        Policy::Simple => String::new(),
        Policy::Weighted(weight) => leaf("Weight", weight),
        Policy::Multivalue => leaf("MultiValueAnswer", true),
        Policy::Other(element, value) => leaf(element, value),
    };
    let values: String = set
        .values
        .iter()
        .map(|it| node("ResourceRecord", leaf("Value", it)))
        .collect();
    let alias = set.alias.as_ref().map(|alias| {
        let inner = leaf("HostedZoneId", &alias.zone)
            + &leaf("DNSName", &alias.name)
            + &leaf("EvaluateTargetHealth", alias.evaluates);
        node("AliasTarget", inner)
    });
    let inner = [
        leaf("Name", &set.name),
        leaf("Type", &set.kind),
        leaf_of("SetIdentifier", set.identifier.as_ref()),
        policy,
        leaf_of("TTL", set.ttl),
        if set.values.is_empty() {
            String::new()
        } else {
            node("ResourceRecords", values)
        },
        alias.unwrap_or_default(),
        leaf_of("HealthCheckId", set.health_check.as_ref()),
    ];
    node("ResourceRecordSet", inner.concat())
}
