//! `verify` of a bucket: what is wrong is found by everybody, and removed by a writer alone.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/cloud.rs"]
mod cloud;
#[path = "support/s3.rs"]
mod server;
mod support;

use std::collections::BTreeSet;
use std::fs;

use cloud::Cloud;
use server::Fault;
use support::agent::Agent;
use support::image::{Image, KIB, MIB};
use support::write_file;

const NAME: &str = "mycompany/app";
const V2: &str = "docker/registry/v2";

/// What a run said, and its exit code.
fn verify(agent: &Agent, more: &[&str]) -> (Option<i32>, String) {
    let config = agent.config_file().display().to_string();
    let output = agent.command(&[&["verify", "--config", &config], more].concat());
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let said = text(&output.stdout) + &text(&output.stderr);
    (output.status.code(), said)
}

fn hex(digest: &str) -> &str {
    digest.split_once(':').unwrap().1
}

fn data(digest: &str) -> String {
    let hex = hex(digest);
    format!("{V2}/blobs/sha256/{}/{hex}/data", &hex[..2])
}

fn layer(digest: &str) -> String {
    format!(
        "{V2}/repositories/{NAME}/_layers/sha256/{}/link",
        hex(digest)
    )
}

#[test]
fn what_is_wrong_in_a_bucket_is_found_and_a_writer_removes_it() {
    let cloud = Cloud::start();
    let (writer, reader) = (cloud.writer().start(), cloud.reader().start());
    let (good, bad) = (
        Image::new(1, &[100 * KIB, 20 * MIB]),
        Image::new(2, &[3 * MIB, 5 * KIB]),
    );
    writer.push(NAME, "good", &good);
    writer.push("mycompany/other", "good", &good);
    for agent in [&writer, &reader] {
        let (code, said) = verify(agent, &[]);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("nothing is wrong"), "{said}");
        // Each image has a manifest, a config and two layers, and each of two repositories a link
        // to each of them, and a tag.
        assert!(
            said.contains("4 blobs and 10 links: nothing is wrong"),
            "{said}"
        );
    }
    cloud.push(NAME, "bad", &bad);
    let whole: BTreeSet<String> = cloud.s3.keys().into_iter().collect();
    let layers: Vec<_> = bad.blobs().collect();
    // One byte of another, a blob that is gone, a link of another, and tags of nothing.
    let mut rotten = layers[1].bytes.to_vec();
    rotten[1000] ^= 1;
    write_file(&cloud.s3.file(&data(&layers[1].digest)), &rotten);
    fs::remove_file(cloud.s3.file(&data(&layers[2].digest))).unwrap();
    write_file(
        &cloud.s3.file(&layer(&layers[0].digest)),
        good.digest().as_bytes(),
    );
    let tag = |name: &str| format!("{V2}/repositories/{NAME}/_manifests/tags/{name}/current/link");
    cloud.s3.lay(&tag("lost"), layers[0].digest.as_bytes());
    cloud.s3.lay(&tag("none"), b"by hand");
    let wrong = [
        (data(&layers[1].digest), "that are sha256:".to_owned()),
        (
            layer(&layers[1].digest),
            "which the bucket does not have".to_owned(),
        ),
        (
            layer(&layers[2].digest),
            "which the bucket does not have".to_owned(),
        ),
        (layer(&layers[0].digest), format!("says {}", good.digest())),
        (tag("lost"), "which its repository does not have".to_owned()),
        (tag("none"), "is not a link".to_owned()),
    ];
    let before: BTreeSet<String> = cloud.s3.keys().into_iter().collect();
    for more in [&[][..], &["--repair"]] {
        let (code, said) = verify(&reader, more);
        assert_eq!(code, Some(1), "{said}");
        for (key, problem) in &wrong {
            // Of a blob that is there, rotten as it is, the link is not to nothing.
            if *key == layer(&layers[1].digest) {
                continue;
            }
            let line = said.lines().find(|line| line.contains(key));
            let line = line.unwrap_or_else(|| panic!("{key} in {said}"));
            assert!(
                line.starts_with("s3://images/") && line.contains(problem),
                "{line}"
            );
            assert!(!line.contains(": removed"), "{line}");
        }
        assert_eq!(
            said.contains("a reader may not change its bucket"),
            !more.is_empty(),
            "{said}"
        );
        assert_eq!(cloud.s3.keys().into_iter().collect::<BTreeSet<_>>(), before);
    }
    let (code, said) = verify(&writer, &["--repair"]);
    assert_eq!(code, Some(0), "{said}");
    for (key, problem) in &wrong {
        let line = said.lines().find(|line| line.contains(key));
        let line = line.unwrap_or_else(|| panic!("{key} in {said}"));
        assert!(
            line.contains(problem) && line.ends_with(": removed"),
            "{line}"
        );
    }
    let mut left = before.clone();
    for (key, _) in &wrong {
        left.remove(key);
    }
    assert_eq!(cloud.s3.keys().into_iter().collect::<BTreeSet<_>>(), left);
    assert_eq!(verify(&writer, &[]).0, Some(0));
    // It can be pushed again.
    writer.push(NAME, "bad", &bad);
    let now: BTreeSet<String> = cloud.s3.keys().into_iter().collect();
    assert_eq!(now, whole);
    let fresh = cloud.reader().start();
    fresh.pull(NAME, "bad", &bad);
    fresh.pull("mycompany/other", "good", &good);
}

#[test]
fn a_blob_that_was_replaced_meanwhile_is_not_removed() {
    let cloud = Cloud::start();
    let (writer, image) = (cloud.writer().start(), Image::small(1));
    writer.push(NAME, "v1", &image);
    let layer = image.layer();
    let key = data(&layer.digest);
    let file = cloud.s3.file(&key);
    write_file(&file, b"rotten");
    support::disk::age(&file, 1);
    let (bytes, announced) = (layer.bytes.clone(), key.replace("/data", "/collecting-"));
    cloud.s3.front.plan(move |asked| {
        if asked.operation == "PUT" && asked.key.starts_with(&announced) {
            write_file(&file, &bytes);
        }
        None
    });
    let (code, said) = verify(&writer, &["--repair"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("it was replaced meanwhile"), "{said}");
    cloud.s3.front.plan(|_| None);
    cloud.reader().start().pull(NAME, "v1", &image);
    assert_eq!(verify(&writer, &[]).0, Some(0));
}

#[test]
fn a_bucket_that_can_not_be_listed_is_no_clean_one() {
    let cloud = Cloud::start();
    let agent = cloud.reader().start();
    cloud.push(NAME, "v1", &Image::small(1));
    cloud.s3.front.plan(|asked| {
        let fails = asked.operation == "LIST" && asked.query.contains("_layers");
        fails.then_some(Fault::Status(403))
    });
    let (code, said) = verify(&agent, &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("s3:ListBucket"), "{said}");
}
