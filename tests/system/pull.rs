//! The main job: dockerd pulls through the agent.

use std::collections::HashSet;
use std::thread;
use std::time::Duration;

use crate::harness::agent::{LOCAL, MIRROR, host_with_mirror};
use crate::harness::{Agent, Docker, Host, Hub, Image, Network, poll};

#[test]
fn an_unmodified_dockerd_pulls_through_the_agent_and_again_with_the_hub_off() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let image = Image::new("pulled through the agent");
    hub.publish("library/layers", "1", &image);
    let mut host = Host::new(&network, "one", 11);
    hub.introduce_to(&host);
    Agent::install(&host, MIRROR);
    Docker::on(&host).use_mirror(LOCAL);
    host.boot();
    Agent::on(&host).wait_until_ready();
    let docker = Docker::on(&host);

    docker.pull("layers:1");
    assert_eq!(docker.output_of("layers:1"), image.output);
    hub.assert_only_agents_asked();
    assert_eq!(
        hub.blob_bytes_sent(),
        image.size(),
        "every blob once: {:#?}",
        hub.downloads()
    );

    hub.switch_off();
    docker.remove("layers:1");
    docker.pull("layers:1");
    assert_eq!(docker.output_of("layers:1"), image.output);
}

#[test]
fn a_second_host_pulls_through_the_first_and_the_hub_sends_nothing_more() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let image = Image::multi_arch("pulled through another host");
    hub.publish("mycompany/layers", "latest", &image);
    let mut first = Host::new(&network, "one", 11);
    let mut second = Host::new(&network, "two", 12);
    hub.introduce_to(&first);
    Agent::install(&first, MIRROR);
    Docker::on(&first).use_mirror(LOCAL);
    // The second host could ask the Hub itself, so that it can be seen that it does not.
    hub.introduce_to(&second);
    Docker::on(&second).use_mirror(&format!("http://{}:5000", first.address()));
    first.boot();
    second.boot();
    Agent::on(&first).wait_until_ready();

    Docker::on(&first).pull("mycompany/layers");
    assert_eq!(
        Docker::on(&first).output_of("mycompany/layers"),
        image.output
    );
    let downloads = hub.downloads();
    assert_eq!(
        hub.blob_bytes_sent(),
        image.size(),
        "ours of two architectures: {downloads:#?}"
    );

    Docker::on(&second).pull("mycompany/layers");
    assert_eq!(
        Docker::on(&second).output_of("mycompany/layers"),
        image.output
    );
    assert_eq!(
        hub.downloads().len(),
        downloads.len(),
        "{:#?}",
        hub.downloads()
    );
    hub.assert_only_agents_asked();
    assert!(
        hub.requests()
            .iter()
            .all(|request| request.from == first.address())
    );
}

#[test]
fn an_image_of_many_layers_and_two_architectures_is_pulled_by_tag_and_by_digest() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let by_tag = Image::many_layers("pulled by tag");
    let by_digest = Image::many_layers("pulled by digest");
    hub.publish("mycompany/app", "1", &by_tag);
    hub.publish("mycompany/app", "2", &by_digest);
    let host = host_with_mirror(&network, &[&hub], MIRROR);
    let docker = Docker::on(&host);
    let digest = |digest: &str| format!("mycompany/app@{digest}");
    let pulls = |reference: &str, image: &Image| {
        docker.pull(reference);
        assert_eq!(docker.output_of(reference), image.output, "{reference}");
        docker.remove(reference);
    };

    pulls("mycompany/app:1", &by_tag);
    assert_eq!(
        hub.blob_bytes_sent(),
        by_tag.size(),
        "ours of two architectures: {:#?}",
        hub.downloads()
    );
    pulls(&digest(&by_digest.tagged().digest), &by_digest);
    Agent::on(&host).assert_stores(by_tag.contents().into_iter().chain(by_digest.contents()));

    hub.switch_off();
    pulls("mycompany/app:1", &by_tag);
    for image in [&by_tag, &by_digest] {
        pulls(&digest(&image.tagged().digest), image);
        pulls(&digest(&image.manifest().digest), image);
    }
    hub.assert_only_agents_asked();
}

#[test]
fn two_hosts_that_pull_the_same_cold_image_at_once_cost_the_hub_one_download() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let image = Image::multi_arch("pulled by two at once");
    hub.publish("library/layers", "1", &image);
    let mut mirror = Host::new(&network, "mirror", 11);
    hub.introduce_to(&mirror);
    Agent::install(&mirror, MIRROR);
    let url = format!("http://{}:5000", mirror.address());
    let mut hosts = [("one", 12), ("two", 13)].map(|(label, last)| {
        let host = Host::new(&network, label, last);
        // It could ask the Hub itself, so that it can be seen that it does not.
        hub.introduce_to(&host);
        Docker::on(&host).use_mirror(&url);
        host
    });
    thread::scope(|scope| {
        for host in hosts.iter_mut().chain([&mut mirror]) {
            scope.spawn(|| host.boot());
        }
    });
    let agent = Agent::on(&mirror);
    agent.wait_until_ready();

    hub.hold_blobs_after(3 << 20);
    thread::scope(|scope| {
        let pulls = hosts
            .each_ref()
            .map(|host| scope.spawn(|| Docker::on(host).try_pull("layers:1")));
        let wanted = 2 * image.downloads().len() as u64;
        poll::until(
            "both have asked for every blob while one of them is held",
            Duration::from_mins(1),
            || {
                let kinds =
                    ["hits", "misses"].map(|kind| format!("registry_agent_blob_{kind}_total"));
                let asked: u64 = kinds.iter().map(|name| agent.counter(name)).sum();
                (asked >= wanted).then_some(()).ok_or(asked)
            },
        );
        hub.release_blobs();
        for pull in pulls {
            pull.join().expect("a thread that pulls").expect_success();
        }
    });

    for host in &hosts {
        assert_eq!(Docker::on(host).output_of("layers:1"), image.output);
    }
    assert_eq!(hub.blob_bytes_sent(), image.size());
    let downloads = hub.downloads();
    let paths: HashSet<_> = downloads
        .iter()
        .map(|request| (&request.host, &request.path))
        .collect();
    // A token that is asked for late costs a first, refused request.
    let answered = downloads
        .iter()
        .filter(|request| request.status < 400)
        .count();
    assert_eq!(paths.len(), answered, "asked twice: {downloads:#?}");
    hub.assert_only_agents_asked();
    let from = mirror.address();
    assert!(hub.requests().iter().all(|request| request.from == from));
}
