//! Starting, stopping, reloading and asking the agent.

mod support;

use std::net::TcpListener;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use serde_json::Value;
use support::agent::{Agent, Exit, SHORT, Setup};
use support::client::{Client, Response};
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::{Gate, On, Upstream};
use support::{PATIENCE, eventually};

const TAG: &str = "/v2/library/app/manifests/latest";

#[test]
fn the_admin_endpoints_are_on_the_admin_listener_only() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).start();
    for (target, media_type) in [
        ("/healthz", "text/plain"),
        ("/readyz", "text/plain"),
        // What Prometheus reads its text format by.
        ("/metrics", "application/openmetrics-text; version=1.0.0"),
        ("/status", "application/json"),
    ] {
        let reply = agent.admin().get(target);
        let found = reply.header("content-type").unwrap_or_default();
        assert!(
            reply.status == 200 && found.starts_with(media_type),
            "{target}: {found}"
        );
        assert_eq!(
            agent.get(target).status,
            404,
            "{target} on the registry's port"
        );
    }
    assert_eq!(
        agent.admin().get("/v2/").status,
        404,
        "the registry on the admin listener"
    );
    assert_eq!(agent.status()["role"], "mirror");
}

#[test]
fn metrics_count_what_happened() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).set("freshness.window", "0s").start();
    agent.pull("library/app", "latest", &image);
    // Until then, who asks shares the download.
    agent.wait_until_stored(image.blobs());
    agent.pull("library/app", "latest", &image);
    hub.switch_off();
    agent.pull("library/app", "latest", &image);
    let metric = |name: &str| agent.metric(&format!("registry_agent_{name}_total"));
    // Three times a manifest, a layer and a config.
    assert!(metric("requests") >= 9.0);
    assert!(
        (metric("blob_misses") - 2.0).abs() < 0.1,
        "{}",
        metric("blob_misses")
    );
    assert!(
        (metric("blob_hits") - 4.0).abs() < 0.1,
        "{}",
        metric("blob_hits")
    );
    assert!(
        (metric("stale_served") - 1.0).abs() < 0.1,
        "{}",
        metric("stale_served")
    );
    assert!(
        (metric("fill_failures")).abs() < 0.1,
        "{}",
        metric("fill_failures")
    );
    assert!(
        metric("upstream_requests") >= 4.0,
        "a manifest, two blobs, a HEAD"
    );
    let text = String::from_utf8(agent.admin().get("/metrics").body).unwrap();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        assert!(
            line.starts_with("registry_agent_"),
            "a metric of whom? {line}"
        );
    }
}

/// The agent in the middle of a download, and a client that has read the beginning of it.
fn downloading(drain: &str) -> (Upstream, Agent, Blob, Gate, Response) {
    let (hub, blob) = (Upstream::start(), Blob::new(1, 4 * MIB));
    hub.push_blob("library/app", &blob);
    let agent = Setup::mirror(&hub).set("drain", drain).start();
    let gate = hub.hold(On::get(&blob.digest), 2 * MIB);
    let target = format!("/v2/library/app/blobs/{}", blob.digest);
    let mut response = agent.request("GET", &target).open();
    assert!(response.read(KIB) == blob.bytes[..KIB]);
    gate.reached();
    (hub, agent, blob, gate, response)
}

#[test]
fn the_log_tells_a_whole_answer_from_one_whose_client_left() {
    let (_hub, agent, blob, gate, response) = downloading("60s");
    let ended = |how: &str| {
        let log = agent.log();
        let mut requests = log.lines().filter(|line| line.contains(&blob.digest));
        requests.any(|line| line.contains(&format!(r#""end":"{how}""#)))
    };
    drop(response);
    eventually(PATIENCE, "the client that left is logged", || {
        ended("client left")
    });
    assert!(!ended("complete"), "{}", agent.log());
    gate.open();
    agent
        .get(&format!("/v2/library/app/blobs/{}", blob.digest))
        .assert_is(&blob.bytes);
    eventually(PATIENCE, "the client that got all is logged", || {
        ended("complete")
    });
}

fn refuses_connections(agent: &Agent) {
    eventually(PATIENCE, "connections are refused", || {
        agent.registry().connect().is_err()
    });
}

#[test]
fn sigterm_lets_a_download_finish_and_refuses_new_connections() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (_hub, agent, blob, gate, response) = downloading("60s");
        agent.signal(signal);
        refuses_connections(&agent);
        gate.open();
        let rest = response.finish();
        assert!(rest.complete && rest.body == blob.bytes[KIB..]);
        let Exit { status, log } = agent.exit();
        assert_eq!(status.code(), Some(0), "{log}");
    }
}

#[test]
fn an_idle_agent_stops_at_once_though_a_client_keeps_its_connection_open() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).set("drain", "60s").start();
    let (reply, _connection) = agent.request("GET", "/v2/").open().reuse();
    assert_eq!(reply.status, 200);
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.exit().status.code(), Some(0));
}

#[test]
fn the_drain_deadline_or_a_second_signal_ends_a_download_that_does_not() {
    for (drain, second) in [(SHORT, false), ("60s", true)] {
        let (_hub, agent, _blob, _gate, response) = downloading(drain);
        agent.signal(Signal::SIGTERM);
        if second {
            refuses_connections(&agent);
            agent.signal(Signal::SIGTERM);
        }
        let log = agent.exit().log;
        assert!(!response.finish().complete, "{log}");
    }
}

#[test]
fn sighup_takes_over_a_new_window() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let mut agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    let asked = || hub.count("HEAD", "/manifests/");
    let before = asked();
    agent.get(TAG);
    assert_eq!(asked(), before, "the window is long");
    agent.rewrite("freshness.window", "0s");
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "the upstream is asked again", || {
        agent.get(TAG).assert_is(&image.manifest.blob.bytes);
        asked() > before
    });
}

#[test]
fn sighup_with_a_broken_file_keeps_what_was_and_says_why() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let mut agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    agent.rewrite("freshness.window", "a while");
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "the log names the key", || {
        agent.log().contains("freshness.window")
    });
    let log = agent.log();
    assert!(
        log.contains("a while") && log.contains("config.yaml"),
        "{log}"
    );
    let asked = hub.total();
    agent.pull("library/app", "latest", &image);
    assert_eq!(hub.total(), asked, "the window is the old one");
}

#[test]
fn what_can_not_be_used_is_named_and_nothing_is_served() {
    let (hub, folder) = (Upstream::start(), tempfile::tempdir().unwrap());
    let other = TcpListener::bind((support::own_address(), 0)).unwrap();
    let taken = other.local_addr().unwrap().to_string();
    let file = folder.path().join("file");
    support::write_file(&file, b"");
    let (file, below) = (
        file.display().to_string(),
        file.join("store").display().to_string(),
    );
    for (key, value, code) in [
        ("listen", taken.as_str(), 1),
        ("admin", &taken, 1),
        ("storage.filesystem.root", &file, 1),
        ("storage.filesystem.root", &below, 1),
        // Not even root can make a folder there.
        ("storage.filesystem.root", "/proc/store", 1),
        ("freshness.window", "a while", 2),
        ("log.level", "loud", 2),
    ] {
        let Exit { status, log } = Setup::mirror(&hub).set(key, value).run();
        assert_eq!(status.code(), Some(code), "{key}: {value}: {log}");
        assert!(log.contains(value), "{key}: {value} is not named in: {log}");
    }
}

#[test]
fn a_second_agent_on_the_same_storage_is_refused_and_the_first_goes_on() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let mut first = Setup::mirror(&hub).start();
    let root = first.folder().join("store").display().to_string();
    let second = || Setup::mirror(&hub).set("storage.filesystem.root", root.as_str());
    let Exit { status, log } = second().run();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(&root), "{log}");
    first.pull("library/app", "latest", &image);
    // A lock that outlives its process would keep the next one from starting.
    first.kill();
    second().start().pull("library/app", "latest", &image);
}

#[test]
fn status_tells_a_person_and_a_machine_what_the_agent_does() {
    let hub = Upstream::start();
    let setup = Setup::mirror(&hub);
    let socket = setup.folder().join("admin.sock");
    let over_a_socket = setup
        .set("admin", format!("unix:{}", socket.display()))
        .spawn();
    eventually(PATIENCE, "the agent is ready", || {
        let ready = Client::Unix(socket.clone())
            .request("GET", "/readyz")
            .try_open();
        ready.is_ok_and(|answer| answer.status == 200)
    });
    for agent in [Setup::mirror(&hub).start(), over_a_socket] {
        let config = agent.config_file().display().to_string();
        let for_people = agent.command(&["status", "--config", &config]);
        let text = String::from_utf8(for_people.stdout).unwrap();
        assert!(
            for_people.status.success() && text.contains("mirror"),
            "{text}"
        );
        assert!(text.contains("ready"), "{text}");
        let for_machines = agent.command(&["status", "--json", "--config", &config]);
        let status: Value = serde_json::from_slice(&for_machines.stdout).unwrap();
        assert!(for_machines.status.success());
        assert_eq!(
            (&status["role"], &status["ready"]),
            (&"mirror".into(), &true.into())
        );
    }
}

#[test]
fn status_of_an_agent_that_does_not_run_says_where_it_was_looked_for() {
    let mut agent = Setup::mirror(&Upstream::start()).start();
    agent.kill();
    let config = agent.config_file().display().to_string();
    let output = agent.command(&["status", "--config", &config]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    let Client::Tcp(admin) = agent.admin() else {
        panic!("a TCP listener")
    };
    assert!(said.contains(&admin.to_string()), "{said}");
}

/// Needs root for a network namespace of its own, where 127.0.0.1:5000 is free and Docker Hub is
/// out of reach; without, there is nothing that can be said of that port.
#[test]
fn without_any_configuration_it_is_a_mirror_on_127_0_0_1_port_5000() {
    // Of this thread, and of what it starts, only.
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        assert!(
            !nix::unistd::geteuid().is_root(),
            "no network namespace: {error}"
        );
        eprintln!("not tested without root: {error}");
        return;
    }
    let up = std::process::Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.is_ok_and(|status| status.success()), "lo is up");
    let agent = Setup::unconfigured().spawn();
    eventually(PATIENCE, "the agent is ready", || {
        let root = agent.request("GET", "/").try_open();
        root.is_ok_and(|answer| answer.status == 200)
    });
    agent
        .get("/v2/library/busybox/manifests/latest")
        .assert_error(503, "UNAVAILABLE");
    let stored = agent.folder().join(".local/state/registry-agent");
    assert!(stored.is_dir(), "its state is in {}", stored.display());
    let shown = agent.command(&["status", "--json"]);
    let status: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(
        status["role"],
        "mirror",
        "{}",
        String::from_utf8_lossy(&shown.stderr)
    );
}
