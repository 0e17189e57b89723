//! How long a real docker daemon takes to be wired, from `registry-agent apply` to its proof, beside
//! the restart of docker that people use for it today; and how long `apply` takes where there is
//! nothing to do, beside the `docker info` that only asks. On a booted host: needs root and the host
//! image, as `tests/all` does.
//!
//! `cargo bench --bench wire`

#![expect(clippy::print_stdout, reason = "a bench prints what it measured")]
#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    reason = "what the system tests stand on, which use more of it"
)]

use std::time::Duration;

/// What the system tests stand on.
#[path = "../tests/system/harness"]
mod harness {
    pub mod agent;
    pub mod authority;
    pub mod command;
    pub mod distribution;
    pub mod docker;
    pub mod engines;
    pub mod host;
    pub mod hub;
    pub mod image;
    pub mod network;
    pub mod poll;
    pub mod scratch;
    pub mod tap;
}

use harness::agent::{Agent, MIRROR};
use harness::host::Host;
use harness::network::Network;
use harness::poll;

const RUNS: usize = 7;
const TIMED: &str = "TIMEFORMAT=%3R; time \"$@\" >/dev/null 2>/tmp/output";

fn main() {
    let network = Network::new();
    let mut host = Host::new(&network, "one", 11);
    Agent::install(&host, MIRROR);
    host.boot();
    Agent::on(&host).wait_until_ready();
    poll::until("the mirror is proved", Duration::from_secs(30), || {
        let status = host.try_run(&["registry-agent", "status"]).stdout;
        let proved = status.contains("which has served");
        if proved { Ok(()) } else { Err(status) }
    });
    let mut wiring = Vec::new();
    let mut idle = Vec::new();
    for _ in 0..RUNS {
        wiring.push(seconds(&host, &["registry-agent", "apply"]));
        idle.push(seconds(&host, &["registry-agent", "apply"]));
        host.run(&["registry-agent", "rollback"]);
    }
    let restart = |_| {
        host.run(&["systemctl", "reset-failed", "docker"]);
        seconds(&host, &["systemctl", "restart", "docker"])
    };
    let restarts = (0..RUNS).map(restart).collect();
    let asking = (0..RUNS)
        .map(|_| seconds(&host, &["docker", "info"]))
        .collect();
    let (wiring, idle) = (median(wiring), median(idle));
    let (restart, asking) = (median(restarts), median(asking));
    println!("medians of {RUNS}, in seconds of wall time:");
    println!(
        "  wiring docker, to its proof: {wiring:.3}   systemctl restart docker: {restart:.3}   ratio {:.2}",
        wiring / restart
    );
    println!(
        "  apply with nothing to do: {idle:.3}   docker info: {asking:.3}   ratio {:.2}",
        idle / asking
    );
}

/// How long it takes on the host, by its shell.
fn seconds(host: &Host, command: &[&str]) -> f64 {
    let argv = [&["bash", "-c", TIMED, "bash"], command].concat();
    let timed = host.try_run(&argv);
    assert!(timed.succeeded(), "{timed:?}");
    let text = timed.stderr.trim().to_owned();
    text.parse().unwrap_or_else(|_| panic!("{text}: no time"))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
