//! What the daemons and the files are, as the loop left them or not.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tokio::time::Instant;

use super::{Host, IDLE_INTERVAL, Watch, kept_units};
use crate::host::apply::System as _;
use crate::host::plan::{Plan, Proof, Wanted};
use crate::host::verify;

/// What tells one state of a file from another without reading it: its device, inode, time of change
/// in seconds and nanoseconds, and size. None for a file that is not there, or can't be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Signature(Option<(u64, u64, i64, i64, u64)>);

impl Signature {
    fn of(path: &Path) -> Self {
        // Through a link: what the daemon reads is what it leads to.
        let metadata = fs::metadata(path).ok();
        Self(metadata.map(|it| (it.dev(), it.ino(), it.ctime(), it.ctime_nsec(), it.size())))
    }
}

impl<H: Host> Watch<'_, H> {
    /// Whether an engine runs that did not when it was looked at.
    pub(super) async fn has_any_started(&mut self) -> bool {
        if self.asked_idle.elapsed() < IDLE_INTERVAL {
            return false;
        }
        self.asked_idle = Instant::now();
        for unit in &self.idle {
            let now = self.apply.system.unit(unit).await;
            if now.is_ok_and(|now| now.active_state == "active") {
                return true;
            }
        }
        false
    }

    /// Whether a file is not what it was when it was looked at last: cheap enough for each turn.
    pub(super) fn files_changed(&self) -> bool {
        self.left
            .iter()
            .any(|(path, left)| Signature::of(&self.apply.path(path)) != *left)
    }

    /// The files are as this has just made them.
    pub(super) fn note_own_changes(&mut self) {
        for (path, left) in &mut self.left {
            *left = Signature::of(&self.apply.path(path));
        }
    }

    /// Whether what the engines were told is still so.
    pub(super) async fn look_at_daemons(&mut self, told: Wanted) {
        self.looked = Some(Instant::now());
        // As it was before the plan looked: what is changed in between is seen as changed.
        let before = std::mem::take(&mut self.left);
        let left: BTreeMap<_, _> = before
            .keys()
            .map(|path| (path.clone(), Signature::of(&self.apply.path(path))))
            .collect();
        let (plan, looked_at) = match self.host.look(told).await {
            Ok(looked) => looked,
            Err(why) => {
                if left != before {
                    let first = why.lines().next().unwrap_or_default();
                    let drift = format!("changed by somebody else, and not to be read: {first}");
                    tracing::warn!("{drift}");
                    self.state.drift = Some(drift);
                }
                self.left = left;
                // After a change that failed, why it did is what matters.
                if self.decider.told() == Some(told) {
                    self.state.next_step = Some(why);
                }
                return;
            }
        };
        let was = self.drifted;
        // What could not be done is nobody else's change.
        self.drifted = !plan.is_empty() && self.decider.told() == Some(told);
        let files: Vec<String> = plan
            .files
            .iter()
            .map(|file| file.path.display().to_string())
            .collect();
        self.changed_by_others = Self::fingerprints_of(&plan);
        if self.drifted {
            let what = files.join(", ");
            if !was {
                tracing::warn!("changed by somebody else: {what}");
            }
            self.state.drift = Some(format!("changed by somebody else: {what}"));
        } else {
            self.state.drift = None;
            if self.decider.told() == Some(Wanted::Wired) {
                self.forget_left();
            }
        }
        let refusals = plan.refusals.iter();
        self.state.refusals = refusals
            .map(|refusal| format!("{}: {}. {}", refusal.subject, refusal.why, refusal.remedy))
            .collect();
        // A containerd beside docker, which is left alone on most hosts, is the plan's to tell of.
        let dockers = plan.notes.iter().filter(|note| note.starts_with("docker"));
        let lines = dockers.filter_map(|note| note.lines().next());
        self.state.notes = lines.map(str::to_owned).collect();
        self.refused = refused_units(&plan);
        self.state.keep_mirror = kept_units(&plan);
        self.look_at_engines(&plan).await;
        // All that the plan depends on, and not only what was changed: a host that was wired by hand
        // has no file of ours.
        let known = self.apply.journal.originals();
        let known = known.map(|originals| originals.files).unwrap_or_default();
        for path in looked_at.into_iter().chain(known.into_keys()) {
            let signature = left.get(&path).copied();
            let signature = signature.unwrap_or_else(|| Signature::of(&self.apply.path(&path)));
            self.left.insert(path, signature);
        }
    }

    /// Asks each engine what it has.
    async fn look_at_engines(&mut self, plan: &Plan) {
        self.state.engines.clear();
        self.engines.clear();
        self.idle.clear();
        let mut failed = None;
        for proof in &plan.proofs {
            let (Proof::DockerMirrors { unit, .. } | Proof::Active { unit }) = proof;
            let name = unit.trim_end_matches(".service").to_owned();
            let engine = match (self.apply.system.unit(unit).await, proof) {
                (Err(error), _) => format!("{unit}: {error}"),
                (Ok(now), _) if now.active_state != "active" => {
                    self.idle.push(unit.clone());
                    if now.active_state == "failed" {
                        failed.get_or_insert_with(|| unit.clone());
                    }
                    match now.result.as_str() {
                        "" | "success" => format!("{unit} is {}", now.active_state),
                        why => format!("{unit} is {} ({why})", now.active_state),
                    }
                }
                (Ok(_), Proof::DockerMirrors { .. }) => {
                    match self.apply.system.docker_mirrors(unit).await {
                        Ok(has) => format!("{unit} has {}", verify::list(&has)),
                        Err(error) => format!("{unit}: {error}"),
                    }
                }
                (Ok(now), Proof::Active { .. }) => format!("{unit} is {}", now.active_state),
            };
            self.engines.push(name);
            self.state.engines.push(engine);
        }
        // One that is masked is not asked for a proof; it may be unmasked and started.
        let masked = self.state.notes.iter().filter_map(|note| {
            let (unit, _) = note.split_once(" is masked")?;
            Some(unit.to_owned())
        });
        self.idle.extend(masked);
        let well = self.state.last_apply.as_ref();
        if well.is_some_and(|it| it.failure.is_none()) && !self.drifted {
            self.state.next_step = failed.map(|unit| {
                format!(
                    "`journalctl --unit={unit}` says why {unit} failed; then `systemctl \
                     reset-failed {unit}` and `systemctl start {unit}`"
                )
            });
        }
    }
}

/// The dockers that can't be wired by these settings. What else is refused, a containerd beside
/// docker for one, is in the state's refusals and the plan.
fn refused_units(plan: &Plan) -> Vec<String> {
    let mut subjects: Vec<String> = Vec::new();
    for refusal in &plan.refusals {
        let subject = refusal.subject.trim_end_matches(".service").to_owned();
        if subject.starts_with("docker") && !subjects.contains(&subject) {
            subjects.push(subject);
        }
    }
    subjects
}
