//! The same calls to the control plane and to clouds that are not ours.
//!
//! Where they differ, a table says what the other one answers and why that is wrong: a difference
//! that goes away is noticed as well as a new one.

use aws_sdk_autoscaling::types::LifecycleState;
use aws_sdk_elasticloadbalancingv2::types::{ProtocolEnum, TargetDescription, TargetTypeEnum};
use aws_sdk_route53::types::{ChangeAction, RrType};

use crate::clients::Clients;
use crate::clouds::Cloud;
use crate::control_plane::{ControlPlane, Group, TargetGroup, Transition};
use crate::names::{NAME, change, listed, set};

const GROUP: &str = "mirrors";

/// What each step was answered with.
type Answers = Vec<(&'static str, String)>;

/// Where the other one is wrong.
struct Known {
    step: &'static str,
    /// What it answers there.
    theirs: &'static str,
    why: &'static str,
}

#[track_caller]
fn compare(ours: Answers, theirs: Answers, known: &[Known]) {
    assert_eq!(ours.len(), theirs.len());
    let mut used = 0;
    for ((step, ours), (_, theirs)) in ours.into_iter().zip(theirs) {
        match known.iter().find(|known| known.step == step) {
            None => assert_eq!(ours, theirs, "{step}: ours, and the other's"),
            Some(known) => {
                assert_eq!(
                    theirs, known.theirs,
                    "{step}: it was known that {}",
                    known.why
                );
                assert_ne!(
                    ours, theirs,
                    "{step}: it is no difference any more that {}",
                    known.why
                );
                used += 1;
            }
        }
    }
    assert_eq!(used, known.len(), "differences of steps that are not there");
}

/// A refusal by its code; `no XML`, where there is none that the SDK can read.
fn code<T>(result: Result<T, [String; 2]>) -> String {
    match result {
        Ok(_) => "done".to_owned(),
        Err([code, _]) if code.is_empty() => "no XML".to_owned(),
        Err([code, _]) => code,
    }
}

/// What a group is made of: its sizes, and how many instances are in which state and health.
fn describe(clients: &Clients) -> String {
    let call = clients.autoscaling.describe_auto_scaling_groups();
    let found = clients.run(call.auto_scaling_group_names(GROUP).send());
    let group = &found.auto_scaling_groups()[0];
    let count = |state: LifecycleState, health: &str| {
        let instances = group.instances().iter();
        let fitting = instances.filter(|it| {
            it.lifecycle_state() == Some(&state) && it.health_status() == Some(health)
        });
        fitting.count()
    };
    format!(
        "{:?}..{:?}..{:?}: {} in service, {} unhealthy, {} standby",
        group.min_size(),
        group.desired_capacity(),
        group.max_size(),
        count(LifecycleState::InService, "Healthy"),
        count(LifecycleState::InService, "Unhealthy"),
        count(LifecycleState::Standby, "Healthy"),
    )
}

/// The instances in service.
fn instances(clients: &Clients) -> Vec<String> {
    let call = clients.autoscaling.describe_auto_scaling_groups();
    let found = clients.run(call.auto_scaling_group_names(GROUP).send());
    let instances = found.auto_scaling_groups()[0].instances().iter();
    let serving = instances.filter(|it| it.lifecycle_state() == Some(&LifecycleState::InService));
    let mut ids: Vec<String> = serving
        .map(|it| it.instance_id().unwrap().to_owned())
        .collect();
    ids.sort();
    ids
}

fn autoscaling(clients: &Clients) -> Answers {
    let mut said: Answers = vec![("a new group", describe(clients))];
    let ids = instances(clients);
    let api = &clients.autoscaling;

    let found = api.describe_auto_scaling_instances().instance_ids(&ids[0]);
    let found = clients.run(found.send());
    let instance = &found.auto_scaling_instances()[0];
    let where_it_is = [
        instance.auto_scaling_group_name(),
        instance.lifecycle_state(),
    ];
    said.push(("an instance's state", format!("{where_it_is:?}")));
    said.push((
        "an instance's health",
        instance.health_status().unwrap().to_owned(),
    ));
    let nobody = api
        .describe_auto_scaling_instances()
        .instance_ids("i-00000000000000000");
    let nobody = clients.run(nobody.send()).auto_scaling_instances().len();
    said.push(("an instance that is not there", nobody.to_string()));
    let nothing = api
        .describe_auto_scaling_groups()
        .auto_scaling_group_names("nothing");
    let nothing = clients.run(nothing.send()).auto_scaling_groups().len();
    said.push(("a group that is not there", nothing.to_string()));

    let hooks = api
        .describe_lifecycle_hooks()
        .auto_scaling_group_name(GROUP);
    let hooks = clients.run(hooks.send());
    let hook = &hooks.lifecycle_hooks()[0];
    let times = [hook.heartbeat_timeout(), hook.global_timeout()];
    let texts = [
        hook.lifecycle_hook_name(),
        hook.lifecycle_transition(),
        hook.default_result(),
    ];
    said.push(("a hook", format!("{texts:?}")));
    said.push(("a hook's times", format!("{times:?}")));

    let desired = |desired| {
        let call = api.set_desired_capacity().auto_scaling_group_name(GROUP);
        code(clients.attempt(call.desired_capacity(desired).send()))
    };
    said.push(("more", desired(3)));
    said.push(("after more", describe(clients)));
    said.push(("fewer", desired(2)));
    said.push(("after fewer", describe(clients)));
    said.push(("too many", desired(9)));
    desired(2);

    let id = instances(clients)[0].clone();
    let standby = api
        .enter_standby()
        .auto_scaling_group_name(GROUP)
        .instance_ids(&id);
    let standby = standby.should_decrement_desired_capacity(true);
    let activities = clients.run(standby.send()).activities().len();
    said.push(("standby", activities.to_string()));
    said.push(("after standby", describe(clients)));
    let back = api
        .exit_standby()
        .auto_scaling_group_name(GROUP)
        .instance_ids(&id);
    clients.run(back.send());
    said.push(("after standby ends", describe(clients)));

    let detach = api
        .detach_instances()
        .auto_scaling_group_name(GROUP)
        .instance_ids(&id);
    clients.run(detach.should_decrement_desired_capacity(true).send());
    said.push(("after one is detached", describe(clients)));
    let attach = api
        .attach_instances()
        .auto_scaling_group_name(GROUP)
        .instance_ids(&id);
    clients.run(attach.send());
    said.push(("after it is attached", describe(clients)));

    let complete = api
        .complete_lifecycle_action()
        .auto_scaling_group_name(GROUP);
    let complete = complete.lifecycle_hook_name("terminate").instance_id(&id);
    let complete = complete.lifecycle_action_result("CONTINUE");
    said.push((
        "a completion that nothing waits for",
        code(clients.attempt(complete.send())),
    ));
    let beat = api
        .record_lifecycle_action_heartbeat()
        .auto_scaling_group_name(GROUP);
    let beat = beat.lifecycle_hook_name("terminate").instance_id(&id);
    said.push(("a heartbeat of nothing", code(clients.attempt(beat.send()))));

    let health = |id: &str| {
        let call = api
            .set_instance_health()
            .instance_id(id)
            .health_status("Unhealthy");
        code(clients.attempt(call.should_respect_grace_period(false).send()))
    };
    said.push((
        "an unknown instance's health",
        health("i-00000000000000000"),
    ));
    said.push(("an instance is unhealthy", health(&id)));
    said.push(("after it is unhealthy", describe(clients)));
    let refresh = api.start_instance_refresh().auto_scaling_group_name(GROUP);
    said.push(("a refresh", code(clients.attempt(refresh.send()))));
    said
}

#[test]
fn autoscaling_answers_as_moto_does() {
    let moto = Cloud::moto();
    let theirs = Clients::new(&moto.url);
    let api = &theirs.autoscaling;
    let configuration = api
        .create_launch_configuration()
        .launch_configuration_name("mirrors");
    let configuration = configuration
        .image_id("ami-12c6146b")
        .instance_type("t3.micro");
    theirs.run(configuration.send());
    let group = api
        .create_auto_scaling_group()
        .auto_scaling_group_name(GROUP);
    let group = group
        .launch_configuration_name("mirrors")
        .min_size(0)
        .max_size(4);
    let group = group.desired_capacity(2).availability_zones("us-east-1a");
    theirs.run(group.send());
    let hook = api.put_lifecycle_hook().auto_scaling_group_name(GROUP);
    let hook = hook.lifecycle_hook_name("terminate").heartbeat_timeout(120);
    let hook = hook.lifecycle_transition("autoscaling:EC2_INSTANCE_TERMINATING");
    theirs.run(hook.default_result("ABANDON").send());

    let plane = ControlPlane::start();
    let timeout = std::time::Duration::from_mins(2);
    let group = Group::new(GROUP, 0, 2, 4).hook("terminate", Transition::Terminating, timeout);
    plane.add_group(group);
    let known = [
        Known {
            step: "an instance's health",
            theirs: "Healthy",
            why: "DescribeAutoScalingInstances says it in capitals",
        },
        Known {
            step: "a hook's times",
            theirs: "[Some(120), Some(172800)]",
            why: "a hook holds an instance for at most a hundred heartbeats",
        },
        Known {
            step: "too many",
            theirs: "done",
            why: "nothing is raised above the maximum",
        },
        Known {
            step: "a completion that nothing waits for",
            theirs: "no XML",
            why: "moto has no CompleteLifecycleAction",
        },
        Known {
            step: "a heartbeat of nothing",
            theirs: "no XML",
            why: "moto has no RecordLifecycleActionHeartbeat",
        },
        Known {
            step: "an unknown instance's health",
            theirs: "InvalidInstanceID.NotFound",
            why: "autoscaling has no such code: that is EC2's",
        },
        Known {
            step: "after it is unhealthy",
            theirs: "Some(0)..Some(2)..Some(4): 1 in service, 1 unhealthy, 0 standby",
            why: "moto never replaces the unhealthy",
        },
        Known {
            step: "a refresh",
            theirs: "no XML",
            why: "moto has no instance refresh",
        },
    ];
    compare(
        autoscaling(&Clients::new(&plane.url())),
        autoscaling(&theirs),
        &known,
    );
}

fn balancing(clients: &Clients, arn: &str) -> Answers {
    let api = &clients.balancing;
    let target = |address: &str| TargetDescription::builder().id(address).build();
    let state = |address: &str| {
        let call = api
            .describe_target_health()
            .target_group_arn(arn)
            .targets(target(address));
        let found = clients.run(call.send());
        let description = &found.target_health_descriptions()[0];
        let port = description.target().and_then(TargetDescription::port);
        let state = description.target_health().and_then(|it| it.state());
        format!("{port:?} {}", state.unwrap().as_str())
    };
    let register = |arn: &str, address: &str| {
        let call = api
            .register_targets()
            .target_group_arn(arn)
            .targets(target(address));
        code(clients.attempt(call.send()))
    };
    let deregister = |address: &str| {
        let call = api
            .deregister_targets()
            .target_group_arn(arn)
            .targets(target(address));
        code(clients.attempt(call.send()))
    };
    let mut said: Answers = vec![("register", register(arn, "10.0.0.1"))];
    said.push(("just registered", state("10.0.0.1")));
    said.push(("registered again", register(arn, "10.0.0.1")));
    let all = api.describe_target_health().target_group_arn(arn).send();
    let all = clients.run(all).target_health_descriptions().len();
    said.push(("all targets", all.to_string()));
    said.push(("never registered", state("10.0.0.9")));
    said.push(("deregister", deregister("10.0.0.1")));
    said.push(("just deregistered", state("10.0.0.1")));
    said.push(("deregister what is not there", deregister("10.0.0.9")));
    let nothing = arn.replace("mirrors", "nothing");
    said.push(("register nowhere", register(&nothing, "10.0.0.1")));
    let health = api.describe_target_health().target_group_arn(&nothing);
    said.push(("health of nothing", code(clients.attempt(health.send()))));
    let group = api.describe_target_groups().target_group_arns(arn);
    let group = clients.run(group.send()).target_groups()[0].clone();
    let group = (group.target_group_name, group.port, group.target_type);
    said.push(("a target group", format!("{group:?}")));
    let nothing = api.describe_target_groups().target_group_arns(nothing);
    said.push(("no target group", code(clients.attempt(nothing.send()))));
    said
}

#[test]
fn load_balancing_answers_as_moto_does() {
    let moto = Cloud::moto();
    let theirs = Clients::new(&moto.url);
    let group = theirs
        .balancing
        .create_target_group()
        .name("mirrors")
        .port(5000);
    let group = group.protocol(ProtocolEnum::Tcp).vpc_id(moto.vpc());
    let group = theirs.run(group.target_type(TargetTypeEnum::Ip).send());
    let their_arn = group.target_groups()[0].target_group_arn().unwrap();

    let plane = ControlPlane::start();
    let mut targets = TargetGroup::new("mirrors", 5000);
    targets.of_instances = false;
    let arn = plane.add_targets(targets);
    let known = [
        Known {
            step: "just registered",
            theirs: "Some(5000) healthy",
            why: "a target is checked before it is healthy",
        },
        Known {
            step: "never registered",
            theirs: "Some(5000) unavailable",
            why: "a target that is not registered is unused",
        },
        Known {
            step: "just deregistered",
            theirs: "Some(5000) unused",
            why: "a target drains for the deregistration delay",
        },
        Known {
            step: "deregister what is not there",
            theirs: "InvalidTarget",
            why: "DeregisterTargets of an absent target succeeds",
        },
    ];
    let ours = balancing(&Clients::new(&plane.url()), &arn);
    compare(ours, balancing(&theirs, their_arn), &known);
}

/// A refusal by its code, and by which of Route 53's reasons it gives.
fn reason(result: Result<String, [String; 2]>) -> String {
    let Err([code, message]) = result else {
        return "done".to_owned();
    };
    let reasons = [
        "already exists",
        "but it was not found",
        "do not match the current values",
    ];
    let reason = reasons.into_iter().find(|reason| message.contains(reason));
    format!("{code}: {}", reason.unwrap_or_default())
}

fn names(clients: &Clients, zone: &str) -> Answers {
    let [one, two] = ["1", "2"].map(|number| set(Some(number), &format!("192.0.2.{number}")));
    let change = |changes: Vec<(ChangeAction, _)>| change(clients, zone, changes);
    let made = change(vec![
        (ChangeAction::Create, one.clone()),
        (ChangeAction::Upsert, two.clone()),
    ]);
    let id = made.clone().unwrap();
    let mut said: Answers = vec![("two records", reason(made))];
    let pending = clients.run(clients.route53.get_change().id(&id).send());
    let status = pending.change_info.unwrap().status;
    said.push(("a change just made", status.as_str().to_owned()));
    let listed = || format!("{:?}", listed(clients, zone));
    said.push(("both are listed", listed()));

    said.push((
        "create again",
        reason(change(vec![(ChangeAction::Create, one.clone())])),
    ));
    let other = set(Some("1"), "192.0.2.9");
    said.push((
        "delete another value",
        reason(change(vec![(ChangeAction::Delete, other.clone())])),
    ));
    let mut other_ttl = one.clone();
    other_ttl.ttl = Some(61);
    said.push((
        "delete another TTL",
        reason(change(vec![(ChangeAction::Delete, other_ttl)])),
    ));
    let absent = set(Some("9"), "192.0.2.9");
    said.push((
        "delete what is not there",
        reason(change(vec![(ChangeAction::Delete, absent.clone())])),
    ));
    let batch = vec![
        (ChangeAction::Delete, two.clone()),
        (ChangeAction::Delete, absent),
    ];
    said.push(("half a batch", reason(change(batch))));
    said.push(("after half a batch", listed()));
    said.push((
        "another value",
        reason(change(vec![(ChangeAction::Upsert, other.clone())])),
    ));
    said.push(("after another value", listed()));
    said.push((
        "delete",
        reason(change(vec![(ChangeAction::Delete, two.clone())])),
    ));
    said.push(("after delete", listed()));
    let again = vec![
        (ChangeAction::Delete, other.clone()),
        (ChangeAction::Create, other.clone()),
    ];
    said.push(("delete and create", reason(change(again))));
    said.push(("delete twice", {
        reason(change(vec![
            (ChangeAction::Delete, other.clone()),
            (ChangeAction::Delete, other),
        ]))
    }));

    let more = (3..=6).map(|number| set(Some(&number.to_string()), &format!("192.0.2.{number}")));
    change(more.map(|set| (ChangeAction::Create, set)).collect()).unwrap();
    let page = clients
        .route53
        .list_resource_record_sets()
        .hosted_zone_id(zone);
    let page = page
        .start_record_name(NAME)
        .start_record_type(RrType::A)
        .max_items(3);
    let page = clients.run(page.start_record_identifier("3").send());
    let sets = page
        .resource_record_sets()
        .iter()
        .map(|it| it.set_identifier.clone().unwrap());
    let sets: Vec<String> = sets.collect();
    let next = (
        page.next_record_name(),
        page.next_record_type(),
        page.next_record_identifier(),
    );
    said.push((
        "a page",
        format!("{sets:?} {} {next:?}", page.is_truncated()),
    ));

    let nowhere = clients
        .route53
        .list_resource_record_sets()
        .hosted_zone_id("ZNOWHERE");
    said.push(("list no zone", code(clients.attempt(nowhere.send()))));
    said.push((
        "change no zone",
        code(super::names::change(
            clients,
            "ZNOWHERE",
            [(ChangeAction::Upsert, two)],
        )),
    ));
    let nothing = clients.route53.get_change().id("CNOTHING");
    said.push(("no change", code(clients.attempt(nothing.send()))));

    said.push((
        "a plain record beside others",
        reason(change(vec![(ChangeAction::Create, set(None, "192.0.2.7"))])),
    ));
    let mut unruly = set(Some("7"), "192.0.2.7");
    unruly.multi_value_answer = None;
    said.push((
        "an identifier without a policy",
        reason(change(vec![(ChangeAction::Create, unruly)])),
    ));
    said.push((
        "no address",
        reason(change(vec![(
            ChangeAction::Create,
            set(Some("8"), "192.0.2.256"),
        )])),
    ));
    said
}

#[test]
fn route_53_answers_as_ministack_does() {
    let ministack = Cloud::ministack();
    let theirs = Clients::new(&ministack.url);
    let zone = theirs
        .route53
        .create_hosted_zone()
        .name("example.org")
        .caller_reference("one");
    let zone = theirs.run(zone.send()).hosted_zone.unwrap().id;
    let their_zone = zone.trim_start_matches("/hostedzone/");

    let plane = ControlPlane::start();
    plane.add_zone("ZOURS", "example.org");
    let known = [
        Known {
            step: "a plain record beside others",
            theirs: "done",
            why: "record sets of one name and type have one policy",
        },
        Known {
            step: "an identifier without a policy",
            theirs: "done",
            why: "a set identifier is of a policy",
        },
        Known {
            step: "no address",
            theirs: "done",
            why: "an A record holds an IPv4 address",
        },
    ];
    compare(
        names(&Clients::new(&plane.url()), "ZOURS"),
        names(&theirs, their_zone),
        &known,
    );
}
