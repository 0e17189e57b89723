//! Two registries behind one mirror, for every client and in every way that names a registry.

use std::collections::BTreeMap;

use crate::harness::agent::{LOCAL, host_with_mirror, mirror_of_two};
use crate::harness::engines::{Containerd, Podman, Skopeo, add_registries_conf};
use crate::harness::hub::GHCR;
use crate::harness::{Agent, Docker, Hub, Image, Network};

const MIRROR_HOST: &str = "127.0.0.1:5000";

#[test]
fn containerd_podman_skopeo_and_docker_pull_from_two_registries_through_one_mirror() {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let mut ghcr = Hub::start_as(&GHCR, &network, 3);
    let (ours, theirs) = (Image::new("the Hub's"), Image::multi_arch("the other's"));
    hub.publish("library/layers", "1", &ours);
    ghcr.publish("owner/layers", "1", &theirs);
    let host = host_with_mirror(&network, &[&hub, &ghcr], &mirror_of_two());

    let containerd = Containerd::on(&host);
    containerd.use_mirror("docker.io", "https://registry-1.docker.io", LOCAL);
    containerd.use_mirror("ghcr.io", "https://ghcr.io", LOCAL);
    add_registries_conf(&host, "docker.io", MIRROR_HOST);
    add_registries_conf(&host, "ghcr.io", &format!("{MIRROR_HOST}/ghcr.io"));
    let (podman, skopeo, docker) = (Podman::on(&host), Skopeo::on(&host), Docker::on(&host));
    let named_by_prefix = format!("{MIRROR_HOST}/ghcr.io/owner/layers:1");
    let hits = || Agent::on(&host).counter("registry_agent_blob_hits_total");

    let all_pull = || {
        for (image, contents) in [
            ("docker.io/library/layers:1", &ours),
            ("ghcr.io/owner/layers:1", &theirs),
        ] {
            let before = hits();
            containerd.pull(image);
            assert_eq!(containerd.output_of(image), contents.output, "{image}");
            containerd.remove(image);
            podman.pull(image);
            assert_eq!(podman.output_of(image), contents.output, "{image}");
            podman.remove(image);
            skopeo.copy(image);
            // The first of the three may have brought it; the others had it from the store.
            let blobs = contents.downloads().len() as u64;
            assert!(hits() >= before + 2 * blobs, "{image}");
        }
        docker.pull("layers:1");
        assert_eq!(docker.output_of("layers:1"), ours.output);
        docker.remove("layers:1");
        docker.pull(&named_by_prefix);
        assert_eq!(docker.output_of(&named_by_prefix), theirs.output);
        docker.remove(&named_by_prefix);
        skopeo.copy(&named_by_prefix);
    };

    all_pull();
    for registry in [&hub, &ghcr] {
        registry.assert_only_agents_asked();
    }
    // The layer that both images have comes from the first registry that is asked for it.
    let blobs = ours.downloads().into_iter().chain(theirs.downloads());
    let sizes: BTreeMap<_, _> = blobs
        .map(|blob| (&blob.digest, blob.bytes.len() as u64))
        .collect();
    assert_eq!(
        hub.blob_bytes_sent() + ghcr.blob_bytes_sent(),
        sizes.values().sum::<u64>(),
        "every blob once"
    );
    hub.switch_off();
    ghcr.switch_off();
    all_pull();
    Agent::on(&host).assert_stores(ours.contents().into_iter().chain(theirs.contents()));
}
