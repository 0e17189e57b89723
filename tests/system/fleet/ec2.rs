//! EC2, as far as hosts can tell: an instance that the group launches is booted, and one that it
//! terminates is killed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::control_plane::{ControlPlane, Deed};
use crate::harness::{Agent, Host, Hub, Network};

/// What an instance is launched from.
pub struct Template {
    /// Where it is plugged in.
    pub network: Arc<Network>,
    /// The registry that it mirrors.
    pub hub: Arc<Mutex<Hub>>,
    /// The agent's configuration.
    pub config: String,
    /// Megabytes of a file system that has nothing but the agent's images; on the host's own disk
    /// without.
    pub disk: Option<u32>,
    /// Where the account's APIs are.
    pub endpoint: String,
}

/// The hosts of an account.
pub struct Ec2 {
    driver: Option<JoinHandle<()>>,
    hosts: Arc<Hosts>,
}

struct Hosts {
    template: Template,
    running: Mutex<BTreeMap<String, Running>>,
}

/// A host, from its launch on. It is locked while it boots.
struct Running {
    host: Arc<Mutex<Option<Host>>>,
    /// The thread that has booted it stays until this is dropped: systemd-nspawn ends with it.
    until: Sender<()>,
    thread: JoinHandle<()>,
}

impl Ec2 {
    /// Does from now on what the account says, until the account is dropped.
    pub fn of(plane: &ControlPlane, template: Template) -> Self {
        let hosts = Arc::new(Hosts {
            template,
            running: Mutex::default(),
        });
        let theirs = Arc::clone(&hosts);
        let driver = plane.drive(move |deed| match deed {
            Deed::Launched {
                id,
                address,
                metadata,
                ..
            } => theirs.launch(id, address, metadata),
            Deed::Terminated { id } => theirs.end(&id),
        });
        Self {
            driver: Some(driver),
            hosts,
        }
    }

    /// Does something on a host that runs, once it has booted.
    #[track_caller]
    pub fn on<T>(&self, id: &str, work: impl FnOnce(&Host) -> T) -> T {
        let host = self.hosts.lock().get(id).map(|it| Arc::clone(&it.host));
        let host = host.unwrap_or_else(|| panic!("{id} does not run"));
        let host = lock(&host);
        work(host.as_ref().unwrap_or_else(|| panic!("{id} has no host")))
    }

    /// Ends every process of a host at once. Nobody is told.
    pub fn kill(&self, id: &str) {
        self.hosts.end(id);
    }
}

impl Drop for Ec2 {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.take() {
            // What it panicked about is printed.
            driver.join().ok();
        }
        // Here, so that a test that fails prints what its hosts have to say.
        let ids: Vec<String> = self.hosts.lock().keys().cloned().collect();
        for id in &ids {
            self.hosts.end(id);
        }
    }
}

impl Hosts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        lock(&self.running)
    }

    fn launch(self: &Arc<Self>, id: String, address: IpAddr, metadata: SocketAddr) {
        let host = Arc::new(Mutex::new(None));
        let (until, ended) = channel();
        let (booting, booted) = channel();
        let (hosts, slot, label) = (Arc::clone(self), Arc::clone(&host), label(address));
        let thread = thread::spawn(move || {
            let mut slot = lock(&slot);
            booting.send(()).expect("the driver waits");
            let mut host = Host::new(&hosts.template.network, &label, last(address));
            hosts.template.prepare(&host, metadata);
            host.boot();
            *slot = Some(host);
            drop(slot);
            // Until the other end is dropped.
            ended.recv().ok();
        });
        booted.recv().expect("a thread that boots the host");
        let running = Running {
            host,
            until,
            thread,
        };
        self.lock().insert(id, running);
    }

    /// Nothing, if it has ended before.
    fn end(&self, id: &str) {
        let Some(running) = self.lock().remove(id) else {
            return;
        };
        drop(lock(&running.host).take());
        drop(running.until);
        running.thread.join().ok();
    }
}

impl Template {
    fn prepare(&self, host: &Host, metadata: SocketAddr) {
        lock(&self.hub).introduce_to(host);
        host.write(
            "/etc/systemd/system/registry-agent.service.d/account.conf",
            &format!(
                "[Service]\nEnvironment=AWS_REGION=us-east-1\n\
                 Environment=AWS_ENDPOINT_URL={}\n\
                 Environment=AWS_EC2_METADATA_SERVICE_ENDPOINT=http://{metadata}\n",
                self.endpoint
            ),
        );
        if let Some(megabytes) = self.disk {
            let folder = crate::harness::agent::ROOT;
            host.write(
                "/etc/fstab",
                &format!("tmpfs {folder} tmpfs size={megabytes}m 0 0\n"),
            );
        }
        Agent::install(host, &self.config).with_all_units();
        // A mirror has no need of them, and this machine has other work.
        let engines = ["docker.service", "docker.socket", "containerd.service"];
        let mask = [
            &["systemctl", "mask", "docker-registry.service"],
            &engines[..],
        ]
        .concat();
        host.run(&mask);
    }
}

fn label(address: IpAddr) -> String {
    format!("mirror{}", last(address))
}

fn last(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => panic!("{address} is not in the test network"),
    }
}

/// What a thread that has panicked was at is still there.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
