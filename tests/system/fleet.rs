//! A fleet of booted hosts in an account of the tests, and a client that pulls by the fleet's name
//! all the time. Whatever is done to the hosts, not one of its pulls fails, there are as many healthy
//! mirrors as before in the end, and the name leads to them and to nothing else.
//!
//! Nothing is quicker here than it is in production but the TTL: how long each of them took is
//! printed.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::control_plane::{ControlPlane, Group, Phase, Transition};
use crate::harness::agent::MIRROR;
use crate::harness::{Agent, Host, Hub, Image, Network, poll};
use ec2::{Ec2, Template};
use pulls::{Published, Pulls};

mod ec2;
mod pulls;

const GROUP: &str = "mirrors";
const ZONE: &str = "Z0123456789";
const NAME: &str = "mirrors.example.org";
/// How many mirrors there should be.
const N: u32 = 3;
/// Boots, drains and looks of a minute each, on a machine that has other work.
const LONG: Duration = Duration::from_mins(12);

/// The last numbers of addresses; instances have those from 21 on.
const ACCOUNT: u8 = 3;
const CLIENT: u8 = 9;

fn address_of(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 20).to_bits() + number).into()
}

/// In the order in which they end.
struct Fleet {
    pulls: Pulls,
    plane: ControlPlane,
    ec2: Ec2,
    hub: Arc<Mutex<Hub>>,
}

/// Does something to a fleet of N healthy mirrors, while a client pulls.
fn with_a_fleet(disk: Option<u32>, scenario: impl FnOnce(&Fleet) + Send) {
    let network = Arc::new(Network::new());
    let account = network.join("account", ACCOUNT);
    let address = account.address();
    // What plays AWS opens ports when it is called.
    account.run(move || {
        let fleet = Fleet::launch(network, address, disk);
        fleet.pulls.wait_for_more(4);
        fleet.hub().assert_only_agents_asked();
        scenario(&fleet);
        fleet.pulls.assert_none_failed();
    });
}

impl Fleet {
    fn launch(network: Arc<Network>, account: IpAddr, disk: Option<u32>) -> Self {
        let hub = Hub::start(&network);
        let images: Vec<Published> = (1..=4).map(|number| publish(&hub, number)).collect();
        let plane = ControlPlane::options()
            .listen(account)
            .addresses(address_of)
            .real_time()
            .start();
        plane.add_zone(ZONE, "example.org");
        plane.change(|world| world.rest.propagation = Duration::from_secs(2));
        plane.serve_names(SocketAddr::new(account, 53));

        let mut client = Host::new(&network, "client", CLIENT);
        hub.introduce_to(&client);
        client.write("/etc/resolv.conf", &format!("nameserver {account}\n"));
        let daemon = serde_json::json!({ "registry-mirrors": [format!("http://{NAME}:5000")] });
        client.write("/etc/docker/daemon.json", &daemon.to_string());

        let hub = Arc::new(Mutex::new(hub));
        let template = Template {
            network,
            hub: Arc::clone(&hub),
            config: config(&images),
            disk,
            endpoint: plane.url(),
        };
        let ec2 = Ec2::of(&plane, template);
        let began = Instant::now();
        let group = Group::new(GROUP, 0, N, N + 1)
            .hook(
                "registry-agent-launch",
                Transition::Launching,
                Duration::from_mins(10),
            )
            .hook(
                "registry-agent-terminate",
                Transition::Terminating,
                Duration::from_mins(1),
            );
        plane.add_group(group);
        client.boot();
        let client = Arc::new(client);
        poll::until("the fleet is whole", LONG, || is_whole(&plane, &client));
        say("launch of all", &format!("whole after {}", seconds(began)));
        Self {
            pulls: Pulls::begin(client, images),
            plane,
            ec2,
            hub,
        }
    }

    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that is in service.
    fn one(&self) -> String {
        let mut members = self.plane.members(GROUP).into_iter();
        let one = members.find(|(_, phase)| *phase == Phase::InService);
        one.expect("an instance in service").0
    }

    /// Waits for a condition, without a failed pull.
    #[track_caller]
    fn wait_until<E: std::fmt::Debug>(&self, what: &str, mut look: impl FnMut() -> Result<(), E>) {
        poll::until(what, LONG, || {
            self.pulls.assert_none_failed();
            look()
        });
    }

    /// Waits until so many instances are in service, without those that were.
    #[track_caller]
    fn wait_until_n_in_service_without(&self, gone: &[String]) {
        self.wait_until("n are in service", || {
            let members = self.plane.members(GROUP);
            let serving = members
                .iter()
                .filter(|(id, phase)| *phase == Phase::InService && !gone.contains(id));
            if serving.count() >= N as usize {
                Ok(())
            } else {
                Err(members)
            }
        });
    }

    #[track_caller]
    fn wait_until_whole(&self) {
        self.wait_until("the fleet is whole", || {
            is_whole(&self.plane, self.pulls.client())
        });
    }

    /// Nobody has found itself, or another one, to be sick.
    #[track_caller]
    fn assert_nobody_was_marked(&self) {
        let marked = self.plane.calls("SetInstanceHealth");
        assert!(marked.is_empty(), "{marked:?}");
    }

    /// Ends a trouble that began then, when there were so many pulls.
    #[track_caller]
    fn is_over(&self, trouble: &str, (began, pulls): (Instant, usize)) {
        self.wait_until_whole();
        let recovered = seconds(began);
        self.pulls.wait_for_more(4);
        let (count, slowest) = self.pulls.since(pulls);
        self.assert_nobody_was_marked();
        say(
            trouble,
            &format!(
                "{N} healthy and DNS right after {recovered}; {count} pulls, the slowest {:.1} s",
                slowest.as_secs_f64()
            ),
        );
    }

    fn begin(&self) -> (Instant, usize) {
        (Instant::now(), self.pulls.count())
    }
}

fn publish(hub: &Hub, number: u32) -> Published {
    let image = Image::new(&format!("image {number}"));
    hub.publish(&format!("library/image{number}"), "1", &image);
    let name = format!("image{number}:1");
    Published { name, image }
}

fn config(images: &[Published]) -> String {
    let names: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
    let warm = serde_json::json!(names);
    format!(
        "{MIRROR}fleet:\n  instances: {N}\n  warm: {warm}\n  autoscaling: {{ group: {GROUP} }}\n  \
         dns: {{ route53: {{ zone: {ZONE}, name: {NAME}, ttl: 2s }} }}\n"
    )
}

/// Whether there are N instances, all of them in service, all of them serve, and the name leads to
/// them and to nothing else, as the client sees it.
fn is_whole(plane: &ControlPlane, client: &Host) -> Result<(), String> {
    let members = plane.members(GROUP);
    let serving = members.iter().all(|(_, it)| *it == Phase::InService);
    if !serving || members.len() != N as usize {
        return Err(format!("members: {members:?}"));
    }
    let addresses: BTreeSet<IpAddr> = plane.change(|world| {
        let ids = members.iter().map(|(id, _)| &world.rest.instances[id]);
        ids.map(|instance| instance.address).collect()
    });
    let resolved = client.try_run(&["getent", "ahostsv4", NAME]).stdout;
    let resolved: BTreeSet<IpAddr> = resolved
        .lines()
        .filter_map(|line| line.split(' ').next()?.parse().ok())
        .collect();
    if resolved != addresses {
        return Err(format!("{NAME} is {resolved:?}, not {addresses:?}"));
    }
    for address in addresses {
        let url = format!("http://{address}:5000/");
        let asked = client.try_run(&["curl", "-sS", "--fail", "--max-time", "5", &url]);
        if !asked.succeeded() {
            return Err(asked.to_string());
        }
    }
    Ok(())
}

fn seconds(since: Instant) -> String {
    format!("{} s", since.elapsed().as_secs())
}

/// Past the runner, which keeps what tests that pass have printed.
fn say(trouble: &str, what: &str) {
    writeln!(
        std::io::stderr(),
        "fleet of booted hosts: {trouble}: {what}"
    )
    .ok();
}

#[test]
fn a_host_that_dies_and_then_an_upstream_that_does_fail_no_pull() {
    with_a_fleet(None, |fleet| {
        let killed = fleet.begin();
        let dead = fleet.one();
        fleet.ec2.kill(&dead);
        // As EC2 does when it is the hypervisor that has failed: no hook is waited for.
        fleet.plane.change(|world| world.terminate_by_hand(&dead));
        fleet.wait_until_n_in_service_without(&[dead]);
        say("kill -9", &format!("replaced after {}", seconds(killed.0)));

        // While the name still leads to the dead: there is nobody else to be asked any more.
        let outage = fleet.begin();
        fleet.hub().switch_off();
        fleet.pulls.wait_for_more(12);
        fleet.hub().switch_on();
        let (count, slowest) = fleet.pulls.since(outage.1);
        let slowest = slowest.as_secs_f64();
        say(
            "upstream outage",
            &format!("{count} pulls, the slowest {slowest:.1} s"),
        );
        fleet.is_over("kill -9", killed);
    });
}

#[test]
fn an_agent_that_freezes_and_then_a_refresh_of_all_fail_no_pull() {
    with_a_fleet(None, |fleet| {
        let frozen = fleet.begin();
        let one = fleet.one();
        let of = |property: &str| {
            let argv = ["systemctl", "show", "--value", "--property", property];
            let unit = ["registry-agent.service"];
            fleet
                .ec2
                .on(&one, |host| host.run(&[&argv[..], &unit].concat()))
        };
        let before = of("MainPID");
        fleet.ec2.on(&one, |host| {
            host.run(&["kill", "-STOP", before.trim()]);
        });
        fleet.wait_until("systemd has started it again", || {
            let (pid, state) = (of("MainPID"), of("ActiveState"));
            let again = pid != before && state.trim() == "active";
            if again { Ok(()) } else { Err((pid, state)) }
        });
        fleet.is_over("frozen agent", frozen);

        // From now on, no client has a reason to go around the fleet.
        let asked = fleet.hub().requests().len();
        let refreshed = fleet.begin();
        let old: Vec<String> = fleet
            .plane
            .members(GROUP)
            .into_iter()
            .map(|it| it.0)
            .collect();
        fleet.plane.operate(
            "StartInstanceRefresh",
            "AutoScalingGroupName=mirrors&Preferences.MinHealthyPercentage=100\
             &Preferences.MaxHealthyPercentage=134",
        );
        fleet.wait_until_n_in_service_without(&old);
        fleet.is_over("instance refresh", refreshed);
        for request in &fleet.hub().requests()[asked..] {
            assert!(request.is_by_agent(), "a client went around: {request}");
        }
    });
}

#[test]
#[ignore = "takes minutes more: `tests/all --long` runs it"]
fn a_host_that_is_cut_off_and_then_a_full_disk_fail_no_pull() {
    with_a_fleet(Some(256), |fleet| {
        let one = fleet.one();
        let cut = fleet.begin();
        fleet.ec2.on(&one, Host::cut);
        fleet.pulls.wait_for_more(10);
        // Whoever is cut off is in the group all the same, and nobody else decides that it is not.
        assert_eq!(fleet.plane.phase(GROUP, &one), Some(Phase::InService));
        fleet.ec2.on(&one, Host::restore);
        fleet.is_over("partition", cut);

        let full = fleet.begin();
        let filler = format!("{}/filler", crate::harness::agent::ROOT);
        fleet.ec2.on(&one, |host| {
            let command = format!("cat /dev/zero >{filler}; test -s {filler}");
            host.run(&["sh", "-c", &command]);
        });
        // There is no room for it on the one, which is asked for it all the same, sooner or later.
        let new = publish(&fleet.hub(), 5);
        fleet.pulls.add(new);
        fleet.wait_until("the full disk is felt", || {
            let (evicted, passed) = fleet.ec2.on(&one, |host| {
                let of = |name| Agent::on(host).counter(name);
                let passed = of("registry_agent_passed_through_total");
                (of("registry_agent_evicted_blobs_total"), passed)
            });
            if evicted + passed > 0 {
                Ok(())
            } else {
                Err("no blob was evicted or passed through")
            }
        });
        fleet.pulls.wait_for_more(10);
        fleet.ec2.on(&one, |host| {
            host.run(&["rm", &filler]);
        });
        fleet.is_over("full disk", full);
    });
}

#[test]
#[ignore = "takes minutes more: `tests/all --long` runs it"]
fn a_host_whose_death_only_status_checks_notice_fails_no_pull() {
    with_a_fleet(None, |fleet| {
        let killed = fleet.begin();
        let dead = fleet.one();
        fleet.ec2.kill(&dead);
        fleet.plane.crash(&dead);
        fleet.wait_until_n_in_service_without(&[dead]);
        say(
            "kill -9, unnoticed",
            &format!("replaced after {}", seconds(killed.0)),
        );
        fleet.is_over("kill -9, unnoticed", killed);
    });
}
