//! A host that is a folder, and its docker a file that behaves as moby does.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use registry_agent::host::apply::{Apply, Deadlines, Purpose, System, SystemError};
use registry_agent::host::facts::{FileFacts, UnitFacts};
use registry_agent::host::journal::Journal;
use registry_agent::host::plan::{Check, FileChange, Plan, Proof, UnitAction, Verb};
use registry_agent::host::{rollback, write};
use serde::{Deserialize, Serialize};

/// Files by their paths, with mode and content; the daemon's mirrors; its state.
pub type Everything = (
    BTreeMap<PathBuf, (u32, Option<String>)>,
    Vec<String>,
    String,
);

pub const DAEMON_JSON: &str = "/etc/docker/daemon.json";
pub const HOSTS_TOML: &str = "/etc/containerd/certs.d/docker.io/hosts.toml";
pub const MIRROR: &str = "http://127.0.0.1:5000";
pub const UNIT: &str = "docker.service";

/// A docker daemon and its unit, kept in a file so that they outlive the process that drives them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Docker {
    pub active_state: String,
    pub main_pid: u32,
    pub mirrors: Vec<String>,
    pub jobs: Vec<String>,
    /// Jobs are refused until the unit is reset.
    pub start_limit_hit: bool,
    /// It ends at a reload of any file that has this in it.
    pub dies_of: Option<String>,
    /// It never comes up again.
    pub broken: bool,
    /// A reload is asynchronous: so many questions see the daemon as it was.
    pub slow: u32,
    #[serde(default)]
    pub coming: Option<(u32, Vec<String>)>,
    /// The whole host is going down.
    #[serde(default)]
    pub shutting_down: bool,
    /// Somebody else writes this file just before it reloads.
    #[serde(default)]
    pub edited: Option<String>,
    /// ... or while it is asked what it says of a staged file.
    #[serde(default)]
    pub edited_at_check: Option<String>,
}

pub struct Host {
    pub folder: PathBuf,
}

impl Host {
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    pub fn at(&self, path: &str) -> PathBuf {
        write::under(&self.root(), Path::new(path))
    }

    /// As long as this is there, the check of a file does not end ...
    pub fn hold(&self) -> PathBuf {
        self.folder.join("hold")
    }

    /// ... and this tells that it has begun.
    pub fn held(&self) -> PathBuf {
        self.folder.join("held")
    }

    pub fn docker(&self) -> Docker {
        serde_json::from_slice(&fs::read(self.folder.join("docker")).unwrap()).unwrap()
    }

    pub fn change(&self, change: impl FnOnce(&mut Docker)) {
        let mut docker = self.docker();
        change(&mut docker);
        self.set(&docker);
    }

    pub fn set(&self, docker: &Docker) {
        write::put(
            &self.folder.join("docker"),
            &text(&serde_json::to_string(docker).unwrap(), 0o600),
        )
        .unwrap();
    }

    /// What a docker daemon does with its file: the mirrors that it names, if it names any.
    pub fn configuration(&self) -> Result<Option<Vec<String>>, String> {
        let facts = write::read(&self.at(DAEMON_JSON)).unwrap();
        let FileFacts::Text { content, .. } = facts else {
            return Ok(None);
        };
        let json: serde_json::Value = serde_json::from_str(&content).map_err(|e| e.to_string())?;
        if json.get("unknown").is_some() {
            return Err("the following directives don't match any configuration option".into());
        }
        let Some(mirrors) = json.get("registry-mirrors") else {
            return Ok(None);
        };
        let mirrors: Vec<String> = serde_json::from_value(mirrors.clone()).unwrap();
        Ok(Some(
            mirrors.iter().map(|mirror| format!("{mirror}/")).collect(),
        ))
    }

    /// Everything below the root, and what the daemon has.
    pub fn state(&self) -> Everything {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                let content = metadata
                    .is_file()
                    .then(|| fs::read_to_string(&path).unwrap());
                if metadata.is_dir() {
                    folders.push(path.clone());
                }
                files.insert(path, (metadata.mode(), content));
            }
        }
        let docker = self.docker();
        let mirrors = docker.coming.map_or(docker.mirrors, |(_, mirrors)| mirrors);
        (files, mirrors, docker.active_state)
    }
}

impl System for Host {
    async fn run(&self, action: &UnitAction, _: Duration) -> Result<(), SystemError> {
        assert_eq!(action.unit, UNIT);
        let mut docker = self.docker();
        docker.jobs.push(format!("{:?}", action.verb));
        let refusal = match action.verb {
            Verb::Reload if docker.active_state != "active" => Some("it is not active"),
            Verb::Reload => {
                if let Some(content) = docker.edited.take() {
                    write::put(&self.at(DAEMON_JSON), &text(&content, 0o644)).unwrap();
                }
                let file = fs::read_to_string(self.at(DAEMON_JSON)).unwrap_or_default();
                if docker.dies_of.as_ref().is_some_and(|of| file.contains(of)) {
                    "failed".clone_into(&mut docker.active_state);
                    docker.start_limit_hit = true;
                } else if let Ok(Some(mirrors)) = self.configuration() {
                    docker.coming = Some((docker.slow, mirrors));
                }
                None
            }
            Verb::Restart if docker.start_limit_hit => Some("start-limit-hit"),
            Verb::Restart => match self.configuration() {
                Ok(mirrors) if !docker.broken => {
                    "active".clone_into(&mut docker.active_state);
                    docker.main_pid += 1;
                    docker.coming = None;
                    docker.mirrors = mirrors.unwrap_or_default();
                    None
                }
                _ => {
                    "failed".clone_into(&mut docker.active_state);
                    Some("the job failed")
                }
            },
        };
        self.set(&docker);
        match refusal {
            None => Ok(()),
            Some(refusal) => Err(SystemError(format!("{:?}: {refusal}", action.verb))),
        }
    }

    async fn reset_failed(&self, _: &str) -> Result<(), SystemError> {
        self.change(|docker| docker.start_limit_hit = false);
        Ok(())
    }

    async fn docker_mirrors(&self, _: &str) -> Result<Vec<String>, SystemError> {
        let mut docker = self.docker();
        if docker.active_state != "active" {
            return Err(SystemError("connection refused".to_owned()));
        }
        docker.coming = match docker.coming.take() {
            Some((0, mirrors)) => {
                docker.mirrors = mirrors;
                None
            }
            Some((left, mirrors)) => Some((left - 1, mirrors)),
            None => None,
        };
        self.set(&docker);
        Ok(docker.mirrors)
    }

    async fn unit(&self, unit: &str) -> Result<UnitFacts, SystemError> {
        let docker = self.docker();
        Ok(UnitFacts {
            name: unit.to_owned(),
            active_state: docker.active_state,
            main_pid: docker.main_pid,
            ..UnitFacts::default()
        })
    }

    async fn is_shutting_down(&self) -> bool {
        self.docker().shutting_down
    }

    async fn check(&self, _: &Check, staged: &Path) -> Result<(), SystemError> {
        let content = fs::read_to_string(staged).unwrap();
        if self.hold().exists() {
            write::put(&self.held(), &text("", 0o600)).unwrap();
            wait_until("it may go on", || !self.hold().exists());
        }
        if let Some(theirs) = self.docker().edited_at_check {
            write::put(&self.at(DAEMON_JSON), &text(&theirs, 0o644)).unwrap();
        }
        if content.contains("refused") {
            return Err(SystemError("dockerd: unable to configure".to_owned()));
        }
        Ok(())
    }
}

pub fn text(content: &str, mode: u32) -> FileFacts {
    FileFacts::Text {
        content: content.to_owned(),
        mode,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        selinux: None,
        link_to: None,
    }
}

/// A host whose docker runs with this `daemon.json`, or none.
pub fn host(folder: &Path, daemon_json: Option<&str>) -> Host {
    let host = Host {
        folder: folder.to_owned(),
    };
    fs::create_dir_all(host.at("/etc/docker")).unwrap();
    if let Some(content) = daemon_json {
        write::put(&host.at(DAEMON_JSON), &text(content, 0o640)).unwrap();
    }
    let mirrors = host.configuration().unwrap().unwrap_or_default();
    host.set(&Docker {
        active_state: "active".to_owned(),
        main_pid: 100,
        mirrors,
        slow: 1,
        ..Docker::default()
    });
    host
}

/// The plan for these files, of which docker's is reloaded.
pub fn plan(host: &Host, daemon_json: &str, mirrors: &[&str]) -> Plan {
    let change = |path: &str, after: FileFacts, check| FileChange {
        path: path.into(),
        before: write::read(&host.at(path)).unwrap(),
        after,
        why: "a test".to_owned(),
        check,
        units: vec![UNIT.to_owned()],
    };
    let command = vec!["dockerd".to_owned()];
    Plan {
        files: vec![
            change(
                DAEMON_JSON,
                text(daemon_json, 0o640),
                Some(Check::DockerdValidate { command }),
            ),
            change(HOSTS_TOML, text("server = \"x\"\n", 0o644), None),
        ],
        actions: vec![UnitAction {
            unit: UNIT.to_owned(),
            verb: Verb::Reload,
            why: "a test".to_owned(),
        }],
        proofs: vec![Proof::DockerMirrors {
            unit: UNIT.to_owned(),
            mirrors: mirrors.iter().map(|&mirror| mirror.to_owned()).collect(),
        }],
        ..Plan::default()
    }
}

pub fn wired() -> String {
    format!(r#"{{"debug": true, "registry-mirrors": ["{MIRROR}"]}}"#)
}

pub fn purpose() -> Purpose {
    Purpose {
        mirror: Some(MIRROR.to_owned()),
        forgets: false,
    }
}

pub fn journal(host: &Host) -> Journal {
    Journal::open(&host.folder.join("state")).unwrap()
}

pub fn with<T>(host: &Host, work: impl AsyncFnOnce(&Apply<'_, Host>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (root, journal) = (host.root(), journal(host));
    let apply = Apply {
        root: &root,
        journal: &journal,
        system: host,
        deadlines: Deadlines {
            job: Duration::from_secs(5),
            proof: Duration::from_millis(300),
        },
    };
    runtime.block_on(work(&apply))
}

/// The way back, as `rollback` plans it; nothing is left to withdraw.
pub fn way_back(host: &Host) -> Plan {
    let originals = journal(host).originals().unwrap();
    let now = originals.files.keys().map(|path| {
        let now = write::read(&write::under(&host.root(), path)).unwrap();
        (path.clone(), now)
    });
    rollback::plan(&originals, &now.collect(), &Plan::default(), false)
}

pub fn forgetting() -> Purpose {
    Purpose {
        mirror: None,
        forgets: true,
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "what is waited for is another process's"
)]
pub fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
