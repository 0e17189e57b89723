//! `registry-agent rollback`.

use std::path::Path;
use std::process::ExitCode;

use super::apply::{open, recover};
use super::{fail, print};
use crate::config::Restart;
use crate::host::apply::{Apply, Deadlines, Purpose, System};
use crate::host::plan::Plan;
use crate::host::rollback;

/// What was taken back, and what was not.
#[derive(Debug, Default)]
pub(super) struct TakenBack {
    /// What was done, for people.
    pub said: String,
    /// What could not be done now; what it is about is as it was.
    pub failures: Vec<String>,
    /// What is not safe to do, with what a person can do about it.
    pub left: Vec<String>,
}

/// Takes this host back to what it was before its engines were first wired. Exit code 0: it is; 1:
/// anything else, and then what could be taken back is.
pub async fn rollback<S: System>(
    system: &S,
    restart: Restart,
    show: impl FnOnce(&Plan) -> String,
) -> ExitCode {
    let back = match take_back(system, restart, "rollback", show).await {
        Ok(back) => back,
        Err(error) => return fail(&error, 1),
    };
    print(&back.said);
    let undone: Vec<String> = back.failures.into_iter().chain(back.left).collect();
    if undone.is_empty() {
        return ExitCode::SUCCESS;
    }
    let undone = undone.join("\n");
    fail(&format!("not all could be taken back:\n{undone}"), 1)
}

/// The same for another verb, with what there is to say of it.
pub(super) async fn take_back<S: System>(
    system: &S,
    restart: Restart,
    verb: &str,
    show: impl FnOnce(&Plan) -> String,
) -> Result<TakenBack, String> {
    let root = Path::new("/");
    let (journal, _lock) = open(root, verb).map_err(|error| error.to_string())?;
    let apply = Apply {
        root,
        journal: &journal,
        system,
        deadlines: Deadlines::default(),
    };
    recover(&apply).await.map_err(|error| error.to_string())?;
    let plan = rollback::plan(&apply, restart == Restart::IfNeeded).await;
    let Some(plan) = plan.map_err(|error| error.to_string())? else {
        let said = "nothing to take back: no file of this host was ever changed\n".to_owned();
        return Ok(TakenBack {
            said,
            ..TakenBack::default()
        });
    };
    print(&show(&plan));
    let done = apply.apply_each(&plan, &Purpose::default()).await;
    let said = done.report.to_string();
    let refusals = plan.refusals.iter();
    let left = refusals.map(|one| format!("{}: {}. To do: {}", one.subject, one.why, one.remedy));
    Ok(TakenBack {
        said,
        failures: done.failures,
        left: left.collect(),
    })
}
