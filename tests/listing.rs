//! Lists: the tags that the upstream has, and the repositories that the mirror has.

mod support;

use serde_json::{Value, json};
use support::agent::{Agent, Setup};
use support::client::Reply;
use support::image::Image;
use support::upstream::Upstream;
use support::write_file;

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

#[test]
fn the_catalog_has_its_order_whatever_the_folders_are() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).start();
    let tricky = [
        "a", "a-b", "a-b/c", "a.b", "a/b", "a/b-c", "a/b/c", "a0", "a_b",
    ];
    let many = (0..40).map(|number| format!("many/{number}"));
    let mut all: Vec<String> = many.chain(tricky.map(str::to_owned)).collect();
    for name in &all {
        let folder = agent.stored(&format!("repositories/{name}/_manifests"));
        std::fs::create_dir_all(folder).unwrap();
    }
    // Neither a repository that has lost its manifests, nor a file, is listed.
    std::fs::create_dir_all(agent.stored("repositories/a/gone/_layers")).unwrap();
    write_file(&agent.stored("repositories/a/file"), b"");
    all.sort();
    for limit in [7, 25, 100] {
        let pages = all_pages(&agent, &format!("/v2/_catalog?n={limit}"), "repositories");
        assert!(pages.iter().all(|page| page.len() <= limit));
        assert_eq!(json!(pages.concat()), json!(all), "by {limit}");
    }
    for (last, next) in [
        ("a", "a-b"),
        ("a/", "a/b"),
        ("a/b/", "a/b/c"),
        ("a/c", "a0"),
    ] {
        let page = all_pages(&agent, &format!("/v2/_catalog?last={last}"), "repositories");
        assert_eq!(page[0][0], json!(next), "after {last}");
    }
}

#[test]
fn cached_tags_have_pages_too() {
    let (hub, image) = (Upstream::start(), Image::small(1));
    let agent = Setup::mirror(&hub).start();
    for tag in ["b", "a", "A", "10", "9"] {
        hub.push("library/app", tag, &image);
        agent.pull("library/app", tag, &image);
    }
    // What is left of a tag that was removed by hand.
    let tags = agent.stored("repositories/library/app/_manifests/tags");
    std::fs::create_dir_all(tags.join("9-gone")).unwrap();
    hub.switch_off();
    for (target, pages) in [
        ("?n=2", json!([["10", "9"], ["A", "a"], ["b"]])),
        ("?n=5", json!([["10", "9", "A", "a", "b"]])),
        ("?last=A&n=1", json!([["a"], ["b"]])),
        ("?last=b", json!([[]])),
        ("?n=0", json!([[]])),
    ] {
        let target = format!("/v2/library/app/tags/list{target}");
        assert_eq!(json!(all_pages(&agent, &target, "tags")), pages, "{target}");
    }
}
