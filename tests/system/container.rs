//! The container image, in place of registry:2: the same port, the same volumes and the same
//! config.yml, under a real dockerd.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::harness::agent::LOCAL;
use crate::harness::{Docker, Host, Hub, Image, Network, poll};

const PATIENCE: Duration = Duration::from_mins(1);
const SOURCE: &str = env!("CARGO_MANIFEST_DIR");
const CONTEXT: &str = "/opt/context";

/// The static binary that `packaging/build` makes, which tests/all does before these tests: an
/// image with nothing else in it can't run any other.
pub fn static_binary() -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_registry-agent"))
        .ancestors()
        .nth(2);
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let binary = target
        .expect("a target folder")
        .join(triple)
        .join("release/registry-agent");
    assert!(
        binary.exists(),
        "{} is not there: `packaging/build binary` builds it",
        binary.display()
    );
    binary
}

/// What a compose or stack file says of its one service, as arguments of `docker run`.
fn run_arguments(file: &str, folder: &str) -> Vec<String> {
    let text = fs::read_to_string(Path::new(SOURCE).join(file)).expect("a compose file");
    let read: Value = serde_yaml::from_str(&text).expect("it is YAML");
    let services = read["services"].as_object().expect("services");
    let (_, service) = services.iter().next().expect("a service");
    let list = |key: &str| {
        let values = service[key].as_array().cloned().unwrap_or_default();
        let values = values
            .into_iter()
            .map(|value| value.as_str().map(str::to_owned));
        values
            .collect::<Option<Vec<String>>>()
            .expect("a list of texts")
    };
    let mut arguments = Vec::new();
    if service["read_only"] == true {
        arguments.push("--read-only".to_owned());
    }
    for (key, flag) in [
        ("cap_drop", "--cap-drop"),
        ("security_opt", "--security-opt"),
        ("ports", "--publish"),
    ] {
        arguments.extend(list(key).into_iter().map(|value| format!("{flag}={value}")));
    }
    for volume in list("volumes") {
        let volume = volume
            .strip_prefix('.')
            .map_or(volume.clone(), |rest| format!("{folder}{rest}"));
        arguments.push(format!("--volume={volume}"));
    }
    arguments.push(service["image"].as_str().expect("an image").to_owned());
    arguments
}

/// A host with dockerd and the image, whose dockerd has it as its mirror.
fn host_with_image(network: &Network, hub: &Hub) -> Host {
    let mut host = Host::new(network, "one", 11);
    hub.introduce_to(&host);
    Docker::on(&host).use_mirror(LOCAL);
    for file in ["Dockerfile", "config.yml"] {
        let from = Path::new(SOURCE).join("container").join(file);
        host.copy(&from, &format!("{CONTEXT}/{file}"));
    }
    host.copy(&static_binary(), &format!("{CONTEXT}/registry-agent"));
    // With the authority of the tests' Hub.
    let authorities = host.read("/etc/ssl/certs/ca-certificates.crt");
    host.write(&format!("{CONTEXT}/ca-certificates.crt"), &authorities);
    host.boot();
    host.run(&["docker", "build", "--tag", "registry-agent", CONTEXT]);
    host
}

/// Runs it as the file says, pulls through it, and again when it is another container on the same
/// data and the Hub is off.
fn serves_as_the_file_says(file: &str, case: &str, folder: &str, config: &str, data: &str) {
    let network = Network::new();
    let mut hub = Hub::start(&network);
    let image = Image::new("pulled through a container");
    hub.publish("library/layers", "1", &image);
    let host = host_with_image(&network, &hub);
    // Theirs, as it is.
    let theirs = format!("{SOURCE}/tests/config/{case}/config.yml");
    host.write(
        config,
        &fs::read_to_string(theirs).expect("their config.yml"),
    );
    host.run(&["mkdir", "--parents", data]);
    let names = host.read("/etc/hosts");
    let names = names.lines().filter(|line| line.starts_with("198.18.0.2 "));
    let names = names.flat_map(|line| line.split(' ').skip(1));
    let names: Vec<String> = names
        .map(|name| format!("--add-host={name}:198.18.0.2"))
        .collect();
    let arguments = run_arguments(file, folder);
    let start = || {
        let mut run = vec!["docker", "run", "--detach", "--name=mirror"];
        run.extend(names.iter().map(String::as_str));
        run.extend(arguments.iter().map(String::as_str));
        host.run(&run);
        // By the image's own check.
        poll::until("the container is healthy", PATIENCE, || {
            let health = "{{.State.Health.Status}}";
            let state = host.try_run(&["docker", "inspect", "--format", health, "mirror"]);
            if state.stdout.trim() == "healthy" {
                Ok(())
            } else {
                Err(format!(
                    "{state}{}",
                    host.try_run(&["docker", "logs", "mirror"])
                ))
            }
        });
    };

    start();
    let docker = Docker::on(&host);
    docker.pull("layers:1");
    assert_eq!(docker.output_of("layers:1"), image.output);
    hub.assert_only_agents_asked();
    let catalog = host.run(&["curl", "-sS", "--fail", &format!("{LOCAL}/v2/_catalog")]);
    assert_eq!(catalog.trim(), r#"{"repositories":["library/layers"]}"#);
    let kept = format!("{data}/docker/registry/v2/repositories/library/layers");
    host.run(&["test", "-d", &kept]);

    host.run(&["docker", "stop", "mirror"]);
    let code = host.run(&[
        "docker",
        "inspect",
        "--format",
        "{{.State.ExitCode}}",
        "mirror",
    ]);
    assert_eq!(code.trim(), "0", "it is told to stop, and stops");
    host.run(&["docker", "rm", "mirror"]);
    hub.switch_off();
    start();
    docker.remove("layers:1");
    docker.pull("layers:1");
    assert_eq!(docker.output_of("layers:1"), image.output);
}

#[test]
fn a_laptops_proxy_cache_goes_on_with_its_config_and_its_data() {
    serves_as_the_file_says(
        "container/compose.yaml",
        "distribution-laptop-proxy-cache",
        "/srv/proxy",
        "/srv/proxy/config/config.yml",
        "/srv/proxy/data",
    );
}

#[test]
fn a_swarms_mirror_goes_on_with_its_config_and_its_data() {
    serves_as_the_file_says(
        "container/stack.yaml",
        "distribution-swarm-mirror",
        "",
        "/var/data/registry/registry-mirror-config.yml",
        "/var/data/registry/registry-mirror-data",
    );
}
