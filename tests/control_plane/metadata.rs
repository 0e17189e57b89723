//! Metadata services: sessions, and what they say of their instances.

use std::time::Duration;

use aws_config::imds;
use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::provider::ProvideCredentials;

use crate::clients::{Clients, http};
use crate::control_plane::{ControlPlane, Fault, Group, Transition, access_key};
use crate::support::client::{Client, Reply};

const GROUP: &str = "mirrors";
const LIFECYCLE: &str = "/latest/meta-data/autoscaling/target-lifecycle-state";

struct Host {
    plane: ControlPlane,
    id: String,
    client: Client,
}

impl Host {
    fn new() -> Self {
        let plane = ControlPlane::start();
        let hook = Duration::from_mins(10);
        let group = Group::new(GROUP, 0, 1, 2).hook("terminate", Transition::Terminating, hook);
        plane.add_group(group);
        let id = plane.members(GROUP)[0].0.clone();
        let url = plane.metadata_url(&id);
        let address = url.strip_prefix("http://").unwrap().parse().unwrap();
        Self {
            plane,
            id,
            client: Client::Tcp(address),
        }
    }

    fn session(&self, ttl: &str) -> Reply {
        let request = self.client.request("PUT", "/latest/api/token");
        request
            .header("X-aws-ec2-metadata-token-ttl-seconds", ttl)
            .send()
    }

    fn ask(&self, path: &str, token: &str) -> Reply {
        let request = self.client.request("GET", path);
        request.header("X-aws-ec2-metadata-token", token).send()
    }

    /// Status and text, in a session of its own.
    fn get(&self, path: &str) -> (u16, String) {
        let token = self.session("60");
        let reply = self.ask(path, &text(&token));
        (reply.status, text(&reply))
    }
}

fn text(reply: &Reply) -> String {
    String::from_utf8(reply.body.clone()).unwrap()
}

#[test]
fn every_request_needs_a_session_that_is_not_over() {
    let host = Host::new();
    let path = "/latest/meta-data/instance-id";
    assert_eq!(host.client.get(path).status, 401);
    assert_eq!(host.ask(path, "nobodys").status, 401);
    for wrong in ["0", "21601", "soon"] {
        assert_eq!(host.session(wrong).status, 400, "{wrong}");
    }
    let session = host.session("30");
    assert_eq!(
        session.header("x-aws-ec2-metadata-token-ttl-seconds"),
        Some("30")
    );
    let token = text(&session);
    host.plane.advance(Duration::from_secs(29));
    assert_eq!(text(&host.ask(path, &token)), host.id);
    host.plane.advance(Duration::from_secs(1));
    assert_eq!(host.ask(path, &token).status, 401);
    let token = text(&host.session("30"));
    host.plane.forget_tokens();
    assert_eq!(host.ask(path, &token).status, 401);
}

#[test]
fn an_instance_is_told_where_it_is_to_go() {
    let host = Host::new();
    assert_eq!(host.get(LIFECYCLE), (200, "InService".into()));
    let clients = Clients::new(&host.plane.url());
    let call = clients
        .autoscaling
        .enter_standby()
        .auto_scaling_group_name(GROUP);
    let call = call
        .instance_ids(&host.id)
        .should_decrement_desired_capacity(true);
    clients.run(call.send());
    assert_eq!(host.get(LIFECYCLE).1, "Standby");
    let call = clients
        .autoscaling
        .exit_standby()
        .auto_scaling_group_name(GROUP);
    clients.run(call.instance_ids(&host.id).send());
    assert_eq!(host.get(LIFECYCLE).1, "InService");
    host.plane.scale(GROUP, 0);
    assert_eq!(host.get(LIFECYCLE).1, "Terminated");
}

#[test]
fn a_detached_instance_hears_so_and_one_of_no_group_hears_nothing() {
    let host = Host::new();
    let clients = Clients::new(&host.plane.url());
    let call = clients
        .autoscaling
        .detach_instances()
        .auto_scaling_group_name(GROUP);
    let call = call
        .instance_ids(&host.id)
        .should_decrement_desired_capacity(true);
    clients.run(call.send());
    assert_eq!(host.get(LIFECYCLE).1, "Detached");
    let id = host.plane.start_instance();
    let address = host.plane.metadata_url(&id);
    let address = address.strip_prefix("http://").unwrap().parse().unwrap();
    let by_hand = Host {
        client: Client::Tcp(address),
        id,
        ..host
    };
    assert_eq!(by_hand.get(LIFECYCLE).0, 404);
}

#[test]
fn notices_are_there_when_they_are_given() {
    let host = Host::new();
    let action = "/latest/meta-data/spot/instance-action";
    assert_eq!(host.get(action).0, 404);
    host.plane.interrupt(&host.id, Duration::from_mins(2));
    let notice: serde_json::Value = serde_json::from_str(&host.get(action).1).unwrap();
    assert_eq!(notice["action"], "terminate");
    let at = humantime::parse_rfc3339(notice["time"].as_str().unwrap()).unwrap();
    let left = at.duration_since(std::time::SystemTime::now()).unwrap();
    assert!(
        left <= Duration::from_mins(2) && left > Duration::from_mins(1),
        "{left:?}"
    );
    let rebalance = "/latest/meta-data/events/recommendations/rebalance";
    assert_eq!(host.get(rebalance).0, 404);
    host.plane.change(|world| {
        let now = world.rest.now;
        world.rest.instances.get_mut(&host.id).unwrap().rebalance = Some(now);
    });
    assert_eq!(host.get(rebalance).0, 200);
}

#[test]
fn an_instance_knows_who_it_is() {
    let host = Host::new();
    for (path, wanted) in [
        ("instance-id", host.id.as_str()),
        ("local-ipv4", "10.0.0.1"),
        ("placement/availability-zone", "us-east-1a"),
        ("placement/region", "us-east-1"),
        ("tags/instance/", "aws:autoscaling:groupName"),
        ("tags/instance/aws:autoscaling:groupName", GROUP),
    ] {
        let path = format!("/latest/meta-data/{path}");
        assert_eq!(host.get(&path), (200, wanted.to_owned()), "{path}");
    }
    assert_eq!(host.get("/latest/meta-data/ipv6").0, 404);
    let document = host.get("/latest/dynamic/instance-identity/document").1;
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["instanceId"], host.id.as_str());
    assert_eq!(document["privateIp"], "10.0.0.1");
}

#[test]
fn the_sdk_gets_the_roles_credentials_and_calls_with_them() {
    let host = Host::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let credentials = runtime.block_on(async {
        let client = imds::Client::builder()
            .endpoint(host.plane.metadata_url(&host.id))
            .unwrap()
            .configure(&ProviderConfig::default().with_http_client(http()))
            .build();
        let provider = ImdsCredentialsProvider::builder()
            .imds_client(client)
            .build();
        provider.provide_credentials().await.unwrap()
    });
    assert_eq!(credentials.access_key_id(), access_key(&host.id));
    let clients = Clients::with(&host.plane.url(), credentials, crate::clients::ANSWERS);
    clients.run(clients.autoscaling.describe_auto_scaling_groups().send());
    assert_eq!(
        host.plane.calls("DescribeAutoScalingGroups")[0].caller,
        host.id
    );
}

#[test]
fn a_metadata_service_fails_as_it_is_ordered_and_no_partition_cuts_it_off() {
    let host = Host::new();
    host.plane.faults(|it| {
        it.cut_off(&host.id);
        let path = format!("GET {LIFECYCLE}");
        it.add(&path, Some(&host.id), Some(1), Fault::Status(503));
    });
    assert_eq!(host.get(LIFECYCLE).0, 503);
    assert_eq!(host.get(LIFECYCLE).0, 200);
    host.plane
        .faults(|it| it.add("metadata", None, None, Fault::Throttle));
    assert_eq!(host.session("60").status, 429);
    assert_eq!(host.plane.calls("PUT /latest/api/token").len(), 3);
}
