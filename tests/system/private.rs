//! Private images: users pull them with their own login, past the mirror, which keeps nothing.

use crate::harness::agent::{MIRROR, host_with_mirror};
use crate::harness::{Agent, Docker, Hub, Image, Network};

const USER: &str = "alice";
const PASSWORD: &str = "correct horse";
/// `alice:correct horse`, as it is sent.
const ENCODED: &str = "YWxpY2U6Y29ycmVjdCBob3JzZQ";

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
    let host = host_with_mirror(&network, &[&hub], MIRROR);
    let (docker, agent) = (Docker::on(&host), Agent::on(&host));
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

    let requests = hub.requests();
    let mut of_the_agent = requests.iter().filter(|request| request.is_by_agent());
    let of_private = |path: &str| path.contains("mycompany/private");
    assert!(
        of_the_agent
            .clone()
            .any(|request| of_private(&request.path)),
        "dockerd did not ask its mirror first"
    );
    // Its own tokens are anonymous ones.
    assert!(of_the_agent.all(|request| request.authorization.as_deref() != Some("Basic")));
    // A challenge is what makes dockerd offer its user's login to a mirror.
    let metrics = agent.metrics();
    assert!(!metrics.contains("status=\"401\""), "{metrics}");
    let journal = agent.journal();
    for secret in [PASSWORD, ENCODED] {
        assert!(!journal.contains(secret), "{secret} is in the journal");
    }
}
