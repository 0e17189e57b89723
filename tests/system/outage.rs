//! What is cached is served, whatever else is gone.

use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};

use crate::harness::agent::{LOCAL, MIRROR, host_with_mirror};
use crate::harness::hub::Request;
use crate::harness::{Agent, Docker, Host, Hub, Image, Network, poll};

/// Time for a tag to go stale, several times over.
const ENOUGH: Duration = Duration::from_secs(30);

/// A host that has pulled `image` once, through its agent, and forgotten it.
fn host_with_a_cached_image(network: &Network, hub: &Hub, image: &Image) -> Host {
    hub.publish("library/cached", "1", image);
    let mut host = Host::new(network, "one", 11);
    hub.introduce_to(&host);
    Agent::install(&host, MIRROR);
    Docker::on(&host).use_mirror(LOCAL);
    host.boot();
    Agent::on(&host).wait_until_ready();
    Docker::on(&host).pull("cached:1");
    Docker::on(&host).remove("cached:1");
    assert!(
        Agent::on(&host).cached_bytes() >= image.size(),
        "the agent has the image on disk"
    );
    host
}

#[track_caller]
fn assert_pulls(host: &Host, image: &Image) {
    let docker = Docker::on(host);
    docker.pull("cached:1");
    assert_eq!(docker.output_of("cached:1"), image.output);
    docker.remove("cached:1");
}

#[test]
fn a_restarted_agent_serves_with_the_hub_off() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let image = Image::new("from before the restart");
    let host = host_with_a_cached_image(&network, &hub, &image);

    hub.switch_off();
    Agent::on(&host).systemctl("restart");
    Agent::on(&host).wait_until_ready();
    assert_pulls(&host, &image);

    hub.switch_on();
    let other = Image::new("published after the outage");
    hub.publish("library/other", "1", &other);
    Docker::on(&host).pull("other:1");
    hub.assert_only_agents_asked();
}

#[test]
fn a_host_that_boots_with_no_network_serves_what_it_has() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let image = Image::multi_arch("from before the reboot");
    let mut host = host_with_a_cached_image(&network, &hub, &image);

    host.cut();
    host.reboot();
    Agent::on(&host).wait_until_ready();
    assert_pulls(&host, &image);

    host.kill();
    host.boot();
    Agent::on(&host).wait_until_ready();
    assert_pulls(&host, &image);

    host.restore();
    assert_pulls(&host, &image);
    hub.assert_only_agents_asked();
}

#[test]
fn a_hub_that_limits_or_fails_does_not_stop_a_cached_image() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let image = Image::new("from before the limit");
    let host = host_with_a_cached_image(&network, &hub, &image);

    for status in [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::INTERNAL_SERVER_ERROR,
    ] {
        hub.disturb(move |request| {
            let answer = Response::builder().status(status).body(Bytes::new());
            request.is_content().then(|| answer.expect("a response"))
        });
        let answered = |request: &Request| request.status == status.as_u16();
        // The agent asks again once the tag is no longer fresh.
        poll::until("a pull that the Hub would have failed", ENOUGH, || {
            assert_pulls(&host, &image);
            let asked = hub.requests().iter().any(answered);
            asked.then_some(()).ok_or("the Hub has not been asked")
        });
    }
    hub.calm();
    assert_pulls(&host, &image);
    hub.assert_only_agents_asked();
}

#[test]
fn an_image_whose_layer_docker_had_from_another_is_served_with_the_hub_off() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    // Both begin with the same layer, as images of one base do.
    let (first, second) = (Image::new("first"), Image::new("second"));
    hub.publish("library/first", "1", &first);
    hub.publish("library/second", "1", &second);
    let host = host_with_mirror(&network, &[&hub], MIRROR);
    let docker = Docker::on(&host);
    docker.pull("first:1");
    // dockerd does not ask for the layer that it has.
    docker.pull("second:1");
    Agent::on(&host).assert_stores(second.contents());

    hub.switch_off();
    docker.remove("first:1");
    docker.remove("second:1");
    docker.pull("second:1");
    assert_eq!(docker.output_of("second:1"), second.output);
}
