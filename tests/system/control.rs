//! The experiment's control: without the agent, the test Hub is Docker Hub to a real dockerd.

use crate::harness::{Docker, Host, Hub, Image, Network};

#[test]
fn an_unmodified_dockerd_takes_the_test_hub_for_docker_hub() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let public = Image::new("public");
    let private = Image::multi_arch("private");
    hub.publish("library/public", "1", &public);
    hub.publish("mycompany/private", "1", &private);
    hub.make_private("mycompany/private");
    hub.add_user("alice", "correct horse");
    let mut host = Host::new(&network, "direct", 11);
    hub.introduce_to(&host);
    host.boot();
    let docker = Docker::on(&host);

    docker.pull("public:1");
    assert_eq!(docker.output_of("public:1"), public.output);

    let refused = docker.try_pull("mycompany/private:1");
    assert!(!refused.succeeded(), "anonymous: {refused}");
    docker.log_in("alice", "correct horse");
    docker.pull("mycompany/private:1");
    assert_eq!(docker.output_of("mycompany/private:1"), private.output);

    for request in hub.requests() {
        // Credentials for the Hub are not the CDN's business; dockerd drops them at the redirect.
        assert!(
            !request.is_for_cdn() || request.authorization.is_none(),
            "{request}"
        );
        assert!(
            request.is_by_docker() && request.from == host.address(),
            "{request}"
        );
    }
    // The layer that both share is asked for once.
    let moved = hub.blob_bytes_sent();
    assert!(
        moved > public.size() && moved < public.size() + private.size(),
        "{moved} bytes"
    );
}
