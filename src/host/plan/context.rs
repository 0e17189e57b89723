//! What every part of a plan looks at: the facts, the settings, and the files by their names.

use std::path::{Path, PathBuf};

use url::Url;

use super::{FileChange, PlanError, Wanted};
use crate::config::{HostSettings, Restart};
use crate::host::facts::{Facts, FileFacts, UnitFacts};
use crate::host::read;
use crate::oci::RegistryHost;

/// The first line of a file that is ours alone; one without it is somebody's own.
pub(super) const MARKER: &str = "# Written by registry-agent, which puts changes back: edit its \
                                 configuration instead.";

pub(super) struct Context<'a> {
    pub facts: &'a Facts,
    pub settings: &'a HostSettings,
    pub wanted: Wanted,
}

impl<'a> Context<'a> {
    pub fn new(facts: &'a Facts, settings: &'a HostSettings, wanted: Wanted) -> Self {
        Self {
            facts,
            settings,
            wanted,
        }
    }

    /// What docker demands of a mirror (moby `registry/config.go`, `ValidateMirror`), which its own
    /// `--validate` looks at only from 28.3. A path is refused for all: docker before 25 does.
    pub fn check_mirror(&self) -> Result<(), PlanError> {
        let mirror = &self.settings.mirror;
        let wrong = if !matches!(mirror.scheme(), "http" | "https") {
            "is neither http nor https"
        } else if mirror.host_str().is_none_or(str::is_empty) {
            "has no host"
        } else if !mirror.username().is_empty() || mirror.password().is_some() {
            "has a user, which docker refuses"
        } else if mirror.query().is_some() || mirror.fragment().is_some() {
            "has a query or a fragment, which docker refuses"
        } else if !mirror.path().trim_matches('/').is_empty() {
            "has a path, which docker before 25 refuses"
        } else {
            return Ok(());
        };
        Err(PlanError {
            subject: "host.mirror".into(),
            message: format!(
                "{} {wrong}: must be such as http://docker-mirror.local:5000",
                // Never a password.
                mirror.host_str().unwrap_or_default()
            ),
        })
    }

    /// The mirror as it is written: without a slash at its end.
    pub fn mirror(&self) -> &str {
        self.settings.mirror.as_str().trim_end_matches('/')
    }

    /// The mirror's host, with its port where it has one.
    pub fn authority(&self) -> &str {
        let mirror = self.mirror();
        mirror.split_once("://").map_or(mirror, |(_, rest)| rest)
    }

    pub fn plain_http(&self) -> bool {
        self.settings.mirror.scheme() == "http"
    }

    /// Whether this is the mirror's address, however it is written.
    pub fn is_mirror(&self, address: &str) -> bool {
        same_address(address, self.mirror())
    }

    /// Whether this is an address that the mirror had before.
    pub fn is_previous(&self, address: &str) -> bool {
        let mut previous = self.facts.previous.iter();
        !self.is_mirror(address) && previous.any(|one| same_address(address, one))
    }

    pub fn mirrors_docker_hub(&self) -> bool {
        self.settings
            .mirrored
            .iter()
            .any(RegistryHost::is_docker_hub)
    }

    pub fn may_restart(&self) -> bool {
        self.settings.docker.restart == Restart::IfNeeded
    }

    /// The host-local name of this host's own registry, with its port. The name means 127.0.0.1, so
    /// it means this registry only where the mirror is this host's.
    pub fn local_registry(&self) -> Option<String> {
        let name = self.settings.local_name.as_deref()?;
        let loopback = match self.settings.mirror.host()? {
            url::Host::Ipv4(ip) => ip.is_loopback(),
            url::Host::Ipv6(_) => false,
            url::Host::Domain(domain) => domain == "localhost" || domain == name,
        };
        let port = self.settings.mirror.port();
        let port = port.map_or_else(String::new, |port| format!(":{port}"));
        loopback.then(|| format!("{name}{port}"))
    }

    /// What is known of a file; an error where the facts were read without it.
    pub fn file(&self, path: &Path) -> Result<&'a FileFacts, PlanError> {
        self.facts.files.get(path).ok_or_else(|| PlanError {
            subject: path.display().to_string(),
            message: "the facts say nothing of this file: read them again with this version of \
                      registry-agent"
                .into(),
        })
    }

    /// Its text; `None` where there is no file.
    pub fn text(&self, path: &Path) -> Result<Option<&'a str>, PlanError> {
        match self.file(path)? {
            FileFacts::Absent => Ok(None),
            FileFacts::Text { content, .. } => Ok(Some(content)),
            FileFacts::Unreadable(why) => Err(PlanError {
                subject: path.display().to_string(),
                message: format!("can't be read: {why}. Nothing is changed without knowing it"),
            }),
        }
    }

    /// Its text where it was read and can be, for finding out which other files matter.
    pub fn known_text(&self, path: &Path) -> Option<&'a str> {
        self.text(path).ok().flatten()
    }

    /// The change that gives a file this content; `None` where it has it. Mode, owner and label
    /// stay, and a symbolic link stays one: what it leads to is changed.
    pub fn change(
        &self,
        path: &Path,
        new: &str,
        why: impl Into<String>,
    ) -> Result<Option<FileChange>, PlanError> {
        // No file is as good as one with nothing in it.
        if self.text(path)?.unwrap_or_default() == new {
            return Ok(None);
        }
        let limit = read::LIMIT;
        if new.len() as u64 > limit {
            return Err(PlanError {
                subject: path.display().to_string(),
                message: format!(
                    "would be larger than the {limit} bytes of which a file is read, and could not \
                     be taken back. Nothing is changed"
                ),
            });
        }
        let mut path = path.to_owned();
        let mut before = self.file(&path)?.clone();
        let mut after = FileFacts::Text {
            content: new.to_owned(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            selinux: None,
            link_to: None,
        };
        if let FileFacts::Text { link_to, .. } = &mut before {
            path = link_to.take().unwrap_or(path);
            after = before.clone();
            if let FileFacts::Text { content, .. } = &mut after {
                new.clone_into(content);
            }
        }
        let why = why.into();
        Ok(Some(FileChange {
            path,
            before,
            after,
            why,
            check: None,
            units: Vec::new(),
        }))
    }

    /// The mirror's authority, which has to be a certificate.
    pub fn ca(&self) -> Result<Option<(&'a Path, &'a str)>, PlanError> {
        let Some(path) = self.settings.ca.as_deref() else {
            return Ok(None);
        };
        let wrong = |message: &str| PlanError {
            subject: path.display().to_string(),
            message: format!("{message}; `host.ca` names it"),
        };
        match self.text(path)? {
            None => Err(wrong("there is no such file")),
            Some(text) if !text.contains("-----BEGIN CERTIFICATE-----") => {
                Err(wrong("there is no certificate in it"))
            }
            Some(text) => Ok(Some((path, text))),
        }
    }
}

/// Whether two addresses of mirrors are one: a slash at the end, the case of the host and a port
/// that is the scheme's own make no difference.
pub(super) fn same_address(one: &str, other: &str) -> bool {
    let normal = |text: &str| {
        let url = Url::parse(text.trim()).ok()?;
        url.host_str()?;
        Some(url.as_str().trim_end_matches('/').to_owned())
    };
    match (normal(one), normal(other)) {
        (Some(one), Some(other)) => one == other,
        _ => one.trim_end_matches('/') == other.trim_end_matches('/'),
    }
}

/// A version's first two numbers: (20, 10) of `20.10.24+dfsg1`.
pub(super) fn version(text: Option<&str>) -> Option<(u32, u32)> {
    let text = text?.trim_start_matches('v');
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    let first = numbers.next()?.parse().ok()?;
    Some((
        first,
        numbers.next().and_then(|it| it.parse().ok()).unwrap_or(0),
    ))
}

/// The value of `--name VALUE` or `--name=VALUE`, or `-n VALUE`: the last one counts.
pub(in crate::host) fn argument(words: &[String], names: &[&str]) -> Option<String> {
    let mut found = None;
    for (index, word) in words.iter().enumerate() {
        for name in names {
            if word == name {
                found = words.get(index + 1).cloned();
            } else if let Some(value) = word.strip_prefix(name).and_then(|it| it.strip_prefix('='))
            {
                found = Some(value.to_owned());
            }
        }
    }
    found
}

/// The file that a daemon is told on its command line, or else the one that it reads by itself.
pub(super) fn config_file(
    running: Option<&Vec<String>>,
    unit: Option<&UnitFacts>,
    names: &[&str],
    default: &str,
) -> PathBuf {
    let started = unit.and_then(|unit| unit.exec_start.last());
    let said = |words: &Vec<String>| argument(words, names);
    let file = running.map_or_else(|| started.and_then(said), said);
    file.map_or_else(|| default.into(), PathBuf::from)
}

/// An error of a TOML file, with its place.
pub(super) fn broken_toml(path: &Path, text: &str, error: &toml_edit::TomlError) -> PlanError {
    let at = error.span().map_or(0, |span| span.start);
    let before = text.get(..at).unwrap_or(text);
    let row = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .map_or(0, |it| it.chars().count())
        + 1;
    PlanError {
        subject: format!("{}:{row}:{column}", path.display()),
        message: format!("not TOML: {}. Nothing is changed", error.message()),
    }
}
