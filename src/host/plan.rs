//! The difference between what is and what should be, as data.
//!
//! [`plan`] is pure: it sees nothing but its arguments, and gives the same plan for the same ones.
//! Each engine has a file of its own; what they share is in `context`.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use self::context::Context;
use super::facts::{Facts, FileFacts};
use crate::config::{HostSettings, Manage};

mod buildkit;
mod containerd;
mod context;
mod daemon_json;
mod docker;
mod dockerd;
mod hosts_file;
mod hosts_toml;
mod podman;
mod print;
mod read_only;
mod split;
mod take_back;
pub(super) mod words;

pub(super) use context::argument;
pub use print::Printed;
pub use take_back::{Daemon, Host as TakenFrom, mirrors_in, readers, take_back};

/// What the engines are to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// The mirror, first.
    Wired,
    /// No mirror of ours, for now: it does not serve. What else was wired stays, and a docker
    /// daemon is told `[]`, since it keeps the mirrors it has if the key is gone.
    Withdrawn,
}

/// Something that has to be put right by a person before anything can be planned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{subject}: {message}")]
pub struct PlanError {
    /// The file, with line and column where they are known, or the key of the configuration.
    pub subject: String,
    /// What is wrong with it, and what to do.
    pub message: String,
}

/// Everything that is in the way of a plan, at once. Prints one error a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanErrors(pub Vec<PlanError>);

impl std::error::Error for PlanErrors {}

impl fmt::Display for PlanErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let end = if index + 1 < self.0.len() { "\n" } else { "" };
            write!(f, "{error}{end}")?;
        }
        Ok(())
    }
}

/// An engine: its name, whether it is wired, whether it is here, and its plan.
type Part<'a> = (
    &'a str,
    Manage,
    bool,
    &'a dyn Fn() -> Result<Plan, PlanError>,
);

/// What has to be done so that the engines of this host are told what is wanted.
///
/// A host on which all is well gives an empty plan, also after it was applied. To wire them, an
/// error in what one engine is configured with is an error of the whole: nothing is changed on a
/// host that nobody understands. A mirror that does not serve is withdrawn all the same from those
/// that can be told: then it is never `Err`, and what is in the way of the others is in
/// [`Plan::errors`].
///
/// What the journal says was made for an engine that is not managed any more is taken back.
pub fn plan(facts: &Facts, settings: &HostSettings, wanted: Wanted) -> Result<Plan, PlanErrors> {
    let context = Context::new(facts, settings, wanted);
    let mut plan = Plan::default();
    if wanted == Wanted::Wired {
        context
            .check_mirror()
            .map_err(|error| PlanErrors(vec![error]))?;
    }
    let engines = &facts.engines;
    let parts: [Part<'_>; 4] = [
        (
            "docker",
            settings.docker.manage,
            !engines.docker.is_empty(),
            &|| Ok(docker::plan(&context)),
        ),
        (
            "containerd",
            settings.containerd,
            engines.containerd.is_some(),
            &|| containerd::plan(&context),
        ),
        ("podman", settings.podman, engines.podman.is_some(), &|| {
            podman::plan(&context)
        }),
        (
            "buildkit",
            settings.buildkit,
            engines.buildkit.is_some(),
            &|| buildkit::plan(&context),
        ),
    ];
    for (name, manage, here, part) in parts {
        if matches!(manage, Manage::Never | Manage::Report) {
            plan.extend(take_back::unmanaged(&context, name));
        }
        match (manage, here) {
            (Manage::Never, _) | (Manage::Auto | Manage::Report, false) => {}
            // From what is not here nothing has to be withdrawn.
            (Manage::Always, false) if wanted == Wanted::Withdrawn => {}
            (Manage::Always, false) => plan.errors.push(PlanError {
                subject: format!("host.{name}.manage"),
                message: format!(
                    "true, and there is no {name} on this host: install it, or say `auto`"
                ),
            }),
            (Manage::Auto | Manage::Always, true) => {
                plan.attempt(part().map(|part| read_only::refused(&context, name, part)));
            }
            (Manage::Report, true) => plan.notes.extend(print::reported(name, part())),
        }
    }
    // The name is this host's own: that the mirror is withdrawn makes no difference to it.
    if wanted == Wanted::Wired {
        plan.attempt(hosts_file::plan(&context));
        if !plan.errors.is_empty() {
            return Err(PlanErrors(plan.errors));
        }
    }
    Ok(plan)
}

/// The files that [`Facts::files`] has to hold and does not, by what it does hold: an environment
/// file can move `daemon.json`, and containerd's configuration its `certs.d`. It is empty after
/// two rounds of reading.
pub fn further_paths(facts: &Facts, settings: &HostSettings) -> BTreeSet<PathBuf> {
    let context = Context::new(facts, settings, Wanted::Wired);
    let mut paths = BTreeSet::new();
    hosts_file::paths(&context, &mut paths);
    paths.extend(settings.ca.clone());
    docker::paths(&context, &mut paths);
    containerd::paths(&context, &mut paths);
    podman::paths(&context, &mut paths);
    buildkit::paths(&context, &mut paths);
    take_back::paths(&context, &mut paths);
    paths.retain(|path| !facts.files.contains_key(path));
    paths
}

/// What changes, and in which order: files, then actions, then proofs. Empty is nothing to do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Files, in the order in which they are written.
    pub files: Vec<FileChange>,
    /// Unit jobs, in their order.
    pub actions: Vec<UnitAction>,
    /// What each engine has to say afterwards, also where nothing changes.
    pub proofs: Vec<Proof>,
    /// What would be needed and is not done, with what the operator can do.
    pub refusals: Vec<Refusal>,
    /// What is worth knowing, and asks for nothing.
    pub notes: Vec<String>,
    /// What could not be planned, where the rest is done without it: it is not done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<PlanError>,
    /// The files that are taken back for good, changed or not: nothing of ours is in them then, and
    /// the journal forgets them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub forgotten: BTreeSet<PathBuf>,
    /// The units that go on with the mirror though it is withdrawn, since only a restart could tell
    /// them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keep_mirror: Vec<String>,
}

/// One file, before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// The file itself: where its name is a symbolic link, what it leads to.
    pub path: PathBuf,
    /// What was there when the facts were read. If it is anything else when it is written, the
    /// plan is out of date, and nothing is written.
    pub before: FileFacts,
    /// What is to be there: never [`FileFacts::Unreadable`].
    pub after: FileFacts,
    /// Why, in a sentence.
    pub why: String,
    /// What has to be run on the new content before anything is written.
    pub check: Option<Check>,
    /// The units that read it and have to be told, or asked, about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<String>,
}

/// A daemon's own check of a file that is not in its place yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// `dockerd --validate` (from 23.0) with the unit's real arguments; `--config-file` and the
    /// staged file are added by whoever runs it.
    DockerdValidate {
        /// The program and its arguments, without `--config-file`.
        command: Vec<String>,
    },
}

/// A job for a unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitAction {
    /// `docker.service`.
    pub unit: String,
    /// What is to be done with it.
    pub verb: Verb,
    /// Why, in a sentence.
    pub why: String,
}

/// What can be done with a unit that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Its configuration is read again; nothing that runs is touched.
    Reload,
    /// It is stopped and started.
    Restart,
}

/// What has to be true when all is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// docker's `GET /info` lists exactly these mirrors, in this order, as docker makes them of a
    /// configuration ([`crate::host::verify::equal`]).
    DockerMirrors {
        /// The unit whose daemon is asked.
        unit: String,
        /// `RegistryConfig.Mirrors`.
        mirrors: Vec<String>,
    },
    /// The unit is active after its job.
    Active {
        /// The unit.
        unit: String,
    },
}

impl Proof {
    /// The unit that it is of.
    pub fn unit(&self) -> &str {
        match self {
            Self::DockerMirrors { unit, .. } | Self::Active { unit } => unit,
        }
    }
}

/// Something that is needed and not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The engine, unit or file.
    pub subject: String,
    /// What is not done, and why.
    pub why: String,
    /// What the operator can do about it.
    pub remedy: String,
}

impl Plan {
    /// Whether it changes nothing on the host.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.actions.is_empty()
    }

    /// The units that have a job or a proof in it.
    fn readers(&self) -> impl Iterator<Item = &str> {
        let jobs = self.actions.iter().map(|action| action.unit.as_str());
        jobs.chain(self.proofs.iter().map(Proof::unit))
    }

    /// Adds another part; what both have (two docker units share a `certs.d`) is there once.
    fn extend(&mut self, part: Self) {
        let readers: BTreeSet<String> = part.readers().map(str::to_owned).collect();
        for mut change in part.files {
            if change.units.is_empty() {
                change.units = readers.iter().cloned().collect();
            }
            match self.files.iter_mut().find(|one| one.path == change.path) {
                Some(one) => {
                    let further = change.units.into_iter();
                    let further: Vec<_> = further.filter(|it| !one.units.contains(it)).collect();
                    one.units.extend(further);
                }
                None => self.files.push(change),
            }
        }
        self.actions.extend(part.actions);
        self.proofs.extend(part.proofs);
        self.errors.extend(part.errors);
        self.forgotten.extend(part.forgotten);
        self.keep_mirror.extend(part.keep_mirror);
        for refusal in part.refusals {
            if !self.refusals.contains(&refusal) {
                self.refusals.push(refusal);
            }
        }
        for note in part.notes {
            self.note(note);
        }
    }

    /// Adds a part, or says why it is missing.
    fn attempt(&mut self, part: Result<Self, PlanError>) {
        match part {
            Ok(part) => self.extend(part),
            Err(error) => self.errors.push(error),
        }
    }

    fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn refuse(&mut self, subject: impl Into<String>, why: String, remedy: String) {
        self.refusals.push(Refusal {
            subject: subject.into(),
            why,
            remedy,
        });
    }

    fn act(&mut self, unit: &str, verb: Verb, why: impl Into<String>) {
        self.actions.push(UnitAction {
            unit: unit.to_owned(),
            verb,
            why: why.into(),
        });
    }
}
