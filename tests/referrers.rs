//! What refers to an image: passed on from the upstream, and kept for when that can't be asked.

mod support;

use serde_json::{Value, json};
use support::agent::{Agent, Setup};
use support::client::Reply;
use support::image::{Image, Manifest};
use support::upstream::Upstream;

const SIGNATURE: &str = "application/vnd.dev.cosign.artifact.sig.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn descriptor(image: &Image, artifact_type: &str) -> Value {
    json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": image.digest(),
        "size": image.manifest.blob.len(),
        "artifactType": artifact_type,
    })
}

fn path(image: &Image) -> String {
    format!("/v2/library/app/referrers/{}", image.digest())
}

/// The answer, and the digests that it lists.
fn referrers(agent: &Agent, target: &str) -> (Reply, Vec<String>) {
    let reply = agent.get(target);
    assert_eq!(reply.status, 200, "{target}");
    assert_eq!(reply.header("content-type"), Some(INDEX));
    let index = reply.json();
    assert_eq!(index["schemaVersion"], 2);
    let digest = |listed: &Value| listed["digest"].as_str().expect("a digest").to_owned();
    let digests = index["manifests"]
        .as_array()
        .expect("a list")
        .iter()
        .map(digest)
        .collect();
    (reply, digests)
}

#[test]
fn they_are_the_upstreams_and_those_of_one_type_where_that_is_asked_for() {
    let [image, signature, bill] = [1, 2, 3].map(Image::small);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    hub.refer(
        "library/app",
        image.digest(),
        descriptor(&signature, SIGNATURE),
    );
    hub.refer(
        "library/app",
        image.digest(),
        descriptor(&bill, "application/spdx+json"),
    );
    let agent = Setup::mirror(&hub).start();
    let (reply, all) = referrers(&agent, &path(&image));
    assert_eq!(all, [signature.digest(), bill.digest()]);
    assert_eq!(reply.header("oci-filters-applied"), None);
    let narrowed = format!("{}?artifactType={SIGNATURE}", path(&image));
    let (reply, one) = referrers(&agent, &narrowed.replace('+', "%2B"));
    assert_eq!(one, [signature.digest()]);
    assert_eq!(reply.header("oci-filters-applied"), Some("artifactType"));
    // Of something without any, an empty list.
    assert!(referrers(&agent, &path(&bill)).1.is_empty());
}

#[test]
fn with_the_upstream_off_they_are_those_it_last_had_and_say_so() {
    let [image, signature, other] = [1, 2, 3].map(Image::small);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    hub.refer(
        "library/app",
        image.digest(),
        descriptor(&signature, SIGNATURE),
    );
    let agent = Setup::mirror(&hub).start();
    referrers(&agent, &path(&image));
    hub.switch_off();
    let (reply, digests) = referrers(&agent, &path(&image));
    assert_eq!(digests, [signature.digest()]);
    assert!(
        reply
            .header("warning")
            .is_some_and(|it| it.starts_with("299 - "))
    );
    agent.get(&path(&other)).assert_error(503, "UNAVAILABLE");
}

#[test]
fn a_registry_from_before_has_them_under_a_tag() {
    let [image, signature] = [1, 2].map(Image::small);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).start();
    assert!(referrers(&agent, &path(&image)).1.is_empty());
    let tag = image.digest().replace(':', "-");
    hub.push_manifest("library/app", Some(&tag), &Manifest::index(&[&signature]));
    assert_eq!(referrers(&agent, &path(&image)).1, [signature.digest()]);
}

#[test]
fn what_is_no_digest_is_refused() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).start();
    let reply = agent.get("/v2/library/app/referrers/latest");
    reply.assert_error(400, "DIGEST_INVALID");
}

#[test]
fn that_something_has_none_is_kept_only_where_it_is_stored() {
    let [image, other] = [1, 2].map(Image::small);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    for asked in [&image, &other] {
        assert!(referrers(&agent, &path(asked)).1.is_empty());
    }
    hub.switch_off();
    assert!(referrers(&agent, &path(&image)).1.is_empty());
    agent.get(&path(&other)).assert_error(503, "UNAVAILABLE");
    // What it had once is forgotten as well.
    hub.switch_on();
    hub.refer("library/app", other.digest(), descriptor(&image, SIGNATURE));
    assert_eq!(referrers(&agent, &path(&other)).1, [image.digest()]);
    hub.forget_referrers("library/app", other.digest());
    assert!(referrers(&agent, &path(&other)).1.is_empty());
    hub.switch_off();
    agent.get(&path(&other)).assert_error(503, "UNAVAILABLE");
}

#[test]
fn a_list_of_several_pages_is_all_of_them_or_none() {
    let [image, one, two, three] = [1, 2, 3, 4].map(Image::small);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    for signature in [&one, &two, &three] {
        let descriptor = descriptor(signature, SIGNATURE);
        hub.refer("library/app", image.digest(), descriptor);
    }
    let all = [one.digest(), two.digest(), three.digest()];
    let (url, below) = (hub.url(), format!("{}/below", hub.url()));
    for (at, link) in [
        (url, r#"<{path}?p={page}>; rel="next""#.to_owned()),
        (url, r#"<?p={page}>; rel="next""#.to_owned()),
        (url, format!("<{url}{{path}}?p={{page}}>; rel=next")),
        (
            url,
            r#"<?p=0>; rel="first", <?p={page}>; title="a, b"; rel="next""#.to_owned(),
        ),
        (&below, r#"<?p={page}>; rel="next""#.to_owned()),
        (&below, r#"</below{path}?p={page}>; rel="next""#.to_owned()),
    ] {
        hub.page_referrers(&link);
        let agent = Setup::mirror(&hub).at(&[at]).start();
        assert_eq!(referrers(&agent, &path(&image)).1, all, "{link} at {at}");
    }
    for link in [
        r#"<http://127.0.0.1:1{path}?p={page}>; rel="next""#,
        r#"</elsewhere?p={page}>; rel="next""#,
        r#"<{path}?p=99>; rel="next""#,
        r#"<{path}?p=0>; rel="next""#,
    ] {
        hub.page_referrers(link);
        let agent = Setup::mirror(&hub).start();
        agent.get(&path(&image)).assert_error(503, "UNAVAILABLE");
    }
}

#[test]
fn those_that_were_kept_while_they_were_shared_are_given_to_nobody_when_they_are_no_longer() {
    let [image, signature] = [1, 2].map(Image::small);
    let hub = Upstream::options().account("robot", "secret").start();
    hub.push("library/app", "latest", &image);
    let mut agent = Setup::mirror(&hub).credentials("robot", "secret").start();
    agent.pull("library/app", "latest", &image);
    hub.make_private("library/app");
    hub.refer(
        "library/app",
        image.digest(),
        descriptor(&signature, SIGNATURE),
    );
    let restart_sharing = |agent: &mut Agent, share: bool| {
        let mut config = agent.config()["upstreams"].clone();
        config[0]["share_private"] = share.into();
        agent.kill();
        agent.rewrite("upstreams", config);
        agent.start_again();
        agent.wait_until_ready();
    };
    restart_sharing(&mut agent, true);
    assert_eq!(referrers(&agent, &path(&image)).1, [signature.digest()]);
    hub.switch_off();
    restart_sharing(&mut agent, false);
    let reply = agent.get(&path(&image));
    reply.assert_error(503, "UNAVAILABLE");
}
