//! A plan, done: all of it, proved by the daemons, or none of it.
//!
//! Everything is checked before anything is written, the journal has what was there before, and what
//! falls short of proof is taken back, daemons and all. A crash at any line leaves a journal with
//! which the next start undoes it ([`Apply::recover`]), or ends it where the proof was recorded.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::facts::{FileFacts, UnitFacts};
use super::journal::{Change, Journal, Transaction, UnitBefore};
use super::plan::{Check, FileChange, Plan, Proof, UnitAction, Verb};
use super::verify;
use super::write::{self, Staged};
use crate::failpoint::failpoint;
pub use each::Partly;
pub use outcome::{ApplyError, Report};
pub use undo::{Recovered, Undone};

mod bridge;
mod each;
mod outcome;
mod undo;
mod withdraw;

/// What apply needs of the host besides its files.
pub trait System: Sync {
    /// Runs the job to its end, or fails by the deadline. Only systemd's `done` is success.
    fn run(
        &self,
        action: &UnitAction,
        deadline: Duration,
    ) -> impl Future<Output = Result<(), SystemError>> + Send;
    /// Forgets that a unit failed, and how often it was started (`ResetFailedUnit`).
    fn reset_failed(&self, unit: &str) -> impl Future<Output = Result<(), SystemError>> + Send;
    /// `RegistryConfig.Mirrors` of the daemon of this unit.
    fn docker_mirrors(
        &self,
        unit: &str,
    ) -> impl Future<Output = Result<Vec<String>, SystemError>> + Send;
    /// The unit as it is now.
    fn unit(&self, unit: &str) -> impl Future<Output = Result<UnitFacts, SystemError>> + Send;
    /// Whether the whole host is going down: daemons are told nothing more, and read their files at
    /// the next boot.
    fn is_shutting_down(&self) -> impl Future<Output = bool> + Send;
    /// Runs a daemon's own check over staged content; `Err` has the text of the refusal.
    fn check(
        &self,
        check: &Check,
        staged: &Path,
    ) -> impl Future<Output = Result<(), SystemError>> + Send;
}

/// Says what was being done, to what, and what came back.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SystemError(pub String);

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// A unit's job. docker.service has no limit of its own (`TimeoutStartSec=0`).
    pub job: Duration,
    /// From the last job to the proof.
    pub proof: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            job: Duration::from_secs(90),
            proof: Duration::from_secs(10),
        }
    }
}

/// What is being applied.
#[derive(Debug, Clone, Default)]
pub struct Purpose {
    /// The mirror that the engines are told of; none where it is taken back.
    pub mirror: Option<String>,
}

/// Where plans are applied. Whoever has one has the [`super::lock::Lock`].
#[derive(Debug)]
pub struct Apply<'a, S> {
    /// The host's files: `/`, or a scratch root.
    pub root: &'a Path,
    /// The state folder.
    pub journal: &'a Journal,
    /// The daemons.
    pub system: &'a S,
    /// How long they may take.
    pub deadlines: Deadlines,
}

impl<S: System> Apply<'_, S> {
    /// Does all of a plan, or none of it. Where there is nothing to do, nothing is written.
    pub async fn apply(&self, plan: &Plan, purpose: Purpose) -> Result<Report, ApplyError> {
        match self.begin(plan, purpose).await? {
            Some(transaction) => self.complete(transaction).await,
            None => Ok(Report::default()),
        }
    }

    /// Writes the files of a plan, and tells nobody: what a daemon that is not started yet will
    /// read. Before the agent's own unit has said READY it must not wait for a job of a unit that
    /// waits for it.
    pub async fn begin(
        &self,
        plan: &Plan,
        purpose: Purpose,
    ) -> Result<Option<Transaction>, ApplyError> {
        if plan.is_empty() && plan.forgotten.is_empty() {
            return Ok(None);
        }
        if self.journal.transaction()?.is_some() {
            return Err(ApplyError::Unfinished(self.journal.transaction_file()));
        }
        for change in &plan.files {
            let path = self.path(&change.path);
            if !write::same(&write::read(&path)?, &change.before) {
                return Err(ApplyError::Stale(change.path.clone()));
            }
            write::check_writable(&path)?;
        }
        self.check(&plan.files).await?;
        let mut transaction = Transaction {
            told: false,
            proved: false,
            files: Vec::new(),
            folders: self.missing_folders(plan),
            actions: plan.actions.clone(),
            proofs: plan.proofs.clone(),
            units: std::collections::BTreeMap::new(),
            mirror: purpose.mirror,
            forgotten: plan.forgotten.clone(),
        };
        for FileChange {
            path,
            before,
            after,
            units,
            ..
        } in &plan.files
        {
            transaction.files.push(Change {
                path: path.clone(),
                before: before.clone(),
                after: after.clone(),
                units: units.clone(),
            });
        }
        for (unit, asks) in units(plan) {
            let before = self.unit_before(&unit, asks).await?;
            transaction.units.insert(unit, before);
        }
        self.journal.check(&transaction)?;
        failpoint!(ApplyChecked);
        self.journal.record(&transaction)?;
        failpoint!(ApplyJournaled);
        if let Err(error) = self.write_files(&transaction) {
            let undone = self.undo(&transaction).await;
            let failure = format!("the files could not be written: {error}");
            return Err(ApplyError::Undone { failure, undone });
        }
        Ok(Some(transaction))
    }

    /// Tells the daemons of what was begun, and has them prove it.
    pub async fn complete(&self, mut transaction: Transaction) -> Result<Report, ApplyError> {
        match self.tell(&mut transaction).await {
            Ok(report) => {
                failpoint!(ApplyProved);
                transaction.proved = true;
                self.journal.record(&transaction)?;
                failpoint!(ApplyRecorded);
                self.finish(&transaction)?;
                Ok(report)
            }
            Err(failure) => {
                let undone = self.undo(&transaction).await;
                Err(ApplyError::Undone { failure, undone })
            }
        }
    }

    /// Ends what is proved. It can be done twice.
    pub(super) fn finish(&self, transaction: &Transaction) -> Result<(), ApplyError> {
        if !transaction.forgotten.is_empty() {
            let before = self.journal.originals()?;
            let kept = before.clone().after(transaction).folders;
            let made = before.folders.iter().chain(&transaction.folders);
            let gone: Vec<_> = made.filter(|one| !kept.contains(one)).collect();
            for folder in gone.into_iter().rev() {
                write::remove_folder(&self.path(folder))?;
            }
        }
        self.journal.keep(transaction)?;
        failpoint!(ApplyKept);
        Ok(self.journal.close()?)
    }

    pub(super) fn path(&self, path: &Path) -> PathBuf {
        write::under(self.root, path)
    }

    fn missing_folders(&self, plan: &Plan) -> Vec<PathBuf> {
        let mut folders = Vec::new();
        for change in &plan.files {
            // A file that is not there and never comes is there for a moment ([`bridge`]).
            if change.after == FileFacts::Absent && change.before != FileFacts::Absent {
                continue;
            }
            for folder in write::missing_folders(self.root, &change.path) {
                if !folders.contains(&folder) {
                    folders.push(folder);
                }
            }
        }
        folders
    }

    /// Has the daemons look at their new files, where they can.
    async fn check(&self, files: &[FileChange]) -> Result<(), ApplyError> {
        let staged = self.journal.folder().join("staged");
        for change in files {
            if let Some(check) = &change.check {
                write::put(&staged, &change.after)?;
                let checked = self.system.check(check, &staged).await;
                write::remove(&staged)?;
                checked.map_err(|source| ApplyError::Refused {
                    path: change.path.clone(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    async fn unit_before(&self, unit: &str, asks: bool) -> Result<UnitBefore, ApplyError> {
        let facts = self.system.unit(unit).await?;
        let mirrors = if asks && facts.active_state == "active" {
            // One that does not answer has no say in what it is taken back to.
            self.system.docker_mirrors(unit).await.ok()
        } else {
            None
        };
        Ok(UnitBefore {
            active_state: facts.active_state,
            main_pid: facts.main_pid,
            mirrors,
        })
    }

    fn write_files(&self, transaction: &Transaction) -> Result<(), ApplyError> {
        for folder in &transaction.folders {
            write::make_folder(&self.path(folder))?;
        }
        failpoint!(ApplyFoldersMade);
        // All that can be short of room or right is found before the first file has changed.
        let mut staged = Vec::new();
        for Change { path, after, .. } in &transaction.files {
            let path = self.path(path);
            staged.push(match after {
                FileFacts::Absent => Err(path),
                after => Ok(Staged::new(&path, after)?),
            });
        }
        failpoint!(ApplyStaged);
        for (staged, Change { path, before, .. }) in staged.into_iter().zip(&transaction.files) {
            // Since it was looked at, daemons were asked: time enough for somebody else to write.
            if !write::same(&write::read(&self.path(path))?, before) {
                return Err(ApplyError::Stale(path.clone()));
            }
            match staged {
                Ok(staged) => staged.publish()?,
                Err(path) => write::remove(&path)?,
            }
            failpoint!(ApplyFileWritten);
        }
        Ok(())
    }

    /// Jobs and proofs; `Err` says what fell short.
    async fn tell(&self, transaction: &mut Transaction) -> Result<Report, String> {
        let mut report = Report {
            files: transaction.files.clone(),
            ..Report::default()
        };
        let mut idle = Vec::new();
        let down = self.system.is_shutting_down().await;
        for (unit, before) in &transaction.units {
            let now = self.system.unit(unit).await.map_err(|e| e.to_string())?;
            if down {
                report.notes.push(format!(
                    "the host is shutting down: {unit} reads its configuration at the next boot"
                ));
                idle.push(unit.clone());
            } else if is_idle(before, &now) {
                report.notes.push(format!(
                    "{unit} is {}: it reads its configuration when it starts",
                    now.active_state
                ));
                idle.push(unit.clone());
            }
        }
        transaction.told = true;
        self.journal
            .record(transaction)
            .map_err(|error| error.to_string())?;
        failpoint!(ApplyActing);
        let proofs = transaction.proofs.iter().cloned();
        let proofs: Vec<Proof> = proofs
            .filter(|proof| !idle.iter().any(|unit| unit == unit_of(proof)))
            .collect();
        let moves: Vec<bridge::Move<'_>> = transaction
            .files
            .iter()
            .map(|change| (change.path.as_path(), &change.before, &change.after))
            .collect();
        self.bridge(&moves, &proofs).await?;
        for action in &transaction.actions {
            if idle.contains(&action.unit) {
                continue;
            }
            let ran = self.system.run(action, self.deadlines.job).await;
            ran.map_err(|error| format!("{}: {error}", action.unit))?;
            failpoint!(ApplyJobDone);
            report.jobs.push(action.clone());
        }
        verify::prove(&proofs, self.system, self.deadlines.proof).await?;
        report.proved = proofs;
        Ok(report)
    }

    /// Has docker's daemons let go of mirrors that their file does not speak of any more.
    pub(super) async fn bridge(
        &self,
        moves: &[bridge::Move<'_>],
        goals: &[Proof],
    ) -> Result<(), String> {
        let mut all = Vec::new();
        let mut goal: Option<&[String]> = None;
        for proof in goals {
            let Proof::DockerMirrors { unit, mirrors } = proof else {
                continue;
            };
            let has = self.system.docker_mirrors(unit).await;
            if has.is_ok_and(|has| verify::equal(&has, mirrors)) {
                continue;
            }
            // Two daemons that want different mirrors of one file have none of them by it.
            goal = match goal {
                Some(other) if !verify::equal(other, mirrors) => Some(&[]),
                _ => Some(mirrors),
            };
            all.push(unit);
        }
        let bridges = bridge::bridges(moves, goal.unwrap_or_default());
        if all.is_empty() || bridges.is_empty() {
            return Ok(());
        }
        for (path, facts) in &bridges {
            write::put(&self.path(path), facts).map_err(|error| error.to_string())?;
        }
        let mut told = Ok(());
        for unit in all {
            let action = UnitAction {
                unit: unit.clone(),
                verb: Verb::Reload,
                why: "the daemon keeps its mirrors when its file does not name any".to_owned(),
            };
            if let Err(error) = self.system.run(&action, self.deadlines.job).await {
                told = Err(format!("{unit}: {error}"));
            }
        }
        if told.is_ok() {
            told = verify::prove(goals, self.system, self.deadlines.proof).await;
        }
        failpoint!(ApplyBridged);
        // Whatever became of it: this is what is to be there.
        for (path, _) in &bridges {
            let to = moves.iter().find(|(moved, ..)| moved == path);
            if let Some((_, _, to)) = to {
                write::put(&self.path(path), to).map_err(|error| error.to_string())?;
            }
        }
        told
    }
}

/// The units that a plan has to do with, and whether their daemons are asked for mirrors.
fn units(plan: &Plan) -> Vec<(String, bool)> {
    let mut units: Vec<(String, bool)> = Vec::new();
    let asked = plan
        .proofs
        .iter()
        .map(|proof| (unit_of(proof), matches!(proof, Proof::DockerMirrors { .. })));
    let told = plan
        .actions
        .iter()
        .map(|action| (action.unit.as_str(), false));
    for (unit, asks) in asked.chain(told) {
        match units.iter_mut().find(|(known, _)| known == unit) {
            Some((_, known)) => *known |= asks,
            None => units.push((unit.to_owned(), asks)),
        }
    }
    units
}

/// The unit that a proof is of.
fn unit_of(proof: &Proof) -> &str {
    match proof {
        Proof::DockerMirrors { unit, .. } | Proof::Active { unit } => unit,
    }
}

/// Whether a unit does not run, and that is none of our doing.
fn is_idle(before: &UnitBefore, now: &UnitFacts) -> bool {
    match now.active_state.as_str() {
        "inactive" => before.active_state != "active",
        "failed" => before.active_state == "failed",
        // It is being started, which may take a docker with many containers minutes: to start it
        // anew would begin that again, for as long as anybody waits. One that failed and is to be
        // tried again is another.
        "activating" => now.sub_state != "auto-restart",
        _ => false,
    }
}
