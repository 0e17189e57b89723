//! A reader: the agent in front of a bucket that it only reads, behind a disk cache.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/cloud.rs"]
mod cloud;
#[path = "support/s3.rs"]
mod server;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use cloud::Cloud;
use serde_json::json;
use server::{Fault, SECRET_KEY};
use support::agent::Agent;
use support::image::{Image, KIB, MIB};

fn blob(name: &str, image: &Image) -> String {
    format!("/v2/{name}/blobs/{}", image.layer().digest)
}

#[test]
fn a_bucket_of_registry_2_is_served_as_it_is_and_nothing_is_written() {
    let cloud = Cloud::start();
    let image = Image::new(1, &[3 * MIB, 20 * MIB]);
    let other = Image::small(2);
    cloud.push("team/app", "1.0", &image);
    cloud.push("busybox", "latest", &other);
    let before = cloud.s3.keys();
    let agent = cloud.reader().start();
    agent.pull("team/app", "1.0", &image);
    agent.pull("busybox", "latest", &other);
    let tags = agent.get("/v2/team/app/tags/list").json();
    assert_eq!(tags["tags"], json!(["1.0"]));
    let catalog = agent.get("/v2/_catalog").json();
    assert_eq!(catalog["repositories"], json!(["busybox", "team/app"]));
    // Each is its own repository's.
    assert_eq!(agent.get(&blob("busybox", &image)).status, 404);
    assert_eq!(agent.get("/v2/team/none/manifests/1.0").status, 404);
    assert_eq!(agent.get("/v2/team/none/tags/list").status, 404);
    let operations: BTreeSet<String> = cloud.s3.front.take().into_keys().collect();
    let reads = ["GET", "HEAD", "LIST"].map(str::to_owned);
    assert!(
        operations.iter().all(|it| reads.contains(it)),
        "{operations:?}"
    );
    assert_eq!(cloud.s3.keys(), before);
    assert!(!agent.log().contains(SECRET_KEY), "a secret is in the log");
}

#[test]
fn a_cold_small_blob_costs_one_round_trip() {
    let cloud = Cloud::start();
    let image = Image::new(1, &[10 * KIB]);
    cloud.push("team/app", "1.0", &image);
    let config = format!("/v2/team/app/blobs/{}", image.config.digest);
    let agent = cloud.reader().start();
    agent.get(&config).assert_is(&image.config.bytes);
    // The link and the data,
    let asked: BTreeSet<String> = cloud
        .s3
        .front
        .asked()
        .into_iter()
        .map(|it| it.key)
        .collect();
    assert_eq!(asked.len(), 2, "{asked:?}");
    // at the same time. So slow an S3 that the data are asked for twice.
    let latency = Duration::from_secs(1);
    cloud.s3.front.latency(latency);
    let begun = Instant::now();
    let reply = agent.get(&blob("team/app", &image));
    let took = begun.elapsed();
    reply.assert_is(&image.layer().bytes);
    assert!(took < 2 * latency, "{took:?}");
}

#[test]
fn a_crowd_is_one_download() {
    let cloud = Cloud::start();
    let image = Image::new(1, &[24 * MIB]);
    cloud.push("team/app", "1.0", &image);
    let agent = cloud.reader().start();
    cloud.s3.front.latency(Duration::from_millis(50));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let reply = agent.get(&blob("team/app", &image));
                reply.assert_is(&image.layer().bytes);
            });
        }
    });
    let asked = cloud.s3.front.asked();
    let data = asked.iter().filter(|it| it.key.ends_with("/data"));
    let ranges: Vec<&str> = data.filter_map(|it| it.range.as_deref()).collect();
    // Once for all of them; a part that takes unusually long may be asked for a second time.
    let distinct: BTreeSet<&str> = ranges.iter().copied().collect();
    assert_eq!(distinct.len(), 3, "{ranges:?}");
    assert!(ranges.len() <= 2 * distinct.len(), "{ranges:?}");
}

#[test]
fn a_tag_is_asked_for_by_its_version_and_a_moved_one_is_seen() {
    let cloud = Cloud::start();
    let (old, new) = (Image::small(1), Image::small(2));
    cloud.push("team/app", "latest", &old);
    let agent = cloud.reader().set("freshness.window", "0s").start();
    agent.pull("team/app", "latest", &old);
    cloud.s3.front.take();
    agent.pull("team/app", "latest", &old);
    let asked = cloud.s3.front.asked();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert!(asked[0].headers.contains_key("if-none-match"));
    cloud.push("team/app", "latest", &new);
    agent.pull("team/app", "latest", &new);
    agent.pull("team/app", old.digest(), &old);
}

#[test]
fn what_is_cached_is_served_while_s3_is_in_trouble() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push("team/app", "latest", &image);
    let mut agent = cloud.reader().set("freshness.window", "0s").start();
    agent.pull("team/app", "latest", &image);
    for fault in [Fault::SlowDown, Fault::Hang, Fault::Status(403)] {
        cloud.s3.front.plan(move |_| Some(fault));
        // 403 is what S3 says of a key that is not there: then the tag is gone.
        if fault != Fault::Status(403) {
            agent.pull("team/app", "latest", &image);
        }
        agent.pull("team/app", image.digest(), &image);
        assert_eq!(agent.admin().get("/readyz").status, 200, "{fault:?}");
    }
    // Also after a restart, with no S3 at all.
    agent.kill();
    drop(cloud);
    agent.start_again();
    agent.wait_until_ready();
    agent.pull("team/app", image.digest(), &image);
    let reply = agent.get("/v2/team/app/manifests/latest");
    assert_eq!(reply.status, 200);
    assert!(
        reply.header("warning").is_some(),
        "it is not said to be stale"
    );
}

#[test]
fn the_catalog_is_the_buckets_and_never_what_is_cached_of_it() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push("team/app", "latest", &image);
    cloud.push("team/other", "latest", &image);
    let agent = cloud.reader().start();
    agent.pull("team/app", "latest", &image);
    let all = agent.get("/v2/_catalog").json();
    assert_eq!(all["repositories"], json!(["team/app", "team/other"]));
    // A part of it would be taken for all there is.
    cloud.s3.front.plan(|_| Some(Fault::SlowDown));
    agent.get("/v2/_catalog").assert_error(503, "UNAVAILABLE");
    assert_eq!(agent.admin().get("/readyz").status, 200);
}

#[test]
fn an_agent_starts_without_s3_and_says_what_is_missing() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push("team/app", "latest", &image);
    let setup = cloud.reader();
    let agent: Agent = setup.environment("AWS_ACCESS_KEY_ID", "").start();
    let reply = agent.get("/v2/team/app/manifests/latest");
    assert!(reply.status >= 500, "{}", reply.status);
    assert!(
        agent.log().contains("no AWS credentials"),
        "{}",
        agent.log()
    );
}

#[test]
fn twenty_readers_at_once_serve_every_byte_and_each_asks_once() {
    let cloud = Cloud::start();
    let image = Image::new(1, &[10 * KIB, 2 * MIB]);
    cloud.push("team/app", "1.0", &image);
    let spawn = |number: usize| {
        // The SDK says it in each request.
        let app = format!("reader-{number}");
        cloud
            .reader()
            .environment("AWS_SDK_UA_APP_ID", &app)
            .spawn()
    };
    let mut readers: Vec<Agent> = (0..20).map(spawn).collect();
    readers.iter_mut().for_each(Agent::wait_until_ready);
    cloud.s3.front.latency(Duration::from_millis(50));
    std::thread::scope(|scope| {
        for agent in &readers {
            for _client in 0..3 {
                scope.spawn(|| agent.pull("team/app", "1.0", &image));
            }
        }
    });
    let mut asked: BTreeMap<String, Vec<(String, Option<String>)>> = BTreeMap::new();
    for it in cloud.s3.front.asked() {
        let agent = it.headers["user-agent"].to_str().unwrap();
        let (_, id) = agent.split_once("app/").expect("who asks");
        let id = id.split(' ').next().unwrap().to_owned();
        if it.key.contains("/blobs/") && it.operation == "GET" {
            asked.entry(id).or_default().push((it.key, it.range));
        }
    }
    assert_eq!(asked.len(), readers.len());
    for (id, asked) in &asked {
        let distinct: BTreeSet<_> = asked.iter().collect();
        // Two layers, the config and the manifest; one that takes unusually long may be asked for
        // a second time.
        assert_eq!(distinct.len(), 4, "{id}: {asked:?}");
        assert!(asked.len() <= 2 * distinct.len(), "{id}: {asked:?}");
    }
    let asked: usize = asked.values().map(Vec::len).sum();
    assert!(
        asked <= 4 * readers.len() + readers.len(),
        "{asked} requests"
    );
}
