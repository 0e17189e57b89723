//! `registry-agent run`, put together: listen, serve, reload, drain.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::config::{self, AdminAddress, Loaded, Settings, Sources, Storage};
use crate::descriptors::Connections;
use crate::health::{self, Health, HealthWatch};
use crate::log::LevelHandle;
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::registry::Registry;
use crate::registry::server::{self, Limits, Listener};
use crate::store::{Store, StoreError};
use crate::tls::LiveIdentity;
use crate::{admin, status};

/// How often the status line is brought up to date, where systemd shows it.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked whether the certificate's files have changed.
const CERTIFICATE_INTERVAL: Duration = Duration::from_mins(1);
/// How long the disk may take at the end for downloads that are not complete. The service manager
/// waits for longer than this and a drain.
const SYNC_DEADLINE: Duration = Duration::from_secs(10);
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
    #[error("can't use the storage (`storage.filesystem.root`): {0}")]
    Store(#[from] StoreError),
    /// The process can't be set up.
    #[error("can't handle signals: {0}")]
    Signals(#[from] io::Error),
}

/// What the parts of a running agent share.
pub struct Shared {
    settings: RwLock<Arc<Settings>>,
    /// What clients are shown, where the registry speaks TLS.
    identity: Option<Arc<LiveIdentity>>,
    /// The mirror.
    pub mirror: Mirror,
    /// How the agent is.
    pub health: HealthWatch,
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
pub async fn run(loaded: Loaded, sources: Sources, level: LevelHandle) -> Result<(), AgentError> {
    let settings = Arc::new(loaded.settings);
    // Before anything is opened, so that no signal finds us without a handler.
    let mut signals = Signals::new()?;
    let connections = Connections::with_all_descriptors();
    let listener = bind(settings.listen).await;
    let listener = listener.map_err(|e| listen_error("listen", settings.listen.to_string(), e))?;
    let identity = settings.tls.as_ref().map(LiveIdentity::new).transpose();
    let identity = identity.map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        AgentError::Tls(errors.join("; "))
    });
    let identity = identity?.map(Arc::new);
    let Storage::Filesystem { root } = &settings.storage;
    let store = Store::open(root)?;
    let metrics = Arc::new(Metrics::default());
    let mirror = Mirror::new(&settings, store.clone(), Arc::clone(&metrics));
    let (health_sender, health) = watch::channel(Health::starting());
    let shared = Arc::new(Shared {
        settings: RwLock::new(Arc::clone(&settings)),
        identity: identity.clone(),
        mirror: mirror.clone(),
        health: health.clone(),
        metrics: Arc::clone(&metrics),
        started: Instant::now(),
    });
    // After the store's lock: of two agents on one root, the second must not take this socket.
    let admin = admin::listen(&settings.admin).await;
    let admin = admin.map_err(|e| listen_error("admin", settings.admin.to_string(), e))?;

    let (stop_sender, stop) = watch::channel(false);
    let (stop_admin_sender, stop_admin) = watch::channel(false);
    let limits = {
        let shared = Arc::clone(&shared);
        move || {
            let settings = shared.settings();
            Limits {
                idle: settings.clients.idle,
                drain: settings.drain,
            }
        }
    };
    let listener = match identity.clone() {
        Some(identity) => Listener::Tls(listener, identity),
        None => Listener::Tcp(listener),
    };
    let registry = Registry::new(mirror, health.clone(), Arc::clone(&metrics));
    let serving = tokio::spawn(server::serve(
        listener,
        connections.registry,
        {
            let shared = Arc::clone(&shared);
            move |request, outbox| registry.answer(request, outbox, shared.settings())
        },
        Arc::clone(&metrics),
        stop,
        limits,
    ));
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
    ));
    let probing = tokio::spawn(health::watch(
        store,
        {
            let shared = Arc::clone(&shared);
            move || shared.settings().health
        },
        health_sender,
        metrics,
    ));
    let looking_after = tokio::spawn(shared.mirror.clone().look_after_cache({
        let shared = Arc::clone(&shared);
        move || shared.settings().health.interval
    }));
    let telling = tokio::spawn(tell_systemd(Arc::clone(&shared)));
    let watching = tokio::spawn(watch_certificate(identity));
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        role = settings.role.as_str(),
        listen = %settings.listen,
        tls = settings.tls.is_some(),
        admin = %settings.admin,
        storage = %root.display(),
        connections = connections.registry.all,
        "started"
    );

    signals
        .reload_until_stopped(&shared, &sources, &level)
        .await;

    let deadline = shared.settings().drain;
    tracing::info!(deadline = %humantime::format_duration(deadline), "stopping: running answers may end");
    telling.abort();
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status("stopping: running answers may end"),
    ]);
    stop_sender.send_replace(true);
    tokio::select! {
        drained = serving => if matches!(drained, Ok(true)) {
            tracing::info!("stopped");
        } else {
            tracing::warn!("stopped: some answers did not end in time and were broken off");
        },
        () = signals.stop() => tracing::warn!("stopped at once, at a second signal"),
    }
    sync_downloads(&shared).await;
    probing.abort();
    looking_after.abort();
    watching.abort();
    stop_admin_sender.send_replace(true);
    // Its answers are short; whether one was cut off does not matter any more.
    let _ = admin_serving.await;
    if let AdminAddress::Unix(path) = &settings.admin {
        // Another start would remove it as well.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Leaves the downloads under way to the next process in a state that it can give to readers.
async fn sync_downloads(shared: &Shared) {
    match tokio::time::timeout(SYNC_DEADLINE, shared.mirror.store().sync_fills()).await {
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

/// The signals that the agent acts on.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Reloads at every SIGHUP until it is time to stop.
    async fn reload_until_stopped(
        &mut self,
        shared: &Shared,
        sources: &Sources,
        level: &LevelHandle,
    ) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => reload(shared, sources, level),
            }
        }
    }
}

/// Reads the configuration again. A broken one changes nothing.
fn reload(shared: &Shared, sources: &Sources, level: &LevelHandle) {
    let loaded = match config::load(sources) {
        Ok(loaded) => loaded,
        Err(errors) => {
            tracing::error!(%errors, "the configuration is broken: the one before stays in force: {errors}");
            return;
        }
    };
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let (before, mut after) = (shared.settings(), loaded.settings);
    let fixed = [
        ("role", before.role != after.role),
        ("listen", before.listen != after.listen),
        ("admin", before.admin != after.admin),
        ("tls", before.tls.is_some() != after.tls.is_some()),
        ("storage", before.storage != after.storage),
        ("log.format", before.log.format != after.log.format),
        ("log.fields", before.log.fields != after.log.fields),
    ];
    for (key, changed) in fixed {
        if changed {
            tracing::warn!(
                key,
                "this key has changed, which takes effect at the next start"
            );
        }
    }
    // What is shown must be what is in force.
    after.role = before.role;
    after.listen = before.listen;
    after.admin.clone_from(&before.admin);
    after.storage.clone_from(&before.storage);
    if before.tls.is_some() != after.tls.is_some() {
        after.tls.clone_from(&before.tls);
    }
    if let Some(identity) = &shared.identity {
        identity.refresh(after.tls.as_ref());
    }
    after.log.format = before.log.format;
    after.log.fields.clone_from(&before.log.fields);
    level.set(after.log.level);
    shared.mirror.reload(&after);
    *shared
        .settings
        .write()
        .unwrap_or_else(PoisonError::into_inner) = Arc::new(after);
    tracing::info!("reloaded");
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

/// Tells systemd when the agent is ready, and then what it does. Without systemd it does nothing.
async fn tell_systemd(shared: Arc<Shared>) {
    let mut health = shared.health.clone();
    if health.wait_for(|health| health.ready).await.is_ok() {
        notify(&[NotifyState::Ready]);
    }
    let mut told = String::new();
    loop {
        let line = {
            let health = shared.health.borrow().clone();
            status::line(&shared.settings(), &shared.mirror, &health, &shared.metrics)
        };
        if line != told {
            notify(&[NotifyState::Status(&line)]);
            told = line;
        }
        tokio::time::sleep(STATUS_INTERVAL).await;
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be told: {error}");
    }
}
