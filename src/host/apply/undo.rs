//! A change, taken back: files first, then the daemons.

use std::fmt;
use std::path::PathBuf;

use super::bridge::{self, Move};
use super::{Apply, ApplyError, System, unit_of};
use crate::failpoint::failpoint;
use crate::host::facts::FileFacts;
use crate::host::journal::{Change, Transaction, UnitBefore, strongest};
use crate::host::plan::{Proof, UnitAction, Verb, mirrors_in};
use crate::host::verify;
use crate::host::write::{self, WriteError};

/// What was done to take a change back, and what this host is like now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Undone {
    /// Files that are again what they were.
    pub restored: Vec<PathBuf>,
    /// What the daemons are like now.
    pub daemons: Vec<String>,
    /// What is not as it was, and what to do about it. Empty is all well.
    pub problems: Vec<String>,
    /// Whether a file could not be restored, or the journal not be closed, which is tried again.
    pub unfinished: bool,
}

/// What was found at the start, and what was done about it.
#[derive(Debug)]
pub enum Recovered {
    /// A change was proved, and is ended now.
    Finished,
    /// A change was taken back.
    Undone(Undone),
}

/// What became of one file.
enum Restored {
    /// It is again what it was.
    Now,
    /// It was never changed, or is restored already.
    AsItWas,
    /// Somebody else has changed it, and it is left to them.
    Theirs,
}

impl<S: System> Apply<'_, S> {
    /// Ends or takes back what a crash has left, or an earlier [`Apply::undo`] that failed. While
    /// files can't be put back, daemons are not told of them again: this may be tried often.
    pub async fn recover(&self) -> Result<Option<Recovered>, ApplyError> {
        let Some(transaction) = self.journal.transaction()? else {
            return Ok(None);
        };
        if transaction.proved {
            self.finish(&transaction)?;
            return Ok(Some(Recovered::Finished));
        }
        let undone = self.undo_files(&transaction);
        if undone.unfinished {
            return Err(self.unrecovered(&undone));
        }
        write::check_writable(&self.journal.transaction_file())?;
        let undone = self.undo_rest(&transaction, undone).await;
        if undone.unfinished {
            return Err(self.unrecovered(&undone));
        }
        Ok(Some(Recovered::Undone(undone)))
    }

    /// Takes back the files of what a crash has left, before any daemon reads them, and tells
    /// nobody: what is left to do is for [`Apply::recover`].
    pub fn recover_files(&self) -> Result<bool, ApplyError> {
        let Some(transaction) = self.journal.transaction()? else {
            return Ok(false);
        };
        if transaction.proved {
            self.finish(&transaction)?;
            return Ok(false);
        }
        let undone = self.undo_files(&transaction);
        for problem in &undone.problems {
            tracing::error!("taking back a change that was not ended: {problem}");
        }
        Ok(true)
    }

    fn unrecovered(&self, undone: &Undone) -> ApplyError {
        ApplyError::Unrecovered {
            journal: self.journal.transaction_file(),
            problems: undone.problems.join("; "),
        }
    }

    /// Takes a change back. It can be done twice.
    pub async fn undo(&self, transaction: &Transaction) -> Undone {
        let undone = self.undo_files(transaction);
        self.undo_rest(transaction, undone).await
    }

    /// What is left to do once the files are what they were.
    async fn undo_rest(&self, transaction: &Transaction, mut undone: Undone) -> Undone {
        failpoint!(UndoFilesWritten);
        // What could not be restored is for [`Apply::recover`] to try again. What somebody else has
        // changed meanwhile is theirs: to wait for it would keep every later change out.
        let restored = !undone.unfinished;
        self.undo_daemons(transaction, &mut undone).await;
        failpoint!(UndoProved);
        if restored && let Err(error) = self.journal.close() {
            undone.unfinished = true;
            undone.problems.push(error.to_string());
        }
        undone
    }

    fn undo_files(&self, transaction: &Transaction) -> Undone {
        let mut undone = Undone::default();
        for change in transaction.files.iter().rev() {
            match self.restore(transaction, change) {
                Ok(Restored::Now) => undone.restored.push(change.path.clone()),
                Ok(Restored::AsItWas) => {}
                Ok(Restored::Theirs) => undone.problems.push(format!(
                    "{} was changed by somebody else in the meantime and is left as it is: look at \
                     it, and plan again",
                    change.path.display()
                )),
                Err(error) => {
                    undone.unfinished = true;
                    undone.problems.push(error.to_string());
                }
            }
            failpoint!(UndoFileWritten);
        }
        for folder in transaction.folders.iter().rev() {
            if let Err(error) = write::remove_folder(&self.path(folder)) {
                undone.problems.push(error.to_string());
            }
        }
        undone
    }

    /// Makes the file what it was.
    fn restore(&self, transaction: &Transaction, change: &Change) -> Result<Restored, WriteError> {
        let Change {
            path,
            before,
            after,
            ..
        } = change;
        let path = self.path(path);
        write::remove_leftover(&path)?;
        let now = write::read(&path)?;
        if write::same(&now, before) {
            return Ok(Restored::AsItWas);
        }
        if !write::same(&now, after) && !is_bridge(transaction, change, &now) {
            return Ok(Restored::Theirs);
        }
        write::put(&path, before)?;
        Ok(Restored::Now)
    }

    async fn undo_daemons(&self, transaction: &Transaction, undone: &mut Undone) {
        if self.system.is_shutting_down().await {
            return;
        }
        let verbs = strongest(&transaction.actions);
        for (unit, before) in &transaction.units {
            let told = match verbs.get(unit) {
                Some(verb) if transaction.told => Some(*verb),
                _ => None,
            };
            if let Err(problem) = self.undo_daemon(transaction, unit, before, told).await {
                undone.problems.push(problem);
            }
            undone.daemons.push(self.daemon_now(unit).await);
        }
    }

    async fn undo_daemon(
        &self,
        transaction: &Transaction,
        unit: &str,
        before: &UnitBefore,
        told: Option<Verb>,
    ) -> Result<(), String> {
        let now = self.system.unit(unit).await.map_err(|e| e.to_string())?;
        if super::is_idle(before, &now) {
            return Ok(());
        }
        let asked = transaction
            .proofs
            .iter()
            .any(|proof| matches!(proof, Proof::DockerMirrors { .. }) && unit_of(proof) == unit);
        // While it reloads it runs.
        let active = matches!(
            now.active_state.as_str(),
            "active" | "reloading" | "refreshing"
        );
        // What a daemon that did not run, or did not answer, was to have is in its file alone, and
        // nothing that is said of it here would be known.
        let mirrors = before.mirrors.clone();
        let mut verb = told;
        if asked && active {
            let has = self.system.docker_mirrors(unit).await;
            let differs = match (&has, &mirrors) {
                (Ok(has), Some(mirrors)) => !verify::equal(has, mirrors),
                _ => true,
            };
            if differs {
                verb = verb.or(Some(Verb::Reload));
            }
        }
        if !active {
            verb = Some(Verb::Restart);
        } else if verb == Some(Verb::Restart) && now.main_pid == before.main_pid {
            // It was never restarted, and still has the arguments that it had.
            verb = Some(Verb::Reload);
        }
        let Some(verb) = verb else { return Ok(()) };
        // What its file says it has, once it has read that again: it may never have read it before.
        let own = transaction.files.iter();
        let mut own = own.filter(|change| change.units.iter().any(|one| one == unit));
        let restored = own.find_map(|change| mirrors_in(&change.before));
        let mirrors = mirrors.map(|has| restored.unwrap_or(has));
        let goal: Vec<Proof> = asked
            .then(|| Proof::DockerMirrors {
                unit: unit.to_owned(),
                mirrors: mirrors.clone().unwrap_or_default(),
            })
            .into_iter()
            .collect();
        let mut failure = None;
        // A unit in start-limit-hit takes no job at all.
        self.reset(unit).await;
        if active && verb == Verb::Reload {
            let moves: Vec<Move<'_>> = transaction
                .files
                .iter()
                // Not a file that somebody else has changed meanwhile.
                .filter(|change| {
                    let now = write::read(&self.path(&change.path));
                    now.is_ok_and(|now| write::same(&now, &change.before))
                })
                .map(|change| (change.path.as_path(), &change.after, &change.before))
                .collect();
            failure = self.bridge(&moves, &goal).await.err();
        }
        if let Err(error) = self.job(unit, verb).await {
            failure = Some(error);
        }
        failpoint!(UndoJobDone);
        let runs = [Proof::Active {
            unit: unit.to_owned(),
        }];
        let proof = self.deadlines.proof;
        if verify::prove(&runs, self.system, proof).await.is_err() {
            self.reset(unit).await;
            if let Err(error) = self.job(unit, Verb::Restart).await {
                failure = Some(error);
            }
        }
        let mut proved = verify::prove(&runs, self.system, proof).await;
        if proved.is_ok() && mirrors.is_some() {
            proved = verify::prove(&goal, self.system, proof).await;
        }
        proved.map_err(|why| {
            let failure = failure.map(|failure| format!(" ({failure})")).unwrap_or_default();
            format!(
                "{why}, with the files that it had before{failure}. `journalctl --unit={unit}` says \
                 why; `systemctl reset-failed {unit}` and `systemctl start {unit}` try again"
            )
        })
    }

    async fn reset(&self, unit: &str) {
        if let Err(error) = self.system.reset_failed(unit).await {
            // The job after it says whether that matters.
            tracing::warn!(unit, "{error}");
        }
    }

    async fn job(&self, unit: &str, verb: Verb) -> Result<(), String> {
        let action = UnitAction {
            unit: unit.to_owned(),
            verb,
            why: "its files are what they were before".to_owned(),
        };
        let ran = self.system.run(&action, self.deadlines.job).await;
        ran.map_err(|error| error.to_string())
    }

    async fn daemon_now(&self, unit: &str) -> String {
        let state = match self.system.unit(unit).await {
            Ok(now) => format!("{unit} is {} ({})", now.active_state, now.sub_state),
            Err(error) => return format!("{unit} can't be looked at: {error}"),
        };
        match self.system.docker_mirrors(unit).await {
            Ok(mirrors) => format!("{state}, with {}", verify::list(&mirrors)),
            Err(_) => state,
        }
    }
}

/// Whether this is what a file is for the moment in which a daemon lets go of its mirrors.
fn is_bridge(transaction: &Transaction, change: &Change, now: &FileFacts) -> bool {
    let Change {
        path,
        before,
        after,
        ..
    } = change;
    let proofs = transaction.proofs.iter().filter_map(|proof| match proof {
        Proof::DockerMirrors { mirrors, .. } => Some(mirrors.as_slice()),
        Proof::Active { .. } => None,
    });
    let befores = transaction.units.values();
    let befores = befores.filter_map(|unit| unit.mirrors.as_deref());
    let goals = proofs.chain(befores).chain([[].as_slice()]);
    let mut goals = goals.flat_map(|goal| {
        [(before, after), (after, before)]
            .into_iter()
            .flat_map(|(from, to)| bridge::bridges(&[(path.as_path(), from, to)], goal))
    });
    goals.any(|(_, bridge)| write::same(&bridge, now))
}

impl fmt::Display for Undone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.problems.is_empty() && self.restored.is_empty() {
            write!(f, "No file is changed.")?;
        } else if self.problems.is_empty() {
            write!(f, "All of it was taken back.")?;
        } else {
            write!(f, "It was taken back, but not all is as it was:")?;
        }
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        for path in &self.restored {
            write!(f, "\n  restored: {}", path.display())?;
        }
        for daemon in &self.daemons {
            write!(f, "\n  now: {daemon}")?;
        }
        Ok(())
    }
}
