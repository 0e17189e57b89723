//! Hosted names: what is served of them, listed, deleted and refused; and that they are never mixed
//! with an upstream's.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/cloud.rs"]
mod cloud;
#[path = "support/home.rs"]
mod home;
#[path = "support/s3.rs"]
mod server;
mod support;

use std::fs;

use home::Home;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::agent::{Agent, Setup};
use support::client::Reply;
use support::disk::age;
use support::image::{Blob, Image, KIB, MIB, Manifest, OCI_INDEX, OCI_MANIFEST};
use support::upstream::Upstream;
use support::{PATIENCE, eventually, write_file};

const NAME: &str = "mycompany/app";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

on_each_home! {
    a_manifest_is_pushed_by_tag_and_by_digest,
    a_manifest_is_known_by_its_sha512_as_well,
    a_manifest_has_4_mib_at_the_most,
    what_is_no_manifest_is_refused_and_any_media_type_is_taken,
    what_may_be_missing_is_configured,
    referrers_are_listed_with_their_types_and_annotations,
    tags_are_listed_in_order_a_page_at_a_time,
    what_is_deleted_is_gone_at_once,
    a_delete_is_refused_unless_it_is_allowed,
    immutable_tags_stay_what_they_are,
    a_shard_takes_pushes_for_its_own_names_alone,
    ranges_of_a_hosted_blob_are_served,
    pushes_to_one_tag_at_once_end_with_one_of_them,
    parameters_of_a_content_type_are_ignored,
}

on_the_disk_alone! {
    the_fallback_tags_entries_are_merged:
        "a bucket keeps a key for each referrer, and does not merge the tag yet",
    many_referrers_come_in_pages:
        "it lays down files of the disk",
    a_page_of_referrers_is_no_larger_than_clients_read:
        "what is read of a bucket comes in one page",
}

fn manifests(reference: &str) -> String {
    format!("/v2/{NAME}/manifests/{reference}")
}

fn tags(agent: &Agent, query: &str) -> Reply {
    agent.get(&format!("/v2/{NAME}/tags/list{query}"))
}

fn descriptor(blob: &Blob, media_type: &str) -> Value {
    json!({"mediaType": media_type, "digest": blob.digest, "size": blob.len()})
}

/// An artifact with a subject, and its blob pushed.
fn artifact(agent: &Agent, number: u64, subject: &Value, kind: Option<&str>) -> Manifest {
    let config = Blob::of(format!("{{\"number\": {number}}}"));
    agent.push_blob(NAME, &config);
    let mut document = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [],
        "config": descriptor(&config, EMPTY), "subject": subject,
        "annotations": {"number": format!("{number}")},
    });
    if let Some(kind) = kind {
        document["artifactType"] = kind.into();
    }
    Manifest::new(OCI_MANIFEST, &document)
}

#[test]
fn other_names_are_mirrored_and_take_no_push() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub)
        .set("hosted", json!(["mycompany/*", "one"]))
        .start();
    agent.pull("library/app", "latest", &image);
    let asked = hub.total();
    for (method, target) in [
        ("POST", "/v2/library/app/blobs/uploads/".to_owned()),
        ("PUT", "/v2/library/app/manifests/latest".to_owned()),
        ("DELETE", "/v2/library/app/manifests/latest".to_owned()),
        ("POST", "/v2/mycompanyx/app/blobs/uploads/".to_owned()),
        (
            "POST",
            "/v2/mycompany/app/blobs/uploads/?ns=ghcr.io".to_owned(),
        ),
    ] {
        let reply = agent.request(method, &target).body(b"").send();
        reply.assert_error(405, "UNSUPPORTED");
        let message = reply.json()["errors"][0]["message"].to_string();
        assert!(message.contains("mycompany/*, one"), "{message}");
    }
    assert_eq!(hub.total(), asked);
}

#[test]
fn hosted_names_are_never_asked_of_an_upstream() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push(NAME, "latest", &image);
    let agent = Setup::mirror(&hub)
        .set("hosted", json!(["mycompany/*"]))
        .start();
    let layer = &image.layer().digest;
    for name in [
        NAME,
        "docker.io/mycompany/app",
        "index.docker.io/mycompany/app",
    ] {
        for query in ["", "?ns=docker.io"] {
            for (what, known) in [
                (format!("manifests/latest{query}"), false),
                (format!("manifests/{}{query}", image.digest()), false),
                (format!("blobs/{layer}{query}"), false),
                (format!("tags/list{query}"), false),
                (format!("referrers/{}{query}", image.digest()), true),
            ] {
                let target = format!("/v2/{name}/{what}");
                let reply = agent.get(&target);
                assert_eq!(reply.status, if known { 200 } else { 404 }, "{target}");
                agent.head(&target);
            }
        }
    }
    assert_eq!(hub.total(), 0);
    // It is pulled by all of its names as well.
    let own = Image::small(2);
    agent.push(NAME, "latest", &own);
    for query in ["", "?ns=docker.io"] {
        let reply = agent.get(&(manifests("latest") + query));
        reply.assert_is(&own.manifest.blob.bytes);
    }
    assert_eq!(hub.total(), 0);
}

#[test]
fn what_was_cached_before_a_name_was_hosted_is_not_served_as_its_own() {
    let (hub, cached, own) = (Upstream::start(), Image::small(1), Image::small(2));
    hub.push(NAME, "latest", &cached);
    hub.push(NAME, "old", &cached);
    let mut agent = Setup::mirror(&hub).start();
    agent.pull(NAME, "latest", &cached);
    agent.pull(NAME, "old", &cached);
    agent.wait_until_stored(cached.blobs());
    agent.rewrite("hosted", json!(["mycompany/*"]));
    // Also what is in memory, when the configuration is read again.
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "it is hosted", || {
        agent.get(&manifests("old")).status == 404
    });
    let asked = hub.total();
    for restarted in [false, true] {
        if restarted {
            agent.kill();
            agent.start_again();
            agent.wait_until_ready();
        }
        agent
            .get(&manifests("latest"))
            .assert_error(404, "NAME_UNKNOWN");
        agent
            .get(&manifests(cached.digest()))
            .assert_error(404, "NAME_UNKNOWN");
        tags(&agent, "").assert_error(404, "NAME_UNKNOWN");
        let layer = agent.get(&format!("/v2/{NAME}/blobs/{}", cached.layer().digest));
        layer.assert_error(404, "BLOB_UNKNOWN");
        assert_eq!(agent.get("/v2/_catalog").json()["repositories"], json!([]));
    }
    agent.push(NAME, "latest", &own);
    agent.pull(NAME, "latest", &own);
    agent
        .get(&manifests("old"))
        .assert_error(404, "MANIFEST_UNKNOWN");
    assert_eq!(tags(&agent, "").json()["tags"], json!(["latest"]));
    let layer = agent.get(&format!("/v2/{NAME}/blobs/{}", cached.layer().digest));
    layer.assert_error(404, "BLOB_UNKNOWN");
    assert!(agent.log().contains("is set aside"));
    assert!(
        agent
            .folder()
            .join("store/registry-agent/aside/mycompany/app")
            .exists()
    );
    assert_eq!(
        agent.get("/v2/_catalog").json()["repositories"],
        json!([NAME])
    );
    assert_eq!(hub.total(), asked);
}

#[test]
fn what_was_pushed_to_another_registry_is_adopted_where_that_is_said() {
    let (mut agent, image) = (Setup::hosting().start(), Image::small(1));
    agent.push(NAME, "latest", &image);
    agent.kill();
    // What is left is what registry:2 writes.
    fs::remove_dir_all(agent.folder().join("store/registry-agent")).unwrap();
    agent.start_again();
    agent.wait_until_ready();
    agent
        .get(&manifests("latest"))
        .assert_error(404, "NAME_UNKNOWN");
    agent.kill();
    agent.rewrite("adopt", json!(["mycompany/*"]));
    agent.start_again();
    agent.wait_until_ready();
    agent.pull(NAME, "latest", &image);
    assert_eq!(
        agent.get("/v2/_catalog").json()["repositories"],
        json!([NAME])
    );
    let second = Image::small(2);
    agent.push(NAME, "second", &second);
    agent.pull(NAME, "latest", &image);
    assert_eq!(tags(&agent, "").json()["tags"], json!(["latest", "second"]));
}

#[test]
fn what_is_hosted_no_longer_is_not_given_out_as_the_upstreams() {
    let (hub, theirs, own) = (Upstream::start(), Image::small(1), Image::small(2));
    hub.push(NAME, "latest", &theirs);
    let mut agent = Setup::mirror(&hub)
        .set("hosted", json!(["mycompany/*"]))
        .start();
    agent.push(NAME, "latest", &own);
    agent.kill();
    agent.rewrite("hosted", json!(["else/*"]));
    agent.start_again();
    agent.wait_until_ready();
    let reply = agent.get(&manifests("latest"));
    reply.assert_error(404, "NAME_UNKNOWN");
    assert!(
        reply.json()["errors"][0]["message"]
            .to_string()
            .contains("hosted no longer")
    );
}

#[test]
fn what_was_pushed_is_never_evicted() {
    let (hub, hosted) = (Upstream::start(), Image::new(9, &[300 * KIB]));
    let mirrored: Vec<Image> = (1..6).map(|seed| Image::new(seed, &[300 * KIB])).collect();
    for (number, image) in mirrored.iter().enumerate() {
        hub.push(&format!("library/i{number}"), "latest", image);
    }
    let setup = Setup::mirror(&hub).set("hosted", json!(["mycompany/*"]));
    let setup = setup
        .set("storage.cache.limit", "1MB")
        .set("health.interval", "50ms");
    let mut agent = setup.small_disk(32 * MIB).start();
    agent.push(NAME, "v1", &hosted);
    let tagless = Blob::new(77, 50 * KIB);
    agent.push_blob(NAME, &tagless);
    agent.kill();
    for blob in hosted.blobs().chain([&hosted.manifest.blob, &tagless]) {
        age(&agent.stored_blob(&blob.digest), 1000);
    }
    agent.start_again();
    agent.wait_until_ready();
    for (number, image) in mirrored.iter().enumerate() {
        agent.pull(&format!("library/i{number}"), "latest", image);
    }
    eventually(PATIENCE, "something was evicted", || {
        agent.metric("registry_agent_evicted_blobs_total") > 0.0
    });
    agent.pull(NAME, "v1", &hosted);
    let target = format!("/v2/{NAME}/blobs/{}", tagless.digest);
    agent.get(&target).assert_is(&tagless.bytes);
}

fn a_manifest_is_pushed_by_tag_and_by_digest(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    for blob in image.blobs() {
        agent.push_blob(NAME, blob);
    }
    for reference in ["v1", image.digest()] {
        let reply = agent.push_manifest(NAME, reference, &image.manifest);
        assert_eq!(reply.status, 201, "{reply:?}");
        assert_eq!(reply.header("location"), Some(&*manifests(reference)));
        assert_eq!(reply.header("docker-content-digest"), Some(image.digest()));
        assert_eq!(reply.header("oci-subject"), None);
        for method in ["GET", "HEAD"] {
            let reply = agent.request(method, &manifests(reference)).send();
            assert_eq!(reply.status, 200);
            assert_eq!(reply.header("content-type"), Some(OCI_MANIFEST));
            assert_eq!(reply.header("docker-content-digest"), Some(image.digest()));
            let length = image.manifest.blob.len().to_string();
            assert_eq!(reply.header("content-length"), Some(&*length));
        }
    }
    let other = Image::small(2);
    let wrong = agent.push_manifest(NAME, other.digest(), &image.manifest);
    wrong.assert_error(400, "DIGEST_INVALID");
    let wrong = agent.push_manifest(NAME, "sha256:bad", &image.manifest);
    wrong.assert_error(400, "DIGEST_INVALID");
    let unknown = agent.get(&manifests("none"));
    unknown.assert_error(404, "MANIFEST_UNKNOWN");
    let code = home.expected("the code of a pull from a repository that is not there");
    agent
        .get("/v2/mycompany/none/manifests/v1")
        .assert_error(404, code);
}

fn a_manifest_is_known_by_its_sha512_as_well(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    for blob in image.blobs() {
        agent.push_blob(NAME, &blob.clone().by_sha512());
        agent.push_blob(NAME, blob);
    }
    let mut manifest = image.manifest.clone();
    manifest.blob = manifest.blob.by_sha512();
    let target = format!("{}?tag=one&tag=two", manifests(manifest.digest()));
    let put = agent
        .request("PUT", &target)
        .header("Content-Type", OCI_MANIFEST);
    let put = put.body(&manifest.blob.bytes).send();
    assert_eq!(put.status, 201, "{put:?}");
    let moved: Vec<&str> = put
        .headers
        .iter()
        .filter(|(name, _)| name == "oci-tag")
        .map(|(_, value)| value.as_str())
        .collect();
    assert_eq!(moved, ["one", "two"]);
    for reference in ["one", "two", manifest.digest()] {
        let reply = agent.get(&manifests(reference));
        reply.assert_is(&manifest.blob.bytes);
        let digest = reply.header("docker-content-digest");
        assert_eq!(digest, Some(manifest.digest()), "{reference}");
    }
    for (reference, query) in [("one", "?tag=two"), (manifest.digest(), "?tag=-")] {
        let target = manifests(reference) + query;
        let put = agent
            .request("PUT", &target)
            .body(&manifest.blob.bytes)
            .send();
        put.assert_error(400, "MANIFEST_INVALID");
    }
}

fn a_manifest_has_4_mib_at_the_most(home: &Home) {
    let agent = home.hosting().start();
    let mut before = 0;
    for (length, status) in [(4 * MIB, 201), (4 * MIB + 1, 413), (30 * MIB, 413)] {
        before = agent.peak_memory();
        let mut text =
            format!("{{\"schemaVersion\":2,\"mediaType\":\"{OCI_INDEX}\",\"manifests\":[]");
        text += &" ".repeat(length - text.len() - 1);
        text += "}";
        let put = agent
            .request("PUT", &manifests("large"))
            .header("Content-Type", OCI_INDEX);
        let reply = put.body(text.as_bytes()).send();
        assert_eq!(reply.status, status, "{length}");
        let streamed = agent
            .request("PUT", &manifests("large"))
            .header("Content-Type", OCI_INDEX);
        assert_eq!(
            streamed.stream(text.as_bytes()).send().status,
            status,
            "{length}"
        );
    }
    assert_eq!(agent.get(&manifests("large")).body.len(), 4 * MIB);
    // What is larger is not read to its end before it is refused.
    let grown = agent.peak_memory() - before;
    assert!(grown < 20 * MIB, "{} MiB", grown / MIB);
}

fn what_is_no_manifest_is_refused_and_any_media_type_is_taken(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    for (text, media_type) in [
        ("", OCI_MANIFEST),
        ("[]", OCI_MANIFEST),
        ("{", OCI_MANIFEST),
        ("{}", OCI_MANIFEST),
        (r#"{"schemaVersion":2,"manifests":[]}"#, OCI_MANIFEST),
        (r#"{"schemaVersion":1,"manifests":[]}"#, OCI_INDEX),
        (
            r#"{"schemaVersion":2,"manifests":[{"digest":"md5:1","size":1,"mediaType":"a/b"}]}"#,
            OCI_INDEX,
        ),
        (r#"{"mediaType":"application/x"}"#, "application/y"),
    ] {
        let put = agent
            .request("PUT", &manifests("wrong"))
            .header("Content-Type", media_type);
        put.body(text.as_bytes())
            .send()
            .assert_error(400, "MANIFEST_INVALID");
    }
    let lacking = agent.push_manifest(NAME, "lacking", &image.manifest);
    lacking.assert_error(400, "MANIFEST_BLOB_UNKNOWN");
    let errors = lacking.json()["errors"].as_array().unwrap().clone();
    let mut named: Vec<&str> = errors
        .iter()
        .map(|e| e["detail"]["digest"].as_str().unwrap())
        .collect();
    named.sort_unstable();
    let mut expected: Vec<&str> = image.blobs().map(|blob| &*blob.digest).collect();
    expected.sort_unstable();
    assert_eq!(named, expected);
    let media_type = "application/vnd.example.thing.v1+json";
    let any = Manifest::new(
        media_type,
        &json!({"mediaType": media_type, "thing": [1, 2]}),
    );
    assert_eq!(agent.push_manifest(NAME, "any", &any).status, 201);
    let reply = agent.get(&manifests("any"));
    reply.assert_is(&any.blob.bytes);
    assert_eq!(reply.header("content-type"), Some(media_type));
    // A blob of another repository is none of this one's.
    agent.push("mycompany/other", "v1", &image);
    let lacking = agent.push_manifest(NAME, "lacking", &image.manifest);
    lacking.assert_error(400, "MANIFEST_BLOB_UNKNOWN");
}

fn what_may_be_missing_is_configured(home: &Home) {
    let (image, other) = (Image::small(1), Image::small(2));
    let index = Manifest::index(&[&image, &other]);
    for (sparse, of_index, of_image) in [
        (None, 201, 400),
        (Some("indexes"), 201, 400),
        (Some("never"), 400, 400),
        (Some("always"), 201, 201),
    ] {
        let mut setup = home.hosting();
        if let Some(sparse) = sparse {
            setup = setup.set("sparse", sparse);
        }
        let agent = setup.start();
        agent.push(NAME, "here", &image);
        assert_eq!(
            agent.push_manifest(NAME, "index", &index).status,
            of_index,
            "{sparse:?}"
        );
        let reply = agent.push_manifest(NAME, "image", &other.manifest);
        assert_eq!(reply.status, of_image, "{sparse:?}");
    }
}

fn referrers_are_listed_with_their_types_and_annotations(home: &Home) {
    let (agent, image) = (home.deleting().start(), Image::small(1));
    let target = format!("/v2/{NAME}/referrers/{}", image.digest());
    assert_eq!(agent.get(&target).json()["manifests"], json!([]));
    let subject = descriptor(&image.manifest.blob, OCI_MANIFEST);
    // Before what they are about.
    let first = artifact(&agent, 1, &subject, Some("a/first"));
    let second = artifact(&agent, 2, &subject, None);
    for manifest in [&first, &second] {
        let reply = agent.push_manifest(NAME, manifest.digest(), manifest);
        assert_eq!(reply.status, 201);
        assert_eq!(reply.header("oci-subject"), Some(image.digest()));
    }
    agent.push(NAME, "v1", &image);
    let list = |query: &str| {
        let reply = agent.get(&format!("{target}{query}"));
        assert_eq!(reply.status, 200);
        assert_eq!(reply.header("content-type"), Some(OCI_INDEX));
        let index = reply.json();
        assert_eq!(
            (&index["schemaVersion"], &index["mediaType"]),
            (&json!(2), &json!(OCI_INDEX))
        );
        let filtered = reply.header("oci-filters-applied").map(str::to_owned);
        (index["manifests"].as_array().unwrap().clone(), filtered)
    };
    let expected = |manifest: &Manifest, kind: &str, number: &str| {
        json!({"mediaType": OCI_MANIFEST, "digest": manifest.digest(), "size": manifest.blob.len(),
            "artifactType": kind, "annotations": {"number": number}})
    };
    let (all, filtered) = list("");
    assert_eq!((all.len(), filtered), (2, None));
    assert!(all.contains(&expected(&first, "a/first", "1")), "{all:?}");
    assert!(all.contains(&expected(&second, EMPTY, "2")), "{all:?}");
    let (found, filtered) = list("?artifactType=a/first");
    assert_eq!(found, [expected(&first, "a/first", "1")]);
    assert_eq!(filtered.as_deref(), Some("artifactType"));
    let deleted = agent
        .request("DELETE", &manifests(first.digest()))
        .body(b"")
        .send();
    assert_eq!(deleted.status, 202);
    assert_eq!(list("").0, [expected(&second, EMPTY, "2")]);
    agent
        .get(&format!("/v2/{NAME}/referrers/sha256:1"))
        .assert_error(400, "DIGEST_INVALID");
    assert_eq!(
        agent
            .get(&format!("/v2/mycompany/none/referrers/{}", image.digest()))
            .status,
        200
    );
}

fn the_fallback_tags_entries_are_merged(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    let subject = descriptor(&image.manifest.blob, OCI_MANIFEST);
    let [listed, both, known] = [1, 2, 3].map(|n| artifact(&agent, n, &subject, Some("a/b")));
    for manifest in [&listed, &both, &known] {
        assert_eq!(
            agent
                .push_manifest(NAME, manifest.digest(), manifest)
                .status,
            201
        );
    }
    // As a store has it that was written by a registry from before the API.
    let (algorithm, hex) = listed.digest().split_once(':').unwrap();
    let subjects = agent
        .folder()
        .join("store/registry-agent/subjects")
        .join(NAME);
    let of = image.digest().split_once(':').unwrap().1;
    fs::remove_file(
        subjects
            .join("_of/sha256")
            .join(of)
            .join(algorithm)
            .join(hex),
    )
    .unwrap();
    let other = Image::small(5);
    agent.push(NAME, "other", &other);
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        descriptor(&listed.blob, OCI_MANIFEST),
        descriptor(&both.blob, OCI_MANIFEST),
        // About something else, and not here.
        descriptor(&other.manifest.blob, OCI_MANIFEST),
        descriptor(&Blob::new(8, 10), OCI_MANIFEST),
    ]});
    let tag = image.digest().replace(':', "-");
    let index = Manifest::new(OCI_INDEX, &index);
    assert_eq!(agent.push_manifest(NAME, &tag, &index).status, 201);
    let list = agent
        .get(&format!("/v2/{NAME}/referrers/{}", image.digest()))
        .json();
    let mut found: Vec<&str> = list["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["digest"].as_str().unwrap())
        .collect();
    let mut expected = [listed.digest(), both.digest(), known.digest()];
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

fn tags_are_listed_in_order_a_page_at_a_time(home: &Home) {
    let (agent, image) = (home.deleting().start(), Image::small(1));
    tags(&agent, "").assert_error(404, "NAME_UNKNOWN");
    agent.push(NAME, "b", &image);
    for tag in ["a", "C", "b-1", "_x"] {
        assert_eq!(agent.push_manifest(NAME, tag, &image.manifest).status, 201);
    }
    let all = ["C", "_x", "a", "b", "b-1"];
    let list = tags(&agent, "");
    assert_eq!(list.json(), json!({"name": NAME, "tags": all}));
    assert_eq!(list.header("link"), None);
    let page = tags(&agent, "?n=2");
    assert_eq!(page.json()["tags"], json!(all[..2]));
    let link = page.header("link").unwrap();
    assert_eq!(
        link,
        format!("</v2/{NAME}/tags/list?last=_x&n=2>; rel=\"next\"")
    );
    assert_eq!(
        tags(&agent, "?last=_x&n=2").json()["tags"],
        json!(["a", "b"])
    );
    let end = tags(&agent, "?last=b&n=2");
    assert_eq!(
        (end.json()["tags"].clone(), end.header("link")),
        (json!(["b-1"]), None)
    );
    assert_eq!(tags(&agent, "?last=a").json()["tags"], json!(["b", "b-1"]));
    assert_eq!(tags(&agent, "?last=aa&n=1").json()["tags"], json!(["b"]));
    let none = tags(&agent, "?n=0");
    assert_eq!(
        (none.json()["tags"].clone(), none.header("link")),
        (json!([]), None)
    );
    tags(&agent, "?n=x").assert_error(400, "PAGINATION_NUMBER_INVALID");
    for tag in all {
        let deleted = agent.request("DELETE", &manifests(tag)).body(b"").send();
        assert_eq!(deleted.status, 202);
    }
    assert_eq!(tags(&agent, "").json()["tags"], json!([]));
}

fn what_is_deleted_is_gone_at_once(home: &Home) {
    let (agent, image) = (home.deleting().start(), Image::small(1));
    agent.push(NAME, "one", &image);
    assert_eq!(
        agent.push_manifest(NAME, "two", &image.manifest).status,
        201
    );
    let delete = |target: &str| agent.request("DELETE", target).body(b"").send();
    // In memory as well.
    agent.pull(NAME, "one", &image);
    agent.pull(NAME, "two", &image);
    assert_eq!(delete(&manifests("one")).status, 202);
    agent
        .get(&manifests("one"))
        .assert_error(404, "MANIFEST_UNKNOWN");
    assert_eq!(agent.head(&manifests("one")).status, 404);
    delete(&manifests("one")).assert_error(404, "MANIFEST_UNKNOWN");
    agent.pull(NAME, "two", &image);
    assert_eq!(delete(&manifests(image.digest())).status, 202);
    for reference in ["two", image.digest()] {
        agent
            .get(&manifests(reference))
            .assert_error(404, "MANIFEST_UNKNOWN");
    }
    assert_eq!(tags(&agent, "").json()["tags"], json!([]));
    let layer = format!("/v2/{NAME}/blobs/{}", image.layer().digest);
    agent.get(&layer).assert_is(&image.layer().bytes);
    assert_eq!(delete(&layer).status, 202);
    agent.get(&layer).assert_error(404, "BLOB_UNKNOWN");
    delete(&layer).assert_error(404, "BLOB_UNKNOWN");
    let unknown = "/v2/mycompany/none/manifests/v1";
    delete(unknown).assert_error(404, "NAME_UNKNOWN");
    // And it is pushed again as if it had never been.
    agent.push(NAME, "one", &image);
    agent.pull(NAME, "one", &image);
}

fn a_delete_is_refused_unless_it_is_allowed(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    agent.push(NAME, "one", &image);
    for (target, allowed) in [
        (manifests("one"), "GET, HEAD, PUT"),
        (manifests(image.digest()), "GET, HEAD, PUT"),
        (
            format!("/v2/{NAME}/blobs/{}", image.layer().digest),
            "GET, HEAD",
        ),
    ] {
        let reply = agent.request("DELETE", &target).body(b"").send();
        reply.assert_error(405, "UNSUPPORTED");
        assert_eq!(reply.header("allow"), Some(allowed));
    }
    agent.pull(NAME, "one", &image);
}

#[test]
fn a_blob_is_mounted_from_hosted_names_alone() {
    let (hub, theirs, own) = (Upstream::start(), Image::small(1), Image::small(2));
    hub.push("library/app", "latest", &theirs);
    let agent = Setup::mirror(&hub)
        .set("hosted", json!(["mycompany/*"]))
        .start();
    agent.pull("library/app", "latest", &theirs);
    agent.wait_until_stored(theirs.blobs());
    agent.push("mycompany/source", "v1", &own);
    let mount = |digest: &str, from: &str| {
        let target = format!("/v2/{NAME}/blobs/uploads/?mount={digest}{from}");
        agent.request("POST", &target).body(b"").send()
    };
    let layer = &own.layer().digest;
    for (digest, from) in [
        (layer, "&from=mycompany/none"),
        (layer, "&from=library/app"),
        (&theirs.layer().digest, "&from=library/app"),
        (&theirs.layer().digest, "&from=mycompany/source"),
        (&theirs.layer().digest, ""),
    ] {
        let reply = mount(digest, from);
        assert_eq!(reply.status, 202, "{digest} {from}");
        assert!(
            reply
                .header("location")
                .unwrap()
                .contains("/blobs/uploads/")
        );
        let get = agent.get(&format!("/v2/{NAME}/blobs/{digest}"));
        get.assert_error(404, "BLOB_UNKNOWN");
    }
    for (blob, from) in [(own.layer(), "&from=mycompany/source"), (&own.config, "")] {
        let reply = mount(&blob.digest, from);
        assert_eq!(reply.status, 201, "{from}");
        let location = format!("/v2/{NAME}/blobs/{}", blob.digest);
        assert_eq!(reply.header("location"), Some(&*location));
        assert_eq!(reply.header("docker-content-digest"), Some(&*blob.digest));
        agent.get(&location).assert_is(&blob.bytes);
    }
    mount("md5:1", "").assert_error(400, "DIGEST_INVALID");
    mount(layer, "&from=UPPER").assert_error(400, "NAME_INVALID");
}

fn immutable_tags_stay_what_they_are(home: &Home) {
    let setup = home
        .deleting()
        .set("immutable_tags", json!(["mycompany/*:v*"]));
    let (agent, first, second) = (setup.start(), Image::small(1), Image::small(2));
    agent.push(NAME, "v1", &first);
    agent.push(NAME, "latest", &first);
    agent.push(NAME, "latest", &second);
    assert_eq!(agent.push_manifest(NAME, "v1", &first.manifest).status, 201);
    let moved = agent.push_manifest(NAME, "v1", &second.manifest);
    moved.assert_error(409, "DENIED");
    assert!(
        moved.json()["errors"][0]["message"]
            .to_string()
            .contains("immutable")
    );
    let target = format!("{}?tag=new&tag=v1", manifests(second.digest()));
    let put = agent
        .request("PUT", &target)
        .body(&second.manifest.blob.bytes)
        .send();
    put.assert_error(409, "DENIED");
    agent
        .get(&manifests("new"))
        .assert_error(404, "MANIFEST_UNKNOWN");
    for reference in ["v1", first.digest()] {
        let reply = agent
            .request("DELETE", &manifests(reference))
            .body(b"")
            .send();
        reply.assert_error(409, "DENIED");
    }
    agent
        .get(&manifests("v1"))
        .assert_is(&first.manifest.blob.bytes);
}

fn a_shard_takes_pushes_for_its_own_names_alone(home: &Home) {
    let agent = home
        .hosting()
        .set("shard", json!(["mycompany/a/*"]))
        .start();
    let image = Image::small(1);
    agent.push("mycompany/a/app", "v1", &image);
    for (method, what) in [
        ("POST", "blobs/uploads/".to_owned()),
        ("PUT", "manifests/v1".to_owned()),
        ("DELETE", format!("blobs/{}", image.layer().digest)),
    ] {
        let target = format!("/v2/mycompany/b/app/{what}");
        let reply = agent.request(method, &target).body(b"").send();
        reply.assert_error(403, "DENIED");
        assert!(
            reply.json()["errors"][0]["message"]
                .to_string()
                .contains("mycompany/a/*")
        );
    }
}

fn ranges_of_a_hosted_blob_are_served(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 2048));
    agent.push_blob(NAME, &blob);
    let target = format!("/v2/{NAME}/blobs/{}", blob.digest);
    for (range, expected) in [
        ("bytes=500-1499", Some(500..1500)),
        ("bytes=500-", Some(500..2048)),
        ("bytes=-500", Some(1548..2048)),
        ("bytes=2000-5000", Some(2000..2048)),
        ("bytes=500-0", None),
        ("bytes=5000-10000", None),
    ] {
        let reply = agent.request("GET", &target).header("Range", range).send();
        match expected {
            Some(expected) => {
                assert_eq!(reply.status, 206, "{range}");
                assert!(reply.body == blob.bytes[expected.clone()], "{range}");
                let said = format!("bytes {}-{}/2048", expected.start, expected.end - 1);
                assert_eq!(reply.header("content-range"), Some(&*said));
            }
            None => assert_eq!(reply.status, 416, "{range}"),
        }
    }
}

fn pushes_to_one_tag_at_once_end_with_one_of_them(home: &Home) {
    let agent = home.hosting().start();
    let images: Vec<Image> = (1..9).map(Image::small).collect();
    std::thread::scope(|scope| {
        for image in &images {
            let agent = &agent;
            scope.spawn(move || agent.push(NAME, "latest", image));
        }
    });
    let last = agent.get(&manifests("latest"));
    let digest = last.header("docker-content-digest").unwrap().to_owned();
    let image = images
        .iter()
        .find(|image| image.digest() == digest)
        .unwrap();
    agent.pull(NAME, "latest", image);
    // What is kept is what is in memory.
    let link = format!("repositories/{NAME}/_manifests/tags/latest/current/link");
    assert_eq!(home.kept(&agent, &link), Some(digest.into_bytes()));
}

fn parameters_of_a_content_type_are_ignored(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    for blob in image.blobs() {
        agent.push_blob(NAME, blob);
    }
    let put = agent.request("PUT", &manifests("v1"));
    let put = put.header("Content-Type", &format!("{OCI_MANIFEST}; charset=utf-8"));
    assert_eq!(put.body(&image.manifest.blob.bytes).send().status, 201);
    let reply = agent.get(&manifests("v1"));
    assert_eq!(reply.header("content-type"), Some(OCI_MANIFEST));
}

fn many_referrers_come_in_pages(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    agent.push(NAME, "v1", &image);
    let subject = descriptor(&image.manifest.blob, OCI_MANIFEST);
    let of = image.digest().split_once(':').unwrap().1;
    let subjects = agent
        .folder()
        .join("store/registry-agent/subjects")
        .join(NAME);
    let subjects = subjects.join("_of/sha256").join(of).join("sha256");
    fs::create_dir_all(&subjects).unwrap();
    // As many pushes leave them, of which each waits for the disk.
    let mut expected = Vec::new();
    for number in 0..1100 {
        let document = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [],
            "subject": subject, "annotations": {"number": format!("{number}")}});
        let manifest = Manifest::new(OCI_INDEX, &document);
        let hex = manifest.digest().split_once(':').unwrap().1.to_owned();
        let revision = format!("repositories/{NAME}/_manifests/revisions/sha256/{hex}/link");
        for (path, bytes) in [
            (agent.stored_blob(manifest.digest()), &*manifest.blob.bytes),
            (agent.stored(&revision), manifest.digest().as_bytes()),
            (subjects.join(&hex), b"".as_slice()),
        ] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            write_file(&path, bytes);
        }
        expected.push(manifest.digest().to_owned());
    }
    expected.sort_unstable();
    let found = pages_of_referrers(&agent, &image);
    assert_eq!((found.len(), found.concat()), (2, expected));
}

/// The digests on each page of an image's referrers.
fn pages_of_referrers(agent: &Agent, image: &Image) -> Vec<Vec<String>> {
    let mut target = format!("/v2/{NAME}/referrers/{}", image.digest());
    let mut pages = Vec::new();
    loop {
        let reply = agent.get(&target);
        let index = reply.json();
        let digests = index["manifests"].as_array().unwrap().iter();
        let digests = digests.map(|it| it["digest"].as_str().unwrap().to_owned());
        pages.push(digests.collect());
        let Some(link) = reply.header("link") else {
            return pages;
        };
        let next = link
            .strip_prefix('<')
            .and_then(|it| it.strip_suffix(">; rel=\"next\""));
        next.unwrap().clone_into(&mut target);
    }
}

fn a_page_of_referrers_is_no_larger_than_clients_read(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::small(1));
    agent.push(NAME, "v1", &image);
    let subject = descriptor(&image.manifest.blob, OCI_MANIFEST);
    let mut expected = Vec::new();
    for letter in ["a", "b", "c"] {
        let document = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [],
            "subject": subject, "annotations": {"report": letter.repeat(3 << 20)}});
        let manifest = Manifest::new(OCI_INDEX, &document);
        let put = agent.push_manifest(NAME, manifest.digest(), &manifest);
        assert_eq!(put.status, 201, "{letter}");
        expected.push(vec![manifest.digest().to_owned()]);
    }
    expected.sort_unstable();
    assert_eq!(pages_of_referrers(&agent, &image), expected);
}

#[test]
fn the_registry_that_was_meant_is_said_again() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).start();
    let reply = agent.get("/v2/library/app/manifests/latest?ns=docker.io");
    assert_eq!(reply.header("oci-namespace"), Some("docker.io"));
    let reply = agent.get("/v2/library/app/manifests/latest");
    assert_eq!(reply.header("oci-namespace"), None);
}
