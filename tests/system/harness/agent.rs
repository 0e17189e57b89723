//! The agent on a host, as its package installs it.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use super::docker::Docker;
use super::host::Host;
use super::hub::Hub;
use super::image::Content;
use super::network::Network;
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

/// Where it keeps images.
pub const ROOT: &str = "/var/lib/registry-agent";

/// [`MIRROR`], of a second registry too.
pub fn mirror_of_two() -> String {
    MIRROR.replace("freshness", "- registry: ghcr.io\nfreshness")
}

/// The mirror's address for the host that it runs on.
pub const LOCAL: &str = "http://127.0.0.1:5000";

const READY: Duration = Duration::from_secs(30);

/// A host whose dockerd pulls through the agent beside it; both are up.
pub fn host_with_mirror(network: &Network, registries: &[&Hub], config: &str) -> Host {
    let mut host = Host::new(network, "one", 11);
    for registry in registries {
        registry.introduce_to(&host);
    }
    Agent::install(&host, config);
    Docker::on(&host).use_mirror(LOCAL);
    host.boot();
    Agent::on(&host).wait_until_ready();
    host
}

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

    /// Adds its other units, as its package installs them: systemd holds its ports, at the address
    /// of [`MIRROR`], and starts its host's part with it.
    pub fn with_all_units(self) -> Self {
        let host = self.host;
        host.write("/usr/lib/systemd/system/registry-agent.socket", SOCKET);
        host.write("/usr/lib/systemd/system/registry-agent-host.service", HOST);
        host.write(
            "/etc/systemd/system/registry-agent.socket.d/listen.conf",
            "[Socket]\nListenStream=\nListenStream=0.0.0.0:5000\n\
             ListenStream=/run/registry-agent/admin.sock\n",
        );
        let units = ["registry-agent.socket", "registry-agent-host.service"];
        host.run(&[&["systemctl", "enable"], &units[..]].concat());
        self
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

    /// One of its metrics, without labels.
    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        let metrics = self.host.run(&[
            "curl",
            "-sS",
            "--fail",
            "--unix-socket",
            "/run/registry-agent/admin.sock",
            "http://localhost/metrics",
        ]);
        let mut values = metrics
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        values
            .next()
            .unwrap_or_else(|| panic!("no counter {name} in\n{metrics}"))
    }

    /// Waits until it downloads nothing: a client has its last byte before the store has.
    #[track_caller]
    pub fn wait_until_idle(&self) {
        poll::until(
            "the agent has stored what it downloads",
            READY,
            || match self.counter("registry_agent_fills") {
                0 => Ok(()),
                fills => Err(fills),
            },
        );
    }

    /// Waits until it has so many bytes of a blob that it is downloading.
    #[track_caller]
    pub fn wait_until_it_has_of(&self, digest: &str, bytes: usize) {
        let fill = format!("{ROOT}/registry-agent/fills/{}", digest.replace(':', "/"));
        poll::until("the agent has what it was sent", READY, || {
            let size = self.host.try_run(&["stat", "--format=%s", &fill]);
            let enough = size
                .stdout
                .trim()
                .parse()
                .is_ok_and(|size: usize| size >= bytes);
            if enough { Ok(()) } else { Err(size) }
        });
    }

    /// All of its files and folders with the files' sizes, and the disk use of each folder in
    /// KiB, as `du` says it.
    #[track_caller]
    pub fn disk_use(&self) -> String {
        let sizes = ["find", ROOT, "-type", "f", "-printf", "%P %s bytes\n"];
        let mut lines: Vec<String> = self.host.run(&sizes).lines().map(str::to_owned).collect();
        lines.extend(self.host.run(&["du", ROOT]).lines().map(str::to_owned));
        lines.sort();
        lines.join("\n")
    }

    /// The digests of all blobs and manifests in its store. Panics if one is other bytes than its
    /// name says.
    #[track_caller]
    pub fn stored(&self) -> BTreeSet<String> {
        const DATA: [&str; 3] = ["-name", "data", "-type"];
        const SUM: [&str; 5] = ["f", "-exec", "sha256sum", "{}", "+"];
        let blobs = format!("{ROOT}/docker/registry/v2/blobs/sha256");
        self.host.run(&["mkdir", "--parents", &blobs]);
        let sums = self
            .host
            .run(&[&["find", &blobs], &DATA[..], &SUM].concat());
        let digests = sums.lines().map(|line| {
            let (sum, path) = line.split_once("  ").expect("a checksum and a path");
            let named = path.rsplit('/').nth(1).expect("a blob's folder");
            assert_eq!(sum, named, "the store has wrong bytes");
            format!("sha256:{sum}")
        });
        digests.collect()
    }

    /// Panics unless the store of a running agent has these, and no wrong bytes.
    #[track_caller]
    pub fn assert_stores<'b>(&self, contents: impl IntoIterator<Item = &'b Content>) {
        self.wait_until_idle();
        let stored = self.stored();
        for content in contents {
            assert!(
                stored.contains(&content.digest),
                "{} ({}) is not among {stored:#?}",
                content.digest,
                content.media_type
            );
        }
    }

    /// Bytes of its cache on disk.
    #[track_caller]
    pub fn cached_bytes(&self) -> u64 {
        let usage = self.host.run(&["du", "--summarize", "--bytes", ROOT]);
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
const SOCKET: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/units/registry-agent.socket"
));
const HOST: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/units/registry-agent-host.service"
));
const SYSUSERS: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/units/registry-agent.sysusers.conf"
));
