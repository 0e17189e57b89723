//! An instance in its fleet: the agent as it is installed, with the real SDKs, against as much of
//! EC2 as it sees.

mod cloud;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::json;

use cloud::{Cloud, GROUP, Imds, OWN, TARGET_GROUP};
use support::agent::{Agent, Setup};
use support::image::Image;
use support::upstream::Upstream;
use support::{PATIENCE, eventually};

/// Looks at the metadata are seconds apart, and so are those at the group after them.
const LONG: Duration = Duration::from_mins(1);

/// A mirror, and the cloud that it is in.
fn instance(setup: Setup) -> (Setup, Cloud) {
    let cloud = Cloud::start(&setup.address().to_string());
    let url = cloud.url();
    let setup = setup
        .set("fleet", json!({"autoscaling": {"group": GROUP}}))
        .environment("AWS_ENDPOINT_URL", &url)
        .environment("AWS_EC2_METADATA_SERVICE_ENDPOINT", &url)
        .environment("AWS_REGION", "eu-west-1")
        .environment("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        .environment("AWS_SECRET_ACCESS_KEY", "the-secret-access-key");
    (setup, cloud)
}

fn balanced(setup: Setup) -> (Setup, Cloud) {
    let (setup, cloud) = instance(setup);
    let setup = setup.set("fleet.load_balancer", json!({"target_group": TARGET_GROUP}));
    (setup, cloud)
}

#[track_caller]
fn wait_for_state(agent: &Agent, state: &str) {
    let what = format!("the instance is {state}");
    eventually(LONG, &what, || agent.status()["fleet"]["state"] == state);
}

#[track_caller]
fn wait_for_changes(cloud: &Cloud, expected: &[&str]) {
    eventually(LONG, &format!("{expected:?}"), || {
        let heartbeat = |action: &&String| *action != "RecordLifecycleActionHeartbeat";
        let changes = cloud.changes();
        changes.iter().filter(heartbeat).eq(expected)
    });
}

#[test]
fn an_instance_joins_when_it_serves_and_ends_its_hook_when_it_is_told_to_go() {
    let (setup, cloud) = instance(Setup::hosting());
    let agent = setup.start();
    wait_for_changes(&cloud, &["CompleteLifecycleAction"]);
    let completed = &cloud.calls("CompleteLifecycleAction")[0];
    assert_eq!(completed["LifecycleHookName"], "registry-agent-launch");
    assert_eq!(completed["LifecycleActionResult"], "CONTINUE");
    assert_eq!(completed["InstanceId"], OWN);
    assert_eq!(completed["AutoScalingGroupName"], GROUP);
    wait_for_state(&agent, "serving");
    let status = agent.status();
    let fleet = &status["fleet"];
    assert_eq!(
        (&fleet["healthy"], &fleet["wanted"]),
        (&json!(2), &json!(2)),
        "{fleet}"
    );
    assert_eq!(fleet["instances"][0]["id"], OWN);
    assert_eq!(fleet["instances"][0]["zone"], "eu-west-1a");
    let text = String::from_utf8(agent.command(&["status", "--config", "config.yaml"]).stdout);
    let text = text.unwrap();
    assert!(
        text.contains("2 healthy of 2 wanted; the group has 2 to 4"),
        "{text}"
    );
    let metrics = String::from_utf8(agent.admin().get("/metrics").body).unwrap();
    for line in [
        "registry_agent_fleet_healthy_instances 2",
        "registry_agent_fleet_wanted 2",
        "registry_agent_fleet_state{state=\"serving\"} 1",
        "registry_agent_fleet_calls_total{operation=\"CompleteLifecycleAction\",result=\"ok\"} 1",
        "registry_agent_fleet_guard_refusals_total 0",
    ] {
        assert!(
            metrics.lines().any(|it| it == line),
            "{line} is not in {metrics}"
        );
    }

    {
        let mut state = cloud.state();
        state.lifecycle = "Terminating:Wait";
        let path = "autoscaling/target-lifecycle-state";
        state.metadata.insert(path, "Terminated".to_owned());
    }
    let both = ["CompleteLifecycleAction"; 2];
    wait_for_changes(&cloud, &both);
    let completed = &cloud.calls("CompleteLifecycleAction")[1];
    assert_eq!(completed["LifecycleHookName"], "registry-agent-terminate");
    assert_eq!(completed["LifecycleActionResult"], "CONTINUE");
    wait_for_state(&agent, "drain");
    // Nothing leads here any more: what runs may end, and nothing long is begun.
    let begun = agent
        .request("POST", "/v2/mycompany/app/blobs/uploads/")
        .body(b"")
        .send();
    begun.assert_error(503, "UNSUPPORTED");
    let log = agent.log();
    assert!(
        !log.contains("the-secret-access-key"),
        "a secret is in the log"
    );
}

#[test]
fn an_instance_is_in_the_target_group_before_the_group_counts_it_and_out_before_it_goes() {
    let (setup, cloud) = balanced(Setup::hosting());
    let agent = setup.start();
    wait_for_changes(&cloud, &["RegisterTargets"]);
    let registered = &cloud.calls("RegisterTargets")[0];
    assert_eq!(registered["Targets.member.1.Id"], OWN);
    assert_eq!(registered["TargetGroupArn"], TARGET_GROUP);
    cloud.state().target = Some("healthy");
    wait_for_changes(&cloud, &["RegisterTargets", "CompleteLifecycleAction"]);
    wait_for_state(&agent, "serving");
    assert_eq!(agent.status()["fleet"]["instances"][0]["target"], "healthy");

    cloud.state().lifecycle = "Terminating:Wait";
    let path = "autoscaling/target-lifecycle-state";
    cloud.state().metadata.insert(path, "Terminated".to_owned());
    let gone = [
        "RegisterTargets",
        "CompleteLifecycleAction",
        "DeregisterTargets",
    ];
    wait_for_changes(&cloud, &gone);
    // Two looks find it draining, and it is held as long.
    let looks = cloud.calls("DescribeTargetHealth").len();
    eventually(LONG, "it is looked at while it drains", || {
        cloud.calls("DescribeTargetHealth").len() >= looks + 2
    });
    wait_for_changes(&cloud, &gone);
    assert_eq!(agent.get("/").status, 200, "it serves to its end");
    cloud.state().target = None;
    wait_for_changes(&cloud, &[&gone[..], &["CompleteLifecycleAction"]].concat());
}

#[test]
fn a_stopped_service_leaves_first_where_it_is_told_to() {
    let (setup, cloud) = balanced(Setup::hosting());
    cloud.state().lifecycle = "InService";
    let mut agent = setup.set("fleet.leave_on_stop", true).start();
    wait_for_changes(&cloud, &["RegisterTargets"]);
    cloud.state().target = Some("healthy");
    wait_for_state(&agent, "serving");
    agent.signal(Signal::SIGTERM);
    wait_for_changes(&cloud, &["RegisterTargets", "DeregisterTargets"]);
    assert_eq!(
        agent.get("/").status,
        200,
        "it serves until nobody is led here"
    );
    cloud.state().target = None;
    let mut ended = None;
    eventually(LONG, "it lets go", || {
        ended = ended.take().or_else(|| {
            let refused = agent.registry().request("GET", "/").try_open().is_err();
            refused.then(|| agent.wait())
        });
        ended.is_some()
    });
    let exit = ended.unwrap();
    assert!(exit.status.success(), "{exit:?}");
    assert!(
        exit.log.contains("the fleet leads here no more"),
        "{exit:?}"
    );
}

#[test]
fn a_metadata_service_that_fails_changes_nothing_that_was_known() {
    let (setup, cloud) = instance(Setup::hosting());
    cloud.state().lifecycle = "InService";
    let agent = setup.start();
    wait_for_state(&agent, "serving");
    for (imds, said) in [(Imds::Fails, "503"), (Imds::Hangs, "within 2s")] {
        cloud.state().imds = imds;
        eventually(LONG, "it notices", || {
            let log = agent.log();
            let mut warned = log
                .lines()
                .filter(|line| line.contains("what was known of this"));
            warned.next_back().is_some_and(|line| line.contains(said))
        });
        assert_eq!(agent.status()["fleet"]["state"], "serving");
        cloud.state().imds = Imds::Answers;
        let again = "the instance metadata service answers again";
        let before = agent.log().matches(again).count();
        eventually(LONG, again, || agent.log().matches(again).count() > before);
    }
    // Its tokens are forgotten, as after a stop: the next question has a new one.
    cloud.state().tokens.clear();
    cloud.state().lifecycle = "Terminating:Wait";
    let path = "autoscaling/target-lifecycle-state";
    cloud.state().metadata.insert(path, "Terminated".to_owned());
    wait_for_changes(&cloud, &["CompleteLifecycleAction"]);
    let log = agent.log();
    let refused = log.lines().find(|line| line.contains("with 401"));
    assert_eq!(refused, None, "it does not ask for another token");
}

#[test]
fn a_hook_that_is_over_is_no_error_and_throttling_is_counted() {
    let (setup, cloud) = instance(Setup::hosting());
    let over = (
        "ValidationError",
        "No active Lifecycle Action found with instance ID i-0",
    );
    cloud
        .state()
        .refused
        .insert("CompleteLifecycleAction", over);
    let throttled = ("Throttling", "Rate exceeded");
    cloud
        .state()
        .refused
        .insert("DescribeAutoScalingGroups", throttled);
    let agent = setup.start();
    let counted = |result: &str| {
        let text = String::from_utf8(agent.admin().get("/metrics").body).unwrap();
        text.contains(&format!("result=\"{result}\""))
    };
    eventually(LONG, "throttling is counted", || counted("throttled"));
    assert_eq!(
        agent.status()["fleet"]["failing"][0][0],
        "DescribeAutoScalingGroups"
    );
    cloud.state().refused.remove("DescribeAutoScalingGroups");
    eventually(LONG, "the hook is tried", || {
        !cloud.calls("CompleteLifecycleAction").is_empty()
    });
    cloud.state().lifecycle = "InService";
    wait_for_state(&agent, "serving");
    assert!(!counted("error"), "what is over is an error");
    assert_eq!(agent.status()["fleet"]["failing"], json!([]));
}

#[test]
fn images_are_there_before_an_instance_joins() {
    let image = Image::small(1);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    hub.switch_off();
    let (setup, cloud) = instance(Setup::mirror(&hub));
    let agent = setup.set("fleet.warm", json!(["app"])).start();
    eventually(LONG, "it says what it waits for", || {
        let log = agent.log();
        log.contains("an image of fleet.warm can't be fetched yet")
            && log.contains("images are fetched before it joins")
    });
    assert_eq!(
        cloud
            .changes()
            .iter()
            .filter(|it| **it == "CompleteLifecycleAction")
            .count(),
        0
    );
    hub.switch_on();
    wait_for_changes(&cloud, &["CompleteLifecycleAction"]);
    agent.wait_until_stored(image.blobs());
}

#[test]
fn an_instance_that_was_told_to_go_goes_on_going_after_a_crash() {
    let (setup, cloud) = balanced(Setup::hosting());
    cloud.state().lifecycle = "InService";
    cloud.state().target = Some("healthy");
    let mut agent = setup.start();
    wait_for_state(&agent, "serving");
    let notice = json!({"action": "terminate", "time": "2099-01-01T00:00:00Z"}).to_string();
    cloud
        .state()
        .metadata
        .insert("spot/instance-action", notice);
    wait_for_changes(&cloud, &["DeregisterTargets"]);
    agent.kill();
    // The notice is not heard any more; that there was one is known.
    cloud.state().metadata.remove("spot/instance-action");
    cloud.state().target = Some("healthy");
    agent.start_again();
    agent.wait_until_ready();
    wait_for_changes(&cloud, &["DeregisterTargets"; 2]);
    let leaving = agent.status()["fleet"]["leaving"].to_string();
    assert!(leaving.contains("spot"), "{leaving}");
}

#[test]
fn an_agent_that_is_no_instance_serves_and_says_what_it_lacks() {
    let (setup, cloud) = instance(Setup::hosting());
    cloud.state().imds = Imds::Fails;
    let agent = setup.start();
    assert_eq!(agent.get("/").status, 200);
    eventually(PATIENCE, "it says so", || {
        let blocked = agent.status()["fleet"]["blocked"].to_string();
        blocked.contains("metadata service")
    });
    cloud.state().imds = Imds::Answers;
    wait_for_changes(&cloud, &["CompleteLifecycleAction"]);
}

#[test]
fn a_broken_disk_makes_an_instance_suspect_and_a_full_one_does_not() {
    let (setup, cloud) = instance(Setup::hosting().small_disk(16 << 20));
    cloud.state().lifecycle = "InService";
    let setup = setup.set("health", json!({"interval": "1s", "threshold": 1}));
    let agent = setup.start();
    wait_for_state(&agent, "serving");
    let filler = agent.disk().fill();
    eventually(LONG, "it finds the disk full", || {
        agent.log().contains("the disk is full")
    });
    assert_eq!(agent.status()["fleet"]["state"], "serving");
    std::fs::remove_file(filler).unwrap();

    // What a kernel does to a disk that fails.
    let folder = agent.folder().join("store/registry-agent/tmp");
    let (tmpfs, flags) = (Some("tmpfs"), MsFlags::MS_RDONLY);
    mount(tmpfs, &folder, tmpfs, flags, None::<&str>).unwrap();
    wait_for_state(&agent, "suspect");
    // A replacement is not asked for at once, and the disk may come back.
    assert_eq!(cloud.changes(), [""; 0]);
    umount2(&folder, MntFlags::MNT_DETACH).unwrap();
    wait_for_state(&agent, "serving");
}

#[test]
fn a_list_needs_no_cloud() {
    let setup = Setup::hosting();
    let own = setup.address().to_string();
    let peers = json!(["192.0.2.1", own]);
    let fleet = json!({"peers": peers, "instances": 3, "leave_on_stop": true});
    let agent = setup.set("fleet", fleet).start();
    wait_for_state(&agent, "serving");
    let fleet = &agent.status()["fleet"];
    assert_eq!(fleet["instance"], own);
    assert_eq!(
        (&fleet["healthy"], &fleet["wanted"]),
        (&json!(2), &json!(3))
    );
    agent.signal(Signal::SIGTERM);
    let exit = agent.exit();
    assert!(exit.status.success(), "{exit:?}");
    assert!(
        exit.log.contains("the fleet leads here no more"),
        "{exit:?}"
    );
}

#[test]
fn without_a_group_and_a_list_there_is_no_fleet() {
    let agent = Setup::hosting().start();
    assert!(agent.log().contains("no fleet"), "{}", agent.log());
    assert!(agent.status().get("fleet").is_none());
}
