//! What only the mirror's own account can see: given to nobody, unless that is asked for.

mod support;

use support::agent::{Agent, Setup};
use support::image::Image;
use support::upstream::{ALWAYS, Fault, On, Upstream};

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
