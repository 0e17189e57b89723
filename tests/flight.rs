//! One download for any number of readers, whatever becomes of them.

mod support;

use support::agent::{Agent, Setup};
use support::client::{Response, Sent};
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::{Fault, On, Upstream};

/// Bytes at the end that no reader gets before the blob is verified.
const HOLDBACK: usize = MIB;

/// A hub that has a blob of 4 MiB, and a mirror of it.
fn with_blob() -> (Upstream, Agent, Blob) {
    let (hub, blob) = (Upstream::start(), Blob::new(1, 4 * MIB));
    hub.push_blob("library/app", &blob);
    let agent = Setup::mirror(&hub).start();
    (hub, agent, blob)
}

fn target(blob: &Blob) -> String {
    format!("/v2/library/app/blobs/{}", blob.digest)
}

fn open(agent: &Agent, blob: &Blob, range: &str) -> Response {
    begin(agent, blob, range).response().expect("an answer")
}

fn begin(agent: &Agent, blob: &Blob, range: &str) -> Sent {
    agent
        .request("GET", &target(blob))
        .header("Range", range)
        .begin()
        .expect("a connection")
}

#[test]
fn sixteen_clients_of_a_cold_blob_cause_one_download() {
    let (hub, agent, blob) = with_blob();
    let gate = hub.hold(On::get(&blob.digest), 2 * MIB);
    let mut readers = [(); 16].map(|()| agent.request("GET", &target(&blob)).open());
    for reader in &mut readers {
        assert!(reader.read(512 * KIB) == blob.bytes[..512 * KIB]);
    }
    gate.reached();
    gate.open();
    for reader in readers {
        let rest = reader.finish();
        assert!(rest.complete && rest.body == blob.bytes[512 * KIB..]);
    }
    let downloads = hub.served("GET", &blob.digest);
    let sent: Vec<usize> = downloads.iter().map(|download| download.sent).collect();
    assert_eq!(sent, [blob.len()]);
}

#[test]
fn readers_of_any_range_follow_one_growing_blob() {
    let (hub, agent, blob) = with_blob();
    let gate = hub.hold(On::get(&blob.digest), 2 * MIB);
    let mut whole = open(&agent, &blob, "bytes=0-");
    assert!(whole.read(KIB) == blob.bytes[..KIB]);
    gate.reached();
    // What has arrived is served now...
    for (range, bytes) in [
        ("bytes=0-99", 0..100),
        ("bytes=1000000-1999999", 1_000_000..2_000_000),
    ] {
        let reply = open(&agent, &blob, range).finish();
        assert!(reply.complete && reply.body == blob.bytes[bytes], "{range}");
    }
    // ... and the rest when it arrives.
    let across = begin(&agent, &blob, "bytes=2000000-2999999");
    let suffix = begin(&agent, &blob, "bytes=-10");
    gate.open();
    for (range, response, bytes) in [
        ("whole", whole, KIB..4 * MIB),
        ("across", across.response().unwrap(), 2_000_000..3_000_000),
        ("suffix", suffix.response().unwrap(), 4 * MIB - 10..4 * MIB),
    ] {
        let (status, reply) = (response.status, response.finish());
        assert_eq!(status, 206, "{range}");
        assert!(reply.complete && reply.body == blob.bytes[bytes], "{range}");
    }
    assert_eq!(hub.served("GET", &blob.digest).len(), 1);
}

#[test]
fn a_download_goes_on_when_its_readers_have_left() {
    let (hub, agent, blob) = with_blob();
    let gate = hub.hold(On::get(&blob.digest), 2 * MIB);
    let mut readers = [(); 3].map(|()| open(&agent, &blob, "bytes=0-"));
    for reader in &mut readers {
        reader.read(KIB);
    }
    gate.reached();
    drop(readers);
    gate.open();
    agent.wait_until_stored([&blob]);
    assert!(std::fs::read(agent.stored_blob(&blob.digest)).unwrap() == blob.bytes);
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    assert_eq!(hub.served("GET", &blob.digest).len(), 1);
}

#[test]
fn the_last_bytes_are_held_back_until_the_blob_is_verified() {
    let (hub, agent, blob) = with_blob();
    let gate = hub.hold(On::get(&blob.digest), blob.len() - 1);
    let mut whole = agent.request("GET", &target(&blob)).open();
    let end = begin(&agent, &blob, "bytes=-100");
    gate.reached();
    let before = whole.read_until_silence();
    assert!(
        before.len() <= blob.len() - HOLDBACK,
        "{} bytes before the last",
        before.len()
    );
    assert!(
        !before.is_empty(),
        "what is not held back is sent as it arrives"
    );
    gate.open();
    let rest = whole.finish();
    assert!(rest.complete && [before, rest.body].concat() == blob.bytes);
    assert!(end.response().unwrap().finish().body == blob.bytes[blob.len() - 100..]);
}

#[test]
fn a_chunked_upstream_without_a_length_is_served_whole() {
    for length in [100 * KIB, 4 * MIB] {
        let (hub, blob) = (Upstream::start(), Blob::new(2, length));
        hub.push_blob("library/app", &blob);
        let agent = Setup::mirror(&hub).start();
        hub.fault(2, On::get(&blob.digest), Fault::Chunked);
        agent.get(&target(&blob)).assert_is(&blob.bytes);
        let again = agent.get(&target(&blob));
        again.assert_is(&blob.bytes);
        assert_eq!(
            again.header("content-length"),
            Some(length.to_string().as_str())
        );
        assert_eq!(hub.served("GET", &blob.digest).len(), 1);
    }
}

#[test]
fn a_growing_blob_is_shared_with_the_repositories_that_have_it_and_no_other() {
    let (hub, agent, blob) = with_blob();
    hub.push_blob("library/also", &blob);
    hub.push("library/without", "latest", &Image::small(1));
    let gate = hub.hold(On::get(&blob.digest), 2 * MIB);
    let first = begin(&agent, &blob, "bytes=0-");
    gate.reached();
    let of = |name: &str| agent.request("GET", &format!("/v2/{name}/blobs/{}", blob.digest));
    of("library/without")
        .send()
        .assert_error(404, "BLOB_UNKNOWN");
    let mut also = of("library/also").open();
    assert!(also.read(KIB) == blob.bytes[..KIB]);
    gate.open();
    assert!(first.response().unwrap().finish().body == blob.bytes);
    assert!(also.finish().body == blob.bytes[KIB..]);
    assert_eq!(hub.served("GET", &blob.digest).len(), 1);
}

/// Sends a request from each of sixteen clients, and opens the gate when all are on their way.
fn herd(hub: &Upstream, on: On, agent: &Agent, target: impl Fn(usize) -> String) -> Vec<Response> {
    let gate = hub.hold(on, 0);
    let request = |number| {
        agent
            .request("GET", &target(number))
            .begin()
            .expect("a connection")
    };
    let requests: Vec<Sent> = (0..16).map(request).collect();
    gate.reached();
    gate.open();
    requests
        .into_iter()
        .map(|request| request.response().expect("an answer"))
        .collect()
}

#[test]
fn many_clients_of_a_cold_manifest_make_one_request() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let by_digest = image.digest();
    for reference in ["latest", by_digest] {
        let agent = Setup::mirror(&hub).start();
        let before = hub.served("GET", "/manifests/").len();
        let target = format!("/v2/library/app/manifests/{reference}");
        for response in herd(&hub, On::get("/manifests/"), &agent, |_| target.clone()) {
            response.finish().assert_is(&image.manifest.blob.bytes);
        }
        assert_eq!(
            hub.served("GET", "/manifests/").len() - before,
            1,
            "{reference}"
        );
    }
}

#[test]
fn many_requests_ask_for_one_token() {
    let (hub, images) = (
        Upstream::start(),
        (0..16).map(Image::small).collect::<Vec<Image>>(),
    );
    for (number, image) in images.iter().enumerate() {
        hub.push("library/app", &format!("t{number}"), image);
    }
    let agent = Setup::mirror(&hub).start();
    let tag = |number| format!("/v2/library/app/manifests/t{number}");
    for (image, response) in images
        .iter()
        .zip(herd(&hub, On::get("/token"), &agent, tag))
    {
        response.finish().assert_is(&image.manifest.blob.bytes);
    }
    assert_eq!(hub.count("GET", "/token"), 1);
}
