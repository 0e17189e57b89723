//! What only the mirror's own account can see: given to nobody, unless that is asked for.

mod support;

use nix::sys::signal::Signal;
use support::agent::{Agent, Setup};
use support::image::{Blob, Image};
use support::upstream::{ALWAYS, Fault, On, Upstream};
use support::{PATIENCE, eventually, write_file};

const USER: &str = "robot";
const PASSWORD: &str = "hunter2-is-long-enough";

fn hub_with(image: &Image) -> Upstream {
    let hub = Upstream::options().account(USER, PASSWORD).start();
    hub.push("library/app", "latest", image);
    hub.push("team/secret", "latest", image);
    hub.make_private("team/secret");
    hub
}

fn everything_of(name: &str, image: &Image) -> [String; 4] {
    [
        format!("/v2/{name}/manifests/latest"),
        format!("/v2/{name}/manifests/{}", image.digest()),
        format!("/v2/{name}/blobs/{}", image.layer().digest),
        format!("/v2/{name}/tags/list"),
    ]
}

#[track_caller]
fn assert_hidden(agent: &Agent, name: &str, image: &Image) {
    for target in everything_of(name, image) {
        for method in ["HEAD", "GET"] {
            let reply = agent.request(method, &target).send();
            assert_eq!(reply.status, 404, "{method} {target}");
        }
    }
    assert!(!agent.stored(&format!("repositories/{name}")).exists());
}

#[test]
fn what_only_the_mirrors_account_can_pull_is_neither_given_nor_kept() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    assert_hidden(&agent, "team/secret", &image);
    // What everybody can pull is fetched as the account, whose pulls it then costs.
    agent.pull("library/app", "latest", &image);
    let fetched = hub.served("GET", "/library/app/manifests/");
    assert_eq!(fetched.len(), 1);
    // Also not to whoever knows a digest that is cached for others.
    assert_hidden(&agent, "team/secret", &image);
}

#[test]
fn it_is_given_and_kept_where_the_configuration_says_so() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .share_private()
        .start();
    agent.pull("team/secret", "latest", &image);
    agent.wait_until_stored(image.blobs());
    hub.switch_off();
    agent.pull("team/secret", "latest", &image);
}

#[test]
fn what_turns_private_is_not_given_as_a_tag_any_longer() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = Setup::mirror(&hub).set("freshness.window", "0s").start();
    agent.pull("library/app", "latest", &image);
    hub.make_private("library/app");
    hub.revoke_tokens();
    let reply = agent.get("/v2/library/app/manifests/latest");
    reply.assert_error(404, "MANIFEST_UNKNOWN");
}

#[test]
fn nobody_is_asked_again_for_a_repository_that_was_public_a_moment_ago() {
    let (image, other) = (Image::small(1), Image::small(2));
    let hub = hub_with(&image);
    hub.push("library/app", "other", &other);
    let agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    agent.pull("library/app", "latest", &image);
    let heads = hub.count("HEAD", "/library/app/");
    agent.pull("library/app", "other", &other);
    // The tag's own, and no second one as nobody.
    assert_eq!(hub.count("HEAD", "/library/app/"), heads + 1);
}

#[test]
fn when_nobody_can_be_asked_who_may_see_it_nothing_new_is_given() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    hub.fault(ALWAYS, On::head("/team/secret/"), Fault::Status(500));
    let target = format!("/v2/team/secret/manifests/{}", image.digest());
    agent.get(&target).assert_error(503, "UNAVAILABLE");
    hub.heal();
    agent.get(&target).assert_error(404, "MANIFEST_UNKNOWN");
}

#[test]
fn a_manifest_that_names_a_blob_does_not_give_it_to_its_repository() {
    let image = Image::small(1);
    let hub = Upstream::start();
    hub.push("team/app", "latest", &image);
    // The manifest alone: the upstream has no such blobs there.
    hub.push_manifest("other/app", Some("latest"), &image.manifest);
    let agent = Setup::mirror(&hub).start();
    agent.pull("team/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    assert_eq!(agent.get("/v2/other/app/manifests/latest").status, 200);
    let target = format!("/v2/other/app/blobs/{}", image.layer().digest);
    for method in ["GET", "HEAD"] {
        assert_eq!(
            agent.request(method, &target).send().status,
            404,
            "{method}"
        );
    }
}

/// Starts the agent again, with something else about its first upstream.
fn restart_with(agent: &mut Agent, change: impl FnOnce(&mut serde_json::Value)) {
    let mut config = agent.config()["upstreams"].clone();
    change(&mut config[0]);
    agent.kill();
    agent.rewrite("upstreams", config);
    agent.start_again();
    agent.wait_until_ready();
}

fn listed(agent: &Agent) -> serde_json::Value {
    agent.get("/v2/_catalog").json()["repositories"].clone()
}

#[test]
fn what_was_kept_while_it_was_shared_is_given_to_nobody_when_it_is_no_longer() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .share_private()
        .start();
    agent.pull("team/secret", "latest", &image);
    agent.wait_until_stored(image.blobs());
    let mut config = agent.config()["upstreams"].clone();
    config[0]["share_private"] = false.into();
    agent.rewrite("upstreams", config);
    for restarted in [false, true] {
        if restarted {
            agent.kill();
            agent.start_again();
            agent.wait_until_ready();
        } else {
            agent.signal(Signal::SIGHUP);
            eventually(PATIENCE, "it has reloaded", || {
                agent.log().contains("reloaded")
            });
        }
        // Nor when nobody can be asked.
        hub.fault(ALWAYS, On::any("/team/secret/"), Fault::Status(503));
        for target in everything_of("team/secret", &image) {
            let reply = agent.get(&target);
            assert_eq!(reply.status, 503, "{target}, restarted: {restarted}");
        }
        hub.heal();
        for target in everything_of("team/secret", &image) {
            for method in ["HEAD", "GET"] {
                let reply = agent.request(method, &target).send();
                assert_eq!(reply.status, 404, "{method} {target}");
            }
        }
        assert_eq!(listed(&agent), serde_json::json!([]));
    }
}

#[test]
fn what_turns_private_is_refused_with_all_that_is_kept_of_it() {
    let (image, unread) = (Image::small(1), Blob::new(9, 1000));
    let hub = hub_with(&image);
    hub.push_blob("library/app", &unread);
    let agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .set("freshness.window", "0s")
        .start();
    agent.pull("library/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    assert_eq!(listed(&agent), serde_json::json!(["library/app"]));
    // The token of nobody, issued before, is still good for it at the upstream.
    hub.make_private("library/app");
    let new = format!("/v2/library/app/blobs/{}", unread.digest);
    for target in everything_of("library/app", &image).iter().chain([&new]) {
        for method in ["HEAD", "GET"] {
            let reply = agent.request(method, target).send();
            assert_eq!(reply.status, 404, "{method} {target}");
        }
    }
    assert_eq!(hub.served("GET", &unread.digest).len(), 0);
    assert_eq!(listed(&agent), serde_json::json!([]));
    // What was learned is remembered when nobody can be asked.
    hub.switch_off();
    for target in everything_of("library/app", &image) {
        assert_eq!(agent.get(&target).status, 503, "{target}");
    }
}

#[test]
fn what_was_proved_public_is_served_while_nobody_can_be_asked() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .set("freshness.window", "0s")
        .start();
    agent.pull("library/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    agent.kill();
    hub.switch_off();
    agent.start_again();
    agent.wait_until_ready();
    agent.pull("library/app", "latest", &image);
    agent.pull("library/app", image.digest(), &image);
    assert_eq!(agent.get("/v2/library/app/tags/list").status, 200);
    assert_eq!(listed(&agent), serde_json::json!(["library/app"]));
}

#[test]
fn a_name_that_was_public_before_it_was_shared_is_not_taken_for_public() {
    let (image, secret) = (Image::small(1), Image::small(2));
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    agent.pull("library/app", "latest", &image);
    hub.make_private("library/app");
    hub.push("library/app", "secret", &secret);
    let restart_sharing = |agent: &mut Agent, share: bool| {
        let mut config = agent.config()["upstreams"].clone();
        config[0]["share_private"] = share.into();
        agent.kill();
        agent.rewrite("upstreams", config);
        agent.start_again();
        agent.wait_until_ready();
    };
    restart_sharing(&mut agent, true);
    agent.pull("library/app", "secret", &secret);
    agent.wait_until_stored(secret.blobs());
    hub.switch_off();
    restart_sharing(&mut agent, false);
    for target in everything_of("library/app", &secret) {
        assert_eq!(agent.get(&target).status, 503, "{target}");
    }
}

#[test]
fn what_a_public_name_no_longer_has_stays_by_digest() {
    let (old, new) = (Image::small(1), Image::small(2));
    let hub = hub_with(&old);
    let agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .set("freshness.window", "0s")
        .start();
    agent.pull("library/app", "latest", &old);
    agent.wait_until_stored(old.blobs());
    hub.push("library/app", "latest", &new);
    // Gone is what is not there for anybody; the name's list of tags says that it is public.
    for part in [old.digest(), &old.layer().digest] {
        hub.fault(ALWAYS, On::any(part), Fault::Status(404));
    }
    agent
        .get("/v2/library/app/manifests/latest")
        .assert_is(&new.manifest.blob.bytes);
    agent.pull("library/app", old.digest(), &old);
}

#[test]
fn referrers_are_asked_for_as_nobody_by_a_request_that_they_answer() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    for name in ["library/app", "team/secret"] {
        hub.refer(
            name,
            image.digest(),
            serde_json::json!({"digest": image.digest()}),
        );
    }
    // The specification has no HEAD there.
    hub.fault(ALWAYS, On::head("/referrers/"), Fault::Status(405));
    let agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    let of = |name: &str| agent.get(&format!("/v2/{name}/referrers/{}", image.digest()));
    assert_eq!(of("library/app").status, 200);
    assert_eq!(of("team/secret").status, 404);
}

#[test]
fn a_registry_without_head_says_by_its_list_of_tags_that_a_name_is_public() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    hub.fault(ALWAYS, On::head("/v2/"), Fault::Status(405));
    let agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .set("freshness.window", "0s")
        .start();
    for _ in 0..2 {
        agent.pull("library/app", "latest", &image);
        agent.wait_until_stored(image.blobs());
    }
    assert_hidden(&agent, "team/secret", &image);
}

#[test]
fn what_was_kept_while_it_was_shared_stays_hidden_without_the_credentials_as_well() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .share_private()
        .start();
    for name in ["team/secret", "library/app"] {
        agent.pull(name, "latest", &image);
        agent.wait_until_stored(image.blobs());
    }
    restart_with(&mut agent, |upstream| {
        let upstream = upstream.as_object_mut().unwrap();
        upstream.remove("credentials");
        upstream.remove("share_private");
    });
    assert_eq!(listed(&agent), serde_json::json!([]));
    hub.fault(ALWAYS, On::any("/v2/"), Fault::Status(503));
    for target in everything_of("team/secret", &image) {
        assert_eq!(agent.get(&target).status, 503, "{target}");
    }
    hub.heal();
    for target in everything_of("team/secret", &image) {
        for method in ["HEAD", "GET"] {
            let reply = agent.request(method, &target).send();
            assert_eq!(reply.status, 404, "{method} {target}");
        }
    }
    // What everybody can see is proved to be so once, and is then as anything else.
    agent.pull("library/app", "latest", &image);
    assert_eq!(listed(&agent), serde_json::json!(["library/app"]));
    agent.kill();
    hub.switch_off();
    agent.start_again();
    agent.wait_until_ready();
    agent.pull("library/app", "latest", &image);
    assert_eq!(listed(&agent), serde_json::json!(["library/app"]));
    for target in everything_of("team/secret", &image) {
        assert_eq!(agent.get(&target).status, 503, "{target}");
    }
}

#[test]
fn what_is_kept_of_a_registry_that_is_not_mirrored_any_longer_is_not_listed() {
    let image = Image::small(1);
    let (hub, other) = (Upstream::start(), Upstream::start());
    for upstream in [&hub, &other] {
        upstream.push("library/app", "latest", &image);
    }
    let mut agent = Setup::mirror(&hub).upstream("other.test", &other).start();
    agent.pull("library/app", "latest", &image);
    agent.pull("other.test/library/app", "latest", &image);
    let both = ["library/app", "other.test/library/app"];
    assert_eq!(listed(&agent), serde_json::json!(both));
    let config = agent.config()["upstreams"].clone();
    for (left, name) in config.as_array().unwrap().iter().zip(both) {
        agent.kill();
        agent.rewrite("upstreams", serde_json::json!([left]));
        agent.start_again();
        agent.wait_until_ready();
        assert_eq!(listed(&agent), serde_json::json!([name]));
    }
}

#[test]
fn a_tag_that_moves_to_what_is_kept_already_is_not_taken_for_public() {
    let (image, secret) = (Image::small(1), Image::small(2));
    let hub = hub_with(&image);
    hub.push("library/app", "other", &secret);
    let mut agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .set("freshness.window", "0s")
        .start();
    for (tag, image) in [("latest", &image), ("other", &secret)] {
        agent.pull("library/app", tag, image);
        agent.wait_until_stored(image.blobs());
    }
    restart_with(&mut agent, |upstream| {
        upstream["share_private"] = true.into();
    });
    hub.make_private("library/app");
    hub.push("library/app", "latest", &secret);
    agent
        .get("/v2/library/app/manifests/latest")
        .assert_is(&secret.manifest.blob.bytes);
    hub.switch_off();
    restart_with(&mut agent, |upstream| {
        upstream["share_private"] = false.into();
    });
    let reply = agent.get("/v2/library/app/manifests/latest");
    assert_eq!(reply.status, 503);
    assert_eq!(listed(&agent), serde_json::json!([]));
}

#[test]
fn a_digest_that_was_made_up_hides_nothing() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    // A registry that lists its tags for nobody.
    hub.fault(ALWAYS, On::any("/tags/list"), Fault::Status(401));
    let agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .set("freshness.window", "0s")
        .start();
    agent.pull("library/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    let digest = format!("sha256:{}", "0".repeat(64));
    // It is stored for somebody else, or nobody would look whether everybody may have it.
    let known = Blob::new(9, 1000);
    hub.push_blob("library/other", &known);
    let other = format!("/v2/library/other/blobs/{}", known.digest);
    agent.get(&other).assert_is(&known.bytes);
    agent.wait_until_stored([&known]);
    for made_up in [
        format!("/v2/library/app/manifests/{digest}"),
        format!("/v2/library/app/blobs/{digest}"),
        format!("/v2/library/app/blobs/{}", known.digest),
        "/v2/library/app/manifests/made-up".to_owned(),
        "/v2/library/app/tags/list".to_owned(),
    ] {
        assert_eq!(agent.get(&made_up).status, 404, "{made_up}");
        assert_eq!(
            listed(&agent),
            serde_json::json!(["library/app"]),
            "{made_up}"
        );
    }
    // While one is being asked for, the others do not wait for what comes of it.
    let gate = hub.hold_headers(On::head(&known.digest));
    let target = format!("/v2/library/app/blobs/{}", known.digest);
    let asked = agent.request("HEAD", &target).begin().unwrap();
    gate.reached();
    agent.pull("library/app", image.digest(), &image);
    gate.open();
    assert_eq!(asked.response().unwrap().status, 404);
}

#[test]
fn a_tag_that_is_not_there_does_not_have_the_others_asked_about_again() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    agent.pull("library/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    let missing = "/v2/library/app/manifests/missing";
    for _ in 0..3 {
        agent.get(missing).assert_error(404, "MANIFEST_UNKNOWN");
        let before = hub.total();
        agent.pull("library/app", "latest", &image);
        assert_eq!(hub.total(), before);
    }
}

#[test]
fn that_a_name_is_public_is_noted_as_soon_as_it_can_be() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .set("freshness.window", "0s")
        .start();
    // Where notes go there is something else for now.
    let notes = agent.folder().join("store/registry-agent/public");
    write_file(&notes, b"");
    agent.pull("library/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    std::fs::remove_file(&notes).unwrap();
    agent.pull("library/app", "latest", &image);
    agent.kill();
    hub.switch_off();
    agent.start_again();
    agent.wait_until_ready();
    agent.pull("library/app", "latest", &image);
}

#[test]
fn a_page_to_log_in_by_does_not_prove_that_a_name_is_public() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .share_private()
        .start();
    agent.pull("team/secret", "latest", &image);
    agent.wait_until_stored(image.blobs());
    for credentials in [true, false] {
        restart_with(&mut agent, |upstream| {
            let upstream = upstream.as_object_mut().unwrap();
            upstream.remove("share_private");
            if !credentials {
                upstream.remove("credentials");
            }
        });
        hub.fault(ALWAYS, On::any("/team/secret/"), Fault::LoginPage);
        for target in everything_of("team/secret", &image) {
            for method in ["HEAD", "GET"] {
                let reply = agent.request(method, &target).send();
                assert_eq!(reply.status, 503, "{method} {target}");
            }
        }
        assert_eq!(listed(&agent), serde_json::json!([]));
        hub.heal();
    }
}

#[test]
fn what_turned_private_stays_hidden_without_the_credentials() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    agent.pull("library/app", "latest", &image);
    agent.wait_until_stored(image.blobs());
    hub.make_private("library/app");
    // Somebody else's tag, which is not here, has it asked about.
    hub.revoke_tokens();
    let other = "/v2/library/app/manifests/other";
    agent.get(other).assert_error(404, "MANIFEST_UNKNOWN");
    assert_eq!(agent.get("/v2/team/secret/manifests/latest").status, 404);
    restart_with(&mut agent, |upstream| {
        upstream.as_object_mut().unwrap().remove("credentials");
    });
    for target in everything_of("library/app", &image) {
        assert_eq!(agent.get(&target).status, 404, "{target}");
    }
    assert_eq!(listed(&agent), serde_json::json!([]));
    // What was only asked for leaves nothing behind.
    let marks = agent.folder().join("store/registry-agent/shared");
    assert!(marks.join("library/app").exists());
    assert!(!marks.join("team").exists());
}

#[test]
fn who_comes_when_it_is_shared_no_longer_does_not_join_what_is_under_way() {
    let image = Image::small(1);
    let hub = hub_with(&image);
    let mut agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        .share_private()
        .start();
    let targets = [
        "/v2/team/secret/manifests/latest".to_owned(),
        format!("/v2/team/secret/blobs/{}", image.layer().digest),
    ];
    let under_way = targets.each_ref().map(|target| {
        let gate = hub.hold_headers(On::get(target));
        let asked = agent.request("GET", target).begin().unwrap();
        gate.reached();
        (gate, asked)
    });
    let mut config = agent.config()["upstreams"].clone();
    let upstream = config[0].as_object_mut().unwrap();
    upstream.remove("credentials");
    upstream.remove("share_private");
    agent.rewrite("upstreams", config);
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "it has reloaded", || {
        agent.log().contains("reloaded")
    });
    for target in &targets {
        assert_eq!(agent.get(target).status, 404, "{target}");
    }
    for (gate, asked) in under_way {
        gate.open();
        assert_eq!(asked.response().unwrap().finish().status, 200);
    }
}
