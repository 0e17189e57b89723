//! Route 53: strict batches, pages, and changes that are known a while later.

use std::time::Duration;

use aws_sdk_route53::types::{
    AliasTarget, Change, ChangeAction, ChangeBatch, ChangeStatus, ResourceRecord,
    ResourceRecordSet, RrType,
};

use crate::clients::Clients;
use crate::control_plane::ControlPlane;

pub const ZONE: &str = "Z0123456789";
pub const NAME: &str = "registry.example.org.";

fn zone() -> (ControlPlane, Clients) {
    let plane = ControlPlane::start();
    plane.add_zone(ZONE, "example.org");
    let clients = Clients::new(&plane.url());
    (plane, clients)
}

/// A record set of one address.
pub fn set(identifier: Option<&str>, address: &str) -> ResourceRecordSet {
    let record = ResourceRecord::builder().value(address).build().unwrap();
    let set = ResourceRecordSet::builder()
        .name(NAME)
        .r#type(RrType::A)
        .ttl(60);
    let set = set.set_set_identifier(identifier.map(str::to_owned));
    let set = set.set_multi_value_answer(identifier.map(|_| true));
    set.resource_records(record).build().unwrap()
}

/// The id of the change, or the refusal.
pub fn change(
    clients: &Clients,
    zone: &str,
    changes: impl IntoIterator<Item = (ChangeAction, ResourceRecordSet)>,
) -> Result<String, [String; 2]> {
    let change = |(action, set)| {
        let change = Change::builder().action(action).resource_record_set(set);
        change.build().unwrap()
    };
    let changes: Vec<Change> = changes.into_iter().map(change).collect();
    let batch = ChangeBatch::builder()
        .set_changes(Some(changes))
        .build()
        .unwrap();
    let call = clients.route53.change_resource_record_sets();
    let made = clients.attempt(call.hosted_zone_id(zone).change_batch(batch).send())?;
    Ok(made.change_info.unwrap().id)
}

/// Identifiers and values of the name, in the listing's order.
pub fn listed(clients: &Clients, zone: &str) -> Vec<(Option<String>, Vec<String>)> {
    let call = clients
        .route53
        .list_resource_record_sets()
        .hosted_zone_id(zone);
    let found = clients.run(call.send());
    assert!(!found.is_truncated());
    let sets = found
        .resource_record_sets
        .into_iter()
        .filter(|it| it.name == NAME);
    sets.map(|set| {
        let values = set.resource_records.unwrap_or_default();
        (
            set.set_identifier,
            values.into_iter().map(|it| it.value).collect(),
        )
    })
    .collect()
}

fn invalid(message: &str) -> Result<String, [String; 2]> {
    Err(["InvalidChangeBatch".to_owned(), message.to_owned()])
}

#[test]
fn a_delete_has_to_match_exactly() {
    let (_plane, clients) = zone();
    let ours = set(Some("ra/mirrors/i-1"), "192.0.2.1");
    change(&clients, ZONE, [(ChangeAction::Upsert, ours.clone())]).unwrap();
    let called = format!("[name='{NAME}', type='A', set identifier='ra/mirrors/i-1']");
    let differs = format!(
        "[Tried to delete resource record set {called} but the values provided do not match the \
         current values]"
    );
    for other in [
        set(Some("ra/mirrors/i-1"), "192.0.2.2"),
        ResourceRecordSet::builder().ttl(61).clone_from_set(&ours),
    ] {
        assert_eq!(
            change(&clients, ZONE, [(ChangeAction::Delete, other)]),
            invalid(&differs)
        );
    }
    assert_eq!(listed(&clients, ZONE).len(), 1);
    assert!(change(&clients, ZONE, [(ChangeAction::Delete, ours.clone())]).is_ok());
    let gone = format!("[Tried to delete resource record set {called} but it was not found]");
    assert_eq!(
        change(&clients, ZONE, [(ChangeAction::Delete, ours)]),
        invalid(&gone)
    );
}

/// The rest of a record set's fields as another one has them.
trait CloneFrom {
    fn clone_from_set(self, set: &ResourceRecordSet) -> ResourceRecordSet;
}

impl CloneFrom for aws_sdk_route53::types::builders::ResourceRecordSetBuilder {
    fn clone_from_set(self, set: &ResourceRecordSet) -> ResourceRecordSet {
        self.name(&set.name)
            .r#type(set.r#type.clone())
            .set_set_identifier(set.set_identifier.clone())
            .set_multi_value_answer(set.multi_value_answer)
            .set_resource_records(set.resource_records.clone())
            .build()
            .unwrap()
    }
}

#[test]
fn a_batch_is_done_as_a_whole_or_not_at_all_and_says_all_that_is_wrong() {
    let (_plane, clients) = zone();
    let [one, two] = ["1", "2"].map(|number| set(Some(number), &format!("192.0.2.{number}")));
    change(&clients, ZONE, [(ChangeAction::Create, one.clone())]).unwrap();
    let third = set(Some("3"), "192.0.2.3");
    let batch = [
        (ChangeAction::Create, third),
        (ChangeAction::Create, one.clone()),
        (ChangeAction::Delete, two),
    ];
    let called = |number| format!("[name='{NAME}', type='A', set identifier='{number}']");
    let wrong = format!(
        "[Tried to create resource record set {} but it already exists, Tried to delete resource \
         record set {} but it was not found]",
        called(1),
        called(2)
    );
    assert_eq!(change(&clients, ZONE, batch), invalid(&wrong));
    assert_eq!(
        listed(&clients, ZONE),
        [(Some("1".into()), vec!["192.0.2.1".into()])]
    );
    // Within a batch each change sees those before it.
    let moved = [
        (ChangeAction::Delete, one.clone()),
        (ChangeAction::Create, one),
    ];
    assert!(change(&clients, ZONE, moved).is_ok());
}

#[test]
fn record_sets_of_one_name_have_one_policy() {
    let (_plane, clients) = zone();
    change(
        &clients,
        ZONE,
        [(ChangeAction::Create, set(Some("1"), "192.0.2.1"))],
    )
    .unwrap();
    let refused = |set: ResourceRecordSet| {
        let [code, message] = change(&clients, ZONE, [(ChangeAction::Upsert, set)]).unwrap_err();
        (code, message)
    };
    let (code, message) = refused(set(None, "192.0.2.2"));
    assert_eq!(code, "InvalidChangeBatch");
    assert!(
        message.contains("because a non simple rrset exists"),
        "{message}"
    );
    let mut weighted = set(Some("2"), "192.0.2.2");
    (weighted.multi_value_answer, weighted.weight) = (None, Some(1));
    let (code, message) = refused(weighted.clone());
    assert_eq!(code, "InvalidChangeBatch");
    assert!(
        message.contains("because a non weighted rrset exists"),
        "{message}"
    );
    weighted.multi_value_answer = Some(true);
    assert_eq!(refused(weighted).0, "InvalidInput");
    let mut nameless = set(Some("2"), "192.0.2.2");
    nameless.set_identifier = None;
    assert_eq!(refused(nameless).0, "InvalidInput");
    let mut unruly = set(Some("2"), "192.0.2.2");
    unruly.multi_value_answer = None;
    assert_eq!(refused(unruly).0, "InvalidInput");
    let mut alias = set(Some("2"), "192.0.2.2");
    (alias.ttl, alias.resource_records) = (None, None);
    let target = AliasTarget::builder()
        .hosted_zone_id("Z1")
        .dns_name("lb.example.org");
    alias.alias_target = Some(target.evaluate_target_health(true).build().unwrap());
    assert_eq!(refused(alias).0, "InvalidInput");
    let mut elsewhere = set(Some("2"), "192.0.2.2");
    elsewhere.name = "registry.example.net".to_owned();
    assert!(
        refused(elsewhere)
            .1
            .contains("is not permitted in zone example.org.")
    );
    assert!(
        refused(set(Some("2"), "192.0.2.256"))
            .1
            .contains("ARRDATAIllegalIPv4Address")
    );
}

#[test]
fn a_change_is_pending_until_all_servers_know_it() {
    let (plane, clients) = zone();
    let id = change(
        &clients,
        ZONE,
        [(ChangeAction::Upsert, set(Some("1"), "192.0.2.1"))],
    );
    let id = id.unwrap();
    let status = || clients.run(clients.route53.get_change().id(&id).send());
    let status = || status().change_info.unwrap().status;
    let served = || plane.served(ZONE, NAME);
    plane.advance(Duration::from_secs(29));
    assert_eq!((status(), served().len()), (ChangeStatus::Pending, 0));
    // A listing shows it at once.
    assert_eq!(listed(&clients, ZONE).len(), 1);
    plane.advance(Duration::from_secs(1));
    assert_eq!(status(), ChangeStatus::Insync);
    assert_eq!(served(), ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
    let [code, _] = clients.refusal(clients.route53.get_change().id("CNOBODYS").send());
    assert_eq!(code, "NoSuchChange");
}

#[test]
fn a_zone_is_listed_by_pages_from_a_name_type_and_identifier() {
    let (_plane, clients) = zone();
    let sets = (1..=5).map(|number| set(Some(&number.to_string()), &format!("192.0.2.{number}")));
    change(&clients, ZONE, sets.map(|set| (ChangeAction::Create, set))).unwrap();
    let call = || {
        clients
            .route53
            .list_resource_record_sets()
            .hosted_zone_id(ZONE)
    };
    let first = clients.run(call().start_record_name(NAME).max_items(2).send());
    assert!(first.is_truncated());
    assert_eq!(first.next_record_name(), Some(NAME));
    assert_eq!(first.next_record_identifier(), Some("3"));
    let next = call()
        .start_record_name(first.next_record_name().unwrap())
        .start_record_type(first.next_record_type().unwrap().clone())
        .start_record_identifier(first.next_record_identifier().unwrap());
    let second = clients.run(next.send());
    let identifiers = |sets: &[ResourceRecordSet]| -> Vec<String> {
        sets.iter()
            .filter_map(|it| it.set_identifier.clone())
            .collect()
    };
    assert_eq!(identifiers(first.resource_record_sets()), ["1", "2"]);
    assert_eq!(identifiers(second.resource_record_sets()), ["3", "4", "5"]);
    assert!(!second.is_truncated());
    let [code, _] = clients.refusal(call().start_record_type(RrType::A).send());
    assert_eq!(code, "InvalidInput");
    let call = clients
        .route53
        .list_resource_record_sets()
        .hosted_zone_id("ZNOBODYS");
    assert_eq!(clients.refusal(call.send())[0], "NoSuchHostedZone");
}

#[test]
fn a_resolver_gets_what_all_servers_know() {
    let (plane, clients) = zone();
    let sets = (1..=10).map(|number| set(Some(&number.to_string()), &format!("192.0.2.{number}")));
    change(&clients, ZONE, sets.map(|set| (ChangeAction::Create, set))).unwrap();
    let server = plane.serve_names((std::net::Ipv4Addr::LOCALHOST, 0).into());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let resolver = runtime.block_on(async { resolver(server) });
    let resolve = |name: &str| runtime.block_on(resolver.lookup_ip(name.to_owned()));
    assert!(resolve(NAME).unwrap_err().is_no_records_found());
    plane.advance(Duration::from_secs(30));
    let found: std::collections::BTreeSet<_> = resolve(NAME).unwrap().iter().collect();
    assert_eq!(found.len(), 8, "the most that an answer has");
    assert!(
        found
            .iter()
            .all(|it| it.to_string().starts_with("192.0.2."))
    );
    assert!(resolve("nothing.example.org.").unwrap_err().is_nx_domain());
}

/// A resolver that asks this server, and remembers nothing.
fn resolver(server: std::net::SocketAddr) -> hickory_resolver::TokioResolver {
    use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
    let mut connection = ConnectionConfig::udp();
    connection.port = server.port();
    let server = NameServerConfig::new(server.ip(), true, vec![connection]);
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
    let provider = hickory_resolver::net::runtime::TokioRuntimeProvider::default();
    let mut builder = hickory_resolver::TokioResolver::builder_with_config(config, provider);
    builder.options_mut().cache_size = 0;
    builder.build().unwrap()
}
