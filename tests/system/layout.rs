//! One root, two programs: what people have from docker-registry is served as it is, and they can
//! go back.

use std::time::Duration;

use crate::harness::agent::{MIRROR, ROOT, host_with_mirror};
use crate::harness::distribution::Distribution;
use crate::harness::engines::Skopeo;
use crate::harness::image::Content;
use crate::harness::{Agent, Docker, Host, Hub, Image, Network, poll};

/// Where both serve.
const LOCAL: &str = "127.0.0.1:5000";

/// Gets `path` of a repository, and checks that the answer is `content`.
#[track_caller]
fn assert_serves(host: &Host, path: &str, content: &Content) {
    let accept = format!("Accept: {}", content.media_type);
    let url = format!("http://{LOCAL}/v2/library/layers/{path}");
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
    let image = Image::multi_arch("filled by the agent");
    hub.publish("library/layers", "1", &image);
    let host = host_with_mirror(&network, &[&hub], MIRROR);
    let agent = Agent::on(&host);
    Docker::on(&host).pull("layers:1");
    agent.assert_stores(image.contents());
    agent.systemctl("stop");
    hub.switch_off();

    let registry = Distribution::start(&host, None);
    assert_serves(&host, "manifests/1", image.tagged());
    for manifest in [image.tagged(), image.manifest()] {
        assert_serves(&host, &format!("manifests/{}", manifest.digest), manifest);
    }
    for blob in image.downloads() {
        assert_serves(&host, &format!("blobs/{}", blob.digest), blob);
    }
    let list = |path: &str| {
        host.run(&[
            "curl",
            "-sS",
            "--fail",
            &format!("http://{LOCAL}/v2/{path}"),
        ])
    };
    let tags = r#"{"name":"library/layers","tags":["1"]}"#;
    assert_eq!(list("library/layers/tags/list").trim(), tags);
    assert_eq!(
        list("_catalog").trim(),
        r#"{"repositories":["library/layers"]}"#
    );
    Skopeo::on(&host).copy(&format!("{LOCAL}/library/layers:1"));
    registry.stop();
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
    assert_serves(&host, "manifests/1", image.tagged());
    for blob in image.downloads() {
        assert_serves(&host, &format!("blobs/{}", blob.digest), blob);
    }
    Docker::on(&host).pull("layers:1");
    assert_eq!(Docker::on(&host).output_of("layers:1"), image.output);
}
