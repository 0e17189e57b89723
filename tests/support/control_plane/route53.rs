//! Route 53: hosted zones, changed by whole batches, which its servers know a while later.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use roxmltree::{Document, Node};

use super::wire::{ApiError, Params};
use super::world::{Rest, World};
use super::xml::{child, date, leaf, leaf_of, node, text_of};

/// The most changes of a batch; an UPSERT counts as two.
const LARGEST_BATCH: usize = 1000;
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

    /// What every server answers for a name and type at this moment: all record sets, whichever of
    /// them an answer would have.
    pub fn answers(&self, name: &str, kind: &str, now: Duration) -> Vec<IpAddr> {
        let known = self.served.iter().rev().find(|(at, _)| *at <= now);
        let records = known.into_iter().flat_map(|(_, records)| records);
        let wanted = records.filter(|it| it.name == absolute(name) && it.kind == kind);
        wanted
            .flat_map(|it| &it.values)
            .filter_map(|it| it.parse().ok())
            .collect()
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

fn read_change<'a>(change: Node<'a, '_>) -> Result<(&'a str, RecordSet), ApiError> {
    let action = text_of(change, "Action").unwrap_or_default();
    if !["CREATE", "DELETE", "UPSERT"].contains(&action) {
        let what = format!(
            "Value '{action}' at 'changeBatch.changes.1.member.action' failed to satisfy constraint: Member must satisfy enum value set: [CREATE, DELETE, UPSERT]"
        );
        return Err(invalid_input(what));
    }
    let set = child(change, "ResourceRecordSet").map(|it| read_set(action, it));
    let set = set.ok_or_else(|| invalid_input("no ResourceRecordSet"))??;
    Ok((action, set))
}

fn read_set(action: &str, set: Node<'_, '_>) -> Result<RecordSet, ApiError> {
    let text = |name: &str| text_of(set, name).map(str::to_owned);
    let (name, kind) = (
        text("Name").unwrap_or_default(),
        text("Type").unwrap_or_default(),
    );
    let identifier = text("SetIdentifier");
    let change = format!(
        "[Action={action}, Name={}, Type={kind}, SetIdentifier={}]",
        absolute(&name),
        identifier.as_deref().unwrap_or("null")
    );
    let number = |name: &str| {
        let parse = |text: String| {
            let wrong = |_| invalid_input(format!("{name} {text} is not a number"));
            text.parse::<u64>().map_err(wrong)
        };
        text(name).map(parse).transpose()
    };
    let mut policies = Vec::new();
    if let Some(weight) = number("Weight")? {
        let weight = u8::try_from(weight);
        let weight = weight.map_err(|_| invalid_input("Weight must be between 0 and 255"))?;
        policies.push(Policy::Weighted(weight));
    }
    if text("MultiValueAnswer").as_deref() == Some("true") {
        policies.push(Policy::Multivalue);
    }
    for element in ["Region", "Failover"] {
        policies.extend(text(element).map(|it| Policy::Other(element.to_owned(), it)));
    }
    if policies.len() > 1 || policies.is_empty() && identifier.is_some() {
        let found = if policies.is_empty() {
            "none"
        } else {
            "more than one"
        };
        return Err(invalid_input(format!(
            "Invalid request: Expected exactly one of [Weight, Region, Failover, GeoLocation, \
             GeoProximityLocation, or MultiValueAnswer], but found {found} in Change with {change}"
        )));
    }
    if !policies.is_empty() && identifier.is_none() {
        let what =
            format!("Invalid request: Missing field 'SetIdentifier' in Change with {change}");
        return Err(invalid_input(what));
    }
    if identifier
        .as_ref()
        .is_some_and(|it| it.is_empty() || it.len() > 128)
    {
        return Err(invalid_input(
            "SetIdentifier must have from 1 to 128 characters",
        ));
    }
    let alias = child(set, "AliasTarget").map(|alias| Alias {
        zone: text_of(alias, "HostedZoneId")
            .unwrap_or_default()
            .to_owned(),
        name: absolute(text_of(alias, "DNSName").unwrap_or_default()),
        evaluates: text_of(alias, "EvaluateTargetHealth") == Some("true"),
    });
    let records = child(set, "ResourceRecords").into_iter();
    let records = records.flat_map(|it| it.children().filter(Node::is_element));
    let values: Vec<String> = records
        .filter_map(|record| text_of(record, "Value"))
        .map(str::to_owned)
        .collect();
    let ttl = number("TTL")?;
    if alias.is_some() == (ttl.is_some() || !values.is_empty())
        || alias.is_none() && (ttl.is_none() || values.is_empty())
    {
        let found = if alias.is_some() {
            "more than one"
        } else {
            "none"
        };
        return Err(invalid_input(format!(
            "Invalid request: Expected exactly one of [AliasTarget, all of [TTL, and \
             ResourceRecords], or TrafficPolicyInstanceId], but found {found} in Change with {change}"
        )));
    }
    let policy = policies.pop().unwrap_or(Policy::Simple);
    if alias.is_some() && policy == Policy::Multivalue {
        let what = format!(
            "Invalid request: MultiValueAnswer is not allowed with AliasTarget in Change with {change}"
        );
        return Err(invalid_input(what));
    }
    Ok(RecordSet {
        name: absolute(&name),
        kind,
        identifier,
        policy,
        ttl,
        values,
        alias,
        health_check: text("HealthCheckId"),
    })
}

/// The same record set, whatever is in it.
fn same(one: &RecordSet, other: &RecordSet) -> bool {
    one.name == other.name && one.kind == other.kind && one.identifier == other.identifier
}

fn equal(one: &RecordSet, other: &RecordSet) -> bool {
    let sorted = |set: &RecordSet| {
        let mut set = set.clone();
        set.values.sort();
        set
    };
    sorted(one) == sorted(other)
}

/// The zone after the batch, or everything that is wrong with it.
fn apply(zone: &Zone, changes: &[(&str, RecordSet)]) -> Result<Vec<RecordSet>, ApiError> {
    let weight = |action: &str| if action == "UPSERT" { 2 } else { 1 };
    let size: usize = changes.iter().map(|(action, _)| weight(action)).sum();
    let refuse = |what: String| Err(ApiError::new(400, "InvalidChangeBatch", what));
    if size == 0 {
        return refuse(
            "[The request contains an invalid set of changes for a resource record set]".to_owned(),
        );
    }
    if size > LARGEST_BATCH {
        return refuse(format!(
            "[Number of records limit of {LARGEST_BATCH} exceeded.]"
        ));
    }
    let (mut records, mut wrong) = (zone.records.clone(), Vec::new());
    for (action, set) in changes {
        let by = set
            .identifier
            .as_ref()
            .map(|it| format!(", set identifier='{it}'"));
        let called = format!(
            "[name='{}', type='{}'{}]",
            set.name,
            set.kind,
            by.unwrap_or_default()
        );
        let there = records.iter().position(|it| same(it, set));
        match (*action, there) {
            ("CREATE", Some(_)) => {
                wrong.push(format!(
                    "Tried to create resource record set {called} but it already exists"
                ));
            }
            ("DELETE", None) => {
                wrong.push(format!(
                    "Tried to delete resource record set {called} but it was not found"
                ));
            }
            ("DELETE", Some(at)) if !equal(&records[at], set) => wrong.push(format!(
                "Tried to delete resource record set {called} but the values provided do not match \
                 the current values"
            )),
            ("DELETE", Some(at)) => {
                records.remove(at);
            }
            (_, there) => {
                if let Some(at) = there {
                    records.remove(at);
                }
                wrong.extend(conflict(zone, &records, set));
                records.push(set.clone());
            }
        }
    }
    if !wrong.is_empty() {
        return refuse(format!("[{}]", wrong.join(", ")));
    }
    Ok(records)
}

/// Why a record set can't be among the others.
fn conflict(zone: &Zone, others: &[RecordSet], set: &RecordSet) -> Option<String> {
    let RecordSet { name, kind, .. } = set;
    if *name != zone.name && !name.ends_with(&format!(".{}", zone.name)) {
        return Some(format!(
            "RRSet with DNS name {name} is not permitted in zone {}",
            zone.name
        ));
    }
    let mut of_name = others.iter().filter(|it| it.name == *name);
    if kind == "CNAME" && of_name.clone().any(|it| it.kind != "CNAME") {
        return Some(format!(
            "RRSet of type CNAME with DNS name {name} is not permitted as it conflicts with other \
             records with the same DNS name in zone {}",
            zone.name
        ));
    }
    if kind != "CNAME" && of_name.any(|it| it.kind == "CNAME") {
        return Some(format!(
            "RRSet of type {kind} with DNS name {name} is not permitted because a conflicting RRSet \
             of type CNAME with the same DNS name already exists in zone {}",
            zone.name
        ));
    }
    for value in &set.values {
        let problem = match kind.as_str() {
            "A" if value.parse::<Ipv4Addr>().is_err() => {
                "ARRDATAIllegalIPv4Address (Value is not a valid IPv4 address)"
            }
            "AAAA" if value.parse::<Ipv6Addr>().is_err() => {
                "AAAARRDATAIllegalIPv6Address (Value is not a valid IPv6 address)"
            }
            _ => continue,
        };
        return Some(format!(
            "Invalid Resource Record: 'FATAL problem: {problem} encountered with '{value}''"
        ));
    }
    let word = |policy: &Policy| match policy {
        Policy::Simple => "simple",
        Policy::Weighted(_) => "weighted",
        Policy::Multivalue => "multivalue answer",
        Policy::Other(..) => "other",
    };
    let mut beside = others
        .iter()
        .filter(|it| it.name == *name && it.kind == *kind);
    let identifier = set.identifier.as_deref().unwrap_or("null");
    beside.find(|it| word(&it.policy) != word(&set.policy)).map(|_| {
        format!(
            "RRSet with DNS name {name}, type {kind}, SetIdentifier {identifier} cannot be created \
             because a non {} rrset exists with the same name and type.",
            word(&set.policy)
        )
    })
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
