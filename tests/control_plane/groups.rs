//! The group: what it launches, replaces and terminates, and in which order.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::clients::Clients;
use crate::control_plane::{ControlPlane, Deed, Group, Phase, TargetGroup, Transition};

const GROUP: &str = "mirrors";

fn running(group: Group) -> (ControlPlane, Clients, Vec<String>) {
    let plane = ControlPlane::start();
    plane.add_group(group);
    let clients = Clients::new(&plane.url());
    let ids = ids(&plane);
    (plane, clients, ids)
}

fn ids(plane: &ControlPlane) -> Vec<String> {
    plane.members(GROUP).into_iter().map(|(id, _)| id).collect()
}

fn mark(clients: &Clients, id: &str, respects: bool) {
    let call = clients.autoscaling.set_instance_health().instance_id(id);
    let call = call
        .health_status("Unhealthy")
        .should_respect_grace_period(respects);
    clients.run(call.send());
}

fn deeds(deeds: &std::sync::mpsc::Receiver<Deed>) -> Vec<String> {
    let said = |deed| match deed {
        Deed::Launched { id, .. } => format!("launched {id}"),
        Deed::Terminated { id } => format!("terminated {id}"),
    };
    deeds.try_iter().map(said).collect()
}

#[test]
fn the_unhealthy_is_terminated_before_another_is_launched() {
    let (plane, clients, ids) = running(Group::new(GROUP, 0, 2, 4).hook(
        "terminate",
        Transition::Terminating,
        Duration::from_mins(1),
    ));
    mark(&clients, &ids[0], true);
    // It counts no more, so that another comes while the hook holds it.
    assert_eq!(
        clients.state(&ids[0]).unwrap(),
        ("Terminating:Wait".into(), "UNHEALTHY".into())
    );
    assert_eq!(plane.members(GROUP).len(), 3);
    plane.advance(Duration::from_mins(1));
    assert_eq!(plane.phase(GROUP, &ids[0]), None);
    assert_eq!(plane.members(GROUP).len(), 2);
}

#[test]
fn a_maintenance_policy_launches_first() {
    let mut group = Group::new(GROUP, 0, 2, 4);
    group.maintenance = Some((100, 200));
    group.launch_takes = Duration::from_secs(40);
    let (plane, clients, ids) = running(group);
    let seen = plane.deeds();
    plane.advance(Duration::from_secs(40));
    mark(&clients, &ids[0], true);
    assert_eq!(plane.phase(GROUP, &ids[0]), Some(Phase::InService));
    plane.advance(Duration::from_secs(39));
    assert_eq!(plane.phase(GROUP, &ids[0]), Some(Phase::InService));
    plane.advance(Duration::from_secs(1));
    assert_eq!(plane.phase(GROUP, &ids[0]), None);
    let [launched, terminated] = deeds(&seen).try_into().unwrap();
    assert!(launched.starts_with("launched"), "{launched}");
    assert_eq!(terminated, format!("terminated {}", ids[0]));
}

#[test]
fn the_grace_period_is_respected_unless_it_is_not_to_be() {
    let mut group = Group::new(GROUP, 0, 1, 1);
    group.grace = Duration::from_mins(5);
    let (plane, clients, ids) = running(group);
    plane.advance(Duration::from_secs(299));
    mark(&clients, &ids[0], true);
    assert_eq!(clients.state(&ids[0]).unwrap().1, "HEALTHY");
    mark(&clients, &ids[0], false);
    assert_eq!(clients.state(&ids[0]), None);
    let next = self::ids(&plane)[0].clone();
    plane.advance(Duration::from_mins(5));
    mark(&clients, &next, true);
    assert_eq!(clients.state(&next), None);
}

#[test]
fn a_dead_host_is_seen_after_a_while_and_its_hook_waits_for_nobody_in_vain() {
    let timeout = Duration::from_mins(3);
    let group = Group::new(GROUP, 0, 1, 2).hook("terminate", Transition::Terminating, timeout);
    let (plane, _, ids) = running(group);
    plane.crash(&ids[0]);
    plane.advance(Duration::from_secs(149));
    assert_eq!(plane.phase(GROUP, &ids[0]), Some(Phase::InService));
    plane.advance(Duration::from_secs(1));
    assert_eq!(plane.phase(GROUP, &ids[0]), Some(Phase::TerminatingWait));
    plane.advance(timeout);
    assert_eq!(plane.phase(GROUP, &ids[0]), None);
}

#[test]
fn a_spot_instance_is_taken_back_at_its_time_whatever_holds_it() {
    let (plane, _, ids) = running(Group::new(GROUP, 0, 1, 1).hook(
        "terminate",
        Transition::Terminating,
        Duration::from_hours(1),
    ));
    plane.interrupt(&ids[0], Duration::from_mins(2));
    plane.advance(Duration::from_secs(119));
    assert_eq!(plane.phase(GROUP, &ids[0]), Some(Phase::InService));
    plane.advance(Duration::from_secs(1));
    assert_eq!(plane.phase(GROUP, &ids[0]), None);
    assert_eq!(plane.members(GROUP).len(), 1);
}

#[test]
fn desired_capacity_is_within_its_bounds() {
    let (plane, clients, _) = running(Group::new(GROUP, 1, 2, 3));
    let set = |desired| {
        let call = clients.autoscaling.set_desired_capacity();
        let call = call
            .auto_scaling_group_name(GROUP)
            .desired_capacity(desired);
        clients.attempt(call.send()).map(|_| ())
    };
    let refused = |message: &str| Err(["ValidationError".to_owned(), message.to_owned()]);
    let above = "New SetDesiredCapacity value 4 is above max value 3 for the AutoScalingGroup.";
    assert_eq!(set(4), refused(above));
    let below = "New SetDesiredCapacity value 0 is below min value 1 for the AutoScalingGroup.";
    assert_eq!(set(0), refused(below));
    assert_eq!(set(3), Ok(()));
    assert_eq!(plane.members(GROUP).len(), 3);
    assert_eq!(set(1), Ok(()));
    assert_eq!(plane.members(GROUP).len(), 1);
}

#[test]
fn standby_takes_an_instance_out_and_back() {
    let (plane, clients, ids) = running(Group::new(GROUP, 0, 2, 2));
    let call = clients
        .autoscaling
        .enter_standby()
        .auto_scaling_group_name(GROUP);
    let call = call
        .instance_ids(&ids[0])
        .should_decrement_desired_capacity(true);
    assert_eq!(clients.run(call.send()).activities().len(), 1);
    assert_eq!(clients.state(&ids[0]).unwrap().0, "Standby");
    assert_eq!(plane.members(GROUP).len(), 2);
    let call = clients
        .autoscaling
        .exit_standby()
        .auto_scaling_group_name(GROUP);
    clients.run(call.instance_ids(&ids[0]).send());
    assert_eq!(clients.state(&ids[0]).unwrap().0, "InService");
    assert_eq!(plane.change(|world| world.groups[GROUP].desired), 2);
}

#[test]
fn an_instance_is_detached_and_attached_again() {
    let (plane, clients, ids) = running(Group::new(GROUP, 0, 2, 2));
    let call = clients
        .autoscaling
        .detach_instances()
        .auto_scaling_group_name(GROUP);
    let call = call
        .instance_ids(&ids[0])
        .should_decrement_desired_capacity(true);
    clients.run(call.send());
    assert_eq!(clients.state(&ids[0]), None);
    let attach = |id: &str| {
        let call = clients
            .autoscaling
            .attach_instances()
            .auto_scaling_group_name(GROUP);
        clients.attempt(call.instance_ids(id).send()).map(|_| ())
    };
    assert_eq!(attach(&ids[0]), Ok(()));
    assert_eq!(clients.state(&ids[0]).unwrap().0, "InService");
    assert_eq!(attach(&ids[0]).unwrap_err()[0], "ValidationError");
    // The group is full.
    let by_hand = plane.start_instance();
    assert_eq!(attach(&by_hand).unwrap_err()[0], "ValidationError");
    assert_eq!(attach("i-00000000").unwrap_err()[0], "ValidationError");
}

#[test]
fn an_instance_refresh_replaces_all_one_after_the_other() {
    let mut group = Group::new(GROUP, 0, 3, 4);
    group.launch_takes = Duration::from_secs(10);
    let (plane, clients, _) = running(group);
    plane.advance(Duration::from_secs(10));
    let old = ids(&plane);
    let preferences = aws_sdk_autoscaling::types::RefreshPreferences::builder()
        .min_healthy_percentage(90)
        .instance_warmup(20)
        .build();
    let start = || {
        let call = clients.autoscaling.start_instance_refresh();
        let call = call
            .auto_scaling_group_name(GROUP)
            .preferences(preferences.clone());
        clients.attempt(call.send())
    };
    let id = start().unwrap().instance_refresh_id.unwrap();
    assert_eq!(start().unwrap_err()[0], "InstanceRefreshInProgress");
    let status = || {
        let call = clients.autoscaling.describe_instance_refreshes();
        let call = call
            .auto_scaling_group_name(GROUP)
            .instance_refresh_ids(&id);
        let refreshes = clients.run(call.send());
        let refresh = refreshes.instance_refreshes()[0].clone();
        refresh.status.unwrap().as_str().to_owned()
    };
    let mut most = 0;
    for _ in 0..3 {
        assert_eq!(status(), "InProgress");
        let serving = plane.change(|world| world.groups[GROUP].serving());
        most = most.max(3 - serving);
        plane.advance(Duration::from_secs(30));
    }
    assert_eq!(most, 1);
    assert_eq!(status(), "Successful");
    assert!(ids(&plane).iter().all(|id| !old.contains(id)));
    assert_eq!(plane.members(GROUP).len(), 3);
}

#[test]
fn instances_are_listed_by_pages() {
    let (_plane, clients, ids) = running(Group::new(GROUP, 0, 60, 60));
    let mut found = Vec::new();
    let mut token = None;
    for _ in 0..3 {
        let call = clients
            .autoscaling
            .describe_auto_scaling_instances()
            .max_records(25);
        let page = clients.run(call.set_next_token(token).send());
        found.extend(
            page.auto_scaling_instances()
                .iter()
                .map(|it| it.instance_id.clone().unwrap()),
        );
        token = page.next_token;
    }
    assert_eq!((found, token), (ids, None));
    let call = clients.autoscaling.describe_auto_scaling_instances();
    let [code, _] = clients.refusal(call.next_token("nonsense").send());
    assert_eq!(code, "InvalidNextToken");
}

#[test]
fn an_attached_target_group_is_left_before_the_hook_holds() {
    let plane = ControlPlane::start();
    let mut targets = TargetGroup::new("mirrors", 5000);
    targets.delay = Duration::from_mins(1);
    let arn = plane.add_targets(targets);
    let mut group = Group::new(GROUP, 0, 1, 1).hook(
        "terminate",
        Transition::Terminating,
        Duration::from_mins(1),
    );
    group.target_groups = vec![arn.clone()];
    plane.add_group(group);
    let id = ids(&plane)[0].clone();
    assert!(plane.change(|world| world.rest.targets[&arn].has(&id)));
    plane.scale(GROUP, 0);
    plane.advance(Duration::from_secs(59));
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::Terminating));
    plane.advance(Duration::from_secs(1));
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::TerminatingWait));
    assert!(!plane.change(|world| world.rest.targets[&arn].has(&id)));
}

#[test]
fn a_driver_boots_and_kills_hosts_in_the_groups_order() {
    let plane = ControlPlane::options()
        .addresses(|number| Ipv4Addr::from_bits(0xc000_0200 + number).into())
        .start();
    let (seen, told) = std::sync::mpsc::channel();
    let driver = plane.drive(move |deed| seen.send(deed).unwrap());
    plane.add_group(Group::new(GROUP, 0, 1, 2));
    let id = ids(&plane)[0].clone();
    plane.scale(GROUP, 0);
    let metadata = match told.recv().unwrap() {
        Deed::Launched {
            id: launched,
            address,
            zone,
            metadata,
        } => {
            assert_eq!(
                (launched, address.to_string()),
                (id.clone(), "192.0.2.1".to_owned())
            );
            assert_eq!(zone, "us-east-1a");
            metadata
        }
        other @ Deed::Terminated { .. } => panic!("{other:?}"),
    };
    assert_eq!(told.recv().unwrap(), Deed::Terminated { id });
    // Its metadata service went with it.
    crate::support::eventually(crate::support::PATIENCE, "a closed port", || {
        std::net::TcpStream::connect(metadata).is_err()
    });
    drop(plane);
    driver.join().unwrap();
}
