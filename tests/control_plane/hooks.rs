//! Lifecycle hooks: they hold an instance, until they are completed or their time is over.

use std::time::Duration;

use crate::clients::Clients;
use crate::control_plane::{ControlPlane, Group, Phase, Transition};

const GROUP: &str = "mirrors";
const TIMEOUT: Duration = Duration::from_mins(2);
/// A second less.
const ALMOST: Duration = Duration::from_secs(119);

/// A group with a hook for each transition, and its first instance.
fn held(desired: u32) -> (ControlPlane, Clients, String) {
    let plane = ControlPlane::start();
    let group = Group::new(GROUP, 0, desired, 4)
        .hook("launch", Transition::Launching, TIMEOUT)
        .hook("terminate", Transition::Terminating, TIMEOUT);
    plane.add_group(group);
    let clients = Clients::new(&plane.url());
    let id = plane.members(GROUP)[0].0.clone();
    (plane, clients, id)
}

fn complete(clients: &Clients, id: &str, hook: &str, result: &str) -> Result<(), [String; 2]> {
    let call = clients.autoscaling.complete_lifecycle_action();
    let call = call
        .auto_scaling_group_name(GROUP)
        .lifecycle_hook_name(hook);
    let call = call.instance_id(id).lifecycle_action_result(result);
    clients.attempt(call.send()).map(|_| ())
}

fn heartbeat(clients: &Clients, id: &str, hook: &str) -> Result<(), [String; 2]> {
    let call = clients.autoscaling.record_lifecycle_action_heartbeat();
    let call = call
        .auto_scaling_group_name(GROUP)
        .lifecycle_hook_name(hook);
    clients.attempt(call.instance_id(id).send()).map(|_| ())
}

fn no_action(id: &str) -> Result<(), [String; 2]> {
    let message = format!("No active Lifecycle Action found with instance ID {id}");
    Err(["ValidationError".to_owned(), message])
}

#[test]
fn a_launching_hook_holds_an_instance_until_it_continues() {
    let (plane, clients, id) = held(1);
    plane.advance(ALMOST);
    assert_eq!(clients.state(&id).unwrap().0, "Pending:Wait");
    assert_eq!(complete(&clients, &id, "launch", "CONTINUE"), Ok(()));
    assert_eq!(
        clients.state(&id).unwrap(),
        ("InService".into(), "HEALTHY".into())
    );
    // A second time there is nothing to complete, nor is there before a hook holds.
    assert_eq!(
        complete(&clients, &id, "launch", "CONTINUE"),
        no_action(&id)
    );
    assert_eq!(
        complete(&clients, &id, "terminate", "CONTINUE"),
        no_action(&id)
    );
    assert_eq!(heartbeat(&clients, &id, "launch"), no_action(&id));
}

#[test]
fn an_instance_whose_hook_times_out_or_abandons_is_replaced_and_the_history_says_why() {
    let (plane, clients, first) = held(1);
    plane.advance(TIMEOUT);
    let second = plane.members(GROUP)[0].0.clone();
    assert_ne!(first, second);
    assert_eq!(complete(&clients, &second, "launch", "ABANDON"), Ok(()));
    let third = plane.members(GROUP)[0].0.clone();
    assert_ne!(second, third);
    assert_eq!(plane.phase(GROUP, &third), Some(Phase::PendingWait));

    let call = clients.autoscaling.describe_scaling_activities();
    let history = clients.run(call.auto_scaling_group_name(GROUP).send());
    let said = |id: &str| {
        let mut activities = history.activities().iter();
        let about = format!("Launching a new EC2 instance: {id}");
        let found = activities
            .find(|it| it.description() == Some(&about))
            .unwrap();
        let status = found.status_code().unwrap().as_str().to_owned();
        (
            status,
            found.status_message().unwrap_or_default().to_owned(),
        )
    };
    let (status, message) = said(&first);
    assert_eq!(status, "Cancelled");
    assert!(
        message.ends_with("was abandoned: Heartbeat Timeout"),
        "{message}"
    );
    let (status, message) = said(&second);
    assert_eq!(status, "Cancelled");
    let why = "was abandoned: Lifecycle Action Completed with ABANDON Result";
    assert!(message.ends_with(why), "{message}");
    assert_eq!(said(&third).0, "MidLifecycleAction");
}

#[test]
fn heartbeats_hold_an_instance_but_not_for_ever() {
    let (plane, clients, id) = held(1);
    // A hundred times its timeout, in all.
    for _ in 0..199 {
        plane.advance(TIMEOUT / 2);
        assert_eq!(heartbeat(&clients, &id, "launch"), Ok(()));
    }
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::PendingWait));
    plane.advance(TIMEOUT / 2);
    assert_eq!(plane.phase(GROUP, &id), None);
}

#[test]
fn a_default_result_of_continue_lets_it_into_service() {
    let plane = ControlPlane::start();
    let mut group = Group::new(GROUP, 0, 1, 1).hook("launch", Transition::Launching, TIMEOUT);
    group.hooks[0].continues = true;
    plane.add_group(group);
    let id = plane.members(GROUP)[0].0.clone();
    plane.advance(TIMEOUT);
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::InService));
}

#[test]
fn all_hooks_of_a_transition_hold_at_once() {
    let plane = ControlPlane::start();
    let group = Group::new(GROUP, 0, 1, 1)
        .hook("one", Transition::Launching, TIMEOUT)
        .hook("two", Transition::Launching, TIMEOUT);
    plane.add_group(group);
    let clients = Clients::new(&plane.url());
    let id = plane.members(GROUP)[0].0.clone();
    assert_eq!(complete(&clients, &id, "two", "CONTINUE"), Ok(()));
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::PendingWait));
    assert_eq!(complete(&clients, &id, "one", "CONTINUE"), Ok(()));
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::InService));
}

#[test]
fn a_terminating_hook_holds_an_instance_until_it_is_completed() {
    let (plane, clients, id) = held(1);
    let deeds = plane.deeds();
    complete(&clients, &id, "launch", "CONTINUE").unwrap();
    plane.scale(GROUP, 0);
    assert_eq!(clients.state(&id).unwrap().0, "Terminating:Wait");
    plane.advance(TIMEOUT / 2);
    heartbeat(&clients, &id, "terminate").unwrap();
    plane.advance(ALMOST);
    assert_eq!(clients.state(&id).unwrap().0, "Terminating:Wait");
    assert_eq!(deeds.try_iter().count(), 0);
    assert_eq!(complete(&clients, &id, "terminate", "CONTINUE"), Ok(()));
    assert_eq!(clients.state(&id), None);
    let ended = crate::control_plane::Deed::Terminated { id };
    assert_eq!(deeds.try_iter().collect::<Vec<_>>(), [ended]);
}

#[test]
fn an_abandoned_termination_may_leave_the_instance_there() {
    let (plane, clients, id) = held(1);
    plane.change(|world| world.groups.get_mut(GROUP).unwrap().retains_abandoned = true);
    complete(&clients, &id, "launch", "CONTINUE").unwrap();
    plane.scale(GROUP, 0);
    complete(&clients, &id, "terminate", "ABANDON").unwrap();
    assert_eq!(clients.state(&id).unwrap().0, "Terminating:Retained");
}

#[test]
fn a_hook_can_be_completed_by_its_token() {
    let (plane, clients, id) = held(1);
    let token = plane.change(|world| world.groups[GROUP].members[&id].holds[0].token.clone());
    let complete = |token: &str| {
        let call = clients.autoscaling.complete_lifecycle_action();
        let call = call
            .auto_scaling_group_name(GROUP)
            .lifecycle_hook_name("launch");
        let call = call
            .lifecycle_action_token(token)
            .lifecycle_action_result("CONTINUE");
        clients.attempt(call.send()).map(|_| ())
    };
    let message = "No active Lifecycle Action found with token nobodys";
    let refused = ["ValidationError".to_owned(), message.to_owned()];
    assert_eq!(complete("nobodys"), Err(refused));
    assert_eq!(complete(&token), Ok(()));
    assert_eq!(plane.phase(GROUP, &id), Some(Phase::InService));
}

#[test]
fn hooks_are_described_with_their_times() {
    let (_plane, clients, _) = held(1);
    let call = clients.autoscaling.describe_lifecycle_hooks();
    let hooks = clients.run(call.auto_scaling_group_name(GROUP).send());
    let [launch, terminate] = hooks.lifecycle_hooks() else {
        panic!("{hooks:?}");
    };
    assert_eq!(
        launch.lifecycle_transition(),
        Some("autoscaling:EC2_INSTANCE_LAUNCHING")
    );
    assert_eq!(launch.heartbeat_timeout(), Some(120));
    assert_eq!(launch.global_timeout(), Some(12_000));
    assert_eq!(launch.default_result(), Some("ABANDON"));
    assert_eq!(
        terminate.lifecycle_transition(),
        Some("autoscaling:EC2_INSTANCE_TERMINATING")
    );
}
