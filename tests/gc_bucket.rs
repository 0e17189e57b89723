//! `gc` in a bucket: what it removes, what it leaves, and that pushes by anybody may go on meanwhile.

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
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use cloud::Cloud;
use serde_json::json;
use server::{Fault, SECRET_KEY};
use support::agent::Agent;
use support::disk::age;
use support::image::{Blob, Image, KIB, Manifest, OCI_MANIFEST};
use support::write_file;

const NAME: &str = "mycompany/app";
const OTHER: &str = "mycompany/other";
const V2: &str = "docker/registry/v2";
/// Longer than the grace period, in hours.
const LONG_AGO: u64 = 25;

/// What a run said, and its exit code.
struct Run {
    code: Option<i32>,
    said: String,
}

fn gc(agent: &Agent, more: &[&str]) -> Run {
    let config = agent.config_file().display().to_string();
    let output = agent.command(&[&["gc", "--config", &config], more].concat());
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Run {
        code: output.status.code(),
        said: text(&output.stdout) + &text(&output.stderr),
    }
}

#[track_caller]
fn collect(agent: &Agent) -> String {
    let run = gc(agent, &[]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    run.said
}

/// Makes all that is in the bucket look as if it had been written long ago.
fn age_all(cloud: &Cloud) {
    for key in cloud.s3.keys() {
        age(&cloud.s3.file(&key), LONG_AGO);
    }
}

fn keys(cloud: &Cloud) -> BTreeSet<String> {
    cloud.s3.keys().into_iter().collect()
}

fn hex(digest: &str) -> &str {
    digest.split_once(':').unwrap().1
}

fn data(digest: &str) -> String {
    let hex = hex(digest);
    format!("{V2}/blobs/sha256/{}/{hex}/data", &hex[..2])
}

fn link(name: &str, digest: &str) -> String {
    let hex = hex(digest);
    format!("{V2}/repositories/{name}/_layers/sha256/{hex}/link")
}

fn target(name: &str, blob: &Blob) -> String {
    format!("/v2/{name}/blobs/{}", blob.digest)
}

/// A manifest that names these.
fn naming(blobs: &[&Blob]) -> Manifest {
    let descriptor = |blob: &&Blob| json!({"mediaType": "application/x", "digest": blob.digest, "size": blob.len()});
    let layers: Vec<_> = blobs.iter().map(descriptor).collect();
    let document = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": layers[0], "layers": layers,
    });
    Manifest::new(OCI_MANIFEST, &document)
}

/// Pushes a manifest that names a blob as a client does that has looked whether the blob is there.
#[track_caller]
fn push_naming(agent: &Agent, name: &str, blob: &Blob) {
    if agent.head(&target(name, blob)).status == 404 {
        agent.push_blob(name, blob);
    }
    let manifest = naming(&[blob]);
    let put = agent.push_manifest(name, manifest.digest(), &manifest);
    assert_eq!(put.status, 201, "{put:?}");
}

/// Whether a host without anything in its cache gets a blob.
#[track_caller]
fn assert_pulled(cloud: &Cloud, name: &str, blob: &Blob) {
    let reader = cloud.reader().start();
    reader.get(&target(name, blob)).assert_is(&blob.bytes);
    let manifest = naming(&[blob]);
    let manifest = reader.get(&format!("/v2/{name}/manifests/{}", manifest.digest()));
    assert_eq!(manifest.status, 200);
}

#[test]
fn what_no_manifest_names_goes_and_all_else_stays() {
    let cloud = Cloud::start();
    let agent = cloud.writer().set("shard", json!(["mycompany/*"])).start();
    let [kept, deleted, old] = [1, 2, 3].map(Image::small);
    agent.push(NAME, "v1", &kept);
    agent.push(OTHER, "v1", &deleted);
    let orphan = Blob::new(9, 64 * KIB);
    agent.push_blob(NAME, &orphan);
    // Pushed by registry:2, and of a repository that is another writer's, as is what only that one
    // has a link to.
    cloud.push("mycompany/legacy", "v1", &old);
    let theirs = Blob::new(10, KIB);
    cloud.s3.lay(&data(&theirs.digest), &theirs.bytes);
    let their_link = link("team/app", &theirs.digest);
    cloud.s3.lay(&their_link, theirs.digest.as_bytes());
    // No repository has ever heard of it.
    let lost = Blob::new(11, KIB);
    cloud.s3.lay(&data(&lost.digest), &lost.bytes);
    // Not of this layout.
    cloud
        .s3
        .lay(&format!("{V2}/blobs/sha256/README"), b"by hand");
    let target = format!("/v2/{OTHER}/manifests/{}", deleted.digest());
    assert_eq!(agent.request("DELETE", &target).send().status, 202);
    let young = keys(&cloud);
    assert!(collect(&agent).contains("there is nothing to remove"));
    assert_eq!(keys(&cloud), young, "all is new");

    age_all(&cloud);
    cloud.s3.front.take();
    let dry = gc(&agent, &["--dry-run"]);
    assert_eq!(dry.code, Some(0), "{}", dry.said);
    let line = format!(
        "s3://images/{}: 65.54 kB, no manifest names it",
        data(&orphan.digest)
    );
    assert!(dry.said.contains(&line), "{line} in {}", dry.said);
    assert!(dry.said.contains("would be removed"), "{}", dry.said);
    assert_eq!(keys(&cloud), young, "a dry run changes nothing");
    let asked = cloud.s3.front.take();
    let reads = asked
        .keys()
        .all(|it| ["GET", "HEAD", "LIST"].contains(&it.as_str()));
    assert!(reads, "a dry run only reads: {asked:?}");

    let said = collect(&agent);
    assert!(
        said.contains(": removed") && !said.contains(SECRET_KEY),
        "{said}"
    );
    let gone = deleted
        .blobs()
        .chain([&orphan, &deleted.manifest.blob, &lost]);
    let mut wanted = young.clone();
    for blob in gone {
        wanted.remove(&data(&blob.digest));
        wanted.remove(&link(NAME, &blob.digest));
        wanted.remove(&link(OTHER, &blob.digest));
    }
    assert_eq!(keys(&cloud), wanted);
    // What the least policy of a writer allows.
    let asked = cloud.s3.front.asked();
    let posts = asked.iter().filter(|it| it.operation == "POST").count();
    assert_eq!(posts, 0, "no DeleteObjects");
    let reader = cloud.reader().start();
    reader.pull(NAME, "v1", &kept);
    reader.pull("mycompany/legacy", "v1", &old);
    assert!(collect(&agent).contains("there is nothing to remove"));
    // It can be pushed again.
    agent.push(OTHER, "v1", &deleted);
    reader.pull(OTHER, "v1", &deleted);
}

#[test]
fn what_was_used_within_the_grace_period_stays() {
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    let [asked, mounted, named, again, shared, unused] =
        [1, 2, 3, 4, 5, 6].map(|seed| Blob::new(seed, KIB));
    for blob in [&asked, &mounted, &named, &again, &shared, &unused] {
        agent.push_blob(NAME, blob);
    }
    // Another repository's manifest names it: this one's link goes, and the blob stays.
    agent.push_blob(OTHER, &shared);
    push_naming(&agent, OTHER, &shared);
    age_all(&cloud);
    assert_eq!(agent.head(&target(NAME, &asked)).status, 200);
    let mount = format!(
        "/v2/{OTHER}/blobs/uploads/?mount={}&from={NAME}",
        mounted.digest
    );
    assert_eq!(agent.request("POST", &mount).body(b"").send().status, 201);
    let manifest = naming(&[&named]);
    assert_eq!(agent.push_manifest(NAME, "v3", &manifest).status, 201);
    // Its bytes are there, so they are not sent again.
    cloud.s3.front.take();
    agent.push_blob(OTHER, &again);
    let sent = cloud.s3.front.asked();
    let sent = sent
        .iter()
        .filter(|it| it.operation == "PUT" && it.key == data(&again.digest));
    assert_eq!(sent.count(), 0);
    collect(&agent);
    for (name, blob) in [(NAME, &asked), (OTHER, &mounted), (OTHER, &again)] {
        assert_eq!(
            agent.head(&target(name, blob)).status,
            200,
            "{}",
            blob.digest
        );
        let manifest = naming(&[blob]);
        let put = agent.push_manifest(name, manifest.digest(), &manifest);
        assert_eq!(put.status, 201, "{put:?}");
        assert_pulled(&cloud, name, blob);
    }
    assert_pulled(&cloud, NAME, &named);
    assert_eq!(agent.head(&target(NAME, &shared)).status, 404);
    assert_pulled(&cloud, OTHER, &shared);
    assert_eq!(agent.head(&target(NAME, &unused)).status, 404);
    assert!(!cloud.s3.file(&data(&unused.digest)).exists());
    // A link that only said so for its time is gone from the first repository.
    assert_eq!(agent.head(&target(NAME, &again)).status, 404);
}

#[test]
fn pushes_that_were_told_of_a_blob_find_it_while_collections_go_on() {
    let cloud = Cloud::start();
    let agents = [cloud.writer().start(), cloud.writer().start()];
    let blobs: Vec<Blob> = (0..32).map(|seed| Blob::new(seed, KIB)).collect();
    for blob in &blobs {
        agents[0].push_blob(NAME, blob);
    }
    age_all(&cloud);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        // By two processes of their own, as it is on two hosts.
        for agent in &agents {
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    collect(agent);
                }
            });
        }
        let pushes: Vec<_> = blobs
            .chunks(8)
            .zip([(0, NAME), (1, OTHER), (0, "mycompany/third"), (1, NAME)])
            .map(|(blobs, (agent, name))| {
                let agent = &agents[agent];
                scope.spawn(move || {
                    for blob in blobs {
                        push_naming(agent, name, blob);
                    }
                })
            })
            .collect();
        let ended: Vec<_> = pushes
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        over.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok), "a push has failed");
    });
    collect(&agents[0]);
    let names = [NAME, OTHER, "mycompany/third", NAME];
    let reader = cloud.reader().start();
    for (blobs, name) in blobs.chunks(8).zip(names) {
        for blob in blobs {
            reader.get(&target(name, blob)).assert_is(&blob.bytes);
        }
    }
    let left = keys(&cloud);
    let announced = left.iter().filter(|key| key.contains("collecting-"));
    assert_eq!(announced.count(), 0, "{left:?}");
}

/// Does something when a request comes for the first time, before it is answered.
fn once(
    cloud: &Cloud,
    operation: &'static str,
    is_it: impl Fn(&str) -> bool + Send + Sync + 'static,
    then: impl FnOnce() + Send + 'static,
) -> Arc<AtomicBool> {
    let (then, done) = (Mutex::new(Some(then)), Arc::new(AtomicBool::new(false)));
    let happened = Arc::clone(&done);
    cloud.s3.front.plan(move |asked| {
        if asked.operation == operation && is_it(&asked.key) {
            let then = then.lock().unwrap().take();
            if let Some(then) = then {
                tokio::task::block_in_place(then);
                done.store(true, Ordering::Relaxed);
            }
        }
        None
    });
    happened
}

#[test]
fn what_is_used_just_before_it_goes_is_not_lost() {
    type IsIt = Box<dyn Fn(&str) -> bool + Send + Sync>;
    let cloud = Cloud::start();
    let agent = Arc::new(cloud.writer().start());
    let blob = Blob::new(1, KIB);
    let (of_blob, of_link) = (data(&blob.digest), link(NAME, &blob.digest));
    let folder = of_blob.strip_suffix("data").unwrap().to_owned();
    // (what the collection is about to do, how, and whether the client was there before)
    let moments: [(&str, &'static str, IsIt); 4] = [
        (
            "announce the link",
            "PUT",
            Box::new(|key| key.contains("_layers/collecting-")),
        ),
        (
            "remove the link",
            "DELETE",
            Box::new(move |key| key == of_link),
        ),
        (
            "announce the blob",
            "PUT",
            Box::new(move |key| key.starts_with(&format!("{folder}collecting-"))),
        ),
        (
            "remove the blob",
            "DELETE",
            Box::new(move |key| key == of_blob),
        ),
    ];
    for (number, (moment, operation, is_it)) in moments.into_iter().enumerate() {
        agent.push_blob(NAME, &blob);
        age_all(&cloud);
        let (pushing, name) = (Arc::new(Mutex::new(None)), format!("mycompany/n{number}"));
        let happened = {
            let (agent, blob, pushing) = (Arc::clone(&agent), blob.clone(), Arc::clone(&pushing));
            let name = name.clone();
            once(&cloud, operation, is_it, move || {
                // The same repository, and another one that is new.
                if number < 3 {
                    push_naming(&agent, NAME, &blob);
                }
                let push = thread::spawn(move || push_naming(&agent, &name, &blob));
                if number < 3 {
                    push.join().unwrap();
                } else {
                    // It waits until the blob has gone, and sends it again.
                    *pushing.lock().unwrap() = Some(push);
                }
            })
        };
        let said = collect(&agent);
        assert!(happened.load(Ordering::Relaxed), "{moment}: {said}");
        if let Some(push) = pushing.lock().unwrap().take() {
            push.join().unwrap();
        }
        cloud.s3.front.plan(|_| None);
        if number < 3 {
            assert_pulled(&cloud, NAME, &blob);
        }
        assert_pulled(&cloud, &name, &blob);
        // And for the next one nothing of it is there.
        for key in cloud.s3.keys() {
            fs::remove_file(cloud.s3.file(&key)).unwrap();
        }
    }
}

#[test]
fn a_bucket_that_can_not_be_read_to_its_end_loses_nothing() {
    type IsIt = Box<dyn Fn(&server::Asked) -> bool + Send + Sync>;
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    let (image, orphan) = (Image::small(1), Blob::new(9, KIB));
    agent.push(NAME, "v1", &image);
    agent.push(OTHER, "v1", &Image::small(2));
    agent.push_blob(NAME, &orphan);
    age_all(&cloud);
    let before = keys(&cloud);
    let of_manifest = data(image.digest());
    let requests: [(&str, IsIt); 4] = [
        (
            "repositories",
            Box::new(|it| {
                it.operation == "LIST" && it.query.contains("repositories%2Fmycompany%2F&")
            }),
        ),
        (
            "links",
            Box::new(|it| it.operation == "LIST" && it.query.contains("other%2F_layers")),
        ),
        (
            "blobs",
            Box::new(|it| it.operation == "LIST" && it.query.contains("blobs%2Fsha256%2F")),
        ),
        (
            "a manifest",
            Box::new(move |it| it.operation == "GET" && it.key == of_manifest),
        ),
    ];
    for (what, is_it) in requests {
        let happened = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&happened);
        cloud.s3.front.plan(move |asked| {
            let fails = is_it(asked);
            seen.fetch_or(fails, Ordering::Relaxed);
            fails.then_some(Fault::Status(400))
        });
        let run = gc(&agent, &[]);
        assert!(happened.load(Ordering::Relaxed), "{what}: not asked for");
        assert_eq!(run.code, Some(1), "{what}: {}", run.said);
        assert_eq!(keys(&cloud), before, "{what}");
        cloud.s3.front.plan(|_| None);
    }
    collect(&agent);
    assert!(!cloud.s3.file(&data(&orphan.digest)).exists());
}

#[test]
fn a_repository_with_a_manifest_that_can_not_be_read_loses_nothing() {
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    let (one, two) = (Image::small(1), Image::small(2));
    let orphans = [8, 9].map(|seed| Blob::new(seed, KIB));
    agent.push(NAME, "v1", &one);
    agent.push(OTHER, "v1", &two);
    agent.push_blob(NAME, &orphans[0]);
    agent.push_blob(OTHER, &orphans[1]);
    write_file(&cloud.s3.file(&data(one.digest())), b"{}");
    age_all(&cloud);
    let run = gc(&agent, &[]);
    assert_eq!(run.code, Some(1), "{}", run.said);
    let said = format!("{NAME}@{} can't be read", one.digest());
    assert!(run.said.contains(&said), "{}", run.said);
    for blob in one.blobs().chain([&orphans[0]]) {
        assert!(cloud.s3.file(&data(&blob.digest)).exists());
        assert!(cloud.s3.file(&link(NAME, &blob.digest)).exists());
    }
    assert!(!cloud.s3.file(&data(&orphans[1].digest)).exists());
}

#[test]
fn what_a_collection_that_died_has_announced_is_in_nobodys_way_for_long() {
    let cloud = Cloud::start();
    let agent = cloud.writer().start();
    let blob = Blob::new(1, KIB);
    agent.push_blob(NAME, &blob);
    age_all(&cloud);
    let folder = data(&blob.digest);
    let folder = folder.strip_suffix("data").unwrap();
    let announced = format!("{folder}collecting-00000000000000ff");
    cloud.s3.lay(&announced, b"");
    // It may be gone in a moment.
    assert_eq!(agent.head(&target(NAME, &blob)).status, 404);
    age(&cloud.s3.file(&announced), 1);
    push_naming(&agent, NAME, &blob);
    assert_pulled(&cloud, NAME, &blob);
}

#[cfg(debug_assertions)]
#[test]
fn a_collection_that_is_killed_leaves_nothing_wrong_and_is_ended_by_the_next() {
    use registry_agent::failpoint::{Failpoint, VARIABLE};

    for point in [Failpoint::CollectUnlinked, Failpoint::CollectSwept] {
        let cloud = Cloud::start();
        let mut agent = cloud.writer().start();
        let (image, orphans) = (Image::small(1), [7, 8, 9].map(|seed| Blob::new(seed, KIB)));
        agent.push(NAME, "v1", &image);
        let kept = keys(&cloud);
        for (orphan, name) in orphans.iter().zip([NAME, NAME, OTHER]) {
            agent.push_blob(name, orphan);
        }
        age_all(&cloud);
        let environment = [
            ("AWS_ACCESS_KEY_ID", server::ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ];
        let dies = [(VARIABLE, point.name())];
        agent.set_environment(&[&environment[..], &dies].concat());
        let run = gc(&agent, &[]);
        assert_eq!(run.code, None, "{point:?}: it was not killed: {}", run.said);
        let left = keys(&cloud);
        assert!(
            left.iter().any(|key| key.contains("collecting-")),
            "{left:?}"
        );
        assert!(kept.is_subset(&left), "{point:?}: {left:?}");
        agent.set_environment(&environment);
        // What it has announced counts for minutes, and is swept a day later.
        age_all(&cloud);
        collect(&agent);
        assert_eq!(keys(&cloud), kept, "{point:?}");
        cloud.reader().start().pull(NAME, "v1", &image);
    }
}

#[test]
fn a_reader_collects_nothing() {
    let cloud = Cloud::start();
    let (writer, reader) = (cloud.writer().start(), cloud.reader().start());
    writer.push_blob(NAME, &Blob::new(1, KIB));
    age_all(&cloud);
    let before = keys(&cloud);
    let run = gc(&reader, &[]);
    assert_eq!(run.code, Some(2), "{}", run.said);
    assert!(
        run.said.contains("a reader may not change its bucket"),
        "{}",
        run.said
    );
    assert_eq!(keys(&cloud), before);
}
