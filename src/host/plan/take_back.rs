//! The way back: what was made on this host, by the journal, taken out again.
//!
//! It needs neither the configuration nor the engines: what a file is shows in what we made of it. A
//! file that nobody else has changed becomes again what it was. From one that somebody has changed
//! only what is ours is taken, by the rules of its kind; where that can't be done safely, it is
//! refused with what a person can do, and the journal keeps the file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::context::{Context, same_address};
use super::{FileChange, Plan, Proof, Verb, daemon_json, dockerd, hosts_file, words};
use crate::config::Manage;
use crate::host::facts::FileFacts;
use crate::host::journal::{Original, Originals, stronger};
use crate::host::write::same;

mod docker;
mod text;
mod toml;

/// The host that is taken back.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    /// What was changed on it.
    pub originals: &'a Originals,
    /// Those files as they are now.
    pub now: &'a BTreeMap<PathBuf, FileFacts>,
    /// The mirrors of the docker daemons that answer, by their units.
    pub live: &'a BTreeMap<String, Vec<String>>,
    /// Whether units may be restarted.
    pub restart: bool,
}

/// What a file of ours is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
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

/// What is ours, in a file of others.
struct Ours<'a> {
    original: &'a Original,
    /// The addresses that engines were ever told of.
    mirrors: &'a BTreeSet<String>,
    /// The names of this host's own registry that we have put into `/etc/hosts`.
    names: Vec<String>,
}

/// Why something can't be taken out, and what a person can do about it.
struct Unsafe {
    why: String,
    remedy: String,
}

/// Takes back every file that was ever changed. What can't be taken out safely is in
/// [`Plan::refusals`]; the files that are done with, changed or not, are in [`Plan::forgotten`].
pub fn take_back(host: Host<'_>) -> Plan {
    taken_back(host, |_, _| true, "the engines were wired")
}

/// The units whose `daemon.json` was changed.
pub fn dockers(originals: &Originals) -> BTreeSet<String> {
    let files = originals.files.iter();
    let files = files.filter(|(path, one)| Kind::of(path, one) == Some(Kind::DaemonJson));
    files
        .flat_map(|(_, one)| one.verbs.keys().cloned())
        .collect()
}

/// The mirrors that a `daemon.json` names; nothing where it is none, or has no such key.
pub fn mirrors_in(file: &FileFacts) -> Option<Vec<String>> {
    daemon_json::read(text_of(file)).ok()?.mirrors
}

/// Takes back what was made for an engine (`docker`), which is not managed any more.
pub(super) fn unmanaged(context: &Context<'_>, engine: &str) -> Plan {
    let facts = context.facts;
    let of_it = |path: &Path, original: &Original| {
        Kind::of(path, original).is_some_and(|kind| kind.engine(path) == Some(engine))
    };
    let dockers = facts.engines.docker.iter();
    let live = dockers.filter_map(|docker| {
        let info = docker.info.as_ref()?;
        Some((docker.unit.name.clone(), info.mirrors.clone()))
    });
    let host = Host {
        originals: &facts.originals,
        now: &facts.files,
        live: &live.collect(),
        restart: context.may_restart(),
    };
    let since = format!("{engine} was wired, which it is not any more (`host.{engine}.manage`)");
    taken_back(host, of_it, &since)
}

/// The files that [`unmanaged`] looks at.
pub(super) fn paths(context: &Context<'_>, paths: &mut BTreeSet<PathBuf>) {
    let settings = context.settings;
    let manages = [
        settings.docker.manage,
        settings.containerd,
        settings.podman,
        settings.buildkit,
    ];
    if manages
        .iter()
        .any(|manage| matches!(manage, Manage::Never | Manage::Report))
    {
        paths.extend(context.facts.originals.files.keys().cloned());
    }
}

fn taken_back(host: Host<'_>, which: impl Fn(&Path, &Original) -> bool, since: &str) -> Plan {
    let mut plan = Plan::default();
    let mut verbs: BTreeMap<String, Verb> = BTreeMap::new();
    let mut goals: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let names = local_names(host.originals);
    let files = host.originals.files.iter();
    for (path, original) in files.filter(|(path, original)| which(path, original)) {
        let now = host.now.get(path).unwrap_or(&FileFacts::Absent);
        let kind = Kind::of(path, original);
        let ours = Ours {
            original,
            mirrors: &host.originals.mirrors,
            names: names.clone(),
        };
        let untouched = !original.edited && same(now, &original.made);
        let (after, why) = if untouched || same(now, &original.before) {
            let why = format!("it was like this before {since}");
            (original.before.clone(), why)
        } else {
            match ours.taken_out(kind, now, &told(host, original)) {
                Ok(after) => {
                    plan.note(format!(
                        "{} was changed by somebody else: only what is registry-agent's is taken \
                         out of it",
                        path.display()
                    ));
                    (after, "what is registry-agent's is taken out".to_owned())
                }
                Err(Unsafe { why, remedy }) => {
                    plan.refuse(path.display().to_string(), why, remedy);
                    continue;
                }
            }
        };
        for unit in original.verbs.keys() {
            match goal(kind, &after, unit, &ours, host) {
                // Where there are flags, docker takes no list from its file.
                Some(goal) if kind == Some(Kind::DockerFlags) && !goal.is_empty() => {
                    goals.insert(unit.clone(), goal);
                }
                Some(goal) => {
                    goals.entry(unit.clone()).or_insert(goal);
                }
                None => {}
            }
        }
        plan.forgotten.insert(path.clone());
        if same(now, &after) {
            continue;
        }
        for (unit, verb) in &original.verbs {
            if let Some(verb) = kind.map_or(Some(*verb), |kind| kind.verb(*verb)) {
                let kept = verbs.entry(unit.clone()).or_insert(verb);
                *kept = stronger(*kept, verb);
            }
        }
        plan.files.push(FileChange {
            path: path.clone(),
            before: now.clone(),
            after,
            why,
            check: None,
            units: original.verbs.keys().cloned().collect(),
        });
    }
    for (unit, verb) in verbs {
        if verb == Verb::Restart && !host.restart {
            plan.note(format!(
                "{unit} keeps what it was started with until it is restarted, which \
                 host.docker.restart does not allow: `systemctl restart {unit}` when it suits"
            ));
            continue;
        }
        plan.proofs.push(match goals.remove(&unit) {
            Some(mirrors) => Proof::DockerMirrors {
                unit: unit.clone(),
                mirrors,
            },
            None => Proof::Active { unit: unit.clone() },
        });
        plan.act(&unit, verb, "its files are without the mirror");
    }
    plan
}

/// The live mirrors of whoever reads this file.
fn told<'a>(host: Host<'a>, original: &Original) -> Vec<&'a str> {
    let units = original.verbs.keys();
    let lists = units.filter_map(|unit| host.live.get(unit));
    lists.flatten().map(String::as_str).collect()
}

/// What docker has once it has read this file; nothing where the file is not what it has mirrors
/// from.
fn goal(
    kind: Option<Kind>,
    after: &FileFacts,
    unit: &str,
    ours: &Ours<'_>,
    host: Host<'_>,
) -> Option<Vec<String>> {
    match kind? {
        Kind::DockerFlags => Some(docker::flags(text_of(after))),
        Kind::DaemonJson => {
            let said = mirrors_in(after);
            // A reload leaves docker what it has where the key is not there, and Apply has it take
            // what it had before it was first told of the mirror. The mirror itself is not part of
            // that: it is about to go.
            let remembered = || {
                let before = host.originals.units.get(unit)?.mirrors.clone()?;
                let others = before.into_iter().filter(|one| !ours.is_told(one));
                Some(others.collect())
            };
            said.or_else(remembered).or_else(|| Some(Vec::new()))
        }
        _ => None,
    }
}

fn text_of(facts: &FileFacts) -> &str {
    match facts {
        FileFacts::Text { content, .. } => content,
        FileFacts::Absent | FileFacts::Unreadable(_) => "",
    }
}

/// The names on the lines of `/etc/hosts` that we made.
fn local_names(originals: &Originals) -> Vec<String> {
    let made = originals.files.values().map(|one| text_of(&one.made));
    made.flat_map(hosts_file::our_names).collect()
}

impl Kind {
    /// By what we made of it: it is the same after everything that somebody else does to the file.
    fn of(path: &Path, original: &Original) -> Option<Self> {
        let made = text_of(&original.made);
        match path.file_name().and_then(|name| name.to_str()) {
            Some("hosts.toml") => return Some(Self::HostsToml),
            Some("ca.crt") => return Some(Self::Certificate),
            _ => {}
        }
        if hosts_file::our_names(made).next().is_some() || path == Path::new(hosts_file::FILE) {
            return Some(Self::HostsFile);
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
    fn engine(self, path: &Path) -> Option<&'static str> {
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
    fn verb(self, then: Verb) -> Option<Verb> {
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

impl Ours<'_> {
    /// Whether engines were told of this address.
    fn is_told(&self, address: &str) -> bool {
        self.mirrors.iter().any(|one| same_address(one, address))
    }

    /// The same for an address without a scheme, with or without a path below it.
    fn is_told_bare(&self, address: &str) -> bool {
        let host = address.split('/').next().unwrap_or_default();
        let mut mirrors = self.mirrors.iter();
        mirrors.any(|one| {
            one.split_once("://")
                .is_some_and(|(scheme, _)| same_address(one, &format!("{scheme}://{host}")))
        })
    }

    /// What it was before we came.
    fn before(&self) -> &str {
        text_of(&self.original.before)
    }

    /// What we made of it last.
    fn made(&self) -> &str {
        text_of(&self.original.made)
    }

    /// The file of somebody else without what is ours. `told` is what its readers have now.
    fn taken_out(
        &self,
        kind: Option<Kind>,
        now: &FileFacts,
        told: &[&str],
    ) -> Result<FileFacts, Unsafe> {
        let content = match now {
            FileFacts::Absent => return Ok(FileFacts::Absent),
            FileFacts::Unreadable(why) => {
                return Err(Unsafe {
                    why: format!("it can't be read: {why}. What is in it is not known"),
                    remedy: self.remedy(),
                });
            }
            FileFacts::Text { content, .. } => content,
        };
        let taken = match kind {
            Some(Kind::DaemonJson) => docker::daemon_json(self, content, told),
            Some(Kind::DockerFlags) => docker::without_flags(self, content),
            Some(Kind::HostsToml) => toml::hosts(self, content),
            Some(Kind::ContainerdConfig) => toml::containerd(self, content),
            Some(Kind::PodmanDropIn) => toml::podman(self, content),
            Some(Kind::BuildkitToml) => toml::buildkit(self, content),
            Some(Kind::Certificate) => Ok(text::certificate(self, content)),
            Some(Kind::HostsFile) => Ok(Some(text::hosts(content))),
            None => Err("it is not what it was when it was made".to_owned()),
        };
        match taken {
            Ok(Some(text)) => {
                let mut after = now.clone();
                if let FileFacts::Text { content, .. } = &mut after {
                    *content = text;
                }
                Ok(after)
            }
            Ok(None) => Ok(self.original.before.clone()),
            // Nobody has to put right for us what has nothing of ours in it.
            Err(_) if !self.is_mentioned(content) => Ok(now.clone()),
            Err(why) => Err(Unsafe {
                why: format!(
                    "it was changed by somebody else, and what is registry-agent's can't be taken \
                     out: {why}"
                ),
                remedy: self.remedy(),
            }),
        }
    }

    fn is_mentioned(&self, content: &str) -> bool {
        let mut mirrors = self.mirrors.iter();
        mirrors.any(|one| {
            let bare = one.split_once("://").map_or(one.as_str(), |(_, bare)| bare);
            content.contains(bare.trim_end_matches('/'))
        })
    }

    fn remedy(&self) -> String {
        let mirrors: Vec<&str> = self.mirrors.iter().map(String::as_str).collect();
        format!(
            "put it right, or take {} out of it yourself; then `registry-agent rollback` once more",
            mirrors.join(" and ")
        )
    }
}
