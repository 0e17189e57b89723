//! Mirrors that share a bucket: what one of them has fetched, no other one fetches again; what not
//! everybody may see is neither brought there nor given out from there; and a bucket in trouble
//! costs nobody an answer.

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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cloud::Cloud;
use server::{Fault, SECRET_KEY};
use support::agent::{Agent, SHORT, Setup};
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::{ALWAYS, Fault as HubFault, On, Upstream};
use support::{PATIENCE, eventually, own_address};

const USER: &str = "robot";
const PASSWORD: &str = "hunter2-is-long-enough";
const V2: &str = "docker/registry/v2";
const APP: &str = "library/app";

fn mirror(cloud: &Cloud, hub: &Upstream) -> Setup {
    cloud.over_bucket(Setup::mirror(hub))
}

fn hex(digest: &str) -> &str {
    digest.split_once(':').unwrap().1
}

fn data_of(digest: &str) -> String {
    let hex = hex(digest);
    format!("{V2}/blobs/sha256/{}/{hex}/data", &hex[..2])
}

fn layer_link(name: &str, blob: &Blob) -> String {
    let hex = hex(&blob.digest);
    format!("{V2}/repositories/{name}/_layers/sha256/{hex}/link")
}

fn tag_link(name: &str, tag: &str) -> String {
    format!("{V2}/repositories/{name}/_manifests/tags/{tag}/current/link")
}

fn note(name: &str) -> String {
    format!("registry-agent/public/{name}/_proved")
}

fn blob_target(name: &str, blob: &Blob) -> String {
    format!("/v2/{name}/blobs/{}", blob.digest)
}

/// Waits until the bucket has all of an image, which is a while after a client has it.
#[track_caller]
fn wait_until_shared(cloud: &Cloud, name: &str, tag: &str, image: &Image) {
    let links = image.blobs().map(|blob| layer_link(name, blob));
    // A link is written after what it links to.
    for key in links.chain([tag_link(name, tag)]) {
        let what = format!("the bucket has {key}");
        eventually(PATIENCE, &what, || cloud.s3.file(&key).exists());
    }
}

/// How often the upstream has sent something.
fn sent(hub: &Upstream, name: &str, part: &str) -> usize {
    hub.served("GET", &format!("/v2/{name}/{part}")).len()
}

/// Pulls an image by many clients at once.
fn pull_by_many(agent: &Agent, image: &Image) {
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| agent.pull(APP, "latest", image));
        }
    });
}

#[test]
fn what_one_mirror_has_fetched_no_other_one_fetches_again() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    let image = Image::new(1, &[20 * MIB, 10 * KIB]);
    hub.push(APP, "latest", &image);
    let one = mirror(&cloud, &hub).start();
    pull_by_many(&one, &image);
    wait_until_shared(&cloud, APP, "latest", &image);
    let two = mirror(&cloud, &hub).start();
    pull_by_many(&two, &image);
    for blob in image.blobs() {
        assert_eq!(sent(&hub, APP, &format!("blobs/{}", blob.digest)), 1);
    }
    // Nor does it cost another pull.
    assert_eq!(sent(&hub, APP, "manifests/"), 1);
    let things = 4.0;
    for (agent, hits, uploads) in [(&one, 0.0, things), (&two, things, 0.0)] {
        for (metric, wanted) in [("hits", hits), ("uploads", uploads)] {
            let counted = agent.metric(&format!("registry_agent_shared_{metric}_total"));
            assert!((counted - wanted).abs() < 0.5, "{metric}: {counted}");
        }
        assert!(!agent.log().contains(SECRET_KEY), "a secret is in the log");
    }
    let fetched = two.metric("registry_agent_fetched_bytes_total");
    assert!(fetched < 1.0, "{fetched} bytes were the upstream's");
    // What it has now is its own: without the bucket, and without the upstream.
    two.wait_until_stored(image.blobs());
    cloud.s3.front.plan(|_| Some(Fault::SlowDown));
    hub.switch_off();
    two.pull(APP, "latest", &image);
}

#[test]
fn a_mirror_with_an_empty_disk_serves_what_the_fleet_has_while_the_upstream_is_down() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    let image = Image::new(1, &[3 * MIB]);
    hub.push(APP, "latest", &image);
    let one = mirror(&cloud, &hub).start();
    one.pull(APP, "latest", &image);
    wait_until_shared(&cloud, APP, "latest", &image);
    hub.fault(ALWAYS, On::any("/v2/"), HubFault::HangHeaders);
    for switched_off in [false, true] {
        if switched_off {
            hub.switch_off();
        }
        let two = mirror(&cloud, &hub)
            .set("freshness.deadline", SHORT)
            .set("timeouts.headers", "3s")
            .start();
        let begun = Instant::now();
        let manifest = two.get(&format!("/v2/{APP}/manifests/latest"));
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "it was waited for"
        );
        manifest.assert_is(&image.manifest.blob.bytes);
        assert!(manifest.header("warning").is_some(), "not said to be stale");
        two.pull(APP, "latest", &image);
        two.pull(APP, image.digest(), &image);
        let fresh = mirror(&cloud, &hub).set("timeouts.headers", SHORT).start();
        let head = fresh.head(&format!("/v2/{APP}/manifests/latest"));
        assert_eq!(head.status, 200);
        let head = fresh.head(&blob_target(APP, image.layer()));
        assert_eq!(head.status, 200);
        let length = image.layer().len().to_string();
        assert_eq!(head.header("content-length"), Some(&*length));
        // What the fleet does not have is not there.
        let missing = two.get(&format!("/v2/{APP}/manifests/other"));
        assert!(missing.status >= 500, "{}", missing.status);
    }
}

#[test]
fn the_upstream_says_what_a_tag_is_and_what_is_not_there() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    let (old, new) = (Image::small(1), Image::small(2));
    hub.push(APP, "latest", &old);
    let one = mirror(&cloud, &hub).set("freshness.window", "0s").start();
    one.pull(APP, "latest", &old);
    wait_until_shared(&cloud, APP, "latest", &old);
    hub.push(APP, "latest", &new);
    let two = mirror(&cloud, &hub).start();
    two.pull(APP, "latest", &new);
    let moved = cloud.s3.file(&tag_link(APP, "latest"));
    eventually(PATIENCE, "the tag has moved in the bucket", || {
        std::fs::read_to_string(&moved).unwrap() == new.digest()
    });
    // What was there once is not given out where the upstream says that it is not.
    hub.fault(ALWAYS, On::any("/manifests/latest"), HubFault::Status(404));
    let three = mirror(&cloud, &hub).start();
    let gone = three.get(&format!("/v2/{APP}/manifests/latest"));
    gone.assert_error(404, "MANIFEST_UNKNOWN");
}

#[test]
fn what_only_an_account_can_see_is_never_brought_to_the_bucket() {
    let (cloud, image, secret) = (Cloud::start(), Image::small(1), Image::small(2));
    let hub = Upstream::options().account(USER, PASSWORD).start();
    hub.push(APP, "latest", &image);
    hub.push("team/secret", "latest", &secret);
    hub.make_private("team/secret");
    // One that gives it to nobody, and one that shares it with its own clients.
    let one = mirror(&cloud, &hub).credentials(USER, PASSWORD).start();
    let target = "/v2/team/secret/manifests/latest";
    one.get(target).assert_error(404, "MANIFEST_UNKNOWN");
    one.pull(APP, "latest", &image);
    wait_until_shared(&cloud, APP, "latest", &image);
    let other = Upstream::start();
    let public = Image::small(3);
    other.push("some/thing", "latest", &public);
    let two = mirror(&cloud, &hub)
        .upstream("other.example", &other)
        .credentials(USER, PASSWORD)
        .share_private()
        .start();
    two.pull("team/secret", "latest", &secret);
    two.wait_until_stored(secret.blobs());
    two.pull("team/secret", "latest", &secret);
    // What came after it was brought there.
    two.pull("other.example/some/thing", "latest", &public);
    wait_until_shared(&cloud, "other.example/some/thing", "latest", &public);
    let keys = cloud.s3.keys();
    let digests = secret.blobs().map(|blob| &*blob.digest);
    let secrets: Vec<&str> = digests.chain([secret.digest()]).map(hex).collect();
    for key in &keys {
        assert!(!key.contains("secret"), "{key}");
        assert!(!secrets.iter().any(|hex| key.contains(hex)), "{key}");
    }
}

#[test]
fn what_was_private_in_the_bucket_is_given_to_nobody() {
    let (cloud, image, secret) = (Cloud::start(), Image::small(1), Image::small(2));
    let hub = Upstream::options().account(USER, PASSWORD).start();
    hub.push(APP, "latest", &image);
    hub.push("team/secret", "latest", &secret);
    hub.make_private("team/secret");
    // Somebody has it there, and a note that another repository is public.
    cloud.push("team/secret", "latest", &secret);
    let one = mirror(&cloud, &hub).start();
    one.pull(APP, "latest", &image);
    wait_until_shared(&cloud, APP, "latest", &image);
    let targets = [
        "/v2/team/secret/manifests/latest".to_owned(),
        format!("/v2/team/secret/manifests/{}", secret.digest()),
        blob_target("team/secret", secret.layer()),
        // By its digest, under a name that everybody may see.
        blob_target(APP, secret.layer()),
        format!("/v2/{APP}/manifests/{}", secret.digest()),
    ];
    for account in [false, true] {
        let setup = mirror(&cloud, &hub);
        let setup = if account {
            setup.credentials(USER, PASSWORD)
        } else {
            setup
        };
        let agent = setup.set("freshness.deadline", SHORT).start();
        for down in [false, true] {
            if down {
                hub.switch_off();
            }
            for target in &targets {
                for method in ["GET", "HEAD"] {
                    let reply = agent.request(method, target).send();
                    let refused = if down { 500..600 } else { 404..405 };
                    let status = reply.status;
                    assert!(refused.contains(&status), "{method} {target}: {status}");
                }
            }
        }
        hub.switch_on();
    }
}

#[test]
fn what_turns_private_is_given_out_by_no_mirror_of_the_fleet() {
    let (cloud, image) = (Cloud::start(), Image::small(1));
    let hub = Upstream::options().account(USER, PASSWORD).start();
    hub.push(APP, "latest", &image);
    let guarded = || {
        let setup = mirror(&cloud, &hub).credentials(USER, PASSWORD);
        setup.set("freshness.window", "0s")
    };
    let one = guarded().start();
    one.pull(APP, "latest", &image);
    wait_until_shared(&cloud, APP, "latest", &image);
    let note = cloud.s3.file(&note(APP));
    assert_eq!(std::fs::read_to_string(&note).unwrap(), "public");
    hub.make_private(APP);
    hub.revoke_tokens();
    let target = format!("/v2/{APP}/manifests/latest");
    one.get(&target).assert_error(404, "MANIFEST_UNKNOWN");
    eventually(PATIENCE, "the bucket is told", || {
        std::fs::read_to_string(&note).unwrap() == "private"
    });
    hub.switch_off();
    let two = guarded().start();
    for target in [target, blob_target(APP, image.layer())] {
        assert!(two.get(&target).status >= 500, "{target}");
    }
}

#[test]
fn a_bucket_in_trouble_costs_nobody_an_answer() {
    let image = Image::new(1, &[3 * MIB, 10 * KIB]);
    for fault in [
        Fault::SlowDown,
        Fault::Status(403),
        Fault::Status(500),
        Fault::Hang,
        Fault::Elsewhere,
    ] {
        let (cloud, hub) = (Cloud::start(), Upstream::start());
        hub.push(APP, "latest", &image);
        cloud.s3.front.plan(move |_| Some(fault));
        let agent = mirror(&cloud, &hub).start();
        let begun = Instant::now();
        agent.pull(APP, "latest", &image);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(15), "{fault:?}: {took:?}");
        agent.pull(APP, "latest", &image);
        assert_eq!(agent.admin().get("/readyz").status, 200, "{fault:?}");
        assert!(!agent.log().contains(SECRET_KEY), "a secret is in the log");
    }
    // Nobody there at all, and nobody who may.
    let hub = Upstream::start();
    hub.push(APP, "latest", &image);
    let cloud = Cloud::start();
    let nowhere = format!("http://{}:1", own_address());
    let setup = mirror(&cloud, &hub).set("storage.s3.endpoint", nowhere);
    setup.start().pull(APP, "latest", &image);
    let setup = mirror(&cloud, &hub).environment("AWS_ACCESS_KEY_ID", "");
    setup.start().pull(APP, "latest", &image);
}

#[test]
fn a_bucket_that_stops_in_the_middle_leaves_the_rest_to_the_upstream() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    let image = Image::new(1, &[4 * MIB]);
    hub.push(APP, "latest", &image);
    let one = mirror(&cloud, &hub).start();
    one.pull(APP, "latest", &image);
    wait_until_shared(&cloud, APP, "latest", &image);
    let key = data_of(&image.layer().digest);
    let begun = AtomicBool::new(false);
    cloud.s3.front.plan(move |asked| {
        let such = asked.operation == "GET" && asked.key == key;
        such.then(|| {
            if begun.swap(true, Ordering::Relaxed) {
                Fault::Hang
            } else {
                Fault::HangAfter(MIB as u64)
            }
        })
    });
    let two = mirror(&cloud, &hub).start();
    two.pull(APP, "latest", &image);
    let rest = hub.served("GET", &image.layer().digest);
    let rest = rest.last().unwrap();
    assert_eq!(rest.status, 206, "it was fetched from its start");
}

#[test]
fn a_wrong_object_in_the_bucket_is_never_served_as_a_whole_and_is_replaced() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    // One that is checked before its first byte is sent, and one that is not.
    let image = Image::new(1, &[10 * KIB, 5 * MIB]);
    hub.push(APP, "latest", &image);
    let one = mirror(&cloud, &hub).start();
    one.pull(APP, "latest", &image);
    wait_until_shared(&cloud, APP, "latest", &image);
    let manifest = &image.manifest.blob;
    for blob in image.layers.iter().chain([manifest]) {
        let mut rotten = blob.bytes.to_vec();
        rotten[100] ^= 1;
        cloud.s3.lay(&data_of(&blob.digest), &rotten);
    }
    let two = mirror(&cloud, &hub).start();
    two.get(&format!("/v2/{APP}/manifests/latest"))
        .assert_is(&manifest.bytes);
    let (small, large) = (&image.layers[0], &image.layers[1]);
    two.get(&blob_target(APP, small)).assert_is(&small.bytes);
    let reply = two.get(&blob_target(APP, large));
    assert!(!reply.complete, "it ended as if it were right");
    two.get(&blob_target(APP, large)).assert_is(&large.bytes);
    assert!(two.log().contains("is wrong"), "{}", two.log());
    for blob in [small, large, manifest] {
        let file = cloud.s3.file(&data_of(&blob.digest));
        eventually(PATIENCE, "it is replaced", || {
            std::fs::read(&file).unwrap() == blob.bytes
        });
    }
    let fetched = hub.served("GET", "/blobs/").len();
    let three = mirror(&cloud, &hub).start();
    three.pull(APP, "latest", &image);
    assert_eq!(hub.served("GET", "/blobs/").len(), fetched);
}

#[test]
fn what_somebody_else_keeps_in_the_bucket_is_left_as_it_is() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    let (image, pushed) = (Image::small(1), Image::small(2));
    hub.push(APP, "latest", &image);
    cloud.push(APP, "latest", &pushed);
    let before: BTreeSet<String> = cloud.s3.keys().into_iter().collect();
    let agent = mirror(&cloud, &hub).start();
    agent.pull(APP, "latest", &image);
    for blob in image.blobs() {
        let data = cloud.s3.file(&data_of(&blob.digest));
        eventually(PATIENCE, "a blob is anybody's", || data.exists());
    }
    eventually(PATIENCE, "it is said", || {
        agent.log().contains("from somebody else than a mirror")
    });
    let after = cloud.s3.keys().into_iter();
    let new: Vec<String> = after.filter(|key| !before.contains(key)).collect();
    let blobs = format!("{V2}/blobs/");
    assert!(new.iter().all(|key| key.starts_with(&blobs)), "{new:?}");
    let tag = std::fs::read_to_string(cloud.s3.file(&tag_link(APP, "latest"))).unwrap();
    assert_eq!(tag, pushed.digest());
    // Another mirror asks the upstream whose they are, and does not fetch them.
    let two = mirror(&cloud, &hub).start();
    two.pull(APP, "latest", &image);
    assert_eq!(
        sent(&hub, APP, &format!("blobs/{}", image.layer().digest)),
        1
    );
}

#[test]
fn what_is_too_much_to_bring_there_is_dropped_and_nobody_waits() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    // More than may wait, and be under way.
    let blobs: Vec<Blob> = (0..1100).map(|seed| Blob::new(seed, 100)).collect();
    for blob in &blobs {
        hub.push_blob(APP, blob);
    }
    // Nothing gets there.
    cloud.s3.front.plan(|asked| {
        let such = asked.operation == "PUT" && asked.key.ends_with("/data");
        such.then_some(Fault::Hang)
    });
    let agent = mirror(&cloud, &hub).start();
    std::thread::scope(|scope| {
        let agent = &agent;
        for some in blobs.chunks(blobs.len() / 8) {
            scope.spawn(move || {
                for blob in some {
                    agent.get(&blob_target(APP, blob)).assert_is(&blob.bytes);
                }
            });
        }
    });
    let dropped = || agent.metric("registry_agent_shared_dropped_total");
    eventually(PATIENCE, "some are dropped", || dropped() >= 1.0);
    assert!(dropped() <= 1100.0 - 1024.0, "{} dropped", dropped());
    assert_eq!(agent.admin().get("/readyz").status, 200);
}

#[cfg(debug_assertions)]
#[test]
fn killed_between_a_blob_and_its_link_it_goes_on_where_it_was() {
    use registry_agent::failpoint::{Failpoint, VARIABLE};

    let (cloud, hub) = (Cloud::start(), Upstream::start());
    let image = Image::small(1);
    hub.push(APP, "latest", &image);
    let layer = image.layer();
    let setup = mirror(&cloud, &hub).environment(VARIABLE, Failpoint::SharedSent.name());
    let mut one = setup.start();
    one.get(&blob_target(APP, layer)).assert_is(&layer.bytes);
    one.wait();
    let (data, link) = (data_of(&layer.digest), layer_link(APP, layer));
    assert!(cloud.s3.file(&data).exists());
    assert!(!cloud.s3.file(&link).exists());
    // Another mirror asks the upstream whose it is.
    let two = mirror(&cloud, &hub).start();
    two.get(&blob_target(APP, layer)).assert_is(&layer.bytes);
    assert_eq!(hub.served("GET", &layer.digest).len(), 1);
    drop(two);
    let _ = std::fs::remove_file(cloud.s3.file(&link));
    // And the first brings the link there when it is asked for the blob again.
    one.set_environment(&[
        ("AWS_ACCESS_KEY_ID", server::ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ]);
    one.start_again();
    one.wait_until_ready();
    one.get(&blob_target(APP, layer)).assert_is(&layer.bytes);
    eventually(PATIENCE, "it is linked", || cloud.s3.file(&link).exists());
}

#[test]
fn what_is_evicted_from_a_disk_stays_in_the_bucket() {
    let (cloud, hub) = (Cloud::start(), Upstream::start());
    let (old, new) = (Image::new(1, &[3 * MIB]), Image::new(2, &[3 * MIB]));
    hub.push(APP, "old", &old);
    hub.push(APP, "new", &new);
    let agent = mirror(&cloud, &hub)
        .set("storage.cache.limit", "4MiB")
        .set("health.interval", "100ms")
        .start();
    agent.pull(APP, "old", &old);
    wait_until_shared(&cloud, APP, "old", &old);
    agent.pull(APP, "new", &new);
    wait_until_shared(&cloud, APP, "new", &new);
    let stored = agent.stored_blob(&old.layer().digest);
    eventually(PATIENCE, "the old one is evicted", || !stored.exists());
    assert!(cloud.s3.file(&data_of(&old.layer().digest)).exists());
    agent.pull(APP, "old", &old);
    assert_eq!(hub.served("GET", &old.layer().digest).len(), 1);
    let asked = cloud.s3.front.asked();
    let mut deletes = asked.iter().filter(|it| it.operation == "DELETE");
    assert!(deletes.all(|it| it.key.starts_with("registry-agent/probe/")));
}
