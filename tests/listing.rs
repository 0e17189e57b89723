//! Lists: the tags that the upstream has, and the repositories that the mirror has.

mod support;

use serde_json::{Value, json};
use support::agent::{Agent, Setup};
use support::client::Reply;
use support::image::Image;
use support::upstream::Upstream;

/// Follows the answers' links from `target` on, and joins their lists of `key`.
fn all_pages(agent: &Agent, target: &str, key: &str) -> Vec<Vec<Value>> {
    let mut pages = Vec::new();
    let mut next = Some(target.to_owned());
    while let Some(target) = next {
        let reply = agent.get(&target);
        assert_eq!(reply.status, 200, "{target}");
        assert_eq!(
            reply.header("docker-distribution-api-version"),
            Some("registry/2.0")
        );
        pages.push(reply.json()[key].as_array().expect("a list").clone());
        next = reply.header("link").map(|_| linked(&reply));
        assert!(pages.len() < 10, "the links never end");
    }
    pages
}

/// The path in `Link: </path>; rel="next"` (RFC 8288).
fn linked(reply: &Reply) -> String {
    let link = reply.header("link").unwrap_or_default();
    let path = link
        .strip_prefix('<')
        .and_then(|link| link.strip_suffix(r#">; rel="next""#));
    let path = path.unwrap_or_else(|| panic!("{link} leads nowhere"));
    assert!(path.starts_with("/v2/"), "{path} is not on this registry");
    path.to_owned()
}

#[test]
fn tags_are_the_upstreams_page_by_page() {
    let (hub, other, image) = (Upstream::start(), Upstream::start(), Image::small(1));
    for tag in ["1", "2", "latest"] {
        hub.push("library/app", tag, &image);
    }
    for tag in ["a", "b", "c", "d", "e"] {
        other.push("library/app", tag, &image);
    }
    let agent = Setup::mirror(&hub)
        .upstream("registry.test", &other)
        .start();
    let whole = agent.get("/v2/library/app/tags/list");
    assert_eq!(
        whole.json(),
        json!({"name": "library/app", "tags": ["1", "2", "latest"]})
    );
    for (target, expected) in [
        (
            "/v2/library/app/tags/list?n=2",
            json!([["1", "2"], ["latest"]]),
        ),
        (
            "/v2/library/app/tags/list?n=2&last=1",
            json!([["2", "latest"]]),
        ),
        ("/v2/library/app/tags/list?last=2", json!([["latest"]])),
        // Distribution-spec 1.1: an empty list, and no link.
        ("/v2/library/app/tags/list?n=0", json!([[]])),
        // The upstream's links don't know of the name it has here.
        (
            "/v2/registry.test/library/app/tags/list?n=2",
            json!([["a", "b"], ["c", "d"], ["e"]]),
        ),
        (
            "/v2/library/app/tags/list?n=2&ns=registry.test",
            json!([["a", "b"], ["c", "d"], ["e"]]),
        ),
    ] {
        assert_eq!(
            json!(all_pages(&agent, target, "tags")),
            expected,
            "{target}"
        );
    }
}

#[test]
fn tags_that_are_cached_are_listed_while_the_upstream_is_out_of_reach() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    hub.push("library/app", "latest", &image);
    hub.push("library/app", "never-pulled", &image);
    let agent = Setup::mirror(&hub).start();
    agent.pull("library/app", "latest", &image);
    hub.switch_off();
    let reply = agent.get("/v2/library/app/tags/list");
    assert_eq!(
        reply.json(),
        json!({"name": "library/app", "tags": ["latest"]})
    );
    agent
        .get("/v2/library/other/tags/list")
        .assert_error(503, "UNAVAILABLE");
}

#[test]
fn the_catalog_is_what_is_cached() {
    let (hub, other, image) = (Upstream::start(), Upstream::start(), Image::small(1));
    let agent = Setup::mirror(&hub)
        .upstream("registry.test", &other)
        .start();
    let names = || json!(all_pages(&agent, "/v2/_catalog", "repositories"));
    assert_eq!(names(), json!([[]]));
    for name in ["library/b", "library/a", "zoo/app", "library/a/inner"] {
        hub.push(name, "latest", &image);
        agent.pull(name, "latest", &image);
    }
    hub.push("library/not-pulled", "latest", &image);
    other.push("owner/app", "latest", &image);
    agent.pull("registry.test/owner/app", "latest", &image);
    hub.switch_off();

    let all = [
        "library/a",
        "library/a/inner",
        "library/b",
        "registry.test/owner/app",
        "zoo/app",
    ];
    assert_eq!(names(), json!([all]));
    for (target, expected) in [
        ("/v2/_catalog?n=2", json!([all[..2], all[2..4], all[4..]])),
        ("/v2/_catalog?n=0", json!([[]])),
        ("/v2/_catalog?n=5", json!([all])),
        ("/v2/_catalog?last=library/a/inner", json!([all[2..]])),
        (
            "/v2/_catalog?n=1&last=registry.test/owner/app",
            json!([all[4..]]),
        ),
        ("/v2/_catalog?last=zoo/app", json!([[]])),
    ] {
        assert_eq!(
            json!(all_pages(&agent, target, "repositories")),
            expected,
            "{target}"
        );
    }
}
