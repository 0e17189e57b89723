//! The way back: what was made on this host, by the journal, taken out again.
//!
//! It needs neither the configuration nor the engines: what a file is shows in what we made of it. A
//! file that nobody else has changed becomes again what it was. From one that somebody has changed
//! only what is ours is taken, by the rules of its kind; where that can't be done safely, it is
//! refused with what a person can do, and the journal keeps the file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::context::{Context, same_address};
use super::{Plan, daemon_json, hosts_file};
use crate::config::Manage;
use crate::host::facts::{Engines, FileFacts, UnitFacts};
use crate::host::journal::{Original, Originals};
use crate::host::write::same;

mod docker;
mod jobs;
mod kind;
mod text;
mod toml;

use self::jobs::Jobs;
use self::kind::Kind;

/// The host that is taken back.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    /// What was changed on it.
    pub originals: &'a Originals,
    /// Those files as they are now.
    pub now: &'a BTreeMap<PathBuf, FileFacts>,
    /// The daemons that read them, by their units; one that is not there is idle.
    pub daemons: &'a BTreeMap<String, Daemon>,
    /// Whether units may be restarted.
    pub restart: bool,
}

/// What a daemon goes by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Daemon {
    /// It does not run: it reads its files when it starts.
    Idle,
    /// It runs, and what it has is not known.
    Silent,
    /// docker's mirrors, as its `/info` has them.
    Has(Vec<String>),
}

impl Daemon {
    /// A daemon of which no more is known than its unit.
    pub fn of(unit: &UnitFacts) -> Self {
        match unit.active_state.as_str() {
            "inactive" | "failed" => Self::Idle,
            _ => Self::Silent,
        }
    }
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

/// The units that read the files that were changed, each with whether it is docker's, which can be
/// asked for its mirrors.
pub fn readers(originals: &Originals) -> BTreeMap<String, bool> {
    let mut readers = BTreeMap::new();
    for (path, original) in &originals.files {
        let kind = Kind::of(path, original);
        let docker = matches!(kind, Some(Kind::DaemonJson | Kind::DockerFlags));
        for unit in original.verbs.keys() {
            *readers.entry(unit.clone()).or_default() |= docker;
        }
    }
    readers
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
    let host = Host {
        originals: &facts.originals,
        now: &facts.files,
        daemons: &daemons(&facts.engines),
        restart: context.may_restart(),
    };
    let since = format!("{engine} was wired, which it is not any more (`host.{engine}.manage`)");
    taken_back(host, of_it, &since)
}

fn daemons(engines: &Engines) -> BTreeMap<String, Daemon> {
    let others = [
        engines.containerd.as_ref().and_then(|it| it.unit.as_ref()),
        engines.podman.as_ref().and_then(|it| it.crio.as_ref()),
        engines.buildkit.as_ref().map(|it| &it.unit),
    ];
    let others = others.into_iter().flatten();
    let others = others.map(|unit| (unit.name.clone(), Daemon::of(unit)));
    let dockers = engines.docker.iter().map(|docker| {
        let info = docker.info.as_ref();
        let has = info.map(|info| Daemon::Has(info.mirrors.clone()));
        let daemon = has.unwrap_or_else(|| Daemon::of(&docker.unit));
        (docker.unit.name.clone(), daemon)
    });
    others.chain(dockers).collect()
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
    let mut steps = Vec::new();
    let names = local_names(host.originals);
    let files = host.originals.files.iter();
    for (path, original) in files.filter(|(path, original)| which(path, original)) {
        let ours = Ours {
            original,
            mirrors: &host.originals.mirrors,
            names: names.clone(),
        };
        steps.extend(step(host, path, ours, since, &mut plan));
    }
    let goals = goals(host, &steps);
    let mut jobs = Jobs {
        host,
        by_file: steps_of(&steps, Kind::DaemonJson).collect(),
        goals,
        verbs: BTreeMap::new(),
        plan,
    };
    for step in steps {
        jobs.take(step);
    }
    jobs.plan()
}

/// One file, and what becomes of it.
struct Step<'a> {
    path: &'a Path,
    kind: Option<Kind>,
    ours: Ours<'a>,
    now: FileFacts,
    after: FileFacts,
    why: String,
}

/// What a file becomes; nothing where that is refused.
fn step<'a>(
    host: Host<'_>,
    path: &'a Path,
    ours: Ours<'a>,
    since: &str,
    plan: &mut Plan,
) -> Option<Step<'a>> {
    let original = ours.original;
    let now = host.now.get(path).unwrap_or(&FileFacts::Absent);
    let kind = Kind::of(path, original);
    let untouched = !original.edited && same(now, &original.made);
    let (after, why) = if untouched || same(now, &original.before) {
        let why = format!("it was like this before {since}");
        (original.before.clone(), why)
    } else {
        match ours.taken_out(kind, now, &told(host, original)) {
            Ok(after) => {
                plan.note(format!(
                    "{} was changed by somebody else: only what is registry-agent's is taken out \
                     of it",
                    path.display()
                ));
                (after, "what is registry-agent's is taken out".to_owned())
            }
            Err(Unsafe { why, remedy }) => {
                plan.refuse(path.display().to_string(), why, remedy);
                return None;
            }
        }
    };
    Some(Step {
        path,
        kind,
        ours,
        now: now.clone(),
        after,
        why,
    })
}

/// The units that read a file of this kind.
fn steps_of<'a>(steps: &'a [Step<'_>], kind: Kind) -> impl Iterator<Item = String> + 'a {
    let steps = steps.iter().filter(move |step| step.kind == Some(kind));
    steps.flat_map(|step| step.ours.original.verbs.keys().cloned())
}

/// The mirrors that docker is to have, by its units.
fn goals(host: Host<'_>, steps: &[Step<'_>]) -> BTreeMap<String, Vec<String>> {
    let mut goals: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for step in steps {
        for unit in step.ours.original.verbs.keys() {
            match goal(step.kind, &step.after, unit, &step.ours, host) {
                // Where there are flags, docker takes no list from its file.
                Some(goal) if step.kind == Some(Kind::DockerFlags) && !goal.is_empty() => {
                    goals.insert(unit.clone(), goal);
                }
                Some(goal) => {
                    goals.entry(unit.clone()).or_insert(goal);
                }
                None => {}
            }
        }
    }
    goals
}

/// The live mirrors of whoever reads this file.
fn told<'a>(host: Host<'a>, original: &Original) -> Vec<&'a str> {
    let units = original.verbs.keys();
    let lists = units.filter_map(|unit| match host.daemons.get(unit)? {
        Daemon::Has(mirrors) => Some(mirrors),
        Daemon::Idle | Daemon::Silent => None,
    });
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
    let files = originals.files.values();
    files.flat_map(hosts_file::our_names).collect()
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
            Some(Kind::HostsFile) => Ok(Some(text::hosts(self, content))),
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
            // Nobody has to put right for us what has nothing of ours in it, unless its reader has:
            // it would not read this file either.
            Err(_) if !self.is_mentioned(content) && !told.iter().any(|one| self.is_told(one)) => {
                Ok(now.clone())
            }
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

    /// What engines were told of, as a person reads it.
    fn said(&self) -> String {
        let mirrors: Vec<&str> = self.mirrors.iter().map(String::as_str).collect();
        mirrors.join(" and ")
    }

    fn remedy(&self) -> String {
        format!(
            "put it right, or take {} out of it yourself; then `registry-agent rollback` once more",
            self.said()
        )
    }
}
