//! An AWS account of the tests, on the wire: autoscaling, load balancing, Route 53 and the metadata
//! service of each instance, with a clock that a test turns and faults that it orders.
//!
//! - `group`, `elb` and `route53` are what goes on by itself: hooks hold instances, targets drain,
//!   changes become known. `world` puts them side by side, and moves them through time.
//! - `autoscaling`, and the lower halves of `elb` and `route53`, are the calls, in the XML that SDKs
//!   speak; `wire` and `xml` are the letters. A parameter that is not known is refused.
//! - `checks` are the load balancer's own requests to targets, and `dns` is the zones' name server.
//! - `imds` is the metadata service, on a port of its own for each instance.
//! - `front` serves all of it, and `faults` is what happens to calls on their way, and what was called by whom.
//!
//! Calls of an instance are known by the credentials that its metadata service gave it.
#![allow(
    dead_code,
    unused_imports,
    reason = "every test target uses a part of it"
)]

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

mod autoscaling;
mod checks;
mod clock;
mod dns;
mod elb;
mod faults;
mod front;
mod group;
mod imds;
mod route53;
mod wire;
mod world;
mod xml;

pub use elb::TargetGroup;
pub use faults::{Called, Fault};
pub use group::{Group, Phase, Transition};
pub use imds::access_key;
pub use route53::Zone;
pub use wire::{ApiError, Service};
pub use world::{Deed, World};

use clock::Clock;
use faults::Faults;
use front::{keep_checking, serve, tick};
use wire::Signed;

/// How far back reads can be stale.
const HISTORY: Duration = Duration::from_mins(10);
/// So many states are kept for them at most.
const STATES: usize = 400;

/// How a control plane is to be.
#[must_use]
pub struct Options {
    address: IpAddr,
    region: String,
    runs: bool,
    addresses: fn(u32) -> IpAddr,
}

impl Options {
    /// Listens there, and not on the loopback address: for hosts behind a bridge.
    pub fn listen(mut self, address: IpAddr) -> Self {
        self.address = address;
        self
    }

    /// Its clock goes by itself as well, for agents whose timers are real.
    pub fn real_time(mut self) -> Self {
        self.runs = true;
        self
    }

    /// It is in this region.
    pub fn region(mut self, region: &str) -> Self {
        region.clone_into(&mut self.region);
        self
    }

    /// Instances have these addresses, by their number from 1 on.
    pub fn addresses(mut self, addresses: fn(u32) -> IpAddr) -> Self {
        self.addresses = addresses;
        self
    }

    pub fn start(self) -> ControlPlane {
        ControlPlane::with(self)
    }
}

/// All that is behind the lock.
pub struct State {
    clock: Clock,
    pub world: World,
    pub faults: Faults,
    pub region: String,
    tokens: Vec<imds::Token>,
    /// What was, the newest last.
    history: VecDeque<World>,
    metadata: BTreeMap<String, (SocketAddr, JoinHandle<()>)>,
}

impl State {
    /// Lets everything happen that is due, and remembers it for stale reads.
    fn settle(&mut self) {
        let now = self.clock.now();
        let history = &mut self.history;
        self.world
            .settle(now, |world| history.push_back(world.clone()));
        self.forget();
    }

    fn remember(&mut self) {
        self.history.push_back(self.world.clone());
        self.forget();
    }

    fn forget(&mut self) {
        let old = self.world.rest.now.saturating_sub(HISTORY);
        while self.history.len() > STATES
            || self.history.len() > 1 && self.history[1].rest.now < old
        {
            self.history.pop_front();
        }
    }

    /// The account as it was so long ago, or as it was at the beginning.
    fn ago(&self, age: Duration) -> World {
        let at = self.world.rest.now.saturating_sub(age);
        let known = self.history.iter().rev().find(|world| world.rest.now <= at);
        let mut world = known
            .or(self.history.front())
            .unwrap_or(&self.world)
            .clone();
        world.settle(at, |_| ());
        world
    }

    /// Who has these credentials: an instance, or somebody else by the access key.
    fn caller(&self, signed: &Signed) -> Result<String, ApiError> {
        let mut instances = self.world.rest.instances.keys();
        let Some(id) = instances.find(|id| access_key(id) == signed.access_key) else {
            return Ok(signed.access_key.clone());
        };
        if signed.session_token.as_deref() != Some(&imds::session_token(id)) {
            let what = "The security token included in the request is invalid.";
            return Err(ApiError::new(403, "InvalidClientTokenId", what));
        }
        Ok(id.clone())
    }
}

struct Core {
    state: Mutex<State>,
    options: Options,
    handle: tokio::runtime::Handle,
    deeds: Mutex<Option<Sender<Deed>>>,
}

/// The account, and its front.
pub struct ControlPlane {
    core: Arc<Core>,
    address: SocketAddr,
    _runtime: Runtime,
}

impl ControlPlane {
    /// One on the loopback address whose clock stands still until it is turned.
    pub fn start() -> Self {
        Self::options().start()
    }

    pub fn options() -> Options {
        Options {
            address: Ipv4Addr::LOCALHOST.into(),
            region: "us-east-1".to_owned(),
            runs: false,
            addresses: |number| Ipv4Addr::from_bits(0x0a00_0000 + number).into(),
        }
    }

    fn with(options: Options) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let clock = Clock::new(options.runs);
        let world = World::new(clock.origin, options.addresses);
        let state = State {
            history: VecDeque::from([world.clone()]),
            clock,
            world,
            faults: Faults::default(),
            region: options.region.clone(),
            tokens: Vec::new(),
            metadata: BTreeMap::new(),
        };
        let runs = options.runs;
        let (listener, address) = listen(options.address);
        let core = Arc::new(Core {
            state: Mutex::new(state),
            options,
            handle: runtime.handle().clone(),
            deeds: Mutex::new(None),
        });
        runtime.spawn(serve(listener, Arc::clone(&core), None));
        if runs {
            runtime.spawn(tick(Arc::clone(&core)));
            runtime.spawn(keep_checking(Arc::clone(&core)));
        }
        Self {
            core,
            address,
            _runtime: runtime,
        }
    }

    /// Where all APIs are: what `AWS_ENDPOINT_URL` is to say.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers queries for names of its zones on this address, and says where: with port 0, on a
    /// port that is free.
    pub fn serve_names(&self, address: SocketAddr) -> SocketAddr {
        let socket = UdpSocket::bind(address).expect("an address to answer queries on");
        socket
            .set_nonblocking(true)
            .expect("a socket that does not block");
        let address = socket.local_addr().expect("its address");
        let core = Arc::clone(&self.core);
        self.core.handle.spawn(dns::serve(socket, core));
        address
    }

    /// Checks all targets by real requests now, where their group has a path for that. A clock that
    /// goes by itself does so every second.
    pub fn check_targets(&self) {
        let core = &self.core;
        core.handle.block_on(checks::check(core));
    }

    /// Where an instance finds its metadata service: what `AWS_EC2_METADATA_SERVICE_ENDPOINT` is to
    /// say on its host.
    pub fn metadata_url(&self, instance: &str) -> String {
        let state = self.core.lock();
        let (address, _) = state.metadata.get(instance).expect("an instance that runs");
        format!("http://{address}")
    }

    /// What is done to hosts from now on, in its order.
    pub fn deeds(&self) -> Receiver<Deed> {
        let (sender, receiver) = channel();
        *self.core.deeds.lock().expect("the deeds") = Some(sender);
        receiver
    }

    /// Has this done for each deed from now on, in a thread of its own, until the control plane is
    /// dropped.
    pub fn drive(
        &self,
        mut driver: impl FnMut(Deed) + Send + 'static,
    ) -> std::thread::JoinHandle<()> {
        let deeds = self.deeds();
        std::thread::spawn(move || deeds.into_iter().for_each(&mut driver))
    }

    /// Since the clock's zero.
    pub fn now(&self) -> Duration {
        self.core.lock().world.rest.now
    }

    /// Turns the clock, through everything that happens on the way.
    pub fn advance(&self, by: Duration) {
        self.core.change(|state| state.clock.turn(by));
    }

    /// Changes the account by hand, or looks at it.
    pub fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        self.core.change(|state| change(&mut state.world))
    }

    /// Orders faults.
    pub fn faults<T>(&self, change: impl FnOnce(&mut Faults) -> T) -> T {
        change(&mut self.core.lock().faults)
    }

    pub fn add_group(&self, group: Group) {
        self.change(|world| world.groups.insert(group.name.clone(), group));
    }

    /// Adds it, and says its ARN.
    pub fn add_targets(&self, targets: TargetGroup) -> String {
        let arn = targets.arn();
        self.change(|world| world.rest.targets.insert(arn.clone(), targets));
        arn
    }

    pub fn add_zone(&self, id: &str, name: &str) {
        let zone = Zone::new(id, name);
        self.change(|world| world.rest.zones.insert(id.to_owned(), zone));
    }

    /// Somebody starts an instance by hand, outside of all groups.
    pub fn start_instance(&self) -> String {
        self.change(|world| world.rest.launch("us-east-1a".to_owned(), ""))
    }

    /// The instances of a group and where they are, in the order of their launch.
    pub fn members(&self, group: &str) -> Vec<(String, Phase)> {
        self.change(|world| {
            let members = world.groups[group].members.iter();
            members
                .map(|(id, member)| (id.clone(), member.phase))
                .collect()
        })
    }

    /// Where an instance is; absent, when its group has it no more.
    pub fn phase(&self, group: &str, instance: &str) -> Option<Phase> {
        let members = self.members(group);
        members
            .into_iter()
            .find(|(id, _)| id == instance)
            .map(|(_, phase)| phase)
    }

    /// Calls an operation of autoscaling as a person would, by parameters as they are on the wire
    /// (`AutoScalingGroupName=mirrors&InstanceIds.member.1=i-1`).
    pub fn operate(&self, operation: &str, parameters: &str) {
        let parameters = wire::Params::parse(parameters.as_bytes());
        let done = self.change(|world| autoscaling::answer(world, operation, &parameters));
        done.unwrap_or_else(|error| panic!("{operation}: {error}"));
    }

    /// The addresses that all servers of a zone answer with for a name.
    pub fn served(&self, zone: &str, name: &str) -> Vec<IpAddr> {
        self.change(|world| {
            let now = world.rest.now;
            let zone = &world.rest.zones[zone];
            let kinds = ["A", "AAAA"].into_iter();
            let found = kinds.flat_map(|kind| zone.answers(name, kind, now));
            found.map(|(address, _)| address).collect()
        })
    }

    /// Scales, as a person or a policy would.
    pub fn scale(&self, group: &str, desired: u32) {
        self.change(|world| world.groups.get_mut(group).expect("the group").desired = desired);
    }

    /// EC2 will take an instance back so soon, and says so.
    pub fn interrupt(&self, instance: &str, notice: Duration) {
        self.change(|world| {
            let at = world.rest.now + notice;
            world.rest.instances.get_mut(instance).expect("it").spot = Some(at);
        });
    }

    /// A host dies, and nobody says so.
    pub fn crash(&self, instance: &str) {
        self.change(|world| {
            let now = world.rest.now;
            world.rest.instances.get_mut(instance).expect("it").died = Some(now);
            for targets in world.rest.targets.values_mut() {
                targets.says_all(instance, false, now);
            }
        });
    }

    /// How the health checks of a target end from now on.
    pub fn target_passes(&self, target: &str, passes: bool) {
        self.change(|world| {
            let now = world.rest.now;
            for targets in world.rest.targets.values_mut() {
                targets.says_all(target, passes, now);
            }
        });
    }

    /// All sessions of the metadata services end.
    pub fn forget_tokens(&self) {
        self.core.lock().tokens.clear();
    }

    /// The calls of an operation so far.
    pub fn calls(&self, operation: &str) -> Vec<Called> {
        let state = self.core.lock();
        let calls = state.faults.calls.iter();
        calls
            .filter(|it| it.operation == operation)
            .cloned()
            .collect()
    }

    /// All calls so far, those to metadata services among them.
    pub fn all_calls(&self) -> Vec<Called> {
        self.core.lock().faults.calls.clone()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // The driver's thread ends with its channel.
        *self.core.deeds.lock().expect("the deeds") = None;
    }
}

fn listen(address: IpAddr) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((address, 0)).expect("an address to listen on");
    listener
        .set_nonblocking(true)
        .expect("a socket that does not block");
    let address = listener.local_addr().expect("its address");
    (listener, address)
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state")
    }

    fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        state.settle();
        let result = change(&mut state);
        state.remember();
        state.settle();
        self.carry_out(&mut state);
        result
    }

    /// Starts and ends metadata services, and tells whoever plays EC2.
    fn carry_out(self: &Arc<Self>, state: &mut State) {
        for mut deed in std::mem::take(&mut state.world.rest.deeds) {
            match &mut deed {
                Deed::Launched { id, metadata, .. } => {
                    let (listener, address) = listen(self.options.address);
                    let served = serve(listener, Arc::clone(self), Some(id.clone()));
                    *metadata = address;
                    let task = self.handle.spawn(served);
                    state.metadata.insert(id.clone(), (address, task));
                }
                Deed::Terminated { id } => {
                    if let Some((_, task)) = state.metadata.remove(id) {
                        task.abort();
                    }
                }
            }
            if let Some(deeds) = &*self.deeds.lock().expect("the deeds") {
                // Nobody may be listening any more.
                let _ = deeds.send(deed);
            }
        }
    }
}
