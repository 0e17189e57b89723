//! A batch of changes: read, found to be right, and made as a whole.

use std::net::{Ipv4Addr, Ipv6Addr};

use roxmltree::Node;

use super::super::wire::ApiError;
use super::super::xml::{child, text_of};
use super::{Alias, Policy, RecordSet, Zone, absolute, invalid_input};

/// The most changes of a batch; an UPSERT counts as two.
const LARGEST_BATCH: usize = 1000;

pub(super) fn read_change<'a>(change: Node<'a, '_>) -> Result<(&'a str, RecordSet), ApiError> {
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
pub(super) fn apply(
    zone: &Zone,
    changes: &[(&str, RecordSet)],
) -> Result<Vec<RecordSet>, ApiError> {
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
