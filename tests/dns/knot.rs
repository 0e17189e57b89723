//! A knot of a test's own, with the least rules that the agents need.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use registry_agent::config::{DnsProvider, DnsSettings, Secret, TsigAlgorithm, TsigSettings};
use tempfile::TempDir;

use crate::support::{PATIENCE, eventually, own_address, write_file};
use crate::{NAME, Running};

pub const ZONE: &str = "example.com";
/// Bytes that are text in base64.
pub const SECRET: &str = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0MTI=";

pub struct Knot {
    pub address: SocketAddr,
    folder: TempDir,
    _running: Running,
}

impl Knot {
    /// One whose zone holds these lines as well, of people's own.
    pub fn start(lines: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ip = own_address();
        // knot takes no port 0. Nobody else has this address.
        let port = TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap();
        let zone = format!(
            "$ORIGIN {ZONE}.\n$TTL 3600\n@ SOA ns h 1 3600 600 86400 60\n@ NS ns\nns A 127.0.0.1\n\
             {lines}\n"
        );
        std::fs::create_dir(folder.path().join("db")).unwrap();
        write_file(&folder.path().join("zone"), zone.as_bytes());
        let conf = folder.path().join("knot.conf");
        write_file(&conf, configuration(&folder, port).as_bytes());
        let log = folder.path().join("log");
        let log = std::fs::File::options()
            .write(true)
            .create_new(true)
            .open(log);
        let log = log.unwrap();
        let child = Command::new("/usr/sbin/knotd")
            .arg("--config")
            .arg(&conf)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("knotd: the Debian package knot is installed by tests/all");
        let knot = Self {
            address: port,
            folder,
            _running: Running(child),
        };
        eventually(PATIENCE, "knot answers", || {
            TcpStream::connect(knot.address).is_ok() && knot.control(&["status"]).is_some()
        });
        knot
    }

    /// The agents' settings.
    pub fn settings(&self) -> DnsSettings {
        self.settings_with("agent", TsigAlgorithm::HmacSha256, SECRET)
    }

    pub fn settings_with(&self, key: &str, algorithm: TsigAlgorithm, secret: &str) -> DnsSettings {
        DnsSettings {
            name: NAME.to_owned(),
            ttl: std::time::Duration::from_secs(30),
            provider: DnsProvider::Rfc2136 {
                server: self.address,
                zone: ZONE.to_owned(),
                tsig: TsigSettings {
                    name: key.to_owned(),
                    algorithm,
                    secret: Secret::new(secret),
                },
                cname: None,
            },
        }
    }

    /// What the zone holds at a name of it, as `owner TTL type data`, by knot's own word.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let name = format!("{name}.");
        let said = self.control(&["zone-read", ZONE, &name]);
        let said = said.unwrap_or_default();
        let lines = said.lines().filter_map(|line| line.split_once("] "));
        let mut lines: Vec<_> = lines.map(|(_, line)| line.to_owned()).collect();
        lines.sort();
        lines
    }

    /// Changes the zone as its owner, beside the agents.
    pub fn edit(&self, commands: &[&[&str]]) {
        assert!(self.control(&["zone-begin", ZONE]).is_some());
        for command in commands {
            let all = [&[command[0], ZONE], &command[1..]].concat();
            assert!(self.control(&all).is_some(), "{command:?}");
        }
        assert!(self.control(&["zone-commit", ZONE]).is_some());
    }

    fn control(&self, command: &[&str]) -> Option<String> {
        let output = Command::new("/usr/sbin/knotc")
            .arg("--config")
            .arg(self.folder.path().join("knot.conf"))
            .args(command)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        output.status.success().then_some(text)
    }
}

fn configuration(folder: &TempDir, listen: SocketAddr) -> String {
    let folder: PathBuf = folder.path().to_owned();
    let folder = folder.display();
    let (ip, port) = (listen.ip(), listen.port());
    let key = |id: &str, algorithm: &str| {
        format!("  - id: {id}\n    algorithm: {algorithm}\n    secret: {SECRET}\n")
    };
    let keys = [
        key("agent", "hmac-sha256"),
        key("agent384", "hmac-sha384"),
        key("agent512", "hmac-sha512"),
        key("somebody", "hmac-sha256"),
    ]
    .concat();
    format!(
        r#"
server:
    listen: {ip}@{port}
    rundir: "{folder}"
    background-workers: 1
    udp-workers: 1
    tcp-workers: 2
database:
    storage: "{folder}/db"
log:
  - target: stderr
    any: info
key:
{keys}
acl:
  - id: agents
    key: [agent, agent384, agent512]
    action: update
    update-type: [A, AAAA, CNAME, TXT]
    update-owner: name
    update-owner-match: equal
    update-owner-name: [fleet, _registry-agent.fleet]
zone:
  - domain: {ZONE}
    storage: "{folder}"
    file: zone
    zonefile-sync: -1
    zonefile-load: difference-no-serial
    journal-content: all
    acl: agents
"#
    )
}
