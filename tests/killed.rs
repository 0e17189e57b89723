//! An agent that is killed at every stage of storing something, as by `kill -9`: nothing truncated
//! or wrong is ever served as a whole or kept, what was cached is served, and the next request
//! recovers.
#![cfg(debug_assertions)]
#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use nix::sys::signal::Signal;
use registry_agent::failpoint::{Failpoint, VARIABLE};
use support::agent::{Agent, Setup};
use support::client::Reply;
use support::image::{Blob, Image, KIB, MIB};
use support::upstream::{ALWAYS, Fault, On, Upstream};
use support::{PATIENCE, eventually};

/// Whether it is a manifest and its tag that pass a point; all others, a blob does.
fn is_of_manifests(point: Failpoint) -> bool {
    matches!(
        point,
        Failpoint::ManifestStaged
            | Failpoint::ManifestWritten
            | Failpoint::RevisionLinked
            | Failpoint::IndexLinked
            | Failpoint::TagStaged
            | Failpoint::TagMoved
    )
}

/// Whether what passes a point is the agent's own by then, with or without its upstream.
fn is_kept(point: Failpoint) -> bool {
    matches!(point, Failpoint::FillLinked | Failpoint::TagMoved)
}

fn target(blob: &Blob) -> String {
    format!("/v2/library/app/blobs/{}", blob.digest)
}

/// A mirror that has an image, `latest`, and asks after its tag at every request.
fn with_cached(cached: &Image) -> (Upstream, Agent) {
    let hub = Upstream::start();
    hub.push("library/app", "latest", cached);
    let agent = Setup::mirror(&hub).set("freshness.window", "0s").start();
    agent.pull("library/app", "latest", cached);
    agent.wait_until_stored(cached.blobs());
    // A link is written after its blob.
    eventually(PATIENCE, "no download is under way", || {
        agent.metric("registry_agent_fills") < 0.5
    });
    (hub, agent)
}

/// Starts the agent so that it dies at this point, and has a request kill it.
fn killed_at(agent: &mut Agent, point: Failpoint, target: &str) -> Option<Reply> {
    agent.kill();
    agent.set_environment(&[(VARIABLE, point.name())]);
    agent.start_again();
    agent.wait_until_ready();
    let answer = agent.request("GET", target).try_open().ok();
    let reply = answer.map(support::client::Response::finish);
    let exit = agent.wait();
    assert_eq!(
        exit.status.signal(),
        Some(Signal::SIGKILL as i32),
        "{point:?}: {}",
        exit.status
    );
    agent.set_environment(&[]);
    reply
}

/// No blob has other bytes than its digest says, and no link points to nothing.
fn assert_sound(agent: &Agent, when: &str) {
    let mut blobs = 0;
    for folder in list(&agent.stored("blobs/sha256")) {
        for blob in list(&folder) {
            for file in list(&blob) {
                let stored = Blob::of(fs::read(&file).unwrap());
                let hex = blob.file_name().unwrap().to_str().unwrap();
                assert_eq!(stored.digest, format!("sha256:{hex}"), "{when}");
                blobs += 1;
            }
        }
    }
    assert!(blobs >= 3, "{when}: what was cached is gone");
    let config = agent.config_file().display().to_string();
    let verified = agent.command(&["verify", "--config", &config]);
    let said = String::from_utf8_lossy(&verified.stdout);
    let complained = String::from_utf8_lossy(&verified.stderr);
    assert_eq!(
        verified.status.code(),
        Some(0),
        "{when}: {said}{complained}"
    );
}

fn list(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// What a client took for a whole answer was one of these.
fn assert_right(reply: &Reply, right: &[&[u8]], when: &str) {
    if reply.status == 200 && reply.complete {
        assert!(
            right.iter().any(|right| reply.body == *right),
            "{when}: {} other bytes",
            reply.body.len()
        );
    }
}

/// A blob's download is killed at a point, where the upstream may have a wrong byte.
fn blob_killed_at(point: Failpoint, length: usize, wrong: Option<usize>) {
    let when = format!("{point:?}, {length} bytes, wrong at {wrong:?}");
    let (cached, blob) = (Image::small(1), Blob::new(2, length));
    let (hub, mut agent) = with_cached(&cached);
    hub.push_blob("library/app", &blob);
    if let Some(at) = wrong {
        hub.fault(ALWAYS, On::get(&blob.digest), Fault::WrongByte(at));
    }
    if let Some(reply) = killed_at(&mut agent, point, &target(&blob)) {
        assert_right(&reply, &[&blob.bytes], &when);
        assert!(
            wrong.is_none() || !(reply.status == 200 && reply.complete),
            "{when}"
        );
    }
    assert_sound(&agent, &when);

    hub.switch_off();
    agent.start_again();
    agent.wait_until_ready();
    agent.pull("library/app", "latest", &cached);
    let reply = agent.get(&target(&blob));
    if is_kept(point) || reply.status == 200 {
        reply.assert_is(&blob.bytes);
        assert!(wrong.is_none(), "{when}: nobody has had the right bytes");
    } else {
        reply.assert_error(503, "UNAVAILABLE");
    }
    assert_sound(&agent, &when);

    hub.switch_on();
    hub.heal();
    agent.get(&target(&blob)).assert_is(&blob.bytes);
    agent.wait_until_stored([&blob]);
    assert_sound(&agent, &when);
    agent.pull("library/app", "latest", &cached);
}

/// The storing of a manifest is killed at a point: of one with a new tag, and of one that a known
/// tag has moved to.
fn manifest_killed_at(point: Failpoint, tag: &str) {
    let when = format!("{point:?}, {tag}");
    let (cached, new) = (Image::small(1), Image::small(2));
    let (old, bytes) = (&cached.manifest.blob.bytes, &new.manifest.blob.bytes);
    let (hub, mut agent) = with_cached(&cached);
    hub.push("library/app", tag, &new);
    let target = format!("/v2/library/app/manifests/{tag}");
    if let Some(reply) = killed_at(&mut agent, point, &target) {
        assert_right(&reply, &[bytes], &when);
    }
    assert_sound(&agent, &when);

    hub.switch_off();
    agent.start_again();
    agent.wait_until_ready();
    let reply = agent.get(&target);
    if is_kept(point) {
        reply.assert_is(bytes);
    } else if tag == "latest" {
        // What the tag was is cached, and is served.
        reply.assert_is(old);
    } else {
        reply.assert_error(503, "UNAVAILABLE");
    }
    agent
        .get(&format!("/v2/library/app/manifests/{}", cached.digest()))
        .assert_is(old);
    for blob in cached.blobs() {
        agent.get(&self::target(blob)).assert_is(&blob.bytes);
    }
    assert_sound(&agent, &when);

    hub.switch_on();
    // An upstream that could not be reached may be left alone for a moment.
    eventually(PATIENCE, "the tag is the upstream's", || {
        agent.get(&target).body == *bytes
    });
    agent.pull("library/app", tag, &new);
    agent.wait_until_stored(new.blobs());
    assert_sound(&agent, &when);
}

#[test]
fn a_blob_that_was_cut_off_anywhere_is_whole_or_refused_and_recovers() {
    for point in Failpoint::ALL {
        if !is_of_manifests(point) {
            // A small one goes out as a whole, of a large one readers have the most before its end.
            blob_killed_at(point, 10 * KIB, None);
            blob_killed_at(point, 4 * MIB, None);
        }
    }
}

#[test]
fn wrong_bytes_that_nobody_had_checked_do_not_outlive_a_kill() {
    for length in [10 * KIB, 4 * MIB] {
        for at in [0, length - 1] {
            for point in [Failpoint::FillBegun, Failpoint::FillUnchecked] {
                blob_killed_at(point, length, Some(at));
            }
        }
    }
}

#[test]
fn a_manifest_and_its_tag_that_were_cut_off_anywhere_leave_what_was_and_recover() {
    for point in Failpoint::ALL {
        if is_of_manifests(point) {
            manifest_killed_at(point, "new");
            manifest_killed_at(point, "latest");
        }
    }
}

#[test]
fn what_a_kill_left_for_one_repository_is_no_other_ones_without_the_upstream() {
    let (cached, blob) = (Image::small(1), Blob::new(2, 10 * KIB));
    for point in Failpoint::ALL {
        if is_of_manifests(point) {
            continue;
        }
        let (hub, mut agent) = with_cached(&cached);
        hub.push("library/other", "latest", &cached);
        hub.push_blob("library/app", &blob);
        killed_at(&mut agent, point, &target(&blob));
        agent.start_again();
        agent.wait_until_ready();
        let of_other = format!("/v2/library/other/blobs/{}", blob.digest);
        let reply = agent.get(&of_other);
        assert_eq!(reply.status, 404, "{point:?}");
        agent.get(&target(&blob)).assert_is(&blob.bytes);
    }
}

#[test]
fn a_blob_that_had_come_to_its_end_is_served_without_the_upstream_where_a_manifest_names_it() {
    for point in [
        Failpoint::FillUnchecked,
        Failpoint::FillVerified,
        Failpoint::FillSynced,
        Failpoint::FillRenamed,
        Failpoint::FillLinked,
    ] {
        let (cached, new) = (Image::small(1), Image::new(2, &[2 * MIB]));
        let (hub, mut agent) = with_cached(&cached);
        hub.push("library/app", "new", &new);
        let manifest = &new.manifest.blob.bytes;
        agent
            .get("/v2/library/app/manifests/new")
            .assert_is(manifest);
        killed_at(&mut agent, point, &target(new.layer()));
        hub.switch_off();
        agent.start_again();
        agent.wait_until_ready();
        agent
            .get("/v2/library/app/manifests/new")
            .assert_is(manifest);
        agent
            .get(&target(new.layer()))
            .assert_is(&new.layer().bytes);
        assert_sound(&agent, &format!("{point:?}"));
    }
}
