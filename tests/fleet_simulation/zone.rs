//! The name and the target group, as strict as the real ones.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use registry_agent::fleet::facts::{InstanceId, Record, TargetState};

/// A Route 53 zone with one name: changes are committed at once, and answered later.
#[derive(Debug, Default)]
pub struct Zone {
    /// What a listing shows.
    pub records: Vec<Record>,
    /// What the servers answer: whose records.
    pub served: BTreeSet<InstanceId>,
    /// When each instance's last change is everywhere.
    pub synced: BTreeMap<InstanceId, Duration>,
}

/// What the servers are told, some seconds after a change.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    Add(InstanceId),
    Remove(InstanceId),
}

impl Zone {
    /// An UPSERT of all of an owner's records.
    pub fn upsert(&mut self, records: &[Record]) -> Change {
        let owner = records[0].owner("mirrors").expect("an own record");
        for record in records {
            assert_eq!(
                record.owner("mirrors").as_ref(),
                Some(&owner),
                "one owner's records"
            );
            self.records
                .retain(|old| old.identifier != record.identifier);
            self.records.push(record.clone());
        }
        Change::Add(owner)
    }

    /// An exact DELETE: `InvalidChangeBatch`, and no change, if there is none exactly like it.
    pub fn delete(&mut self, record: &Record) -> Option<Change> {
        let at = self.records.iter().position(|old| old == record)?;
        self.records.swap_remove(at);
        Some(Change::Remove(
            record.owner("mirrors").expect("one of ours"),
        ))
    }

    pub fn serve(&mut self, change: &Change) {
        match change {
            Change::Add(id) => {
                self.served.insert(id.clone());
            }
            // Only if it was not added again: changes of one zone are served in their order.
            Change::Remove(id) => {
                self.served.remove(id);
            }
        }
    }
}

/// A target group.
#[derive(Debug, Default)]
pub struct Targets {
    pub targets: BTreeMap<InstanceId, (TargetState, Duration)>,
}

/// How long the load balancer checks a new target.
const INITIAL: Duration = Duration::from_secs(25);
/// The deregistration delay.
const DELAY: Duration = Duration::from_mins(1);

impl Targets {
    pub fn register(&mut self, id: &InstanceId, now: Duration) {
        let state = self.targets.get(id).map(|(state, _)| *state);
        if matches!(state, None | Some(TargetState::Draining)) {
            self.targets.insert(id.clone(), (TargetState::Initial, now));
        }
    }

    pub fn deregister(&mut self, id: &InstanceId, now: Duration) {
        if let Some((state, since)) = self.targets.get_mut(id)
            && *state != TargetState::Draining
        {
            (*state, *since) = (TargetState::Draining, now);
        }
    }

    pub fn is(&mut self, id: &InstanceId, now: Duration, ready: bool) -> Option<TargetState> {
        let (state, since) = self.targets.get_mut(id)?;
        match *state {
            TargetState::Draining if now >= *since + DELAY => {
                self.targets.remove(id);
                return None;
            }
            TargetState::Draining => {}
            TargetState::Initial if now < *since + INITIAL => {}
            _ if ready => *state = TargetState::Healthy,
            _ => *state = TargetState::Unhealthy,
        }
        Some(*state)
    }
}
