//! Who has to be told that a file is without the mirror, and what is known of it only then: a file
//! is never done with while its daemon still has what is ours.

use std::collections::{BTreeMap, BTreeSet};

use super::super::context::same_address;
use super::super::{FileChange, Plan, Proof, Verb};
use super::{Daemon, Host, Kind, Ours, Step};
use crate::host::journal::stronger;
use crate::host::write::same;

pub(super) struct Jobs<'a> {
    pub host: Host<'a>,
    /// The units of docker daemons whose `daemon.json` is among the files.
    pub by_file: BTreeSet<String>,
    /// The mirrors that docker is to have, by its units.
    pub goals: BTreeMap<String, Vec<String>>,
    pub verbs: BTreeMap<String, Verb>,
    pub plan: Plan,
}

impl Jobs<'_> {
    /// Plans for a file and its readers, or says why it can't be done with yet.
    pub fn take(&mut self, step: Step<'_>) {
        let changes = !same(&step.now, &step.after);
        let mut needed = changes;
        let mut kept = false;
        for (unit, then) in &step.ours.original.verbs {
            let ours = self.remembered(unit, &step);
            if !changes && self.is_silent(unit, &step) {
                self.refuse_silent(unit, &step);
                return;
            }
            needed |= ours;
            if !changes && !ours {
                continue;
            }
            match step.kind.map_or(Some(*then), |kind| kind.verb(*then)) {
                Some(Verb::Restart) if !self.host.restart => {
                    kept |= self.without_restart(unit, &step, ours, changes);
                }
                Some(verb) => self.tell(unit, verb),
                None => {}
            }
        }
        if !kept {
            self.plan.forgotten.insert(step.path.to_owned());
        }
        if !needed || (kept && !changes) {
            return;
        }
        let why = if changes {
            step.why
        } else {
            "its daemon still has the mirror from before".to_owned()
        };
        self.plan.files.push(FileChange {
            path: step.path.to_owned(),
            before: step.now,
            after: step.after,
            why,
            check: None,
            units: step.ours.original.verbs.keys().cloned().collect(),
        });
    }

    /// The plan, with a job and a proof for each unit.
    pub fn plan(mut self) -> Plan {
        for (unit, verb) in self.verbs {
            self.plan.proofs.push(match self.goals.remove(&unit) {
                Some(mirrors) => Proof::DockerMirrors {
                    unit: unit.clone(),
                    mirrors,
                },
                None => Proof::Active { unit: unit.clone() },
            });
            self.plan
                .act(&unit, verb, "its files are without the mirror");
        }
        self.plan
    }

    fn tell(&mut self, unit: &str, verb: Verb) {
        let kept = self.verbs.entry(unit.to_owned()).or_insert(verb);
        *kept = stronger(*kept, verb);
    }

    /// Whether this docker has a mirror of ours that it is not to have, and this file is what it may
    /// have it from.
    fn remembered(&self, unit: &str, step: &Step<'_>) -> bool {
        self.answers_for(unit, step)
            && matches!(self.host.daemons.get(unit), Some(Daemon::Has(has))
                if has.iter().any(|one| self.is_stale(unit, &step.ours, one)))
    }

    fn is_stale(&self, unit: &str, ours: &Ours<'_>, one: &str) -> bool {
        let goal = self.goals.get(unit);
        let mut goal = goal.into_iter().flatten();
        ours.is_told(one) && !goal.any(|theirs| same_address(theirs, one))
    }

    fn is_silent(&self, unit: &str, step: &Step<'_>) -> bool {
        self.answers_for(unit, step) && self.host.daemons.get(unit) == Some(&Daemon::Silent)
    }

    fn answers_for(&self, unit: &str, step: &Step<'_>) -> bool {
        match step.kind {
            Some(Kind::DaemonJson) => true,
            // Of flags that docker may have been started with, its own file is the better judge.
            Some(Kind::DockerFlags) => !self.by_file.contains(unit),
            _ => false,
        }
    }

    fn refuse_silent(&mut self, unit: &str, step: &Step<'_>) {
        let mirrors = step.ours.said();
        self.plan.refuse(
            step.path.display().to_string(),
            format!(
                "{mirrors} is not in it, and {unit} runs and does not say which mirrors it has: it \
                 may have read it before"
            ),
            format!(
                "`journalctl --unit={unit}` says why; once it answers on its Unix socket, or is \
                 stopped, `registry-agent rollback` once more"
            ),
        );
    }

    /// A unit that only a restart could tell, which is not allowed. Whether the file has to be known
    /// for longer.
    fn without_restart(&mut self, unit: &str, step: &Step<'_>, ours: bool, changes: bool) -> bool {
        let daemon = self.host.daemons.get(unit).unwrap_or(&Daemon::Idle);
        let keeps = match (step.kind, daemon) {
            (_, Daemon::Idle) => return false,
            (Some(Kind::DaemonJson), _) => {
                self.tell(unit, Verb::Reload);
                self.plan.note(format!(
                    "{unit} is reloaded, which is enough for its mirrors: what else of {} is read \
                     at a start only takes effect at the next one",
                    step.path.display()
                ));
                return false;
            }
            (Some(Kind::DockerFlags), Daemon::Has(_)) => ours,
            // Whether it was restarted since the file was changed is not known of these.
            (Some(Kind::DockerFlags | Kind::BuildkitToml), _) => true,
            // Where it looks, there is no mirror any more.
            _ => {
                self.plan.note(format!(
                    "{unit} keeps what it was started with until it is restarted, which \
                     host.docker.restart does not allow: `systemctl restart {unit}` when it suits"
                ));
                return false;
            }
        };
        // A file that names no mirror any more, and a daemon that can't be asked.
        if !keeps || (!changes && *daemon == Daemon::Silent) {
            return false;
        }
        let mirrors = step.ours.said();
        self.plan.refuse(
            unit.to_owned(),
            format!(
                "it has {mirrors} by {}, which it reads only when it starts, until it is restarted, \
                 which `host.docker.restart: never` forbids",
                step.path.display()
            ),
            format!(
                "`systemctl restart {unit}` when it suits, or say `host.docker.restart: if-needed`; \
                 then `registry-agent rollback` once more"
            ),
        );
        true
    }
}
