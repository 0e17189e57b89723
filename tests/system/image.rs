//! The image that ami/ makes: by its own scripts, from a Debian root; and its first boot, with
//! user-data.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::harness::command::Finished;
use crate::harness::{Host, Network, Packages, poll};

const PATIENCE: Duration = Duration::from_mins(2);
const AMI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/ami");
const SCRIPTS: [&str; 4] = ["install.sh", "harden.sh", "clean.sh", "validate.sh"];

/// A host's root that has been made an image, powered off. It looks for no cloud but the seed of
/// these tests.
fn image(network: &Network) -> Host {
    let host = Host::new(network, "one", 11);
    Packages::new().put("0.1.0-1", &host, "/opt/packages");
    for script in SCRIPTS {
        let script = format!("provision/{script}");
        host.copy(&Path::new(AMI).join(&script), &format!("/opt/ami/{script}"));
    }
    let unit = Path::new(AMI).join("registry-agent-setup.service");
    host.copy(&unit, "/opt/ami/registry-agent-setup.service");
    host.run(&[
        "env",
        "PACKAGES=/opt/packages",
        "/opt/ami/provision/install.sh",
    ]);
    for script in &SCRIPTS[1..] {
        host.run(&[&format!("/opt/ami/provision/{script}")]);
    }
    host
}

fn validate(host: &Host) -> Finished {
    host.try_run(&["/opt/ami/provision/validate.sh"])
}

#[test]
fn an_image_with_anything_that_must_not_be_in_it_fails_the_bake() {
    let network = Network::new();
    let host = image(&network);
    let said = validate(&host).expect_success();
    assert!(said.contains("nothing is wrong"), "{said}");

    // What is done to the image, what is said, and what puts it right again.
    for (wrong, words, right) in [
        (
            "mkdir -p /etc/ssh; echo key >/etc/ssh/ssh_host_ed25519_key",
            "a host key, the same on every instance: /etc/ssh/ssh_host_ed25519_key",
            "rm /etc/ssh/ssh_host_ed25519_key",
        ),
        (
            "mkdir -p /var/lib/cloud/instances/i-1",
            "cloud-init's state: it would take every instance for this one: /var/lib/cloud/instances",
            "rm -r /var/lib/cloud/instances",
        ),
        (
            "echo line >/var/log/cloud-init.log",
            "a log of this machine: /var/log/cloud-init.log",
            ": >/var/log/cloud-init.log",
        ),
        (
            "echo 0123456789abcdef0123456789abcdef >/etc/machine-id",
            "/etc/machine-id is not empty",
            ": >/etc/machine-id",
        ),
        (
            "rm /etc/machine-id",
            "/etc/machine-id is not there",
            ": >/etc/machine-id",
        ),
        (
            "mkdir -p /home/admin/.ssh; echo ssh-ed25519 >/home/admin/.ssh/authorized_keys",
            "a credential or a history: /home/admin/.ssh/authorized_keys",
            "rm -r /home/admin",
        ),
        (
            "mkdir /root/.aws",
            "a credential or a history: /root/.aws",
            "rmdir /root/.aws",
        ),
        (
            "echo ls >/root/.bash_history",
            "a credential or a history: /root/.bash_history",
            "rm /root/.bash_history",
        ),
        (
            "mkdir -p /etc/registry-agent; echo x >/etc/registry-agent/docker.io.password",
            "a credential: /etc/registry-agent/docker.io.password",
            "rm /etc/registry-agent/docker.io.password",
        ),
        (
            "echo 'root:secret' | chpasswd -c SHA512",
            "a password: root's, in /etc/shadow",
            "usermod --password '!' root",
        ),
        (
            "systemctl disable registry-agent-setup.service",
            "registry-agent-setup.service is disabled; must be enabled",
            "systemctl enable registry-agent-setup.service",
        ),
        (
            "mv /usr/lib/systemd/system/registry-agent.socket /root/",
            "registry-agent.socket is not there",
            "mv /root/registry-agent.socket /usr/lib/systemd/system/",
        ),
        (
            "echo 'listen: nowhere' >/etc/registry-agent/config.yaml",
            "registry-agent check: /etc/registry-agent/config.yaml: listen:",
            "rm /etc/registry-agent/config.yaml",
        ),
    ] {
        host.run(&["sh", "-ec", wrong]);
        let refused = validate(&host);
        assert_eq!(refused.code, Some(1), "{wrong}: {refused}");
        let lines: Vec<_> = refused.stderr.lines().collect();
        assert!(
            lines.len() == 1 && lines[0].contains(words),
            "{wrong}: not `{words}` alone: {refused}"
        );
        host.run(&["sh", "-ec", right]);
        assert!(validate(&host).succeeded(), "{right}");
    }
}

#[test]
fn an_image_becomes_what_its_user_data_says_at_its_first_boot() {
    let network = Network::new();
    let mut host = image(&network);
    let user_data = fs::read_to_string(Path::new(AMI).join("../cloud-init/mirror.yaml"));
    host.run(&["rm", "/etc/cloud/cloud-init.disabled"]);
    host.write(
        "/etc/cloud/cloud.cfg.d/99-test.cfg",
        "datasource_list: [ NoCloud ]\n",
    );
    let seed = "/var/lib/cloud/seed/nocloud";
    host.write(&format!("{seed}/meta-data"), "instance-id: i-0123456789\n");
    host.write(
        &format!("{seed}/user-data"),
        &user_data.expect("mirror.yaml"),
    );
    host.boot();
    joined(&host);

    // The second boot finds everything done.
    host.reboot();
    joined(&host);
    let unit = [
        "journalctl",
        "--boot",
        "--unit",
        "registry-agent-setup",
        "--output",
        "cat",
    ];
    let said = host.run(&unit);
    assert!(said.contains("everything is installed already"), "{said}");
}

/// Waits until docker has the mirror, and looks at how it came to that.
#[track_caller]
fn joined(host: &Host) {
    let mirrors = "{{json .RegistryConfig.Mirrors}}";
    poll::until("docker has the mirror", PATIENCE, || {
        let mirrors = host.try_run(&["docker", "info", "--format", mirrors]);
        if mirrors.stdout.trim() == "[\"http://127.0.0.1:5000/\"]" {
            Ok(())
        } else {
            Err(mirrors)
        }
    });
    host.run(&["curl", "-sS", "--fail", "http://127.0.0.1:5000/"]);
    let listens = host.run(&[
        "systemctl",
        "show",
        "--property=Listen",
        "registry-agent.socket",
    ]);
    assert!(listens.contains("[::]:5000"), "{listens}");
    // It had it when it started: nobody told it to read its file again.
    let reloads = [
        "journalctl",
        "--boot",
        "--unit",
        "docker",
        "--output",
        "cat",
    ];
    let docker = host.run(&reloads);
    assert!(!docker.contains("Reloaded configuration"), "{docker}");
    let journal = host.run(&["journalctl", "--boot", "--output", "cat"]);
    assert!(!journal.contains("ordering cycle"), "{journal}");
    let failed = host.run(&[
        "systemctl",
        "list-units",
        "--failed",
        "--no-legend",
        "registry-agent*",
    ]);
    assert_eq!(failed, "");
}
