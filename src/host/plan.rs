//! The difference between what is and what should be, as data.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::facts::FileFacts;

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
    /// docker's `GET /info` lists exactly these mirrors, in this order, slashes at the end aside.
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
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.actions.is_empty()
    }
}
