//! The agent on a host, as its package installs it.

use std::fs;
use std::time::Duration;

use super::host::Host;
use super::poll;

/// The binary, unit and user of this working copy on a host.
pub struct Agent<'a> {
    host: &'a Host,
}

/// A mirror of the Hub that other hosts can reach, and that asks for a tag again soon enough for
/// a test to see it.
pub const MIRROR: &str = "\
role: mirror
listen: 0.0.0.0:5000
admin: unix:/run/registry-agent/admin.sock
upstreams:
- registry: docker.io
  url: https://registry-1.docker.io
freshness: { window: 1s, deadline: 1s }
";

/// The mirror's address for the host that it runs on.
pub const LOCAL: &str = "http://127.0.0.1:5000";

const READY: Duration = Duration::from_secs(30);

impl<'a> Agent<'a> {
    /// Installs it with `config`, to start at the next boot.
    pub fn install(host: &'a Host, config: &str) -> Self {
        let binary = env!("CARGO_BIN_EXE_registry-agent");
        let binary = fs::read(binary).unwrap_or_else(|error| panic!("reading {binary}: {error}"));
        host.write_executable("/usr/bin/registry-agent", &binary);
        host.write("/usr/lib/systemd/system/registry-agent.service", SERVICE);
        host.write("/usr/lib/sysusers.d/registry-agent.conf", SYSUSERS);
        host.write("/etc/registry-agent/config.yaml", config);
        host.run(&["systemd-sysusers"]);
        host.run(&["systemctl", "enable", "registry-agent.service"]);
        Self { host }
    }

    /// One that is installed already.
    pub fn on(host: &'a Host) -> Self {
        Self { host }
    }

    /// Waits until it says that it is ready, on its admin socket and on its port.
    #[track_caller]
    pub fn wait_until_ready(&self) {
        let admin = [
            "curl",
            "-sS",
            "--fail-with-body",
            "--max-time",
            "5",
            "--unix-socket",
        ];
        let socket = ["/run/registry-agent/admin.sock", "http://localhost/readyz"];
        let admin = [&admin[..], &socket].concat();
        let root = format!("{LOCAL}/");
        let port = ["curl", "-sS", "--fail-with-body", "--max-time", "5", &root];
        for look in [&admin[..], &port] {
            poll::until("the agent is ready", READY, || {
                let answer = self.host.try_run(look);
                if answer.succeeded() {
                    Ok(())
                } else {
                    Err(answer)
                }
            });
        }
    }

    /// `systemctl VERB registry-agent`.
    #[track_caller]
    pub fn systemctl(&self, verb: &str) {
        self.host
            .run(&["systemctl", verb, "registry-agent.service"]);
    }

    /// A property of the unit.
    #[track_caller]
    pub fn property(&self, name: &str) -> String {
        let value = self.host.run(&[
            "systemctl",
            "show",
            "--property",
            name,
            "--value",
            "registry-agent.service",
        ]);
        value.trim().to_owned()
    }

    /// What `systemctl status registry-agent` shows a person.
    #[track_caller]
    pub fn status(&self) -> String {
        self.host.run(&[
            "systemctl",
            "status",
            "--no-pager",
            "--full",
            "registry-agent.service",
        ])
    }

    /// Bytes of its cache on disk.
    #[track_caller]
    pub fn cached_bytes(&self) -> u64 {
        let usage = self
            .host
            .run(&["du", "--summarize", "--bytes", "/var/lib/registry-agent"]);
        let bytes = usage
            .split('\t')
            .next()
            .and_then(|bytes| bytes.parse().ok());
        bytes.unwrap_or_else(|| panic!("du printed {usage:?}"))
    }
}

const SERVICE: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/units/registry-agent.service"
));
const SYSUSERS: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/units/registry-agent.sysusers.conf"
));
