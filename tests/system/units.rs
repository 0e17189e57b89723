//! The units together: who holds the ports, who starts and stops whom, what they may do.

use std::thread;
use std::time::Duration;

use crate::harness::agent::MIRROR;
use crate::harness::{Agent, Host, Network, poll};

const PATIENCE: Duration = Duration::from_mins(1);

/// In place of the host's part: it asks the agent when it is stopped.
const STAND_IN: &str = "\
#!/bin/sh
trap 'curl -sS --max-time 5 --unix-socket /run/registry-agent/admin.sock http://localhost/readyz \\
    >/var/lib/registry-agent-host/at-stop 2>&1; exit 0' TERM
systemd-notify --ready
while :; do sleep 1000 & wait $!; done
";
const STAND_IN_UNIT: &str = "\
[Service]
ExecStart=
ExecStart=/usr/local/bin/stand-in
NotifyAccess=all
# Or the curl that its trap starts may be among those that are told to stop.
KillMode=mixed
";

/// A host with all units, whose host's part is a stand-in by a drop-in.
fn host_with_units(network: &Network) -> Host {
    let mut host = Host::new(network, "one", 11);
    Agent::install(&host, MIRROR).with_all_units();
    host.write_executable("/usr/local/bin/stand-in", STAND_IN.as_bytes());
    host.write(
        "/etc/systemd/system/registry-agent-host.service.d/stand-in.conf",
        STAND_IN_UNIT,
    );
    host.boot();
    Agent::on(&host).wait_until_ready();
    host
}

#[track_caller]
fn property(host: &Host, unit: &str, name: &str) -> String {
    let value = host.run(&["systemctl", "show", "--property", name, "--value", unit]);
    value.trim().to_owned()
}

#[track_caller]
fn wait_until_it_is(host: &Host, unit: &str, state: &str) {
    let what = format!("{unit} is {state}");
    poll::until(&what, PATIENCE, || {
        match property(host, unit, "ActiveState") {
            is if is == state => Ok(()),
            is => Err(is),
        }
    });
}

const HOST_UNIT: &str = "registry-agent-host.service";
const SOCKET: &str = "registry-agent.socket";
const AT_STOP: &str = "/var/lib/registry-agent-host/at-stop";

#[test]
fn nobody_is_refused_while_the_agent_is_restarted() {
    const HAMMER: &str = "\
while [ ! -e /tmp/enough ]; do
    curl -sS --fail --max-time 30 -o /dev/null http://127.0.0.1:5000/v2/ 2>>/tmp/failures
    echo >>/tmp/asked
done";
    let network = Network::new();
    let host = host_with_units(&network);
    let agent = Agent::on(&host);
    let asked = || host.try_run(&["wc", "--lines", "/tmp/asked"]).stdout;
    let asked = || {
        let text = asked();
        let count = text.split(' ').next().and_then(|count| count.parse().ok());
        count.unwrap_or(0)
    };
    thread::scope(|scope| {
        let clients = [(); 2].map(|()| scope.spawn(|| host.try_run(&["sh", "-c", HAMMER])));
        // Fewer than systemd's limit of starts within ten seconds.
        for _ in 0..3 {
            let before: u32 = asked();
            poll::until("the clients go on", PATIENCE, || {
                let now = asked();
                if now > before + 20 { Ok(()) } else { Err(now) }
            });
            let process = agent.property("MainPID");
            agent.systemctl("restart");
            assert_ne!(agent.property("MainPID"), process);
        }
        host.write("/tmp/enough", "");
        for client in clients {
            client.join().expect("a client").expect_success();
        }
    });
    assert_eq!(host.read("/tmp/failures"), "");
    assert_eq!(agent.property("NRestarts"), "0");
    assert_eq!(property(&host, SOCKET, "ActiveState"), "active");
}

#[test]
fn the_hosts_part_stops_while_the_agent_answers_and_comes_and_goes_with_it() {
    let network = Network::new();
    let host = host_with_units(&network);
    let agent = Agent::on(&host);
    wait_until_it_is(&host, HOST_UNIT, "active");

    agent.systemctl("stop");
    assert_eq!(host.read(AT_STOP), "ready\n");
    for unit in [HOST_UNIT, SOCKET, "registry-agent.service"] {
        assert_eq!(property(&host, unit, "ActiveState"), "inactive", "{unit}");
    }
    let refused = host.try_run(&["curl", "-sS", "http://127.0.0.1:5000/"]);
    assert_eq!(refused.code, Some(7), "nobody listens any more: {refused}");

    agent.systemctl("start");
    agent.wait_until_ready();
    for unit in [HOST_UNIT, SOCKET] {
        wait_until_it_is(&host, unit, "active");
    }

    let before = property(&host, HOST_UNIT, "InvocationID");
    host.run(&[
        "systemctl",
        "kill",
        "--signal=KILL",
        "registry-agent.service",
    ]);
    poll::until("both are there again", PATIENCE, || {
        let now = property(&host, HOST_UNIT, "InvocationID");
        let state = property(&host, HOST_UNIT, "ActiveState");
        let restarts = agent.property("NRestarts");
        if now != before && state == "active" && restarts == "1" {
            Ok(())
        } else {
            Err((state, restarts))
        }
    });
    agent.wait_until_ready();
    assert_eq!(property(&host, SOCKET, "ActiveState"), "active");
}

/// How often a message is in a unit's journal.
#[track_caller]
fn count(host: &Host, unit: &str, message: &str) -> usize {
    let journal = ["journalctl", "--no-pager", "--output=cat", "--unit", unit];
    host.run(&journal).matches(message).count()
}

#[test]
fn a_reload_is_sighup_to_both_services_and_no_number_of_deaths_ends_them() {
    const AGENT: &str = "registry-agent.service";
    const CONFIG: &str = "/etc/registry-agent/config.yaml";
    // More than systemd's own limit of starts, five within ten seconds.
    const DEATHS: u32 = 6;
    let network = Network::new();
    let mut host = Host::new(&network, "one", 11);
    Agent::install(&host, MIRROR).with_all_units();
    host.boot();
    let agent = Agent::on(&host);
    agent.wait_until_ready();
    wait_until_it_is(&host, HOST_UNIT, "active");
    for unit in [AGENT, HOST_UNIT] {
        for (name, value) in [
            ("Type", "notify"),
            ("Restart", "always"),
            ("CanReload", "yes"),
        ] {
            assert_eq!(property(&host, unit, name), value, "{unit}: {name}");
        }
        let process = property(&host, unit, "MainPID");
        for (text, message) in [
            ("no_such_key: 1\n", "the one before stays in force"),
            (MIRROR, "reloaded"),
        ] {
            host.write(CONFIG, text);
            let before = count(&host, unit, message);
            host.run(&["systemctl", "reload", unit]);
            poll::until("it has read it again", PATIENCE, || {
                match count(&host, unit, message) {
                    now if now > before => Ok(()),
                    now => Err(now),
                }
            });
        }
        assert_eq!(property(&host, unit, "MainPID"), process, "{unit}");
    }
    for death in 1..=DEATHS {
        host.run(&["systemctl", "kill", "--signal=KILL", AGENT]);
        poll::until("it is started again", PATIENCE, || {
            let restarts = agent.property("NRestarts");
            let state = agent.property("ActiveState");
            if restarts == death.to_string() && state == "active" {
                Ok(())
            } else {
                Err((restarts, state))
            }
        });
    }
    agent.wait_until_ready();
    wait_until_it_is(&host, HOST_UNIT, "active");
}

#[test]
fn an_agent_that_hangs_is_killed_by_the_watchdog_and_started_again() {
    let network = Network::new();
    let mut host = Host::new(&network, "one", 11);
    Agent::install(&host, MIRROR);
    host.write(
        "/etc/systemd/system/registry-agent.service.d/impatient.conf",
        "[Service]\nWatchdogSec=4\n",
    );
    host.boot();
    let agent = Agent::on(&host);
    agent.wait_until_ready();
    assert_eq!(agent.property("WatchdogUSec"), "4s");
    host.run(&[
        "systemctl",
        "kill",
        "--kill-whom=main",
        "--signal=STOP",
        "registry-agent.service",
    ]);
    poll::until("it is started again", PATIENCE, || {
        match agent.property("NRestarts").as_str() {
            "1" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
    agent.wait_until_ready();
    let journal = host.run(&["journalctl", "--no-pager", "-u", "registry-agent.service"]);
    assert!(journal.contains("Watchdog timeout"), "{journal}");
}

#[test]
fn the_units_are_right_and_may_do_little() {
    let network = Network::new();
    let host = Host::new(&network, "one", 11);
    Agent::install(&host, MIRROR).with_all_units();
    // Not booted: systemd-analyze reads the files themselves.
    host.write_executable("/usr/bin/registry-agent", b"");
    for (unit, limit) in [("registry-agent.service", 1.5), (HOST_UNIT, 3.0)] {
        let path = format!("/usr/lib/systemd/system/{unit}");
        let said = host.run(&["systemd-analyze", "security", "--offline=true", &path]);
        let level = said.lines().rev().find_map(|line| {
            let (_, level) = line.split_once("Overall exposure level for ")?;
            level.split(' ').nth(1)?.parse::<f64>().ok()
        });
        let level = level.unwrap_or_else(|| panic!("no level in\n{said}"));
        assert!(level <= limit, "{unit}: {level}\n{said}");
    }
    let units = ["registry-agent.service", HOST_UNIT, SOCKET];
    let units = units.map(|unit| format!("/usr/lib/systemd/system/{unit}"));
    let units: Vec<&str> = units.iter().map(String::as_str).collect();
    let verify = ["systemd-analyze", "verify", "--man=no"];
    let verified = host.try_run(&[&verify[..], &units].concat());
    assert!(verified.succeeded(), "{verified}");
    let ours = |line: &&str| line.contains("registry-agent");
    let complaints: Vec<&str> = verified.stderr.lines().filter(ours).collect();
    assert!(complaints.is_empty(), "{verified}");
}
