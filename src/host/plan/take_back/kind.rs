//! What the files are that were changed, by what was made of them.

use std::path::Path;

use super::super::{Verb, daemon_json, dockerd, hosts_file, words};
use super::{text_of, toml};
use crate::host::journal::Original;

/// What a file of ours is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    DaemonJson,
    /// An environment file that holds dockerd's flags.
    DockerFlags,
    HostsToml,
    ContainerdConfig,
    PodmanDropIn,
    BuildkitToml,
    Certificate,
    HostsFile,
}

impl Kind {
    /// By what we made of it, which is the same after everything that somebody else does to the
    /// file; or by what it was before, where that is what we made of it last.
    pub(super) fn of(path: &Path, original: &Original) -> Option<Self> {
        if hosts_file::our_names(original).next().is_some() || path == Path::new(hosts_file::FILE) {
            return Some(Self::HostsFile);
        }
        let by = |facts| Self::by(path, text_of(facts));
        by(&original.made).or_else(|| by(&original.before))
    }

    fn by(path: &Path, made: &str) -> Option<Self> {
        match path.file_name().and_then(|name| name.to_str()) {
            Some("hosts.toml") => return Some(Self::HostsToml),
            Some("ca.crt") => return Some(Self::Certificate),
            _ => {}
        }
        // Before TOML: an assignment in quotes can be read as that, too.
        if words::names(made)
            .iter()
            .any(|name| dockerd::has_mirrors(made, name))
        {
            return Some(Self::DockerFlags);
        }
        if !made.trim().is_empty() && daemon_json::read(made).is_ok() {
            return Some(Self::DaemonJson);
        }
        toml::kind(path, made)
    }

    /// Whose file it is, as `host.<engine>.manage` names it.
    pub(super) fn engine(self, path: &Path) -> Option<&'static str> {
        match self {
            Self::DaemonJson | Self::DockerFlags => Some("docker"),
            Self::ContainerdConfig => Some("containerd"),
            Self::PodmanDropIn => Some("podman"),
            Self::BuildkitToml => Some("buildkit"),
            Self::HostsFile => None,
            Self::HostsToml | Self::Certificate => Some(if path.starts_with("/etc/docker") {
                "docker"
            } else if path.starts_with("/etc/containers") {
                "podman"
            } else {
                "containerd"
            }),
        }
    }

    /// The job that its reader needs, by the one that it needed then, with others.
    pub(super) fn verb(self, then: Verb) -> Option<Verb> {
        match self {
            Self::HostsToml | Self::Certificate | Self::HostsFile => None,
            // Flags are read at a start, also by a daemon that did not run when they were changed.
            Self::DockerFlags => Some(Verb::Restart),
            Self::DaemonJson | Self::ContainerdConfig | Self::PodmanDropIn | Self::BuildkitToml => {
                Some(then)
            }
        }
    }
}
