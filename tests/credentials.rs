//! What the agent proves its identity with: who gets to see it, and who never does.

mod support;

use support::agent::{Agent, SHORT, Setup};
use support::image::Image;
use support::upstream::{ALWAYS, Authority, Fault, On, Options, Role, Upstream};
use support::{PATIENCE, eventually};

const USER: &str = "robot";
const PASSWORD: &str = "hunter2-is-long-enough";
/// `printf robot:hunter2-is-long-enough | base64`
const BASIC: &str = "Basic cm9ib3Q6aHVudGVyMi1pcy1sb25nLWVub3VnaA==";

fn hub_with(image: &Image, options: Options) -> Upstream {
    let hub = options.account(USER, PASSWORD).start();
    hub.push("library/app", "latest", image);
    hub
}

/// Nothing that the agent says to anybody but the upstream holds a secret.
#[track_caller]
fn assert_nothing_leaked(agent: &Agent) {
    let told = ["/status", "/metrics"].map(|target| agent.admin().get(target).body);
    let told = told.map(|body| String::from_utf8_lossy(&body).into_owned());
    let log = agent.log();
    assert!(
        log.contains("library/app"),
        "a log that says nothing proves nothing: {log}"
    );
    for (place, text) in [
        ("the log", &log),
        ("/status", &told[0]),
        ("/metrics", &told[1]),
    ] {
        // The password, Basic's form of it, tokens, and the signature in the CDN's addresses.
        for secret in [PASSWORD, &BASIC["Basic ".len()..], "-of-the-test"] {
            assert!(!text.contains(secret), "{secret} is in {place}: {text}");
        }
    }
}

#[test]
fn credentials_go_to_the_upstreams_token_server_and_nowhere_else() {
    let image = Image::small(1);
    let hub = hub_with(&image, Upstream::options().cdn());
    let agent = Setup::mirror(&hub)
        .credentials(USER, PASSWORD)
        // Else it looks as nobody, too, whether everybody may see what it fetches.
        .share_private()
        .start();
    agent.pull("library/app", "latest", &image);
    for exchange in hub.exchanges() {
        let authorization = exchange.header("authorization").unwrap_or_default();
        match exchange.path.as_str() {
            "/token" => assert_eq!(authorization, BASIC),
            path if exchange.role == Role::Cdn => assert_eq!(authorization, "", "{path}"),
            path => assert!(!authorization.contains("Basic"), "{path}"),
        }
    }
    assert!(
        hub.exchanges()
            .iter()
            .any(|exchange| exchange.role == Role::Cdn)
    );
    assert_nothing_leaked(&agent);
}

#[test]
fn a_token_server_elsewhere_never_gets_the_credentials() {
    let image = Image::small(1);
    let hub = hub_with(&image, Upstream::options().foreign_realm());
    let realm = hub.realm();
    // Who comes without credentials has none to lose.
    Setup::mirror(&hub)
        .start()
        .pull("library/app", "latest", &image);
    let agent = Setup::mirror(&hub).credentials(USER, PASSWORD).start();
    let reply = agent.get("/v2/library/app/manifests/latest");
    reply.assert_error(503, "UNAVAILABLE");
    let said = reply.json()["errors"][0]["message"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        said.contains(&realm) && said.contains("credentials"),
        "{said}"
    );
    let asked = hub.asked("GET", "/token");
    assert!(!asked.is_empty() && asked.iter().all(|asked| asked.role == Role::Cdn));
    assert!(
        asked
            .iter()
            .all(|asked| asked.header("authorization").is_none())
    );
}

#[test]
fn nothing_secret_is_said_when_the_upstream_fails() {
    let image = Image::small(1);
    let hub = hub_with(&image, Upstream::options().cdn());
    let setup = Setup::mirror(&hub).credentials(USER, PASSWORD);
    let agent = setup
        .set("timeouts.headers", SHORT)
        .set("timeouts.idle", SHORT)
        .start();
    let blob = format!("/v2/library/app/blobs/{}", image.layer().digest);
    for (part, fault) in [
        ("/token", Fault::Status(401)),
        ("/token", Fault::Status(500)),
        ("/token", Fault::HangHeaders),
        ("/v2/", Fault::Status(401)),
        ("/v2/", Fault::Status(500)),
        ("/cdn/", Fault::Status(403)),
        ("/cdn/", Fault::Status(500)),
        ("/cdn/", Fault::HangHeaders),
        ("/cdn/", Fault::WrongByte(0)),
        ("/cdn/", Fault::Cut(0)),
    ] {
        hub.fault(ALWAYS, On::any(part), fault);
        hub.revoke_tokens();
        for target in ["/v2/library/app/manifests/latest", &blob] {
            let said = String::from_utf8(agent.get(target).body).unwrap();
            assert!(
                !said.contains(PASSWORD) && !said.contains("-of-the-test"),
                "{said}"
            );
        }
        hub.heal();
    }
    hub.switch_off();
    agent.get(&blob);
    assert_nothing_leaked(&agent);
}

#[test]
fn a_wrong_password_is_the_operators_business_and_not_the_clients() {
    let image = Image::small(1);
    let hub = hub_with(&image, Upstream::options());
    let agent = Setup::mirror(&hub).credentials(USER, "wrong").start();
    let reply = agent.get("/v2/library/app/manifests/latest");
    assert!(matches!(reply.status, 404 | 503), "{}", reply.status);
    assert_eq!(reply.header("www-authenticate"), None);
    eventually(PATIENCE, "it says whose password", || {
        let log = agent.log();
        log.contains("docker.io") && log.contains("401")
    });
}

#[test]
fn a_token_serves_until_it_is_refused_and_is_then_replaced_once() {
    let (hub, images) = (
        Upstream::start(),
        [Image::small(1), Image::small(2), Image::small(3)],
    );
    let agent = Setup::mirror(&hub).start();
    for (image, tokens) in images.iter().zip([1, 1, 2]) {
        hub.push(
            "library/app",
            image.digest().trim_start_matches("sha256:"),
            image,
        );
        if tokens == 2 {
            hub.revoke_tokens();
        }
        agent.pull("library/app", image.digest(), image);
        assert_eq!(hub.count("GET", "/token"), tokens);
    }
    // One that is never good enough is not asked for over and over.
    hub.fault(ALWAYS, On::any("/v2/"), Fault::Status(401));
    let before = hub.total();
    assert_eq!(agent.get("/v2/library/app/manifests/other").status, 404);
    assert!(
        hub.total() - before <= 4,
        "{} requests",
        hub.total() - before
    );
}

#[test]
fn an_upstream_by_tls_is_trusted_by_its_authority_only() {
    let (image, authority) = (Image::small(1), Authority::new());
    let hub = hub_with(&image, Upstream::options().tls(&authority).cdn());
    let setup = Setup::mirror(&hub);
    let trusted = setup.folder().join("ca.pem");
    authority.write(&trusted);
    let agent = setup
        .environment("SSL_CERT_FILE", &trusted.display().to_string())
        .start();
    agent.pull("library/app", "latest", &image);

    let stranger = Setup::mirror(&hub);
    let other = stranger.folder().join("ca.pem");
    Authority::new().write(&other);
    let stranger = stranger
        .environment("SSL_CERT_FILE", &other.display().to_string())
        .start();
    let before = hub.total();
    stranger
        .get("/v2/library/app/manifests/latest")
        .assert_error(503, "UNAVAILABLE");
    assert_eq!(
        hub.total(),
        before,
        "nothing is said to somebody whom nobody vouches for"
    );
}

#[test]
fn a_token_server_that_is_nowhere_is_forgotten_when_the_upstream_names_another() {
    let image = Image::small(1);
    let hub = hub_with(&image, Upstream::options());
    let realm = hub.realm();
    let agent = Setup::mirror(&hub).start();
    let target = "/v2/library/app/manifests/latest";
    // Nobody listens there.
    hub.move_realm("http://127.0.0.1:1/token");
    agent.get(target).assert_error(503, "UNAVAILABLE");
    hub.move_realm(&realm);
    assert_eq!(agent.get(target).status, 200);
    // Also one that gave tokens until it moved.
    hub.revoke_tokens();
    hub.fault(ALWAYS, On::any("/token"), Fault::Status(500));
    agent
        .get("/v2/library/other/tags/list")
        .assert_error(503, "UNAVAILABLE");
    hub.heal();
    agent.pull("library/app", "latest", &image);
}

#[test]
fn all_who_wait_for_a_token_share_its_failure() {
    let image = Image::new(1, &[10; 6]);
    let hub = hub_with(&image, Upstream::options());
    let agent = Setup::mirror(&hub).set("timeouts.headers", "2s").start();
    hub.fault(ALWAYS, On::any("/token"), Fault::HangHeaders);
    std::thread::scope(|scope| {
        for layer in &image.layers {
            let target = format!("/v2/library/app/blobs/{}", layer.digest);
            let agent = &agent;
            scope.spawn(move || agent.get(&target).assert_error(503, "UNAVAILABLE"));
        }
    });
    // Each of them asking by itself would wait for all those before it.
    assert_eq!(hub.count("GET", "/token"), 1);
}

/// Asks for a tag until the token server has been asked so often, with answers that are each
/// confirmed by the upstream.
#[track_caller]
fn ask_until_tokens(hub: &Upstream, agent: &Agent, tokens: usize) {
    eventually(PATIENCE, "a token is asked for ahead of time", || {
        let reply = agent.get("/v2/library/app/manifests/latest");
        assert_eq!((reply.status, reply.header("warning")), (200, None));
        hub.count("GET", "/token") >= tokens
    });
}

#[test]
fn a_token_is_replaced_ahead_of_its_end_and_nobody_waits_for_that() {
    let image = Image::small(1);
    let hub = hub_with(&image, Upstream::options());
    hub.token_lifetime(10);
    let agent = Setup::mirror(&hub).set("freshness.window", "0s").start();
    agent.pull("library/app", "latest", &image);
    assert_eq!(hub.count("GET", "/token"), 1);
    let gate = hub.hold(On::get("/token"), 0);
    // Also the request that has the token replaced is answered: the gate is closed.
    ask_until_tokens(&hub, &agent, 2);
    gate.reached();
    assert_eq!(hub.count("GET", "/token"), 2, "one replaces it");
    gate.open();
    let first = |token: &str| token.contains("token-0-");
    eventually(PATIENCE, "the other token is used", || {
        assert_eq!(agent.get("/v2/library/app/manifests/latest").status, 200);
        let asked = hub.asked("HEAD", "/manifests/latest");
        let last = asked
            .last()
            .and_then(|asked| asked.header("authorization").map(str::to_owned));
        last.is_some_and(|token| !first(&token))
    });
}

#[test]
fn a_token_that_can_not_be_replaced_serves_until_it_ends() {
    std::thread::scope(|scope| {
        for fault in [Fault::Status(500), Fault::HangHeaders] {
            scope.spawn(move || {
                let image = Image::small(1);
                let hub = hub_with(&image, Upstream::options());
                hub.token_lifetime(10);
                let agent = Setup::mirror(&hub)
                    .set("freshness.window", "0s")
                    .set("timeouts.headers", SHORT)
                    .start();
                agent.pull("library/app", "latest", &image);
                hub.fault(ALWAYS, On::any("/token"), fault);
                ask_until_tokens(&hub, &agent, 2);
                eventually(PATIENCE, "the agent knows that it failed", || {
                    agent.log().contains("could not be replaced yet")
                });
                // It is asked for again, but not by each request.
                for _ in 0..20 {
                    let reply = agent.get("/v2/library/app/manifests/latest");
                    assert_eq!((reply.status, reply.header("warning")), (200, None));
                }
                let asked = hub.count("GET", "/token");
                assert!(asked <= 4, "{asked} requests for tokens");
                hub.heal();
                ask_until_tokens(&hub, &agent, asked + 1);
            });
        }
    });
}

#[test]
fn an_upstream_by_tls_sends_nobody_elsewhere_in_clear() {
    let (image, authority, victim) = (Image::small(1), Authority::new(), Upstream::start());
    let hub = hub_with(&image, Upstream::options().tls(&authority));
    hub.move_realm(&victim.realm());
    let setup = Setup::mirror(&hub);
    let trusted = setup.folder().join("ca.pem");
    authority.write(&trusted);
    let agent = setup
        .environment("SSL_CERT_FILE", &trusted.display().to_string())
        .start();
    agent
        .get("/v2/library/app/manifests/latest")
        .assert_error(503, "UNAVAILABLE");
    assert!(hub.total() > 0);
    assert_eq!(victim.total(), 0);
}
