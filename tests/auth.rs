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
