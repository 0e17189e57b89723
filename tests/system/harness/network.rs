//! Networks: a bridge in a namespace of its own, and a namespace for each machine on it. Nothing
//! of it is in the developer's own network.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::runtime::{Builder, Runtime};

use super::command;
use super::scratch::{host_image, unique_name};

/// A switch that machines plug into. Addresses are 198.18.0.N (RFC 2544, for test networks).
pub struct Network {
    namespace: Namespace,
    ports: AtomicU32,
}

impl Network {
    /// Makes an empty network.
    pub fn new() -> Self {
        // Removes what a killed run left, before the first namespace is made.
        host_image();
        let namespace = Namespace::new("bridge");
        namespace.ip(&["link", "add", "br0", "type", "bridge", "forward_delay", "0"]);
        namespace.ip(&["link", "set", "br0", "up"]);
        Self {
            namespace,
            ports: AtomicU32::new(0),
        }
    }

    /// Plugs a new machine in, with the address 198.18.0.`last`.
    pub fn join(&self, label: &str, last: u8) -> Attachment {
        let namespace = Namespace::new(label);
        let port = format!("port{}", self.ports.fetch_add(1, Ordering::Relaxed));
        let address = Ipv4Addr::new(198, 18, 0, last);
        let bridge = &self.namespace;
        bridge.ip(&[
            "link",
            "add",
            &port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &namespace.name,
        ]);
        bridge.ip(&["link", "set", &port, "master", "br0", "up"]);
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"]);
        namespace.ip(&["link", "set", "eth0", "up"]);
        Attachment {
            namespace,
            address: address.into(),
            bridge: bridge.name.clone(),
            port,
        }
    }
}

/// One machine's place in a network.
pub struct Attachment {
    namespace: Namespace,
    address: IpAddr,
    bridge: String,
    port: String,
}

impl Attachment {
    /// The machine's address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The name of the machine's network namespace, for `ip netns exec`.
    pub fn namespace(&self) -> &str {
        &self.namespace.name
    }

    /// The machine's network namespace.
    pub fn namespace_path(&self) -> PathBuf {
        self.namespace.path()
    }

    /// Kills everything that runs on the machine.
    pub fn kill_everything(&self) {
        kill_everything_in(&self.namespace.name);
    }

    /// Pulls the cable: packets are lost, nobody is told.
    pub fn cut(&self) {
        command::run(&["ip", "-n", &self.bridge, "link", "set", &self.port, "down"]);
    }

    /// Plugs the cable in again.
    pub fn restore(&self) {
        command::run(&["ip", "-n", &self.bridge, "link", "set", &self.port, "up"]);
    }

    /// Runs something on this machine: its sockets are there, and those of all threads that it
    /// starts.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = self.namespace.path();
        let done = thread::scope(|scope| {
            let there = scope.spawn(move || {
                enter(&path);
                work()
            });
            there.join()
        });
        done.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// A runtime whose sockets are in this machine's namespace.
    pub fn runtime(&self) -> Runtime {
        let path = self.namespace.path();
        let entered = thread::spawn(move || {
            enter(&path);
            // A thread is born in its parent's namespace, so the worker stays in this one.
            Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
        });
        entered
            .join()
            .expect("a runtime in a namespace")
            .expect("building a runtime")
    }
}

/// From now on this thread is in that network namespace.
fn enter(path: &Path) {
    let namespace =
        File::open(path).unwrap_or_else(|error| panic!("opening {}: {error}", path.display()));
    setns(namespace, CloneFlags::CLONE_NEWNET).expect("entering a network namespace");
}

/// Removes a namespace of a run that was killed, and whatever still runs in it: a host outlives
/// its systemd-nspawn.
pub fn remove_leftover(namespace: &str) {
    drop(Namespace {
        name: namespace.to_owned(),
    });
}

/// Kills all processes in a namespace of ours.
fn kill_everything_in(namespace: &str) {
    let listed = command::finish(&["ip", "netns", "pids", namespace], b"");
    let pids = listed
        .stdout
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    for pid in pids.map(Pid::from_raw) {
        // One that has ended meanwhile is what was wanted.
        kill(pid, Signal::SIGKILL).ok();
    }
}

/// A named network namespace, with all that runs in it.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new(label: &str) -> Self {
        let name = unique_name(label);
        command::run(&["ip", "netns", "add", &name]);
        Self { name }
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    #[track_caller]
    fn ip(&self, arguments: &[&str]) {
        command::run(&[&["ip", "-n", &self.name], arguments].concat());
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        kill_everything_in(&self.name);
        // Not a panic: one during another's unwinding would hide the first.
        let deleted = command::finish(&["ip", "netns", "delete", &self.name], b"");
        if !deleted.succeeded() {
            eprintln!("{deleted}");
        }
    }
}
