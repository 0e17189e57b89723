//! Who may push and pull: users of an htpasswd file, and nobody else.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::fs;
use std::path::Path;
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::json;
use support::agent::{Agent, Setup};
use support::client::Reply;
use support::image::{Blob, Image};
use support::{PATIENCE, eventually, write_file};

const NAME: &str = "mycompany/app";

/// A line of `htpasswd -B`, at a cost that tests can pay.
fn line(user: &str, password: &str) -> String {
    format!("{user}:{}\n", bcrypt::hash(password, 6).unwrap())
}

fn setup(pull: &str) -> Setup {
    let setup = Setup::hosting();
    let file = setup.file("htpasswd", line("alice", "secret").as_bytes());
    setup
        .set("auth.htpasswd", file.to_str().unwrap())
        .set("auth.pull", pull)
}

fn uploads() -> String {
    format!("/v2/{NAME}/blobs/uploads/")
}

fn status(agent: &Agent, user: &str, password: &str) -> u16 {
    let post = agent.request("POST", &uploads()).user(user, password);
    post.body(b"").send().status
}

/// Pushes an image as alice.
fn push(agent: &Agent, image: &Image) {
    for blob in image.blobs() {
        let target = format!("{}?digest={}", uploads(), blob.digest);
        let post = agent.request("POST", &target).user("alice", "secret");
        assert_eq!(post.body(&blob.bytes).send().status, 201);
    }
    let put = agent.request("PUT", &format!("/v2/{NAME}/manifests/v1"));
    let put = put.user("alice", "secret").body(&image.manifest.blob.bytes);
    assert_eq!(put.send().status, 201);
}

#[test]
fn a_push_takes_the_right_password() {
    let (agent, image) = (setup("anonymous").start(), Image::small(1));
    let digest = Blob::new(1, 10).digest;
    for (method, target) in [
        ("POST", uploads()),
        ("POST", format!("{}?digest={digest}", uploads())),
        ("PUT", format!("/v2/{NAME}/manifests/v1")),
        ("DELETE", format!("/v2/{NAME}/manifests/v1")),
        ("DELETE", format!("/v2/{NAME}/blobs/{digest}")),
        (
            "GET",
            format!("{}00000000-0000-4000-8000-000000000000", uploads()),
        ),
    ] {
        let reply = agent.request(method, &target).body(b"").send();
        reply.assert_error(401, "UNAUTHORIZED");
        let challenge = reply.header("www-authenticate");
        assert_eq!(challenge, Some("Basic realm=\"registry-agent\""));
    }
    for (user, password) in [
        ("alice", "other"),
        ("alice", ""),
        ("bob", "secret"),
        ("", "secret"),
        ("", ""),
    ] {
        assert_eq!(status(&agent, user, password), 401, "{user} {password}");
    }
    for said in ["Basic", "Basic !", "Bearer x", "Basic YWxpY2U="] {
        let post = agent
            .request("POST", &uploads())
            .header("Authorization", said);
        assert_eq!(post.body(b"").send().status, 401, "{said}");
    }
    push(&agent, &image);
    agent.pull(NAME, "v1", &image);
    assert!(!agent.log().contains("secret"));
}

#[test]
fn a_pull_takes_a_password_where_that_is_said() {
    let (agent, image) = (setup("authenticated").start(), Image::small(1));
    push(&agent, &image);
    for target in [
        format!("/v2/{NAME}/manifests/v1"),
        format!("/v2/{NAME}/manifests/{}", image.digest()),
        format!("/v2/{NAME}/blobs/{}", image.layer().digest),
        format!("/v2/{NAME}/tags/list"),
        format!("/v2/{NAME}/referrers/{}", image.digest()),
        "/v2/_catalog".to_owned(),
    ] {
        // Also what is in memory.
        for _twice in 0..2 {
            agent.get(&target).assert_error(401, "UNAUTHORIZED");
            assert_eq!(agent.head(&target).status, 401);
            let wrong = agent.request("GET", &target).user("alice", "wrong").send();
            wrong.assert_error(401, "UNAUTHORIZED");
            let reply = agent.request("GET", &target).user("alice", "secret").send();
            assert_eq!(reply.status, 200, "{target}");
        }
    }
}

#[test]
fn the_base_asks_under_its_own_name_alone() {
    let agent = setup("anonymous")
        .set("auth.name", "Registry.Example.com")
        .start();
    assert_eq!(agent.get("/v2/").status, 200);
    let by = |host: &str, user: Option<(&str, &str)>| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect((agent_address(&agent), 5000)).unwrap();
        let authorization = user.map_or(String::new(), |(user, password)| {
            use base64::Engine as _;
            let both = format!("{user}:{password}");
            let both = base64::engine::general_purpose::STANDARD.encode(both);
            format!("Authorization: Basic {both}\r\n")
        });
        let head = format!(
            "GET /v2/ HTTP/1.1\r\nHost: {host}\r\n{authorization}Connection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    assert_eq!(by("registry.example.com:5000", None), 401);
    assert_eq!(by("registry.example.com", None), 401);
    assert_eq!(by("registry.example.com", Some(("alice", "secret"))), 200);
    assert_eq!(by("registry.example.com", Some(("alice", "wrong"))), 401);
    assert_eq!(by("mirror.test", None), 200);
    // `docker login` under any name is told whether the password is right.
    assert_eq!(by("mirror.test", Some(("alice", "wrong"))), 401);
    assert_eq!(by("mirror.test", Some(("alice", "secret"))), 200);
}

fn agent_address(agent: &Agent) -> std::net::IpAddr {
    let listen = agent.config()["listen"].as_str().unwrap();
    listen.parse::<std::net::SocketAddr>().unwrap().ip()
}

#[test]
fn the_file_is_read_again_when_it_changes() {
    let agent = setup("anonymous").start();
    let file = agent.folder().join("htpasswd");
    assert_eq!(status(&agent, "alice", "secret"), 202);
    assert_eq!(status(&agent, "bob", "hidden"), 401);
    replace(&file, &line("bob", "hidden"));
    eventually(PATIENCE, "bob is let in", || {
        status(&agent, "bob", "hidden") == 202
    });
    // Who was remembered is forgotten.
    assert_eq!(status(&agent, "alice", "secret"), 401);
    replace(&file, "carol:password\n");
    eventually(PATIENCE, "it is said", || {
        agent.log().contains("stay what they were")
    });
    assert_eq!(status(&agent, "bob", "hidden"), 202);
    assert!(!agent.log().contains("carol:password"));
    agent.signal(Signal::SIGHUP);
    eventually(PATIENCE, "it is refused", || {
        agent.log().contains("is broken")
    });
    assert_eq!(status(&agent, "bob", "hidden"), 202);
}

fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    write_file(&new, text.as_bytes());
    fs::rename(new, file).unwrap();
}

#[test]
fn a_broken_file_is_an_error_at_the_start() {
    let setup = Setup::hosting();
    let file = setup.file("htpasswd", b"alice:secret\n");
    let exit = setup.set("auth.htpasswd", file.to_str().unwrap()).run();
    assert_eq!(exit.status.code(), Some(2));
    assert!(exit.log.contains("auth.htpasswd"), "{}", exit.log);
    assert!(exit.log.contains("line 1"), "{}", exit.log);
    assert!(!exit.log.contains("alice:secret"), "{}", exit.log);
}

#[test]
fn a_password_is_computed_once() {
    let setup = Setup::hosting();
    let hash = bcrypt::hash("secret", 11).unwrap();
    let file = setup.file("htpasswd", format!("alice:{hash}\n").as_bytes());
    let agent = setup.set("auth.htpasswd", file.to_str().unwrap()).start();
    let began = Instant::now();
    assert_eq!(status(&agent, "alice", "secret"), 202);
    let first = began.elapsed();
    let began = Instant::now();
    for _ in 0..20 {
        assert_eq!(status(&agent, "alice", "secret"), 202);
    }
    assert!(
        began.elapsed() < first * 10,
        "{:?} after {first:?}",
        began.elapsed()
    );
}

#[test]
fn passwords_that_wait_do_not_keep_others_from_being_served() {
    let setup = Setup::hosting();
    let hash = bcrypt::hash("secret", 11).unwrap();
    let file = setup.file("htpasswd", format!("alice:{hash}\n").as_bytes());
    let agent = setup.set("auth.htpasswd", file.to_str().unwrap()).start();
    let waiting: Vec<_> = (0..200)
        .map(|number| {
            let post = agent
                .request("POST", &uploads())
                .user("alice", &format!("{number}"));
            post.body(b"").begin().unwrap()
        })
        .collect();
    assert_eq!(agent.get("/v2/").status, 200);
    let refused = waiting.into_iter().rev().find_map(|sent| {
        let reply = sent.response().ok()?.finish();
        (reply.status == 503).then_some(reply)
    });
    refused.expect("a refusal").assert_error(503, "UNAVAILABLE");
}

#[test]
fn without_auth_only_loopback_is_listened_on() {
    let mut agent = Setup::hosting().start();
    let file = agent.config_file();
    // Of the configuration alone: nothing listens there.
    agent.rewrite("listen", ":5000");
    for (auth, code, said) in [
        (
            json!(null),
            2,
            "everybody who can reach `listen` could push",
        ),
        (json!("none"), 0, ""),
        (json!({"pull": "anonymous"}), 2, "auth: holds no htpasswd"),
        (json!("users"), 2, "auth"),
    ] {
        agent.rewrite("auth", auth.clone());
        let check = agent.command(&["check", "--config", file.to_str().unwrap()]);
        let text = String::from_utf8_lossy(&check.stderr).into_owned();
        assert_eq!(check.status.code(), Some(code), "{auth}: {text}");
        assert!(text.contains(said), "{auth}: {text}");
    }
}

/// The name by which the tests' client asks.
const HERE: &str = "mirror.test";
const REPOSITORY: &str = "repository:mycompany/app";

fn with_tokens(pull: &str) -> Setup {
    setup(pull).set("auth.name", "Mirror.Test")
}

fn ask_for_token(agent: &Agent, scope: &str, user: Option<(&str, &str)>) -> Reply {
    let target = format!("/v2/_token?service={HERE}&scope={scope}&client_id=docker");
    let get = agent.request("GET", &target);
    match user {
        Some((user, password)) => get.user(user, password).send(),
        None => get.send(),
    }
}

/// A token for so much of what is asked for.
fn token(agent: &Agent, scope: &str, user: Option<(&str, &str)>, granted: &str) -> String {
    let reply = ask_for_token(agent, scope, user);
    assert_eq!(reply.status, 200, "{scope}");
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    let answer = reply.json();
    assert_eq!(answer["scope"], granted, "{scope}");
    assert_eq!(answer["token"], answer["access_token"]);
    assert_eq!(answer["expires_in"], 300);
    // By a clock of ours that the client's may differ from.
    assert_eq!(answer["issued_at"], json!(null));
    answer["token"].as_str().unwrap().to_owned()
}

fn by_token(agent: &Agent, method: &str, target: &str, token: &str) -> Reply {
    let request = agent.request(method, target);
    let request = request.header("Authorization", &format!("Bearer {token}"));
    if matches!(method, "GET" | "HEAD") {
        request.send()
    } else {
        request.body(b"").send()
    }
}

/// That a request was refused, and how its client can have a token that will do.
#[track_caller]
fn assert_challenged(reply: &Reply, scope: &str, error: Option<&str>) {
    reply.assert_error(401, "UNAUTHORIZED");
    let expected = format!("Bearer realm=\"http://{HERE}/v2/_token\",service=\"{HERE}\"");
    let scope = match scope {
        "" => String::new(),
        scope => format!(",scope=\"{scope}\""),
    };
    let text = reply.json()["errors"][0]["message"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(text.contains(&format!("docker login {HERE}")), "{text}");
    let error = error.map_or(String::new(), |error| {
        format!(",error=\"{error}\",error_description=\"{text}\"")
    });
    let expected = expected + &scope + &error;
    assert_eq!(reply.header("www-authenticate"), Some(expected.as_str()));
}

#[test]
fn by_tokens_anybody_pulls_and_who_has_a_password_pushes() {
    let (agent, image) = (with_tokens("anonymous").start(), Image::small(1));
    assert_challenged(&agent.get("/v2/"), "", None);
    push(&agent, &image);
    let both = format!("{REPOSITORY}:pull,push");

    let nobodys = token(&agent, &both, None, &format!("{REPOSITORY}:pull"));
    assert_eq!(by_token(&agent, "GET", "/v2/", &nobodys).status, 200);
    let manifest = format!("/v2/{NAME}/manifests/v1");
    assert_eq!(by_token(&agent, "GET", &manifest, &nobodys).status, 200);
    let post = by_token(&agent, "POST", &uploads(), &nobodys);
    let push_scope = format!("{REPOSITORY}:push");
    assert_challenged(&post, &push_scope, Some("insufficient_scope"));
    agent.pull(NAME, "v1", &image);

    let alice = Some(("alice", "secret"));
    let alices = token(&agent, &both, alice, &both);
    assert_eq!(by_token(&agent, "POST", &uploads(), &alices).status, 202);
    let other = "/v2/mycompany/other/blobs/uploads/";
    assert_challenged(
        &by_token(&agent, "POST", other, &alices),
        "repository:mycompany/other:push",
        Some("insufficient_scope"),
    );
    let delete = by_token(&agent, "DELETE", &manifest, &alices);
    let scope = format!("{REPOSITORY}:delete");
    assert_challenged(&delete, &scope, Some("insufficient_scope"));
    let all = format!("{REPOSITORY}:pull,push,delete");
    let whole = token(&agent, &format!("{REPOSITORY}:*"), alice, &all);
    let delete = by_token(&agent, "DELETE", &manifest, &whole);
    delete.assert_error(405, "UNSUPPORTED");

    // What docker does for `docker login`.
    let login = token(&agent, "", alice, "");
    assert_eq!(by_token(&agent, "GET", "/v2/", &login).status, 200);
    let log = agent.log();
    for secret in ["secret", &nobodys, &alices, &whole, &login] {
        assert!(!log.contains(secret));
    }
}

#[test]
fn a_token_is_given_for_the_right_password_alone() {
    let agent = with_tokens("anonymous").start();
    let wrong = [("alice", "other"), ("bob", "secret"), ("alice", "")];
    for user in wrong {
        let reply = ask_for_token(&agent, &format!("{REPOSITORY}:push"), Some(user));
        reply.assert_error(401, "UNAUTHORIZED");
    }
    let form = |form: &str| {
        let post = agent.request("POST", "/v2/_token");
        let post = post.header("Content-Type", "application/x-www-form-urlencoded");
        post.body(form.as_bytes()).send()
    };
    let scope = format!("service={HERE}&client_id=containerd&scope={REPOSITORY}%3Apull%2Cpush");
    let right = format!("grant_type=password&{scope}&username=alice&password=secret");
    let reply = form(&right);
    assert_eq!(reply.status, 200);
    let token = reply.json()["access_token"].as_str().unwrap().to_owned();
    assert_eq!(by_token(&agent, "POST", &uploads(), &token).status, 202);
    for (text, status) in [
        (right.replace("secret", "other"), 401),
        (right.replace("alice", "bob"), 401),
        (
            format!("grant_type=refresh_token&{scope}&refresh_token=x"),
            401,
        ),
        (
            format!("grant_type=other&{scope}&username=alice&password=secret"),
            400,
        ),
        (format!("grant_type=password&{scope}"), 400),
        ("x".repeat(20_000), 400),
        (
            format!(
                "{right}&scope={}",
                "repository:mycompany/a:pull+".repeat(40)
            ),
            400,
        ),
    ] {
        assert_eq!(form(&text).status, status, "{text}");
    }
    for said in ["Basic", "Basic !", "Bearer x", "Negotiate y"] {
        let get = agent
            .request("GET", "/v2/_token")
            .header("Authorization", said);
        assert_eq!(get.send().status, 401, "{said}");
    }
    agent
        .request("DELETE", "/v2/_token")
        .send()
        .assert_error(405, "UNSUPPORTED");
}

#[test]
fn a_token_of_before_a_restart_is_asked_for_anew() {
    let mut agent = with_tokens("authenticated").start();
    let scope = format!("{REPOSITORY}:push");
    let alice = Some(("alice", "secret"));
    let old = token(&agent, &scope, alice, &scope);
    assert_eq!(by_token(&agent, "POST", &uploads(), &old).status, 202);
    agent.kill();
    agent.start_again();
    agent.wait_until_ready();
    // With all that a client needs to go on by itself: no token is kept on a disk.
    let refused = by_token(&agent, "POST", &uploads(), &old);
    assert_challenged(&refused, &scope, Some("invalid_token"));
    let new = token(&agent, &scope, alice, &scope);
    assert_eq!(by_token(&agent, "POST", &uploads(), &new).status, 202);
}

#[test]
fn a_token_ends_with_its_users_line() {
    let agent = with_tokens("anonymous").start();
    let file = agent.folder().join("htpasswd");
    let scope = format!("{REPOSITORY}:push");
    let of_alice = token(&agent, &scope, Some(("alice", "secret")), &scope);
    assert_eq!(by_token(&agent, "POST", &uploads(), &of_alice).status, 202);
    replace(&file, &(line("alice", "new") + &line("bob", "hidden")));
    eventually(PATIENCE, "bob is let in", || {
        status(&agent, "bob", "hidden") == 202
    });
    let post = by_token(&agent, "POST", &uploads(), &of_alice);
    assert_challenged(&post, &scope, Some("invalid_token"));
    let of_bob = token(&agent, &scope, Some(("bob", "hidden")), &scope);
    replace(
        &file,
        &(line("carol", "x") + &fs::read_to_string(&file).unwrap()),
    );
    eventually(PATIENCE, "carol is let in", || {
        status(&agent, "carol", "x") == 202
    });
    // Somebody else's line is nothing to bob, whose push may be under way.
    assert_eq!(by_token(&agent, "POST", &uploads(), &of_bob).status, 202);
}

#[test]
fn a_pull_takes_a_token_where_a_password_is_said() {
    let (agent, image) = (with_tokens("authenticated").start(), Image::small(1));
    push(&agent, &image);
    let (pull, alice) = (format!("{REPOSITORY}:pull"), Some(("alice", "secret")));
    let nobodys = token(&agent, &pull, None, "");
    let alices = token(&agent, &pull, alice, &pull);
    let of_other = "repository:mycompany/other:pull";
    let of_other = token(&agent, of_other, alice, of_other);
    for target in [
        format!("/v2/{NAME}/manifests/v1"),
        format!("/v2/{NAME}/blobs/{}", image.layer().digest),
        format!("/v2/{NAME}/tags/list"),
    ] {
        // Also what is in memory.
        for _twice in 0..2 {
            assert_challenged(&agent.get(&target), &pull, None);
            for few in [&nobodys, &of_other] {
                let reply = by_token(&agent, "GET", &target, few);
                assert_challenged(&reply, &pull, Some("insufficient_scope"));
            }
            assert_eq!(by_token(&agent, "GET", &target, &alices).status, 200);
        }
    }
    let catalog = "registry:catalog:*";
    assert_challenged(&agent.get("/v2/_catalog"), catalog, None);
    let reader = token(&agent, catalog, alice, catalog);
    assert_eq!(by_token(&agent, "GET", "/v2/_catalog", &reader).status, 200);

    // To take a blob from a repository is to read it.
    let digest = &image.layer().digest;
    let mount = format!("/v2/mycompany/other/blobs/uploads/?mount={digest}&from={NAME}");
    let to = "repository:mycompany/other:push";
    let pushes = token(&agent, to, alice, to);
    let needed = format!("{to} {pull}");
    let refused = by_token(&agent, "POST", &mount, &pushes);
    assert_challenged(&refused, &needed, Some("insufficient_scope"));
    let both = token(&agent, &needed.replace(' ', "&scope="), alice, &needed);
    assert_eq!(by_token(&agent, "POST", &mount, &both).status, 201);
}

#[test]
fn a_mirror_never_asks_for_what_docker_hub_is_to_be_given() {
    let hubs = ("someone", "their Docker Hub password");
    let names = [
        "/v2/library/busybox/manifests/latest",
        "/v2/a/b/tags/list?ns=docker.io",
    ];
    // Under the name that people push to: what is mirrored is asked for by nobody.
    let agent = with_tokens("authenticated").start();
    for target in names {
        for user in [None, Some(hubs)] {
            let get = agent.request("GET", target);
            let reply = match user {
                Some((user, password)) => get.user(user, password).send(),
                None => get.send(),
            };
            assert_ne!(reply.status, 401, "{target}");
            assert_eq!(reply.header("www-authenticate"), None, "{target}");
        }
    }
    // By any other name of the host, nor is there anything that asks, or takes one.
    let agent = setup("anonymous")
        .set("auth.name", "registry.example.com")
        .start();
    for target in names
        .iter()
        .chain(&["/v2/", "/v2/_token", "/v2/_token?scope=a"])
    {
        let reply = agent.get(target);
        assert_ne!(reply.status, 401, "{target}");
        assert_eq!(reply.header("www-authenticate"), None, "{target}");
    }
    let token = agent
        .request("GET", "/v2/_token")
        .user(hubs.0, hubs.1)
        .send();
    token.assert_error(404, "NAME_UNKNOWN");
    let form = agent
        .request("POST", "/v2/_token")
        .body(b"grant_type=password");
    form.send().assert_error(404, "NAME_UNKNOWN");
    let post = agent.request("POST", &uploads()).body(b"").send();
    assert_eq!(
        post.header("www-authenticate"),
        Some("Basic realm=\"registry-agent\"")
    );
    // To this host's own docker the mirror is not told by that name.
    let mut agent = agent;
    agent.rewrite("host.mirror", "https://registry.example.com");
    let file = agent.config_file();
    let check = agent.command(&["check", "--config", file.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&check.stderr).into_owned();
    assert_eq!(check.status.code(), Some(2), "{text}");
    assert!(text.contains("auth.name"), "{text}");
}

#[test]
fn behind_a_proxy_that_ends_tls_passwords_are_asked_for_by_https() {
    let agent = with_tokens("anonymous").start();
    let get = agent
        .request("GET", "/v2/")
        .header("X-Forwarded-Proto", "https");
    let reply = get.send();
    let expected = format!("Bearer realm=\"https://{HERE}/v2/_token\",service=\"{HERE}\"");
    assert_eq!(reply.header("www-authenticate"), Some(expected.as_str()));
}
