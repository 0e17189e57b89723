//! Target groups: what `DescribeTargetHealth` says of a target through its life.

use std::time::Duration;

use aws_sdk_elasticloadbalancingv2::types::TargetDescription;

use crate::clients::Clients;
use crate::control_plane::{ControlPlane, Group, TargetGroup};
use crate::support::image::Image;
use crate::support::upstream::Upstream;

struct Balanced {
    plane: ControlPlane,
    clients: Clients,
    arn: String,
    id: String,
}

fn balanced(change: impl FnOnce(&mut TargetGroup)) -> Balanced {
    let plane = ControlPlane::start();
    let mut targets = TargetGroup::new("mirrors", 5000);
    change(&mut targets);
    let arn = plane.add_targets(targets);
    plane.add_group(Group::new("mirrors", 0, 1, 1));
    let id = plane.members("mirrors")[0].0.clone();
    let clients = Clients::new(&plane.url());
    Balanced {
        plane,
        clients,
        arn,
        id,
    }
}

fn target(id: &str) -> TargetDescription {
    TargetDescription::builder().id(id).build()
}

impl Balanced {
    fn register(&self, id: &str) -> Result<(), [String; 2]> {
        let call = self.clients.balancing.register_targets();
        let call = call.target_group_arn(&self.arn).targets(target(id));
        self.clients.attempt(call.send()).map(|_| ())
    }

    fn deregister(&self, id: &str) {
        let call = self.clients.balancing.deregister_targets();
        self.clients
            .run(call.target_group_arn(&self.arn).targets(target(id)).send());
    }

    /// State and reason of the instance, by its name.
    fn state(&self) -> (String, String) {
        let call = self.clients.balancing.describe_target_health();
        let call = call.target_group_arn(&self.arn).targets(target(&self.id));
        let found = self.clients.run(call.send());
        let health = found.target_health_descriptions()[0]
            .target_health()
            .unwrap();
        let reason = health.reason().map(|it| it.as_str().to_owned());
        let state = health.state().unwrap().as_str().to_owned();
        (state, reason.unwrap_or_default())
    }

    /// How many there are when nobody is named.
    fn listed(&self) -> usize {
        let call = self.clients.balancing.describe_target_health();
        let found = self.clients.run(call.target_group_arn(&self.arn).send());
        found.target_health_descriptions().len()
    }
}

fn is(state: &str, reason: &str) -> (String, String) {
    (state.to_owned(), reason.to_owned())
}

#[test]
fn a_target_is_checked_then_healthy_then_drains_for_its_delay() {
    let balanced = balanced(|targets| targets.delay = Duration::from_secs(45));
    assert_eq!(balanced.state(), is("unused", "Target.NotRegistered"));
    assert_eq!(balanced.register(&balanced.id), Ok(()));
    balanced.plane.advance(Duration::from_secs(29));
    assert_eq!(
        balanced.state(),
        is("initial", "Elb.RegistrationInProgress")
    );
    balanced.plane.advance(Duration::from_secs(1));
    assert_eq!(balanced.state(), is("healthy", ""));
    // Registered again, it is what it was.
    assert_eq!(balanced.register(&balanced.id), Ok(()));
    assert_eq!(balanced.state(), is("healthy", ""));

    balanced.deregister(&balanced.id);
    balanced.plane.advance(Duration::from_secs(44));
    assert_eq!(
        balanced.state(),
        is("draining", "Target.DeregistrationInProgress")
    );
    assert_eq!(balanced.listed(), 1);
    balanced.plane.advance(Duration::from_secs(1));
    assert_eq!(balanced.state(), is("unused", "Target.NotRegistered"));
    assert_eq!(balanced.listed(), 0);
    // One that is not there can be taken away.
    balanced.deregister(&balanced.id);
}

#[test]
fn a_draining_target_that_is_registered_is_checked_anew() {
    let balanced = balanced(|_| ());
    balanced.register(&balanced.id).unwrap();
    balanced.plane.advance(Duration::from_secs(30));
    balanced.deregister(&balanced.id);
    balanced.register(&balanced.id).unwrap();
    assert_eq!(balanced.state().0, "initial");
    balanced.plane.advance(Duration::from_mins(10));
    assert_eq!(balanced.state().0, "healthy");
}

#[test]
fn a_target_whose_checks_fail_is_unhealthy_until_they_pass_for_long_enough() {
    let balanced = balanced(|targets| targets.unhealthy_drains = Duration::from_secs(15));
    balanced.register(&balanced.id).unwrap();
    balanced.plane.advance(Duration::from_secs(30));
    balanced.plane.target_passes(&balanced.id, false);
    balanced.plane.advance(Duration::from_secs(19));
    assert_eq!(balanced.state().0, "healthy");
    balanced.plane.advance(Duration::from_secs(1));
    assert_eq!(
        balanced.state(),
        is("unhealthy.draining", "Target.FailedHealthChecks")
    );
    balanced.plane.advance(Duration::from_secs(15));
    assert_eq!(
        balanced.state(),
        is("unhealthy", "Target.FailedHealthChecks")
    );
    balanced.plane.target_passes(&balanced.id, true);
    balanced.plane.advance(Duration::from_secs(29));
    assert_eq!(balanced.state().0, "unhealthy");
    balanced.plane.advance(Duration::from_secs(1));
    assert_eq!(balanced.state().0, "healthy");
}

#[test]
fn real_requests_find_out_which_target_serves() {
    let (hub, elsewhere) = (
        Upstream::options().open().start(),
        crate::support::own_address(),
    );
    hub.push("a", "latest", &Image::small(1));
    let at: std::net::SocketAddrV4 = hub.url().strip_prefix("http://").unwrap().parse().unwrap();
    let plane = ControlPlane::start();
    let mut targets = TargetGroup::new("mirrors", at.port());
    (targets.of_instances, targets.check_path) = (false, Some("/v2/a/manifests/latest".to_owned()));
    let arn = plane.add_targets(targets);
    let balanced = Balanced {
        clients: Clients::new(&plane.url()),
        plane,
        arn,
        id: at.ip().to_string(),
    };
    balanced.register(&balanced.id).unwrap();
    balanced.register(&elsewhere.to_string()).unwrap();
    balanced.plane.check_targets();
    balanced.plane.advance(Duration::from_secs(30));
    assert_eq!(balanced.state().0, "healthy");
    let other = Balanced {
        id: elsewhere.to_string(),
        ..balanced
    };
    assert_eq!(other.state().0, "unhealthy");
}

#[test]
fn a_target_group_that_nothing_uses_checks_nobody() {
    let balanced = balanced(|targets| targets.in_use = false);
    balanced.register(&balanced.id).unwrap();
    balanced.plane.advance(Duration::from_mins(10));
    assert_eq!(balanced.state(), is("unused", "Target.NotInUse"));
    balanced.deregister(&balanced.id);
    assert_eq!(balanced.listed(), 0);
}

#[test]
fn a_terminated_instance_drains_by_itself_and_is_not_registered_again() {
    let balanced = balanced(|_| ());
    balanced.register(&balanced.id).unwrap();
    balanced.plane.scale("mirrors", 0);
    assert_eq!(balanced.state().0, "draining");
    assert_eq!(
        balanced.register(&balanced.id).unwrap_err()[0],
        "InvalidTarget"
    );
    assert_eq!(balanced.register("i-0").unwrap_err()[0], "ValidationError");
    balanced.plane.advance(Duration::from_mins(5));
    assert_eq!(balanced.listed(), 0);
}

#[test]
fn target_groups_are_described_by_pages_and_missed() {
    let balanced = balanced(|_| ());
    balanced.plane.add_targets(TargetGroup::new("others", 80));
    let call = || balanced.clients.balancing.describe_target_groups();
    let first = balanced.clients.run(call().page_size(1).send());
    let next = first.next_marker().unwrap();
    let second = balanced
        .clients
        .run(call().page_size(1).marker(next).send());
    assert_eq!(second.next_marker(), None);
    let names = [&first, &second].map(|it| it.target_groups()[0].target_group_name().unwrap());
    assert_eq!(names, ["mirrors", "others"]);
    let found = balanced
        .clients
        .run(call().target_group_arns(&balanced.arn).send());
    assert_eq!(found.target_groups()[0].port(), Some(5000));
    let [code, _] = balanced.clients.refusal(call().names("nothing").send());
    assert_eq!(code, "TargetGroupNotFound");
}
