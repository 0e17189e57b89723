//! What gets in the way of the host's part: signals, its own stop, a journal or a disk that it can't
//! use, and a death in the midst of a change.

use std::time::{Duration, Instant};

use super::{
    CENTOS_DROP_IN, CENTOS_UNIT, DAEMON_JSON, DOCKER, HOST_UNIT, OPTIONS, PATIENCE, agent,
    assert_mirrors, host_with_docker, host_with_units, journal, local, mirrors, property, state,
    wait_until_state, wait_until_wired,
};
use crate::harness::agent::{LOCAL, MIRROR};
use crate::harness::{Agent, Network, poll};

#[test]
fn no_stray_signal_ends_the_hosts_part_and_a_hangup_has_it_read_its_configuration() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    host.boot();
    wait_until_wired(&host);
    let process = property(&host, HOST_UNIT, "MainPID");
    let dockerd = property(&host, DOCKER, "MainPID");
    let send = |signal: &str| {
        let signal = format!("--signal={signal}");
        host.run(&["systemctl", "kill", &signal, "--kill-whom=main", HOST_UNIT]);
    };
    for stray in [
        "QUIT", "ALRM", "USR1", "USR2", "PIPE", "VTALRM", "PROF", "IO", "PWR", "XFSZ", "RTMIN+5",
    ] {
        send(stray);
        poll::until("it is taken", PATIENCE, || {
            let said = journal(&host, &[HOST_UNIT]);
            if said.contains(&format!("SIG{stray} is ignored")) {
                Ok(())
            } else {
                Err(said)
            }
        });
    }
    assert_eq!(property(&host, HOST_UNIT, "MainPID"), process);
    assert_eq!(property(&host, HOST_UNIT, "NRestarts"), "0");
    assert_mirrors(&host, &[&local()]);

    let report = format!("{MIRROR}host: {{ drift: report }}\n");
    host.write("/etc/registry-agent/config.yaml", &report);
    send("HUP");
    send("HUP");
    // It applies once more when it has read it, and leaves what is changed after that.
    poll::until("drift is left", PATIENCE, || {
        host.write(DAEMON_JSON, "{ \"debug\": true }\n");
        match state(&host) {
            Ok(state) if state["summary"] == "docker wired, and changed since" => Ok(()),
            other => Err(other),
        }
    });
    assert_eq!(property(&host, HOST_UNIT, "MainPID"), process);
    assert_eq!(property(&host, DOCKER, "MainPID"), dockerd);
    // And one that ends it unwires first.
    host.run(&["rm", DAEMON_JSON]);
    send("HUP");
    wait_until_wired(&host);
    let reloads = || {
        let said = journal(&host, &[DOCKER]);
        said.matches("Reloaded configuration").count()
    };
    let before = reloads();
    send("INT");
    poll::until("systemd starts it again", PATIENCE, || {
        match property(&host, HOST_UNIT, "NRestarts") {
            restarts if restarts == "1" => Ok(()),
            restarts => Err(restarts),
        }
    });
    poll::until("it is withdrawn and wired", PATIENCE, || match reloads() {
        now if now == before + 2 => Ok(()),
        now => Err(now),
    });
    wait_until_wired(&host);
}

/// A restart of the bus ends every connection to it.
#[test]
fn a_bus_that_is_restarted_blinds_nobody() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    host.boot();
    wait_until_wired(&host);
    let process = property(&host, HOST_UNIT, "MainPID");
    let restart_bus = || {
        host.run(&["systemctl", "restart", "dbus.service"]);
    };
    restart_bus();
    host.write(DAEMON_JSON, "{ \"debug\": true }\n");
    poll::until("drift is put right", PATIENCE, || match mirrors(&host) {
        Ok(has) if has == [local()] && host.read(DAEMON_JSON).contains("debug") => Ok(()),
        other => Err(other),
    });
    wait_until_wired(&host);
    assert_eq!(property(&host, HOST_UNIT, "MainPID"), process);

    restart_bus();
    host.run(&["systemctl", "stop", HOST_UNIT]);
    assert_mirrors(&host, &[]);
    let said = journal(&host, &[HOST_UNIT]);
    assert!(!said.contains("could not be told"), "{said}");
}

#[test]
fn a_journal_that_can_not_be_read_or_ended_is_said_and_starts_nothing_anew() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    let transaction = "/var/lib/registry-agent-host/transaction.json";
    host.write(transaction, "{\"version\": 1, \"jour");
    host.boot();
    let state = wait_until_state(&host, "it is blocked", |state| state["blocked"].is_string());
    assert!(
        state["blocked"].to_string().contains(transaction),
        "{state:#}"
    );
    assert_mirrors(&host, &[]);
    let status = agent(&host, "status").stdout;
    let blocked = |line: &str| line.starts_with("blocked ") && line.contains(transaction);
    assert!(status.lines().any(blocked), "{status}");
    for unit in [HOST_UNIT, "registry-agent.service"] {
        assert_eq!(property(&host, unit, "ActiveState"), "active");
        assert_eq!(property(&host, unit, "NRestarts"), "0");
    }

    host.run(&["mv", transaction, "/root/kept"]);
    wait_until_wired(&host);
    assert_eq!(property(&host, HOST_UNIT, "NRestarts"), "0");
}

/// systemd holds back the start of what is ordered after a unit that stops. A docker that is being
/// started again for its mirror must not stay down for that.
#[test]
fn a_docker_that_is_restarted_while_the_hosts_part_is_stopped_comes_up() {
    let network = Network::new();
    let before = "OPTIONS='--selinux-enabled=false --registry-mirror=http://old'\n";
    // Its stop takes long enough for ours to overtake its start.
    let unit = format!("{CENTOS_UNIT}ExecStopPost=/bin/sleep 3\n");
    let files = [(CENTOS_DROP_IN, unit.as_str()), (OPTIONS, before)];
    let allowed = format!("{MIRROR}host: {{ docker: {{ restart: if-needed }} }}\n");
    let host = host_with_docker(&network, &allowed, &files);

    Agent::on(&host).systemctl("start");
    poll::until("docker is being restarted", PATIENCE, || {
        match property(&host, DOCKER, "ActiveState") {
            state if state == "deactivating" => Ok(()),
            state => Err(state),
        }
    });
    let began = Instant::now();
    host.run(&["systemctl", "stop", HOST_UNIT]);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(30), "the stop took {took:?}");
    assert_eq!(property(&host, HOST_UNIT, "Result"), "success");
    poll::until("docker runs", PATIENCE, || {
        match property(&host, DOCKER, "ActiveState") {
            state if state == "active" => Ok(()),
            state => Err(state),
        }
    });
    // Wherever the order met it: what docker has is what its file says, and nothing is half done.
    let ours = host.read(OPTIONS).contains(LOCAL);
    let has = mirrors(&host).expect("docker answers");
    assert_eq!(has.contains(&local()), ours, "{has:?}");
    let transaction = "/var/lib/registry-agent-host/transaction.json";
    assert!(!host.try_run(&["ls", transaction]).succeeded());
}

#[test]
fn what_can_not_be_done_is_said_and_leaves_all_as_it_was() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    let drop_in = format!("/etc/systemd/system/{HOST_UNIT}.d/read-only.conf");
    host.write(&drop_in, "[Service]\nReadWritePaths=\nReadOnlyPaths=/etc\n");
    host.boot();
    let state = wait_until_state(&host, "it failed", |state| {
        state["last_apply"]["failure"].is_string()
    });
    let failure = state["last_apply"]["failure"].to_string();
    assert!(failure.to_lowercase().contains("read-only"), "{failure}");
    assert_mirrors(&host, &[]);
    assert_eq!(property(&host, HOST_UNIT, "ActiveState"), "active");

    // The host's part has the lock.
    let refused = agent(&host, "apply");
    assert_eq!(refused.code, Some(1), "{refused}");
    let held = "another registry-agent is changing this host: process ";
    assert!(refused.stderr.contains(held), "{refused}");
    assert!(
        refused.stderr.contains("`registry-agent host`"),
        "{refused}"
    );
    assert_mirrors(&host, &[]);

    let no_bus = "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/nowhere";
    for verb in ["plan", "apply", "rollback", "host"] {
        let refused = host.try_run(&["env", no_bus, "registry-agent", verb]);
        assert_eq!(refused.code, Some(1), "{refused}");
        assert!(refused.stderr.contains("system bus"), "{refused}");
    }
}

#[test]
fn a_state_folder_that_can_not_be_written_is_waited_for() {
    let network = Network::new();
    let mut host = host_with_units(&network, MIRROR);
    let folder = "/var/lib/registry-agent-host";
    let drop_in = format!("/etc/systemd/system/{HOST_UNIT}.d/read-only.conf");
    host.write(&drop_in, &format!("[Service]\nReadOnlyPaths={folder}\n"));
    host.boot();
    let state = wait_until_state(&host, "it is blocked", |state| state["blocked"].is_string());
    assert!(state["blocked"].to_string().contains(folder), "{state:#}");
    let line = property(&host, HOST_UNIT, "StatusText");
    assert!(line.starts_with("nothing can be changed: "), "{line}");
    assert_eq!(property(&host, HOST_UNIT, "ActiveState"), "active");
    assert_eq!(property(&host, HOST_UNIT, "NRestarts"), "0");
    assert_mirrors(&host, &[]);

    host.run(&["rm", &drop_in]);
    host.run(&["systemctl", "daemon-reload"]);
    host.run(&["systemctl", "restart", HOST_UNIT]);
    wait_until_wired(&host);
}

/// `kill -9` in the midst of a change: the binary of a test has points for that.
#[test]
fn what_was_cut_off_is_taken_back_first_by_every_verb_that_changes_a_host() {
    let network = Network::new();
    let before = "{\n\t\"debug\": false\n}\n";
    let host = host_with_docker(&network, MIRROR, &[(DAEMON_JSON, before)]);
    host.run(&["systemctl", "mask", "--now", HOST_UNIT]);
    Agent::on(&host).systemctl("start");
    Agent::on(&host).wait_until_ready();
    let wire = || {
        poll::until("the mirror is proved", PATIENCE, || {
            match agent(&host, "apply") {
                applied if applied.succeeded() => Ok(()),
                refused => Err(refused),
            }
        });
    };
    wire();
    agent(&host, "rollback").expect_success();
    assert_eq!(host.read(DAEMON_JSON), before);

    let die = "REGISTRY_AGENT_FAILPOINT=apply-job-done";
    let transaction = "/var/lib/registry-agent-host/transaction.json";
    let cut_off = || {
        let killed = host.try_run(&["env", die, "registry-agent", "apply"]);
        assert!(!killed.succeeded(), "{killed}");
        assert!(host.try_run(&["ls", transaction]).succeeded(), "{killed}");
        assert!(host.read(DAEMON_JSON).contains(LOCAL));
    };
    // Also while there is no mirror to wire to.
    cut_off();
    Agent::on(&host).systemctl("stop");
    let refused = agent(&host, "apply");
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(
        refused.stdout.contains("an earlier change was cut off"),
        "{refused}"
    );
    assert_eq!(host.read(DAEMON_JSON), before);
    assert_mirrors(&host, &[]);
    Agent::on(&host).systemctl("start");
    wire();
    agent(&host, "rollback").expect_success();

    for verb in ["apply", "rollback", "uninstall"] {
        cut_off();
        let said = agent(&host, verb).expect_success();
        assert!(
            said.contains("an earlier change was cut off"),
            "{verb}: {said}"
        );
        assert!(said.contains(&format!("restored: {DAEMON_JSON}")), "{said}");
        assert!(!host.try_run(&["ls", transaction]).succeeded(), "{said}");
        let wired = verb == "apply";
        assert_eq!(host.read(DAEMON_JSON).contains(LOCAL), wired, "{said}");
        let expected = if wired { vec![local()] } else { Vec::new() };
        assert_eq!(mirrors(&host).expect("docker answers"), expected);
        if wired {
            agent(&host, "rollback").expect_success();
        }
        assert_eq!(host.read(DAEMON_JSON), before);
    }
}
