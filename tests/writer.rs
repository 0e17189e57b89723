//! A writer: pushes go to a bucket, and to nothing else that anybody reads.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/cloud.rs"]
mod cloud;
#[path = "support/s3.rs"]
mod server;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cloud::Cloud;
use serde_json::{Value, json};
use server::{Fault, SECRET_KEY};
use support::agent::{Agent, Setup};
use support::client::Reply;
use support::image::{Blob, Image, KIB, MIB, Manifest, OCI_INDEX, OCI_MANIFEST};
use support::{PATIENCE, eventually};

const NAME: &str = "mycompany/app";

fn manifests(reference: &str) -> String {
    format!("/v2/{NAME}/manifests/{reference}")
}

fn blobs(digest: &str) -> String {
    format!("/v2/{NAME}/blobs/{digest}")
}

#[track_caller]
fn begin(agent: &Agent) -> String {
    let reply = agent
        .request("POST", &format!("/v2/{NAME}/blobs/uploads/"))
        .body(b"")
        .send();
    assert_eq!(reply.status, 202, "{reply:?}");
    reply.header("location").expect("a Location").to_owned()
}

fn put(agent: &Agent, location: &str, blob: &Blob, rest: &[u8]) -> Reply {
    let put = agent.request("PUT", &format!("{location}?digest={}", blob.digest));
    put.body(rest).send()
}

fn delete(agent: &Agent, target: &str) -> Reply {
    agent.request("DELETE", target).body(b"").send()
}

/// The uploads that are on the disk.
fn uploads(agent: &Agent) -> usize {
    let folder = agent.stored(&format!("repositories/{NAME}/_uploads"));
    fs::read_dir(folder).into_iter().flatten().count()
}

fn hex(digest: &str) -> &str {
    digest.split_once(':').unwrap().1
}

#[test]
fn what_is_pushed_is_in_the_bucket_as_distribution_has_it_and_a_reader_has_it() {
    let cloud = Cloud::start();
    let image = Image::new(1, &[100 * KIB, 40 * MIB]);
    let (writer, reader) = (cloud.writer().start(), cloud.reader().start());
    writer.push(NAME, "v1", &image);
    let v2 = "docker/registry/v2";
    let of = format!("{v2}/repositories/{NAME}");
    let mut wanted = BTreeSet::new();
    for blob in image.blobs().chain([&image.manifest.blob]) {
        let hex = hex(&blob.digest);
        wanted.insert(format!("{v2}/blobs/sha256/{}/{hex}/data", &hex[..2]));
    }
    for blob in image.blobs() {
        wanted.insert(format!("{of}/_layers/sha256/{}/link", hex(&blob.digest)));
    }
    let revision = hex(image.digest());
    wanted.insert(format!("{of}/_manifests/revisions/sha256/{revision}/link"));
    wanted.insert(format!(
        "{of}/_manifests/tags/v1/index/sha256/{revision}/link"
    ));
    wanted.insert(format!("{of}/_manifests/tags/v1/current/link"));
    let found: BTreeSet<String> = cloud.s3.keys().into_iter().collect();
    assert_eq!(found, wanted);
    reader.pull(NAME, "v1", &image);
    // The writer has it from its own push.
    cloud.s3.front.take();
    writer.pull(NAME, "v1", &image);
    assert_eq!(cloud.s3.front.take().get("GET"), None);
    assert_eq!(uploads(&writer), 0);
    let tags = writer.get(&format!("/v2/{NAME}/tags/list")).json();
    assert_eq!(tags["tags"], json!(["v1"]));
    let catalog = writer.get("/v2/_catalog").json();
    assert_eq!(catalog["repositories"], json!([NAME]));
    let log = writer.log() + &reader.log();
    assert!(!log.contains(SECRET_KEY), "a secret is in the log");
}

#[test]
fn every_name_is_pushed_and_one_that_is_not_there_is_not_waited_for() {
    let cloud = Cloud::start();
    let (writer, image) = (cloud.writer().start(), Image::small(1));
    for name in ["app", "library/app", "a/b/c"] {
        writer.push(name, "v1", &image);
        writer.pull(name, "v1", &image);
    }
    // By another name of the same.
    let reply = writer.get("/v2/docker.io/library/app/manifests/v1?ns=docker.io");
    reply.assert_is(&image.manifest.blob.bytes);
    for target in ["/v2/none/manifests/v1", &manifests("none")] {
        assert_eq!(writer.get(target).status, 404, "{target}");
        assert_eq!(writer.head(target).status, 404, "{target}");
    }
}

#[test]
fn a_writer_on_a_disk_hosts_every_name_and_asks_nobody() {
    let setup = Setup::new().set("role", "writer").set("delete", true);
    let setup = setup.set("upstreams", Value::Null);
    let (agent, image) = (setup.start(), Image::small(1));
    for name in ["app", NAME] {
        agent.push(name, "v1", &image);
        agent.pull(name, "v1", &image);
    }
    agent
        .get("/v2/none/manifests/v1")
        .assert_error(404, "NAME_UNKNOWN");
    agent
        .get("/v2/app/manifests/v1?ns=ghcr.io")
        .assert_error(404, "NAME_UNKNOWN");
    let catalog = agent.get("/v2/_catalog").json();
    assert_eq!(catalog["repositories"], json!(["app", NAME]));
    assert_eq!(delete(&agent, "/v2/app/manifests/v1").status, 202);
    agent
        .get("/v2/app/manifests/v1")
        .assert_error(404, "MANIFEST_UNKNOWN");
}

#[test]
fn uploads_come_in_all_their_forms() {
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    for blob in [
        Blob::new(1, 300 * KIB),
        Blob::new(2, 0),
        Blob::new(3, 2 * MIB).by_sha512(),
    ] {
        let target = format!("/v2/{NAME}/blobs/uploads/?digest={}", blob.digest);
        let reply = agent.request("POST", &target).body(&blob.bytes).send();
        assert_eq!(reply.status, 201, "{reply:?}");
        agent.get(&blobs(&blob.digest)).assert_is(&blob.bytes);
    }
    let chunked = Blob::new(4, 3 * MIB);
    let location = begin(&agent);
    let patch = agent.request("PATCH", &location);
    let reply = patch.body(&chunked.bytes[..MIB]).send();
    assert_eq!(reply.status, 202, "{reply:?}");
    assert_eq!(agent.get(&location).header("range"), Some("0-1048575"));
    assert_eq!(
        put(&agent, &location, &chunked, &chunked.bytes[MIB..]).status,
        201
    );
    agent.get(&blobs(&chunked.digest)).assert_is(&chunked.bytes);
    // What is wrong, or given up, leaves nothing.
    let before = cloud.s3.keys();
    let other = Blob::new(5, KIB);
    put(&agent, &begin(&agent), &other, b"wrong").assert_error(400, "DIGEST_INVALID");
    let location = begin(&agent);
    assert_eq!(delete(&agent, &location).status, 204);
    agent
        .get(&location)
        .assert_error(404, "BLOB_UPLOAD_UNKNOWN");
    assert_eq!(cloud.s3.keys(), before);
    assert_eq!(uploads(&agent), 0);
}

#[test]
fn a_blob_is_mounted_from_a_repository_that_has_it() {
    let cloud = Cloud::start();
    let (agent, blob) = (cloud.writer().start(), Blob::new(1, KIB));
    agent.push_blob("other/app", &blob);
    let mount = |from: &str| {
        let target = format!("/v2/{NAME}/blobs/uploads/?mount={}{from}", blob.digest);
        agent.request("POST", &target).body(b"").send().status
    };
    assert_eq!(mount("&from=third/app"), 202);
    assert_eq!(agent.get(&blobs(&blob.digest)).status, 404);
    assert_eq!(mount("&from=other/app"), 201);
    cloud.s3.front.take();
    agent.get(&blobs(&blob.digest)).assert_is(&blob.bytes);
    assert_eq!(cloud.s3.front.take().get("GET"), None);
    let reader = cloud.reader().start();
    reader.get(&blobs(&blob.digest)).assert_is(&blob.bytes);
}

#[test]
fn a_blob_is_mounted_from_a_repository_that_was_seen_to_have_it() {
    let cloud = Cloud::start();
    let (agent, other) = (cloud.writer().start(), cloud.writer().start());
    let blob = Blob::new(1, KIB);
    agent.push_blob("other/app", &blob);
    let mount = |agent: &Agent, to: &str| {
        let target = format!("/v2/{to}/blobs/uploads/?mount={}", blob.digest);
        agent.request("POST", &target).body(b"").send().status
    };
    // Of a bucket it can't be asked who has it.
    assert_eq!(mount(&other, NAME), 202);
    assert_eq!(mount(&agent, NAME), 201);
    let reader = cloud.reader().start();
    reader.get(&blobs(&blob.digest)).assert_is(&blob.bytes);
    assert_eq!(other.head(&blobs(&blob.digest)).status, 200);
    assert_eq!(mount(&other, "third/app"), 201);
    // What was seen may have changed since.
    for name in ["other/app", NAME, "third/app"] {
        let target = format!("/v2/{name}/blobs/{}", blob.digest);
        assert_eq!(delete(&agent, &target).status, 202);
    }
    assert_eq!(mount(&agent, "fourth/app"), 202);
}

#[test]
fn a_manifest_has_to_find_what_it_refers_to() {
    let cloud = Cloud::start();
    let (agent, image) = (cloud.writer().start(), Image::small(1));
    let reply = agent.push_manifest(NAME, "v1", &image.manifest);
    reply.assert_error(400, "MANIFEST_BLOB_UNKNOWN");
    // Also where another repository has it, and where it was deleted by somebody else since.
    agent.push("other/app", "v1", &image);
    let reply = agent.push_manifest(NAME, "v1", &image.manifest);
    reply.assert_error(400, "MANIFEST_BLOB_UNKNOWN");
    agent.push(NAME, "v1", &image);
    let layer = &image.layer().digest;
    let link = format!(
        "docker/registry/v2/repositories/{NAME}/_layers/sha256/{}/link",
        hex(layer)
    );
    fs::remove_file(cloud.s3.file(&link)).unwrap();
    assert_eq!(agent.head(&blobs(layer)).status, 404);
    let reply = agent.push_manifest(NAME, "v2", &image.manifest);
    reply.assert_error(400, "MANIFEST_BLOB_UNKNOWN");
}

#[test]
fn a_tag_that_was_just_pushed_is_what_a_pull_gets() {
    let cloud = Cloud::start();
    let (agent, one, two) = (cloud.writer().start(), Image::small(1), Image::small(2));
    agent.push(NAME, "latest", &one);
    agent.pull(NAME, "latest", &one);
    agent.push(NAME, "latest", &two);
    agent.pull(NAME, "latest", &two);
    agent.pull(NAME, one.digest(), &one);
}

#[test]
fn of_two_writers_of_a_tag_the_later_one_is_told() {
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    let other = Arc::new(cloud.writer().start());
    let images = [Image::small(1), Image::small(2), Image::small(3)];
    for (number, image) in images.iter().enumerate() {
        agent.push(NAME, &format!("t{number}"), image);
    }
    let key = format!("docker/registry/v2/repositories/{NAME}/_manifests/tags/latest/current/link");
    for (before, first) in [(None, "new"), (Some(&images[0]), "moved")] {
        if let Some(image) = before {
            let put = agent.push_manifest(NAME, "latest", &image.manifest);
            assert_eq!(put.status, 201);
        }
        // The other one is between our look and our write.
        let (other, theirs) = (Arc::clone(&other), images[2].manifest.clone());
        let is_write = format!("tags/latest/index/sha256/{}/link", hex(images[1].digest()));
        cloud.s3.front.plan(move |asked| {
            if asked.operation == "PUT" && asked.key.ends_with(&is_write) {
                let put = || other.push_manifest(NAME, "latest", &theirs);
                assert_eq!(tokio::task::block_in_place(put).status, 201);
            }
            None
        });
        let reply = agent.push_manifest(NAME, "latest", &images[1].manifest);
        reply.assert_error(409, "DENIED");
        let message = reply.json()["errors"][0]["message"].to_string();
        assert!(message.contains("another writer"), "{first}: {message}");
        assert_eq!(
            fs::read_to_string(cloud.s3.file(&key)).unwrap(),
            images[2].digest()
        );
        cloud.s3.front.plan(|_| None);
        // Who looks at it first may move it.
        let reply = agent.push_manifest(NAME, "latest", &images[1].manifest);
        assert_eq!(reply.status, 201, "{first}");
        agent.pull(NAME, "latest", &images[1]);
    }
}

#[test]
fn immutable_tags_and_shards_are_kept() {
    let cloud = Cloud::start();
    let setup = cloud.writer().set("shard", json!(["mycompany/*"]));
    let setup = setup.set("immutable_tags", json!(["mycompany/*:v*"]));
    let (agent, one, two) = (setup.start(), Image::small(1), Image::small(2));
    agent.push(NAME, "v1", &one);
    agent.push(NAME, "latest", &two);
    let again = agent.push_manifest(NAME, "v1", &one.manifest);
    assert_eq!(again.status, 201);
    let moved = agent.push_manifest(NAME, "v1", &two.manifest);
    moved.assert_error(409, "DENIED");
    delete(&agent, &manifests("v1")).assert_error(409, "DENIED");
    delete(&agent, &manifests(one.digest())).assert_error(409, "DENIED");
    agent.pull(NAME, "v1", &one);
    let elsewhere = agent.request("POST", "/v2/team/app/blobs/uploads/");
    elsewhere.body(b"").send().assert_error(403, "DENIED");
}

#[test]
fn what_is_deleted_is_served_by_nobody() {
    let cloud = Cloud::start();
    let (agent, image, other) = (cloud.writer().start(), Image::small(1), Image::small(2));
    agent.push(NAME, "v1", &image);
    agent.push(NAME, "v2", &image);
    agent.push(NAME, "other", &other);
    agent.pull(NAME, "v1", &image);
    assert_eq!(delete(&agent, &manifests("v1")).status, 202);
    agent
        .get(&manifests("v1"))
        .assert_error(404, "MANIFEST_UNKNOWN");
    assert_eq!(delete(&agent, &manifests("v1")).status, 404);
    agent.pull(NAME, "v2", &image);
    // With it goes each tag that it is.
    assert_eq!(delete(&agent, &manifests(image.digest())).status, 202);
    let reader = cloud.reader().start();
    for agent in [&agent, &reader] {
        for reference in ["v1", "v2", image.digest()] {
            assert_eq!(agent.get(&manifests(reference)).status, 404, "{reference}");
            assert_eq!(agent.head(&manifests(reference)).status, 404, "{reference}");
        }
        let tags = agent.get(&format!("/v2/{NAME}/tags/list")).json();
        assert_eq!(tags["tags"], json!(["other"]));
    }
    let layer = blobs(&image.layer().digest);
    assert_eq!(delete(&agent, &layer).status, 202);
    for agent in [&agent, &reader] {
        agent.get(&layer).assert_error(404, "BLOB_UNKNOWN");
        assert_eq!(agent.head(&layer).status, 404);
    }
    assert_eq!(delete(&agent, &layer).status, 404);
    agent.pull(NAME, "other", &other);
    // And it can come back.
    agent.push(NAME, "v1", &image);
    agent.pull(NAME, "v1", &image);
}

#[test]
fn nothing_is_deleted_where_that_is_not_allowed() {
    let cloud = Cloud::start();
    let (agent, image) = (cloud.writer().set("delete", false).start(), Image::small(1));
    agent.push(NAME, "v1", &image);
    delete(&agent, &manifests("v1")).assert_error(405, "UNSUPPORTED");
    delete(&agent, &blobs(&image.layer().digest)).assert_error(405, "UNSUPPORTED");
    agent.pull(NAME, "v1", &image);
}

#[test]
fn referrers_are_listed_until_they_are_deleted() {
    let cloud = Cloud::start();
    let (agent, image) = (cloud.writer().start(), Image::small(1));
    agent.push(NAME, "v1", &image);
    let config = Blob::of("{}".to_owned());
    agent.push_blob(NAME, &config);
    let subject = json!({
        "mediaType": image.manifest.media_type, "digest": image.digest(),
        "size": image.manifest.blob.len(),
    });
    let empty = "application/vnd.oci.empty.v1+json";
    let signature = Manifest::new(
        OCI_MANIFEST,
        &json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [],
            "config": {"mediaType": empty, "digest": config.digest, "size": config.len()},
            "artifactType": "application/vnd.example.signature", "subject": subject,
        }),
    );
    let put = agent.push_manifest(NAME, &signature.blob.digest, &signature);
    assert_eq!(put.status, 201, "{put:?}");
    assert_eq!(put.header("oci-subject"), Some(image.digest()));
    let reader = cloud.reader().start();
    let listed = |agent: &Agent, query: &str| {
        let target = format!("/v2/{NAME}/referrers/{}{query}", image.digest());
        let list = agent.get(&target).json();
        let digests = list["manifests"].as_array().unwrap().iter();
        let digests = digests.map(|it| it["digest"].as_str().unwrap().to_owned());
        digests.collect::<Vec<_>>()
    };
    let signed = vec![signature.blob.digest.clone()];
    for agent in [&agent, &reader] {
        assert_eq!(listed(agent, ""), signed);
        assert_eq!(
            listed(agent, "?artifactType=application/vnd.example.signature"),
            signed
        );
        assert!(listed(agent, "?artifactType=application/other").is_empty());
    }
    assert_eq!(
        delete(&agent, &manifests(&signature.blob.digest)).status,
        202
    );
    for agent in [&agent, &reader] {
        assert!(listed(agent, "").is_empty());
    }
}

#[test]
fn a_referrer_that_is_nearly_all_annotations_is_listed() {
    let cloud = Cloud::start();
    let (agent, subject) = (cloud.writer().start(), Image::small(1));
    agent.push(NAME, "v1", &subject);
    let document = json!({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [],
        "artifactType": "application/vnd.example.report",
        "subject": {
            "mediaType": subject.manifest.media_type, "digest": subject.digest(),
            "size": subject.manifest.blob.len(),
        },
        "annotations": { "report": "x".repeat(4 * MIB - KIB) },
    });
    let report = Manifest::new(OCI_INDEX, &document);
    assert!(report.blob.len() <= 4 * MIB);
    let put = agent.push_manifest(NAME, &report.blob.digest, &report);
    assert_eq!(put.status, 201, "{put:?}");
    let reader = cloud.reader().start();
    for agent in [&agent, &reader] {
        let list = agent.get(&format!("/v2/{NAME}/referrers/{}", subject.digest()));
        let listed = &list.json()["manifests"];
        assert_eq!(listed[0]["digest"], report.blob.digest);
        assert_eq!(listed[0]["annotations"], document["annotations"]);
    }
}

#[test]
fn what_old_clients_list_under_a_tag_is_listed_beside_what_says_its_subject() {
    let cloud = Cloud::start();
    let (agent, image) = (cloud.writer().start(), Image::small(1));
    agent.push(NAME, "v1", &image);
    let config = Blob::of("{}".to_owned());
    agent.push_blob(NAME, &config);
    let about = |kind: &str, says_so: bool| {
        let empty = "application/vnd.oci.empty.v1+json";
        let mut document = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [], "artifactType": kind,
            "config": {"mediaType": empty, "digest": config.digest, "size": config.len()},
        });
        if says_so {
            document["subject"] = json!({
                "mediaType": image.manifest.media_type, "digest": image.digest(),
                "size": image.manifest.blob.len(),
            });
        }
        Manifest::new(OCI_MANIFEST, &document)
    };
    let (new, old, gone) = (
        about("a/new", true),
        about("a/old", false),
        about("a/gone", false),
    );
    for manifest in [&new, &old, &gone] {
        let put = agent.push_manifest(NAME, manifest.digest(), manifest);
        assert_eq!(put.status, 201, "{put:?}");
    }
    let descriptor = |manifest: &Manifest, kind: &str| {
        json!({
            "mediaType": OCI_MANIFEST, "digest": manifest.digest(), "size": manifest.blob.len(),
            "artifactType": kind,
        })
    };
    // It lists what says so itself as well.
    let list = [
        descriptor(&new, "a/new"),
        descriptor(&old, "a/old"),
        descriptor(&gone, "a/gone"),
    ];
    let media_type = "application/vnd.oci.image.index.v1+json";
    let document = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": list});
    let index = Manifest::new(media_type, &document);
    let tag = image.digest().replace(':', "-");
    assert_eq!(agent.push_manifest(NAME, &tag, &index).status, 201);
    assert_eq!(delete(&agent, &manifests(gone.digest())).status, 202);
    let mut wanted = [new.digest(), old.digest()];
    wanted.sort_unstable();
    let reader = cloud.reader().start();
    for agent in [&agent, &reader] {
        let target = format!("/v2/{NAME}/referrers/{}", image.digest());
        let list = agent.get(&target).json();
        let digests = list["manifests"].as_array().unwrap().iter();
        let digests: Vec<_> = digests.map(|it| it["digest"].as_str().unwrap()).collect();
        assert_eq!(digests, wanted);
        let of_type = agent.get(&format!("{target}?artifactType=a/old")).json();
        assert_eq!(of_type["manifests"].as_array().unwrap().len(), 1);
    }
}

/// What S3 can be like while it is written to.
const TROUBLE: [Fault; 3] = [Fault::SlowDown, Fault::Status(403), Fault::Status(400)];

/// Whether everything in the bucket that points to something finds it there.
#[track_caller]
fn assert_no_link_to_nothing(keys: &[String], read: impl Fn(&str) -> String) {
    let data = |digest: &str| {
        let hex = hex(digest);
        format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2])
    };
    let there = |key: &str| keys.iter().any(|it| it == key);
    for key in keys.iter().filter(|key| key.ends_with("/link")) {
        let digest = read(key);
        assert!(there(&data(&digest)), "{key} is a link to nothing");
        if let Some((of, _)) = key.split_once("/tags/") {
            let revision = format!("{of}/revisions/sha256/{}/link", hex(&digest));
            assert!(there(&revision), "{key} has no revision");
        }
    }
}

#[test]
fn no_reader_sees_a_link_to_nothing_at_any_write_nor_after_one_that_fails() {
    let image = Image::new(1, &[10 * KIB, 20 * MIB]);
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    agent.push(NAME, "v1", &image);
    let changes = |it: &server::Asked| matches!(&*it.operation, "PUT" | "POST" | "DELETE");
    let all = cloud
        .s3
        .front
        .asked()
        .iter()
        .filter(|it| changes(it))
        .count();
    assert!(all >= 10, "{all}");
    drop(agent);
    for (failing, trouble) in (0..all).zip(TROUBLE.into_iter().cycle()) {
        let cloud = Cloud::start();
        let agent = cloud.writer().start();
        let root = cloud.s3.file("");
        let seen = Arc::new(AtomicUsize::new(0));
        cloud.s3.front.plan(move |asked| {
            if !changes(asked) {
                return None;
            }
            // What is there before each write.
            let (keys, root) = (keys_below(&root), root.clone());
            assert_no_link_to_nothing(&keys, |key| fs::read_to_string(root.join(key)).unwrap());
            let number = seen.fetch_add(1, Ordering::SeqCst);
            (number >= failing).then_some(trouble)
        });
        let mut failed = None;
        for blob in image.blobs() {
            let location = begin(&agent);
            let reply = put(&agent, &location, blob, &blob.bytes);
            if reply.status != 201 {
                failed = Some((location, reply));
                break;
            }
        }
        let reply = match &failed {
            Some((_, reply)) => reply.status,
            None => agent.push_manifest(NAME, "v1", &image.manifest).status,
        };
        assert_eq!(reply, 503, "{trouble:?} at write {failing}");
        assert_eq!(
            agent.get(&manifests("v1")).status,
            404,
            "{trouble:?} {failing}"
        );
        cloud.s3.front.plan(|_| None);
        let keys = cloud.s3.keys();
        let read = |key: &str| fs::read_to_string(cloud.s3.file(key)).unwrap();
        assert_no_link_to_nothing(&keys, read);
        // The same request again, and all that follows.
        if let Some((location, _)) = failed {
            let blob = image
                .blobs()
                .find(|blob| agent.head(&blobs(&blob.digest)).status != 200);
            let blob = blob.unwrap();
            let reply = put(&agent, &location, blob, &blob.bytes);
            assert_eq!(reply.status, 201, "{reply:?}");
        }
        agent.push(NAME, "v1", &image);
        agent.pull(NAME, "v1", &image);
    }
}

fn keys_below(root: &std::path::Path) -> Vec<String> {
    let mut folders = vec![root.to_owned()];
    let mut keys = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let key = path.strip_prefix(root).unwrap();
                keys.push(key.to_str().unwrap().to_owned());
            }
        }
    }
    keys
}

#[test]
fn a_restart_in_the_middle_leaves_nothing_visible_and_the_upload_goes_on() {
    let cloud = Cloud::start();
    let (mut agent, blob) = (cloud.writer().start(), Blob::new(1, 20 * MIB));
    let location = begin(&agent);
    let patch = agent.request("PATCH", &location).body(&blob.bytes).send();
    assert_eq!(patch.status, 202);
    // It dies while it sends.
    cloud.s3.front.plan(|asked| {
        let part = asked.operation == "PUT" && asked.query.contains("partNumber=2");
        part.then_some(Fault::Hang)
    });
    let target = format!("{location}?digest={}", blob.digest);
    std::thread::scope(|scope| {
        let agent = &agent;
        scope.spawn(move || agent.request("PUT", &target).body(b"").try_open().is_err());
        let sending = || {
            let asked = cloud.s3.front.asked();
            asked.iter().any(|it| it.query.contains("partNumber=2"))
        };
        eventually(PATIENCE, "it sends", sending);
        agent.signal(nix::sys::signal::Signal::SIGKILL);
    });
    agent.wait();
    cloud.s3.front.plan(|_| None);
    let data = |key: &String| key.ends_with("/data") || key.ends_with("/link");
    assert!(!cloud.s3.keys().iter().any(data), "{:?}", cloud.s3.keys());
    agent.start_again();
    agent.wait_until_ready();
    assert_eq!(agent.get(&blobs(&blob.digest)).status, 404);
    assert_eq!(put(&agent, &location, &blob, b"").status, 201);
    agent.get(&blobs(&blob.digest)).assert_is(&blob.bytes);
}

#[test]
fn large_pushes_take_bounded_memory() {
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    let pushed: Vec<Blob> = (0..4).map(|seed| Blob::new(seed, 64 * MIB)).collect();
    std::thread::scope(|scope| {
        for blob in &pushed {
            scope.spawn(|| agent.push_blob(NAME, blob));
        }
    });
    let peak = agent.peak_memory();
    assert!(peak < 128 * MIB, "{} MiB", peak / MIB);
}
