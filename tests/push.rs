//! Pushing to hosted names: uploads in all their forms, and what breaks them.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/cloud.rs"]
mod cloud;
#[path = "support/home.rs"]
mod home;
#[path = "support/s3.rs"]
mod server;
mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, SystemTime};

use home::Home;
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::signal::Signal;
use support::agent::{Agent, SHORT};
use support::client::{Client, Reply};
use support::image::{Blob, Image, KIB, MIB};
use support::{PATIENCE, eventually};

const NAME: &str = "mycompany/app";

on_each_home! {
    a_blob_is_pushed_by_one_post,
    a_blob_is_pushed_in_chunks,
    a_chunk_out_of_order_is_told_where_to_go_on,
    a_blob_of_unknown_length_is_streamed,
    what_is_not_what_its_digest_says_is_not_kept,
    an_upload_is_hashed_as_its_digest_is_whatever_was_said_before,
    an_upload_is_cancelled_also_while_it_runs,
    two_requests_do_not_go_on_with_one_upload,
    an_upload_goes_on_where_its_connection_broke_and_after_a_restart,
    of_a_chunk_that_is_not_as_long_as_it_says_nothing_is_kept,
    a_client_that_sends_nothing_is_not_waited_for,
    uploads_that_were_given_up_are_removed_at_the_start,
    a_full_disk_is_said_and_leaves_nothing_half_stored,
    many_uploads_at_once_take_bounded_memory,
    what_was_acknowledged_is_there_after_a_kill,
    an_upload_that_was_given_up_is_unknown_while_it_is_still_in_memory,
    a_body_is_asked_for_before_it_is_sent,
    an_image_is_pushed_by_http_2,
    a_pushed_image_is_pulled_and_laid_out_as_distribution_has_it,
}

on_the_disk_alone! {
    a_push_that_dies_at_any_point_is_done_again:
        "it dies between the steps by which a disk is written",
}

/// Begins an upload, and gives its location.
#[track_caller]
fn begin(agent: &Agent) -> String {
    let reply = agent
        .request("POST", &format!("/v2/{NAME}/blobs/uploads/"))
        .body(b"")
        .send();
    assert_eq!(reply.status, 202, "{reply:?}");
    let location = reply.header("location").expect("a Location").to_owned();
    assert!(location.starts_with(&format!("/v2/{NAME}/blobs/uploads/")));
    location
}

/// Sends a chunk with its range.
#[track_caller]
fn patch(agent: &Agent, location: &str, blob: &[u8], range: std::ops::Range<usize>) -> Reply {
    let said = format!("{}-{}", range.start, range.end - 1);
    let patch = agent.request("PATCH", location);
    patch
        .header("Content-Range", &said)
        .body(&blob[range])
        .send()
}

#[track_caller]
fn put(agent: &Agent, location: &str, blob: &Blob, rest: &[u8]) -> Reply {
    let put = agent.request("PUT", &format!("{location}?digest={}", blob.digest));
    put.body(rest).send()
}

#[track_caller]
fn assert_stored(agent: &Agent, blob: &Blob) {
    let target = format!("/v2/{NAME}/blobs/{}", blob.digest);
    agent.get(&target).assert_is(&blob.bytes);
    let head = agent.head(&target);
    assert_eq!(head.status, 200);
    assert_eq!(head.header("docker-content-digest"), Some(&*blob.digest));
    let length = blob.len().to_string();
    assert_eq!(head.header("content-length"), Some(&*length));
}

#[track_caller]
fn assert_created(reply: &Reply, blob: &Blob) {
    assert_eq!(reply.status, 201, "{reply:?}");
    let location = format!("/v2/{NAME}/blobs/{}", blob.digest);
    assert_eq!(reply.header("location"), Some(&*location));
    assert_eq!(reply.header("docker-content-digest"), Some(&*blob.digest));
}

/// The uploads that are on the disk.
fn uploads(agent: &Agent) -> Vec<std::path::PathBuf> {
    let folder = agent.stored(&format!("repositories/{NAME}/_uploads"));
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn a_pushed_image_is_pulled_and_laid_out_as_distribution_has_it(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::new(1, &[100 * KIB, 3]));
    agent.push(NAME, "v1", &image);
    agent.pull(NAME, "v1", &image);
    let target = format!("/v2/{NAME}/manifests/{}", image.digest());
    let reply = agent.get(&target);
    reply.assert_is(&image.manifest.blob.bytes);
    assert_eq!(reply.header("docker-content-digest"), Some(image.digest()));
    let root = format!("repositories/{NAME}");
    let hex = |digest: &str| digest.split_once(':').unwrap().1.to_owned();
    let layer = &image.layer().digest;
    for (path, digest) in [
        (format!("_layers/sha256/{}/link", hex(layer)), &**layer),
        (
            format!("_manifests/revisions/sha256/{}/link", hex(image.digest())),
            image.digest(),
        ),
        ("_manifests/tags/v1/current/link".to_owned(), image.digest()),
    ] {
        let link = home.kept(&agent, &format!("{root}/{path}"));
        assert_eq!(link, Some(digest.as_bytes().to_owned()), "{path}");
    }
    assert_eq!(uploads(&agent), Vec::<std::path::PathBuf>::new());
    assert!(agent.metric("registry_agent_pushed_bytes_total") > 100_000.0);
}

fn a_blob_is_pushed_by_one_post(home: &Home) {
    let agent = home.hosting().start();
    for blob in [
        Blob::new(1, 300 * KIB),
        Blob::new(2, 0),
        Blob::new(3, 2 * MIB).by_sha512(),
    ] {
        let target = format!("/v2/{NAME}/blobs/uploads/?digest={}", blob.digest);
        let reply = agent.request("POST", &target).body(&blob.bytes).send();
        assert_created(&reply, &blob);
        assert_stored(&agent, &blob);
    }
}

fn a_blob_is_pushed_in_chunks(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 3 * MIB));
    let mut location = begin(&agent);
    for (start, end) in [(0, MIB), (MIB, 2 * MIB + 5)] {
        let reply = patch(&agent, &location, &blob.bytes, start..end);
        assert_eq!(reply.status, 202, "{reply:?}");
        assert_eq!(reply.header("range"), Some(&*format!("0-{}", end - 1)));
        reply
            .header("location")
            .expect("a Location")
            .clone_into(&mut location);
    }
    let status = agent.get(&location);
    assert_eq!(status.status, 204);
    assert_eq!(status.header("range"), Some(&*format!("0-{}", 2 * MIB + 4)));
    assert_eq!(status.header("location"), Some(&*location));
    assert_created(
        &put(&agent, &location, &blob, &blob.bytes[2 * MIB + 5..]),
        &blob,
    );
    assert_stored(&agent, &blob);
    agent
        .get(&location)
        .assert_error(404, "BLOB_UPLOAD_UNKNOWN");
}

fn a_chunk_out_of_order_is_told_where_to_go_on(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 300 * KIB));
    let location = begin(&agent);
    let fresh = patch(&agent, &location, &blob.bytes, 5..10);
    fresh.assert_error(416, "BLOB_UPLOAD_INVALID");
    assert_eq!(fresh.header("range"), Some("0-0"));
    assert_eq!(patch(&agent, &location, &blob.bytes, 0..KIB).status, 202);
    for wrong in [0..KIB, 2 * KIB..3 * KIB] {
        let reply = patch(&agent, &location, &blob.bytes, wrong);
        reply.assert_error(416, "BLOB_UPLOAD_INVALID");
        assert_eq!(reply.header("range"), Some("0-1023"));
        assert_eq!(reply.header("location"), Some(&*location));
    }
    // In the request that ends it as well, where nothing is lost by it.
    let target = format!("{location}?digest={}", blob.digest);
    let last = agent.request("PUT", &target).header("Content-Range", "5-9");
    let last = last.body(&blob.bytes[5..10]).send();
    last.assert_error(416, "BLOB_UPLOAD_INVALID");
    assert_created(&put(&agent, &location, &blob, &blob.bytes[KIB..]), &blob);
    assert_stored(&agent, &blob);
}

fn a_blob_of_unknown_length_is_streamed(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 5 * MIB));
    let location = begin(&agent);
    let reply = agent.request("PATCH", &location).stream(&blob.bytes).send();
    assert_eq!(reply.status, 202, "{reply:?}");
    assert_eq!(reply.header("range"), Some(&*format!("0-{}", 5 * MIB - 1)));
    assert_created(&put(&agent, &location, &blob, b""), &blob);
    assert_stored(&agent, &blob);
}

fn what_is_not_what_its_digest_says_is_not_kept(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 300 * KIB));
    let other = Blob::new(2, 300 * KIB);
    let target = format!("/v2/{NAME}/blobs/uploads/?digest={}", blob.digest);
    let post = agent.request("POST", &target).body(&other.bytes).send();
    post.assert_error(400, "DIGEST_INVALID");
    let location = begin(&agent);
    put(&agent, &location, &blob, &other.bytes).assert_error(400, "DIGEST_INVALID");
    let location = begin(&agent);
    let streamed = agent
        .request("PATCH", &location)
        .stream(&other.bytes)
        .send();
    assert_eq!(streamed.status, 202);
    put(&agent, &location, &blob.clone().by_sha512(), b"").assert_error(400, "DIGEST_INVALID");
    for digest in [&blob.digest, &other.digest] {
        assert!(!agent.stored_blob(digest).exists());
        let get = agent.get(&format!("/v2/{NAME}/blobs/{digest}"));
        get.assert_error(404, "BLOB_UNKNOWN");
    }
    assert!(uploads(&agent).is_empty());
    let location = begin(&agent);
    let without = agent.request("PUT", &location).body(b"").send();
    without.assert_error(400, "DIGEST_INVALID");
    let wrong = agent
        .request("PUT", &format!("{location}?digest=md5:1"))
        .body(b"");
    wrong.send().assert_error(400, "DIGEST_INVALID");
}

fn an_upload_is_hashed_as_its_digest_is_whatever_was_said_before(home: &Home) {
    let agent = home.hosting().start();
    for (number, said) in ["", "?digest-algorithm=sha256", "?digest-algorithm=sha512"]
        .iter()
        .enumerate()
    {
        let blob = Blob::new(number as u64, 300 * KIB).by_sha512();
        let target = format!("/v2/{NAME}/blobs/uploads/{said}");
        let begun = agent.request("POST", &target).body(b"").send();
        let location = begun.header("location").expect("a Location").to_owned();
        let sent = agent.request("PATCH", &location).stream(&blob.bytes).send();
        assert_eq!(sent.status, 202);
        assert_created(&put(&agent, &location, &blob, b""), &blob);
        assert_stored(&agent, &blob);
    }
    let target = format!("/v2/{NAME}/blobs/uploads/?digest-algorithm=md5");
    let md5 = agent.request("POST", &target).body(b"").send();
    md5.assert_error(400, "DIGEST_INVALID");
}

fn an_upload_is_cancelled_also_while_it_runs(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 300 * KIB));
    let location = begin(&agent);
    assert_eq!(patch(&agent, &location, &blob.bytes, 0..KIB).status, 202);
    let cancel = agent.request("DELETE", &location).body(b"").send();
    assert_eq!(cancel.status, 204);
    assert!(uploads(&agent).is_empty());
    agent
        .get(&location)
        .assert_error(404, "BLOB_UPLOAD_UNKNOWN");
    let again = agent.request("DELETE", &location).body(b"").send();
    again.assert_error(404, "BLOB_UPLOAD_UNKNOWN");

    let location = begin(&agent);
    let mut running = agent.registry().connect().unwrap();
    let headers = [("Content-Length".to_owned(), "1000".to_owned())];
    running.write("PATCH", &location, &headers).unwrap();
    running.write_body(&blob.bytes[..500]).unwrap();
    eventually(PATIENCE, "the upload is under way", || {
        agent.get(&location).status == 409
    });
    let cancel = agent.request("DELETE", &location).body(b"").send();
    assert_eq!(cancel.status, 204);
    assert!(uploads(&agent).is_empty());
}

fn two_requests_do_not_go_on_with_one_upload(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 1000));
    let location = begin(&agent);
    let mut first = agent.registry().connect().unwrap();
    let headers = [("Content-Length".to_owned(), "1000".to_owned())];
    first.write("PATCH", &location, &headers).unwrap();
    first.write_body(&blob.bytes[..500]).unwrap();
    eventually(PATIENCE, "the first is under way", || {
        agent.get(&location).status == 409
    });
    let second = patch(&agent, &location, &blob.bytes, 0..1000);
    second.assert_error(409, "BLOB_UPLOAD_INVALID");
    put(&agent, &location, &blob, b"").assert_error(409, "BLOB_UPLOAD_INVALID");
    first.write_body(&blob.bytes[500..]).unwrap();
    let first = first.expect("PATCH").response().unwrap().finish();
    assert_eq!(first.status, 202);
    assert_created(&put(&agent, &location, &blob, b""), &blob);
}

fn an_upload_goes_on_where_its_connection_broke_and_after_a_restart(home: &Home) {
    let (mut agent, blob) = (home.hosting().start(), Blob::new(1, 3 * MIB));
    let location = begin(&agent);
    let mut broken = agent.registry().connect().unwrap();
    let headers = [("Content-Length".to_owned(), (3 * MIB).to_string())];
    broken.write("PATCH", &location, &headers).unwrap();
    broken.write_body(&blob.bytes[..MIB + 7]).unwrap();
    drop(broken);
    let there = || {
        let range = agent.get(&location).header("range")?.to_owned();
        range.strip_prefix("0-")?.parse::<usize>().ok()
    };
    eventually(PATIENCE, "all that came is there", || {
        there() == Some(MIB + 6)
    });
    agent.kill();
    agent.start_again();
    agent.wait_until_ready();
    let status = agent.get(&location);
    assert_eq!(status.header("range"), Some(&*format!("0-{}", MIB + 6)));
    let reply = patch(&agent, &location, &blob.bytes, MIB + 7..2 * MIB);
    assert_eq!(reply.status, 202);
    assert_created(
        &put(&agent, &location, &blob, &blob.bytes[2 * MIB..]),
        &blob,
    );
    assert_stored(&agent, &blob);
}

fn of_a_chunk_that_is_not_as_long_as_it_says_nothing_is_kept(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 30_000));
    let location = begin(&agent);
    assert_eq!(patch(&agent, &location, &blob.bytes, 0..KIB).status, 202);
    let long = agent
        .request("PATCH", &location)
        .header("Content-Range", "1024-2047");
    long.stream(&blob.bytes[KIB..])
        .send()
        .assert_error(400, "SIZE_INVALID");
    let short = agent
        .request("PATCH", &location)
        .header("Content-Range", "1024-29999");
    short
        .stream(&blob.bytes[KIB..5 * KIB])
        .send()
        .assert_error(400, "SIZE_INVALID");
    let both = agent
        .request("PATCH", &location)
        .header("Content-Range", "1024-2047");
    both.body(&blob.bytes[KIB..])
        .send()
        .assert_error(400, "SIZE_INVALID");
    let none = agent
        .request("PATCH", &location)
        .header("Content-Range", "bytes 1024-2047");
    none.body(&blob.bytes[KIB..2 * KIB])
        .send()
        .assert_error(400, "BLOB_UPLOAD_INVALID");
    assert_eq!(agent.get(&location).header("range"), Some("0-1023"));
    assert_created(&put(&agent, &location, &blob, &blob.bytes[KIB..]), &blob);
}

fn a_client_that_sends_nothing_is_not_waited_for(home: &Home) {
    let agent = home.hosting().set("clients.idle", SHORT).start();
    let location = begin(&agent);
    let mut silent = agent.registry().connect().unwrap();
    let headers = [("Content-Length".to_owned(), "1000".to_owned())];
    silent.write("PATCH", &location, &headers).unwrap();
    silent.write_body(&[1; 10]).unwrap();
    let reply = silent.expect("PATCH").response().unwrap().finish();
    reply.assert_error(408, "BLOB_UPLOAD_INVALID");
    // What came is there, to be gone on with.
    assert_eq!(agent.get(&location).header("range"), Some("0-9"));
}

fn uploads_that_were_given_up_are_removed_at_the_start(home: &Home) {
    let mut agent = home.hosting().start();
    let (old, new) = (begin(&agent), begin(&agent));
    agent.kill();
    let id = old.rsplit('/').next().unwrap();
    let data = agent.stored(&format!("repositories/{NAME}/_uploads/{id}/data"));
    let long_ago = SystemTime::now() - Duration::from_hours(25);
    let file = fs::File::options().write(true).open(&data).unwrap();
    file.set_modified(long_ago).unwrap();
    agent.start_again();
    agent.wait_until_ready();
    eventually(PATIENCE, "the old one is gone", || {
        uploads(&agent).len() == 1
    });
    agent.get(&old).assert_error(404, "BLOB_UPLOAD_UNKNOWN");
    assert_eq!(agent.get(&new).status, 204);
}

fn a_full_disk_is_said_and_leaves_nothing_half_stored(home: &Home) {
    let agent = home.hosting().small_disk(4 * MIB).start();
    let (large, small) = (Blob::new(1, 6 * MIB), Blob::new(2, 100 * KIB));
    let target = format!("/v2/{NAME}/blobs/uploads/?digest={}", large.digest);
    let reply = agent.request("POST", &target).body(&large.bytes).send();
    reply.assert_error(507, "UNAVAILABLE");
    assert!(uploads(&agent).is_empty());
    assert!(!agent.stored_blob(&large.digest).exists());
    agent.push_blob(NAME, &small);
    assert_stored(&agent, &small);
}

fn many_uploads_at_once_take_bounded_memory(home: &Home) {
    let agent = home.hosting().start();
    let (blob, length) = (Blob::new(1, 8 * MIB), (8 * MIB).to_string());
    let locations: Vec<String> = (0..24).map(|_| begin(&agent)).collect();
    let mut running: Vec<_> = locations
        .iter()
        .map(|location| {
            let mut connection = agent.registry().connect().unwrap();
            let headers = [("Content-Length".to_owned(), length.clone())];
            connection.write("PATCH", location, &headers).unwrap();
            connection.write_body(&blob.bytes[..8 * MIB - 1]).unwrap();
            connection
        })
        .collect();
    // All of them are under way, and what came is on the disk but for a piece.
    eventually(PATIENCE, "all but a piece of each is written", || {
        let written = uploads(&agent)
            .into_iter()
            .filter(|upload| fs::metadata(upload.join("data")).unwrap().len() >= 6 << 20);
        written.count() == locations.len()
    });
    for connection in &mut running {
        connection.write_body(&blob.bytes[8 * MIB - 1..]).unwrap();
    }
    for (connection, location) in running.into_iter().zip(&locations) {
        let reply = connection.expect("PATCH").response().unwrap().finish();
        assert_eq!(reply.status, 202);
        assert_created(&put(&agent, location, &blob, b""), &blob);
    }
    let peak = agent.peak_memory();
    assert!(peak < 100 * MIB, "{} MiB", peak / MIB);
}

fn a_push_that_dies_at_any_point_is_done_again(home: &Home) {
    let image = Image::new(1, &[300 * KIB]);
    for point in [
        "upload-begun",
        "upload-synced",
        "upload-renamed",
        "upload-linked",
    ] {
        let setup = home
            .hosting()
            .environment("REGISTRY_AGENT_FAILPOINT", point);
        let mut agent = setup.start();
        let location = begin(&agent);
        let target = format!("{location}?digest={}", image.layer().digest);
        let died = agent.request("PUT", &target).body(&image.layer().bytes);
        assert!(died.try_open().is_err(), "{point}");
        agent.wait();
        agent.set_environment(&[]);
        agent.start_again();
        agent.wait_until_ready();
        let found = agent.get(&format!("/v2/{NAME}/blobs/{}", image.layer().digest));
        if found.status == 200 {
            found.assert_is(&image.layer().bytes);
        } else {
            found.assert_error(404, "BLOB_UNKNOWN");
        }
        agent.push(NAME, "v1", &image);
        agent.pull(NAME, "v1", &image);
    }
}

fn what_was_acknowledged_is_there_after_a_kill(home: &Home) {
    let (mut agent, image) = (home.hosting().start(), Image::new(1, &[100 * KIB]));
    agent.push(NAME, "v1", &image);
    agent.signal(Signal::SIGKILL);
    agent.wait();
    agent.start_again();
    agent.wait_until_ready();
    agent.pull(NAME, "v1", &image);
}

fn an_upload_that_was_given_up_is_unknown_while_it_is_still_in_memory(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, KIB));
    for method in ["GET", "PATCH", "PUT", "DELETE"] {
        let location = begin(&agent);
        assert_eq!(patch(&agent, &location, &blob.bytes, 0..500).status, 202);
        // As the sweep does it, a day later.
        fs::remove_dir_all(&uploads(&agent)[0]).unwrap();
        let target = format!("{location}?digest={}", blob.digest);
        let reply = agent.request(method, &target).body(b"").send();
        if method == "DELETE" {
            // It is known no longer afterwards, whichever is said.
            assert!(matches!(reply.status, 204 | 404), "{reply:?}");
        } else {
            reply.assert_error(404, "BLOB_UPLOAD_UNKNOWN");
        }
        let again = agent.get(&location);
        again.assert_error(404, "BLOB_UPLOAD_UNKNOWN");
    }
}

/// What comes next on a connection, to the end of a head.
fn head(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

/// curl does so for what is large (`Expect: 100-continue`), and does not send what is refused.
fn a_body_is_asked_for_before_it_is_sent(home: &Home) {
    let (agent, blob) = (home.hosting().start(), Blob::new(1, 2 * MIB));
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let expecting = |method: &str, target: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = blob.len();
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\
             Expect: 100-continue\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    let patched = begin(&agent);
    let put = format!("{}?digest={}", begin(&agent), blob.digest);
    for (method, target, status) in [("PATCH", patched.as_str(), "202"), ("PUT", &put, "201")] {
        let mut stream = expecting(method, target);
        assert!(head(&mut stream).starts_with("HTTP/1.1 100 "), "{method}");
        stream.write_all(&blob.bytes).unwrap();
        let answer = head(&mut stream);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    assert_stored(&agent, &blob);
    for (target, status) in [
        ("/v2/elsewhere/app/blobs/uploads/?digest=sha256:1", "405"),
        (&*format!("/v2/{NAME}/blobs/uploads/?digest=md5:1"), "400"),
    ] {
        let answer = head(&mut expecting("POST", target));
        // Without the body.
        let refused = !answer.starts_with("HTTP/1.1 100") && !answer.starts_with("HTTP/1.1 2");
        assert!(refused, "{status}: {answer}");
    }
}

fn an_image_is_pushed_by_http_2(home: &Home) {
    let (agent, image) = (home.hosting().start(), Image::new(1, &[5 * MIB, 10 * KIB]));
    let Client::Tcp(address) = agent.registry() else {
        panic!("a TCP listener")
    };
    let pushing = async {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let executor = TokioExecutor::new();
        let handshake = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream));
        let (sender, connection) = handshake.await.unwrap();
        tokio::spawn(connection);
        let send = async |method: &str, target: &str, body: &bytes::Bytes| {
            let request = http::Request::builder()
                .method(method)
                .uri(format!("http://{address}{target}"))
                .header("content-type", image.manifest.media_type.as_str());
            let request = request.body(Full::new(body.clone())).unwrap();
            sender.clone().send_request(request).await.unwrap()
        };
        let nothing = bytes::Bytes::new();
        for blob in image.blobs() {
            let target = format!("/v2/{NAME}/blobs/uploads/");
            let begun = send("POST", &target, &nothing).await;
            assert_eq!(begun.status(), 202);
            let location = begun.headers()["location"].to_str().unwrap().to_owned();
            let patched = send("PATCH", &location, &blob.bytes).await;
            assert_eq!(patched.status(), 202);
            let target = format!("{location}?digest={}", blob.digest);
            assert_eq!(send("PUT", &target, &nothing).await.status(), 201);
        }
        // Many blobs at once by many streams of one connection.
        let many = (2..10)
            .map(|seed| Blob::new(seed, 300 * KIB))
            .map(async |blob| {
                let target = format!("/v2/{NAME}/blobs/uploads/?digest={}", blob.digest);
                assert_eq!(send("POST", &target, &blob.bytes).await.status(), 201);
            });
        futures_util::future::join_all(many).await;
        let target = format!("/v2/{NAME}/manifests/v1");
        let manifest = &image.manifest.blob.bytes;
        assert_eq!(send("PUT", &target, manifest).await.status(), 201);
    };
    tokio::runtime::Runtime::new().unwrap().block_on(pushing);
    agent.pull(NAME, "v1", &image);
    assert_stored(&agent, &Blob::new(9, 300 * KIB));
}
