//! What has to be done for this host's place in the fleet, as data.
//!
//! [`plan`] is pure: it sees nothing but its arguments, and gives the same plan for the same ones,
//! jitter included. This file is the table of states; what is done in them is in the rooms.
//!
//! | state | when | does | room |
//! | --- | --- | --- | --- |
//! | Off | nothing is configured | nothing | |
//! | Boot | the group was not seen yet, or the instance is `Pending` | looks | |
//! | Outside | the group does not have it | attaches it, where that is configured; not advertised if it was detached | `capacity` |
//! | `PendingWait` | a launching hook holds it | warms up, heartbeats; ready: registers, is seen there, `CONTINUE`; can't become ready: `ABANDON`, if the churn guard allows | `join`, `hook` |
//! | Registering, Serving, Suspect | in service | collects garbage | `garbage` |
//! | Registering | not ready, or not seen in DNS or the target group | its own record and target | `advertise` |
//! | Serving | seen there | puts drift right, looks after n | `advertise`, `capacity` |
//! | Suspect | something is fatal | its record away unless it is the last that serves; asks for its replacement if the guard allows | `guard` |
//! | Drain | told to go, by anybody | record and target away, waits until resolvers and connections let go, lets answers end, `CONTINUE` | `leave`, `hook` |
//! | Standby, Warmed | the group's word, or it detaches | not advertised, running | `advertise` |
//! | Unknown | a state of a later version of the group | nothing | |

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::turn::Turn;
use super::facts::{Facts, LifecycleState, Record};
use super::memory::Memory;
use crate::config::FleetSettings;

mod advertise;
mod capacity;
mod garbage;
mod guard;
mod hook;
mod join;
mod leave;
#[cfg(test)]
mod tests;
mod turn;

/// What has to be done now, and what has to be looked at when.
///
/// `memory.kept` is on the disk before the first step is taken, if it differs from what was there.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where the instance is.
    pub state: State,
    /// What is done now, in this order, each attempted once. What fails is seen to be missing.
    pub steps: Vec<Step>,
    /// What is looked at, and when; what is due now is looked at after the steps.
    pub looks: BTreeMap<Look, Duration>,
    /// When the next plan is made if nothing that was seen changes before.
    pub next: Duration,
    /// What a person should know.
    pub notes: Vec<String>,
    /// The guard has kept this instance from asking to be replaced.
    pub refused: bool,
    /// For the next plan.
    pub memory: Memory,
}

/// Where an instance is; see the table above.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the table at the top says it")]
pub enum State {
    Off,
    Boot,
    Outside,
    PendingWait,
    Registering,
    Serving,
    Suspect,
    Drain,
    Standby,
    Warmed,
    Unknown,
}

impl State {
    /// Its name, as `status` and the metrics have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Boot => "boot",
            Self::Outside => "outside",
            Self::PendingWait => "pending_wait",
            Self::Registering => "registering",
            Self::Serving => "serving",
            Self::Suspect => "suspect",
            Self::Drain => "drain",
            Self::Standby => "standby",
            Self::Warmed => "warmed",
            Self::Unknown => "unknown",
        }
    }
}

/// Something to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What.
    pub action: Action,
    /// Why, in a sentence.
    pub why: String,
}

/// What can be done. Each is one call, but for [`Action::RefuseUploads`] and [`Action::LetGo`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// `RecordLifecycleActionHeartbeat` for this instance.
    Heartbeat {
        /// The hook.
        hook: String,
    },
    /// `CompleteLifecycleAction` for this instance. "No active Lifecycle Action" is no error.
    CompleteHook {
        /// The hook.
        hook: String,
        /// `ABANDON`, else `CONTINUE`.
        abandon: bool,
    },
    /// `SetInstanceHealth Unhealthy` for this instance, with `ShouldRespectGracePeriod`.
    AskForReplacement,
    /// `SetDesiredCapacity`.
    RaiseDesired {
        /// To so many.
        to: u32,
    },
    /// `AttachInstances` of this instance.
    Attach,
    /// `RegisterTargets`.
    RegisterTarget,
    /// `DeregisterTargets` of this instance; one that is absent is no error.
    DeregisterTarget,
    /// UPSERT, or an UPDATE that adds: these are then this instance's only records of the name.
    WriteOwnRecords {
        /// One for each family, or the one that leads to the load balancer.
        records: Vec<Record>,
    },
    /// An exact DELETE of one record set: if it is not exactly so any more, nothing is deleted, and
    /// that is no error.
    DeleteRecord {
        /// As it was seen.
        record: Record,
    },
    /// No new upload is begun from now on.
    RefuseUploads,
    /// The service may stop: nothing leads here any more.
    LetGo,
}

impl Action {
    /// The call, by the name that its API gives it, and what it is about, for people.
    pub fn describe(&self) -> String {
        let about = |call: &str, what: &dyn std::fmt::Display| format!("{call} {what}");
        match self {
            Self::Heartbeat { hook } => about("RecordLifecycleActionHeartbeat", hook),
            Self::CompleteHook {
                hook,
                abandon: false,
            } => about("CompleteLifecycleAction CONTINUE", hook),
            Self::CompleteHook { hook, .. } => about("CompleteLifecycleAction ABANDON", hook),
            Self::AskForReplacement => "SetInstanceHealth Unhealthy".to_owned(),
            Self::RaiseDesired { to } => about("SetDesiredCapacity", to),
            Self::Attach => "AttachInstances".to_owned(),
            Self::RegisterTarget => "RegisterTargets".to_owned(),
            Self::DeregisterTarget => "DeregisterTargets".to_owned(),
            Self::WriteOwnRecords { records } => {
                let addresses = records.iter().flat_map(|record| &record.addresses);
                let addresses: Vec<String> = addresses.map(ToString::to_string).collect();
                about("write the own record", &addresses.join(", "))
            }
            Self::DeleteRecord { record } => {
                let identifier = record.identifier.as_deref().unwrap_or("of nobody");
                about("delete the record", &identifier)
            }
            Self::RefuseUploads => "refuse new uploads".to_owned(),
            Self::LetGo => "let the service stop".to_owned(),
        }
    }
}

/// What can be looked at. A look that fails changes nothing in the facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Look {
    /// [`Facts::group`]
    Group,
    /// [`Facts::abandoned`]
    Abandoned,
    /// [`Facts::own_target`]
    OwnTarget,
    /// [`Facts::own_records`]
    OwnRecords,
    /// [`Facts::records`]
    Records,
    /// [`Facts::peers`]: all in service, or at most 20 of them, chosen anew each time, in a large
    /// group; and always the owners of records that [`Facts::records`] holds, up to as many. One
    /// whose address nothing says does not answer; where that is all of them, those are ready that
    /// the load balancer finds healthy.
    Peers,
}

impl Look {
    /// What is looked at, for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Group => "the group",
            Self::Abandoned => "abandoned launches",
            Self::OwnTarget => "the own target",
            Self::OwnRecords => "the own records",
            Self::Records => "all records of the name",
            Self::Peers => "the peers",
        }
    }
}

/// What this instance has to do for its place in the fleet.
pub fn plan(facts: &Facts, memory: &Memory, settings: &FleetSettings) -> Plan {
    let mut turn = Turn::new(facts, memory.clone(), settings);
    if settings.is_off() {
        turn.note("no fleet: neither fleet.autoscaling nor fleet.peers is configured");
        return turn.into_plan(State::Off);
    }
    turn.remember();
    let state = match turn.own_state() {
        _ if turn.is_leaving() => turn.drain(),
        None if turn.group().is_none() => State::Boot,
        None => turn.outside(),
        Some(state) => match state {
            LifecycleState::Pending => State::Boot,
            LifecycleState::PendingWait | LifecycleState::WarmedPendingWait => turn.pending_wait(),
            LifecycleState::InService | LifecycleState::PendingProceed => turn.in_service(),
            LifecycleState::EnteringStandby
            | LifecycleState::Standby
            | LifecycleState::Detaching
            | LifecycleState::Detached => {
                turn.withdraw();
                State::Standby
            }
            LifecycleState::Warmed(_) => {
                turn.withdraw();
                State::Warmed
            }
            LifecycleState::Unknown(text) => {
                turn.note(format!(
                    "the lifecycle state {text} is not known: nothing is done"
                ));
                State::Unknown
            }
            // All of them are leaving, which was remembered.
            LifecycleState::Terminating
            | LifecycleState::TerminatingWait
            | LifecycleState::TerminatingProceed
            | LifecycleState::Terminated
            | LifecycleState::WarmedTerminatingWait => State::Drain,
        },
    };
    turn.into_plan(state)
}

impl Turn<'_> {
    /// In service, or as good as: the hook was completed.
    fn in_service(&mut self) -> State {
        // Also by one that is sick itself: it can still call, and may be the only one that does.
        self.collect_garbage();
        if self.facts.signals.fatal.is_some() {
            self.suspect();
            return State::Suspect;
        }
        self.memory.fatal_since = None;
        self.memory.second_look = None;
        if !self.facts.signals.ready {
            // Not ready is not fatal: another one serves instead, and nobody is replaced.
            self.step_back("it is not ready");
            return State::Registering;
        }
        self.memory.step_back_since = None;
        if !self.advertise() {
            return State::Registering;
        }
        self.look_after_capacity();
        State::Serving
    }
}
