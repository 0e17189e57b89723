//! What a container client gets from the mirror, and what the mirror keeps of it.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use support::agent::{Agent, Setup};
use support::image::{Blob, DOCKER_MANIFEST, Image, KIB, MIB, Manifest, OCI_INDEX, OCI_MANIFEST};
use support::upstream::{ALWAYS, Fault, On, Upstream};
use support::{PATIENCE, eventually};

/// A hub with an image as `library/app:latest`, and a mirror of it.
fn mirror_of(image: &Image) -> (Upstream, Agent) {
    let hub = Upstream::start();
    hub.push("library/app", "latest", image);
    let agent = Setup::mirror(&hub).start();
    (hub, agent)
}

#[test]
fn the_base_of_the_api_and_the_root_answer_without_the_upstream() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).start();
    hub.switch_off();
    for method in ["GET", "HEAD"] {
        let base = agent.request(method, "/v2/").send();
        assert_eq!(base.status, 200, "{method}");
        assert_eq!(
            base.header("docker-distribution-api-version"),
            Some("registry/2.0")
        );
        assert_eq!(
            agent.request(method, "/").send().status,
            200,
            "for a load balancer's check"
        );
    }
    assert_eq!(hub.total(), 0);
}

#[test]
fn a_manifest_is_served_byte_for_byte_by_tag_and_by_digest() {
    let image = Image::small(1);
    let (manifest, length) = (&image.manifest, image.manifest.blob.len().to_string());
    for reference in ["latest", manifest.digest()] {
        // The first request of each is a miss.
        for first in ["GET", "HEAD"] {
            let (_hub, agent) = mirror_of(&image);
            for method in [first, "GET", "HEAD"] {
                let target = format!("/v2/library/app/manifests/{reference}");
                let reply = agent.request(method, &target).send();
                assert_eq!(reply.status, 200, "{method} {target}");
                let headers = ["docker-content-digest", "content-length", "content-type"];
                assert_eq!(
                    headers.map(|name| reply.header(name).unwrap_or_default()),
                    [manifest.digest(), &length, OCI_MANIFEST],
                    "{method} {target}"
                );
                let version = reply.header("docker-distribution-api-version");
                assert_eq!(version, Some("registry/2.0"));
                let body: &[u8] = if method == "GET" {
                    &manifest.blob.bytes
                } else {
                    b""
                };
                assert!(reply.body == body, "{method} {target}");
            }
        }
    }
}

#[test]
fn a_manifest_is_of_the_type_that_it_says_or_that_its_fields_show() {
    let (hub, config) = (
        Upstream::start(),
        json!({"digest": Image::small(1).config.digest}),
    );
    let agent = Setup::mirror(&hub).start();
    for (tag, media_type, document) in [
        (
            "said",
            DOCKER_MANIFEST,
            json!({"mediaType": DOCKER_MANIFEST, "config": config}),
        ),
        (
            "index",
            OCI_INDEX,
            json!({"schemaVersion": 2, "manifests": []}),
        ),
        (
            "manifest",
            OCI_MANIFEST,
            json!({"schemaVersion": 2, "config": config, "layers": []}),
        ),
    ] {
        hub.push_manifest(
            "library/app",
            Some(tag),
            &Manifest::new(media_type, &document),
        );
        for _cold_and_warm in 0..2 {
            let reply = agent.get(&format!("/v2/library/app/manifests/{tag}"));
            assert_eq!(reply.header("content-type"), Some(media_type), "{tag}");
        }
    }
}

#[test]
fn an_index_and_the_images_it_lists_are_pulled_by_digest() {
    let (hub, images) = (Upstream::start(), [Image::small(1), Image::small(2)]);
    let index = Manifest::index(&[&images[0], &images[1]]);
    hub.push_manifest("library/app", Some("latest"), &index);
    for image in &images {
        hub.push("library/app", "unused", image);
    }
    let agent = Setup::mirror(&hub).start();
    agent
        .get("/v2/library/app/manifests/latest")
        .assert_is(&index.blob.bytes);
    for image in &images {
        agent.pull("library/app", image.digest(), image);
    }
}

#[test]
fn a_blob_is_served_with_its_digest_and_length() {
    let image = Image::small(1);
    let layer = image.layer();
    let target = format!("/v2/library/app/blobs/{}", layer.digest);
    for first in ["GET", "HEAD"] {
        let (_hub, agent) = mirror_of(&image);
        for method in [first, "GET", "HEAD"] {
            let reply = agent.request(method, &target).send();
            assert_eq!(reply.status, 200, "{method}");
            let headers = ["docker-content-digest", "content-length", "content-type"];
            assert_eq!(
                headers.map(|name| reply.header(name).unwrap_or_default()),
                [&layer.digest, "10240", "application/octet-stream"],
                "{method} after {first}"
            );
            let body: &[u8] = if method == "GET" { &layer.bytes } else { b"" };
            assert!(reply.body == body, "{method} after {first}");
        }
    }
}

/// A client's Range, the status it gets, the Content-Range, and which of 10,240 bytes.
type RangeCase = (
    &'static str,
    u16,
    Option<&'static str>,
    std::ops::Range<usize>,
);

/// Source: RFC 9110, section 14. A Range that is not understood, or would need a multipart answer,
/// is ignored, as the RFC allows.
const RANGES: [RangeCase; 15] = [
    ("bytes=0-0", 206, Some("bytes 0-0/10240"), 0..1),
    ("bytes=0-99", 206, Some("bytes 0-99/10240"), 0..100),
    ("bytes=100-199", 206, Some("bytes 100-199/10240"), 100..200),
    ("bytes=100-", 206, Some("bytes 100-10239/10240"), 100..10240),
    (
        "bytes=10239-",
        206,
        Some("bytes 10239-10239/10240"),
        10239..10240,
    ),
    (
        "bytes=100-999999",
        206,
        Some("bytes 100-10239/10240"),
        100..10240,
    ),
    (
        "bytes=-100",
        206,
        Some("bytes 10140-10239/10240"),
        10140..10240,
    ),
    ("bytes=-999999", 206, Some("bytes 0-10239/10240"), 0..10240),
    ("bytes=10240-", 416, Some("bytes */10240"), 0..0),
    ("bytes=99999-100000", 416, Some("bytes */10240"), 0..0),
    ("bytes=-0", 416, Some("bytes */10240"), 0..0),
    ("bytes=0-1,5-6", 200, None, 0..10240),
    ("bytes=5-2", 416, Some("bytes */10240"), 0..0),
    ("bytes=x-", 200, None, 0..10240),
    ("lines=0-1", 200, None, 0..10240),
];

#[test]
fn a_blob_is_served_in_ranges_cold_and_warm() {
    let (hub, agent) = mirror_of(&Image::small(0));
    for (seed, (range, status, content_range, bytes)) in (1..).zip(RANGES) {
        let blob = Blob::new(seed, 10 * KIB);
        hub.push_blob("library/app", &blob);
        let target = format!("/v2/library/app/blobs/{}", blob.digest);
        for temperature in ["cold", "warm"] {
            let reply = agent.request("GET", &target).header("Range", range).send();
            assert_eq!(reply.status, status, "{temperature} {range}");
            assert_eq!(
                reply.header("content-range"),
                content_range,
                "{temperature} {range}"
            );
            if status != 416 {
                assert_eq!(
                    reply.header("accept-ranges"),
                    Some("bytes"),
                    "{temperature} {range}"
                );
                assert!(
                    reply.body == blob.bytes[bytes.clone()],
                    "{temperature} {range}"
                );
            }
        }
        // Range has no meaning for HEAD.
        let head = agent.request("HEAD", &target).header("Range", range).send();
        assert_eq!(
            (head.status, head.header("content-length")),
            (200, Some("10240")),
            "{range}"
        );
    }
}

#[test]
fn content_that_the_client_has_is_not_sent_again() {
    let image = Image::small(1);
    let (_hub, agent) = mirror_of(&image);
    agent.pull("library/app", "latest", &image);
    for (path, digest) in [
        ("manifests/latest".to_owned(), image.digest()),
        (format!("manifests/{}", image.digest()), image.digest()),
        (
            format!("blobs/{}", image.layer().digest),
            &image.layer().digest,
        ),
    ] {
        for (condition, status) in [
            (format!("\"{digest}\""), 304),
            (format!("W/\"{digest}\""), 304),
            (format!("\"other\", \"{digest}\""), 304),
            ("*".to_owned(), 304),
            ("\"other\"".to_owned(), 200),
        ] {
            let request = agent.request("GET", &format!("/v2/library/app/{path}"));
            let reply = request.header("If-None-Match", &condition).send();
            assert_eq!(reply.status, status, "{path} {condition}");
            assert_eq!(
                reply.header("etag"),
                Some(format!("\"{digest}\"").as_str()),
                "{path}"
            );
            assert_eq!(reply.body.is_empty(), status == 304, "{path} {condition}");
        }
    }
}

#[test]
fn nothing_is_compressed_on_either_side() {
    let image = Image::small(1);
    let (hub, agent) = mirror_of(&image);
    let digest = &image.layer().digest;
    for target in ["manifests/latest".to_owned(), format!("blobs/{digest}")] {
        for _cold_and_warm in 0..2 {
            let request = agent.request("GET", &format!("/v2/library/app/{target}"));
            // As containerd does.
            let reply = request
                .header("Accept-Encoding", "zstd, gzip, deflate")
                .send();
            assert_eq!(
                (reply.status, reply.header("content-encoding")),
                (200, None),
                "{target}"
            );
        }
    }
    for exchange in hub.asked("GET", "/v2/library/app/") {
        assert_eq!(
            exchange.header("accept-encoding"),
            Some("identity"),
            "{}",
            exchange.path
        );
    }
}

#[test]
fn a_blob_is_fetched_from_where_the_upstream_sends_clients() {
    let (hub, image) = (
        Upstream::options().cdn().start(),
        Image::new(1, &[3 * MIB, KIB]),
    );
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    assert_eq!(hub.count("GET", "/cdn/"), 3);
}

/// All files below a folder, by their path in it.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(inner) = folders.pop() {
        for entry in std::fs::read_dir(&inner).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path
                    .strip_prefix(folder)
                    .expect("below it")
                    .to_string_lossy();
                found.insert(name.into_owned(), std::fs::read(&path).unwrap_or_default());
            }
        }
    }
    found
}

#[test]
fn the_store_is_in_distributions_layout() {
    let image = Image::new(1, &[3 * MIB, KIB]);
    let (_hub, agent) = mirror_of(&image);
    agent.pull("library/app", "latest", &image);

    let mut expected = BTreeMap::new();
    let path = |digest: &str| digest.replace(':', "/");
    let repository = "repositories/library/app";
    for blob in image.blobs().chain([&image.manifest.blob]) {
        let (algorithm, hex) = blob.digest.split_once(':').unwrap();
        let data = format!("blobs/{algorithm}/{}/{hex}/data", &hex[..2]);
        expected.insert(data, blob.bytes.to_vec());
        if blob.digest != image.digest() {
            let link = format!("{repository}/_layers/{}/link", path(&blob.digest));
            expected.insert(link, blob.digest.clone().into_bytes());
        }
    }
    for link in ["revisions", "tags/latest/index"] {
        let link = format!(
            "{repository}/_manifests/{link}/{}/link",
            path(image.digest())
        );
        expected.insert(link, image.digest().into());
    }
    let current = format!("{repository}/_manifests/tags/latest/current/link");
    expected.insert(current, image.digest().into());

    eventually(PATIENCE, "everything is in its place", || {
        let stored = files(&agent.stored(""));
        expected.keys().all(|path| stored.contains_key(path))
    });
    let stored = files(&agent.stored(""));
    let other: Vec<&String> = stored
        .keys()
        .filter(|path| !expected.contains_key(*path))
        .collect();
    assert!(
        other.is_empty(),
        "these files are not of the layout: {other:?}"
    );
    for (path, content) in &expected {
        assert!(
            stored[path] == *content,
            "{path}: {:?}",
            String::from_utf8_lossy(&stored[path])
        );
    }
}

#[test]
fn another_registry_is_chosen_by_ns_or_by_host_name_and_kept_apart() {
    let (hub, other) = (Upstream::start(), Upstream::start());
    let third = Upstream::start();
    let [of_hub, of_other, of_third] = [1, 2, 3].map(Image::small);
    hub.push("owner/app", "latest", &of_hub);
    other.push("owner/app", "latest", &of_other);
    third.push("owner/app", "latest", &of_third);
    let agent = Setup::mirror(&hub)
        .upstream("registry.test", &other)
        .upstream("owner:5000", &third)
        .start();
    for (target, image) in [
        ("/v2/owner/app/manifests/latest", &of_hub),
        ("/v2/owner/app/manifests/latest?ns=docker.io", &of_hub),
        ("/v2/docker.io/owner/app/manifests/latest", &of_hub),
        ("/v2/owner/app/manifests/latest?ns=registry.test", &of_other),
        ("/v2/registry.test/owner/app/manifests/latest", &of_other),
        ("/v2/owner/app/manifests/latest?ns=owner:5000", &of_third),
        ("/v2/owner:5000/owner/app/manifests/latest", &of_third),
    ] {
        agent.get(target).assert_is(&image.manifest.blob.bytes);
    }
    let blob = format!("blobs/{}", of_other.layer().digest);
    let bytes = &of_other.layer().bytes;
    agent
        .get(&format!("/v2/owner/app/{blob}?ns=registry.test"))
        .assert_is(bytes);
    agent
        .get(&format!("/v2/registry.test/owner/app/{blob}"))
        .assert_is(bytes);
    assert_eq!(
        (
            hub.count("GET", "/manifests/"),
            other.count("GET", "/manifests/")
        ),
        (1, 1)
    );
    for (folder, image) in [
        ("owner/app", &of_hub),
        ("registry.test/owner/app", &of_other),
        ("owner:5000/owner/app", &of_third),
    ] {
        let link = format!("repositories/{folder}/_manifests/tags/latest/current/link");
        let link = std::fs::read_to_string(agent.stored(&link)).unwrap();
        assert_eq!(link, image.digest(), "{folder}");
    }
    for target in [
        "/v2/owner/app/manifests/latest?ns=unknown.test",
        "/v2/owner:5001/owner/app/manifests/latest",
    ] {
        agent.get(target).assert_error(404, "NAME_UNKNOWN");
    }
}

/// image-spec, "Digests": SHA-512 is a registered algorithm as well.
#[test]
fn what_is_known_by_its_sha512_is_served_checked_and_kept_as_such() {
    let layer = Blob::new(1, 2 * MIB).by_sha512();
    let document = json!({
        "schemaVersion": 2,
        "layers": [{"digest": layer.digest, "size": layer.len()}],
    });
    let mut manifest = Manifest::new(OCI_MANIFEST, &document);
    manifest.blob = manifest.blob.by_sha512();
    let hub = Upstream::start();
    hub.push_manifest("library/app", Some("latest"), &manifest);
    hub.push_blob("library/app", &layer);
    let agent = Setup::mirror(&hub).start();
    let by_digest = format!("/v2/library/app/manifests/{}", manifest.digest());
    let blob = format!("/v2/library/app/blobs/{}", layer.digest);
    hub.fault(ALWAYS, On::get(&layer.digest), Fault::WrongByte(MIB));
    let wrong = agent.get(&blob);
    assert!(!wrong.complete || wrong.status == 503, "{}", wrong.status);
    assert!(!agent.stored_blob(&layer.digest).exists());
    hub.heal();
    for _ in 0..2 {
        agent.get(&by_digest).assert_is(&manifest.blob.bytes);
        agent.get(&blob).assert_is(&layer.bytes);
        agent.wait_until_stored([&layer, &manifest.blob]);
        hub.switch_off();
    }
}
