//! What goes wrong on its way, as it is ordered.

use std::time::Duration;

use aws_credential_types::Credentials;
use aws_sdk_autoscaling::error::SdkError;
use aws_sdk_route53::types::ChangeAction;

use crate::clients::Clients;
use crate::control_plane::{ApiError, ControlPlane, Fault, Group, Phase, Service, Transition};
use crate::names::{ZONE, change, listed, set};

const GROUP: &str = "mirrors";

fn plane() -> (ControlPlane, Clients, String) {
    let plane = ControlPlane::start();
    let hook = Duration::from_mins(10);
    plane.add_group(Group::new(GROUP, 0, 1, 4).hook("launch", Transition::Launching, hook));
    plane.add_zone(ZONE, "example.org");
    let clients = Clients::new(&plane.url());
    let id = plane.members(GROUP)[0].0.clone();
    (plane, clients, id)
}

fn complete(
    clients: &Clients,
    id: &str,
) -> impl Future<
    Output = Result<
        aws_sdk_autoscaling::operation::complete_lifecycle_action::CompleteLifecycleActionOutput,
        SdkError<
            aws_sdk_autoscaling::operation::complete_lifecycle_action::CompleteLifecycleActionError,
        >,
    >,
> {
    let call = clients.autoscaling.complete_lifecycle_action();
    let call = call
        .auto_scaling_group_name(GROUP)
        .lifecycle_hook_name("launch");
    call.instance_id(id)
        .lifecycle_action_result("CONTINUE")
        .send()
}

#[test]
fn a_call_is_throttled_as_often_as_it_is_ordered() {
    let (plane, clients, id) = plane();
    plane.faults(|it| it.add("CompleteLifecycleAction", None, Some(2), Fault::Throttle));
    for _ in 0..2 {
        assert_eq!(clients.refusal(complete(&clients, &id))[0], "Throttling");
        assert_eq!(plane.phase(GROUP, &id), Some(Phase::PendingWait));
    }
    clients.run(complete(&clients, &id));
    let refused = plane
        .calls("CompleteLifecycleAction")
        .into_iter()
        .map(|it| it.refused);
    let throttled = Some("Throttling".to_owned());
    assert_eq!(
        refused.collect::<Vec<_>>(),
        [throttled.clone(), throttled, None]
    );
}

#[test]
fn route_53_throttles_and_asks_to_wait_with_status_400() {
    let (plane, clients, _) = plane();
    let busy = "The request was rejected because Route 53 was still processing a prior request.";
    let busy = ApiError::new(400, "PriorRequestNotComplete", busy);
    plane.faults(|it| {
        it.add(
            "ChangeResourceRecordSets",
            None,
            Some(1),
            Fault::Refuse(busy),
        );
        it.add("ChangeResourceRecordSets", None, Some(1), Fault::Throttle);
    });
    let upsert = || {
        change(
            &clients,
            ZONE,
            [(ChangeAction::Upsert, set(Some("1"), "192.0.2.1"))],
        )
    };
    assert_eq!(upsert().unwrap_err()[0], "PriorRequestNotComplete");
    assert_eq!(upsert().unwrap_err()[0], "Throttling");
    assert!(upsert().is_ok());
}

#[test]
fn a_reply_is_lost_after_what_it_would_have_said_was_done() {
    let (plane, clients, id) = plane();
    plane.faults(|it| it.add("CompleteLifecycleAction", None, Some(1), Fault::LoseReply));
    let failure = clients.failure(complete(&clients, &id));
    assert!(
        matches!(failure, SdkError::DispatchFailure(_)),
        "{failure:?}"
    );
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::InService));
    let [code, _] = clients.refusal(complete(&clients, &id));
    assert_eq!(code, "ValidationError");
}

#[test]
fn a_server_fails_or_hangs_and_nothing_is_done() {
    let (plane, clients, id) = plane();
    plane.faults(|it| it.add("*", None, Some(1), Fault::Status(503)));
    assert_eq!(
        clients
            .failure(complete(&clients, &id))
            .raw_response()
            .unwrap()
            .status()
            .as_u16(),
        503
    );
    plane.faults(|it| it.add("*", None, Some(1), Fault::Hang));
    let hasty = Credentials::new("AKIAOPERATOR", "secret", None, None, "the test");
    let hasty = Clients::with(&plane.url(), hasty, Duration::from_millis(300));
    let failure = hasty.failure(complete(&hasty, &id));
    assert!(matches!(failure, SdkError::TimeoutError(_)), "{failure:?}");
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::PendingWait));
}

#[test]
fn a_read_is_stale_by_as_much_as_it_is_ordered() {
    let (plane, clients, id) = plane();
    plane.advance(Duration::from_secs(100));
    clients.run(complete(&clients, &id));
    plane.advance(Duration::from_secs(20));
    let stale = |age| {
        let fault = Fault::Stale(Duration::from_secs(age));
        plane.faults(|it| it.add("DescribeAutoScalingInstances", None, Some(1), fault));
        clients.state(&id).unwrap().0
    };
    assert_eq!(stale(19), "InService");
    assert_eq!(stale(21), "Pending:Wait");
    assert_eq!(clients.state(&id).unwrap().0, "InService");

    change(
        &clients,
        ZONE,
        [(ChangeAction::Upsert, set(Some("1"), "192.0.2.1"))],
    )
    .unwrap();
    plane.advance(Duration::from_secs(5));
    let fault = Fault::Stale(Duration::from_secs(6));
    plane.faults(|it| it.add("ListResourceRecordSets", None, Some(1), fault));
    assert_eq!(listed(&clients, ZONE).len(), 0);
    assert_eq!(listed(&clients, ZONE).len(), 1);
}

#[test]
fn one_instance_is_cut_off_and_the_others_are_not() {
    let (plane, clients, id) = plane();
    plane.scale(GROUP, 2);
    let other = plane.members(GROUP)[1].0.clone();
    plane.faults(|it| it.cut_off(&id));
    let token = Some(format!("session-token-of-{id}"));
    let key = crate::control_plane::access_key(&id);
    let own = Credentials::new(key, "secret", token, None, "the test");
    let own = Clients::with(&plane.url(), own, Duration::from_millis(300));
    let failure = own.failure(complete(&own, &id));
    assert!(matches!(failure, SdkError::TimeoutError(_)), "{failure:?}");
    let others = Clients::of_instance(&plane, &other);
    others.run(complete(&others, &other));
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::PendingWait));
    plane.faults(|it| it.reconnect(&id));
    clients.run(complete(&clients, &id));
    let callers = plane
        .calls("CompleteLifecycleAction")
        .into_iter()
        .map(|it| it.caller);
    assert_eq!(
        callers.collect::<Vec<_>>(),
        [id, other, "AKIAOPERATOR".to_owned()]
    );
}

#[test]
fn an_account_may_call_so_often_a_second() {
    let (plane, clients, _) = plane();
    plane.faults(|it| it.limit(Service::Route53, 5.0, 10.0, plane_now()));
    let allowed = || {
        let call = || {
            clients
                .route53
                .list_resource_record_sets()
                .hosted_zone_id(ZONE)
        };
        (0..20)
            .filter(|_| clients.attempt(call().send()).is_ok())
            .count()
    };
    assert_eq!(allowed(), 10);
    plane.advance(Duration::from_secs(1));
    assert_eq!(allowed(), 5);
    // The other APIs have buckets of their own.
    clients.run(clients.autoscaling.describe_auto_scaling_groups().send());
}

/// The clock stands at its zero.
fn plane_now() -> Duration {
    Duration::ZERO
}

#[test]
fn credentials_and_the_region_that_a_request_is_signed_for_are_looked_at() {
    let (plane, _, id) = plane();
    let wrong = Some("somebody-elses".to_owned());
    let key = crate::control_plane::access_key(&id);
    let stale = Credentials::new(key, "secret", wrong, None, "the test");
    let clients = Clients::with(&plane.url(), stale, crate::clients::ANSWERS);
    let call = clients.autoscaling.describe_auto_scaling_groups();
    assert_eq!(clients.refusal(call.send())[0], "InvalidClientTokenId");

    let clients = Clients::new(&plane.url());
    let call = clients
        .autoscaling
        .describe_auto_scaling_groups()
        .customize();
    let elsewhere = aws_sdk_autoscaling::Config::builder().region(
        aws_sdk_autoscaling::config::Region::from_static("eu-west-1"),
    );
    let [code, message] = clients.refusal(call.config_override(elsewhere).send());
    assert_eq!(code, "SignatureDoesNotMatch");
    assert!(message.contains("eu-west-1"), "{message}");
}

#[test]
fn a_parameter_that_is_not_known_is_refused() {
    let (_plane, clients, _) = plane();
    let filter = aws_sdk_autoscaling::types::Filter::builder()
        .name("tag-key")
        .values("x");
    let call = clients
        .autoscaling
        .describe_auto_scaling_groups()
        .filters(filter.build());
    assert_eq!(clients.refusal(call.send())[0], "NotImplemented");
}
