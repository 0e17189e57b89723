//! What a docker daemon says of itself: `GET /info` of its Engine API (moby, `api/swagger.yaml`),
//! on its Unix socket. Never over TCP: what wires a host has no network.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Deserializer};
use tokio::net::UnixStream;

use super::facts::{DockerInfo, FileFacts};
use super::read::{self, below};

/// Where dockerd, and `docker.socket` for its `fd://`, listen if nobody says otherwise.
const SOCKET: &str = "/run/docker.sock";
/// dockerd counts its containers, and asks its plugins and its store, before it answers.
const DEADLINE: Duration = Duration::from_secs(10);
const LIMIT: usize = 4 * 1024 * 1024;

/// A docker daemon did not say what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("can't ask the docker daemon at {}: {reason}", socket.display())]
pub struct DockerApiError {
    /// Its socket.
    pub socket: PathBuf,
    /// What came back.
    pub reason: String,
}

/// A running daemon's version, and the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// `ServerVersion`.
    pub version: String,
    /// What it is configured as.
    pub info: DockerInfo,
}

/// What the dockerd of this unit reads if nobody says otherwise.
pub(super) fn default_config_file(unit: &str) -> &'static str {
    match unit {
        "docker-latest.service" => "/etc/docker-latest/daemon.json",
        _ => "/etc/docker/daemon.json",
    }
}

/// The socket on which the daemon of this unit, with these arguments, answers: the first that its
/// flags name, or else its configuration file, or else the usual one. Nothing where it listens on TCP
/// alone.
pub fn socket(root: &Path, unit: &str, command_line: &[String]) -> Option<PathBuf> {
    let mut hosts: Vec<String> = values(command_line, "--host", Some("-H"));
    if hosts.is_empty() {
        let file = values(command_line, "--config-file", None).pop();
        let file = file.unwrap_or_else(|| default_config_file(unit).to_owned());
        hosts = hosts_in(&read::file(root, Path::new(&file)));
    }
    if hosts.is_empty() {
        return Some(PathBuf::from(SOCKET));
    }
    let path_of = |host: &String| match host.as_str() {
        // All of these stand for the usual one (moby, `opts/hosts.go`); a socket that systemd
        // passes has another name only where `docker.socket` was changed.
        "" | "unix://" => Some(SOCKET.into()),
        host if host.starts_with("fd://") => Some(SOCKET.into()),
        host => host.strip_prefix("unix://").map(PathBuf::from),
    };
    hosts.iter().find_map(path_of)
}

/// `hosts` of a `daemon.json`; none where it has none, or is none.
fn hosts_in(file: &FileFacts) -> Vec<String> {
    #[derive(Default, Deserialize)]
    struct DaemonJson {
        #[serde(default, deserialize_with = "or_null")]
        hosts: Vec<String>,
    }
    match file {
        FileFacts::Text { content, .. } => {
            let file: DaemonJson = serde_json::from_str(content).unwrap_or_default();
            file.hosts
        }
        FileFacts::Absent | FileFacts::Unreadable(_) => Vec::new(),
    }
}

/// Every value of a flag, in each way in which pflag takes them.
fn values(command_line: &[String], long: &str, short: Option<&str>) -> Vec<String> {
    let mut values = Vec::new();
    let mut words = command_line.iter().skip(1).map(String::as_str);
    while let Some(word) = words.next() {
        let value = if word == long || Some(word) == short {
            words.next()
        } else if let Some(rest) = word.strip_prefix(long) {
            rest.strip_prefix('=')
        } else {
            short
                .and_then(|short| word.strip_prefix(short))
                .map(|rest| rest.strip_prefix('=').unwrap_or(rest))
        };
        values.extend(value.map(str::to_owned));
    }
    values
}

/// Asks the daemon at this socket.
pub async fn ask(root: &Path, socket: &Path) -> Result<Daemon, DockerApiError> {
    let answer = tokio::time::timeout(DEADLINE, get(&below(root, socket))).await;
    let reason = match answer {
        Ok(Ok(body)) => match serde_json::from_slice::<Info>(&body) {
            Ok(info) => return Ok(info.into()),
            Err(e) => format!("its answer to GET /info is none: {e}"),
        },
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!("it did not answer in {}s", DEADLINE.as_secs()),
    };
    let socket = socket.to_owned();
    Err(DockerApiError { socket, reason })
}

async fn get(socket: &Path) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with `sender`, and says nothing that its answer does not.
    tokio::spawn(connection);
    // Without a version, every daemon answers in its own.
    let request = Request::get("/info")
        .header("host", "docker")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(format!("it answered {} to GET /info", response.status()).into());
    }
    Ok(Limited::new(response.into_body(), LIMIT)
        .collect()
        .await?
        .to_bytes())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    server_version: String,
    registry_config: RegistryConfig,
    #[serde(default)]
    live_restore_enabled: bool,
    #[serde(default)]
    containers_running: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RegistryConfig {
    #[serde(default, deserialize_with = "or_null")]
    mirrors: Vec<String>,
    #[serde(
        rename = "InsecureRegistryCIDRs",
        default,
        deserialize_with = "or_null"
    )]
    insecure_registry_cidrs: Vec<String>,
    #[serde(default, deserialize_with = "or_null")]
    index_configs: BTreeMap<String, Index>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Index {
    secure: bool,
}

/// Go's empty list is often `null`.
fn or_null<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl From<Info> for Daemon {
    fn from(info: Info) -> Self {
        let registries = info.registry_config;
        let insecure = registries.index_configs.into_iter();
        let insecure = insecure.filter(|(_, index)| !index.secure);
        let mut insecure_registries = registries.insecure_registry_cidrs;
        insecure_registries.extend(insecure.map(|(name, _)| name));
        Self {
            version: info.server_version,
            info: DockerInfo {
                mirrors: registries.mirrors,
                insecure_registries,
                live_restore: info.live_restore_enabled,
                containers_running: info.containers_running,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use super::*;

    #[test]
    fn the_socket_is_where_the_daemon_was_told_to_listen() {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in [
            (
                "file.json",
                r#"{"hosts": ["tcp://0.0.0.0:1", "unix:///srv/f.sock"]}"#,
            ),
            ("tcp.json", r#"{"hosts": ["tcp://0.0.0.0:1"]}"#),
            ("broken.json", "{"),
        ] {
            let path = root.path().join(path);
            let file = OpenOptions::new().write(true).create_new(true).open(path);
            file.unwrap().write_all(content.as_bytes()).unwrap();
        }
        for (flags, expected) in [
            ("", Some(SOCKET)),
            ("--config-file /file.json", Some("/srv/f.sock")),
            ("--config-file=/tcp.json", None),
            ("--config-file=/broken.json", Some(SOCKET)),
            (
                "-H fd:// --containerd=/run/containerd/containerd.sock",
                Some(SOCKET),
            ),
            ("-H unix://", Some(SOCKET)),
            ("-H=unix:///srv/d.sock", Some("/srv/d.sock")),
            ("-Hunix:///srv/d.sock", Some("/srv/d.sock")),
            ("--host unix:///srv/d.sock", Some("/srv/d.sock")),
            (
                "--host=tcp://0.0.0.0:2376 --host=unix:///srv/d.sock",
                Some("/srv/d.sock"),
            ),
            ("--label --hosts=x", Some(SOCKET)),
            ("-H tcp://0.0.0.0:2376", None),
        ] {
            let words = std::iter::once("/usr/bin/dockerd").chain(flags.split_whitespace());
            let words: Vec<String> = words.map(str::to_owned).collect();
            let socket = socket(root.path(), "docker.service", &words);
            assert_eq!(socket.as_deref(), expected.map(Path::new), "{flags}");
        }
    }

    #[test]
    fn each_unit_has_its_own_file_to_say_where_it_listens() {
        let root = tempfile::tempdir().unwrap();
        for (folder, socket) in [("docker", "a"), ("docker-latest", "b")] {
            let folder = root.path().join("etc").join(folder);
            std::fs::create_dir_all(&folder).unwrap();
            let file = folder.join("daemon.json");
            let file = OpenOptions::new().write(true).create_new(true).open(file);
            let content = format!(r#"{{"hosts": ["unix:///run/{socket}.sock"]}}"#);
            file.unwrap().write_all(content.as_bytes()).unwrap();
        }
        let words = ["/usr/bin/dockerd".to_owned()];
        for (unit, expected) in [
            ("docker.service", "/run/a.sock"),
            ("docker-latest.service", "/run/b.sock"),
        ] {
            let socket = socket(root.path(), unit, &words);
            assert_eq!(socket.as_deref(), Some(Path::new(expected)));
        }
    }

    #[test]
    fn info_is_read_from_what_docker_20_10_says() {
        // Cut down from a Debian 12 host's, with one registry of its own.
        let body = r#"{"ID":"X","Containers":3,"ContainersRunning":2,"RegistryConfig":{
            "AllowNondistributableArtifactsCIDRs":[],"InsecureRegistryCIDRs":["127.0.0.0/8"],
            "IndexConfigs":{"docker.io":{"Name":"docker.io","Mirrors":["http://m/"],"Secure":true,
            "Official":true},"r.example:5000":{"Name":"r.example:5000","Mirrors":[],"Secure":false,
            "Official":false}},"Mirrors":["http://m/"]},"LiveRestoreEnabled":true,
            "ServerVersion":"20.10.24+dfsg1"}"#;
        let info: Info = serde_json::from_str(body).unwrap();
        let daemon = Daemon::from(info);
        assert_eq!(daemon.version, "20.10.24+dfsg1");
        assert_eq!(daemon.info.mirrors, ["http://m/"]);
        assert_eq!(
            daemon.info.insecure_registries,
            ["127.0.0.0/8", "r.example:5000"]
        );
        assert!(daemon.info.live_restore);
        assert_eq!(daemon.info.containers_running, 2);
    }

    #[test]
    fn a_list_that_go_calls_null_is_empty() {
        let body = r#"{"RegistryConfig":{"Mirrors":null,"InsecureRegistryCIDRs":null,
            "IndexConfigs":null},"ServerVersion":"29.3.0"}"#;
        let info: Info = serde_json::from_str(body).unwrap();
        assert_eq!(Daemon::from(info).info, DockerInfo::default());
    }
}
