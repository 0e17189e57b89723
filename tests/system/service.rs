//! The agent as a systemd service.

use std::time::Duration;

use crate::harness::agent::MIRROR;
use crate::harness::{Agent, Host, Network, poll};

#[test]
fn the_service_starts_at_boot_reloads_and_stops_cleanly() {
    let network = Network::new();
    let mut host = Host::new(&network, "one", 11);
    Agent::install(&host, MIRROR);
    host.boot();
    let agent = Agent::on(&host);
    agent.wait_until_ready();

    let status = agent.status();
    assert!(status.contains("Active: active (running)"), "{status}");
    assert!(
        status.contains("Status: \""),
        "no line that says what it is doing:\n{status}"
    );
    let user = host.run(&[
        "ps",
        "--no-headers",
        "-o",
        "user:32",
        &agent.property("MainPID"),
    ]);
    assert_eq!(user.trim(), "registry-agent");

    let process = agent.property("MainPID");
    agent.systemctl("reload");
    agent.wait_until_ready();
    assert_eq!(
        agent.property("MainPID"),
        process,
        "a reload is not a restart"
    );
    assert_eq!(agent.property("NRestarts"), "0");

    agent.systemctl("stop");
    assert_eq!(agent.property("ActiveState"), "inactive");
    assert_eq!(agent.property("Result"), "success");
    assert_eq!(agent.property("ExecMainStatus"), "0");
}

#[test]
fn a_killed_agent_is_started_again_and_a_refused_configuration_is_not() {
    let network = Network::new();
    let mut host = Host::new(&network, "one", 11);
    Agent::install(&host, MIRROR);
    host.boot();
    let agent = Agent::on(&host);
    agent.wait_until_ready();

    host.run(&[
        "systemctl",
        "kill",
        "--signal=KILL",
        "registry-agent.service",
    ]);
    poll::until(
        "systemd starts a killed agent again",
        Duration::from_secs(30),
        || match agent.property("NRestarts").as_str() {
            "1" => Ok(()),
            other => Err(other.to_owned()),
        },
    );
    agent.wait_until_ready();

    host.write("/etc/registry-agent/config.yaml", "no_such_key: 1\n");
    let restart = host.try_run(&["systemctl", "restart", "registry-agent.service"]);
    assert!(!restart.succeeded(), "{restart}");
    assert_eq!(
        agent.property("ActiveState"),
        "failed",
        "{}",
        agent.property("Result")
    );
    assert_eq!(agent.property("ExecMainStatus"), "2");
}
