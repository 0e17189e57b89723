//! A host whose docker is wired to its mirror: by which file, when, and what is left of it.

use std::time::Duration;

use serde_json::Value;

use crate::harness::agent::{LOCAL, MIRROR};
use crate::harness::command::Finished;
use crate::harness::{Agent, Docker, Host, Hub, Image, Network, poll};

mod trouble;

const PATIENCE: Duration = Duration::from_mins(2);
const HOST_UNIT: &str = "registry-agent-host.service";
const DOCKER: &str = "docker.service";
const DAEMON_JSON: &str = "/etc/docker/daemon.json";
const OPTIONS: &str = "/etc/sysconfig/docker";
const STATE: &str = "/run/registry-agent-host/state.json";

/// A host with all units, powered off.
fn host_with_units(network: &Network, config: &str) -> Host {
    let host = Host::new(network, "one", 11);
    Agent::install(&host, config).with_all_units();
    host
}

/// The same, up, whose docker runs and has not been wired yet: the agent is started by hand.
fn host_with_docker(network: &Network, config: &str, files: &[(&str, &str)]) -> Host {
    let mut host = host_with_units(network, config);
    host.run(&["systemctl", "disable", "registry-agent.service"]);
    for (path, text) in files {
        host.write(path, text);
    }
    host.boot();
    assert_eq!(property(&host, DOCKER, "ActiveState"), "active");
    host
}

#[track_caller]
fn property(host: &Host, unit: &str, name: &str) -> String {
    let value = host.run(&["systemctl", "show", "--property", name, "--value", unit]);
    value.trim().to_owned()
}

/// What dockerd says that it uses.
fn mirrors(host: &Host) -> Result<Vec<String>, Finished> {
    let format = "{{json .RegistryConfig.Mirrors}}";
    let said = host.try_run(&["docker", "info", "--format", format]);
    // Without any it is null.
    match serde_json::from_str::<Option<Vec<String>>>(&said.stdout) {
        Ok(list) if said.succeeded() => Ok(list.unwrap_or_default()),
        _ => Err(said),
    }
}

/// As docker says it: with a slash.
fn local() -> String {
    format!("{LOCAL}/")
}

#[track_caller]
fn assert_mirrors(host: &Host, expected: &[&str]) {
    let has = mirrors(host).unwrap_or_else(|said| panic!("{said}"));
    assert_eq!(has, expected);
}

#[track_caller]
fn wait_until_mirrors(host: &Host, expected: &[&str]) {
    poll::until("docker has its mirrors", PATIENCE, || match mirrors(host) {
        Ok(has) if has == expected => Ok(()),
        other => Err(other),
    });
}

/// What the host's part says of itself.
fn state(host: &Host) -> Result<Value, Finished> {
    let said = host.try_run(&["cat", STATE]);
    serde_json::from_str(&said.stdout).map_err(|_| said)
}

#[track_caller]
fn wait_until_state(host: &Host, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    poll::until(what, PATIENCE, || match state(host) {
        Ok(state) if holds(&state) => Ok(state),
        other => Err(other),
    })
}

#[track_caller]
fn wait_until_summary(host: &Host, summary: &str) -> Value {
    wait_until_state(host, summary, |state| state["summary"] == summary)
}

/// Waits until docker is wired, and the host's part says so.
#[track_caller]
fn wait_until_wired(host: &Host) {
    wait_until_summary(host, "docker wired");
    assert_mirrors(host, &[&local()]);
}

/// `registry-agent VERB`.
fn agent(host: &Host, verb: &str) -> Finished {
    host.try_run(&["registry-agent", verb])
}

/// The journal of this boot, of these units, a message a line.
#[track_caller]
fn journal(host: &Host, units: &[&str]) -> String {
    let mut line = vec![
        "journalctl",
        "--no-pager",
        "--quiet",
        "--boot",
        "--output=cat",
    ];
    for unit in units {
        line.extend(["--unit", unit]);
    }
    host.run(&line)
}

/// What tells whether files were touched: inode, time and size of each.
fn stat(host: &Host, paths: &[&str]) -> String {
    host.run(&[&["stat", "--format=%n %i %y %z %s %a %U"], paths].concat())
}

/// Starts a container that does nothing, and returns its process.
fn run_container(host: &Host) -> String {
    const IMPORT: &str = "tar -C /usr -c bin/busybox | docker import - idle";
    host.run(&["sh", "-c", IMPORT]);
    let run = ["docker", "run", "--detach", "--name=idle", "--network=none"];
    host.run(&[&run[..], &["idle", "/bin/busybox", "sleep", "10000"]].concat());
    container(host)
}

#[track_caller]
fn container(host: &Host) -> String {
    let format = "{{.State.Status}} {{.State.Pid}} {{.State.StartedAt}}";
    let said = host.run(&["docker", "inspect", "--format", format, "idle"]);
    assert!(said.starts_with("running "), "{said}");
    said
}

#[test]
fn a_fresh_docker_comes_up_wired_and_pulls_through_the_mirror() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let image = Image::new("wired");
    hub.publish("library/layers", "1", &image);
    let mut host = host_with_units(&network, MIRROR);
    hub.introduce_to(&host);
    host.boot();
    wait_until_wired(&host);

    let docker = Docker::on(&host);
    docker.pull("layers:1");
    assert_eq!(docker.output_of("layers:1"), image.output);
    hub.assert_only_agents_asked();

    let status = agent(&host, "status").expect_success();
    let shown = |line: &str| line.starts_with("wiring ") && line.ends_with(" docker wired");
    assert!(status.lines().any(shown), "{status}");
    poll::until("systemd shows it", PATIENCE, || {
        match Agent::on(&host).status() {
            status if status.contains("; docker wired\"") => Ok(()),
            status => Err(status),
        }
    });
    let plan = agent(&host, "plan");
    assert_eq!(plan.code, Some(0), "there is nothing more to do: {plan}");
    let docker = journal(&host, &[DOCKER]);
    assert!(
        !docker.contains("signal to reload"),
        "it started so: {docker}"
    );
}

#[test]
fn a_second_apply_writes_nothing_and_other_keys_keep_their_place() {
    let network = Network::new();
    let before = "{\n\t\"debug\": false,\n\n\t\"log-opts\":   {\"max-size\": \"10m\"}\n}\n";
    let host = host_with_docker(&network, MIRROR, &[(DAEMON_JSON, before)]);
    // Without the host's part, which is the only one to change a host while it runs.
    host.run(&["systemctl", "mask", "--now", HOST_UNIT]);
    Agent::on(&host).systemctl("start");
    Agent::on(&host).wait_until_ready();
    let planned = agent(&host, "plan");
    assert_eq!(planned.code, Some(2), "{planned}");

    let applied = poll::until("the mirror is proved", PATIENCE, || {
        match agent(&host, "apply") {
            applied if applied.succeeded() => Ok(applied),
            refused => Err(refused),
        }
    });
    assert_mirrors(&host, &[&local()]);
    let after = host.read(DAEMON_JSON);
    let (kept, added) = after.split_at(before.find("\n}").expect("its end"));
    assert_eq!(kept, &before[..kept.len()], "{applied}");
    assert!(added.contains("\"registry-mirrors\""), "{after}");
    assert_eq!(agent(&host, "plan").code, Some(0));

    let files = [DAEMON_JSON, "/etc/docker", "/var/lib/registry-agent-host"];
    let touched = stat(&host, &files);
    let again = agent(&host, "apply").expect_success();
    assert!(again.contains("nothing to do"), "{again}");
    assert_eq!(stat(&host, &files), touched);

    // The way back needs no configuration.
    host.write("/etc/registry-agent/config.yaml", "role: [\n");
    let back = agent(&host, "rollback");
    assert!(back.stderr.contains("the defaults count"), "{back}");
    back.expect_success();
    assert_eq!(host.read(DAEMON_JSON), before);
    assert_mirrors(&host, &[]);
}

#[test]
fn the_mirror_is_withdrawn_before_it_stops_and_comes_back_with_it() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    host.boot();
    wait_until_wired(&host);
    let dockerd = property(&host, DOCKER, "MainPID");

    Agent::on(&host).systemctl("stop");
    assert_mirrors(&host, &[]);
    assert!(host.read(DAEMON_JSON).contains("\"registry-mirrors\": []"));
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
    assert_eq!(property(&host, HOST_UNIT, "Result"), "success");
    let units = [DOCKER, HOST_UNIT, "registry-agent.service"];
    let said = journal(&host, &units);
    let last = |what: &str| {
        let found = said.rfind(what);
        found.unwrap_or_else(|| panic!("no {what:?} in\n{said}"))
    };
    let told = last("Reloaded configuration");
    assert!(told < last("Stopping registry-agent.service"), "{said}");

    Agent::on(&host).systemctl("start");
    wait_until_mirrors(&host, &[&local()]);
    wait_until_wired(&host);
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);

    // There was no file.
    host.run(&["systemctl", "stop", HOST_UNIT]);
    assert_mirrors(&host, &[]);
    let back = agent(&host, "rollback").expect_success();
    assert_mirrors(&host, &[]);
    let gone = host.try_run(&["ls", DAEMON_JSON]);
    assert!(!gone.succeeded(), "{back}");
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
}

#[test]
fn a_running_container_survives_wiring_and_withdrawing() {
    let network = Network::new();
    let host = host_with_docker(&network, MIRROR, &[]);
    let dockerd = property(&host, DOCKER, "MainPID");
    let running = run_container(&host);

    Agent::on(&host).systemctl("start");
    wait_until_wired(&host);
    assert_eq!(container(&host), running);
    Agent::on(&host).systemctl("stop");
    assert_mirrors(&host, &[]);
    assert_eq!(container(&host), running);
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
    assert_eq!(property(&host, DOCKER, "NRestarts"), "0");
}

#[test]
fn a_file_that_dockerd_refuses_is_taken_back_and_docker_goes_on_as_it_was() {
    let network = Network::new();
    let before = "{\"registry-mirrors\": [\"http://other.internal\"]}\n";
    let host = host_with_docker(&network, MIRROR, &[(DAEMON_JSON, before)]);
    let dockerd = property(&host, DOCKER, "MainPID");
    // As somebody may leave it, who has not started docker again since.
    let refused = "{\"registry-mirrors\": [\"http://other.internal\"], \"no-such-key\": 1}\n";
    host.write(DAEMON_JSON, refused);

    Agent::on(&host).systemctl("start");
    let state = wait_until_state(&host, "it failed", |state| {
        state["last_apply"]["failure"].is_string()
    });
    let failure = state["last_apply"]["failure"].to_string();
    assert!(failure.contains(DOCKER), "{failure}");
    assert_eq!(state["summary"], "docker could not be wired", "{state:#}");
    assert_eq!(host.read(DAEMON_JSON), refused);
    assert_mirrors(&host, &["http://other.internal/"]);
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
    assert_eq!(property(&host, HOST_UNIT, "ActiveState"), "active");

    // Broken: nothing is tried.
    let broken = "{\"registry-mirrors\": [\n";
    host.write(DAEMON_JSON, broken);
    let plan = agent(&host, "plan");
    assert_eq!(plan.code, Some(1), "{plan}");
    assert!(plan.stderr.contains(DAEMON_JSON), "{plan}");
    host.run(&["systemctl", "reload", HOST_UNIT]);
    wait_until_state(&host, "it is broken", |state| {
        let failure = state["last_apply"]["failure"].to_string();
        failure.contains(DAEMON_JSON) && failure.contains("JSON")
    });
    assert_eq!(host.read(DAEMON_JSON), broken);
    assert_mirrors(&host, &["http://other.internal/"]);

    // Put right by somebody, and read again.
    host.write(DAEMON_JSON, before);
    host.run(&["systemctl", "reload", HOST_UNIT]);
    wait_until_mirrors(&host, &[&local(), "http://other.internal/"]);
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
}

/// As CentOS and Amazon Linux start docker.
const CENTOS_UNIT: &str = "\
[Service]
EnvironmentFile=-/etc/sysconfig/docker
ExecStart=
ExecStart=/usr/sbin/dockerd -H fd:// $OPTIONS
";
const CENTOS_DROP_IN: &str = "/etc/systemd/system/docker.service.d/options.conf";

#[test]
fn a_mirror_among_dockers_flags_is_changed_only_where_a_restart_is_allowed() {
    let network = Network::new();
    let before = "# docker's own\nOPTIONS='--selinux-enabled=false --registry-mirror=http://old'\n";
    let files = [(CENTOS_DROP_IN, CENTOS_UNIT), (OPTIONS, before)];
    let host = host_with_docker(&network, MIRROR, &files);
    assert_mirrors(&host, &["http://old/"]);
    let dockerd = property(&host, DOCKER, "MainPID");

    Agent::on(&host).systemctl("start");
    let state = wait_until_state(&host, "it is refused", |state| {
        state["refusals"]
            .as_array()
            .is_some_and(|all| !all.is_empty())
    });
    let refusal = state["refusals"].to_string();
    assert!(
        refusal.contains("host.docker.restart: if-needed"),
        "{refusal}"
    );
    let summary = "docker refused: see `registry-agent status`";
    assert_eq!(state["summary"], summary, "{state:#}");
    assert_eq!(host.read(OPTIONS), before);
    assert_mirrors(&host, &["http://old/"]);
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
    let plan = agent(&host, "plan");
    assert!(
        plan.stdout.contains("host.docker.restart: if-needed"),
        "{plan}"
    );

    let allowed = format!("{MIRROR}host: {{ docker: {{ restart: if-needed }} }}\n");
    host.write("/etc/registry-agent/config.yaml", &allowed);
    host.run(&["systemctl", "reload", HOST_UNIT]);
    wait_until_mirrors(&host, &[&local(), "http://old/"]);
    wait_until_wired_with(&host, &[&local(), "http://old/"]);
    assert_eq!(
        host.read(OPTIONS),
        format!(
            "# docker's own\nOPTIONS='--selinux-enabled=false --registry-mirror={LOCAL} \
             --registry-mirror=http://old'\n"
        )
    );
    assert_ne!(property(&host, DOCKER, "MainPID"), dockerd);

    host.run(&["systemctl", "stop", HOST_UNIT]);
    agent(&host, "rollback").expect_success();
    assert_eq!(host.read(OPTIONS), before);
    assert_mirrors(&host, &["http://old/"]);
}

#[track_caller]
fn wait_until_wired_with(host: &Host, expected: &[&str]) {
    wait_until_summary(host, "docker wired");
    assert_mirrors(host, expected);
}

#[test]
fn a_host_reboots_wired_without_a_cycle_a_reload_or_a_wait() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    host.boot();
    wait_until_wired(&host);
    host.shut_down();
    // It is for the next boot to prove that there is a mirror.
    let off = host.read(DAEMON_JSON);
    assert!(off.contains("\"registry-mirrors\": []"), "{off}");
    host.boot();
    wait_until_wired(&host);

    let all = [
        "journalctl",
        "--no-pager",
        "--quiet",
        "--boot",
        "--output=cat",
    ];
    let all = host.run(&all);
    assert!(!all.contains("ordering cycle"), "{all}");
    let docker = journal(&host, &[DOCKER]);
    assert!(!docker.contains("signal to reload"), "{docker}");
    let microseconds = |unit: &str, name: &str| -> u64 {
        let value = property(&host, unit, name);
        value
            .parse()
            .unwrap_or_else(|_| panic!("{unit}: {name}={value}"))
    };
    let began = microseconds(HOST_UNIT, "ExecMainStartTimestampMonotonic");
    let active = microseconds(HOST_UNIT, "ActiveEnterTimestampMonotonic");
    assert!(
        active - began < 3_000_000,
        "docker waited {} us for its mirror",
        active - began
    );
    assert!(active <= microseconds(DOCKER, "ExecMainStartTimestampMonotonic"));
}

#[test]
fn an_agent_that_is_killed_is_withdrawn_and_comes_back_wired() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    host.boot();
    wait_until_wired(&host);
    let dockerd = property(&host, DOCKER, "MainPID");
    let before = property(&host, HOST_UNIT, "InvocationID");

    let kill = [
        "systemctl",
        "kill",
        "--signal=KILL",
        "registry-agent.service",
    ];
    host.run(&kill);
    poll::until(
        "the host's part was started again",
        PATIENCE,
        || match property(&host, HOST_UNIT, "InvocationID") {
            now if now != before && !now.is_empty() => Ok(()),
            now => Err(now),
        },
    );
    wait_until_mirrors(&host, &[&local()]);
    wait_until_wired(&host);
    let said = journal(&host, &[DOCKER]);
    assert_eq!(
        said.matches("Reloaded configuration").count(),
        2,
        "withdrawn and wired: {said}"
    );
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
    assert_eq!(property(&host, "registry-agent.service", "NRestarts"), "1");
}

#[test]
fn the_hosts_part_that_is_killed_leaves_docker_wired_and_goes_on() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    host.boot();
    wait_until_wired(&host);
    host.run(&["systemctl", "kill", "--signal=KILL", HOST_UNIT]);
    poll::until("systemd starts it again", PATIENCE, || {
        let restarts = property(&host, HOST_UNIT, "NRestarts");
        let state = property(&host, HOST_UNIT, "ActiveState");
        if restarts == "1" && state == "active" {
            Ok(())
        } else {
            Err((restarts, state))
        }
    });
    wait_until_wired(&host);
    assert_eq!(property(&host, "registry-agent.service", "NRestarts"), "0");
    let said = journal(&host, &[DOCKER]);
    assert!(!said.contains("Reloaded configuration"), "{said}");
}

#[test]
fn what_somebody_else_changes_is_put_right_unless_only_a_report_is_wanted() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    host.boot();
    wait_until_wired(&host);
    let other = "{ \"debug\": true }\n";
    host.write(DAEMON_JSON, other);
    poll::until("it is put right", PATIENCE, || {
        match host.read(DAEMON_JSON) {
            now if now.contains(LOCAL) && now.contains("\"debug\": true") => Ok(()),
            now => Err(now),
        }
    });
    wait_until_wired(&host);
    let said = journal(&host, &[HOST_UNIT]);
    let drift = format!("changed by somebody else: {DAEMON_JSON}");
    assert!(said.contains(&drift), "{said}");

    let report = format!("{MIRROR}host: {{ drift: report }}\n");
    host.write("/etc/registry-agent/config.yaml", &report);
    let now = || {
        host.run(&["date", "+%s"])
            .trim()
            .parse::<u64>()
            .expect("a time")
    };
    let corrected = now();
    poll::until("a second has passed", PATIENCE, || match now() {
        now if now > corrected => Ok(()),
        now => Err(now),
    });
    host.run(&["systemctl", "reload", HOST_UNIT]);
    // It applies once more then, whatever has been changed until then.
    wait_until_state(&host, "it is read", |state| {
        state["last_apply"]["at"].as_u64() > Some(corrected)
    });
    host.write(DAEMON_JSON, other);
    wait_until_summary(&host, "docker wired, and changed since");
    assert_eq!(host.read(DAEMON_JSON), other);
}

#[test]
fn a_host_without_docker_or_with_a_masked_one_is_no_failure() {
    let network = Network::new();
    for masked in [true, false] {
        let mut host = host_with_units(&network, MIRROR);
        if masked {
            host.run(&["systemctl", "mask", "docker.service", "docker.socket"]);
        } else {
            let units = ["docker.service", "docker.socket"];
            for unit in units {
                host.run(&["systemctl", "disable", unit]);
                host.run(&["rm", &format!("/usr/lib/systemd/system/{unit}")]);
            }
            host.run(&["rm", "/usr/sbin/dockerd"]);
        }
        host.boot();
        let state = wait_until_state(&host, "it has applied", |state| {
            state["last_apply"]["at"].is_u64()
        });
        assert!(state["last_apply"]["failure"].is_null(), "{state:#}");
        let summary = state["summary"].as_str().unwrap_or_default();
        assert!(!summary.contains("docker wired"), "{state:#}");
        assert_eq!(property(&host, HOST_UNIT, "ActiveState"), "active");
        let plan = agent(&host, "plan");
        assert_eq!(plan.code, Some(0), "masked: {masked}: {plan}");
        let shown = agent(&host, "status").stdout;
        let step = "`systemctl unmask docker.service` makes it startable again";
        assert_eq!(shown.contains(step), masked, "{shown}");
    }
}

#[test]
fn a_docker_that_systemd_has_given_up_is_wired_when_a_person_has_put_it_right() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    let broken = "{\"no-such-key\": 1}\n";
    host.write(DAEMON_JSON, broken);
    host.boot();
    poll::until("systemd has given up", PATIENCE, || {
        let state = property(&host, DOCKER, "ActiveState");
        let result = property(&host, DOCKER, "Result");
        if state == "failed" {
            Ok(())
        } else {
            Err((state, result))
        }
    });
    let state = wait_until_summary(&host, "docker does not run");
    let line = state["line"].to_string();
    assert!(line.contains("docker.service is failed"), "{state:#}");
    let step = state["next_step"].to_string();
    assert!(
        step.contains("systemctl reset-failed docker.service"),
        "{state:#}"
    );

    let file = host.read(DAEMON_JSON);
    host.write(
        DAEMON_JSON,
        &file.replace("\"no-such-key\": 1", "\"debug\": false"),
    );
    host.run(&["systemctl", "reset-failed", DOCKER, "docker.socket"]);
    host.run(&["systemctl", "start", DOCKER]);
    wait_until_mirrors(&host, &[&local()]);
    wait_until_wired(&host);
    assert!(host.read(DAEMON_JSON).contains("\"debug\": false"));
}

#[test]
fn a_client_is_wired_to_another_hosts_mirror_and_does_without_while_that_is_off() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let image = Image::new("by a client");
    hub.publish("library/layers", "1", &image);
    let mut first = Host::new(&network, "one", 11);
    hub.introduce_to(&first);
    Agent::install(&first, MIRROR);
    let mut second = Host::new(&network, "two", 12);
    let url = format!("http://{}:5000", first.address());
    let slash = format!("{url}/");
    let config = format!(
        "role: client\nadmin: unix:/run/registry-agent/admin.sock\nhost:\n  mirror: {url}\n  \
         withdraw_after: 2s\n"
    );
    Agent::install(&second, &config).with_all_units();
    second.write(
        "/etc/systemd/system/registry-agent.socket.d/listen.conf",
        "[Socket]\nListenStream=\nListenStream=/run/registry-agent/admin.sock\n",
    );
    first.boot();
    Agent::on(&first).wait_until_ready();
    second.boot();
    wait_until_mirrors(&second, &[&slash]);
    wait_until_wired_with(&second, &[&slash]);
    Docker::on(&second).pull("layers:1");
    assert_eq!(Docker::on(&second).output_of("layers:1"), image.output);
    let dockerd = property(&second, DOCKER, "MainPID");

    Agent::on(&first).systemctl("stop");
    wait_until_mirrors(&second, &[]);
    wait_until_summary(&second, "docker not wired");
    Agent::on(&first).systemctl("start");
    wait_until_mirrors(&second, &[&slash]);
    assert_eq!(property(&second, DOCKER, "MainPID"), dockerd);
}
