//! systemd's manager on the system bus: org.freedesktop.systemd1(5).

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::Mutex;
use tokio::time::Instant;
use zbus::fdo::{PeerProxy, PropertiesProxy};
use zbus::names::InterfaceName;
use zbus::proxy::CacheProperties;
use zbus::{Connection, DBusError, OwnedObjectPath, OwnedVariant};

use crate::host::facts::{EnvironmentFile, UnitFacts};

/// The name under which systemd is on the bus.
const SERVICE: &str = "org.freedesktop.systemd1";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
/// Answering takes systemd milliseconds, unless it reloads or the bus is gone.
const CALL: Duration = Duration::from_secs(25);
/// `Reload()` runs every generator and reads every unit before it answers.
const RELOAD: Duration = Duration::from_secs(90);
/// How long a bus that went away may take to come back, and the time between two looks. A restart of
/// its service takes a tenth of a second, and systemd's return to it about as long.
const RECONNECT: Duration = Duration::from_secs(10);
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// How often a job is looked at whose end was not heard of.
const POLL: Duration = Duration::from_secs(1);

/// What is used of org.freedesktop.systemd1.Manager.
#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
pub(super) trait Systemd {
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    #[zbus(name = "GetUnitByPID")]
    fn get_unit_by_pid(&self, pid: u32) -> zbus::Result<OwnedObjectPath>;
    #[zbus(property)]
    fn system_state(&self) -> zbus::Result<String>;
    fn subscribe(&self) -> zbus::Result<()>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn reload_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn cancel_job(&self, id: u32) -> zbus::Result<()>;
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    fn reload(&self) -> zbus::Result<()>;
    fn enable_unit_files(
        &self,
        files: &[&str],
        runtime: bool,
        force: bool,
    ) -> zbus::Result<(bool, Vec<(String, String, String)>)>;
    fn disable_unit_files(
        &self,
        files: &[&str],
        runtime: bool,
    ) -> zbus::Result<Vec<(String, String, String)>>;
    #[zbus(signal)]
    fn job_removed(
        &self,
        id: u32,
        job: OwnedObjectPath,
        unit: String,
        result: String,
    ) -> zbus::Result<()>;
}

/// systemd did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManagerError {
    /// There is no system bus, or none that lets us in.
    #[error(
        "can't reach systemd on the system bus: {reason}\nUnits can only be read and changed \
         through it. Is it running (`systemctl status dbus.socket`), and is this a host that \
         systemd has booted (not a container)?"
    )]
    NoBus {
        /// What came back.
        reason: String,
    },
    /// systemd said no.
    #[error("systemd refused to {what}: {message} ({name}){hint}", hint = hint(name))]
    Refused {
        /// What it was asked.
        what: String,
        /// The D-Bus error's name.
        name: String,
        /// Its message.
        message: String,
    },
    /// No answer at all.
    #[error(
        "systemd did not answer in {}s when asked to {what}; it may be reloading, or waiting for \
         its disk: `systemctl list-jobs` should answer before this is tried again",
        limit.as_secs()
    )]
    Silent {
        /// What it was asked.
        what: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The connection broke, or an answer could not be understood.
    #[error("can't ask systemd to {what}: {reason}\nIs the bus up? `systemctl status dbus`")]
    Bus {
        /// What it was asked.
        what: String,
        /// What came back.
        reason: String,
    },
}

/// What can be done about a refusal, where that is known.
fn hint(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("AccessDenied" | "InteractiveAuthorizationRequired") => {
            "\nOnly root may do this: run it as root."
        }
        Some("UnitMasked") => "\n`systemctl unmask` it if it is to run.",
        _ => "",
    }
}

/// How a connection is made.
type Connect = dyn Fn() -> BoxFuture<'static, zbus::Result<Connection>> + Send + Sync;

/// A connection to systemd; another one where the bus was restarted. Clones share it.
#[derive(Clone)]
pub struct Manager {
    connection: Arc<Mutex<Connection>>,
    /// None for a connection that is the only one of its kind.
    connect: Option<Arc<Connect>>,
    poll: Duration,
}

impl fmt::Debug for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").finish_non_exhaustive()
    }
}

/// A unit at one moment: the facts, and what only whoever runs a job has to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Moment {
    pub(super) facts: UnitFacts,
    /// The job that is under way; `/` where none is.
    pub(super) job: String,
    /// Whether the conditions held when the unit was last to be started.
    pub(super) condition: bool,
    /// Empty for a unit that does not run, or before systemd 232.
    pub(super) invocation: Vec<u8>,
    /// How often `Restart=` has started it.
    pub(super) restarts: u32,
    /// How the last reload ended; absent before systemd 209 and for what can't be reloaded.
    pub(super) reload_result: Option<String>,
}

impl Manager {
    /// Connects to the system bus.
    pub async fn system() -> Result<Self, ManagerError> {
        Self::by(|| Box::pin(zbus::connection::Builder::system().build())).await
    }

    /// Connects by this, now and whenever the connection is lost.
    pub async fn by(
        connect: impl Fn() -> BoxFuture<'static, zbus::Result<Connection>> + Send + Sync + 'static,
    ) -> Result<Self, ManagerError> {
        let reason = match tokio::time::timeout(CALL, connect()).await {
            Ok(Ok(connection)) => {
                return Ok(Self {
                    connect: Some(Arc::new(connect)),
                    ..Self::new(connection)
                });
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("it did not answer in {}s", CALL.as_secs()),
        };
        Err(ManagerError::NoBus { reason })
    }

    /// Speaks with the systemd at the other end of this connection, as long as that lasts.
    pub fn new(connection: Connection) -> Self {
        Self {
            connection: Arc::new(Mutex::new(connection)),
            connect: None,
            poll: POLL,
        }
    }

    /// Looks every so often at a job whose end was not heard of; once a second if this is not
    /// called.
    #[must_use]
    pub fn poll_every(self, poll: Duration) -> Self {
        Self { poll, ..self }
    }

    /// The unit as systemd has it, loaded now if it was not. One that does not exist is one whose
    /// [`UnitFacts::load_state`] is `not-found`.
    pub async fn unit(&self, name: &str) -> Result<UnitFacts, ManagerError> {
        Ok(self.look(name).await?.facts)
    }

    /// Whether files of the unit were changed since systemd has read them
    /// ([`Manager::daemon_reload`] reads them).
    pub async fn needs_reload(&self, name: &str) -> Result<bool, ManagerError> {
        Ok(self.unit(name).await?.need_daemon_reload)
    }

    /// Forgets that the unit has failed, and how often it was started of late: without it, what
    /// has reached `start-limit-hit` is refused a start. A unit that systemd does not know has
    /// nothing to forget.
    pub async fn reset_failed(&self, unit: &str) -> Result<(), ManagerError> {
        let what = || format!("reset the failed state of {unit}");
        let systemd = self.systemd(what).await?;
        match ask(what, CALL, systemd.reset_failed_unit(unit)).await {
            Err(ManagerError::Refused { name, .. }) if is(&name, "NoSuchUnit") => Ok(()),
            done => done,
        }
    }

    /// Reads all unit files again. The answer comes when it is done, which takes seconds on a large
    /// host.
    pub async fn daemon_reload(&self) -> Result<(), ManagerError> {
        let what = || "reload its units".to_owned();
        let systemd = self.systemd(what).await?;
        ask(what, RELOAD, systemd.reload()).await
    }

    /// Enables the units for the next boot, and says whether that changed anything. It starts
    /// nothing and does not reload: see [`Manager::needs_reload`].
    pub async fn enable(&self, files: &[&str]) -> Result<bool, ManagerError> {
        let what = || format!("enable {}", files.join(", "));
        let systemd = self.systemd(what).await?;
        // Not `force`: a link in the way is somebody's, and for them to remove.
        let (_, changes) = ask(what, CALL, systemd.enable_unit_files(files, false, false)).await?;
        Ok(!changes.is_empty())
    }

    /// Disables the units for the next boot, and says whether that changed anything. It stops
    /// nothing.
    pub async fn disable(&self, files: &[&str]) -> Result<bool, ManagerError> {
        let what = || format!("disable {}", files.join(", "));
        let systemd = self.systemd(what).await?;
        let changes = ask(what, CALL, systemd.disable_unit_files(files, false)).await?;
        Ok(!changes.is_empty())
    }

    /// Whether the whole host is going down (`SystemState`): every unit has a job to stop then, and
    /// one that contradicts it is refused or, worse, holds up the end.
    pub async fn is_shutting_down(&self) -> Result<bool, ManagerError> {
        let what = || "say whether the host is shutting down".to_owned();
        let systemd = self.systemd(what).await?;
        let state = ask(what, CALL, systemd.system_state()).await?;
        Ok(state == "stopping")
    }

    /// Whether the unit that this process belongs to is being stopped: until it has, systemd holds
    /// back the start of every unit that is ordered after it. Nothing that could not be found out is
    /// a reason to think so: by hand, a process belongs to a session's scope.
    pub(super) async fn own_unit_stops(&self) -> bool {
        let what = || "look at the unit of this process".to_owned();
        let state = async {
            let systemd = self.systemd(what).await?;
            // 0 is whoever asks.
            let path = ask(what, CALL, systemd.get_unit_by_pid(0)).await?;
            let properties = self.properties(path, what).await?;
            let state = async {
                let interface = InterfaceName::try_from(UNIT)?;
                Ok(properties.get(interface, "ActiveState").await?)
            };
            ask(what, CALL, state).await
        };
        let state: Result<OwnedVariant, ManagerError> = state.await;
        let state = state.ok().and_then(|state| String::try_from(state).ok());
        state.as_deref() == Some("deactivating")
    }

    async fn properties(
        &self,
        path: OwnedObjectPath,
        what: impl FnOnce() -> String,
    ) -> Result<PropertiesProxy<'static>, ManagerError> {
        let connection = self.connection.lock().await.clone();
        let properties = PropertiesProxy::builder(&connection)
            .destination(SERVICE)
            .path(path)
            .cache_properties(CacheProperties::No)
            .build();
        ask(what, CALL, properties).await
    }

    pub(super) fn poll(&self) -> Duration {
        self.poll
    }

    /// Whether a connection that is lost is made anew.
    pub(super) fn reconnects(&self) -> bool {
        self.connect.is_some()
    }

    /// A connection with systemd at its other end. A restart of the bus ends every connection to it,
    /// and nothing says so until one is used: a job must not be the first to find out, for nobody
    /// knows then whether it was asked for.
    async fn live(&self, what: impl Fn() -> String) -> Result<Connection, ManagerError> {
        let mut connection = self.connection.lock().await;
        let Some(connect) = &self.connect else {
            return Ok(connection.clone());
        };
        let end = Instant::now() + RECONNECT;
        loop {
            let error = match tokio::time::timeout(CALL, ping(&connection)).await {
                Ok(Ok(())) => return Ok(connection.clone()),
                Ok(Err(error)) => error,
                Err(_) => {
                    let (what, limit) = (what(), CALL);
                    return Err(ManagerError::Silent { what, limit });
                }
            };
            let error = refusal(what(), &error);
            if !is_passing(&error) || Instant::now() >= end {
                return Err(error);
            }
            if let Ok(Ok(new)) = tokio::time::timeout_at(end, connect()).await {
                if matches!(error, ManagerError::Bus { .. }) {
                    tracing::info!("the connection to the system bus was lost, and is made anew");
                }
                *connection = new;
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    pub(super) async fn systemd(
        &self,
        what: impl Fn() -> String,
    ) -> Result<SystemdProxy<'static>, ManagerError> {
        let connection = self.live(&what).await?;
        let proxy = SystemdProxy::builder(&connection)
            .cache_properties(CacheProperties::No)
            .build();
        ask(what, CALL, proxy).await
    }

    pub(super) async fn look(&self, name: &str) -> Result<Moment, ManagerError> {
        match self.look_once(name).await {
            // The bus went away between two calls; to look twice does no harm.
            Err(ManagerError::Bus { .. }) if self.reconnects() => self.look_once(name).await,
            looked => looked,
        }
    }

    /// `LoadUnit` and not `GetUnit`, which fails for a unit that is not loaded.
    async fn look_once(&self, name: &str) -> Result<Moment, ManagerError> {
        let what = || format!("look at {name}");
        let systemd = self.systemd(what).await?;
        let path = ask(what, CALL, systemd.load_unit(name)).await?;
        let properties = self.properties(path, what).await?;
        let all = async |interface: String| {
            let interface = InterfaceName::try_from(interface)?;
            Ok(properties.get_all(interface).await?)
        };
        let mut unit = Properties(ask(what, CALL, all(UNIT.to_owned())).await?);
        let id: String = unit.take("Id").unwrap_or_else(|| name.to_owned());
        let load_state: String = unit.take("LoadState").unwrap_or_default();
        // What is not there has only defaults, and systemd takes milliseconds to say them.
        let own = match load_state.as_str() {
            "not-found" => HashMap::new(),
            _ => ask(what, CALL, all(own_interface(&id))).await?,
        };
        let mut own = Properties(own);
        let job: Option<(u32, OwnedObjectPath)> = unit.take("Job");
        let job = job.map_or_else(|| "/".to_owned(), |(_, path)| path.to_string());
        Ok(Moment {
            condition: unit.take("ConditionResult").unwrap_or_default(),
            invocation: unit.take("InvocationID").unwrap_or_default(),
            restarts: own.take("NRestarts").unwrap_or_default(),
            reload_result: own.take("ReloadResult"),
            facts: UnitFacts {
                name: id,
                has_job: job != "/",
                load_state,
                active_state: unit.take("ActiveState").unwrap_or_default(),
                sub_state: unit.take("SubState").unwrap_or_default(),
                result: own.take("Result").unwrap_or_default(),
                unit_file_state: unit.take("UnitFileState").unwrap_or_default(),
                fragment_path: unit.path("FragmentPath"),
                drop_in_paths: unit.paths("DropInPaths"),
                exec_start: own.commands("ExecStart"),
                can_reload: unit.take("CanReload").unwrap_or_default(),
                environment_files: own.environment_files(),
                environment: own.take("Environment").unwrap_or_default(),
                main_pid: own.take("MainPID").unwrap_or_default(),
                need_daemon_reload: unit.take("NeedDaemonReload").unwrap_or_default(),
            },
            job,
        })
    }
}

/// `org.freedesktop.systemd1.Service` for a `.service`, and so on for every kind of unit.
fn own_interface(id: &str) -> String {
    let kind = id.rsplit('.').next().unwrap_or_default();
    let mut letters = kind.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    format!(
        "{SERVICE}.{}",
        first.into_iter().chain(letters).collect::<String>()
    )
}

/// One command of `ExecStart`: the program, its arguments with its own name first, whether it may
/// fail, when it was started and ended by both clocks, and its process and how that ended.
type Command = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

/// The properties of an interface. What an older systemd does not have yet is as absent as what
/// does not apply.
struct Properties(HashMap<String, OwnedVariant>);

impl Properties {
    fn take<T: TryFrom<OwnedVariant>>(&mut self, name: &str) -> Option<T> {
        T::try_from(self.0.remove(name)?).ok()
    }

    fn path(&mut self, name: &str) -> PathBuf {
        PathBuf::from(self.take::<String>(name).unwrap_or_default())
    }

    fn paths(&mut self, name: &str) -> Vec<PathBuf> {
        let paths: Vec<String> = self.take(name).unwrap_or_default();
        paths.into_iter().map(PathBuf::from).collect()
    }

    /// The program is what systemd runs, also where the unit gives it another name (`@`).
    fn commands(&mut self, name: &str) -> Vec<Vec<String>> {
        let commands: Vec<Command> = self.take(name).unwrap_or_default();
        let arguments = |(program, arguments, ..): Command| {
            std::iter::once(program)
                .chain(arguments.into_iter().skip(1))
                .collect()
        };
        commands.into_iter().map(arguments).collect()
    }

    fn environment_files(&mut self) -> Vec<EnvironmentFile> {
        let files: Vec<(String, bool)> = self.take("EnvironmentFiles").unwrap_or_default();
        let file = |(path, optional): (String, bool)| EnvironmentFile {
            path: path.into(),
            optional,
        };
        files.into_iter().map(file).collect()
    }
}

/// Whether a D-Bus error's name is systemd's own one of this kind.
pub(super) fn is(name: &str, kind: &str) -> bool {
    name.strip_prefix(SERVICE)
        .and_then(|rest| rest.strip_prefix('.'))
        == Some(kind)
}

/// Asks systemd's end of the connection for nothing.
async fn ping(connection: &Connection) -> zbus::Result<()> {
    let peer = PeerProxy::builder(connection)
        .destination(SERVICE)
        .path("/org/freedesktop/systemd1")
        .cache_properties(CacheProperties::No)
        .build()
        .await?;
    peer.ping().await
}

/// Whether it may be well in a moment: the bus went away, or systemd has not come back to it.
fn is_passing(error: &ManagerError) -> bool {
    match error {
        ManagerError::Bus { .. } => true,
        ManagerError::Refused { name, .. } => {
            let name = name.strip_prefix("org.freedesktop.DBus.Error.");
            name.is_some_and(|name| {
                matches!(
                    name,
                    "ServiceUnknown" | "NameHasNoOwner" | "NoReply" | "Disconnected"
                ) || name.starts_with("Spawn.")
            })
        }
        ManagerError::NoBus { .. } | ManagerError::Silent { .. } => false,
    }
}

/// Waits for an answer, but not for ever: a manager that hangs must not hang us.
pub(super) async fn ask<T>(
    what: impl FnOnce() -> String,
    limit: Duration,
    answer: impl Future<Output = zbus::Result<T>>,
) -> Result<T, ManagerError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(refusal(what(), &error)),
        Err(_) => Err(ManagerError::Silent {
            what: what(),
            limit,
        }),
    }
}

fn refusal(what: String, error: &zbus::Error) -> ManagerError {
    match error {
        zbus::Error::MethodError(name, message, _) => ManagerError::Refused {
            what,
            name: name.to_string(),
            message: message.clone().unwrap_or_default(),
        },
        zbus::Error::FDO(inner) => match inner.as_ref() {
            zbus::fdo::Error::ZBus(error) => refusal(what, error),
            inner => ManagerError::Refused {
                what,
                name: inner.name().to_string(),
                message: inner.description().unwrap_or_default().to_owned(),
            },
        },
        error => ManagerError::Bus {
            what,
            reason: error.to_string(),
        },
    }
}
