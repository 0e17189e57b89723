//! What is on this host: how each container engine is really configured.
//!
//! Facts are data. They are read from the loaded units, the running processes and the files, never
//! guessed from the distribution's name, and can be saved: `registry-agent plan --facts FILE`
//! reproduces somebody's host on another machine.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::journal::Originals;

/// Everything that a plan is made from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// The engines that are here.
    pub engines: Engines,
    /// Every file that the plan may look at or change, by its path.
    pub files: BTreeMap<PathBuf, FileFacts>,
    /// The addresses that this host's engines were wired to before, by the journal: where the
    /// mirror has moved, they are taken out again. Empty where nothing was ever wired.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<String>,
    /// Those of `files` (what a link leads to, not the link) that whoever read the facts can't
    /// replace, since they are on a file system that is read-only to it; each with its real folder.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_only: BTreeMap<PathBuf, PathBuf>,
    /// What was changed on this host so far, by the journal: what was made for an engine that is not
    /// managed any more is taken back by it.
    #[serde(default, skip_serializing_if = "Originals::is_empty")]
    pub originals: Originals,
}

/// The container engines of a host, each absent where there is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engines {
    /// `docker.service` and `docker-latest.service` (RHEL and `CentOS` 7), those that are loaded.
    pub docker: Vec<DockerFacts>,
    /// containerd with its CRI plugin, as a kubelet or `ctr --hosts-dir` uses it.
    pub containerd: Option<ContainerdFacts>,
    /// podman, buildah, skopeo and CRI-O, which share `/etc/containers`.
    pub podman: Option<PodmanFacts>,
    /// A buildkitd of its own; dockerd's built-in one follows `daemon.json`.
    pub buildkit: Option<BuildkitFacts>,
}

/// A docker daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerFacts {
    /// Its unit.
    pub unit: UnitFacts,
    /// The daemon's version (`20.10.24+dfsg1`), by the running daemon or else by `dockerd
    /// --version`; absent where neither says.
    pub version: Option<String>,
    /// The running daemon's arguments, by `/proc/<MainPID>/cmdline`, its own name first.
    pub command_line: Option<Vec<String>>,
    /// What the running daemon says of itself; absent where it does not answer.
    pub info: Option<DockerInfo>,
}

/// The part of docker's `GET /info` that matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerInfo {
    /// `RegistryConfig.Mirrors`, each with the slash at its end that docker adds.
    pub mirrors: Vec<String>,
    /// `RegistryConfig.InsecureRegistryCIDRs` and those of `IndexConfigs` that are not secure.
    pub insecure_registries: Vec<String>,
    /// `LiveRestoreEnabled`: whether containers survive a restart of the daemon.
    pub live_restore: bool,
    /// `ContainersRunning`.
    pub containers_running: u64,
}

/// containerd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerdFacts {
    /// Its unit; absent where it was installed without one.
    pub unit: Option<UnitFacts>,
    /// `containerd --version`.
    pub version: Option<String>,
    /// The running daemon's arguments, its own name first.
    pub command_line: Option<Vec<String>>,
}

/// podman and what shares its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodmanFacts {
    /// `podman --version`, or of buildah or skopeo where they are alone; absent where nobody has
    /// asked, since nothing depends on it.
    pub version: Option<String>,
    /// `crio.service`, where it is loaded.
    pub crio: Option<UnitFacts>,
    /// `/etc/containers/registries.conf`, where it is there, and the `.conf` files of
    /// `registries.conf.d` beside it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub configuration: Vec<PathBuf>,
}

/// buildkitd as a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildkitFacts {
    /// Its unit.
    pub unit: UnitFacts,
    /// The running daemon's arguments, its own name first.
    pub command_line: Option<Vec<String>>,
}

/// A unit as systemd has it loaded (org.freedesktop.systemd1(5)), with the names it has there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnitFacts {
    /// `docker.service`.
    pub name: String,
    /// `loaded`, `not-found`, `masked`, `bad-setting`, ...
    pub load_state: String,
    /// `active`, `inactive`, `failed`, `activating`, ...
    pub active_state: String,
    /// `running`, `dead`, `auto-restart`, ...
    pub sub_state: String,
    /// `success`, `exit-code`, `start-limit-hit`, ...
    pub result: String,
    /// `enabled`, `disabled`, `masked`, ...
    pub unit_file_state: String,
    /// The unit file.
    pub fragment_path: PathBuf,
    /// Its drop-ins, in their order.
    pub drop_in_paths: Vec<PathBuf>,
    /// The start commands' arguments, the program first, with `$OPTIONS` and the like unexpanded.
    pub exec_start: Vec<Vec<String>>,
    /// Whether the unit can be reloaded.
    pub can_reload: bool,
    /// The environment files, in their order.
    pub environment_files: Vec<EnvironmentFile>,
    /// `Environment=`, as `NAME=value`.
    pub environment: Vec<String>,
    /// The main process; 0 where none runs.
    pub main_pid: u32,
    /// Whether the unit's files were changed since they were loaded.
    pub need_daemon_reload: bool,
    /// Whether a job of it is queued or under way (`Job`): one that is inactive and has none was
    /// stopped, and one that has is about to start. It is of the moment, and no plan depends on it.
    #[serde(skip)]
    pub has_job: bool,
}

/// One `EnvironmentFile=` of a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvironmentFile {
    /// The file.
    pub path: PathBuf,
    /// Whether it may be missing: `EnvironmentFile=-/path`.
    pub optional: bool,
}

/// A file, or the absence of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileFacts {
    /// There is none.
    Absent,
    /// A regular file that holds a text.
    Text {
        /// All of it.
        content: String,
        /// Its permissions, the lowest twelve bits of `st_mode`.
        mode: u32,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
        /// `security.selinux`, where the file system has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        selinux: Option<String>,
        /// Where it is a symbolic link: the file that it leads to, which is the one to change.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        link_to: Option<PathBuf>,
    },
    /// Something that can't be read as a text, and why: a folder, no right, not UTF-8, too large.
    Unreadable(String),
}
