//! Something happens while an image is being pulled: in the middle of a layer, every time.

use std::thread;

use bytes::Bytes;
use http::{Response, StatusCode};

use crate::harness::agent::{MIRROR, host_with_mirror};
use crate::harness::command::Finished;
use crate::harness::hub::Request;
use crate::harness::{Agent, Docker, Host, Hub, Image, Network};

/// Bytes of the one large layer that the Hub has sent when something happens.
const HELD: usize = 3 << 20;

/// The one layer that is longer than [`HELD`].
fn large_layer(image: &Image) -> &str {
    let mut blobs = image.downloads().into_iter();
    let large = blobs.find(|blob| blob.bytes.len() > HELD);
    &large.expect("a large layer").digest
}

/// Pulls an image, and does `event` when the agent has stored the first half of its large layer
/// and waits for the rest.
fn pull_with(image: &Image, hub: &mut Hub, host: &Host, event: impl FnOnce(&mut Hub)) -> Finished {
    let agent = Agent::on(host);
    hub.hold_blobs_after(HELD);
    thread::scope(|scope| {
        let pull = scope.spawn(|| Docker::on(host).try_pull("layers:1"));
        hub.wait_until_a_blob_is_held();
        agent.wait_until_it_has_of(large_layer(image), HELD);
        event(hub);
        pull.join().expect("a thread that pulls")
    })
}

/// Lets the Hub limit such of its content.
fn limit(hub: &Hub, such: impl Fn(&Request) -> bool + Send + Sync + 'static) {
    hub.disturb(move |request| {
        let answer = Response::builder().status(StatusCode::TOO_MANY_REQUESTS);
        let answer = answer.body(Bytes::new()).expect("a response");
        (request.is_content() && such(request)).then_some(answer)
    });
}

#[track_caller]
fn assert_runs_and_is_stored(host: &Host, image: &Image) {
    assert_eq!(Docker::on(host).output_of("layers:1"), image.output);
    Agent::on(host).assert_stores(image.contents());
}

/// Requests that went on in the middle of a blob.
fn resumptions(hub: &Hub) -> usize {
    let requests = hub.requests().into_iter();
    requests
        .filter(|request| request.is_for_cdn() && request.status == 206)
        .count()
}

#[test]
fn a_pull_goes_on_when_the_mirror_is_restarted_in_the_middle_of_a_layer() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let image = Image::multi_arch("pulled across a restart");
    hub.publish("library/layers", "1", &image);
    // Running answers get so long after SIGTERM; this one would not end.
    let host = host_with_mirror(&network, &[&hub], &format!("{MIRROR}drain: 1s\n"));
    let agent = Agent::on(&host);
    let process = agent.property("MainPID");

    let pull = pull_with(&image, &mut hub, &host, |hub| {
        agent.systemctl("restart");
        agent.wait_until_ready();
        hub.release_blobs();
    });

    pull.expect_success();
    assert_ne!(agent.property("MainPID"), process);
    assert_runs_and_is_stored(&host, &image);
    assert_eq!(resumptions(&hub), 1, "what had arrived is asked for again");
    hub.assert_only_agents_asked();
}

#[test]
fn a_pull_goes_on_when_the_hub_breaks_off_in_the_middle_of_a_layer() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let image = Image::multi_arch("pulled across a break");
    hub.publish("library/layers", "1", &image);
    let host = host_with_mirror(&network, &[&hub], MIRROR);

    let pull = pull_with(&image, &mut hub, &host, |hub| hub.cut_blobs());

    let output = pull.expect_success();
    assert!(!output.contains("Retrying"), "dockerd noticed:\n{output}");
    assert_runs_and_is_stored(&host, &image);
    assert_eq!(hub.blob_bytes_sent(), image.size());
    assert_eq!(resumptions(&hub), 1);
    hub.assert_only_agents_asked();
}

/// A host whose agent has an image cached, and one to be pulled.
fn with_a_cached_image(network: &Network, hub: &Hub) -> (Host, Image) {
    let (cached, image) = (Image::new("cached"), Image::multi_arch("interrupted"));
    hub.publish("library/cached", "1", &cached);
    hub.publish("library/layers", "1", &image);
    let host = host_with_mirror(network, &[hub], MIRROR);
    assert_pulls_cached(&host);
    (host, image)
}

#[track_caller]
fn assert_pulls_cached(host: &Host) {
    let docker = Docker::on(host);
    docker.pull("cached:1");
    let output = docker.output_of("cached:1");
    assert!(output.starts_with("cached\n"), "{output}");
    docker.remove("cached:1");
}

/// What has to hold after a pull that could not be finished.
#[track_caller]
fn assert_failed_cleanly(host: &Host, image: &Image, pull: &Finished) {
    assert!(!pull.succeeded(), "half an image was enough: {pull}");
    assert!(!pull.stderr.is_empty(), "it failed without a word: {pull}");
    let large = large_layer(image);
    let stored = Agent::on(host).stored();
    assert!(!stored.contains(large), "half of {large} is stored");
    assert_pulls_cached(host);
}

#[test]
fn a_hub_that_goes_away_in_the_middle_of_a_layer_costs_that_pull_and_nothing_else() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let (host, image) = with_a_cached_image(&network, &hub);

    let pull = pull_with(&image, &mut hub, &host, |hub| {
        hub.switch_off();
        assert_pulls_cached(&host);
    });

    assert_failed_cleanly(&host, &image, &pull);
    hub.release_blobs();
    hub.switch_on();
    Docker::on(&host).pull("layers:1");
    assert_runs_and_is_stored(&host, &image);
    assert_eq!(resumptions(&hub), 1, "what had arrived is asked for again");
    assert_pulls_cached(&host);
}

#[test]
fn a_hub_that_limits_after_the_manifest_or_in_the_middle_of_a_layer_costs_those_pulls_only() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let (host, image) = with_a_cached_image(&network, &hub);

    limit(&hub, |request| !request.is_manifest());
    let pull = Docker::on(&host).try_pull("layers:1");

    assert_failed_cleanly(&host, &image, &pull);
    let stored = Agent::on(&host).stored();
    assert!(stored.contains(&image.manifest().digest), "{stored:#?}");
    hub.calm();

    let pull = pull_with(&image, &mut hub, &host, |hub| {
        limit(hub, |_| true);
        hub.cut_blobs();
        assert_pulls_cached(&host);
    });

    assert_failed_cleanly(&host, &image, &pull);
    hub.calm();
    Docker::on(&host).pull("layers:1");
    assert_runs_and_is_stored(&host, &image);
    assert_eq!(resumptions(&hub), 1, "what had arrived is asked for again");
    assert_pulls_cached(&host);
}
