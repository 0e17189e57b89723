//! The cache stays within its limit, and loses what was not used for longest; never what is being
//! read, and never so that an image breaks.

mod support;

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use support::agent::{Agent, Setup};
use support::disk::age;
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::Upstream;
use support::{PATIENCE, eventually, write_file};

/// Five images with one layer of 200 KiB each, of which a cache of 1 MB holds four.
const LIMIT: &str = "1MB";
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

fn five_images() -> (Upstream, [Image; 5]) {
    let hub = Upstream::start();
    let images = [1, 2, 3, 4, 5].map(|seed| Image::new(seed, &[200 * KIB]));
    for (name, image) in NAMES.iter().zip(&images) {
        hub.push(&format!("library/{name}"), "latest", image);
    }
    (hub, images)
}

/// A mirror with this limit that has the first four images, used so many hours ago as they are far
/// from the last, and that has been started anew since.
fn with_four(hub: &Upstream, images: &[Image; 5], limit: &str) -> Agent {
    let setup = Setup::mirror(hub)
        .small_disk(32 * MIB)
        .set("storage.cache.limit", limit);
    let mut agent = setup.set("health.interval", "50ms").start();
    for (number, image) in images[..4].iter().enumerate() {
        agent.pull(&format!("library/{}", NAMES[number]), "latest", image);
        agent.wait_until_stored(image.blobs());
    }
    agent.kill();
    for (number, image) in images[..4].iter().enumerate() {
        for blob in image
            .layers
            .iter()
            .chain([&image.config, &image.manifest.blob])
        {
            age(&agent.stored_blob(&blob.digest), 10 - number as u64);
        }
    }
    agent.start_again();
    agent.wait_until_ready();
    agent
}

fn has(agent: &Agent, blob: &Blob) -> bool {
    agent.stored_blob(&blob.digest).exists()
}

/// Which of the images' layers are stored.
fn layers(agent: &Agent, images: &[Image]) -> String {
    let stored = NAMES.iter().zip(images);
    let stored = stored.filter(|(_, image)| has(agent, image.layer()));
    stored.map(|(name, _)| *name).collect()
}

#[track_caller]
fn wait_for_an_eviction(agent: &Agent) {
    eventually(PATIENCE, "something was evicted", || {
        agent.metric("registry_agent_evicted_blobs_total") > 0.0
    });
}

#[test]
fn the_least_recently_used_goes_first_and_no_more_than_down_to_the_low_watermark() {
    let (hub, images) = five_images();
    let agent = with_four(&hub, &images, LIMIT);
    // Used now, although it was the oldest.
    let layer = format!("/v2/library/a/blobs/{}", images[0].layer().digest);
    agent.get(&layer).assert_is(&images[0].layer().bytes);
    agent.pull("library/e", "latest", &images[4]);
    wait_for_an_eviction(&agent);
    assert_eq!(layers(&agent, &images), "acde");
    let bytes = agent.metric("registry_agent_cache_bytes");
    assert!((600_000.0..=900_000.0).contains(&bytes), "{bytes} bytes");
    let evicted = agent.metric("registry_agent_evicted_bytes_total");
    assert!((200_000.0..300_000.0).contains(&evicted), "{evicted} bytes");
    assert_eq!(agent.status()["storage"]["cache_limit"], "1.00 MB");
    // Its last blob may have come in between.
    eventually(PATIENCE, "both say the same", || {
        let bytes = agent.metric("registry_agent_cache_bytes");
        agent.status()["storage"]["cache_bytes"].as_f64() == Some(bytes)
    });
}

#[test]
fn a_manifest_that_is_served_keeps_its_blobs_also_across_a_restart() {
    let (hub, images) = five_images();
    let mut agent = with_four(&hub, &images, LIMIT);
    let manifest = &images[0].manifest.blob.bytes;
    agent
        .get("/v2/library/a/manifests/latest")
        .assert_is(manifest);
    // What is known of its use must not be only in memory.
    agent.kill();
    agent.start_again();
    agent.wait_until_ready();
    agent.pull("library/e", "latest", &images[4]);
    wait_for_an_eviction(&agent);
    assert_eq!(layers(&agent, &images), "acde");
}

#[test]
fn an_image_whose_blobs_were_evicted_is_filled_again() {
    let (hub, images) = five_images();
    let agent = with_four(&hub, &images, LIMIT);
    for name in &NAMES[..4] {
        agent.get(&format!("/v2/library/{name}/manifests/latest"));
    }
    agent.pull("library/e", "latest", &images[4]);
    wait_for_an_eviction(&agent);
    assert_eq!(layers(&agent, &images), "bcde");
    let image = &images[0];
    assert!(
        has(&agent, &image.manifest.blob),
        "the manifest costs little"
    );
    let link = agent.stored(&format!(
        "repositories/library/a/_layers/sha256/{}/link",
        &image.layer().digest["sha256:".len()..]
    ));
    assert!(!link.exists(), "a link to nothing");
    hub.switch_off();
    agent
        .get("/v2/library/a/manifests/latest")
        .assert_is(&image.manifest.blob.bytes);
    hub.switch_on();
    agent.pull("library/a", "latest", image);
    assert_eq!(hub.served("GET", &image.layer().digest).len(), 2);
    agent.wait_until_stored(image.blobs());
}

#[test]
fn an_evicted_manifest_leaves_nothing_behind_neither_on_disk_nor_in_memory() {
    let (hub, images) = five_images();
    let image = &images[0];
    let mut agent = with_four(&hub, &images, LIMIT);
    // Into memory, and then as if long ago.
    agent
        .get("/v2/library/a/manifests/latest")
        .assert_is(&image.manifest.blob.bytes);
    age(&agent.stored_blob(image.digest()), 20);
    agent.rewrite("storage.cache.limit", "400kB");
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "the manifest is evicted", || {
        !has(&agent, &image.manifest.blob)
    });
    assert!(
        !agent
            .stored("repositories/library/a/_manifests/tags/latest")
            .exists()
    );
    let hex = &image.digest()["sha256:".len()..];
    let revision = format!("repositories/library/a/_manifests/revisions/sha256/{hex}");
    assert!(!agent.stored(&revision).exists());
    let before = hub.served("GET", "library/a/manifests/").len();
    agent.pull("library/a", "latest", image);
    assert_eq!(hub.served("GET", "library/a/manifests/").len(), before + 1);
}

#[test]
fn a_blob_that_is_being_read_is_not_evicted_before_its_reader_leaves() {
    let (hub, blob) = (Upstream::start(), Blob::new(1, 16 * MIB));
    hub.push_blob("library/app", &blob);
    let setup = Setup::mirror(&hub).set("health.interval", "50ms");
    let mut agent = setup.start();
    let target = format!("/v2/library/app/blobs/{}", blob.digest);
    agent.get(&target).assert_is(&blob.bytes);
    eventually(PATIENCE, "it is stored", || has(&agent, &blob));
    let mut reader = agent.request("GET", &target).open();
    let first = reader.read(KIB);
    // It alone is over this limit.
    agent.rewrite("storage.cache.limit", "10MB");
    agent.signal(Signal::SIGHUP);
    eventually(
        PATIENCE,
        "the agent has seen that it is over the limit",
        || agent.log().contains("all that could be evicted"),
    );
    assert!(has(&agent, &blob));
    let rest = reader.finish();
    assert!(rest.complete && [first, rest.body].concat() == blob.bytes);
    eventually(PATIENCE, "it is evicted", || !has(&agent, &blob));
}

/// What a download that was given up has left.
fn partial(agent: &Agent, seed: u64, size: usize) -> PathBuf {
    let blob = Blob::new(seed, size);
    let folder = agent.folder().join("store/registry-agent/fills/sha256");
    fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join(&blob.digest["sha256:".len()..]);
    write_file(&path, &blob.bytes);
    path
}

#[test]
fn downloads_that_were_given_up_count_and_go_in_their_turn() {
    let (hub, images) = five_images();
    let mut agent = with_four(&hub, &images, "100%");
    // Above the limit by themselves, and used before all that is cached.
    let large = partial(&agent, 100, 4 * MIB);
    age(&large, 11);
    agent.rewrite("storage.cache.limit", "2MB");
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "it goes", || !large.exists());
    assert_eq!(layers(&agent, &images), "abcd");
}

#[test]
fn downloads_that_were_given_up_go_after_a_day_whatever_room_there_is() {
    let (hub, _) = five_images();
    let agent = Setup::mirror(&hub)
        .set("health.interval", "50ms")
        .set("storage.cache.limit", "1GB")
        .start();
    let [old, fresh] = [100, 101].map(|seed| partial(&agent, seed, KIB));
    age(&old, 25);
    eventually(PATIENCE, "it goes", || !old.exists());
    assert!(fresh.exists());
}

#[test]
fn downloads_that_were_given_up_go_first() {
    let (hub, images) = five_images();
    let mut agent = with_four(&hub, &images, "100%");
    let partial = |seed, size| partial(&agent, seed, size);
    let (old, fresh) = (partial(100, KIB), partial(101, KIB));
    age(&old, 25);
    agent.rewrite("storage.cache.limit", "600kB");
    agent.signal(Signal::SIGHUP);
    wait_for_an_eviction(&agent);
    assert!(!old.exists() && fresh.exists());
}

#[test]
fn referrers_of_what_is_not_stored_go_when_nobody_asks_for_them() {
    let (hub, images) = five_images();
    let mut agent = with_four(&hub, &images, "100%");
    let descriptor = serde_json::json!({"digest": images[4].digest(), "size": 1});
    let asked = |name: &str, digest: &str| -> PathBuf {
        hub.refer(&format!("library/{name}"), digest, descriptor.clone());
        let target = format!("/v2/library/{name}/referrers/{digest}");
        assert_eq!(agent.get(&target).status, 200);
        let hex = &digest["sha256:".len()..];
        let kept = format!("store/registry-agent/referrers/library/{name}/_of/sha256/{hex}");
        agent.folder().join(kept)
    };
    let [long_ago, now] = [100, 101].map(|seed| asked("a", &Blob::new(seed, KIB).digest));
    let of_an_image = asked("d", images[3].digest());
    age(&long_ago, 25);
    age(&of_an_image, 25);
    agent.rewrite("storage.cache.limit", "600kB");
    agent.signal(Signal::SIGHUP);
    wait_for_an_eviction(&agent);
    assert!(has(&agent, &images[3].manifest.blob));
    assert_eq!(
        [&long_ago, &now, &of_an_image].map(|kept| kept.exists()),
        [false, true, true]
    );
}

#[test]
fn a_disk_that_others_fill_costs_the_cache_its_share_and_not_everything() {
    let (hub, images) = five_images();
    let agent = with_four(&hub, &images, "90%");
    // Nothing is left but what is cached: nine tenths of that may stay.
    agent.disk().fill();
    wait_for_an_eviction(&agent);
    assert_eq!(layers(&agent, &images), "bcd");
    let evicted = agent.metric("registry_agent_evicted_bytes_total");
    assert!((200_000.0..300_000.0).contains(&evicted), "{evicted} bytes");
}

#[test]
fn a_share_is_of_the_disk_where_nobody_else_uses_it() {
    let (hub, images) = (
        Upstream::start(),
        [1, 2, 3, 4].map(|seed| Image::new(seed, &[2 * MIB])),
    );
    let agent = Setup::mirror(&hub)
        .small_disk(10 * MIB)
        .set("storage.cache.limit", "70%")
        .start();
    for (name, image) in NAMES.iter().zip(&images) {
        let name = format!("library/{name}");
        hub.push(&name, "latest", image);
        agent.pull(&name, "latest", image);
    }
    wait_for_an_eviction(&agent);
    assert_eq!(layers(&agent, &images), "bcd");
    let storage = &agent.status()["storage"];
    assert_eq!(
        storage["cache_limit"],
        "70% of what others leave of the disk"
    );
    assert!(storage["used_bytes"].as_u64().unwrap() < 7 * MIB as u64);
}
