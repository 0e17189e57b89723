//! A fleet of agents as they are installed, with the real SDKs, against the account of
//! `support/control_plane`: what the group, the load balancer and resolvers see of them.
//!
//! The agents' clocks are real, and the account's goes with them.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/control_plane/mod.rs"]
mod control_plane;
mod support;

use std::net::IpAddr;
use std::time::Duration;

use serde_json::json;

use control_plane::{Called, ControlPlane, Fault, Group, Phase, TargetGroup, Transition};
use support::agent::{Agent, Setup};
use support::eventually;

const GROUP: &str = "mirrors";
const ZONE: &str = "Z0123456789";
const NAME: &str = "mirrors.example.org";
const LAUNCH: &str = "registry-agent-launch";
const TERMINATE: &str = "registry-agent-terminate";
/// What resolvers keep an answer for, and connections drain: short, since both are waited for.
const TTL: Duration = Duration::from_secs(2);
const DRAINS: Duration = Duration::from_secs(4);
/// Looks are seconds apart, drains as long, and looks that fail half a minute.
const LONG: Duration = Duration::from_mins(4);

struct Fleet {
    plane: ControlPlane,
    target_group: String,
}

impl Fleet {
    /// A group whose hooks hold, a target group and a zone, with so many instances that nobody has
    /// booted yet.
    fn of(instances: u32) -> Self {
        let plane = ControlPlane::options().real_time().start();
        let mut targets = TargetGroup::new(GROUP, 5000);
        targets.delay = DRAINS;
        (targets.healthy_after, targets.unhealthy_after) =
            (Duration::from_secs(2), Duration::from_secs(2));
        targets.check_path = Some("/v2/".to_owned());
        let target_group = plane.add_targets(targets);
        plane.add_zone(ZONE, "example.org");
        plane.change(|world| world.rest.propagation = Duration::from_secs(2));
        let timeout = Duration::from_mins(10);
        let group = Group::new(GROUP, 0, instances, instances + 1)
            .hook(LAUNCH, Transition::Launching, timeout)
            .hook(TERMINATE, Transition::Terminating, timeout);
        plane.add_group(group);
        Self {
            plane,
            target_group,
        }
    }

    fn ids(&self) -> Vec<String> {
        self.plane
            .members(GROUP)
            .into_iter()
            .map(|(id, _)| id)
            .collect()
    }

    /// Boots an instance: an agent at its address, with its metadata service and its role.
    fn boot(&self, id: &str) -> Agent {
        self.prepare(id).start()
    }

    fn prepare(&self, id: &str) -> Setup {
        let setup = Setup::hosting();
        let address = IpAddr::from(setup.address());
        self.plane.change(|world| {
            world.rest.instances.get_mut(id).unwrap().address = address;
        });
        let fleet = json!({
            "autoscaling": {"group": GROUP},
            "load_balancer": {"target_group": self.target_group},
            "dns": {"route53": {"zone": ZONE, "name": NAME, "ttl": "2s"}},
        });
        setup
            .set("fleet", fleet)
            .environment("AWS_ENDPOINT_URL", &self.plane.url())
            .environment(
                "AWS_EC2_METADATA_SERVICE_ENDPOINT",
                &self.plane.metadata_url(id),
            )
            .environment("AWS_REGION", "us-east-1")
    }

    fn served(&self) -> Vec<IpAddr> {
        self.plane.served(ZONE, NAME)
    }

    fn listed(&self) -> usize {
        self.plane.change(|world| {
            let records = world.rest.zones[ZONE].records.iter();
            records.filter(|it| it.identifier.is_some()).count()
        })
    }

    fn wait_for(&self, id: &str, phase: Option<Phase>) {
        eventually(LONG, &format!("{id} is {phase:?}"), || {
            self.plane.phase(GROUP, id) == phase
        });
    }

    /// Calls that were done, by when.
    fn done(&self, operation: &str) -> Vec<Called> {
        let mut calls = self.plane.calls(operation);
        calls.retain(|call| call.refused.is_none());
        calls
    }
}

#[test]
fn an_instance_is_found_before_the_group_counts_it_and_by_its_own_role() {
    let fleet = Fleet::of(1);
    let id = fleet.ids()[0].clone();
    let agent = fleet.boot(&id);
    fleet.wait_for(&id, Some(Phase::InService));
    assert_eq!(fleet.served().len(), 1, "resolvers know it");
    let completed = fleet.done("CompleteLifecycleAction");
    let registered = fleet.done("RegisterTargets");
    let written = fleet.done("ChangeResourceRecordSets");
    assert_eq!(
        (completed.len(), registered.len(), written.len()),
        (1, 1, 1)
    );
    let seen = Duration::from_secs(2);
    assert!(
        completed[0].at >= registered[0].at + seen,
        "the target was seen to be healthy"
    );
    assert!(
        completed[0].at >= written[0].at + seen,
        "the record was seen on all servers"
    );
    let mut calls = fleet.plane.all_calls().into_iter();
    assert!(calls.all(|call| call.caller == id));
    assert_eq!(agent.get("/v2/").status, 200);
}

#[test]
fn an_instance_that_is_told_to_go_is_found_nowhere_before_it_is_killed() {
    let fleet = Fleet::of(1);
    let id = fleet.ids()[0].clone();
    let agent = fleet.boot(&id);
    fleet.wait_for(&id, Some(Phase::InService));
    fleet.plane.scale(GROUP, 0);
    fleet.wait_for(&id, Some(Phase::TerminatingWait));
    eventually(LONG, "nothing leads to it", || fleet.served().is_empty());
    assert_eq!(
        agent.get("/v2/").status,
        200,
        "it serves whom resolvers still lead to it"
    );
    fleet.wait_for(&id, None);
    let completed = fleet.done("CompleteLifecycleAction")[1].at;
    let gone = fleet.done("ChangeResourceRecordSets")[1].at;
    let deregistered = fleet.done("DeregisterTargets")[0].at;
    assert!(completed >= gone + TTL, "resolvers have let go");
    assert!(
        completed >= deregistered + DRAINS,
        "connections have let go"
    );
    assert_eq!(fleet.listed(), 0);
}

#[test]
fn a_spot_instance_is_found_nowhere_when_it_is_taken_back() {
    let fleet = Fleet::of(2);
    let ids = fleet.ids();
    let agents: Vec<Agent> = ids.iter().map(|id| fleet.boot(id)).collect();
    ids.iter()
        .for_each(|id| fleet.wait_for(id, Some(Phase::InService)));
    fleet.plane.interrupt(&ids[0], Duration::from_mins(2));
    eventually(LONG, "one is left", || {
        fleet.served().len() == 1 && fleet.listed() == 1
    });
    assert_eq!(fleet.plane.phase(GROUP, &ids[0]), Some(Phase::InService));
    assert!(agents.iter().all(|agent| agent.get("/v2/").status == 200));
}

#[test]
fn an_instance_in_standby_is_not_found_and_is_again_afterwards() {
    let fleet = Fleet::of(2);
    let ids = fleet.ids();
    let _agents: Vec<Agent> = ids.iter().map(|id| fleet.boot(id)).collect();
    ids.iter()
        .for_each(|id| fleet.wait_for(id, Some(Phase::InService)));
    let which = format!(
        "AutoScalingGroupName={GROUP}&InstanceIds.member.1={}",
        ids[0]
    );
    let enter = format!("{which}&ShouldDecrementDesiredCapacity=true");
    fleet.plane.operate("EnterStandby", &enter);
    eventually(LONG, "one is left", || fleet.served().len() == 1);
    fleet.plane.operate("ExitStandby", &which);
    eventually(LONG, "both are back", || fleet.served().len() == 2);
    assert!(fleet.done("SetInstanceHealth").is_empty());
}

#[test]
fn an_instance_joins_through_throttling_and_errors() {
    let fleet = Fleet::of(1);
    let id = fleet.ids()[0].clone();
    fleet.plane.faults(|it| {
        for operation in [
            "DescribeAutoScalingGroups",
            "DescribeLifecycleHooks",
            "RegisterTargets",
            "DescribeTargetHealth",
            "ChangeResourceRecordSets",
            "ListResourceRecordSets",
            "CompleteLifecycleAction",
        ] {
            it.add(operation, None, Some(2), Fault::Throttle);
            it.add(operation, None, Some(1), Fault::Status(503));
        }
    });
    let _agent = fleet.boot(&id);
    fleet.wait_for(&id, Some(Phase::InService));
    assert_eq!(fleet.served().len(), 1);
}

#[test]
fn a_completion_whose_reply_is_lost_is_not_asked_for_for_ever() {
    let fleet = Fleet::of(1);
    let id = fleet.ids()[0].clone();
    fleet
        .plane
        .faults(|it| it.add("CompleteLifecycleAction", None, Some(1), Fault::LoseReply));
    let _agent = fleet.boot(&id);
    fleet.wait_for(&id, Some(Phase::InService));
    // It looks after that, and finds that there is nothing to complete.
    let looks = fleet.plane.calls("DescribeAutoScalingGroups").len();
    eventually(LONG, "it looks again", || {
        fleet.plane.calls("DescribeAutoScalingGroups").len() >= looks + 2
    });
    assert!(fleet.plane.calls("CompleteLifecycleAction").len() <= 2);
}

#[test]
fn a_record_whose_write_lost_its_reply_is_there_once() {
    let fleet = Fleet::of(1);
    let id = fleet.ids()[0].clone();
    fleet
        .plane
        .faults(|it| it.add("ChangeResourceRecordSets", None, Some(1), Fault::LoseReply));
    let _agent = fleet.boot(&id);
    fleet.wait_for(&id, Some(Phase::InService));
    assert_eq!((fleet.listed(), fleet.served().len()), (1, 1));
}

#[test]
fn an_instance_that_cannot_serve_does_not_join() {
    let fleet = Fleet::of(1);
    let id = fleet.ids()[0].clone();
    // An image that is to be there first, of an upstream that is not there.
    let warm = fleet
        .prepare(&id)
        .set("fleet.warm", json!(["docker.io/library/absent"]));
    let agent = warm.start();
    eventually(LONG, "it has looked at the group", || {
        !fleet.done("DescribeAutoScalingGroups").is_empty()
    });
    eventually(LONG, "it says what it waits for", || {
        agent.log().contains("fleet.warm")
    });
    assert_eq!(fleet.plane.phase(GROUP, &id), Some(Phase::PendingWait));
    assert!(fleet.served().is_empty() && fleet.done("CompleteLifecycleAction").is_empty());
}

#[test]
fn an_instance_that_is_cut_off_is_not_taken_away_by_itself_nor_by_others() {
    let fleet = Fleet::of(2);
    let ids = fleet.ids();
    let agents: Vec<Agent> = ids.iter().map(|id| fleet.boot(id)).collect();
    ids.iter()
        .for_each(|id| fleet.wait_for(id, Some(Phase::InService)));
    fleet.plane.faults(|it| it.cut_off(&ids[0]));
    let looks = fleet.plane.calls("DescribeAutoScalingGroups").len();
    eventually(LONG, "both look again", || {
        fleet.plane.calls("DescribeAutoScalingGroups").len() >= looks + 4
    });
    assert_eq!(fleet.served().len(), 2);
    assert!(fleet.plane.calls("SetInstanceHealth").is_empty());
    assert!(agents.iter().all(|agent| agent.get("/v2/").status == 200));
}
