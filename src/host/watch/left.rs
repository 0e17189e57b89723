//! What is left to others, and stays theirs when this ends and starts again.
//!
//! A policy that leaves a change of somebody else to them, or a fight that was given up, would be
//! worth little if the next start wrote over it. So the files are remembered by what is in them: one
//! that has changed once more since is looked at like any other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ring::digest;
use serde::{Deserialize, Serialize};

use super::{Host, Watch};
use crate::config::Drift;
use crate::host::facts::FileFacts;
use crate::host::plan::Plan;
use crate::host::write;

/// The file beside the journal. One that can't be read leaves nothing to anybody.
const NAME: &str = "left.json";

/// What is left to others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Left {
    /// Whether it was put right and changed back until that was given up; it is the policy
    /// otherwise, and only as long as that is the policy.
    fought: bool,
    /// The SHA-256 of what is in each file, in hexadecimal digits; `absent` for one that is not
    /// there.
    files: BTreeMap<PathBuf, String>,
}

impl<H: Host> Watch<'_, H> {
    /// What an earlier run has left to others, if it is as it was then: nothing is written over it.
    pub(super) fn resume_left(&mut self) -> bool {
        let Some(left) = self.read_left() else {
            return false;
        };
        let stays = left.fought || self.host.terms().drift == Drift::Report;
        let now = self.fingerprints(left.files.keys());
        let same: Vec<String> = now
            .iter()
            .filter(|(path, now)| left.files.get(*path) == Some(now))
            .map(|(path, _)| path.display().to_string())
            .collect();
        if !stays || same.is_empty() {
            self.left_to_others = Some(left);
            self.forget_left();
            return false;
        }
        let what = same.join(", ");
        tracing::warn!("changed by somebody else, and left to them as before: {what}");
        self.decider.resume(self.begun.elapsed(), left.fought);
        self.state.drift = Some(format!("changed by somebody else, and left: {what}"));
        self.left_to_others = Some(left);
        true
    }

    /// Keeps for the next start that this is left to others.
    pub(super) fn remember_left(&mut self) {
        if !self.drifted {
            return;
        }
        let left = Left {
            fought: self.decider.has_fought(),
            files: self.changed_by_others.clone(),
        };
        self.keep_left(left);
    }

    /// Takes note of what was just taken out of their files: the rest of them is still theirs.
    pub(super) fn update_left(&mut self) {
        if let Some(left) = &self.left_to_others {
            let files = self.fingerprints(left.files.keys());
            let fought = left.fought;
            self.keep_left(Left { fought, files });
        }
    }

    /// Nothing is left to others any more.
    pub(super) fn forget_left(&mut self) {
        if self.left_to_others.take().is_some()
            && let Err(error) = write::remove(&self.left_file())
        {
            tracing::warn!("what was left to others is not forgotten: {error}");
        }
    }

    /// The files that the plan would change, by what is in them.
    pub(super) fn fingerprints_of(plan: &Plan) -> BTreeMap<PathBuf, String> {
        let files = plan.files.iter();
        files
            .map(|file| (file.path.clone(), fingerprint(&file.before)))
            .collect()
    }

    fn keep_left(&mut self, left: Left) {
        if self.left_to_others.as_ref() == Some(&left) {
            return;
        }
        let facts = FileFacts::Text {
            content: serde_json::to_string_pretty(&left).unwrap_or_default() + "\n",
            mode: 0o600,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            selinux: None,
            link_to: None,
        };
        if let Err(error) = write::put(&self.left_file(), &facts) {
            tracing::warn!("the next start will not know what is left to others: {error}");
        }
        self.left_to_others = Some(left);
    }

    fn read_left(&self) -> Option<Left> {
        let path = self.left_file();
        let said = match write::read(&path) {
            Ok(FileFacts::Absent) => return None,
            Ok(FileFacts::Text { content, .. }) => {
                serde_json::from_str(&content).map_err(|error| error.to_string())
            }
            Ok(FileFacts::Unreadable(why)) => Err(why),
            Err(error) => Err(error.to_string()),
        };
        said.inspect_err(|why| {
            tracing::warn!(
                "what was left to others is not known, for {} can't be read: {why}",
                path.display()
            );
        })
        .ok()
    }

    fn fingerprints<'p>(
        &self,
        paths: impl Iterator<Item = &'p PathBuf>,
    ) -> BTreeMap<PathBuf, String> {
        let read = |path: &Path| match write::read(&self.apply.path(path)) {
            Ok(facts) => fingerprint(&facts),
            Err(error) => error.to_string(),
        };
        paths.map(|path| (path.clone(), read(path))).collect()
    }

    fn left_file(&self) -> PathBuf {
        self.apply.journal.folder().join(NAME)
    }
}

fn fingerprint(facts: &FileFacts) -> String {
    match facts {
        FileFacts::Absent => "absent".to_owned(),
        FileFacts::Unreadable(why) => format!("unreadable: {why}"),
        FileFacts::Text { content, .. } => {
            let digest = digest::digest(&digest::SHA256, content.as_bytes());
            let digits = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
            digits.collect()
        }
    }
}
