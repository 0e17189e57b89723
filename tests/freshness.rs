//! When the upstream is asked whether a tag has moved, and what is served when it does not answer.

mod support;

use std::fs::File;
use std::io::Write;

use nix::sys::signal::Signal;
use support::agent::{Agent, SHORT, Setup};
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::{ALWAYS, Fault, On, Upstream};
use support::{PATIENCE, eventually};

const TAG: &str = "/v2/library/app/manifests/latest";

/// A hub with an image as `library/app:latest`.
fn hub_with(image: &Image) -> Upstream {
    let hub = Upstream::start();
    hub.push("library/app", "latest", image);
    hub
}

/// An agent that has pulled the image, and asks again for every request of its tag.
fn always_asking(hub: &Upstream, image: &Image) -> Agent {
    let agent = Setup::mirror(hub).set("freshness.window", "0s").start();
    agent.pull("library/app", "latest", image);
    agent
}

#[test]
fn within_the_window_the_upstream_is_not_asked() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    let before = hub.total();
    for _ in 0..3 {
        agent.pull("library/app", "latest", &image);
        agent.pull("library/app", image.digest(), &image);
        let head = agent.head(TAG);
        assert_eq!((head.status, head.header("warning")), (200, None));
    }
    assert_eq!(hub.total(), before);
}

#[test]
fn after_the_window_an_unchanged_tag_costs_a_head_and_no_get() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = always_asking(&hub, &image);
    let count = |method| hub.count(method, "/manifests/");
    for method in ["GET", "HEAD"] {
        let before = (count("GET"), count("HEAD"));
        let reply = agent.request(method, TAG).send();
        assert_eq!(reply.header("docker-content-digest"), Some(image.digest()));
        assert_eq!(reply.header("warning"), None, "it is confirmed, not stale");
        assert_eq!(
            (count("GET"), count("HEAD")),
            (before.0, before.1 + 1),
            "{method}"
        );
    }
}

#[test]
fn a_tag_that_moved_is_the_new_manifest_and_the_old_one_stays_by_digest() {
    let (old, new) = (Image::small(1), Image::small(2));
    let hub = hub_with(&old);
    let agent = always_asking(&hub, &old);
    hub.push("library/app", "latest", &new);
    agent.pull("library/app", "latest", &new);
    let before = hub.total();
    agent.pull("library/app", old.digest(), &old);
    assert_eq!(hub.total(), before, "a digest needs no asking");
}

#[test]
fn what_is_cached_is_served_with_a_warning_while_the_upstream_is_in_trouble() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = always_asking(&hub, &image);
    for (name, part, trouble) in [
        ("500", "/v2/", Some(Fault::Status(500))),
        ("503", "/v2/", Some(Fault::Status(503))),
        ("429", "/v2/", Some(Fault::Status(429))),
        ("no token", "/token", Some(Fault::Status(500))),
        ("off", "", None),
    ] {
        match trouble {
            Some(fault) => hub.fault(ALWAYS, On::any(part), fault),
            None => hub.switch_off(),
        }
        hub.revoke_tokens();
        let (stale, before) = (
            agent.metric("registry_agent_stale_served_total"),
            hub.total(),
        );
        for method in ["GET", "HEAD"] {
            let reply = agent.request(method, TAG).send();
            assert_eq!(reply.status, 200, "{name}: {method}");
            assert_eq!(reply.header("docker-content-digest"), Some(image.digest()));
            let warning = reply.header("warning").unwrap_or_default();
            assert!(
                warning.starts_with("299 - "),
                "{name}: {method}: {warning:?}"
            );
            let age = reply.header("age").and_then(|age| age.parse::<u64>().ok());
            assert!(age.is_some(), "{name}: {method}: {age:?}");
        }
        assert!(
            agent.metric("registry_agent_stale_served_total") > stale,
            "{name}"
        );
        assert!(
            name == "off" || hub.total() > before,
            "{name}: it was asked"
        );
        let asked = hub.total();
        agent.pull("library/app", image.digest(), &image);
        assert_eq!(hub.total(), asked, "{name}: a digest needs no asking");
        hub.heal();
    }
    hub.switch_on();
    assert_eq!(
        agent.get(TAG).header("warning"),
        None,
        "asked, and confirmed, again"
    );
}

#[test]
fn an_upstream_that_does_not_say_by_head_what_a_tag_is_says_it_by_get() {
    let (old, new) = (Image::small(1), Image::small(2));
    for (on, fault) in [
        (On::head("/manifests/"), Fault::Status(405)),
        (On::any("/manifests/"), Fault::NoDigest),
    ] {
        let hub = hub_with(&old);
        hub.fault(ALWAYS, on, fault);
        let agent = always_asking(&hub, &old);
        agent.pull("library/app", "latest", &old);
        hub.push("library/app", "latest", &new);
        agent.pull("library/app", "latest", &new);
        assert_eq!(agent.head(TAG).header("warning"), None, "confirmed");
    }
}

#[test]
fn a_tag_that_upstream_denies_or_does_not_have_any_more_is_unknown_here_too() {
    let image = Image::small(1);
    for status in [401, 403, 404] {
        let hub = hub_with(&image);
        let agent = always_asking(&hub, &image);
        hub.fault(ALWAYS, On::any("/manifests/latest"), Fault::Status(status));
        agent.get(TAG).assert_error(404, "MANIFEST_UNKNOWN");
        // Who knows a digest has had the image before.
        agent.pull("library/app", image.digest(), &image);
    }
}

#[test]
fn asking_costs_no_pull_and_a_limit_leaves_the_tag_as_it_was() {
    let (old, new) = (Image::small(1), Image::small(2));
    let hub = hub_with(&old);
    hub.limit(1);
    let agent = always_asking(&hub, &old);
    for _ in 0..3 {
        let reply = agent.get(TAG);
        assert_eq!(
            reply.header("warning"),
            None,
            "nothing is left, and nothing was used"
        );
    }
    hub.push("library/app", "latest", &new);
    let stale = agent.get(TAG);
    stale.assert_is(&old.manifest.blob.bytes);
    assert!(
        stale
            .header("warning")
            .is_some_and(|warning| warning.starts_with("299 - "))
    );
    let of_new = format!("/v2/library/app/manifests/{}", new.digest());
    agent.get(&of_new).assert_error(503, "UNAVAILABLE");
    hub.limit(1);
    agent.pull("library/app", "latest", &new);
}

#[test]
fn a_hanging_upstream_costs_the_deadline_and_not_the_answer() {
    let image = Image::small(1);
    for part in ["/manifests/", "/token"] {
        let hub = hub_with(&image);
        let agent = Setup::mirror(&hub)
            .set("freshness.window", "0s")
            .set("freshness.deadline", SHORT)
            // Only the deadline can be what ends the wait within this test's patience.
            .set("timeouts.headers", "60s")
            .start();
        agent.pull("library/app", "latest", &image);
        hub.revoke_tokens();
        hub.fault(ALWAYS, On::any(part), Fault::HangHeaders);
        // The second one finds that the first has waited for all of them.
        for _ in 0..2 {
            let reply = agent.get(TAG);
            reply.assert_is(&image.manifest.blob.bytes);
            let warning = reply.header("warning").unwrap_or_default();
            assert!(warning.starts_with("299 - "), "{part}: {warning:?}");
        }
        let hanging = hub
            .exchanges()
            .into_iter()
            .rfind(|exchange| exchange.path.contains(part));
        assert_eq!(
            hanging.map(|exchange| exchange.status),
            Some(0),
            "never answered"
        );
    }
}

#[test]
fn a_dead_upstream_costs_one_deadline_and_not_one_for_each_tag() {
    let images = [Image::small(1), Image::small(2), Image::small(3)];
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub)
        .set("freshness.window", "0s")
        .set("freshness.deadline", SHORT)
        .set("timeouts.headers", "60s")
        .start();
    let tags = ["one", "two", "three"];
    for (tag, image) in tags.iter().zip(&images) {
        hub.push("library/app", tag, image);
        agent.pull("library/app", tag, image);
    }
    hub.fault(ALWAYS, On::any("/manifests/"), Fault::HangHeaders);
    for (tag, image) in tags.iter().zip(&images) {
        agent.pull("library/app", tag, image);
    }
    let count = |reason: &str| agent.log().matches(reason).count();
    assert_eq!(count("did not answer in"), 1, "{}", agent.log());
    assert_eq!(count("is not waited for"), 2, "{}", agent.log());
}

/// An agent that asks for every request of the tag, and would wait for the answer longer than a
/// test does, if it were not for the deadline.
fn with_long_timeout(hub: &Upstream, image: &Image) -> Agent {
    let agent = Setup::mirror(hub)
        .set("freshness.window", "0s")
        .set("freshness.deadline", SHORT)
        .set("timeouts.headers", "60s")
        .start();
    agent.pull("library/app", "latest", image);
    agent
}

/// Waits until the tag is this image, confirmed by the upstream.
#[track_caller]
fn wait_until_fresh(agent: &Agent, image: &Image) {
    eventually(PATIENCE, "the tag is confirmed", || {
        let reply = agent.get(TAG);
        assert_eq!(reply.status, 200);
        reply.header("warning").is_none() && reply.body == image.manifest.blob.bytes
    });
}

#[test]
fn one_request_that_hangs_does_not_keep_others_from_asking() {
    let (image, moved) = (Image::small(1), Image::small(2));
    let hub = hub_with(&image);
    let agent = with_long_timeout(&hub, &image);
    hub.fault(1, On::head("/manifests/"), Fault::HangHeaders);
    let before = hub.count("HEAD", "/manifests/");
    assert!(agent.get(TAG).header("warning").is_some());
    for _ in 0..10 {
        agent.get(TAG);
    }
    // Not one for each request: it would hang as well.
    assert_eq!(hub.count("HEAD", "/manifests/"), before + 1);
    hub.push("library/app", "latest", &moved);
    wait_until_fresh(&agent, &moved);
}

#[test]
fn an_answer_that_comes_late_does_not_undo_a_later_one() {
    let (image, moved) = (Image::small(1), Image::small(2));
    let hub = hub_with(&image);
    let mut agent = with_long_timeout(&hub, &image);
    let gate = hub.hold_headers(On::head("/manifests/"));
    assert!(agent.get(TAG).header("warning").is_some());
    gate.reached();
    hub.push("library/app", "latest", &moved);
    wait_until_fresh(&agent, &moved);
    // From now on it does not ask any more.
    agent.rewrite("freshness.window", "1h");
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "it reloads", || agent.log().contains("reloaded"));
    let answers = || agent.metric("registry_agent_upstream_requests_total");
    let before = answers();
    gate.open();
    eventually(PATIENCE, "the answer comes", || answers() > before);
    for _ in 0..20 {
        agent.get(TAG).assert_is(&moved.manifest.blob.bytes);
    }
}

#[test]
fn it_starts_with_the_upstream_down_and_serves_what_it_has() {
    let image = Image::new(1, &[3 * MIB, KIB]);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    agent.kill();
    hub.switch_off();
    agent.start_again();
    agent.wait_until_ready();
    agent.pull("library/app", "latest", &image);
    agent.pull("library/app", image.digest(), &image);
    agent
        .get("/v2/library/other/manifests/latest")
        .assert_error(503, "UNAVAILABLE");
}

#[test]
fn a_blob_of_one_repository_is_another_ones_only_if_the_upstream_says_so() {
    let (hub, blob) = (Upstream::start(), Blob::new(1, 2 * MIB));
    for name in ["library/first", "library/also"] {
        hub.push_blob(name, &blob);
    }
    hub.push("library/without", "latest", &Image::small(1));
    hub.push_blob("library/secret", &blob);
    hub.make_private("library/secret");
    let agent = Setup::mirror(&hub).start();
    let get = |name: &str| agent.get(&format!("/v2/{name}/blobs/{}", blob.digest));
    get("library/first").assert_is(&blob.bytes);
    for name in ["library/without", "library/secret", "library/unknown"] {
        let reply = get(name);
        assert_eq!(reply.status, 404, "{name}");
        assert!(
            hub.exchanges()
                .iter()
                .any(|asked| asked.path.contains(name)),
            "{name}"
        );
    }
    get("library/also").assert_is(&blob.bytes);
    let sent: usize = hub
        .served("GET", &blob.digest)
        .iter()
        .map(|download| download.sent)
        .sum();
    assert_eq!(sent, blob.len(), "downloaded once");
}

#[test]
fn with_the_upstream_off_a_cached_manifest_says_whose_a_blob_is() {
    let hub = Upstream::start();
    let shared = Image::new(1, &[3 * MIB]);
    for name in ["library/first", "library/also"] {
        hub.push(name, "latest", &shared);
    }
    hub.push("library/without", "latest", &Image::small(2));
    let agent = Setup::mirror(&hub).start();
    agent.pull("library/first", "latest", &shared);
    for name in ["library/also", "library/without"] {
        assert_eq!(
            agent.get(&format!("/v2/{name}/manifests/latest")).status,
            200,
            "{name}"
        );
    }
    hub.switch_off();
    let get = |name: &str| agent.get(&format!("/v2/{name}/blobs/{}", shared.layer().digest));
    get("library/also").assert_is(&shared.layer().bytes);
    let without = get("library/without");
    assert!(
        without.status == 404 || without.status == 503,
        "{}",
        without.status
    );
}

#[test]
fn a_tag_link_that_is_none_is_asked_for_again() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    agent.kill();
    let link = agent.stored("repositories/library/app/_manifests/tags/latest/current/link");
    for rotten in [&b"garbage\xff"[..], b"", b"sha256:1"] {
        let mut file = File::options()
            .write(true)
            .truncate(true)
            .open(&link)
            .unwrap();
        file.write_all(rotten).unwrap();
        agent.start_again();
        agent.wait_until_ready();
        agent.get(TAG).assert_is(&image.manifest.blob.bytes);
        agent.kill();
    }
}
