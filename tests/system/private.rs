//! Private images: users pull them with their own login, past the mirror, which keeps nothing.

use std::net::SocketAddr;

use crate::harness::agent::MIRROR;
use crate::harness::tap::Tap;
use crate::harness::{Agent, Docker, Host, Hub, Image, Network};

const USER: &str = "alice";
const PASSWORD: &str = "correct horse";

#[test]
fn a_private_image_is_pulled_with_a_login_and_leaves_nothing_in_the_mirror() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let public = Image::new("public");
    let private = Image::multi_arch("private");
    hub.publish("library/public", "1", &public);
    hub.publish("mycompany/private", "1", &private);
    hub.make_private("mycompany/private");
    hub.add_user(USER, PASSWORD);
    let mut host = Host::new(&network, "one", 11);
    hub.introduce_to(&host);
    Agent::install(&host, MIRROR);
    // The mirror beside it, by a wire that can be listened to.
    let tap = Tap::new(&network, 12, SocketAddr::new(host.address(), 5000));
    Docker::on(&host).use_mirror(&format!("http://{}:5000", tap.address()));
    host.boot();
    let (docker, agent) = (Docker::on(&host), Agent::on(&host));
    agent.wait_until_ready();
    docker.pull("public:1");
    hub.assert_only_agents_asked();
    agent.wait_until_idle();
    let before = agent.disk_use();

    docker.log_in(USER, PASSWORD);
    docker.pull("mycompany/private:1");
    assert_eq!(docker.output_of("mycompany/private:1"), private.output);
    assert_eq!(agent.disk_use(), before, "what a login pulled is stored");

    docker.log_out();
    docker.remove("mycompany/private:1");
    let refused = docker.try_pull("mycompany/private:1");
    assert!(!refused.succeeded(), "{refused}");
    assert!(refused.stderr.contains("denied"), "{refused}");
    assert_eq!(agent.disk_use(), before);

    let heard = tap.heard();
    let asked = "/v2/mycompany/private/manifests/1 HTTP/1.1";
    assert!(heard.contains(asked), "dockerd passed by its mirror");
    for secret in ["Authorization:", "Cookie:", PASSWORD] {
        assert!(!heard.contains(secret), "dockerd told its mirror {secret}");
    }
    // The mirror's own tokens are anonymous ones.
    let requests = hub.requests();
    let mut of_the_agent = requests.iter().filter(|request| request.is_by_agent());
    assert!(of_the_agent.all(|request| request.authorization.as_deref() != Some("Basic")));
}
