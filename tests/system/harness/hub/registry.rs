//! Debian's docker-registry, the part of the Hub that is real.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::TcpStream;

use super::tokens::ISSUER;
use super::{Attachment, Names, Scratch};
use crate::harness::scratch::host_image;

/// Where it listens, in the Hub's own namespace.
pub const ADDRESS: &str = "127.0.0.1:5000";

/// The process, killed on drop.
pub struct Registry {
    process: Child,
    storage: PathBuf,
    log: PathBuf,
}

impl Registry {
    /// Starts one in the Hub's namespace, which believes tokens signed with `certificate`.
    pub fn start(
        scratch: &Scratch,
        attachment: &Attachment,
        names: &Names,
        certificate: &str,
    ) -> Self {
        let storage = scratch.folder("storage");
        let bundle = scratch.at("tokens.pem");
        write(Path::new(&bundle), certificate);
        let config = scratch.at("config.yml");
        // YAML holds JSON.
        let settings = json!({
            "version": "0.1",
            "log": { "level": "warn" },
            "storage": { "filesystem": { "rootdirectory": &storage } },
            "http": { "addr": ADDRESS },
            "auth": { "token": {
                "realm": format!("https://{}/token", names.auth),
                "service": names.service,
                "issuer": ISSUER,
                "rootcertbundle": bundle,
            } },
        });
        write(Path::new(&config), &settings.to_string());
        let log = scratch.path().join("registry.log");
        let output = write(&log, "");
        let binary = host_image().join("usr/bin/docker-registry");
        let process = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "ip",
                "netns",
                "exec",
                attachment.namespace(),
            ])
            .arg(binary)
            .args(["serve", &config])
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle to a file"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("starting docker-registry: {error}"));
        Self {
            process,
            storage: storage.into(),
            log,
        }
    }

    /// Its root, in the layout that is documented in distribution's `paths.go`.
    pub fn storage(&self) -> PathBuf {
        self.storage.clone()
    }
}

/// Waits until it accepts connections. Runs in the Hub's namespace.
pub async fn answers() {
    let end = Instant::now() + Duration::from_secs(30);
    while let Err(error) = TcpStream::connect(ADDRESS).await {
        assert!(
            Instant::now() < end,
            "docker-registry does not listen on {ADDRESS}: {error}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        if thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(20)..];
            eprintln!(
                "=== the Hub's docker-registry said at last\n{}",
                last.join("\n")
            );
        }
    }
}

fn write(path: &Path, text: &str) -> std::fs::File {
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()).map(|()| file));
    written.unwrap_or_else(|error| panic!("writing {}: {error}", path.display()))
}
