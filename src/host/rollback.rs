//! The way back to what this host was before the first change, as a plan like any other.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::facts::FileFacts;
use super::journal::{Original, Originals};
use super::plan::{FileChange, Plan, Proof, UnitAction, Verb};
use super::write::same;

/// What takes every file back to what it was. A file that somebody else has changed since is theirs:
/// from that, only what is ours is taken, as in `withdrawn`, the plan that withdraws the mirror
/// everywhere; the notes say so. `now` is what the files are.
pub fn plan(
    originals: &Originals,
    now: &BTreeMap<PathBuf, FileFacts>,
    withdrawn: &Plan,
    restart: bool,
) -> Plan {
    let mut plan = Plan::default();
    let mut verbs: BTreeMap<String, Verb> = BTreeMap::new();
    let mut all_restored = true;
    for (path, original) in &originals.files {
        let Original {
            before,
            made,
            edited,
            verbs: readers,
        } = original;
        let now = now.get(path).unwrap_or(&FileFacts::Absent);
        if same(now, before) {
            continue;
        }
        if *edited || !same(now, made) {
            all_restored = false;
            let shown = path.display();
            plan.notes.push(format!(
                "{shown} was changed by somebody else: only the mirror is taken out of it"
            ));
            let change = withdrawn.files.iter().find(|change| change.path == *path);
            plan.files.extend(change.cloned());
            continue;
        }
        plan.files.push(FileChange {
            path: path.clone(),
            before: now.clone(),
            after: before.clone(),
            why: "it was like this before the engines were wired".to_owned(),
            check: None,
            units: readers.keys().cloned().collect(),
        });
        for (unit, verb) in readers {
            let kept = verbs.entry(unit.clone()).or_insert(*verb);
            if *verb == Verb::Restart {
                *kept = Verb::Restart;
            }
        }
    }
    if !all_restored {
        plan.proofs.clone_from(&withdrawn.proofs);
        for action in &withdrawn.actions {
            verbs.entry(action.unit.clone()).or_insert(action.verb);
        }
    }
    for (unit, verb) in verbs {
        if verb == Verb::Restart && !restart {
            plan.notes.push(format!(
                "{unit} keeps what it was started with until it is restarted, which \
                 host.docker.restart does not allow: `systemctl restart {unit}` when it suits"
            ));
            plan.proofs.retain(|proof| !is_of(proof, &unit));
            continue;
        }
        if all_restored {
            let before = originals.units.get(&unit);
            let mirrors = before.and_then(|before| before.mirrors.clone());
            let proof = mirrors.map(|mirrors| Proof::DockerMirrors {
                unit: unit.clone(),
                mirrors,
            });
            // A daemon that did not run then has what it would have without us.
            let mut withdrawn = withdrawn.proofs.iter();
            let withdrawn = || withdrawn.find(|proof| is_of(proof, &unit)).cloned();
            plan.proofs.extend(proof.or_else(withdrawn));
        }
        plan.actions.push(UnitAction {
            unit,
            verb,
            why: "its files are what they were before the engines were wired".to_owned(),
        });
    }
    plan
}

fn is_of(proof: &Proof, wanted: &str) -> bool {
    match proof {
        Proof::DockerMirrors { unit, .. } | Proof::Active { unit } => unit == wanted,
    }
}
