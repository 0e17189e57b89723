//! `gc`: what it removes of what was pushed, what it leaves, and that pushes may go on meanwhile.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use support::agent::{Agent, Setup};
use support::disk::age;
use support::image::{Blob, Image, KIB, Manifest, OCI_MANIFEST};
use support::upstream::Upstream;
use support::write_file;

const NAME: &str = "mycompany/app";
const OTHER: &str = "mycompany/other";
/// Longer than the grace period.
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

/// Every file below a folder, with its size: to read one would be its use.
fn files(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.append(&mut self::files(&path));
        } else {
            let size = path.metadata().unwrap().len();
            files.insert(path, size);
        }
    }
    files
}

/// Makes all that is stored look as if nobody had used it for long.
fn age_all(agent: &Agent) {
    for path in files(&agent.stored("")).keys() {
        age(path, LONG_AGO);
    }
}

fn blob_target(name: &str, blob: &Blob) -> String {
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

fn verify(agent: &Agent) {
    let config = agent.config_file().display().to_string();
    let verified = agent.command(&["verify", "--config", &config]);
    let said = String::from_utf8_lossy(&verified.stdout);
    assert_eq!(verified.status.code(), Some(0), "{said}");
}

#[test]
fn what_no_manifest_names_goes_and_all_else_stays() {
    let hub = Upstream::start();
    let [kept, deleted, cached] = [1, 2, 3].map(Image::small);
    hub.push("library/app", "latest", &cached);
    let agent = Setup::mirror(&hub)
        .set("hosted", json!(["mycompany/*"]))
        .set("delete", true)
        .start();
    agent.pull("library/app", "latest", &cached);
    agent.wait_until_stored(cached.blobs());
    agent.push(NAME, "v1", &kept);
    agent.push(OTHER, "v1", &deleted);
    let orphan = Blob::new(9, 64 * KIB);
    agent.push_blob(NAME, &orphan);
    // Of a kind that has its blobs in another field.
    let part = Blob::new(10, KIB);
    agent.push_blob(NAME, &part);
    let artifact = "application/vnd.oci.artifact.manifest.v1+json";
    let document = json!({
        "mediaType": artifact,
        "blobs": [{"mediaType": "a/b", "digest": part.digest, "size": part.len()}],
    });
    let artifact = Manifest::new(artifact, &document);
    assert_eq!(agent.push_manifest(NAME, "artifact", &artifact).status, 201);
    let target = format!("/v2/{OTHER}/manifests/{}", deleted.digest());
    assert_eq!(agent.request("DELETE", &target).send().status, 202);
    age_all(&agent);
    let before = files(&agent.stored(""));

    let dry = gc(&agent, &["--dry-run"]);
    assert_eq!(dry.code, Some(0), "{}", dry.said);
    let path = agent.stored_blob(&orphan.digest);
    let line = format!("{}: 65.54 kB, no manifest names it", path.display());
    assert!(dry.said.contains(&line), "{line} in {}", dry.said);
    assert!(dry.said.contains("would be removed"), "{}", dry.said);
    assert_eq!(
        files(&agent.stored("")),
        before,
        "a dry run changes nothing"
    );

    let said = collect(&agent);
    assert!(said.contains(": removed"), "{said}");
    // The orphan, and of the image its manifest, config and layers.
    let gone = deleted.blobs().chain([&orphan, &deleted.manifest.blob]);
    for blob in gone {
        assert!(!agent.stored_blob(&blob.digest).exists(), "{}", blob.digest);
    }
    assert_eq!(agent.head(&blob_target(NAME, &orphan)).status, 404);
    agent.pull(NAME, "v1", &kept);
    assert_eq!(agent.get(&blob_target(NAME, &part)).body, part.bytes);
    for blob in cached.blobs() {
        assert!(agent.stored_blob(&blob.digest).exists());
    }
    verify(&agent);
    assert!(collect(&agent).contains("there is nothing to remove"));
    // It can be pushed again.
    agent.push(OTHER, "v1", &deleted);
    agent.pull(OTHER, "v1", &deleted);
}

#[test]
fn what_was_used_within_the_grace_period_stays() {
    let agent = Setup::hosting().start();
    let [asked, mounted, named, shared, unused] = [1, 2, 3, 4, 5].map(|seed| Blob::new(seed, KIB));
    for blob in [&asked, &mounted, &named, &shared, &unused] {
        agent.push_blob(NAME, blob);
    }
    // Another repository's manifest names it: this one's link goes, and the blob stays.
    agent.push_blob(OTHER, &shared);
    assert_eq!(
        agent.push_manifest(OTHER, "v1", &naming(&[&shared])).status,
        201
    );
    assert!(
        collect(&agent).contains("there is nothing to remove"),
        "all is new"
    );
    age_all(&agent);
    assert_eq!(agent.head(&blob_target(NAME, &asked)).status, 200);
    let mount = format!(
        "/v2/{OTHER}/blobs/uploads/?mount={}&from={NAME}",
        mounted.digest
    );
    assert_eq!(agent.request("POST", &mount).body(b"").send().status, 201);
    assert_eq!(
        agent.push_manifest(NAME, "v3", &naming(&[&named])).status,
        201
    );
    collect(&agent);
    assert_eq!(
        agent.push_manifest(NAME, "v1", &naming(&[&asked])).status,
        201
    );
    assert_eq!(
        agent
            .push_manifest(OTHER, "v2", &naming(&[&mounted]))
            .status,
        201
    );
    assert_eq!(agent.get(&blob_target(NAME, &named)).body, named.bytes);
    assert_eq!(agent.head(&blob_target(NAME, &shared)).status, 404);
    assert_eq!(agent.get(&blob_target(OTHER, &shared)).body, shared.bytes);
    assert_eq!(agent.head(&blob_target(NAME, &unused)).status, 404);
    assert!(!agent.stored_blob(&unused.digest).exists());
    verify(&agent);
}

#[test]
fn a_push_that_was_told_of_a_blob_finds_it_while_a_collection_goes_on() {
    let agent = Setup::hosting().start();
    let blobs: Vec<Blob> = (0..120).map(|seed| Blob::new(seed, KIB)).collect();
    for blob in &blobs {
        agent.push_blob(NAME, blob);
    }
    age_all(&agent);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                collect(&agent);
            }
        });
        let pushes: Vec<_> = blobs
            .chunks(30)
            .map(|blobs| {
                let agent = &agent;
                scope.spawn(move || {
                    for blob in blobs {
                        // As every client does.
                        if agent.head(&blob_target(NAME, blob)).status == 404 {
                            agent.push_blob(NAME, blob);
                        }
                        let manifest = naming(&[blob]);
                        let put = agent.push_manifest(NAME, manifest.digest(), &manifest);
                        assert_eq!(put.status, 201, "{}", blob.digest);
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
    collect(&agent);
    for blob in &blobs {
        assert_eq!(agent.get(&blob_target(NAME, blob)).body, blob.bytes);
    }
    verify(&agent);
}

#[cfg(debug_assertions)]
#[test]
fn a_collection_that_is_killed_leaves_nothing_wrong_and_is_ended_by_the_next() {
    use registry_agent::failpoint::{Failpoint, VARIABLE};

    for point in [Failpoint::CollectUnlinked, Failpoint::CollectSwept] {
        let mut agent = Setup::hosting().start();
        let (image, orphans) = (Image::small(1), [7, 8, 9].map(|seed| Blob::new(seed, KIB)));
        agent.push(NAME, "v1", &image);
        for orphan in &orphans {
            agent.push_blob(NAME, orphan);
        }
        age_all(&agent);
        agent.kill();
        agent.set_environment(&[(VARIABLE, &format!("{}:2", point.name()))]);
        agent.start_again();
        agent.wait_until_ready();
        let run = gc(&agent, &[]);
        assert_eq!(run.code, Some(1), "{point:?}: {}", run.said);
        assert!(
            agent.wait().status.code().is_none(),
            "{point:?}: it was not killed"
        );
        verify(&agent);
        agent.set_environment(&[]);
        agent.start_again();
        agent.wait_until_ready();
        agent.pull(NAME, "v1", &image);
        collect(&agent);
        for orphan in &orphans {
            assert!(!agent.stored_blob(&orphan.digest).exists(), "{point:?}");
            assert_eq!(agent.head(&blob_target(NAME, orphan)).status, 404);
        }
        agent.pull(NAME, "v1", &image);
    }
}

#[test]
fn it_needs_no_agent_and_where_one_serves_only_who_may_write_there() {
    let mut agent = Setup::hosting().start();
    let orphan = Blob::new(1, KIB);
    agent.push_blob(NAME, &orphan);
    age_all(&agent);
    let id = "00000000-0000-4000-8000-000000000000";
    for (target, status) in [
        ("/collect".to_owned(), 400),
        ("/collect?proof=../../lock".to_owned(), 400),
        (format!("/collect?proof={id}&other"), 400),
        (format!("/collect?proof={id}"), 403),
    ] {
        let post = agent.admin().request("POST", &target).body(b"").send();
        assert_eq!(post.status, status, "{target}");
    }
    assert_eq!(agent.admin().get("/collect").status, 404);
    assert!(agent.stored_blob(&orphan.digest).exists());
    agent.kill();
    collect(&agent);
    assert!(!agent.stored_blob(&orphan.digest).exists());
    // Of an agent that serves, and can't be asked.
    agent.start_again();
    agent.wait_until_ready();
    let elsewhere = agent.folder().join("elsewhere.sock");
    agent.rewrite("admin", format!("unix:{}", elsewhere.display()));
    let run = gc(&agent, &[]);
    assert_eq!(run.code, Some(1), "{}", run.said);
    assert!(run.said.contains("can't ask the agent"), "{}", run.said);
    agent.rewrite("admin", 5);
    assert_eq!(gc(&agent, &[]).code, Some(2));
}

#[test]
fn uploads_that_were_given_up_go_and_what_was_set_aside_long_ago() {
    let agent = Setup::hosting().start();
    let uploads = format!("/v2/{NAME}/blobs/uploads/");
    let begin = |bytes: &[u8]| {
        let post = agent.request("POST", &uploads).body(b"").send();
        let location = post.header("location").unwrap().to_owned();
        let patch = agent.request("PATCH", &location).body(bytes).send();
        assert_eq!(patch.status, 202);
        location
    };
    let (given_up, under_way) = (begin(&[1; 3000]), begin(&[2; 10]));
    let id = given_up.rsplit('/').next().unwrap();
    let folder = agent.stored(&format!("repositories/{NAME}/_uploads/{id}"));
    age(&folder.join("data"), LONG_AGO);
    let root = agent.stored("").join("../../..");
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let day = 24 * 60 * 60;
    let aside = |days: u64| {
        let since = now - days * day;
        let folder = format!("registry-agent/aside/mycompany/{days}/_since/{since}/_layers");
        let folder = root.join(folder);
        fs::create_dir_all(&folder).unwrap();
        write_file(&folder.join("link"), b"sha256:x");
        folder
    };
    let (old, new) = (aside(31), aside(29));
    let dry = gc(&agent, &["--dry-run"]);
    assert!(
        dry.said.contains("3.00 kB, an upload that was given up"),
        "{}",
        dry.said
    );
    assert!(
        dry.said.contains("cached before its repository"),
        "{}",
        dry.said
    );
    assert!(folder.exists() && old.exists());
    collect(&agent);
    assert!(!folder.exists() && !old.exists() && new.exists());
    assert!(!root.join("registry-agent/aside/mycompany/31").exists());
    let goes_on = |location: &str| agent.request("PATCH", location).body(b"more").send().status;
    assert_eq!((goes_on(&given_up), goes_on(&under_way)), (404, 202));
}

#[test]
fn a_repository_with_a_manifest_that_cant_be_read_loses_nothing() {
    let agent = Setup::hosting().start();
    let (image, whole) = (Image::small(1), Image::small(2));
    agent.push(NAME, "v1", &image);
    agent.push(OTHER, "v1", &whole);
    let orphan = Blob::new(7, KIB);
    let of_other = Blob::new(8, KIB);
    agent.push_blob(NAME, &orphan);
    agent.push_blob(OTHER, &of_other);
    write_file(&agent.stored_blob(image.digest()), b"{rotten");
    age_all(&agent);
    let run = gc(&agent, &[]);
    assert_eq!(run.code, Some(1), "{}", run.said);
    let unreadable = format!("{NAME}@{}", image.digest());
    assert!(run.said.contains(&unreadable), "{}", run.said);
    for blob in image.blobs().chain([&orphan]) {
        assert!(agent.stored_blob(&blob.digest).exists());
    }
    assert!(!agent.stored_blob(&of_other.digest).exists());
    agent.pull(OTHER, "v1", &whole);
}
