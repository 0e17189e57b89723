//! What the mirror does not do, and how it says so: in words that send a container client to the
//! registry itself, and never in words that make it ask for a password or hammer the mirror.

mod support;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::json;
use support::agent::{Agent, SHORT, Setup};
use support::client::Client;
use support::image::{Blob, Image, MIB, Manifest, OCI_MANIFEST};
use support::upstream::{ALWAYS, Fault, On, Upstream};
use support::{PATIENCE, eventually};

fn mirror_of(image: &Image) -> (Upstream, Agent) {
    let hub = Upstream::start();
    hub.push("library/app", "latest", image);
    let agent = Setup::mirror(&hub).start();
    (hub, agent)
}

/// Asserts that nothing was stored under any name.
#[track_caller]
fn assert_nothing_stored(agent: &Agent) {
    assert!(
        !agent
            .stored("repositories/library/app/_manifests/tags")
            .exists()
    );
    assert!(
        !agent
            .stored("repositories/library/app/_manifests/revisions")
            .exists()
    );
    assert!(!agent.stored("blobs/sha256").exists());
}

#[test]
fn a_push_is_refused_in_words_a_person_understands() {
    let (hub, agent) = mirror_of(&Image::small(1));
    let digest = Blob::new(1, 10).digest;
    for (method, target) in [
        ("POST", "/v2/library/app/blobs/uploads/".to_owned()),
        (
            "POST",
            format!("/v2/library/app/blobs/uploads/?mount={digest}&from=library/b"),
        ),
        ("PATCH", "/v2/library/app/blobs/uploads/1".to_owned()),
        (
            "PUT",
            format!("/v2/library/app/blobs/uploads/1?digest={digest}"),
        ),
        ("DELETE", format!("/v2/library/app/blobs/{digest}")),
        ("PUT", "/v2/library/app/manifests/latest".to_owned()),
        ("DELETE", "/v2/library/app/manifests/latest".to_owned()),
        ("POST", "/v2/library/app/tags/list".to_owned()),
        ("DELETE", "/v2/_catalog".to_owned()),
        ("POST", "/v2/".to_owned()),
    ] {
        let reply = agent
            .request(method, &target)
            .header("Content-Length", "0")
            .send();
        reply.assert_error(405, "UNSUPPORTED");
        // RFC 9110, section 15.5.6: a 405 names the methods that are allowed.
        let allowed = reply.header("allow").unwrap_or_default();
        assert!(
            target.contains("uploads") || allowed.contains("GET"),
            "{method} {target}"
        );
        let message = reply.json()["errors"][0]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            message.len() > 15,
            "{method} {target}: {message:?} explains nothing"
        );
    }
    assert_eq!(hub.total(), 0);
}

#[test]
fn what_is_no_name_tag_or_digest_never_reaches_the_upstream() {
    let (hub, agent) = mirror_of(&Image::small(1));
    let hex = "a".repeat(64);
    for (target, code) in [
        ("/v2/UPPER/manifests/latest".to_owned(), "NAME_INVALID"),
        (
            format!("/v2/{}/manifests/latest", "a".repeat(256)),
            "NAME_INVALID",
        ),
        ("/v2/a..b/tags/list".to_owned(), "NAME_INVALID"),
        ("/v2/-a/tags/list".to_owned(), "NAME_INVALID"),
        (
            "/v2/library/app/tags/list?n=-1".to_owned(),
            "PAGINATION_NUMBER_INVALID",
        ),
        (
            "/v2/_catalog?n=many".to_owned(),
            "PAGINATION_NUMBER_INVALID",
        ),
        ("/v2/_uploads/manifests/latest".to_owned(), "NAME_INVALID"),
        (format!("/v2/a/_layers/blobs/sha256:{hex}"), "NAME_INVALID"),
        (format!("/v2/UPPER/blobs/sha256:{hex}"), "NAME_INVALID"),
        (
            "/v2/library/app/manifests/sha256:abc".to_owned(),
            "DIGEST_INVALID",
        ),
        (
            format!("/v2/library/app/manifests/md5:{}", "a".repeat(32)),
            "DIGEST_INVALID",
        ),
        ("/v2/library/app/blobs/latest".to_owned(), "DIGEST_INVALID"),
        (
            format!("/v2/library/app/blobs/sha256:{}", hex.to_uppercase()),
            "DIGEST_INVALID",
        ),
    ] {
        let reply = agent.get(&target);
        reply.assert_error(400, code);
    }
    for target in [
        "/v2/library/app/manifests/.tag".to_owned(),
        format!("/v2/library/app/manifests/{}", "t".repeat(129)),
        "/v2/library/app/manifests/".to_owned(),
        "/v2/library/app/blobs/".to_owned(),
        "/v2/library/app/unknown/thing".to_owned(),
        "/v2/library/app".to_owned(),
        "/v2/manifests/latest".to_owned(),
        "/v1/library/app/manifests/latest".to_owned(),
        "/elsewhere".to_owned(),
    ] {
        let status = agent.get(&target).status;
        assert!(status == 400 || status == 404, "{target}: {status}");
    }
    assert_eq!(hub.total(), 0);
}

#[test]
fn no_path_leads_out_of_the_store() {
    let (hub, agent) = mirror_of(&Image::small(1));
    std::fs::create_dir_all(agent.folder().join("outside/_manifests/tags/x/current")).unwrap();
    let before = std::fs::read_dir(agent.folder()).unwrap().count();
    for target in [
        "/v2/../../../../outside/manifests/x",
        "/v2/a/../../../../../outside/manifests/x",
        "/v2/%2e%2e/%2e%2e/outside/manifests/x",
        "/v2/a%2f..%2f..%2foutside/manifests/x",
        "/v2/a/manifests/..%2f..%2fx",
        "/v2/a/manifests/../../x",
        "/v2/a/blobs/sha256:../../../../etc/passwd",
        "/v2//etc/manifests/x",
        "/v2/a%00b/manifests/x",
        "/v2/a/manifests/x?ns=../../outside",
        "/v2/a/manifests/x?ns=..%2f..%2foutside",
        "/v2/../config.yaml",
        "/../config.yaml",
    ] {
        let status = agent.get(target).status;
        assert!(status == 400 || status == 404, "{target}: {status}");
    }
    assert_eq!(hub.total(), 0);
    assert_eq!(std::fs::read_dir(agent.folder()).unwrap().count(), before);
}

#[test]
fn what_the_upstream_does_not_have_is_unknown() {
    let image = Image::small(1);
    let (hub, agent) = mirror_of(&image);
    let (absent, layer) = (Blob::new(9, 10).digest, &image.layer().digest);
    hub.push("library/secret", "latest", &image);
    hub.make_private("library/secret");
    for (target, codes) in [
        (
            "library/app/manifests/absent".to_owned(),
            ["MANIFEST_UNKNOWN"; 2],
        ),
        (
            format!("library/app/manifests/{absent}"),
            ["MANIFEST_UNKNOWN"; 2],
        ),
        (format!("library/app/blobs/{absent}"), ["BLOB_UNKNOWN"; 2]),
        (
            "library/absent/manifests/latest".to_owned(),
            ["MANIFEST_UNKNOWN", "NAME_UNKNOWN"],
        ),
        ("library/absent/tags/list".to_owned(), ["NAME_UNKNOWN"; 2]),
        (
            format!("library/absent/blobs/{absent}"),
            ["BLOB_UNKNOWN", "NAME_UNKNOWN"],
        ),
        // Private images look the same: the client then asks the registry with its own login.
        (
            "library/secret/manifests/latest".to_owned(),
            ["MANIFEST_UNKNOWN", "NAME_UNKNOWN"],
        ),
        ("library/secret/tags/list".to_owned(), ["NAME_UNKNOWN"; 2]),
        (
            format!("library/secret/blobs/{layer}"),
            ["BLOB_UNKNOWN", "NAME_UNKNOWN"],
        ),
    ] {
        let reply = agent.get(&format!("/v2/{target}"));
        let code = reply.error_code();
        assert_eq!(reply.status, 404, "{target}");
        assert!(codes.contains(&code.as_str()), "{target}: {code}");
        assert_eq!(reply.header("www-authenticate"), None, "{target}");
        let head = agent.head(&format!("/v2/{target}"));
        assert_eq!((head.status, head.body.len()), (404, 0), "{target}");
    }
    assert_nothing_stored(&agent);
}

#[test]
fn an_upstream_that_fails_or_limits_is_never_a_401_or_a_429_for_the_client() {
    let image = Image::small(1);
    let manifest = "/v2/library/app/manifests/latest".to_owned();
    let by_digest = format!("/v2/library/app/manifests/{}", image.digest());
    let blob = format!("/v2/library/app/blobs/{}", image.layer().digest);
    let tags = "/v2/library/app/tags/list".to_owned();
    let (hub, agent) = mirror_of(&image);
    for (fault, status) in [
        (401, 404),
        (403, 404),
        (404, 404),
        (429, 503),
        (500, 503),
        (502, 503),
        (503, 503),
    ] {
        hub.fault(ALWAYS, On::any("/v2/"), Fault::Status(fault));
        for target in [&manifest, &by_digest, &blob, &tags] {
            for method in ["GET", "HEAD"] {
                let reply = agent.request(method, target).send();
                assert_eq!(reply.status, status, "{fault}: {method} {target}");
                assert_eq!(reply.header("www-authenticate"), None);
                if method == "GET" {
                    let code = reply.error_code();
                    let expected = if status == 404 {
                        "UNKNOWN"
                    } else {
                        "UNAVAILABLE"
                    };
                    assert!(code.contains(expected), "{fault}: {target}: {code}");
                }
            }
        }
        assert_nothing_stored(&agent);
        hub.heal();
    }
    agent.pull("library/app", "latest", &image);
}

#[test]
fn an_upstream_out_of_reach_is_a_503_until_it_is_back() {
    let image = Image::small(1);
    let hub = Upstream::start();
    hub.push("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).set("timeouts.headers", SHORT).start();
    let blob = format!("/v2/library/app/blobs/{}", image.layer().digest);
    let all_unavailable = || {
        for target in [
            "/v2/library/app/manifests/latest",
            &blob,
            "/v2/library/app/tags/list",
        ] {
            agent.get(target).assert_error(503, "UNAVAILABLE");
        }
    };
    hub.switch_off();
    all_unavailable();
    hub.switch_on();
    hub.fault(ALWAYS, On::any("/v2/"), Fault::HangHeaders);
    all_unavailable();
    hub.heal();
    // What was waited for in vain is left alone for as long.
    eventually(PATIENCE, "the upstream is asked again", || {
        agent.head(&blob).status == 200
    });
    hub.revoke_tokens();
    hub.fault(ALWAYS, On::any("/token"), Fault::Status(500));
    all_unavailable();
    hub.heal();
    agent.pull("library/app", "latest", &image);
}

/// distribution-spec, "Pushing manifests": at least 4 MiB have to be taken.
#[test]
fn a_manifest_of_4_mib_is_served_and_a_larger_one_refused() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).start();
    let of_size = |size: usize| {
        let padded = |padding: &str| {
            Manifest::new(
                OCI_MANIFEST,
                &json!({"schemaVersion": 2, "padding": padding}),
            )
        };
        let frame = padded("").blob.bytes.len();
        padded(&"x".repeat(size - frame))
    };
    let (largest, larger) = (of_size(4 * MIB), of_size(4 * MIB + 1));
    hub.push_manifest("library/app", Some("largest"), &largest);
    hub.push_manifest("library/app", Some("larger"), &larger);
    for reference in ["largest", largest.digest()] {
        let reply = agent.get(&format!("/v2/library/app/manifests/{reference}"));
        assert_eq!((reply.status, reply.body.len()), (200, 4 * MIB));
    }
    for reference in ["larger", larger.digest()] {
        let target = format!("/v2/library/app/manifests/{reference}");
        assert_eq!(agent.head(&target).status, 413);
        agent.get(&target).assert_error(413, "MANIFEST_INVALID");
    }
}

#[test]
fn what_is_no_manifest_is_not_passed_on() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).start();
    let portal = Manifest {
        blob: Blob::of("<html>log in</html>"),
        media_type: "text/html".into(),
    };
    hub.push_manifest("library/app", Some("portal"), &portal);
    for reference in ["portal", portal.digest()] {
        let reply = agent.get(&format!("/v2/library/app/manifests/{reference}"));
        reply.assert_error(503, "UNAVAILABLE");
    }
    let image = Image::small(1);
    hub.push("library/app", "latest", &image);
    hub.fault(ALWAYS, On::get("/manifests/"), Fault::WrongByte(30));
    for reference in ["latest", image.digest()] {
        let reply = agent.get(&format!("/v2/library/app/manifests/{reference}"));
        reply.assert_error(503, "UNAVAILABLE");
    }
    assert_nothing_stored(&agent);
    hub.heal();
    agent.pull("library/app", "latest", &image);
}

/// RFC 9112, 3.2.
#[test]
fn a_request_that_does_not_name_one_host_is_400() {
    let hub = Upstream::start();
    let agent = Setup::mirror(&hub).start();
    for listener in [agent.registry(), agent.admin()] {
        let Client::Tcp(address) = listener else {
            panic!("a TCP listener")
        };
        for (head, status) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n", "HTTP/1.1 "),
            ("GET /v2/ HTTP/1.1\r\n", "HTTP/1.1 400 "),
            (
                "GET /v2/ HTTP/1.1\r\nHost: a\r\nHost: b\r\n",
                "HTTP/1.1 400 ",
            ),
            ("GET http://a/v2/ HTTP/1.1\r\n", "HTTP/1.1 400 "),
            // Older than the header.
            ("GET /healthz HTTP/1.0\r\n", "HTTP/1.0 "),
        ] {
            let mut socket = TcpStream::connect(address).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            let head = format!("{head}Connection: close\r\n\r\n");
            socket.write_all(head.as_bytes()).unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with(status), "{head:?}: {answer}");
            let refused = answer.contains(" 400 ");
            assert_eq!(refused, status.contains("400"), "{head:?}: {answer}");
        }
    }
}
