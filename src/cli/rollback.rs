//! `registry-agent rollback`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use super::apply::{open, recover};
use super::{fail, print};
use crate::config::Restart;
use crate::host::apply::{Apply, Deadlines, Purpose};
use crate::host::journal::Journal;
use crate::host::plan::{Plan, Wanted};
use crate::host::watch::Host;
use crate::host::{rollback, write};

/// Takes this host back to what it was before its engines were first wired. Exit code 0: it is; 1:
/// anything else.
pub async fn rollback<H: Host>(
    host: &H,
    restart: Restart,
    show: impl FnOnce(&Plan) -> String,
) -> ExitCode {
    match take_back(host, restart, "rollback", show).await {
        Ok(said) => print(&said),
        Err(error) => fail(&error, 1),
    }
}

/// The same for another verb, with what there is to say of it.
pub(super) async fn take_back<H: Host>(
    host: &H,
    restart: Restart,
    verb: &str,
    show: impl FnOnce(&Plan) -> String,
) -> Result<String, String> {
    let root = Path::new("/");
    let (journal, _lock) = open(root, verb).map_err(|error| error.to_string())?;
    let apply = Apply {
        root,
        journal: &journal,
        system: host.system(),
        deadlines: Deadlines::default(),
    };
    recover(&apply).await.map_err(|error| error.to_string())?;
    back(host, &apply, &journal, restart, show).await
}

async fn back<H: Host>(
    host: &H,
    apply: &Apply<'_, H::System>,
    journal: &Journal,
    restart: Restart,
    show: impl FnOnce(&Plan) -> String,
) -> Result<String, String> {
    let originals = journal.originals().map_err(|e| e.to_string())?;
    if originals.files.is_empty() {
        return Ok("nothing to take back: no file of this host was ever changed\n".to_owned());
    }
    let mut now = BTreeMap::new();
    for path in originals.files.keys() {
        let facts = write::read(&write::under(apply.root, path)).map_err(|e| e.to_string())?;
        now.insert(path.clone(), facts);
    }
    let withdrawn = host.plan(Wanted::Withdrawn).await?;
    let plan = rollback::plan(&originals, &now, &withdrawn, restart == Restart::IfNeeded);
    print(&show(&plan));
    let purpose = Purpose {
        mirror: None,
        forgets: true,
    };
    let report = apply.apply(&plan, purpose).await;
    let report = report.map_err(|e| e.to_string())?;
    let mut said = report.to_string();
    for note in &plan.notes {
        said = format!("{said}note: {note}\n");
    }
    Ok(said)
}
