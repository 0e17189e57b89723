//! `registry-agent run`, put together: listen, serve, reload, drain.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

mod signals;

use crate::config::{Loaded, Serving, Settings, Sources};
use crate::descriptors::Connections;
use crate::fleet::{Fleet, drive};
use crate::health::{self, Health, HealthWatch, MirrorProbe, MirrorWatch, Need, OwnPort};
use crate::hosted::Hosted;
use crate::hosted::users::Gate;
use crate::log::LevelHandle;
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::registry::Registry;
use crate::registry::server::{self, Limits, Listener, Places};
use crate::store::{Store, StoreError};
use crate::systemd::listen::Passed;
use crate::systemd::notify;
use crate::tls::LiveIdentity;
use crate::{admin, status};

use signals::Signals;

/// How often it is looked whether the certificate's files have changed.
const CERTIFICATE_INTERVAL: Duration = Duration::from_mins(1);
/// How often it is looked for uploads that were given up.
const UPLOADS_INTERVAL: Duration = Duration::from_mins(30);
/// How long the disk may take at the end for downloads that are not complete. The service manager
/// waits for longer than this and a drain.
const SYNC_DEADLINE: Duration = Duration::from_secs(10);
/// For the process to end, when all else has.
const STOP_MARGIN: Duration = Duration::from_secs(5);
/// What systemd is asked for while the fleet is left, again and again.
const EXTENSION: Duration = Duration::from_secs(30);
/// What the admin listener's clients get: its answers are short.
const ADMIN_LIMITS: Limits = Limits {
    idle: Duration::from_mins(1),
    drain: Duration::from_secs(1),
};

/// The agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A port or socket can't be had.
    #[error("can't listen on {address} (`{key}`): {source}")]
    Listen {
        /// The key in the configuration.
        key: &'static str,
        /// The address.
        address: String,
        /// What came back.
        source: io::Error,
    },
    /// The certificate or its key can't be used.
    #[error("can't serve TLS (`tls`): {0}")]
    Tls(String),
    /// The storage can't be used.
    #[error("can't use the storage (`{key}`): {source}")]
    Store {
        /// The key in the configuration that says where it is.
        key: &'static str,
        /// What came back.
        source: StoreError,
    },
    /// The users can't be read.
    #[error("can't say who may push (`auth.htpasswd`): {0}")]
    Users(String),
    /// The process can't be set up.
    #[error("can't handle signals: {0}")]
    Signals(#[from] io::Error),
}

/// What the parts of a running agent share.
pub struct Shared {
    settings: RwLock<Arc<Settings>>,
    /// What clients are shown, where the registry speaks TLS.
    identity: Option<Arc<LiveIdentity>>,
    /// The mirror; a client has none.
    pub mirror: Option<Mirror>,
    /// How the agent is.
    pub health: HealthWatch,
    /// How the mirror is that this host's engines are told.
    pub mirror_health: MirrorWatch,
    /// Its place in a fleet; nothing where it takes part in none.
    pub fleet: Option<Fleet>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// When it started.
    pub started: Instant,
}

impl Shared {
    /// The settings as they are now.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Runs until SIGTERM or SIGINT, and the drain after it.
pub async fn run(
    loaded: Loaded,
    sources: Sources,
    level: LevelHandle,
    mut passed: Passed,
) -> Result<(), AgentError> {
    let settings = Arc::new(loaded.settings);
    // Before anything is opened, so that no signal finds us without a handler.
    let mut signals = Signals::new()?;
    let connections = Connections::with_all_descriptors();
    let metrics = Arc::new(Metrics::default());
    let registry = match &settings.serving {
        Some(serving) => Some(Port::open(serving, &mut passed, &metrics).await?),
        None => None,
    };
    let (health_sender, health) = watch::channel(Health::starting());
    let (mirror_probe, mirror_health) = MirrorProbe::new(&settings.host);
    // What ends with the agent, and would never end by itself.
    let mut tasks = JoinSet::new();
    let fleet = match (&registry, &settings.serving) {
        (Some(port), Some(serving)) if !settings.fleet.is_off() => {
            let parts = drive::Parts {
                settings: settings.fleet.clone(),
                serving: serving.clone(),
                listen: port.local,
                health: health.clone(),
                hosted: port.hosted.clone(),
                metrics: Arc::clone(&metrics),
                state: fleet_folder(&sources, serving),
            };
            Some(Fleet::start(parts, &mut tasks))
        }
        _ => {
            tracing::info!("no fleet: neither fleet.autoscaling nor fleet.peers is configured");
            None
        }
    };
    let shared = Arc::new(Shared {
        settings: RwLock::new(Arc::clone(&settings)),
        identity: registry.as_ref().and_then(|port| port.identity.clone()),
        mirror: registry.as_ref().map(|port| port.mirror.clone()),
        health: health.clone(),
        mirror_health,
        fleet,
        metrics: Arc::clone(&metrics),
        started: Instant::now(),
    });
    // After the store's lock: of two agents on one root, the second must not take this socket.
    let admin = admin::listen(&settings.admin, &mut passed).await;
    let (admin, admin_path) =
        admin.map_err(|e| listen_error("admin", settings.admin.to_string(), e))?;
    for problem in passed.problems() {
        tracing::warn!("{problem}");
    }

    let (stop_sender, stop) = watch::channel(false);
    let (stop_admin_sender, stop_admin) = watch::channel(false);
    let admin_serving = tokio::spawn(server::serve(
        admin,
        connections.admin,
        {
            let shared = Arc::clone(&shared);
            move |request, _| admin::answer(request, Arc::clone(&shared))
        },
        Arc::new(Metrics::default()),
        stop_admin,
        || ADMIN_LIMITS,
        None,
    ));
    let probed = {
        let shared = Arc::clone(&shared);
        move || {
            let settings = shared.settings();
            (settings.health, settings.host.clone())
        }
    };
    let (own_port, serving) = match registry {
        // Ready is a client whose mirror serves; started it has all the same, and the boot of a
        // host does not wait for another one.
        None => {
            tasks.spawn(health::watch(
                Need::Mirror(Box::new(mirror_probe)),
                probed,
                health_sender,
                metrics,
            ));
            notify::ready();
            (None, None)
        }
        Some(port) => {
            tasks.spawn(health::watch(
                Need::Storage(port.mirror.store().clone()),
                probed,
                health_sender,
                metrics,
            ));
            let interval = {
                let shared = Arc::clone(&shared);
                move || shared.settings().health.interval
            };
            let host = {
                let shared = Arc::clone(&shared);
                move || shared.settings().host.clone()
            };
            tasks.spawn(mirror_probe.watch(interval.clone(), host));
            tasks.spawn(port.mirror.clone().look_after_cache(interval));
            tasks.spawn(port.mirror.clone().look_after_shared());
            tasks.spawn(watch_certificate(port.identity.clone()));
            tasks.spawn(watch_uploads(port.hosted.clone()));
            let users = {
                let shared = Arc::clone(&shared);
                move || {
                    let settings = shared.settings();
                    Some(settings.serving.as_ref()?.auth.as_ref()?.htpasswd.clone())
                }
            };
            tasks.spawn(port.gate.clone().watch(users));
            tasks.spawn({
                let mut health = health.clone();
                async move {
                    if health.wait_for(|health| health.ready).await.is_ok() {
                        notify::ready();
                    }
                }
            });
            (
                Some(port.own.clone()),
                Some(port.serve(Arc::clone(&shared), connections.registry, stop)),
            )
        }
    };
    let mut telling = JoinSet::new();
    telling.spawn({
        let shared = Arc::clone(&shared);
        notify::show_status(move || status::line(&shared))
    });
    tasks.spawn({
        let shared = Arc::clone(&shared);
        notify::feed_watchdog(move |deadline| {
            answers(own_port.clone(), Arc::clone(&shared.metrics), deadline)
        })
    });
    tell_started(&settings, connections.registry.all);

    signals
        .reload_until_stopped(&shared, &sources, &level)
        .await;

    telling.abort_all();
    let drain = |serving: &Serving| serving.drain;
    let drain = shared.settings().serving.as_ref().map(drain);
    let status = "stopping: running answers may end";
    if let Some((longest, left)) = shared.fleet.as_ref().and_then(Fleet::leave) {
        leave(longest, left, &mut signals).await;
        // The time that the unit has for a stop may be over by now.
        let rest = drain.unwrap_or_default() + SYNC_DEADLINE + STOP_MARGIN;
        notify::stopping_within(status, rest);
    } else {
        notify::stopping(status);
    }
    stop_sender.send_replace(true);
    if let Some(serving) = serving {
        let deadline = humantime::format_duration(drain.unwrap_or_default());
        tracing::info!(%deadline, "stopping: running answers may end");
        tokio::select! {
            drained = serving => if matches!(drained, Ok(true)) {
                tracing::info!("stopped");
            } else {
                tracing::warn!("stopped: some answers did not end in time and were broken off");
            },
            () = signals.stop() => tracing::warn!("stopped at once, at a second signal"),
        }
    }
    if let Some(mirror) = &shared.mirror {
        sync_downloads(mirror).await;
    }
    tasks.abort_all();
    stop_admin_sender.send_replace(true);
    // Its answers are short; whether one was cut off does not matter any more.
    let _ = admin_serving.await;
    if let Some(path) = admin_path {
        // Another start would remove it as well.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Where the fleet part keeps what outlives the process: in the unit's state folder, which is mostly
/// on another disk than the content; without a unit, beside the content.
fn fleet_folder(sources: &Sources, serving: &Serving) -> PathBuf {
    let of_unit = sources.unit_state_folder();
    of_unit.unwrap_or_else(|| serving.storage.root().to_owned())
}

/// Leaves the fleet, serving all the while, and asks systemd for the time that it takes. A second
/// signal ends it.
async fn leave(longest: Duration, left: impl Future<Output = bool>, signals: &mut Signals) {
    let limit = humantime::format_duration(longest);
    tracing::info!(%limit, "stopping: leaving the fleet first");
    let mut left = std::pin::pin!(left);
    loop {
        notify::stopping_within("stopping: leaving the fleet first", EXTENSION);
        tokio::select! {
            left = &mut left => {
                if left {
                    tracing::info!("the fleet leads here no more");
                } else {
                    tracing::warn!("the fleet was not left in time");
                }
                return;
            }
            () = signals.stop() => {
                tracing::warn!("the fleet is not waited for, at a second signal");
                return;
            }
            () = tokio::time::sleep(EXTENSION / 3) => {}
        }
    }
}

fn tell_started(settings: &Settings, connections: usize) {
    let (version, role) = (env!("CARGO_PKG_VERSION"), settings.role().as_str());
    match &settings.serving {
        Some(serving) => {
            tracing::info!(
                version,
                role,
                listen = %serving.listen,
                tls = serving.tls.is_some(),
                admin = %settings.admin,
                storage = %serving.storage.root().display(),
                connections,
                "started"
            );
        }
        None => tracing::info!(
            version,
            role,
            mirror = %settings.host.mirror,
            admin = %settings.admin,
            "started"
        ),
    }
}

/// Whether the registry answers within the deadline, or is only too busy to: a crowd may have all
/// of its places, and is served. Connections that are refused prove nothing: they are, for ever,
/// while all that was accepted hangs. A client has no registry, and answers by asking.
async fn answers(
    own_port: Option<OwnPort>,
    metrics: Arc<Metrics>,
    deadline: Duration,
) -> Result<(), String> {
    let Some(own_port) = own_port else {
        return Ok(());
    };
    let count = || metrics.served_bytes.get() + metrics.answers.get();
    let before = count();
    match tokio::time::timeout(deadline, own_port.answers()).await {
        Ok(Ok(())) => Ok(()),
        _ if count() > before => Ok(()),
        Ok(answered) => answered,
        Err(_) => Err(format!(
            "no answer within {}",
            humantime::format_duration(deadline)
        )),
    }
}

/// The registry's port, open, with all that answers there.
struct Port {
    listener: TcpListener,
    local: SocketAddr,
    identity: Option<Arc<LiveIdentity>>,
    mirror: Mirror,
    hosted: Hosted,
    gate: Gate,
    own: OwnPort,
}

impl Port {
    async fn open(
        serving: &Serving,
        passed: &mut Passed,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, AgentError> {
        let error = |e| listen_error("listen", serving.listen.to_string(), e);
        let listener = match passed.take_tcp(serving.listen) {
            Some(passed) => TcpListener::from_std(passed),
            None => bind(serving.listen).await,
        };
        let listener = listener.map_err(error)?;
        let identity = serving.tls.as_ref().map(LiveIdentity::new).transpose();
        let identity = identity.map_err(|errors| {
            let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
            AgentError::Tls(errors.join("; "))
        });
        let identity = identity?.map(Arc::new);
        let local = listener.local_addr().map_err(error)?;
        let own = OwnPort::new(local, identity.is_some());
        let own = own.map_err(|error| AgentError::Tls(error.to_string()))?;
        let store = Store::open(serving.storage.root());
        let store = store.map_err(|source| AgentError::Store {
            key: serving.storage.root_key(),
            source,
        })?;
        Hosted::tell(&store, serving);
        let gate = Gate::new().map_err(AgentError::Users)?;
        let users = serving.auth.as_ref().map(|auth| auth.htpasswd.as_path());
        gate.refresh(users)
            .map_err(|error| AgentError::Users(error.to_string()))?;
        let mirror = Mirror::new(serving, store, Arc::clone(metrics));
        Ok(Self {
            listener,
            local,
            identity,
            hosted: Hosted::new(serving, mirror.clone(), Arc::clone(metrics)),
            mirror,
            gate,
            own,
        })
    }

    /// Serves until it is told to stop, and the drain after it: whether every answer ended.
    fn serve(
        self,
        shared: Arc<Shared>,
        connections: Places,
        stop: watch::Receiver<bool>,
    ) -> JoinHandle<bool> {
        let listener = match self.identity {
            Some(identity) => Listener::Tls(self.listener, identity),
            None => Listener::Tcp(self.listener),
        };
        let metrics = Arc::clone(&shared.metrics);
        let registry = Registry::new(
            self.mirror,
            self.hosted,
            self.gate,
            shared.health.clone(),
            Arc::clone(&metrics),
        );
        let limits = {
            let shared = Arc::clone(&shared);
            move || {
                let settings = shared.settings();
                let serving = settings.serving.as_ref();
                // The role stays what it was, so there is always something that is served.
                serving.map_or(ADMIN_LIMITS, |serving| Limits {
                    idle: serving.clients.idle,
                    drain: serving.drain,
                })
            }
        };
        let answer =
            move |request, outbox: Option<&_>| registry.answer(request, outbox, shared.settings());
        let own_port = Some(self.own);
        let serving = server::serve(
            listener,
            connections,
            answer,
            metrics,
            stop,
            limits,
            own_port,
        );
        tokio::spawn(serving)
    }
}

/// Leaves the downloads under way to the next process in a state that it can give to readers.
async fn sync_downloads(mirror: &Mirror) {
    match tokio::time::timeout(SYNC_DEADLINE, mirror.store().sync_fills()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "downloads could not be kept: {error}"),
        Err(_) => tracing::warn!("downloads could not be kept: the disk took too long"),
    }
}

/// Listens on `address`. All interfaces means all that there are: a kernel or container without
/// IPv6 has no `[::]`.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let error = match TcpListener::bind(address).await {
        Ok(listener) => return Ok(listener),
        Err(error) => error,
    };
    let errno = error.raw_os_error().map(Errno::from_raw);
    if address.ip() == Ipv6Addr::UNSPECIFIED
        && matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
    {
        tracing::info!("no IPv6 here: listening on all IPv4 interfaces");
        return TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await;
    }
    Err(error)
}

fn listen_error(key: &'static str, address: String, source: io::Error) -> AgentError {
    AgentError::Listen {
        key,
        address,
        source,
    }
}

/// Removes the uploads that were given up, those of earlier processes at once.
async fn watch_uploads(hosted: Hosted) {
    loop {
        hosted.remove_stale_uploads().await;
        tokio::time::sleep(UPLOADS_INTERVAL).await;
    }
}

/// Takes over a certificate that was renewed, whether or not anybody tells the agent.
async fn watch_certificate(identity: Option<Arc<LiveIdentity>>) {
    let Some(identity) = identity else { return };
    loop {
        tokio::time::sleep(CERTIFICATE_INTERVAL).await;
        let identity = Arc::clone(&identity);
        // It fails only where the process ends.
        let _ = tokio::task::spawn_blocking(move || identity.refresh(None)).await;
    }
}
