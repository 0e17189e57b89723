//! The .deb on a host: installed, upgraded, removed, purged; and beside a binary that installed
//! itself.

use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::harness::{Host, Network, Packages, poll};

const PATIENCE: Duration = Duration::from_mins(1);
const BINARY: &str = env!("CARGO_BIN_EXE_registry-agent");
const UNITS: [&str; 3] = [
    "registry-agent.socket",
    "registry-agent.service",
    "registry-agent-host.service",
];

#[track_caller]
fn property(host: &Host, unit: &str, name: &str) -> String {
    let value = host.run(&["systemctl", "show", "--property", name, "--value", unit]);
    value.trim().to_owned()
}

/// Panics unless systemd has read the package's unit, and none of /etc over it.
#[track_caller]
fn assert_packaged(host: &Host, unit: &str) {
    let file = property(host, unit, "FragmentPath");
    // /lib is /usr/lib, and systemd names it as it was built to.
    let file = file.strip_prefix("/usr").unwrap_or(&file);
    assert_eq!(file, format!("/lib/systemd/system/{unit}"));
}

#[track_caller]
fn wait_for_mirrors(host: &Host, wanted: &[&str]) {
    let format = "{{json .RegistryConfig.Mirrors}}";
    poll::until("docker has these mirrors", PATIENCE, || {
        let mirrors = host.try_run(&["docker", "info", "--format", format]);
        if wanted.contains(&mirrors.stdout.trim()) {
            Ok(())
        } else {
            Err(mirrors)
        }
    });
}

const WIRED: &[&str] = &["[\"http://127.0.0.1:5000/\"]"];
/// A list that was taken away live, and one that never was.
const UNWIRED: &[&str] = &["[]", "null"];

/// All that the package could leave on a host: files by name and content, users, unit states.
fn trace(host: &Host) -> String {
    const SCRIPT: &str = "\
find /usr/bin /usr/lib/systemd /usr/lib/sysusers.d /usr/share/doc /usr/share/man /usr/share/zsh \\
    /usr/share/fish /usr/share/bash-completion /etc/systemd /etc/docker /etc/containers \\
    /etc/containerd /etc/registry-agent -xdev -printf '%p %y %l\\n' 2>/dev/null | sort
find /run /var/lib /etc -xdev -name '*registry-agent*' -not -path '/run/systemd/units/*' \\
    -not -path '/var/lib/dpkg/*' 2>/dev/null | sort
cat /etc/docker/daemon.json 2>/dev/null
getent passwd registry-agent
getent group registry-agent
systemctl list-unit-files 'registry-agent*' --no-legend";
    host.try_run(&["sh", "-c", SCRIPT]).stdout
}

fn new_host(network: &Network) -> Host {
    let mut host = Host::new(network, "one", 11);
    host.write("/etc/docker/daemon.json", "{\n\t\"debug\":  false\n}\n");
    host.boot();
    host
}

#[test]
fn a_package_is_installed_upgraded_removed_and_purged() {
    let network = Network::new();
    let host = new_host(&network);
    let packages = Packages::new();
    let (old, new) = (
        packages.put("0.1.0-1", &host, "/root"),
        packages.put("0.1.0-2", &host, "/root"),
    );
    let before = trace(&host);

    host.run(&["dpkg", "--install", &old]);
    for unit in UNITS {
        assert_eq!(property(&host, unit, "ActiveState"), "active", "{unit}");
        assert_eq!(property(&host, unit, "UnitFileState"), "enabled", "{unit}");
        assert_packaged(&host, unit);
    }
    wait_for_mirrors(&host, WIRED);
    host.run(&["curl", "-sS", "--fail", "http://127.0.0.1:5000/v2/"]);
    // `install` has nothing to add to it.
    let said = host.run(&["registry-agent", "install"]);
    assert_eq!(said, "everything is installed already\n");
    for file in [
        "/usr/share/man/man1/registry-agent.1.gz",
        "/usr/share/bash-completion/completions/registry-agent",
        "/usr/share/doc/registry-agent/README.md",
        "/usr/share/doc/registry-agent/copyright",
        "/usr/share/doc/registry-agent/examples/cloud-init/mirror.yaml",
    ] {
        host.run(&["test", "-s", file]);
    }

    upgrade(&host, &new);

    // What the administrator has disabled stays so.
    host.run(&["systemctl", "disable", "--now", "registry-agent.service"]);
    host.run(&["dpkg", "--install", &old]);
    assert_eq!(property(&host, UNITS[1], "ActiveState"), "inactive");
    assert_eq!(property(&host, UNITS[1], "UnitFileState"), "disabled");
    host.run(&["systemctl", "enable", "--now", "registry-agent.service"]);
    wait_for_mirrors(&host, WIRED);

    let docker = property(&host, "docker.service", "MainPID");
    host.run(&["dpkg", "--remove", "registry-agent"]);
    wait_for_mirrors(&host, UNWIRED);
    let daemon = host.read("/etc/docker/daemon.json");
    assert_eq!(daemon, "{\n\t\"debug\":  false\n}\n");
    assert_eq!(property(&host, "docker.service", "MainPID"), docker);
    let refused = host.try_run(&["curl", "-sS", "http://127.0.0.1:5000/v2/"]);
    assert_eq!(refused.code, Some(7), "nobody listens any more: {refused}");
    // A removal keeps what is stored, and what was enabled is so again.
    host.run(&["test", "-d", "/var/lib/registry-agent"]);
    host.run(&["dpkg", "--install", &new]);
    wait_for_mirrors(&host, WIRED);

    host.run(&["dpkg", "--purge", "registry-agent"]);
    assert_eq!(trace(&host), before);
}

/// Upgrades while clients ask: none is refused, and docker stays as it is.
fn upgrade(host: &Host, package: &str) {
    const HAMMER: &str = "\
while [ ! -e /tmp/enough ]; do
    curl -sS --fail --max-time 30 -o /dev/null http://127.0.0.1:5000/v2/ 2>>/tmp/failures
    echo >>/tmp/asked
done";
    let asked = || {
        let lines = host.try_run(&["wc", "--lines", "/tmp/asked"]).stdout;
        let count = lines.split(' ').next().and_then(|count| count.parse().ok());
        count.unwrap_or(0_u32)
    };
    let go_on = || {
        let before = asked();
        poll::until("the clients go on", PATIENCE, || {
            let now = asked();
            if now > before + 20 { Ok(()) } else { Err(now) }
        });
    };
    let process = property(host, UNITS[1], "MainPID");
    let docker = property(host, "docker.service", "MainPID");
    thread::scope(|scope| {
        let clients = [(); 2].map(|()| scope.spawn(|| host.try_run(&["sh", "-c", HAMMER])));
        go_on();
        host.run(&["dpkg", "--install", package]);
        go_on();
        host.write("/tmp/enough", "");
        for client in clients {
            client.join().expect("a client").expect_success();
        }
    });
    assert_eq!(host.read("/tmp/failures"), "");
    assert_ne!(property(host, UNITS[1], "MainPID"), process);
    assert_eq!(property(host, "docker.service", "MainPID"), docker);
    poll::until("the host's part is back", PATIENCE, || {
        match property(host, UNITS[2], "ActiveState").as_str() {
            "active" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
    for unit in [UNITS[1], UNITS[2]] {
        let process = property(host, unit, "MainPID");
        host.run(&[
            "cmp",
            &format!("/proc/{process}/exe"),
            "/usr/bin/registry-agent",
        ]);
    }
    wait_for_mirrors(host, WIRED);
}

#[test]
fn a_package_takes_over_from_a_binary_that_installed_itself_with_its_configuration() {
    let network = Network::new();
    let host = new_host(&network);
    let package = Packages::new().put("0.1.0-1", &host, "/root");
    let config = "role: mirror\nlisten: 0.0.0.0:5005\n";
    host.write("/etc/registry-agent/config.yaml", config);
    host.copy(Path::new(BINARY), "/usr/local/bin/registry-agent");
    host.run(&["/usr/local/bin/registry-agent", "install"]);
    let wired = WIRED[0].replace("5000", "5005");
    wait_for_mirrors(&host, &[&wired]);

    host.run(&["dpkg", "--install", &package]);
    for unit in UNITS {
        assert_packaged(&host, unit);
        assert_eq!(property(&host, unit, "UnitFileState"), "enabled", "{unit}");
    }
    poll::until("the packaged binary runs", PATIENCE, || {
        let process = property(&host, UNITS[1], "MainPID");
        let runs = host.try_run(&["readlink", &format!("/proc/{process}/exe")]);
        match runs.stdout.trim() {
            "/usr/bin/registry-agent" => Ok(()),
            _ => Err(runs),
        }
    });
    wait_for_mirrors(&host, &[&wired]);
    let listens = property(&host, UNITS[0], "Listen");
    assert!(
        listens.contains("0.0.0.0:5005") && !listens.contains(":5000"),
        "{listens}"
    );
    host.run(&["curl", "-sS", "--fail", "http://127.0.0.1:5005/v2/"]);
}

#[test]
fn a_package_that_may_not_start_anything_starts_nothing() {
    let network = Network::new();
    let host = new_host(&network);
    let package = Packages::new().put("0.1.0-1", &host, "/root");
    host.write_executable("/usr/sbin/policy-rc.d", b"#!/bin/sh\nexit 101\n");
    host.run(&["dpkg", "--install", &package]);
    for unit in UNITS {
        assert_eq!(property(&host, unit, "ActiveState"), "inactive", "{unit}");
        assert_eq!(property(&host, unit, "UnitFileState"), "enabled", "{unit}");
    }
    host.run(&["dpkg", "--purge", "registry-agent"]);
}
