//! What became of a plan.

use std::fmt;
use std::path::PathBuf;

use super::{SystemError, Undone};
use crate::host::facts::FileFacts;
use crate::host::journal::{Change, JournalError};
use crate::host::plan::{Proof, UnitAction, Verb};
use crate::host::verify;
use crate::host::write::{self, WriteError};

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Files, as they are now.
    pub files: Vec<Change>,
    /// Jobs that ended well.
    pub jobs: Vec<UnitAction>,
    /// What the daemons have said.
    pub proved: Vec<Proof>,
    /// What could not be asked for, and why that is no fault: a daemon that does not run.
    pub notes: Vec<String>,
}

/// Nothing was changed, or it is as it was before, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Somebody changed a file between the facts and now.
    #[error(
        "{} has changed since the plan was made: nothing was written. Make the plan again", .0.display()
    )]
    Stale(PathBuf),
    /// An earlier change was never ended.
    #[error(
        "an earlier change of this host was not ended ({}): `registry-agent apply` and `rollback` \
         end it before they do anything else", .0.display()
    )]
    Unfinished(PathBuf),
    /// What an earlier change has left can't be taken back yet.
    #[error(
        "an earlier change of this host was not ended ({}), and can't be taken back yet, so nothing \
         else is changed: {problems}.\nOnce that is put right, `registry-agent apply` and \
         `rollback` take it back before they do anything else; registry-agent-host.service tries \
         again by itself", journal.display()
    )]
    Unrecovered {
        /// The journal's file.
        journal: PathBuf,
        /// What is in the way.
        problems: String,
    },
    /// A daemon would not take its new file.
    #[error("{} would be refused, so nothing was written: {source}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// The refusal.
        source: SystemError,
    },
    /// A unit can't even be looked at.
    #[error("nothing was written: {0}")]
    System(#[from] SystemError),
    /// A file can't be read or written, found before anything was changed.
    #[error("nothing was changed: {0}")]
    Write(#[from] WriteError),
    /// The journal.
    #[error("{0}")]
    Journal(#[from] JournalError),
    /// It was begun, failed, and was taken back.
    #[error("{failure}\n{undone}")]
    Undone {
        /// What failed.
        failure: String,
        /// What was done about it.
        undone: Undone,
    },
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for change in &self.files {
            let Change {
                path,
                before,
                after,
                ..
            } = change;
            let done = match after {
                _ if write::same(before, after) => "as it was",
                FileFacts::Absent => "removed",
                _ => "written",
            };
            writeln!(f, "{done}: {}", path.display())?;
        }
        for UnitAction { unit, verb, .. } in &self.jobs {
            let done = match verb {
                Verb::Reload => "reloaded",
                Verb::Restart => "restarted",
            };
            writeln!(f, "{done}: {unit}")?;
        }
        for proof in &self.proved {
            match proof {
                Proof::DockerMirrors { unit, mirrors } => {
                    writeln!(f, "proved: {unit} has {}", verify::list(mirrors))?;
                }
                Proof::Active { unit } => writeln!(f, "proved: {unit} runs")?,
            }
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}
