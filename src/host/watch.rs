//! The host loop: the engines are wired when the mirror serves, and are not when it does not, or
//! when this stops.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::apply::{Apply, Deadlines, Purpose, System};
use super::journal::Journal;
use super::plan::{Plan, Wanted};
use crate::config::Drift;
use daemons::Signature;
pub use decide::{Decider, Decision, HOLD, Probe};
pub use orders::Order;
use orders::Orders;
use recover::Blocked;
pub use report::{LastApply, STATE_FILE, State};
pub use stop::StopLimits;

mod boot;
mod daemons;
mod decide;
mod left;
mod orders;
mod recover;
mod report;
mod reserve;
mod stop;

/// Time between two looks at the agent and at the files.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time between two looks at the daemons: each asks the bus and docker.
const FULL_INTERVAL: Duration = Duration::from_mins(1);
/// Time between two looks at an engine that does not run.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);

/// What is said of a configuration that can't be read again.
pub const BROKEN: &str = "the configuration is broken: the one before stays in force";

/// What the loop tells the service manager (`sd_notify(3)`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// `READY=1`: docker may start.
    Ready,
    /// `STATUS=`.
    Status(String),
    /// `STOPPING=1`, and how long it may take from now.
    Stopping(Duration),
}

/// What the loop is told by the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// What the engines are told.
    pub mirror: String,
    /// How long it has to have failed.
    pub withdraw_after: Duration,
    /// What is done about the changes of others.
    pub drift: Drift,
}

/// The host, its agent and its service manager, as the loop needs them.
pub trait Host: Sync {
    /// The daemons.
    type System: System;

    /// The daemons.
    fn system(&self) -> &Self::System;
    /// The configuration that is in force.
    fn terms(&self) -> Terms;
    /// Reads the configuration again; `Err` says why the one before stays in force.
    fn reload(&self) -> Result<(), String>;
    /// Reads the facts and plans: what would have to change, and the files that it was read from.
    fn look(
        &self,
        wanted: Wanted,
    ) -> impl Future<Output = Result<(Plan, Vec<PathBuf>), String>> + Send;
    /// The plan alone.
    fn plan(&self, wanted: Wanted) -> impl Future<Output = Result<Plan, String>> + Send {
        async move { Ok(self.look(wanted).await?.0) }
    }
    /// Asks the agent whether the mirror serves, with a deadline of its own.
    fn serves(&self) -> impl Future<Output = Probe> + Send;
    /// Tells the service manager.
    fn tell(&self, word: Word);
}

/// The loop.
pub struct Watch<'a, H: Host> {
    host: &'a H,
    apply: Apply<'a, H::System>,
    begun: Instant,
    decider: Decider,
    state: State,
    limits: StopLimits,
    /// What keeps the host from being changed.
    blocked: Option<Blocked>,
    /// What the files were when they were left.
    left: BTreeMap<PathBuf, Signature>,
    looked: Option<Instant>,
    drifted: bool,
    /// The files that differ from the plan, by what was in them when it was made.
    changed_by_others: BTreeMap<PathBuf, String>,
    /// What the next start is to leave to others.
    left_to_others: Option<left::Left>,
    /// What the last change was to bring about.
    tried: Option<Wanted>,
    /// Whether it was said that no room is kept for the end.
    said_short: bool,
    /// The engines that there are, by their units' names.
    engines: Vec<String>,
    /// Those of them that do not run.
    idle: Vec<String>,
    asked_idle: Instant,
    /// The dockers that can't be wired by these settings.
    refused: Vec<String>,
    said: Option<State>,
}

impl<'a, H: Host> Watch<'a, H> {
    /// A loop that has not begun. Whoever makes one has the [`super::lock::Lock`].
    pub fn new(host: &'a H, root: &'a Path, journal: &'a Journal, deadlines: Deadlines) -> Self {
        Self {
            host,
            apply: Apply {
                root,
                journal,
                system: host.system(),
                deadlines,
            },
            begun: Instant::now(),
            decider: Decider::default(),
            state: State::default(),
            limits: StopLimits::default(),
            blocked: None,
            left: BTreeMap::new(),
            looked: None,
            drifted: false,
            changed_by_others: BTreeMap::new(),
            left_to_others: None,
            tried: None,
            said_short: false,
            engines: Vec::new(),
            idle: Vec::new(),
            asked_idle: Instant::now(),
            refused: Vec::new(),
            said: None,
        }
    }

    /// The same, with other bounds to its end than those that the unit's file allows.
    #[must_use]
    pub fn stopping_within(self, limits: StopLimits) -> Self {
        Self { limits, ..self }
    }

    /// Looks after the host until it is told to stop, and unwires it then.
    pub async fn run(mut self, orders: mpsc::Receiver<Order>) {
        let mut orders = Orders::new(orders, self.limits.grace);
        // Nothing before READY waits for a job: docker's may be waiting for READY.
        let begun = orders.unless_stopped(self.begin_at_boot()).await.flatten();
        self.say();
        self.host.tell(Word::Ready);
        if self.blocked.is_some() {
            orders.unless_stopped(self.recover()).await;
            self.say();
        }
        if let Some(transaction) = begun {
            orders
                .unless_stopped_at_once(self.wait_for_daemons(&transaction))
                .await;
            orders
                .unless_stopped(self.complete_at_boot(transaction))
                .await;
        }
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                order = orders.next() => match order {
                    Order::Reload => self.reload(),
                    Order::Stop => break,
                },
                _ = ticks.tick() => {
                    orders.unless_stopped(self.look()).await;
                }
            }
        }
        self.stop().await;
    }

    fn reload(&mut self) {
        match self.host.reload() {
            Ok(()) => {
                tracing::info!("reloaded");
                self.state.configuration = None;
                self.decider.reconsider();
                self.forget_left();
                self.looked = None;
            }
            // What was left to others stays theirs: nobody has said otherwise.
            Err(errors) => {
                tracing::error!("{BROKEN}: {errors}");
                self.state.configuration = Some(format!("{BROKEN}: {errors}"));
            }
        }
        if let Some(blocked) = &mut self.blocked {
            blocked.try_now();
        }
    }

    /// One turn.
    async fn look(&mut self) {
        let probe = self.host.serves().await;
        let terms = self.host.terms();
        if let Some(told) = self.decider.told() {
            let due = self.looked.is_none_or(|at| at.elapsed() >= FULL_INTERVAL);
            if due || self.files_changed() || self.has_any_started().await {
                self.look_at_daemons(told).await;
            }
        }
        let now = self.begun.elapsed();
        let (after, drift) = (terms.withdraw_after, terms.drift);
        let decision = self.decider.decide(now, &probe, after, self.drifted, drift);
        let free = self.recover().await;
        match &decision {
            Decision::Leave => {}
            _ if !free => {}
            Decision::Tell(wanted) | Decision::Correct(wanted) => {
                let done = self.change(*wanted).await;
                self.settled(&decision, done);
                self.note_own_changes();
                // What could not be done is not seen as somebody's change, but each engine is named.
                self.look_at_daemons(*wanted).await;
            }
            Decision::LeaveDrift(why) => {
                let drift = format!("changed by somebody else, and left: {why}");
                self.state.drift = Some(drift);
                self.remember_left();
                self.state.next_step = Some(
                    "`registry-agent plan` shows what would be put right, `systemctl reload \
                     registry-agent-host` does it"
                        .to_owned(),
                );
            }
        }
        if !free {
            self.state.next_step = Some(recover::NEXT_STEP.to_owned());
        } else if let (Probe::Fails(why), None) = (&probe, &self.state.mirror) {
            self.state.next_step = Some(format!(
                "the mirror does not serve ({why}): `registry-agent status` says more"
            ));
        }
        self.say();
    }

    async fn change(&mut self, wanted: Wanted) -> Result<(), String> {
        self.tried = Some(wanted);
        if wanted == Wanted::Withdrawn {
            reserve::give_up_if_needed(self.apply.journal.folder());
        }
        let plan = self.host.plan(wanted).await?;
        let purpose = self.purpose(wanted);
        self.state.keep_mirror = kept_units(&plan);
        let applied = match wanted {
            Wanted::Wired => {
                let applied = self.apply.apply(&plan, purpose).await;
                applied.map_err(|error| error.to_string())
            }
            // One that can't be told keeps no other from going without a mirror that is dead.
            Wanted::Withdrawn => self.apply.withdraw_each(&plan, &purpose).await.result(),
        };
        let report = applied.inspect_err(|_| self.fell_short())?;
        if !plan.is_empty() {
            tracing::info!(?wanted, "applied: {report}");
        }
        Ok(())
    }

    fn purpose(&self, wanted: Wanted) -> Purpose {
        Purpose {
            mirror: (wanted == Wanted::Wired).then(|| self.host.terms().mirror),
        }
    }

    fn settled(&mut self, decision: &Decision, done: Result<(), String>) {
        self.decider
            .done(self.begun.elapsed(), decision, done.is_ok());
        match decision {
            Decision::Tell(Wanted::Withdrawn) | Decision::Correct(Wanted::Withdrawn) => {
                self.update_left();
            }
            _ if done.is_ok() => {
                self.forget_left();
                self.keep_reserve();
            }
            _ => {}
        }
        match done {
            Ok(()) => {
                self.state.last_apply = Some(LastApply {
                    at: seconds(),
                    failure: None,
                });
                self.state.next_step = None;
                self.state.mirror = match self.decider.told() {
                    Some(Wanted::Wired) => Some(self.host.terms().mirror),
                    _ => None,
                };
            }
            Err(why) => {
                if self.decider.told().is_none() {
                    self.state.mirror = None;
                }
                self.failed(&why);
            }
        }
    }

    /// Keeps room for the journal of the end, while there is some.
    fn keep_reserve(&mut self) {
        let folder = self.apply.journal.folder();
        let kept = reserve::keep(folder);
        if let (Err(error), false) = (&kept, self.said_short) {
            let folder = folder.display();
            tracing::warn!("no room can be kept in {folder} for taking the mirror away: {error}");
        }
        self.said_short = kept.is_err();
    }

    fn failed(&mut self, why: &str) {
        tracing::error!("the engines could not be told: {why}");
        self.state.last_apply = Some(LastApply {
            at: seconds(),
            failure: Some(why.to_owned()),
        });
        self.state.next_step = Some(
            "`journalctl --unit=registry-agent-host` says what failed; it is tried again"
                .to_owned(),
        );
    }
}

/// The engines that a mirror which is withdrawn can't be taken from.
fn kept_units(plan: &Plan) -> Vec<String> {
    let kept = plan.keep_mirror.iter();
    kept.map(|unit| unit.trim_end_matches(".service").to_owned())
        .collect()
}

fn seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
