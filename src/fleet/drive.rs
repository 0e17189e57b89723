//! The loop: observe -> plan -> apply, for ever. What goes wrong in it never touches the registry.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::apply::{self, Agent};
use super::boot;
use super::calls::Calls;
use super::facts::{Facts, Group, InstanceId, Seen, Signals, TargetState};
use super::imds::Imds;
use super::kept::{KeptFile, Starts};
use super::memory::Memory;
use super::metadata::{self, Heard, Identity};
use super::observe::{self, Clients, ConnectError, Observer};
use super::peers::{NotServing, Prober};
use super::plan::{Look, Plan, State, Step, plan};
use super::signals;
use crate::config::{FleetSettings, Members, Serving};
use crate::health::HealthWatch;
use crate::hosted::Hosted;
use crate::metrics::{FleetStateLabels, Metrics};

/// Between two attempts to begin, in milliseconds.
const CONNECT_AGAIN: std::ops::Range<u64> = 2000..10_000;
/// After a panic.
const RESTART: Duration = Duration::from_secs(30);
/// A clock that stands while a host is suspended is looked at this often.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);
/// Nothing is planned faster than this, whatever a plan says.
const SHORTEST_SLEEP: Duration = Duration::from_millis(5);
/// Steps that are shown.
const TAKEN: usize = 20;
/// What leaving takes beside the TTL: answers may go on for two minutes.
const LEAVE: Duration = Duration::from_mins(2 + 1);
/// The same with a load balancer, whose targets drain for five minutes unless it is told otherwise.
const LEAVE_TARGET: Duration = Duration::from_mins(5);

/// What the fleet part needs of the agent that it is in.
pub struct Parts {
    /// What is configured; never off.
    pub settings: FleetSettings,
    /// What is served.
    pub serving: Serving,
    /// Where the registry listens.
    pub listen: SocketAddr,
    /// How the agent is.
    pub health: HealthWatch,
    /// Where uploads are refused.
    pub hosted: Hosted,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The folder for what outlives the process.
    pub state: PathBuf,
}

/// What is known of the fleet, for those who show it.
#[derive(Debug, Clone)]
pub struct View {
    /// Why it could not begin yet, where that is so.
    pub blocked: Option<String>,
    /// What was seen last.
    pub facts: Option<Facts>,
    /// All targets, as far as they were looked at.
    pub targets: BTreeMap<InstanceId, TargetState>,
    /// Where this instance is.
    pub state: State,
    /// What the last plan looks at next, and when, since this host booted.
    pub looks: BTreeMap<Look, Duration>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Why it was told to go.
    pub leaving: Option<String>,
    /// Since when it is in service, since this host booted.
    pub in_service_since: Option<Duration>,
    /// What was done last, and when, since this host booted. The newest is last.
    pub taken: VecDeque<(Duration, Step)>,
    /// What can't be asked now, and why.
    pub failing: BTreeMap<&'static str, String>,
}

impl View {
    fn starting() -> Self {
        Self {
            blocked: Some("it has just started".to_owned()),
            facts: None,
            targets: BTreeMap::new(),
            state: State::Boot,
            looks: BTreeMap::new(),
            notes: Vec::new(),
            leaving: None,
            in_service_since: None,
            taken: VecDeque::new(),
            failing: BTreeMap::new(),
        }
    }
}

/// The running fleet part, for the rest of the agent.
pub struct Fleet {
    view: watch::Receiver<Arc<View>>,
    stop: watch::Sender<Option<Duration>>,
    gone: watch::Receiver<bool>,
    patience: Option<Duration>,
}

impl Fleet {
    /// Starts it. It ends with `tasks`.
    pub fn start(parts: Parts, tasks: &mut JoinSet<()>) -> Self {
        let (view_sender, view) = watch::channel(Arc::new(View::starting()));
        let (stop, stop_receiver) = watch::channel(None);
        let (gone_sender, gone) = watch::channel(false);
        let patience = parts
            .settings
            .leave_on_stop
            .then(|| patience(&parts.settings));
        tasks.spawn(async move {
            loop {
                let run = run(
                    &parts,
                    &view_sender,
                    stop_receiver.clone(),
                    gone_sender.clone(),
                );
                // A panic has been logged where it happened.
                let _ = AssertUnwindSafe(run).catch_unwind().await;
                tracing::error!("the fleet part has broken down, and starts again in 30s");
                tokio::time::sleep(RESTART).await;
            }
        });
        Self {
            view,
            stop,
            gone,
            patience,
        }
    }

    /// What is known of the fleet.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Leaves the fleet before the service stops, where that is configured: how long it may take at
    /// most, and what ends when it is done or that time is over.
    pub fn leave(&self) -> Option<(Duration, impl Future<Output = bool> + use<>)> {
        let patience = self.patience?;
        self.stop.send_replace(Some(boot::now() + patience));
        let mut gone = self.gone.clone();
        // The planner lets go by itself when its time is over: this is for when it hangs.
        let longest = patience + Duration::from_secs(30);
        let left = async move {
            let gone = tokio::time::timeout(longest, gone.wait_for(|gone| *gone)).await;
            matches!(gone, Ok(Ok(_)))
        };
        Some((longest, left))
    }
}

/// How long leaving may take at a stop of the service.
fn patience(settings: &FleetSettings) -> Duration {
    let ttl = settings.dns.as_ref().map_or(Duration::ZERO, |dns| dns.ttl);
    let targets = match &settings.load_balancer {
        Some(_) => LEAVE_TARGET,
        None => Duration::ZERO,
    };
    LEAVE + ttl + targets
}

/// What is heard of this instance while the loop runs.
struct Watches {
    heard: watch::Receiver<Heard>,
    own: watch::Receiver<Option<NotServing>>,
    warm: watch::Receiver<bool>,
    health: HealthWatch,
    stop: watch::Receiver<Option<Duration>>,
    starts: Starts,
}

impl Watches {
    /// Waits until any of them changes.
    async fn changed(&mut self) {
        // One whose sender has ended says nothing more: images that are there stay there.
        async fn of<T>(watch: &mut watch::Receiver<T>) {
            if watch.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
        tokio::select! {
            () = of(&mut self.heard) => {}
            () = of(&mut self.own) => {}
            () = of(&mut self.warm) => {}
            () = of(&mut self.health) => {}
            () = of(&mut self.stop) => {}
        }
    }

    /// Brings what an agent knows of itself up to date.
    async fn observe(&mut self, facts: &mut Facts, metrics: &Metrics) {
        let health = self.health.borrow_and_update().clone();
        let own = self.own.borrow_and_update().clone();
        if own.is_none() {
            self.starts.were_not_in_vain().await;
        }
        let lost = own
            .as_ref()
            .filter(|own| !own.answers && self.starts.are_in_vain());
        let lost = lost.map(|own| format!("{} through several starts", own.why));
        facts.now = boot::now();
        facts.metadata = self.heard.borrow_and_update().now();
        facts.stop = *self.stop.borrow_and_update();
        facts.signals = Signals {
            ready: health.ready && own.is_none(),
            fatal: health.fatal.or(lost),
            warm: *self.warm.borrow_and_update(),
            running: u32::try_from(metrics.running.get()).unwrap_or(0),
        };
    }
}

async fn run(
    parts: &Parts,
    view: &watch::Sender<Arc<View>>,
    stop: watch::Receiver<Option<Duration>>,
    gone: watch::Sender<bool>,
) {
    let settings = &parts.settings;
    let (identity, imds, clients) = connect(parts, view, stop.clone(), &gone).await;
    let own = identity.own.id.clone();
    tracing::info!(
        instance = %own,
        zone = identity.zone.as_deref(),
        addresses = ?identity.own.addresses,
        group = observe::group_name(settings),
        "takes part in a fleet"
    );
    // All of them end with this function, however it ends.
    let mut tasks = JoinSet::new();
    let (heard_sender, heard) = watch::channel(Heard::default());
    if let Some(imds) = imds {
        tasks.spawn(metadata::watch(imds, heard_sender));
    }
    let (own_sender, own_port) = watch::channel(Some(signals::not_asked()));
    let addresses = identity.own.addresses.clone();
    tasks.spawn(signals::watch_own(
        clients.prober.clone(),
        addresses,
        own_sender,
    ));
    let (warm_sender, warm) = watch::channel(false);
    tasks.spawn(signals::warm(
        parts.serving.clone(),
        settings.warm.clone(),
        warm_sender,
    ));
    let mut watches = Watches {
        heard,
        own: own_port,
        warm,
        health: parts.health.clone(),
        stop,
        starts: Starts::another(&parts.state, boot::now()).await,
    };

    let agent = Agent {
        hosted: parts.hosted.clone(),
        gone,
    };
    let (mut file, kept) = KeptFile::open(&parts.state);
    let mut memory = Memory::new(kept, fastrand::u64(..));
    let mut calls = Calls::new(Arc::clone(&parts.metrics));
    let mut observer = Observer::new(own.clone());
    let mut facts = first(identity, settings);
    let mut taken = VecDeque::new();
    let mut notes = Vec::new();
    loop {
        watches.observe(&mut facts, &parts.metrics).await;
        let made = plan(&facts, &memory, settings);
        memory = made.memory.clone();
        file.keep(&memory.kept).await;
        for note in made.notes.iter().filter(|note| !notes.contains(*note)) {
            tracing::info!("fleet: {note}");
        }
        notes.clone_from(&made.notes);
        count(&parts.metrics, &made, &facts, settings);
        for step in &made.steps {
            if taken.len() == TAKEN {
                taken.pop_front();
            }
            taken.push_back((facts.now, step.clone()));
        }
        let due = made.looks.iter().filter(|(_, at)| **at <= facts.now);
        let due: Vec<Look> = due.map(|(look, _)| *look).collect();
        let idle = due.is_empty() && made.steps.is_empty();
        let shown = View {
            blocked: None,
            facts: Some(facts.clone()),
            targets: observer.targets().clone(),
            state: made.state,
            looks: made.looks,
            notes: made.notes,
            leaving: memory
                .kept
                .leaving
                .as_ref()
                .map(|leaving| leaving.why.clone()),
            in_service_since: memory.kept.in_service_since,
            taken: taken.clone(),
            failing: calls.failing().clone(),
        };
        view.send_replace(Arc::new(shown));
        for step in &made.steps {
            apply::apply(step, &own, &clients, &agent, &mut calls).await;
        }
        if *agent.gone.borrow() {
            // The service stops: to begin anew would be to join again.
            return std::future::pending().await;
        }
        for look in due {
            observer
                .look(look, &mut facts, settings, &clients, &mut calls)
                .await;
        }
        if idle {
            let left = made.next.saturating_sub(boot::now());
            let sleep = left.clamp(SHORTEST_SLEEP, LONGEST_SLEEP);
            // Over, or changed: either way it is time for another plan.
            let _ = tokio::time::timeout(sleep, watches.changed()).await;
        }
    }
}

/// What is known before anybody was asked.
fn first(identity: Identity, settings: &FleetSettings) -> Facts {
    let now = boot::now();
    let group = match &settings.members {
        Some(Members::Static(list)) => {
            let is = Arc::new(Group::of_a_list(list));
            Some(Seen { at: now, is })
        }
        Some(Members::Autoscaling(_)) | None => None,
    };
    Facts {
        now,
        own: identity.own,
        metadata: Heard::default().now(),
        signals: Signals {
            ready: false,
            fatal: None,
            warm: false,
            running: 0,
        },
        stop: None,
        group,
        abandoned: None,
        own_target: None,
        own_records: None,
        records: None,
        peers: None,
    }
}

/// Finds out who this instance is and whom it asks, for as long as that takes.
async fn connect(
    parts: &Parts,
    view: &watch::Sender<Arc<View>>,
    mut stop: watch::Receiver<Option<Duration>>,
    gone: &watch::Sender<bool>,
) -> (Identity, Option<Arc<Imds>>, Clients) {
    let mut told = String::new();
    loop {
        let error = match attempt(parts).await {
            Ok(connected) => return connected,
            Err(error) => error.to_string(),
        };
        if error != told {
            tracing::warn!(%error, "can't take part in the fleet yet: {error}");
            told.clone_from(&error);
        }
        let blocked = View {
            blocked: Some(error),
            ..View::starting()
        };
        view.send_replace(Arc::new(blocked));
        let pause = Duration::from_millis(fastrand::u64(CONNECT_AGAIN));
        let stopped = async { stop.wait_for(Option::is_some).await.is_ok() };
        if tokio::time::timeout(pause, stopped).await == Ok(true) {
            // Nothing can be taken back by one that does not know who it is.
            gone.send_replace(true);
            return std::future::pending().await;
        }
    }
}

async fn attempt(parts: &Parts) -> Result<(Identity, Option<Arc<Imds>>, Clients), ConnectError> {
    let prober = Prober::new(parts.listen.port(), parts.serving.tls.is_some());
    let prober = prober.map_err(ConnectError::Tls)?;
    let (identity, imds) = match &parts.settings.members {
        Some(Members::Static(list)) => {
            let own = observe::own_of(list, parts.listen)?;
            (Identity { own, zone: None }, None)
        }
        Some(Members::Autoscaling(_)) | None => {
            let imds = Arc::new(Imds::from_environment()?);
            let mut identity = metadata::identity(&imds).await?;
            let addresses = std::mem::take(&mut identity.own.addresses);
            identity.own.addresses = observe::reachable(addresses, parts.listen);
            if identity.own.addresses.is_empty() {
                return Err(ConnectError::NotReachable(parts.listen));
            }
            (identity, Some(imds))
        }
    };
    let clients = Clients::connect(&parts.settings, prober).await?;
    Ok((identity, imds, clients))
}

fn count(metrics: &Metrics, made: &Plan, facts: &Facts, settings: &FleetSettings) {
    if made.refused {
        metrics.fleet_guard_refusals.inc();
    }
    let labels = FleetStateLabels {
        state: made.state.as_str(),
    };
    let is_new = metrics.fleet_state.get(&labels).is_none();
    if is_new {
        metrics.fleet_state.clear();
        metrics.fleet_state.get_or_create(&labels).set(1);
    }
    if let Some(group) = &facts.group {
        let wanted = settings.instances.unwrap_or(group.is.desired);
        metrics.set_fleet_instances(group.is.healthy(), wanted);
    }
}
