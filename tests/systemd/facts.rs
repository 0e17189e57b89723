//! A host's facts, from a systemd, a docker daemon and files of our own below a scratch root.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use registry_agent::config::{self, HostSettings, Sources};
use registry_agent::host::agent_unit;
use registry_agent::host::apply::System;
use registry_agent::host::facts::{EnvironmentFile, FileFacts};
use registry_agent::host::observe::{self, Observed};
use registry_agent::host::plan::{Check, UnitAction, Verb};
use registry_agent::host::system::Host;
use registry_agent::systemd::Manager;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::fake::{Ending, Systemd, Unit};

const INFO: &str = r#"{"ServerVersion":"20.10.24+dfsg1","LiveRestoreEnabled":true,
    "ContainersRunning":4,"RegistryConfig":{"Mirrors":["http://mirror.example/"],
    "InsecureRegistryCIDRs":["127.0.0.0/8"],"IndexConfigs":{}}}"#;

/// The root of a host.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn put(&self, path: &str, content: &str, mode: u32) -> PathBuf {
        let path = self.root().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path);
        file.unwrap().write_all(content.as_bytes()).unwrap();
        path
    }

    fn program(&self, path: &str, script: &str) {
        self.put(path, &format!("#!/bin/sh\n{script}\n"), 0o755);
    }

    fn process(&self, pid: u32, arguments: &[&str]) {
        let line = arguments.join("\0") + "\0";
        self.put(&format!("/proc/{pid}/cmdline"), &line, 0o444);
    }

    /// A docker daemon that answers everything with this.
    fn docker(&self, socket: &str, status: &'static str, body: &'static str) {
        let path = self.root().join(socket.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap();
                assert!(request[..length].starts_with(b"GET /info HTTP/1.1\r\n"));
                let length = body.len();
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
    }
}

/// `docker.service` as Debian and CentOS have it: flags by `$OPTIONS` of an environment file.
fn docker(pid: u32) -> Unit {
    let words = ["/usr/bin/dockerd", "-H", "fd://", "$OPTIONS"];
    let words = words.map(str::to_owned).to_vec();
    let program = words[0].clone();
    Unit {
        exec_start: vec![(program, words, false, 1, 2, 0, 0, pid, 0, 0)],
        environment_files: vec![
            ("/etc/sysconfig/docker".into(), true),
            ("/etc/sysconfig/docker-storage".into(), false),
        ],
        environment: vec!["DOCKER_HTTP_HOST_COMPAT=1".into()],
        main_pid: pid,
        ..Unit::running("docker.service")
    }
}

/// What `LoadUnit` answers for a unit that is nowhere.
fn missing(name: &str) -> Unit {
    let unit = Unit::running(name).state("inactive", "dead", "success");
    Unit {
        load_state: "not-found".into(),
        ..unit
    }
}

/// A systemd that has these units, and none of the others that are asked for.
async fn systemd(units: Vec<Unit>) -> (Systemd, Manager, zbus::Connection) {
    let names = [
        "docker",
        "docker-latest",
        "containerd",
        "crio",
        "buildkit",
        "buildkitd",
    ];
    let names = names.iter().map(|name| format!("{name}.service"));
    let rest: Vec<Unit> = names
        .filter(|name| {
            let called = |unit: &Unit| unit.id == *name || unit.alias.as_ref() == Some(name);
            !units.iter().any(called)
        })
        .map(|name| missing(&name))
        .collect();
    Systemd::with(units.into_iter().chain(rest).collect()).await
}

/// What a host is told that says nothing but this.
fn told(text: &str) -> HostSettings {
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    file.as_file().write_all(text.as_bytes()).unwrap();
    let mut sources = Sources::from_process(Some(file.path().to_owned()), None);
    sources.environment = vec![("STATE_DIRECTORY".to_owned(), "/var/lib/x".to_owned())];
    config::load(&sources).unwrap().settings.host
}

async fn observe(manager: &Manager, host: &Scratch) -> Observed {
    observe::facts(Some(manager), host.root(), &told(""), Vec::new())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_running_docker_is_seen_as_it_really_is() {
    let host = Scratch::new();
    host.process(
        41,
        &["/usr/bin/dockerd", "-H", "fd://", "--selinux-enabled", ""],
    );
    host.docker("/run/docker.sock", "200 OK", INFO);
    host.put("/etc/docker/daemon.json", "{\n}\n", 0o600);
    let (_systemd, manager, _bus) = systemd(vec![docker(41)]).await;

    let Observed { facts, notes } = observe(&manager, &host).await;

    assert_eq!(notes, Vec::<String>::new());
    let [docker] = facts.engines.docker.as_slice() else {
        panic!("one docker, not {:?}", facts.engines.docker);
    };
    let unit = &docker.unit;
    assert_eq!(unit.name, "docker.service");
    assert_eq!(
        (unit.load_state.as_str(), unit.active_state.as_str()),
        ("loaded", "active")
    );
    assert_eq!(
        (unit.sub_state.as_str(), unit.result.as_str()),
        ("running", "success")
    );
    assert_eq!(unit.unit_file_state, "enabled");
    assert_eq!(
        unit.fragment_path,
        Path::new("/lib/systemd/system/docker.service")
    );
    let drop_in = "/etc/systemd/system/docker.service.d/10-flags.conf";
    assert_eq!(unit.drop_in_paths, [Path::new(drop_in)]);
    assert_eq!(
        unit.exec_start,
        [["/usr/bin/dockerd", "-H", "fd://", "$OPTIONS"]]
    );
    assert!(unit.can_reload && !unit.need_daemon_reload);
    let file = |path: &str, optional| EnvironmentFile {
        path: path.into(),
        optional,
    };
    assert_eq!(
        unit.environment_files,
        [
            file("/etc/sysconfig/docker", true),
            file("/etc/sysconfig/docker-storage", false)
        ]
    );
    assert_eq!(unit.environment, ["DOCKER_HTTP_HOST_COMPAT=1"]);
    assert_eq!(unit.main_pid, 41);
    assert_eq!(docker.version.as_deref(), Some("20.10.24+dfsg1"));
    let line = docker.command_line.as_ref().unwrap();
    // An empty argument is one.
    assert_eq!(
        line,
        &["/usr/bin/dockerd", "-H", "fd://", "--selinux-enabled", ""]
    );
    let info = docker.info.as_ref().unwrap();
    assert_eq!(info.mirrors, ["http://mirror.example/"]);
    assert_eq!(info.insecure_registries, ["127.0.0.0/8"]);
    assert!(info.live_restore);
    assert_eq!(info.containers_running, 4);
    assert_eq!(facts.engines.containerd, None);
    assert_eq!(facts.engines.podman, None);
    assert_eq!(facts.engines.buildkit, None);

    let file = |path: &str| &facts.files[Path::new(path)];
    let FileFacts::Text { content, mode, .. } = file("/etc/docker/daemon.json") else {
        panic!("{facts:?}");
    };
    assert_eq!((content.as_str(), *mode), ("{\n}\n", 0o600));
}

#[tokio::test]
async fn a_program_is_what_is_run_and_not_what_it_is_called() {
    let host = Scratch::new();
    let mut unit = docker(0);
    // `ExecStart=@/usr/libexec/dockerd docker daemon`
    unit.exec_start[0].0 = "/usr/libexec/dockerd".into();
    unit.exec_start[0].1 = vec!["docker".into(), "daemon".into()];
    let (_systemd, manager, _bus) = systemd(vec![unit]).await;
    let facts = observe(&manager, &host).await.facts;
    let unit = &facts.engines.docker[0].unit;
    assert_eq!(unit.exec_start, [["/usr/libexec/dockerd", "daemon"]]);
}

#[tokio::test]
async fn a_docker_that_does_not_run_says_its_version_by_its_program() {
    let host = Scratch::new();
    let script = r#"echo "Docker version 24.0.7, build 311b9ff""#;
    host.program("/usr/bin/dockerd", script);
    let unit = docker(0).state("failed", "failed", "start-limit-hit");
    let (_systemd, manager, _bus) = systemd(vec![unit]).await;
    let Observed { facts, notes } = observe(&manager, &host).await;
    let docker = &facts.engines.docker[0];
    assert_eq!(docker.version.as_deref(), Some("24.0.7"));
    assert_eq!((&docker.command_line, &docker.info), (&None, &None));
    assert_eq!(docker.unit.result, "start-limit-hit");
    assert_eq!(notes, Vec::<String>::new());
}

/// What the daemon's socket does, and what the note says.
#[tokio::test]
async fn a_docker_that_runs_and_does_not_answer_is_a_note() {
    let cases: [(&[&str], Option<&'static str>, &str); 4] = [
        (
            &["dockerd"],
            None,
            "docker.service runs, but can't ask the docker daemon at /run/docker.sock: ",
        ),
        (
            &["dockerd"],
            Some("500 Internal Server Error"),
            "it answered 500 Internal Server Error to GET /info",
        ),
        (
            &["dockerd"],
            Some("200 OK"),
            "its answer to GET /info is none: ",
        ),
        (
            &["dockerd", "-H", "tcp://0.0.0.0:2375"],
            None,
            "listens on TCP only",
        ),
    ];
    for (line, status, says) in cases {
        let host = Scratch::new();
        host.process(41, line);
        if let Some(status) = status {
            host.docker("/run/docker.sock", status, "{}");
        }
        let (_systemd, manager, _bus) = systemd(vec![docker(41)]).await;
        let Observed { facts, notes } = observe(&manager, &host).await;
        assert_eq!(facts.engines.docker[0].info, None);
        assert_eq!(facts.engines.docker[0].version, None);
        assert!(notes[0].contains(says), "{notes:?}");
    }
}

#[tokio::test]
async fn masked_units_are_facts_and_two_dockers_are_two() {
    let host = Scratch::new();
    let mut masked = docker(0).state("inactive", "dead", "success");
    masked.load_state = "masked".into();
    let mut latest = docker(41);
    latest.id = "docker-latest.service".into();
    host.process(
        41,
        &["/usr/bin/dockerd-latest", "-H", "unix:///srv/latest.sock"],
    );
    host.docker("/srv/latest.sock", "200 OK", INFO);
    let buildkit = Unit::running("buildkitd.service");
    let (_systemd, manager, _bus) = systemd(vec![masked, latest, buildkit]).await;
    let Observed { facts, .. } = observe(&manager, &host).await;
    let docker = &facts.engines.docker;
    let states: Vec<_> = docker
        .iter()
        .map(|docker| (docker.unit.name.as_str(), docker.unit.load_state.as_str()))
        .collect();
    assert_eq!(
        states,
        [
            ("docker.service", "masked"),
            ("docker-latest.service", "loaded")
        ]
    );
    assert!(docker[1].info.is_some());
    assert_eq!(
        facts.engines.buildkit.unwrap().unit.name,
        "buildkitd.service"
    );
}

#[tokio::test]
async fn an_alias_is_not_a_second_docker() {
    let host = Scratch::new();
    let mut unit = docker(0);
    unit.alias = Some("docker-latest.service".into());
    let (_systemd, manager, _bus) = systemd(vec![unit]).await;
    let facts = observe(&manager, &host).await.facts;
    assert_eq!(facts.engines.docker.len(), 1);
    assert_eq!(facts.engines.docker[0].unit.name, "docker.service");
}

#[tokio::test]
async fn what_has_no_unit_is_found_by_its_program() {
    let host = Scratch::new();
    host.program(
        "/usr/local/bin/containerd",
        "echo containerd github.com/containerd/containerd/v2 v2.0.0 207ad711",
    );
    host.program("/usr/bin/skopeo", "exit 1");
    // Without any systemd, too.
    let observed = observe::facts(
        None,
        host.root(),
        &told("host: { containerd: { manage: true } }"),
        Vec::new(),
    )
    .await
    .unwrap();
    let engines = observed.facts.engines;
    let containerd = engines.containerd.unwrap();
    assert_eq!(containerd.version.as_deref(), Some("2.0.0"));
    assert_eq!((containerd.unit, containerd.command_line), (None, None));
    let podman = engines.podman.unwrap();
    assert_eq!(podman.crio, None);
}

#[tokio::test]
async fn a_crio_without_podman_is_of_its_kind() {
    let host = Scratch::new();
    let (_systemd, manager, _bus) = systemd(vec![Unit::running("crio.service")]).await;
    let podman = observe(&manager, &host).await.facts.engines.podman.unwrap();
    assert_eq!(podman.crio.unwrap().name, "crio.service");
    assert_eq!(podman.version, None);
}

#[tokio::test]
async fn a_systemd_that_fails_is_an_error_and_no_host_without_docker() {
    let host = Scratch::new();
    let (_systemd, manager, bus) = systemd(vec![docker(0)]).await;
    bus.close().await.unwrap();
    let observed = observe::facts(Some(&manager), host.root(), &told(""), Vec::new()).await;
    assert!(observed.is_err(), "{observed:?}");
}

#[tokio::test]
async fn a_host_runs_jobs_and_tells_its_mirrors() {
    let scratch = Scratch::new();
    scratch.process(41, &["dockerd"]);
    scratch.docker("/run/docker.sock", "200 OK", INFO);
    let (systemd, manager, _bus) = systemd(vec![docker(41)]).await;
    let host = Host::new(manager, scratch.root());
    let action = |verb| UnitAction {
        unit: "docker.service".into(),
        verb,
        why: String::new(),
    };
    let deadline = Duration::from_mins(1);
    host.run(&action(Verb::Reload), deadline).await.unwrap();
    host.reset_failed("docker.service").await.unwrap();
    systemd.state().after = Some(docker(41).restarted());
    host.run(&action(Verb::Restart), deadline).await.unwrap();
    assert_eq!(host.unit("docker.service").await.unwrap().main_pid, 41);
    assert_eq!(
        host.docker_mirrors("docker.service").await.unwrap(),
        ["http://mirror.example/"]
    );
    systemd.state().ending = Ending::Signal("failed");
    let error = host.run(&action(Verb::Reload), deadline).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("can't reload docker.service: "),
        "{error}"
    );
    systemd.state().units[0].main_pid = 0;
    let error = host.docker_mirrors("docker.service").await.unwrap_err();
    assert!(
        error.to_string().contains("it has no main process"),
        "{error}"
    );
}

#[tokio::test]
async fn dockerds_own_check_gets_the_staged_file_after_the_units_flags() {
    let scratch = Scratch::new();
    let script = r#"echo "$*" >&2; case "$*" in *good) exit 0;; *) exit 1;; esac"#;
    scratch.program("/usr/bin/dockerd", script);
    let (_systemd, manager, _bus) = systemd(vec![]).await;
    let host = Host::new(manager, scratch.root());
    let command = ["/usr/bin/dockerd", "--selinux-enabled"];
    let check = Check::DockerdValidate {
        command: command.map(str::to_owned).to_vec(),
    };
    host.check(&check, Path::new("/staged/good")).await.unwrap();
    let error = host
        .check(&check, Path::new("/staged/$(bad)"))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "`/usr/bin/dockerd --selinux-enabled --validate` refuses /staged/$(bad): \
         --selinux-enabled --validate --config-file /staged/$(bad)"
    );
    let missing = Check::DockerdValidate {
        command: vec!["/usr/bin/none".into()],
    };
    assert!(
        host.check(&missing, Path::new("/staged/good"))
            .await
            .is_err()
    );
}

/// `registry-agent.service` as an administrator has made it by `systemctl edit`.
fn edited_agent(pid: u32, arguments: &[&str]) -> Unit {
    let words: Vec<String> = std::iter::once("/usr/bin/registry-agent")
        .chain(arguments.iter().copied())
        .map(str::to_owned)
        .collect();
    Unit {
        exec_start: vec![(words[0].clone(), words, false, 1, 2, 0, 0, pid, 0, 0)],
        main_pid: pid,
        ..Unit::running("registry-agent.service")
    }
}

fn unnamed() -> Sources {
    Sources {
        config: None,
        distribution: None,
        environment: vec![("REGISTRY_AGENT_DRAIN".to_owned(), "7s".to_owned())],
    }
}

async fn sources(unit: Unit, host: &Scratch, own: Sources) -> Result<Sources, String> {
    let (_systemd, manager, _bus) = Systemd::with(vec![unit]).await;
    let unit = manager.unit("registry-agent.service").await.unwrap();
    let sources = agent_unit::sources(host.root(), &unit, own);
    sources.map_err(|error| error.to_string())
}

fn variable<'a>(sources: &'a Sources, name: &str) -> Vec<&'a str> {
    let named = sources.environment.iter().filter(|(key, _)| key == name);
    named.map(|(_, value)| value.as_str()).collect()
}

#[tokio::test]
async fn the_agents_configuration_is_the_one_that_its_unit_gives_it() {
    let host = Scratch::new();
    host.put(
        "/etc/default/agent",
        "# Mine.\nREGISTRY_AGENT_LISTEN=\"127.0.0.1:5007\"\nCONF=/etc/other.yaml\n",
        0o644,
    );
    let mut unit = edited_agent(0, &["run", "--config=${CONF}", "$MORE"]);
    unit.environment = vec![
        "REGISTRY_AGENT_LISTEN=127.0.0.1:5006".into(),
        "REGISTRY_AGENT_DRAIN=9s".into(),
        "REGISTRY_AGENT_HOST__DRIFT=report".into(),
    ];
    unit.environment_files = vec![
        ("/etc/default/agent".into(), false),
        ("/etc/default/missing".into(), true),
    ];
    let found = sources(unit.clone(), &host, unnamed()).await.unwrap();
    assert_eq!(found.config.as_deref(), Some(Path::new("/etc/other.yaml")));
    for (name, value) in [
        // A file wins over `Environment=`, and whoever runs this over both.
        ("REGISTRY_AGENT_LISTEN", "127.0.0.1:5007"),
        ("REGISTRY_AGENT_DRAIN", "7s"),
        ("REGISTRY_AGENT_HOST__DRIFT", "report"),
        ("STATE_DIRECTORY", "/var/lib/registry-agent"),
    ] {
        assert_eq!(variable(&found, name), [value], "{name}");
    }

    // What runs counts, and not what would be started.
    unit.main_pid = 77;
    let line = ["registry-agent", "run", "--distribution-config", "old.yml"];
    host.process(77, &line);
    let found = sources(unit.clone(), &host, unnamed()).await.unwrap();
    assert_eq!(found.config, None);
    assert_eq!(found.distribution.as_deref(), Some(Path::new("/old.yml")));

    // Whoever names one means it, with their own variables.
    let named = Sources {
        config: Some("/mine.yaml".into()),
        ..unnamed()
    };
    let found = sources(unit, &host, named).await.unwrap();
    assert_eq!(found.config.as_deref(), Some(Path::new("/mine.yaml")));
    assert_eq!(variable(&found, "REGISTRY_AGENT_LISTEN"), [""; 0]);

    let none = missing("registry-agent.service");
    let found = sources(none, &host, unnamed()).await.unwrap();
    assert_eq!((found.config, found.distribution), (None, None));
}

#[tokio::test]
async fn an_environment_file_of_the_agent_that_can_not_be_followed_is_named() {
    let host = Scratch::new();
    fs::create_dir_all(host.root().join("etc/default/folder")).unwrap();
    for (file, optional, why) in [
        ("/etc/default/missing", false, "is not there"),
        ("/etc/default/folder", true, "it is a folder, not a file"),
        ("/etc/default/agent*", true, "name each file by itself"),
    ] {
        let mut unit = edited_agent(0, &["run"]);
        unit.environment_files = vec![(file.into(), optional)];
        let Err(said) = sources(unit, &host, unnamed()).await else {
            panic!("{file} could be followed")
        };
        for words in ["registry-agent.service", file, why] {
            assert!(said.contains(words), "no `{words}`: {said}");
        }
    }
}
