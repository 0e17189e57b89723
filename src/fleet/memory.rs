//! What one plan leaves to the next.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::facts::{InstanceId, LifecycleState};
use super::plan::Look;

/// What one plan leaves to the next: a process begins with what it [kept](Kept) and a seed.
#[derive(Debug, Clone)]
pub struct Memory {
    /// What outlives the process.
    pub kept: Kept,
    /// The only source of randomness.
    pub(super) random: fastrand::Rng,
    /// Attempts whose effect was not seen yet.
    pub(super) tries: BTreeMap<Try, Tries>,
    /// When what is looked at again and again is due.
    pub(super) due: BTreeMap<Look, Due>,
    /// When each hook's next heartbeat is due.
    pub(super) heartbeats: BTreeMap<String, Duration>,
    /// The metadata's word when the last plan was made: a change of it asks for a look.
    pub(super) target_state: Option<LifecycleState>,
    /// Since when the group is to be looked at again because the metadata said so.
    pub(super) group_since: Duration,
    /// Since when this instance is held by a launching hook, and since when it is not ready there.
    pub(super) pending_since: Option<Duration>,
    pub(super) unready_since: Option<Duration>,
    /// When an ABANDON may be decided.
    pub(super) abandon_at: Option<Duration>,
    /// Since when something is fatal.
    pub(super) fatal_since: Option<Duration>,
    /// The guard let it pass once: when it is to be looked at again.
    pub(super) second_look: Option<Duration>,
    /// Since when the own record is needed no more, because another one serves.
    pub(super) step_back_since: Option<Duration>,
    /// Since when the own record is gone from all servers.
    pub(super) record_gone: Option<Duration>,
    /// Since when only running answers are waited for.
    pub(super) finishing: Option<Duration>,
    /// Instances of which something is left, by what is known of their absence.
    pub(super) absent: BTreeMap<InstanceId, Absent>,
    /// Whether this instance looks for garbage, by a term and a listing: ranks of thousands cost.
    pub(super) collects: Option<(u64, Duration, bool)>,
    /// Since when each thing that one instance does for all is wanted.
    pub(super) turns: BTreeMap<&'static str, Duration>,
}

impl Memory {
    /// A process begins. `seed` may be anything that differs between instances.
    pub fn new(kept: Kept, seed: u64) -> Self {
        Self {
            kept,
            random: fastrand::Rng::with_seed(seed),
            tries: BTreeMap::new(),
            due: BTreeMap::new(),
            heartbeats: BTreeMap::new(),
            target_state: None,
            group_since: Duration::ZERO,
            pending_since: None,
            unready_since: None,
            abandon_at: None,
            fatal_since: None,
            second_look: None,
            step_back_since: None,
            record_gone: None,
            finishing: None,
            absent: BTreeMap::new(),
            collects: None,
            turns: BTreeMap::new(),
        }
    }
}

/// What outlives the process: on the disk, with fsync, before the plan that changed it is carried
/// out. Lost with the host, as it should be: the next one is another instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Whose this is: in an image made of a running host it is somebody else's, and void.
    pub instance: Option<InstanceId>,
    /// The hooks whose completion was asked for, by name.
    pub hooks: BTreeMap<String, Asked>,
    /// It was told to go. Nothing undoes that: not metadata that fails, nor a restart.
    pub leaving: Option<Leaving>,
    /// Since when it is in service.
    pub in_service_since: Option<Duration>,
    /// It has asked to be replaced: once in its life, unless the group did not hear.
    pub replacement_asked: bool,
    /// It was in the group: one that was taken out of it is not attached again.
    pub was_member: bool,
}

/// A completion that was asked for. Whether it had an effect is seen by the instance's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// The state in which it was: the same hook holds an instance again when it leaves a warm pool.
    pub state: LifecycleState,
    /// `ABANDON`, else `CONTINUE`.
    pub abandon: bool,
    /// When it was asked last.
    pub at: Duration,
    /// How often.
    pub times: u32,
}

/// That an instance was told to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaving {
    /// Who said so, for people.
    pub why: String,
    /// When it has to have left, whatever was not done by then.
    pub deadline: Option<Duration>,
}

/// What is attempted until its effect is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Try {
    Look(Look),
    OwnRecord,
    OwnTarget,
    Desired,
    Attach,
    Garbage,
}

/// How often something was attempted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tries {
    pub count: u32,
    pub last: Option<Duration>,
    pub next: Duration,
}

/// When something is looked at again: drawn once for each time that it was seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Due {
    pub seen: Duration,
    pub at: Duration,
}

/// What is known of an instance's absence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Absent {
    /// The first complete listing without it.
    pub first: Duration,
    /// The last one.
    pub last: Duration,
    /// When it is this instance's turn, once two listings are far enough apart.
    pub turn: Option<Duration>,
}
