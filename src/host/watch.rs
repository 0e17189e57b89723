//! The host loop: the engines are wired when the mirror serves, and are not when it does not, or
//! when this stops.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::apply::{Apply, ApplyError, Deadlines, Purpose, Recovered, System};
use super::facts::FileFacts;
use super::journal::{Journal, Transaction};
use super::plan::{Plan, Proof, Wanted};
use super::{verify, write};
use crate::config::Drift;
pub use decide::{Decider, Decision, HOLD, Probe};

mod decide;

/// Where the state is that anybody may read.
pub const STATE_FILE: &str = "/run/registry-agent-host/state.json";
/// Time between two looks at the agent and at the files.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time between two looks at the daemons: each asks the bus and docker.
const FULL_INTERVAL: Duration = Duration::from_mins(1);
/// Time between two looks at an engine that does not run.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// How long the start waits for the agent: docker waits for the start.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a job may take when this stops: less than systemd gives the unit (`TimeoutStopSec=`).
const STOP_JOB: Duration = Duration::from_secs(20);
/// How long a docker that is to start may take before its file is taken for good unproved.
const BOOT: Duration = Duration::from_secs(90);

/// What the loop is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The configuration is read again (SIGHUP).
    Reload,
    /// The engines are unwired, and it ends (SIGTERM, SIGINT).
    Stop,
}

/// What the loop tells the service manager (`sd_notify(3)`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// `READY=1`: docker may start.
    Ready,
    /// `STATUS=`.
    Status(String),
    /// `STOPPING=1`.
    Stopping,
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
pub trait Host {
    /// The daemons.
    type System: System;

    /// The daemons.
    fn system(&self) -> &Self::System;
    /// The configuration that is in force.
    fn terms(&self) -> Terms;
    /// Reads the configuration again; `Err` says why the one before stays in force.
    fn reload(&self) -> Result<(), String>;
    /// Reads the facts and plans: what would have to change. `mirrors` are those that the engines
    /// were ever told of.
    fn plan(&self, wanted: Wanted) -> impl Future<Output = Result<Plan, String>> + Send;
    /// Asks the agent whether the mirror serves, with a deadline of its own.
    fn serves(&self) -> impl Future<Output = Probe> + Send;
    /// Tells the service manager.
    fn tell(&self, word: Word);
}

/// What the loop tells everybody, in [`STATE_FILE`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// The engines that go on with a mirror that is withdrawn: only a restart could tell them.
    pub keep_mirror: Vec<String>,
    /// What is wired, in a few words, for the agent's own status line.
    pub summary: String,
    /// One line of it all.
    pub line: String,
    /// What the engines are told to use; none while it is withdrawn.
    pub mirror: Option<String>,
    /// What each daemon has proved, or that it does not run.
    pub engines: Vec<String>,
    /// The last change: when, in seconds since 1970, and what became of it.
    pub last_apply: Option<LastApply>,
    /// What somebody else has changed, and whether it is put right.
    pub drift: Option<String>,
    /// What was refused, and what to do about it.
    pub refusals: Vec<String>,
    /// What is worth knowing of a docker, and what can be done about it: that it is masked, for one.
    pub notes: Vec<String>,
    /// What a person is to do; none where all is well.
    pub next_step: Option<String>,
}

impl State {
    /// That an engine goes on with a mirror that is withdrawn; nothing where none does.
    fn kept(&self) -> Option<String> {
        let engines = self.keep_mirror.join(", ");
        let verb = if self.keep_mirror.len() == 1 {
            "keeps"
        } else {
            "keep"
        };
        (!engines.is_empty())
            .then(|| format!("{engines} {verb} the mirror, which only a restart takes away"))
    }
}

/// The last change of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastApply {
    /// When, in seconds since 1970.
    pub at: u64,
    /// Why it failed; none where it was proved.
    pub failure: Option<String>,
}

/// The loop could not begin.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// What a crash has left could not be dealt with.
    #[error("what an earlier run left can't be ended: {0}")]
    Recover(#[from] ApplyError),
}

/// The loop.
pub struct Watch<'a, H: Host> {
    host: &'a H,
    apply: Apply<'a, H::System>,
    state_file: PathBuf,
    begun: Instant,
    decider: Decider,
    state: State,
    /// What the files were when they were left.
    left: BTreeMap<PathBuf, FileFacts>,
    looked: Option<Instant>,
    drifted: bool,
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
            state_file: write::under(root, Path::new(STATE_FILE)),
            begun: Instant::now(),
            decider: Decider::default(),
            state: State::default(),
            left: BTreeMap::new(),
            looked: None,
            drifted: false,
            engines: Vec::new(),
            idle: Vec::new(),
            asked_idle: Instant::now(),
            refused: Vec::new(),
            said: None,
        }
    }

    /// Looks after the host until it is told to stop, and unwires it then.
    pub async fn run(mut self, mut orders: mpsc::Receiver<Order>) -> Result<(), WatchError> {
        // Nothing before READY waits for a job: docker's may be waiting for READY.
        let unfinished = self.apply.recover_files()?;
        let begun = if unfinished {
            None
        } else {
            self.begin_at_boot().await
        };
        self.say();
        self.host.tell(Word::Ready);
        if unfinished && let Some(recovered) = self.apply.recover().await? {
            match recovered {
                Recovered::Finished => tracing::info!("a change that was proved is ended"),
                Recovered::Undone(undone) => {
                    tracing::warn!("a change that was not ended: {undone}");
                }
            }
        }
        if let Some(transaction) = begun {
            self.complete_at_boot(transaction, &mut orders).await;
        }
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.look().await,
                order = orders.recv() => match order {
                    Some(Order::Reload) => {
                        match self.host.reload() {
                            Ok(()) => tracing::info!("reloaded"),
                            Err(errors) => tracing::error!(
                                "the configuration is broken: the one before stays in force: {errors}"
                            ),
                        }
                        self.decider.reconsider();
                        self.looked = None;
                    }
                    Some(Order::Stop) | None => break,
                },
            }
        }
        self.stop().await;
        Ok(())
    }

    /// If the mirror serves, and docker is not up yet: its file, for it to start with.
    async fn begin_at_boot(&mut self) -> Option<Transaction> {
        let end = Instant::now() + PATIENCE;
        while self.host.serves().await != Probe::Serves {
            if Instant::now() >= end {
                return None;
            }
            tokio::time::sleep(INTERVAL / 5).await;
        }
        let plan = match self.host.plan(Wanted::Wired).await {
            Ok(plan) => plan,
            Err(why) => {
                self.failed(&why);
                return None;
            }
        };
        match self.apply.begin(&plan, self.purpose(Wanted::Wired)).await {
            Ok(transaction) => transaction,
            Err(error) => {
                self.failed(&error.to_string());
                None
            }
        }
    }

    /// Waits for the daemons that start after READY, and has them prove it.
    async fn complete_at_boot(
        &mut self,
        transaction: Transaction,
        orders: &mut mpsc::Receiver<Order>,
    ) {
        let end = Instant::now() + BOOT;
        while Instant::now() < end && self.is_any_waiting(&transaction).await {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL / 5) => {}
                order = orders.recv() => if order != Some(Order::Reload) {
                    // What is begun is ended first. A closed channel is an order to stop.
                    orders.close();
                    break;
                }
            }
        }
        let completed = self.apply.complete(transaction).await;
        self.settled(
            &Decision::Tell(Wanted::Wired),
            completed.map(|_| ()).map_err(|e| e.to_string()),
        );
        self.look_at_daemons(Wanted::Wired).await;
    }

    async fn is_any_waiting(&self, transaction: &Transaction) -> bool {
        for (unit, before) in &transaction.units {
            // One that did not run has until then to come up; one that runs can be told now.
            if before.active_state != "active"
                && let Ok(now) = self.apply.system.unit(unit).await
                && matches!(now.active_state.as_str(), "inactive" | "activating")
                && now.unit_file_state != "disabled"
                && now.load_state != "masked"
            {
                return true;
            }
        }
        false
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
        match &decision {
            Decision::Leave => {}
            Decision::Tell(wanted) | Decision::Correct(wanted) => {
                let done = self.change(*wanted).await;
                self.settled(&decision, done);
                if self.decider.told() == Some(*wanted) {
                    self.look_at_daemons(*wanted).await;
                }
            }
            Decision::LeaveDrift(why) => {
                let drift = format!("changed by somebody else, and left: {why}");
                self.state.drift = Some(drift);
                self.state.next_step = Some(
                    "`registry-agent plan` shows what would be put right, `systemctl reload \
                     registry-agent-host` does it"
                        .to_owned(),
                );
            }
        }
        if let (Probe::Fails(why), None) = (&probe, &self.state.mirror) {
            self.state.next_step = Some(format!(
                "the mirror does not serve ({why}): `registry-agent status` says more"
            ));
        }
        self.say();
    }

    async fn change(&mut self, wanted: Wanted) -> Result<(), String> {
        let plan = self.host.plan(wanted).await?;
        let purpose = self.purpose(wanted);
        self.state.keep_mirror = kept_units(&plan);
        let report = match wanted {
            Wanted::Wired => self.apply.apply(&plan, purpose).await,
            // One that can't be told keeps no other from going without a mirror that is dead.
            Wanted::Withdrawn => Ok(self.apply.apply_each(&plan, &purpose).await.result()?),
        };
        let report = report.map_err(|error| error.to_string())?;
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

    /// Whether an engine runs that did not when it was looked at.
    async fn has_any_started(&mut self) -> bool {
        if self.asked_idle.elapsed() < IDLE_INTERVAL {
            return false;
        }
        self.asked_idle = Instant::now();
        for unit in &self.idle {
            let now = self.apply.system.unit(unit).await;
            if now.is_ok_and(|now| now.active_state == "active") {
                return true;
            }
        }
        false
    }

    /// Whether a file is not what it was when it was looked at last: cheap enough for each turn.
    fn files_changed(&self) -> bool {
        self.left.iter().any(|(path, left)| {
            let now = write::read(&self.apply.path(path));
            now.map_or(true, |now| !write::same(&now, left))
        })
    }

    /// Whether what the engines were told is still so.
    async fn look_at_daemons(&mut self, told: Wanted) {
        self.looked = Some(Instant::now());
        let plan = match self.host.plan(told).await {
            Ok(plan) => plan,
            Err(why) => {
                self.state.next_step = Some(why);
                return;
            }
        };
        let was = self.drifted;
        // What could not be done is nobody else's change.
        self.drifted = !plan.is_empty() && self.decider.told() == Some(told);
        let files: Vec<String> = plan
            .files
            .iter()
            .map(|file| file.path.display().to_string())
            .collect();
        if self.drifted && !was {
            let what = files.join(", ");
            tracing::warn!("changed by somebody else: {what}");
            self.state.drift = Some(format!("changed by somebody else: {what}"));
        } else if !self.drifted {
            self.state.drift = None;
        }
        let refusals = plan.refusals.iter();
        self.state.refusals = refusals
            .map(|refusal| format!("{}: {}. {}", refusal.subject, refusal.why, refusal.remedy))
            .collect();
        // A containerd beside docker, which is left alone on most hosts, is the plan's to tell of.
        let dockers = plan.notes.iter().filter(|note| note.starts_with("docker"));
        let lines = dockers.filter_map(|note| note.lines().next());
        self.state.notes = lines.map(str::to_owned).collect();
        self.refused = refused_units(&plan);
        self.state.keep_mirror = kept_units(&plan);
        self.look_at_engines(&plan).await;
        // What is looked at next: as it is now, so that a change is seen once.
        let known = self
            .apply
            .journal
            .originals()
            .map(|originals| originals.files);
        self.left = known
            .unwrap_or_default()
            .into_keys()
            .filter_map(|path| Some((path.clone(), write::read(&self.apply.path(&path)).ok()?)))
            .collect();
    }

    /// Asks each engine what it has.
    async fn look_at_engines(&mut self, plan: &Plan) {
        self.state.engines.clear();
        self.engines.clear();
        self.idle.clear();
        let mut failed = None;
        for proof in &plan.proofs {
            let (Proof::DockerMirrors { unit, .. } | Proof::Active { unit }) = proof;
            let name = unit.trim_end_matches(".service").to_owned();
            let engine = match (self.apply.system.unit(unit).await, proof) {
                (Err(error), _) => format!("{unit}: {error}"),
                (Ok(now), _) if now.active_state != "active" => {
                    self.idle.push(unit.clone());
                    if now.active_state == "failed" {
                        failed.get_or_insert_with(|| unit.clone());
                    }
                    match now.result.as_str() {
                        "" | "success" => format!("{unit} is {}", now.active_state),
                        why => format!("{unit} is {} ({why})", now.active_state),
                    }
                }
                (Ok(_), Proof::DockerMirrors { .. }) => {
                    match self.apply.system.docker_mirrors(unit).await {
                        Ok(has) => format!("{unit} has {}", verify::list(&has)),
                        Err(error) => format!("{unit}: {error}"),
                    }
                }
                (Ok(now), Proof::Active { .. }) => format!("{unit} is {}", now.active_state),
            };
            self.engines.push(name);
            self.state.engines.push(engine);
        }
        let well = self.state.last_apply.as_ref();
        if well.is_some_and(|it| it.failure.is_none()) && !self.drifted {
            self.state.next_step = failed.map(|unit| {
                format!(
                    "`journalctl --unit={unit}` says why {unit} failed; then `systemctl \
                     reset-failed {unit}` and `systemctl start {unit}`"
                )
            });
        }
    }

    /// The engines do without the mirror before it is gone.
    async fn stop(&mut self) {
        self.host.tell(Word::Stopping);
        self.apply.deadlines.job = self.apply.deadlines.job.min(STOP_JOB);
        let done = self.change(Wanted::Withdrawn).await;
        self.settled(&Decision::Tell(Wanted::Withdrawn), done);
        self.say();
    }

    /// Tells the service manager and everybody, where it is something new.
    fn say(&mut self) {
        let kept = self.state.kept().unwrap_or_default();
        let told = match (&self.state.mirror, &self.state.last_apply) {
            (Some(mirror), _) => format!("engines wired to {mirror}"),
            (None, None) => "waiting for the mirror to serve".to_owned(),
            (None, _) if kept.is_empty() => {
                "engines not wired: they pull without the mirror".to_owned()
            }
            (None, _) => format!("other engines not wired: they pull without the mirror; {kept}"),
        };
        let engines = self
            .state
            .engines
            .iter()
            .map(|engine| format!("; {engine}"));
        let mut line = told + &engines.collect::<String>();
        if let Some(drift) = &self.state.drift {
            line = format!("{line}; {drift}");
        }
        if let Some(LastApply {
            failure: Some(why), ..
        }) = &self.state.last_apply
        {
            let first = why.lines().next().unwrap_or_default();
            line = format!("{line}; failed: {first}");
        }
        self.state.line = line;
        self.state.summary = self.summary();
        if self.said.as_ref() == Some(&self.state) {
            return;
        }
        self.host.tell(Word::Status(self.state.line.clone()));
        if let Err(error) = self.write_state() {
            tracing::warn!("what this does can't be shown: {error}");
        }
        self.said = Some(self.state.clone());
    }

    /// `docker wired`, `docker, containerd wired`, `docker not wired`, `containerd wired; docker does
    /// not run`.
    fn summary(&self) -> String {
        let idle = |engine: &&String| {
            let unit = format!("{engine}.service");
            self.idle.contains(&unit)
        };
        let list = |of: Vec<&str>| of.join(", ");
        let (resting, running): (Vec<&String>, Vec<&String>) = self.engines.iter().partition(idle);
        let [resting, running] =
            [resting, running].map(|some| list(some.into_iter().map(String::as_str).collect()));
        let refused = list(self.refused.iter().map(String::as_str).collect());
        let failed = self
            .state
            .last_apply
            .as_ref()
            .is_some_and(|it| it.failure.is_some());
        let others = !resting.is_empty() || !refused.is_empty();
        let engines = match running.as_str() {
            "" => "engines",
            running => running,
        };
        let mut parts = Vec::new();
        match &self.state.mirror {
            _ if failed => parts.push(format!("{engines} could not be wired")),
            Some(_) if self.state.drift.is_some() => {
                parts.push(format!("{engines} wired, and changed since"));
            }
            // What needs no daemon is not worth the line.
            Some(_) if running.is_empty() && others => {}
            Some(_) => parts.push(format!("{engines} wired")),
            None if running.is_empty() && !self.state.keep_mirror.is_empty() => {}
            None => parts.push(format!("{engines} not wired")),
        }
        parts.extend(self.state.kept());
        if !resting.is_empty() {
            parts.push(format!("{resting} does not run"));
        }
        if !refused.is_empty() {
            parts.push(format!("{refused} refused: see `registry-agent status`"));
        }
        parts.join("; ")
    }

    fn write_state(&self) -> Result<(), write::WriteError> {
        let content = serde_json::to_string_pretty(&self.state).unwrap_or_default();
        let facts = FileFacts::Text {
            content: content + "\n",
            mode: 0o644,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            selinux: None,
            link_to: None,
        };
        for folder in write::missing_folders(self.apply.root, Path::new(STATE_FILE)) {
            write::make_folder(&self.apply.path(&folder))?;
        }
        write::put(&self.state_file, &facts)
    }
}

/// The dockers that can't be wired by these settings. What else is refused, a containerd beside
/// docker for one, is in the state's refusals and the plan.
fn refused_units(plan: &Plan) -> Vec<String> {
    let mut subjects: Vec<String> = Vec::new();
    for refusal in &plan.refusals {
        let subject = refusal.subject.trim_end_matches(".service").to_owned();
        if subject.starts_with("docker") && !subjects.contains(&subject) {
            subjects.push(subject);
        }
    }
    subjects
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
