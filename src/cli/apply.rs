//! `registry-agent apply`.

use std::path::Path;
use std::process::ExitCode;

use super::{fail, print};
use crate::host::apply::{Apply, ApplyError, Deadlines, Purpose, Recovered, System};
use crate::host::journal::Journal;
use crate::host::lock::{Lock, LockError};
use crate::host::plan::{Plan, Wanted};
use crate::host::watch::{Host, Probe};

/// Wires this host's engines now, if the agent proves that the mirror serves. `show` makes a plan
/// readable. Exit code 0: done, or nothing to do; 1: anything else.
pub async fn apply<H: Host>(host: &H, show: impl FnOnce(&Plan) -> String) -> ExitCode {
    let root = Path::new("/");
    let (journal, _lock) = match open(root, "apply") {
        Ok(open) => open,
        Err(error) => return fail(&error, 1),
    };
    let apply = Apply {
        root,
        journal: &journal,
        system: host.system(),
        deadlines: Deadlines::default(),
    };
    // What is left is taken back whether or not the mirror serves.
    if let Err(error) = recover(&apply).await {
        return fail(&error, 1);
    }
    let mirror = host.terms().mirror;
    if let Probe::Fails(why) = host.serves().await {
        let error = format!(
            "{mirror} is not proved to serve, so no engine is told of it: {why}\nSee why: \
             `registry-agent status`, `journalctl --unit=registry-agent`."
        );
        return fail(&error, 1);
    }
    let plan = match host.plan(Wanted::Wired).await {
        Ok(plan) => plan,
        Err(error) => return fail(&error, 1),
    };
    print(&show(&plan));
    let purpose = Purpose {
        mirror: Some(mirror),
    };
    match apply.apply(&plan, purpose).await {
        Ok(_) if plan.is_empty() => print("nothing to do\n"),
        Ok(report) => print(&report.to_string()),
        Err(error) => fail(&error, 1),
    }
}

/// This host is not this process's to change.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// Nor any other's of this user.
    #[error("only root can change this host: `sudo registry-agent {0}`")]
    NotRoot(String),
    /// Somebody else is at it.
    #[error("{0}")]
    Held(LockError),
    /// The state folder can't be used.
    #[error("{0}")]
    State(String),
}

/// What is needed to change the host: root, the state folder, and that nobody else does.
pub(super) fn open(root: &Path, verb: &str) -> Result<(Journal, Lock), OpenError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(OpenError::NotRoot(verb.to_owned()));
    }
    let journal = Journal::open(&Journal::default_folder(root));
    let journal = journal.map_err(|error| OpenError::State(error.to_string()))?;
    let lock = Lock::take(journal.folder(), verb).map_err(|error| match error {
        held @ LockError::Held { .. } => OpenError::Held(held),
        error @ LockError::Io { .. } => OpenError::State(error.to_string()),
    })?;
    Ok((journal, lock))
}

/// Ends what a crash has left, and says so.
pub(super) async fn recover<S: System>(apply: &Apply<'_, S>) -> Result<(), ApplyError> {
    match apply.recover().await? {
        None => {}
        Some(Recovered::Finished) => {
            print("an earlier change, cut off after its proof, is ended\n");
        }
        Some(Recovered::Undone(undone)) => {
            print(&format!("an earlier change was cut off. {undone}\n"));
        }
    }
    Ok(())
}
