//! The way back to what this host was before the first change, by the journal alone: it works with a
//! configuration that can't be read, and for engines that are gone.

use std::collections::BTreeMap;

use super::apply::{Apply, System};
use super::facts::FileFacts;
use super::journal::JournalError;
use super::plan::{Plan, TakenFrom, dockers, take_back};
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
    let mut live = BTreeMap::new();
    for unit in dockers(&originals) {
        // One that does not answer has nothing to say.
        if let Ok(mirrors) = apply.system.docker_mirrors(&unit).await {
            live.insert(unit, mirrors);
        }
    }
    Ok(Some(take_back(TakenFrom {
        originals: &originals,
        now: &now,
        live: &live,
        restart,
    })))
}
