//! Pushes by Debian's own clients to an agent that hosts names, and pulls by those without a login.

use std::thread;

use serde_json::Value;

use crate::harness::agent::MIRROR;
use crate::harness::authority::Authority;
use crate::harness::command::Finished;
use crate::harness::{Agent, Docker, Host, Hub, Image, Network};

const NAME: &str = "registry.example.com";
const USER: &str = "alice";
const PASSWORD: &str = "correct horse";

/// The usual setting: anybody pulls, and who has a password pushes.
fn install(host: &Host, tls: &str) {
    let hash = bcrypt::hash(PASSWORD, 6).expect("a hash");
    host.write("/etc/registry-agent/htpasswd", &format!("{USER}:{hash}\n"));
    let hosting = format!(
        "hosted: [ \"mycompany/*\" ]\n\
         auth: {{ htpasswd: htpasswd, pull: anonymous, name: {NAME} }}\n{tls}"
    );
    Agent::install(host, &(MIRROR.to_owned() + &hosting));
}

fn image(repository: &str) -> String {
    format!("{NAME}:5000/mycompany/{repository}:1")
}

/// What the registry itself says that a tag is.
fn digest(host: &Host, repository: &str) -> String {
    let target = format!("https://{NAME}:5000/v2/mycompany/{repository}/manifests/1");
    let head = host.run(&["curl", "-sS", "--fail", "--head", &target]);
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    let mut digests = lines.filter(|(key, _)| key.eq_ignore_ascii_case("docker-content-digest"));
    digests.next().expect("a digest").1.trim().to_owned()
}

/// A command that is refused, and says why.
#[track_caller]
fn assert_refused(finished: &Finished, words: &[&str]) {
    assert!(!finished.succeeded(), "{finished}");
    let said = finished.to_string();
    for word in words {
        assert!(said.contains(word), "{word} in {said}");
    }
}

/// docker's way in, for all that have one like it.
fn log_in(host: &Host, tool: &str) {
    let registry = format!("{NAME}:5000");
    let login = [
        tool,
        "login",
        "--username",
        USER,
        "--password",
        PASSWORD,
        &registry,
    ];
    host.run(&login);
}

/// Pulls without a login, by every client there is, and finds what was pushed.
fn pulls_by_all(host: &Host, repository: &str, image_of: &Image, pushed: &str) {
    let (docker, reference) = (Docker::on(host), image(repository));
    docker.pull(&reference);
    assert_eq!(docker.output_of(&reference), image_of.output);
    let format = "{{index .RepoDigests 0}}";
    let of = host.run(&["docker", "image", "inspect", "--format", format, &reference]);
    assert!(of.trim().ends_with(&format!("@{pushed}")), "{of}: {pushed}");
    docker.remove(&reference);
    host.run(&["podman", "pull", "--quiet", &reference]);
    host.run(&["podman", "rmi", &reference]);
    let inspected = host.run(&["skopeo", "inspect", &format!("docker://{reference}")]);
    let inspected: Value = serde_json::from_str(&inspected).expect("JSON");
    assert_eq!(inspected["Digest"], pushed);
    host.run(&["ctr", "images", "pull", &reference]);
    let listed = host.run(&["ctr", "images", "ls", &format!("name=={reference}")]);
    assert!(listed.contains(pushed), "{listed}: {pushed}");
}

#[test]
fn every_client_pushes_with_a_password_and_pulls_without() {
    let network = Network::new();
    let (hub, authority) = (Hub::start(&network), Authority::new("Our own"));
    let (image_of, whole) = (Image::new("pushed"), Image::many_layers("pushed whole"));
    hub.publish("library/layers", "1", &image_of);
    hub.publish("library/whole", "1", &whole);
    let mut writer = Host::new(&network, "writer", 11);
    let mut builder = Host::new(&network, "builder", 12);
    let mut reader = Host::new(&network, "reader", 13);
    hub.introduce_to(&writer);
    hub.introduce_to(&builder);
    let (certificate, key) = authority.issue_pem(&[NAME]);
    writer.write("/etc/registry-agent/tls.crt", &certificate);
    writer.write("/etc/registry-agent/tls.key", &key);
    install(&writer, "tls: { certificate: tls.crt, key: tls.key }\n");
    for host in [&builder, &reader] {
        host.add_names(writer.address(), &[NAME]);
        host.trust("our-own", &authority);
    }
    thread::scope(|scope| {
        for host in [&mut writer, &mut builder, &mut reader] {
            scope.spawn(|| host.boot());
        }
    });
    wait_until_ready(&builder);

    // docker: layers that are here are not sent again, nor those of another repository.
    let docker = Docker::on(&builder);
    docker.pull("whole:1");
    let without = |repository: &str| {
        builder.run(&["docker", "tag", "whole:1", &image(repository)]);
        builder.try_run(&["docker", "push", &image(repository)])
    };
    assert_refused(
        &without("docker"),
        &["docker login registry.example.com:5000"],
    );
    let login = ["docker", "login", "--username", USER, "--password", "wrong"];
    let registry = format!("{NAME}:5000");
    let login = builder.try_run(&[&login[..], &[&registry]].concat());
    assert_refused(&login, &["no user of this registry has this password"]);
    log_in(&builder, "docker");
    let pushed = without("docker").expect_success();
    assert!(pushed.contains(&digest(&builder, "docker")), "{pushed}");
    let layers = whole.downloads().len() - 1;
    let again = without("docker").expect_success();
    assert_eq!(
        again.matches("Layer already exists").count(),
        layers,
        "{again}"
    );
    let mounted = without("mounted").expect_success();
    assert_eq!(
        mounted.matches("Mounted from mycompany/docker").count(),
        layers,
        "{mounted}"
    );
    // Not hosted, and said so.
    let elsewhere = format!("{NAME}:5000/elsewhere/app:1");
    builder.run(&["docker", "tag", "whole:1", &elsewhere]);
    let push = builder.try_run(&["docker", "push", &elsewhere]);
    assert_refused(&push, &["pushes are taken for", "mycompany/*"]);

    // podman would use docker's login.
    builder.run(&["docker", "logout", &registry]);

    // The others, each by its own way to say who it is.
    let hubs = "docker.io/library/layers:1";
    let to = |tool: &str| format!("docker://{}", image(tool));
    builder.run(&["podman", "pull", "--quiet", hubs]);
    let push = ["podman", "push", hubs, &to("podman")];
    assert_refused(
        &builder.try_run(&push),
        &["docker login registry.example.com:5000"],
    );
    log_in(&builder, "podman");
    builder.run(&push);
    builder.run(&["podman", "logout", "--all"]);
    let credentials = format!("{USER}:{PASSWORD}");
    let from = format!("docker://{hubs}");
    let skopeo = [
        "skopeo",
        "copy",
        "--all",
        "--preserve-digests",
        "--dest-creds",
        &credentials,
        &from,
        &to("skopeo"),
    ];
    builder.run(&skopeo);
    let buildah = [
        "buildah",
        "push",
        "--creds",
        &credentials,
        hubs,
        &to("buildah"),
    ];
    builder.run(&buildah);
    builder.run(&["ctr", "images", "pull", hubs]);
    let theirs = image("ctr");
    builder.run(&["ctr", "images", "tag", hubs, &theirs]);
    let push = ["ctr", "images", "push", "--user", &credentials, &theirs];
    builder.run(&push);
    let another = image("another");
    builder.run(&["ctr", "images", "tag", hubs, &another]);
    let push = builder.try_run(&["ctr", "images", "push", &another]);
    assert_refused(&push, &["insufficient_scope: authorization failed"]);

    // On a host that has never heard of alice.
    assert_eq!(digest(&reader, "skopeo"), image_of.tagged().digest);
    assert_eq!(digest(&reader, "ctr"), image_of.tagged().digest);
    pulls_by_all(&reader, "docker", &whole, &digest(&reader, "docker"));
    for tool in ["podman", "skopeo", "buildah", "ctr"] {
        pulls_by_all(&reader, tool, &image_of, &digest(&reader, tool));
    }
}

fn wait_until_ready(host: &Host) {
    let ready = format!("https://{NAME}:5000/");
    crate::harness::poll::until("it serves", std::time::Duration::from_secs(30), || {
        let answer = host.try_run(&["curl", "-sS", "--fail-with-body", "--max-time", "5", &ready]);
        if answer.succeeded() {
            Ok(())
        } else {
            Err(answer)
        }
    });
}

#[test]
fn dockers_hub_password_is_never_asked_for_by_the_mirror_that_takes_pushes() {
    let network = Network::new();
    let hub = Hub::start(&network);
    let pulled = Image::new("pulled with a login to the Hub");
    hub.publish("library/layers", "1", &pulled);
    hub.add_user("bob", "at the Hub");
    let mut host = Host::new(&network, "one", 11);
    hub.introduce_to(&host);
    host.add_names("127.0.0.1".parse().expect("an address"), &[NAME]);
    install(&host, "");
    Docker::on(&host).use_mirror(crate::harness::agent::LOCAL);
    host.boot();
    Agent::on(&host).wait_until_ready();
    let docker = Docker::on(&host);
    docker.log_in("bob", "at the Hub");
    docker.pull("layers:1");
    Agent::on(&host).assert_stores(pulled.contents());
    // By its own name, on the host itself, docker speaks plain http to it.
    log_in(&host, "docker");
    host.run(&["docker", "tag", "layers:1", &image("local")]);
    host.run(&["docker", "push", &image("local")]);
    let log = host.run(&[
        "journalctl",
        "--unit=registry-agent",
        "--output=cat",
        "--no-pager",
    ]);
    let asked: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("/v2/_token"))
        .collect();
    assert!(!asked.is_empty(), "docker has asked for no token: {log}");
    assert!(
        asked.iter().all(|line| !line.contains("account=bob")),
        "{asked:#?}"
    );
    for secret in [PASSWORD, "at the Hub"] {
        assert!(!log.contains(secret));
    }
}
