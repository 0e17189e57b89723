//! The pulls that an upstream allows: counted, spared, and never run into.

mod support;

use std::fs::File;
use std::time::{Duration, SystemTime};

use support::agent::Setup;
use support::image::Image;
use support::upstream::{ALWAYS, Fault, On, Upstream};

fn hub_with(images: &[&Image]) -> Upstream {
    let hub = Upstream::start();
    for (number, image) in images.iter().enumerate() {
        hub.push("library/app", &number.to_string(), image);
    }
    hub
}

#[test]
fn the_pulls_that_are_left_are_told() {
    let image = Image::small(1);
    let hub = hub_with(&[&image]);
    hub.limit(20);
    let agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "0", &image);
    let told = agent.metric(r#"registry_agent_rate_limit_remaining{registry="docker.io"}"#);
    assert!(told <= 20.0, "{told}");
    assert_eq!(agent.status()["upstreams"][0]["budget_remaining"], told);
}

#[test]
fn with_no_pull_left_what_is_cached_is_served_and_nothing_is_asked_for_in_vain() {
    let (cached, other) = (Image::small(1), Image::small(2));
    let hub = hub_with(&[&cached, &other]);
    let agent = Setup::mirror(&hub).set("freshness.window", "0s").start();
    agent.pull("library/app", "0", &cached);
    agent.wait_until_stored(cached.blobs());
    hub.limit(0);
    let pulls = hub.count("GET", "/manifests/");
    let by_digest = format!("/v2/library/app/manifests/{}", other.digest());
    // HEAD, which is free, says that none is left, before or after the first refusal.
    for target in ["/v2/library/app/manifests/1", &by_digest, &by_digest] {
        agent.get(target).assert_error(503, "UNAVAILABLE");
    }
    assert_eq!(hub.count("GET", "/manifests/"), pulls);
    agent.pull("library/app", "0", &cached);
    // And that there are some again.
    hub.limit(5);
    agent.pull("library/app", "1", &other);
}

#[test]
fn an_upstream_that_says_when_to_come_back_is_left_alone_until_then() {
    let image = Image::small(1);
    let hub = hub_with(&[&image]);
    let agent = Setup::mirror(&hub).start();
    let by_digest = format!("/v2/library/app/manifests/{}", image.digest());
    hub.fault(ALWAYS, On::get("/manifests/"), Fault::RetryAfter(3600));
    agent.get(&by_digest).assert_error(503, "UNAVAILABLE");
    let asked = hub.total();
    agent.get(&by_digest).assert_error(503, "UNAVAILABLE");
    assert_eq!(hub.total(), asked);
}

#[test]
fn a_tag_is_asked_about_less_often_as_pulls_run_out() {
    let images = [Image::small(1), Image::small(2), Image::small(3)];
    let hub = hub_with(&images.each_ref());
    let mut agent = Setup::mirror(&hub).set("freshness.window", "1m").start();
    agent.pull("library/app", "0", &images[0]);
    agent.kill();
    // It was confirmed two minutes ago, twice the window.
    let link = agent.stored("repositories/library/app/_manifests/tags/0/current/link");
    let link = File::options().append(true).open(link).unwrap();
    let ago = SystemTime::now() - Duration::from_mins(2);
    link.set_modified(ago).unwrap();
    agent.start_again();
    agent.wait_until_ready();
    let asked = || hub.count("HEAD", "/manifests/0");
    let before = asked();
    // Few are left, as the agent learns with another tag.
    hub.limit(2);
    agent.pull("library/app", "1", &images[1]);
    let reply = agent.get("/v2/library/app/manifests/0");
    assert_eq!((reply.status, asked()), (200, before));
    // And then many.
    hub.limit(100);
    agent.pull("library/app", "2", &images[2]);
    let reply = agent.get("/v2/library/app/manifests/0");
    assert_eq!((reply.status, asked()), (200, before + 1));
}

#[test]
fn a_limit_on_anything_but_manifests_keeps_no_manifest_back() {
    let images = [Image::small(1), Image::small(2)];
    for (part, cdn) in [("/blobs/", false), ("/cdn/", true), ("/token", false)] {
        let hub = if cdn {
            Upstream::options().cdn().start()
        } else {
            Upstream::start()
        };
        for (number, image) in images.iter().enumerate() {
            hub.push("library/app", &number.to_string(), image);
        }
        let agent = Setup::mirror(&hub).start();
        hub.fault(1, On::get(part), Fault::RetryAfter(3600));
        let blob = format!("/v2/library/app/blobs/{}", images[0].layer().digest);
        agent.get(&blob).assert_error(503, "UNAVAILABLE");
        for image in &images {
            let manifest = format!("/v2/library/app/manifests/{}", image.digest());
            assert_eq!(agent.get(&manifest).status, 200, "{part}");
        }
    }
}

#[test]
fn an_upstream_that_limits_blobs_is_left_alone_with_them_for_as_long_as_it_says() {
    let image = Image::small(1);
    let hub = hub_with(&[&image]);
    let agent = Setup::mirror(&hub).start();
    let blob = format!("/v2/library/app/blobs/{}", image.layer().digest);
    hub.fault(1, On::get("/blobs/"), Fault::RetryAfter(30));
    for _ in 0..2 {
        agent.get(&blob).assert_error(503, "UNAVAILABLE");
    }
    assert_eq!(hub.count("GET", "/blobs/"), 1);
}

#[test]
fn a_tag_that_is_only_looked_at_costs_no_pull_and_is_kept_once_its_manifest_is() {
    let image = Image::small(1);
    let hub = hub_with(&[&image]);
    let agent = Setup::mirror(&hub).start();
    let tag = "/v2/library/app/manifests/0";
    let by_digest = format!("/v2/library/app/manifests/{}", image.digest());
    for target in [tag, tag, &by_digest] {
        let head = agent.head(target);
        assert_eq!(head.status, 200);
        let size = image.manifest.blob.len().to_string();
        for (name, value) in [
            ("docker-content-digest", image.digest()),
            ("content-type", &image.manifest.media_type),
            ("content-length", &size),
        ] {
            assert_eq!(head.header(name), Some(value), "{target}: {name}");
        }
    }
    assert_eq!(hub.count("GET", "/manifests/"), 0);
    assert_eq!(agent.head("/v2/library/app/manifests/none").status, 404);
    // As docker and containerd go on.
    agent.get(&by_digest).assert_is(&image.manifest.blob.bytes);
    hub.switch_off();
    agent.get(tag).assert_is(&image.manifest.blob.bytes);
}

#[test]
fn a_manifest_that_was_looked_at_before_its_tag_moved_does_not_move_the_tag_back() {
    let [old, new] = [1, 2].map(Image::small);
    let hub = hub_with(&[&old]);
    let agent = Setup::mirror(&hub).start();
    let tag = "/v2/library/app/manifests/0";
    assert_eq!(
        agent.head(tag).header("docker-content-digest"),
        Some(old.digest())
    );
    hub.push("library/app", "0", &new);
    agent.get(tag).assert_is(&new.manifest.blob.bytes);
    let by_digest = format!("/v2/library/app/manifests/{}", old.digest());
    agent.get(&by_digest).assert_is(&old.manifest.blob.bytes);
    agent.get(tag).assert_is(&new.manifest.blob.bytes);
}

#[test]
fn a_limit_on_manifests_holds_for_as_long_as_it_says_whatever_else_is_answered() {
    let [limited, other] = [1, 2].map(Image::small);
    let hub = hub_with(&[&limited, &other]);
    let agent = Setup::mirror(&hub).start();
    hub.fault(ALWAYS, On::get("/manifests/"), Fault::RetryAfter(3600));
    agent
        .get("/v2/library/app/manifests/0")
        .assert_error(503, "UNAVAILABLE");
    hub.heal();
    let asked = hub.count("GET", "/manifests/");
    // HEAD is free, and says nothing of pulls.
    assert_eq!(agent.head("/v2/library/app/manifests/1").status, 200);
    for _ in 0..2 {
        for reference in ["0", other.digest()] {
            agent
                .get(&format!("/v2/library/app/manifests/{reference}"))
                .assert_error(503, "UNAVAILABLE");
        }
    }
    assert_eq!(hub.count("GET", "/manifests/"), asked);
}
