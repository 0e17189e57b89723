//! One root, two programs: what people have from docker-registry is served as it is, and they can
//! go back.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::agent::{MIRROR, ROOT, host_with_mirror, mirror_of_two};
use crate::harness::distribution::Distribution;
use crate::harness::engines::Skopeo;
use crate::harness::hub::GHCR;
use crate::harness::image::Content;
use crate::harness::{Agent, Docker, Host, Hub, Image, Network, poll};

/// Where both serve.
const LOCAL: &str = "127.0.0.1:5000";

/// Gets a document.
#[track_caller]
fn get(host: &Host, path: &str) -> Value {
    let url = format!("http://{LOCAL}/v2/{path}");
    let body = host.run(&["curl", "-sS", "--fail-with-body", &url]);
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{url}: {error}: {body}"))
}

/// Gets a manifest by its tag and all of its blobs, and checks that they are the image's.
#[track_caller]
fn assert_serves_all(host: &Host, repository: &str, tag: &str, image: &Image) {
    assert_serves(
        host,
        &format!("{repository}/manifests/{tag}"),
        image.tagged(),
    );
    for blob in image.downloads() {
        assert_serves(host, &format!("{repository}/blobs/{}", blob.digest), blob);
    }
}

/// Gets a manifest or a blob, and checks that the answer is `content`.
#[track_caller]
fn assert_serves(host: &Host, path: &str, content: &Content) {
    let accept = format!("Accept: {}", content.media_type);
    let url = format!("http://{LOCAL}/v2/{path}");
    let file = "/var/tmp/answer";
    host.run(&[
        "curl",
        "-sS",
        "--fail-with-body",
        "-o",
        file,
        "-H",
        &accept,
        &url,
    ]);
    let sum = host.run(&["sha256sum", file]);
    let sum = sum.split(' ').next().expect("a checksum");
    assert_eq!(format!("sha256:{sum}"), content.digest, "{path}");
}

#[test]
fn docker_registry_serves_the_root_that_the_agent_filled() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let mut ghcr = Hub::start_as(&GHCR, &network, 3);
    let (image, other) = (
        Image::multi_arch("filled by the agent"),
        Image::new("from elsewhere"),
    );
    hub.publish("library/layers", "1", &image);
    ghcr.publish("owner/other", "2", &other);
    let host = host_with_mirror(&network, &[&hub, &ghcr], &mirror_of_two());
    let agent = Agent::on(&host);
    Docker::on(&host).pull("layers:1");
    // docker asks for no layer that it has of another image: these two share their first.
    Docker::on(&host).pull(&format!("{LOCAL}/ghcr.io/owner/other:2"));
    agent.assert_stores(image.contents().into_iter().chain(other.contents()));
    agent.systemctl("stop");
    hub.switch_off();
    ghcr.switch_off();

    let registry = Distribution::start(&host, None);
    for (repository, tag, image) in [
        ("library/layers", "1", &image),
        ("ghcr.io/owner/other", "2", &other),
    ] {
        assert_serves_all(&host, repository, tag, image);
        for manifest in [image.tagged(), image.manifest()] {
            let path = format!("{repository}/manifests/{}", manifest.digest);
            assert_serves(&host, &path, manifest);
        }
        assert_eq!(
            get(&host, &format!("{repository}/tags/list")),
            json!({ "name": repository, "tags": [tag] })
        );
        Skopeo::on(&host).copy(&format!("{LOCAL}/{repository}:{tag}"));
    }
    assert_eq!(
        get(&host, "_catalog"),
        json!({ "repositories": ["ghcr.io/owner/other", "library/layers"] })
    );
    registry.stop();
    // It has not changed what it served.
    agent.stored();
}

#[test]
fn the_agent_serves_the_root_that_docker_registry_filled_as_a_proxy() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let image = Image::multi_arch("filled by docker-registry");
    hub.publish("library/layers", "1", &image);
    let host = host_with_mirror(&network, &[&hub], MIRROR);
    let agent = Agent::on(&host);
    agent.systemctl("stop");
    let registry = Distribution::start(&host, Some("https://registry-1.docker.io"));
    Skopeo::on(&host).copy(&format!("{LOCAL}/library/layers:1"));
    // It stores a blob while, and after, it is sent.
    let links = format!("{ROOT}/docker/registry/v2/repositories/library/layers/_layers/sha256");
    let wanted = image.downloads().len();
    poll::until(
        "docker-registry has stored the image",
        Duration::from_secs(30),
        || {
            let found = host.try_run(&["find", &links, "-name", "link", "-size", "+0"]);
            match found.stdout.lines().count() {
                count if count == wanted => Ok(()),
                count => Err(count),
            }
        },
    );
    registry.stop();

    hub.switch_off();
    agent.systemctl("start");
    agent.wait_until_ready();
    agent.assert_stores(image.contents());
    assert_serves_all(&host, "library/layers", "1", &image);
    Docker::on(&host).pull("layers:1");
    assert_eq!(Docker::on(&host).output_of("layers:1"), image.output);
}
