//! Debian's docker-registry on a host, over the same root as the agent's: what people come from,
//! and may go back to. Never at the same time as the agent.

use std::time::Duration;

use serde_json::json;

use super::agent::ROOT;
use super::host::Host;
use super::poll;

const CONFIG: &str = "/etc/docker-registry.json";
const UNIT: &str = "old-registry.service";

/// A docker-registry that serves at the agent's address.
pub struct Distribution<'a> {
    host: &'a Host,
}

impl<'a> Distribution<'a> {
    /// Starts it as a registry that serves what it has, or as a proxy of `upstream`.
    #[track_caller]
    pub fn start(host: &'a Host, upstream: Option<&str>) -> Self {
        let mut config = json!({
            "version": "0.1",
            "log": { "level": "warn" },
            "storage": { "filesystem": { "rootdirectory": ROOT } },
            "http": { "addr": "127.0.0.1:5000" },
        });
        if let Some(upstream) = upstream {
            config["proxy"] = json!({ "remoteurl": upstream });
        }
        // YAML holds JSON.
        host.write(CONFIG, &config.to_string());
        host.run(&[
            "systemd-run",
            "--quiet",
            &format!("--unit={UNIT}"),
            // Whose root it is.
            "--uid=registry-agent",
            "docker-registry",
            "serve",
            CONFIG,
        ]);
        let base = ["curl", "-sS", "--fail", "http://127.0.0.1:5000/v2/"];
        poll::until("docker-registry answers", Duration::from_secs(30), || {
            let answer = host.try_run(&base);
            if answer.succeeded() {
                Ok(())
            } else {
                Err(answer)
            }
        });
        Self { host }
    }

    /// Stops it.
    #[track_caller]
    pub fn stop(self) {
        self.host.run(&["systemctl", "stop", UNIT]);
    }
}
