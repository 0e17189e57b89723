//! A systemd that does what the test says, at the other end of a socket pair.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::BoxFuture;
use registry_agent::systemd::Manager;
use tokio::sync::Notify;
use zbus::connection::Builder;
use zbus::object_server::SignalEmitter;
use zbus::{BoxDBusError, Connection, Guid, OwnedObjectPath};

const MANAGER: &str = "/org/freedesktop/systemd1";
const JOB: &str = "/org/freedesktop/systemd1/job/7";
const NONE: &str = "/";
const OWN: &str = "/org/freedesktop/systemd1/unit/own";

pub type Command = (String, Vec<String>, bool, u64, u64, u64, u64, u32, i32, i32);

/// A unit's properties.
#[derive(Debug, Clone)]
pub struct Unit {
    pub id: String,
    pub load_state: String,
    pub active_state: String,
    pub sub_state: String,
    pub result: String,
    pub condition: bool,
    pub invocation: Vec<u8>,
    pub restarts: u32,
    pub reload_result: String,
    pub exec_start: Vec<Command>,
    pub environment_files: Vec<(String, bool)>,
    pub environment: Vec<String>,
    pub main_pid: u32,
    pub need_daemon_reload: bool,
    /// Another name of it.
    pub alias: Option<String>,
    /// Its current job's path.
    pub job: String,
}

impl Unit {
    /// A unit that is loaded and runs.
    pub fn running(id: &str) -> Self {
        Self {
            id: id.into(),
            load_state: "loaded".into(),
            active_state: "active".into(),
            sub_state: "running".into(),
            result: "success".into(),
            condition: true,
            invocation: vec![1; 16],
            restarts: 0,
            reload_result: "success".into(),
            exec_start: Vec::new(),
            environment_files: Vec::new(),
            environment: Vec::new(),
            main_pid: 0,
            need_daemon_reload: false,
            alias: None,
            job: NONE.into(),
        }
    }

    /// The same, run anew.
    pub fn restarted(mut self) -> Self {
        self.invocation = vec![2; 16];
        self
    }

    pub fn state(mut self, active: &str, sub: &str, result: &str) -> Self {
        self.active_state = active.into();
        self.sub_state = sub.into();
        self.result = result.into();
        self
    }
}

/// What becomes of a job.
#[derive(Debug, Clone, Copy)]
pub enum Ending {
    /// The signal comes after the reply.
    Signal(&'static str),
    /// The signal comes before the reply that names the job.
    SignalFirst(&'static str),
    /// The job ends, and nobody hears of it.
    Lost,
    /// The job does not end.
    Never,
    /// There is no job, but an error of this name.
    Refused(&'static str),
}

#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.freedesktop.systemd1")]
enum Refusal {
    #[zbus(error)]
    ZBus(zbus::Error),
    NoSuchUnit(String),
    UnitMasked(String),
    NoSuchJob(String),
    #[zbus(name = "NoUnitForPID")]
    NoUnitForPid(String),
    AlreadySubscribed(String),
}

fn refusal(name: &str) -> BoxDBusError {
    let message = format!("no: {name}");
    match name {
        "NoSuchUnit" => Box::new(Refusal::NoSuchUnit(message)),
        "UnitMasked" => Box::new(Refusal::UnitMasked(message)),
        "NoUnitForPID" => Box::new(Refusal::NoUnitForPid(message)),
        "NoSuchJob" => Box::new(Refusal::NoSuchJob(message)),
        "AlreadySubscribed" => Box::new(Refusal::AlreadySubscribed(message)),
        "AccessDenied" => zbus::fdo::Error::AccessDenied(message).into(),
        name => panic!("the fake does not know {name}"),
    }
}

pub struct State {
    pub units: Vec<Unit>,
    /// What becomes of the next job, and of its unit when it ends.
    pub ending: Ending,
    pub after: Option<Unit>,
    pub cancel: Result<(), &'static str>,
    pub subscribe: Result<(), &'static str>,
    /// What `EnableUnitFiles` and `DisableUnitFiles` say that they have changed.
    pub changes: usize,
    /// The unit of the process that asks.
    pub own: Option<Unit>,
    /// `SystemState`.
    pub whole: String,
    /// What was asked, in its order.
    pub calls: Vec<String>,
}

/// The other ends of all connections.
#[derive(Clone, Default)]
pub struct Bus(Arc<Mutex<Vec<Connection>>>);

impl Bus {
    /// Ends every connection, and says how many there were.
    pub async fn restart(&self) -> usize {
        let connections = std::mem::take(&mut *self.0.lock().unwrap());
        let count = connections.len();
        for connection in connections {
            connection.close().await.unwrap();
        }
        count
    }
}

/// The test's hand on it.
#[derive(Clone)]
pub struct Systemd {
    state: Arc<Mutex<State>>,
    asked: Arc<Notify>,
}

impl Systemd {
    /// It knows these units, and its jobs are done.
    pub async fn with(units: Vec<Unit>) -> (Self, Manager, Connection) {
        let systemd = Self::new(units);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let client = Builder::unix_stream(ours).p2p();
        let (server, client) = tokio::join!(systemd.serve(theirs), client.build());
        let manager = Manager::new(client.unwrap()).poll_every(Duration::from_millis(5));
        (systemd, manager, server)
    }

    /// The same behind a bus that may be restarted, which ends its connections.
    pub async fn with_bus(units: Vec<Unit>) -> (Self, Manager, Bus) {
        let (systemd, bus) = (Self::new(units), Bus::default());
        let (there, connections) = (systemd.clone(), bus.clone());
        let connect = move || -> BoxFuture<'static, zbus::Result<Connection>> {
            let (there, connections) = (there.clone(), connections.clone());
            Box::pin(async move {
                let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
                let client = Builder::unix_stream(ours).p2p();
                let (server, client) = tokio::join!(there.serve(theirs), client.build());
                connections.0.lock().unwrap().push(server);
                client
            })
        };
        let manager = Manager::by(connect).await.unwrap();
        (systemd, manager.poll_every(Duration::from_millis(5)), bus)
    }

    fn new(units: Vec<Unit>) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                units,
                ending: Ending::Signal("done"),
                after: None,
                cancel: Ok(()),
                subscribe: Ok(()),
                changes: 0,
                own: None,
                whole: "running".into(),
                calls: Vec::new(),
            })),
            asked: Arc::default(),
        }
    }

    /// The other end of a connection.
    async fn serve(&self, stream: std::os::unix::net::UnixStream) -> Connection {
        let mut builder = Builder::unix_stream(stream)
            .server(Guid::generate())
            .p2p()
            .serve_at(MANAGER, FakeManager(self.clone()));
        let units = self.state().units.clone();
        for (index, unit) in units.iter().enumerate() {
            let path = path(index);
            builder = builder
                .serve_at(path.clone(), FakeUnit(self.clone(), index))
                .serve_at(path.clone(), Properties(self.clone(), index));
            assert!(unit.id.ends_with(".service"));
        }
        let builder = builder.serve_at(OWN, OwnUnit(self.clone()));
        builder.build().await.unwrap()
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Comes when somebody has asked for a job.
    pub async fn asked(&self) {
        self.asked.notified().await;
    }

    /// The calls but those that only look.
    pub fn changes(&self) -> Vec<String> {
        let looks = |call: &&String| !call.starts_with("LoadUnit");
        self.state().calls.iter().filter(looks).cloned().collect()
    }

    fn unit(&self, index: usize) -> Unit {
        self.state().units[index].clone()
    }

    /// The unit is what its job has made of it.
    fn settle(&self, index: usize) {
        let mut state = self.state();
        if let Some(after) = state.after.clone() {
            let job = std::mem::take(&mut state.units[index].job);
            state.units[index] = Unit { job, ..after };
        }
    }

    /// As systemd does it: who sees that the job is gone has been sent the signal.
    async fn end(
        &self,
        index: usize,
        result: &str,
        emitter: &SignalEmitter<'_>,
    ) -> zbus::Result<()> {
        self.settle(index);
        let unit = self.unit(index).id;
        FakeManager::job_removed(emitter, 7, path_of("job/7"), &unit, result).await?;
        self.state().units[index].job = NONE.into();
        Ok(())
    }

    async fn job(
        &self,
        verb: &str,
        name: &str,
        mode: &str,
        emitter: &SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, BoxDBusError> {
        let (ending, index) = {
            let mut state = self.state();
            state.calls.push(format!("{verb} {name} {mode}"));
            let index = state.units.iter().position(|unit| unit.id == name);
            (state.ending, index)
        };
        let Some(index) = index else {
            return Err(refusal("NoSuchUnit"));
        };
        if let Ending::Refused(name) = ending {
            return Err(refusal(name));
        }
        self.state().units[index].job = JOB.into();
        // Somebody else's job for the same unit: it is not ours that has ended.
        FakeManager::job_removed(emitter, 6, path_of("job/6"), name, "failed").await?;
        match ending {
            Ending::SignalFirst(result) => self.end(index, result, emitter).await?,
            Ending::Signal(result) => {
                let (systemd, emitter) = (self.clone(), emitter.to_owned());
                tokio::spawn(async move { systemd.end(index, result, &emitter).await });
            }
            Ending::Lost => {
                self.settle(index);
                self.state().units[index].job = NONE.into();
            }
            Ending::Never | Ending::Refused(_) => {}
        }
        self.asked.notify_one();
        Ok(path_of("job/7"))
    }
}

fn path(index: usize) -> String {
    format!("{MANAGER}/unit/u{index}")
}

fn path_of(rest: &str) -> OwnedObjectPath {
    OwnedObjectPath::try_from(format!("{MANAGER}/{rest}")).unwrap()
}

struct FakeManager(Systemd);

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl FakeManager {
    fn load_unit(&self, name: &str) -> Result<OwnedObjectPath, BoxDBusError> {
        let mut state = self.0.state();
        state.calls.push(format!("LoadUnit {name}"));
        let called = |unit: &Unit| unit.id == name || unit.alias.as_deref() == Some(name);
        match state.units.iter().position(called) {
            Some(index) => Ok(OwnedObjectPath::try_from(path(index)).unwrap()),
            None => Err(refusal("NoSuchUnit")),
        }
    }

    #[zbus(name = "GetUnitByPID")]
    fn get_unit_by_pid(&self, pid: u32) -> Result<OwnedObjectPath, BoxDBusError> {
        assert_eq!(pid, 0, "whoever asks");
        match &self.0.state().own {
            Some(_) => Ok(OwnedObjectPath::try_from(OWN).unwrap()),
            None => Err(refusal("NoUnitForPID")),
        }
    }

    #[zbus(property)]
    fn system_state(&self) -> String {
        self.0.state().whole.clone()
    }

    fn subscribe(&self) -> Result<(), BoxDBusError> {
        let mut state = self.0.state();
        state.calls.push("Subscribe".into());
        state.subscribe.map_err(refusal)
    }

    async fn start_unit(
        &self,
        name: &str,
        mode: &str,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, BoxDBusError> {
        self.0.job("StartUnit", name, mode, &emitter).await
    }

    async fn stop_unit(
        &self,
        name: &str,
        mode: &str,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, BoxDBusError> {
        self.0.job("StopUnit", name, mode, &emitter).await
    }

    async fn restart_unit(
        &self,
        name: &str,
        mode: &str,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, BoxDBusError> {
        self.0.job("RestartUnit", name, mode, &emitter).await
    }

    async fn reload_unit(
        &self,
        name: &str,
        mode: &str,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
    ) -> Result<OwnedObjectPath, BoxDBusError> {
        self.0.job("ReloadUnit", name, mode, &emitter).await
    }

    fn cancel_job(&self, id: u32) -> Result<(), BoxDBusError> {
        let mut state = self.0.state();
        state.calls.push(format!("CancelJob {id}"));
        state.cancel.map_err(refusal)
    }

    fn reset_failed_unit(&self, name: &str) -> Result<(), BoxDBusError> {
        let mut state = self.0.state();
        state.calls.push(format!("ResetFailedUnit {name}"));
        if state.units.iter().any(|unit| unit.id == name) {
            Ok(())
        } else {
            Err(refusal("NoSuchUnit"))
        }
    }

    fn reload(&self) {
        let mut state = self.0.state();
        state.calls.push("Reload".into());
        for unit in &mut state.units {
            unit.need_daemon_reload = false;
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "what D-Bus sends is owned")]
    fn enable_unit_files(
        &self,
        files: Vec<String>,
        runtime: bool,
        force: bool,
    ) -> (bool, Vec<(String, String, String)>) {
        let mut state = self.0.state();
        let call = format!("EnableUnitFiles {files:?} {runtime} {force}");
        state.calls.push(call);
        (true, vec![Default::default(); state.changes])
    }

    #[expect(clippy::needless_pass_by_value, reason = "what D-Bus sends is owned")]
    fn disable_unit_files(
        &self,
        files: Vec<String>,
        runtime: bool,
    ) -> Vec<(String, String, String)> {
        let mut state = self.0.state();
        state
            .calls
            .push(format!("DisableUnitFiles {files:?} {runtime}"));
        vec![Default::default(); state.changes]
    }

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: OwnedObjectPath,
        unit: &str,
        result: &str,
    ) -> zbus::Result<()>;
}

/// What is asked of the unit of the process itself.
struct OwnUnit(Systemd);

#[zbus::interface(name = "org.freedesktop.systemd1.Unit")]
impl OwnUnit {
    #[zbus(property)]
    fn active_state(&self) -> String {
        let own = self.0.state().own.clone();
        own.map(|own| own.active_state).unwrap_or_default()
    }
}

struct FakeUnit(Systemd, usize);

#[zbus::interface(name = "org.freedesktop.systemd1.Unit")]
impl FakeUnit {
    #[zbus(property)]
    fn id(&self) -> String {
        self.0.unit(self.1).id
    }

    #[zbus(property)]
    fn load_state(&self) -> String {
        self.0.unit(self.1).load_state
    }

    #[zbus(property)]
    fn active_state(&self) -> String {
        self.0.unit(self.1).active_state
    }

    #[zbus(property)]
    fn sub_state(&self) -> String {
        self.0.unit(self.1).sub_state
    }

    #[zbus(property)]
    fn unit_file_state(&self) -> String {
        "enabled".into()
    }

    #[zbus(property)]
    fn fragment_path(&self) -> String {
        format!("/lib/systemd/system/{}", self.0.unit(self.1).id)
    }

    #[zbus(property)]
    fn drop_in_paths(&self) -> Vec<String> {
        let id = self.0.unit(self.1).id;
        vec![format!("/etc/systemd/system/{id}.d/10-flags.conf")]
    }

    #[zbus(property)]
    fn can_reload(&self) -> bool {
        true
    }

    #[zbus(property)]
    fn need_daemon_reload(&self) -> bool {
        self.0.unit(self.1).need_daemon_reload
    }

    #[zbus(property)]
    fn condition_result(&self) -> bool {
        self.0.unit(self.1).condition
    }

    #[zbus(property, name = "InvocationID")]
    fn invocation_id(&self) -> Vec<u8> {
        self.0.unit(self.1).invocation
    }

    #[zbus(property)]
    fn job(&self) -> (u32, OwnedObjectPath) {
        let job = self.0.unit(self.1).job;
        let id = if job == NONE { 0 } else { 7 };
        (id, OwnedObjectPath::try_from(job).unwrap())
    }
}

struct Properties(Systemd, usize);

#[zbus::interface(name = "org.freedesktop.systemd1.Service")]
impl Properties {
    #[zbus(property)]
    fn result(&self) -> String {
        self.0.unit(self.1).result
    }

    #[zbus(property)]
    fn reload_result(&self) -> String {
        self.0.unit(self.1).reload_result
    }

    #[zbus(property, name = "NRestarts")]
    fn n_restarts(&self) -> u32 {
        self.0.unit(self.1).restarts
    }

    #[zbus(property)]
    fn exec_start(&self) -> Vec<Command> {
        self.0.unit(self.1).exec_start
    }

    #[zbus(property)]
    fn environment_files(&self) -> Vec<(String, bool)> {
        self.0.unit(self.1).environment_files
    }

    #[zbus(property)]
    fn environment(&self) -> Vec<String> {
        self.0.unit(self.1).environment
    }

    #[zbus(property, name = "MainPID")]
    fn main_pid(&self) -> u32 {
        self.0.unit(self.1).main_pid
    }
}
