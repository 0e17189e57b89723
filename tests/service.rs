//! The agent beside a service manager: sockets that it is passed, what it tells, and what it tells
//! of the mirror that the engines use.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::agent::{Agent, Exit, Setup};
use support::client::Client;
use support::image::Image;
use support::upstream::Upstream;
use support::{PATIENCE, eventually};

#[test]
fn a_connection_made_while_the_agent_is_started_again_is_answered_by_the_next_one() {
    let hub = Upstream::start();
    let setup = Setup::mirror(&hub);
    let socket = TcpListener::bind((setup.address(), 5000)).unwrap();
    let admin_path = setup.folder().join("admin.sock");
    let admin = UnixListener::bind(&admin_path).unwrap();
    let mut agent = setup
        .set("admin", format!("unix:{}", admin_path.display()))
        .pass(socket)
        .pass(admin)
        .spawn();
    let admin = Client::Unix(admin_path.clone());
    let first = agent.get("/v2/");
    assert_eq!(first.status, 200, "a passed socket is answered");
    // It is asked before the agent says that it is ready, and waits for it.
    assert_eq!(admin.get("/healthz").status, 200);

    agent.signal(Signal::SIGTERM);
    let Exit { status, log } = agent.wait();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(admin_path.exists(), "the next process could not be asked");
    // Nobody runs, and nobody is refused.
    let waiting = agent.registry().connect().unwrap();
    let waiting_for_admin = admin.connect().unwrap();
    agent.start_again();
    for (connection, target) in [(waiting, "/v2/"), (waiting_for_admin, "/healthz")] {
        let answer = connection.send("GET", target, &[]).unwrap().response();
        assert_eq!(answer.unwrap().status, 200, "{target}");
    }
}

#[test]
fn a_socket_that_the_configuration_does_not_name_is_told_of_and_the_named_one_is_opened() {
    let hub = Upstream::start();
    let setup = Setup::mirror(&hub);
    let other = TcpListener::bind((setup.address(), 5002)).unwrap();
    let agent = setup.pass(other).start();
    assert_eq!(agent.get("/v2/").status, 200);
    let log = agent.log();
    assert!(
        log.contains(":5002") && log.contains("registry-agent install"),
        "{log}"
    );
}

/// What a service manager hears.
struct Manager(UnixDatagram);

impl Manager {
    fn of(setup: Setup) -> (Self, Setup) {
        let path = setup.folder().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let path = path.display().to_string();
        (Self(socket), setup.environment("NOTIFY_SOCKET", &path))
    }

    /// Every line that it was told and has not heard yet.
    fn heard(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.0.set_nonblocking(true).unwrap();
        let mut message = [0; 4096];
        while let Ok(length) = self.0.recv(&mut message) {
            let message = String::from_utf8_lossy(&message[..length]);
            lines.extend(message.lines().map(str::to_owned));
        }
        self.0.set_nonblocking(false).unwrap();
        lines
    }

    /// Waits for a line that begins so, and returns the rest of it.
    #[track_caller]
    fn hears(&self, beginning: &str) -> String {
        loop {
            let mut message = [0; 4096];
            let length = self.0.recv(&mut message);
            let length = length.unwrap_or_else(|error| panic!("no {beginning}: {error}"));
            let message = String::from_utf8_lossy(&message[..length]);
            let mut lines = message.lines();
            if let Some(rest) = lines.find_map(|line| line.strip_prefix(beginning)) {
                return rest.to_owned();
            }
        }
    }
}

#[test]
fn the_status_line_is_in_the_words_that_people_read() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let (manager, setup) = Manager::of(Setup::mirror(&hub));
    let agent = setup.start();
    manager.hears("READY=1");
    let line = manager.hears("STATUS=ready: ");
    assert!(
        line.starts_with("mirror of docker.io, 0 hits 0 misses, 0 B saved"),
        "{line}"
    );
    agent.pull("library/app", "latest", &image);
    // A manifest, a layer, a config; in time, of any state between.
    loop {
        let line = manager.hears("STATUS=ready: mirror of docker.io, ");
        if line.starts_with("0 hits 3 misses") {
            break;
        }
    }
    agent.signal(Signal::SIGTERM);
    manager.hears("STOPPING=1");
}

#[test]
fn the_status_line_is_current_within_a_second_and_says_what_the_hub_leaves() {
    let hub = Upstream::start();
    hub.limit(100);
    let (manager, setup) = Manager::of(Setup::mirror(&hub));
    let agent = setup.start();
    manager.hears("READY=1");
    let mut took = Vec::new();
    let mut line = String::new();
    for number in 1..=3 {
        let (tag, image) = (number.to_string(), Image::small(number));
        hub.push("library/app", &tag, &image);
        agent.pull("library/app", &tag, &image);
        let pulled = Instant::now();
        // A manifest, a layer and a config of each.
        let misses = format!(" {} misses, ", 3 * number);
        while !line.contains(&misses) {
            line = manager.hears("STATUS=ready: mirror of docker.io, ");
        }
        took.push(pulled.elapsed());
    }
    // A machine may be slow for a moment; a line that comes by chance is not quick three times.
    let quickest = took.iter().min().unwrap();
    assert!(*quickest < Duration::from_secs(1), "{took:?}");
    let left = agent.status()["upstreams"][0]["budget_remaining"].to_string();
    let budget = format!(", hub budget {left}/100");
    while !line.contains(&budget) {
        line = manager.hears("STATUS=ready: mirror of docker.io, ");
    }
}

#[test]
fn the_watchdog_is_fed_after_a_request_to_the_registry_itself() {
    let hub = Upstream::start();
    let (manager, setup) = Manager::of(Setup::mirror(&hub));
    let agent = setup
        .environment("WATCHDOG_USEC", "400000")
        .set("health.interval", "1h")
        .set("host.mirror", "http://127.0.0.1:9")
        .start();
    manager.hears("WATCHDOG=1");
    let metrics = String::from_utf8(agent.admin().get("/metrics").body).unwrap();
    assert!(metrics.contains("route=\"root\""), "a request:\n{metrics}");
    let log = agent.log();
    let mut logged = log
        .lines()
        .filter(|line| line.contains(r#""path":"/""#) && line.contains("200"));
    assert_eq!(logged.next(), None, "it is not in the access log");
}

/// So many connections of this address that ask for nothing.
fn silent(agent: &Agent, from: Ipv4Addr, count: usize) -> Vec<TcpStream> {
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let connect = async || {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(address).await.unwrap().into_std().unwrap()
    };
    runtime.block_on(async {
        let mut streams = Vec::new();
        for _ in 0..count {
            streams.push(connect().await);
        }
        streams
    })
}

/// How often the log says that the registry does not answer.
fn complaints(agent: &Agent) -> usize {
    agent.log().matches("the registry does not answer").count()
}

#[test]
fn the_watchdog_is_not_fed_while_the_registry_answers_nobody() {
    let hub = Upstream::start();
    let (manager, setup) = Manager::of(Setup::mirror(&hub));
    let agent = setup
        .environment("WATCHDOG_USEC", "400000")
        .set("host.mirror", "http://127.0.0.1:9")
        // 24 connections, half of them for each client.
        .descriptors(96, 96)
        .start();
    manager.hears("WATCHDOG=1");
    let clients = [2, 3].map(|last| silent(&agent, Ipv4Addr::new(127, 0, 0, last), 12));
    eventually(PATIENCE, "it is told of", || complaints(&agent) > 0);
    // The process lives, and answers elsewhere.
    assert_eq!(agent.admin().get("/healthz").status, 200);
    manager.heard();
    let before = complaints(&agent);
    eventually(PATIENCE, "it goes on", || complaints(&agent) > before + 2);
    let heard = manager.heard();
    assert!(
        !heard.iter().any(|line| line == "WATCHDOG=1"),
        "it was fed: {heard:?}"
    );
    drop(clients);
    manager.hears("WATCHDOG=1");
}

#[test]
fn the_watchdog_is_fed_while_this_hosts_clients_have_their_share_of_all_connections() {
    let hub = Upstream::start();
    let (manager, setup) = Manager::of(Setup::mirror(&hub));
    let agent = setup
        .environment("WATCHDOG_USEC", "4000000")
        .set("host.mirror", "http://127.0.0.1:9")
        .descriptors(96, 96)
        .start();
    // From where the agent asks itself.
    let _clients = silent(&agent, Ipv4Addr::LOCALHOST, 13);
    let refused = "registry_agent_refused_connections_total";
    eventually(PATIENCE, "one has no place", || agent.metric(refused) > 0.5);
    manager.heard();
    manager.hears("WATCHDOG=1");
    manager.hears("WATCHDOG=1");
    assert_eq!(complaints(&agent), 0);
    assert!(agent.metric(refused) < 1.5, "its own were not refused");
}

#[test]
fn the_agent_says_whether_the_mirror_that_the_engines_are_told_serves() {
    let hub = Upstream::start();
    let mut elsewhere = Setup::mirror(&hub).start();
    let Client::Tcp(address) = elsewhere.registry() else {
        panic!("a TCP listener")
    };
    let mirror = format!("http://{address}");
    let told = |agent: &Agent, serves: bool| {
        eventually(PATIENCE, "it knows", || {
            agent.status()["mirror"]["serves"] == serves
        });
        agent.status()["mirror"].clone()
    };
    let quick = |setup: Setup| {
        setup
            .set(
                "health",
                serde_json::json!({"interval": "20ms", "threshold": 1}),
            )
            .set("host", serde_json::json!({"mirror": mirror}))
    };
    let beside = quick(Setup::mirror(&hub)).start();
    let client = quick(Setup::new()).set("role", "client").start();
    for agent in [&beside, &client] {
        let status = told(agent, true);
        assert_eq!(status["address"], mirror.as_str());
        assert!(status["failure"].is_null(), "{status}");
    }
    assert_eq!(client.status()["role"], "client");
    assert!(client.status()["listen"].is_null(), "it serves nothing");
    assert!(client.registry().connect().is_err(), "it serves nothing");
    let config = client.config_file().display().to_string();
    let shown = client.command(&["status", "--config", &config]);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.status.success() && text.contains(&mirror), "{text}");

    elsewhere.kill();
    for agent in [&beside, &client] {
        let failure = told(agent, false)["failure"].to_string();
        assert!(
            failure.contains(&mirror) && failure.contains("refused"),
            "{failure}"
        );
    }
    assert_eq!(
        beside.admin().get("/readyz").status,
        200,
        "it serves by itself"
    );
    eventually(PATIENCE, "a client is not ready without its mirror", || {
        client.admin().get("/readyz").status == 503
    });
    elsewhere.start_again();
    for agent in [&beside, &client] {
        told(agent, true);
    }
    eventually(PATIENCE, "the client is ready again", || {
        client.admin().get("/readyz").status == 200
    });
}

#[test]
fn a_client_tells_systemd_that_it_has_started_though_its_mirror_is_down() {
    let (manager, setup) = Manager::of(Setup::new());
    let agent = setup
        .set("role", "client")
        .set("host", serde_json::json!({"mirror": "http://127.0.0.1:9"}))
        .spawn();
    manager.hears("READY=1");
    let line = manager.hears("STATUS=not ready: client of http://127.0.0.1:9");
    assert!(line.contains("not") || line.contains("starting"), "{line}");
    drop(agent);
}

#[test]
fn no_stray_signal_ends_the_agent() {
    let hub = Upstream::start();
    let mut agent = Setup::mirror(&hub).start();
    // SIGQUIT, SIGUSR1, SIGALRM, SIGXFSZ, and real-time ones: signal(7).
    for (number, name) in [
        (3, "SIGQUIT"),
        (10, "SIGUSR1"),
        (14, "SIGALRM"),
        (25, "SIGXFSZ"),
        (34, "SIGRTMIN+0"),
        (64, "SIGRTMIN+30"),
    ] {
        agent.signal_number(number);
        let said = format!("{name} is ignored");
        eventually(PATIENCE, &said, || agent.log().contains(&said));
    }
    assert_eq!(agent.get("/v2/").status, 200);
    agent.signal(Signal::SIGTERM);
    let Exit { status, log } = agent.wait();
    assert_eq!(status.code(), Some(0), "{log}");
}
