//! `verify`: what it finds, what it repairs, and what it leaves alone.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use support::agent::{Agent, Setup};
use support::disk::age;
use support::image::{Image, KIB, MIB};
use support::upstream::{On, Upstream};
use support::{PATIENCE, eventually, write_file};

/// What a run said, and its exit code.
struct Run {
    code: Option<i32>,
    said: String,
}

fn verify(agent: &Agent, more: &[&str]) -> Run {
    let config = agent.config_file().display().to_string();
    let arguments = [&["verify", "--config", &config], more].concat();
    let output = agent.command(&arguments);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Run {
        code: output.status.code(),
        said: text(&output.stdout) + &text(&output.stderr),
    }
}

/// A mirror that has pulled an image, and still runs.
fn mirror_with(image: &Image) -> (Upstream, Agent) {
    let hub = Upstream::start();
    hub.push("library/app", "latest", image);
    let agent = Setup::mirror(&hub).set("freshness.window", "0s").start();
    agent.pull("library/app", "latest", image);
    agent.wait_until_stored(image.blobs());
    // A link is written after its blob.
    eventually(PATIENCE, "no download is under way", || {
        agent.metric("registry_agent_fills") < 0.5
    });
    (hub, agent)
}

/// Every file of the store and its bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.append(&mut self::files(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    write_file(path, &bytes);
}

/// Where a link of `library/app` is.
fn link(agent: &Agent, kind: &str, digest: &str) -> PathBuf {
    let path = digest.replace(':', "/");
    agent.stored(&format!("repositories/library/app/{kind}/{path}/link"))
}

fn tag_link(agent: &Agent) -> PathBuf {
    agent.stored("repositories/library/app/_manifests/tags/latest/current/link")
}

#[test]
fn a_clean_store_is_clean_beside_a_running_agent_and_stays_as_it_is() {
    let image = Image::new(1, &[MIB, 10 * KIB]);
    let (_hub, agent) = mirror_with(&image);
    let root = agent.stored("");
    let before = files(&root);
    for more in [&[][..], &["--repair"]] {
        let run = verify(&agent, more);
        assert_eq!(run.code, Some(0), "{}", run.said);
        // Two layers, a config and a manifest.
        assert!(run.said.contains("4 blobs"), "{}", run.said);
        assert!(run.said.contains("nothing is wrong"), "{}", run.said);
        assert!(files(&root) == before, "it changed something");
    }
}

#[test]
fn a_rotten_blob_is_named_and_a_repair_has_it_fetched_again() {
    let image = Image::new(1, &[MIB, 10 * KIB]);
    let (hub, agent) = mirror_with(&image);
    let rotten = agent.stored_blob(&image.layer().digest);
    flip_a_bit(&rotten);
    let run = verify(&agent, &[]);
    assert_eq!(run.code, Some(1), "{}", run.said);
    assert!(
        run.said.contains(&rotten.display().to_string()) && run.said.contains("1 fault"),
        "{}",
        run.said
    );
    assert!(rotten.exists(), "nothing is removed without --repair");

    let run = verify(&agent, &["--repair"]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    assert!(!rotten.exists(), "{}", run.said);
    let before = hub.served("GET", &image.layer().digest).len();
    agent.pull("library/app", "latest", &image);
    assert_eq!(hub.served("GET", &image.layer().digest).len(), before + 1);
    agent.wait_until_stored(image.blobs());
    let run = verify(&agent, &[]);
    assert_eq!(run.code, Some(0), "{}", run.said);
}

#[test]
fn a_rotten_manifest_takes_its_links_along_and_all_of_it_comes_back() {
    let image = Image::small(1);
    let (_hub, agent) = mirror_with(&image);
    let digest = image.digest();
    let gone = [
        agent.stored_blob(digest),
        link(&agent, "_manifests/revisions", digest),
        tag_link(&agent),
    ];
    flip_a_bit(&gone[0]);
    let run = verify(&agent, &["--repair"]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    assert!(run.said.contains("3 repaired"), "{}", run.said);
    for path in &gone {
        assert!(
            run.said.contains(&path.display().to_string()),
            "{}",
            run.said
        );
        assert!(!path.exists(), "{} is still there", path.display());
    }
    // What the agent has in memory is right, and what it misses on the disk it stores again.
    eventually(PATIENCE, "everything is stored again", || {
        agent.pull("library/app", "latest", &image);
        gone.iter().all(|path| path.exists())
    });
    assert_eq!(verify(&agent, &[]).code, Some(0));
}

#[test]
fn links_that_are_none_and_links_to_nothing_are_named_and_removed() {
    let image = Image::small(1);
    let (layer, other) = (&image.layer().digest, &image.config.digest);
    let nowhere = format!("sha256:{}", "0".repeat(64));
    for (kind, of, content, says) in [
        ("_layers", layer, "", "not a digest"),
        ("_layers", layer, "sha256:short", "not a digest"),
        ("_layers", layer, other, "its place is of"),
        (
            "_manifests/revisions",
            &nowhere,
            &nowhere,
            "the store does not have",
        ),
        (
            "_manifests/tags/latest/index",
            &nowhere,
            layer,
            "its place is of",
        ),
        ("tag", &nowhere, &nowhere, "its repository does not have"),
        ("tag", &nowhere, "garbage", "not a digest"),
    ] {
        let (_hub, agent) = mirror_with(&image);
        let path = match kind {
            "tag" => tag_link(&agent),
            kind => link(&agent, kind, of),
        };
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_file(&path, content.as_bytes());
        let run = verify(&agent, &[]);
        assert_eq!(run.code, Some(1), "{kind} {content}: {}", run.said);
        let named = |line: &str| line.contains(&path.display().to_string()) && line.contains(says);
        assert!(
            run.said.lines().any(named),
            "{kind} {content}: {}",
            run.said
        );
        assert!(
            run.said.contains("1 fault"),
            "{kind} {content}: {}",
            run.said
        );
        let run = verify(&agent, &["--repair"]);
        assert_eq!(run.code, Some(0), "{kind} {content}: {}", run.said);
        assert!(!path.exists(), "{kind} {content}: {}", run.said);
        agent.pull("library/app", "latest", &image);
    }
}

#[test]
fn a_layer_that_was_evicted_is_counted_and_is_no_fault() {
    let image = Image::small(1);
    let (_hub, agent) = mirror_with(&image);
    fs::remove_file(agent.stored_blob(&image.layer().digest)).unwrap();
    let run = verify(&agent, &["--repair"]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    assert!(run.said.contains("1 layer is not here"), "{}", run.said);
    assert!(link(&agent, "_layers", &image.layer().digest).exists());
}

#[test]
fn to_look_at_what_is_stored_is_no_use_of_it() {
    let image = Image::new(1, &[3 * MIB]);
    let (_hub, agent) = mirror_with(&image);
    let paths = image.blobs().map(|blob| agent.stored_blob(&blob.digest));
    let paths: Vec<PathBuf> = paths.collect();
    // So that a kernel notes uses that notes only some.
    for path in &paths {
        age(path, 48);
    }
    let used = || -> Vec<SystemTime> {
        let used = |path: &PathBuf| fs::metadata(path).and_then(|metadata| metadata.accessed());
        paths.iter().map(|path| used(path).unwrap()).collect()
    };
    let before = used();
    assert_eq!(verify(&agent, &[]).code, Some(0));
    assert_eq!(used(), before);
}

#[test]
fn what_is_being_downloaded_is_left_alone() {
    let image = Image::new(1, &[4 * MIB]);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).start();
    let gate = hub.hold(On::get(&image.layer().digest), 2 * MIB);
    let target = format!("/v2/library/app/blobs/{}", image.layer().digest);
    let response = agent.request("GET", &target).open();
    gate.reached();
    let run = verify(&agent, &["--repair"]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    gate.open();
    response.finish().assert_is(&image.layer().bytes);
}

#[test]
fn a_broken_configuration_is_exit_code_2_and_an_empty_store_is_clean() {
    let (hub, folder) = (Upstream::start(), tempfile::tempdir().unwrap());
    let mut agent = Setup::mirror(&hub).start();
    agent.rewrite(
        "storage.filesystem.root",
        folder.path().display().to_string(),
    );
    let run = verify(&agent, &["--repair"]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    assert!(files(folder.path()).is_empty(), "it made something");
    agent.rewrite("log.level", "loud");
    let run = verify(&agent, &[]);
    assert_eq!(run.code, Some(2), "{}", run.said);
    assert!(run.said.contains("log.level"), "{}", run.said);
}
