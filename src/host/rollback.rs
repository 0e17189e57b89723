//! The way back to what this host was before the first change, by the journal alone: it works with a
//! configuration that can't be read, and for engines that are gone.

use std::collections::BTreeMap;

use super::apply::{Apply, System};
use super::facts::FileFacts;
use super::journal::JournalError;
use super::plan::{Daemon, Plan, TakenFrom, readers, take_back};
use super::write;

/// The plan that takes back all that was ever changed; nothing where that is nothing. `restart` is
/// whether it may restart units. It is for [`Apply::apply_each`]: what can't be taken back is in its
/// refusals, and stays in the journal.
pub async fn plan<S: System>(
    apply: &Apply<'_, S>,
    restart: bool,
) -> Result<Option<Plan>, JournalError> {
    let originals = apply.journal.originals()?;
    if originals.is_empty() {
        return Ok(None);
    }
    let mut now = BTreeMap::new();
    for path in originals.files.keys() {
        let facts = write::read(&write::under(apply.root, path));
        // One that can't be read keeps no other from being taken back.
        let facts = facts.unwrap_or_else(|error| FileFacts::Unreadable(error.to_string()));
        now.insert(path.clone(), facts);
    }
    let mut daemons = BTreeMap::new();
    for (unit, docker) in readers(&originals) {
        let daemon = daemon(apply.system, &unit, docker).await;
        daemons.insert(unit, daemon);
    }
    Ok(Some(take_back(TakenFrom {
        originals: &originals,
        now: &now,
        daemons: &daemons,
        restart,
    })))
}

async fn daemon(system: &impl System, unit: &str, docker: bool) -> Daemon {
    if docker && let Ok(mirrors) = system.docker_mirrors(unit).await {
        return Daemon::Has(mirrors);
    }
    match system.unit(unit).await {
        Ok(unit) => Daemon::of(&unit),
        Err(_) => Daemon::Silent,
    }
}
