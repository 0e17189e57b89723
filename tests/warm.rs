//! `warm`: what the agent has fetched when it ends, and what it says when it could not.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use serde_json::json;
use support::agent::{Agent, Setup};
use support::image::{Image, KIB, MIB, Manifest, OCI_INDEX};
use support::upstream::{ALWAYS, Fault, On, Upstream};

/// What a run said, and its exit code.
struct Run {
    code: Option<i32>,
    said: String,
}

fn warm(agent: &Agent, arguments: &[&str]) -> Run {
    let config = agent.config_file().display().to_string();
    let arguments = [&["warm", "--config", &config], arguments].concat();
    let output = agent.command(&arguments);
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Run {
        code: output.status.code(),
        said: text(&output.stdout) + &text(&output.stderr),
    }
}

/// An index of one image for each platform, under `library/app:latest`.
fn push_index(hub: &Upstream, images: &[(&str, &Image)]) {
    let manifests: Vec<_> = images
        .iter()
        .map(|(platform, image)| {
            let (os, architecture) = platform.split_once('/').unwrap();
            let manifest = &image.manifest;
            json!({
                "mediaType": manifest.media_type,
                "digest": manifest.digest(),
                "size": manifest.blob.len(),
                "platform": {"os": os, "architecture": architecture},
            })
        })
        .collect();
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests});
    for (_, image) in images {
        hub.push("library/app", "one", image);
    }
    hub.push_manifest(
        "library/app",
        Some("latest"),
        &Manifest::new(OCI_INDEX, &index),
    );
}

#[test]
fn a_warm_image_is_served_without_its_upstream() {
    let (hub, image) = (Upstream::start(), Image::new(1, &[2 * MIB, 10 * KIB, KIB]));
    hub.push("library/app", "1.2", &image);
    let agent = Setup::mirror(&hub).start();
    let run = warm(&agent, &["app:1.2"]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    for blob in image.layers.iter().chain([&image.config]) {
        let lines = run.said.lines().filter(|line| line.contains(&blob.digest));
        let lines: Vec<&str> = lines.collect();
        assert!(
            matches!(lines[..], [line] if line.contains("docker.io/library/app:1.2")),
            "a line for each layer: {}",
            run.said
        );
    }
    agent.wait_until_stored(image.blobs());
    hub.switch_off();
    agent.pull("library/app", "1.2", &image);
}

#[test]
fn images_of_other_registries_and_by_digest_are_warmed_where_clients_look_for_them() {
    let (hub, ghcr) = (Upstream::start(), Upstream::start());
    let (one, two) = (Image::small(1), Image::small(2));
    hub.push("owner/app", "latest", &one);
    ghcr.push("owner/app", "latest", &two);
    let agent = Setup::mirror(&hub).upstream("ghcr.io", &ghcr).start();
    let by_digest = format!("ghcr.io/owner/app@{}", two.digest());
    let run = warm(&agent, &["owner/app", &by_digest]);
    assert_eq!(run.code, Some(0), "{}", run.said);
    agent.wait_until_stored(one.blobs());
    agent.wait_until_stored(two.blobs());
    hub.switch_off();
    ghcr.switch_off();
    agent.pull("owner/app", "latest", &one);
    for blob in [&two.manifest.blob, two.layer()] {
        let kind = if blob.digest == two.digest() {
            "manifests"
        } else {
            "blobs"
        };
        agent
            .get(&format!("/v2/owner/app/{kind}/{}?ns=ghcr.io", blob.digest))
            .assert_is(&blob.bytes);
    }
}

#[test]
fn only_the_platforms_that_are_wanted_are_fetched() {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let host = format!("linux/{architecture}");
    let (one, two) = (Image::small(1), Image::small(2));
    for (arguments, fetched) in [
        (&["app"][..], [true, false]),
        (&["--platform", "linux/mips", "app"], [false, true]),
        (
            &["--platform", "linux/mips", "--platform", &host, "app"],
            [true, true],
        ),
        (&["--all-platforms", "app"], [true, true]),
    ] {
        let hub = Upstream::start();
        push_index(&hub, &[(&host, &one), ("linux/mips", &two)]);
        let agent = Setup::mirror(&hub).start();
        let run = warm(&agent, arguments);
        assert_eq!(run.code, Some(0), "{}", run.said);
        let asked = [&one, &two].map(|image| hub.count("GET", &image.layer().digest) == 1);
        assert_eq!(asked, fetched, "{arguments:?}: {}", run.said);
    }
}

#[test]
fn what_could_not_be_fetched_is_named_and_the_rest_is_warm() {
    let hub = Upstream::start();
    let (broken, whole) = (Image::new(1, &[10 * KIB, 10 * KIB]), Image::small(2));
    hub.push("library/broken", "latest", &broken);
    hub.push("library/whole", "latest", &whole);
    hub.fault(ALWAYS, On::get(&broken.layer().digest), Fault::Status(404));
    push_index(&hub, &[("linux/mips", &whole)]);
    let agent = Setup::mirror(&hub).start();
    let run = warm(
        &agent,
        &["broken", "missing", "quay.io/a/b", "app", "whole"],
    );
    assert_eq!(run.code, Some(1), "{}", run.said);
    for says in [
        &["docker.io/library/broken:latest", &*broken.layer().digest][..],
        &["docker.io/library/missing:latest"],
        &["quay.io/a/b:latest", "not mirrored"],
        &["docker.io/library/app:latest", "only for linux/mips"],
    ] {
        let says = |line: &str| says.iter().all(|part| line.contains(part));
        assert!(run.said.lines().any(says), "{}", run.said);
    }
    agent.wait_until_stored(whole.blobs());
    hub.switch_off();
    agent.pull("library/whole", "latest", &whole);
}

#[test]
fn an_agent_that_does_not_run_is_said_to_be_missed_at_its_address() {
    let mut agent = Setup::mirror(&Upstream::start()).start();
    agent.kill();
    let run = warm(&agent, &["app"]);
    assert_eq!(run.code, Some(1), "{}", run.said);
    assert!(
        run.said.contains(":5000") && run.said.contains("is it running?"),
        "{}",
        run.said
    );
    let run = warm(&agent, &["NotAName"]);
    assert!(!matches!(run.code, Some(0 | 1)), "{}", run.said);
    assert!(run.said.contains("NotAName"), "{}", run.said);
}
