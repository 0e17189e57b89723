//! The main job: dockerd pulls through the agent.

use crate::harness::agent::{LOCAL, MIRROR};
use crate::harness::{Agent, Docker, Host, Hub, Image, Network};

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
