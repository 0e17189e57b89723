//! The store in S3, against a real server behind a front that fails on command.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/s3.rs"]
mod server;
mod support;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use bytes::Bytes;
use registry_agent::config::{AccessKeys, S3Settings, Secret};
use registry_agent::oci::{Algorithm, Digest, Manifest, Tag};
use registry_agent::store::Page;
use registry_agent::store::layout::{self, Repository};
use registry_agent::store::s3::{BlobStream, Bucket, BucketError, Limits, Tagged, Writer};
use server::{ACCESS_KEY, BUCKET, Fault, S3, SECRET_KEY};

const MIB: u64 = 1024 * 1024;

/// Small, so that a small blob has many parts.
const LIMITS: Limits = Limits {
    part: MIB,
    memory: 4 * MIB,
};

fn settings(s3: &S3) -> S3Settings {
    S3Settings {
        bucket: BUCKET.to_owned(),
        region: Some("us-east-1".to_owned()),
        prefix: "/registry/".to_owned(),
        endpoint: Some(format!("http://{}", s3.address).parse().unwrap()),
        path_style: true,
        redirect: false,
        storage_class: None,
        encryption: None,
        keys: Some(AccessKeys {
            id: ACCESS_KEY.to_owned(),
            secret: Secret::new(SECRET_KEY),
        }),
    }
}

async fn writer(s3: &S3) -> Writer {
    Writer::open(&settings(s3), LIMITS).await.unwrap()
}

async fn reader(s3: &S3) -> Bucket {
    Bucket::open(&settings(s3), LIMITS).await.unwrap()
}

fn repository(path: &str) -> Repository {
    Repository::from_path(path.to_owned())
}

fn tag(tag: &str) -> Tag {
    tag.parse().unwrap()
}

fn key(path: &str) -> String {
    format!("registry/{path}")
}

/// Bytes of which no two parts are alike.
fn bytes(size: u64, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    random.fill(&mut bytes);
    bytes
}

/// A blob that lies in the bucket, and its bytes.
fn lay_blob(s3: &S3, size: u64, seed: u64) -> (Digest, Vec<u8>) {
    let bytes = bytes(size, seed);
    let digest = Digest::of(Algorithm::Sha256, &bytes);
    s3.lay(&key(&layout::blob(&digest)), &bytes);
    (digest, bytes)
}

async fn read(stream: &mut BlobStream) -> Result<Vec<u8>, BucketError> {
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes)
}

async fn read_blob(bucket: &Bucket, digest: &Digest, offset: u64) -> Result<Vec<u8>, BucketError> {
    read(&mut bucket.blob(digest, offset).await?.unwrap()).await
}

fn image(layer: &Digest) -> Arc<Manifest> {
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[{{"digest":"{layer}"}}]}}"#
    );
    let digest = Digest::of(Algorithm::Sha256, text.as_bytes());
    Arc::new(Manifest::parse(Bytes::from(text), digest).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_registry_2_wrote_is_read_as_it_is() {
    let s3 = S3::start().await;
    let (layer, layer_bytes) = lay_blob(&s3, 3 * MIB + 17, 1);
    let manifest = image(&layer);
    let hex = manifest.digest.hex();
    // As distribution's own paths.go has them, and not by our own layout.
    let v2 = "registry/docker/registry/v2";
    let app = format!("{v2}/repositories/team/app");
    let manifest_link = manifest.digest.as_str().as_bytes();
    for (key, bytes) in [
        (
            format!("{v2}/blobs/sha256/{}/{hex}/data", &hex[..2]),
            &manifest.bytes[..],
        ),
        (
            format!("{app}/_layers/sha256/{}/link", layer.hex()),
            layer.as_str().as_bytes(),
        ),
        (
            format!("{app}/_manifests/revisions/sha256/{hex}/link"),
            manifest_link,
        ),
        (
            format!("{app}/_manifests/tags/1.0/current/link"),
            manifest_link,
        ),
        (
            format!("{app}/_manifests/tags/1.0/index/sha256/{hex}/link"),
            manifest_link,
        ),
        // Deleted, or not there yet: a folder without current/link.
        (
            format!("{app}/_manifests/tags/0.9/index/sha256/{hex}/link"),
            manifest_link,
        ),
        (
            format!("{app}/_uploads/0d3f/startedat"),
            b"2024-01-01T00:00:00Z",
        ),
    ] {
        s3.lay(&key, bytes);
    }
    let bucket = reader(&s3).await;
    bucket.probe().await.unwrap();
    let app = repository("team/app");

    let link = bucket.tag(&app, &tag("1.0")).await.unwrap().unwrap();
    assert_eq!(link.digest, manifest.digest);
    let read = bucket.manifest(&app, &link.digest).await.unwrap().unwrap();
    assert_eq!(read.bytes, manifest.bytes);
    assert!(bucket.has_link(&app, &layer).await.unwrap());
    assert_eq!(bucket.blob_size(&layer).await.unwrap(), Some(3 * MIB + 17));
    assert_eq!(read_blob(&bucket, &layer, 0).await.unwrap(), layer_bytes);

    let all = Page {
        after: String::new(),
        limit: 100,
    };
    assert_eq!(bucket.tags(&app, &all).await.unwrap(), [tag("1.0")]);
    let found = bucket.repositories(&all).await.unwrap();
    assert_eq!(found, std::slice::from_ref(&app));

    // Of another repository, and of none.
    let other = repository("team/other");
    assert!(!bucket.has_link(&other, &layer).await.unwrap());
    assert!(
        bucket
            .manifest(&other, &link.digest)
            .await
            .unwrap()
            .is_none()
    );
    assert!(bucket.tag(&app, &tag("0.9")).await.unwrap().is_none());
    let absent = Digest::of(Algorithm::Sha256, b"absent");
    assert_eq!(bucket.blob_size(&absent).await.unwrap(), None);
    assert!(bucket.blob(&absent, 0).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_cold_blob_is_one_request() {
    let s3 = S3::start().await;
    let (digest, wanted) = lay_blob(&s3, 10 * 1024, 1);
    let bucket = reader(&s3).await;
    assert_eq!(read_blob(&bucket, &digest, 0).await.unwrap(), wanted);
    assert_eq!(
        s3.front.take().into_iter().collect::<Vec<_>>(),
        [("GET".to_owned(), 1)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_come_together_from_any_offset() {
    let s3 = S3::start().await;
    let bucket = reader(&s3).await;
    for size in [0, 1, MIB - 1, MIB, MIB + 1, 9 * MIB + 5] {
        let (digest, wanted) = lay_blob(&s3, size, size);
        for offset in [0, 1, MIB, MIB + 1, size / 2, size.saturating_sub(1), size] {
            if offset > size {
                let error = bucket.blob(&digest, offset).await.err().unwrap();
                assert!(matches!(error, BucketError::Wrong { .. }), "{error}");
                continue;
            }
            let mut stream = bucket.blob(&digest, offset).await.unwrap().unwrap();
            assert_eq!(stream.total(), size, "from {offset}");
            let from = usize::try_from(offset).unwrap();
            assert!(
                read(&mut stream).await.unwrap() == wanted[from..],
                "{size} from {offset}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_fault_of_s3_changes_a_byte() {
    let s3 = S3::start().await;
    let (digest, wanted) = lay_blob(&s3, 6 * MIB + 99, 5);
    for fault in [
        Fault::SlowDown,
        Fault::Status(500),
        Fault::BreakAfter(0),
        Fault::BreakAfter(300_001),
        Fault::Hang,
        Fault::HangAfter(300_001),
    ] {
        let bucket = reader(&s3).await;
        // Every range fails the first time it is asked for, the first of all included.
        s3.front.take();
        s3.front.plan(move |asked| {
            let range = asked.range.as_deref()?.strip_prefix("bytes=")?;
            let begin: u64 = range.split_once('-')?.0.parse().ok()?;
            (asked.earlier == 0 && begin.is_multiple_of(MIB)).then_some(fault)
        });
        let read = read_blob(&bucket, &digest, 0).await;
        assert!(read.unwrap() == wanted, "other bytes after {fault:?}");
        let asked = s3.front.count("GET");
        assert!(asked > 7, "{fault:?} did not happen: {asked} requests");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_broke_off_goes_on_where_it_was() {
    let s3 = S3::start().await;
    let bucket = reader(&s3).await;
    let (digest, wanted) = lay_blob(&s3, MIB, 5);
    s3.front
        .plan(|asked| (asked.earlier == 0).then_some(Fault::BreakAfter(400_000)));
    assert!(read_blob(&bucket, &digest, 0).await.unwrap() == wanted);
    let asked = s3.front.asked();
    let ranges: Vec<&str> = asked.iter().filter_map(|it| it.range.as_deref()).collect();
    // How much of what was sent arrives before the break is for the kernel to say.
    let begin = |range: &str| -> u64 {
        let range = range.strip_prefix("bytes=").unwrap();
        range.split_once('-').unwrap().0.parse().unwrap()
    };
    let begins: Vec<u64> = ranges.iter().map(|range| begin(range)).collect();
    assert!(begins.is_sorted() && begins[1] > 0, "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_s3_never_sends_is_an_error_and_not_an_end() {
    let s3 = S3::start().await;
    let bucket = reader(&s3).await;
    let (digest, _) = lay_blob(&s3, 3 * MIB, 5);
    // The last part never comes.
    let last = format!("bytes={}-{}", 2 * MIB, 3 * MIB - 1);
    s3.front
        .plan(move |asked| (asked.range.as_deref() == Some(&last)).then_some(Fault::SlowDown));
    let mut stream = bucket.blob(&digest, 0).await.unwrap().unwrap();
    let error = read(&mut stream)
        .await
        .map(|bytes| bytes.len())
        .unwrap_err();
    assert!(matches!(error, BucketError::Slow { .. }), "{error}");
    assert!(stream.next().await.is_none(), "it ends with its error");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_replaced_while_it_is_read_is_an_error() {
    let s3 = S3::start().await;
    let bucket = reader(&s3).await;
    let (digest, _) = lay_blob(&s3, 20 * MIB, 5);
    let mut stream = bucket.blob(&digest, 0).await.unwrap().unwrap();
    stream.next().await.unwrap().unwrap();
    let key = key(&layout::blob(&digest));
    s3.lay(&key, &bytes(20 * MIB, 6));
    let error = read(&mut stream)
        .await
        .map(|bytes| bytes.len())
        .unwrap_err();
    assert!(matches!(error, BucketError::Changed { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_stand_still_hold_no_more_than_the_memory_and_all_go_on() {
    let s3 = S3::start().await;
    let bucket = reader(&s3).await;
    let mut streams = Vec::new();
    for seed in 0..4 {
        let (digest, wanted) = lay_blob(&s3, 12 * MIB, seed);
        let mut stream = bucket.blob(&digest, 0).await.unwrap().unwrap();
        let first = stream.next().await.unwrap().unwrap();
        streams.push((stream, first.to_vec(), wanted));
    }
    // Nobody reads on: one part of each, and as many more as there is memory.
    let most = 4 + usize::try_from(LIMITS.memory / LIMITS.part).unwrap();
    assert_eq!(s3.front.count("GET"), most);
    // The last first: it has no memory, since those before it took all.
    while let Some((mut stream, mut got, wanted)) = streams.pop() {
        got.extend(read(&mut stream).await.unwrap());
        assert!(got == wanted, "of {} left", streams.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_blob_arrives_by_ranges() {
    let s3 = S3::start().await;
    // Put there by the server itself, which else hashes all of it for every answer.
    let wanted = bytes(24 * MIB, 1);
    let digest = Digest::of(Algorithm::Sha256, &wanted);
    let file = tempfile::NamedTempFile::new().unwrap();
    support::write_file(file.path(), &wanted);
    let writer = writer(&s3).await;
    writer.put_blob(file.path(), &digest).await.unwrap();
    // S3's own shape, at a tenth of its speed.
    s3.front.latency(Duration::from_millis(30));
    s3.front.rate(9_000_000);
    let limits = Limits {
        part: MIB,
        memory: 16 * MIB,
    };
    let bucket = Bucket::open(&settings(&s3), limits).await.unwrap();
    s3.front.take();
    // After the first, which says how large it is, none is answered before another one is asked.
    let (first, together) = (
        AtomicBool::new(true),
        Arc::new((Mutex::default(), Condvar::new())),
    );
    let met = Arc::clone(&together);
    s3.front.plan(move |asked| {
        if asked.operation == "GET" && !first.swap(false, Ordering::Relaxed) {
            // A second request for the same one, which is late, is no other.
            let (ranges, changed): &(Mutex<BTreeSet<_>>, Condvar) = &met;
            tokio::task::block_in_place(|| {
                let mut ranges = ranges.lock().unwrap();
                ranges.insert(asked.range.clone());
                changed.notify_all();
                let alone = |ranges: &mut BTreeSet<_>| ranges.len() < 2;
                let patience = Duration::from_secs(20);
                drop(changed.wait_timeout_while(ranges, patience, alone).unwrap());
            });
        }
        None
    });
    let begun = tokio::time::timeout(Duration::from_secs(15), read_blob(&bucket, &digest, 0));
    assert!(begun.await.expect("ranges at once").unwrap() == wanted);
    let asked = s3.front.asked();
    let ranges: BTreeSet<_> = asked.iter().filter_map(|it| it.range.clone()).collect();
    assert_eq!(ranges.len(), 24, "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_revalidated_by_its_version() {
    let s3 = S3::start().await;
    let writer = writer(&s3).await;
    let app = repository("app");
    let one = Digest::of(Algorithm::Sha256, b"one");
    let two = Digest::of(Algorithm::Sha256, b"two");
    let latest = tag("latest");
    writer.put_tag(&app, &latest, &one, None).await.unwrap();
    let bucket = reader(&s3).await;
    let known = bucket.tag(&app, &latest).await.unwrap().unwrap();
    assert_eq!(known.digest, one);
    let again = bucket.revalidate_tag(&app, &latest, &known.etag).await;
    assert_eq!(again.unwrap(), Tagged::Unchanged);
    writer
        .put_tag(&app, &latest, &two, Some(&known.etag))
        .await
        .unwrap();
    let changed = bucket.revalidate_tag(&app, &latest, &known.etag).await;
    assert!(matches!(changed.unwrap(), Tagged::Changed(link) if link.digest == two));
    writer.remove_tag(&app, &latest).await.unwrap();
    let gone = bucket.revalidate_tag(&app, &latest, &known.etag).await;
    assert_eq!(gone.unwrap(), Tagged::Absent);
    assert_eq!(s3.keys(), [""; 0], "all of the tag is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_of_a_tag_only_one_moves_it() {
    let s3 = S3::start().await;
    let writer = writer(&s3).await;
    let app = repository("app");
    let digests: Vec<Digest> = (0..8u8)
        .map(|n| Digest::of(Algorithm::Sha256, &[n]))
        .collect();
    let latest = tag("latest");
    let first = writer
        .put_tag(&app, &latest, &digests[0], None)
        .await
        .unwrap();
    let new = writer.put_tag(&app, &latest, &digests[1], None).await;
    assert!(matches!(new, Err(BucketError::Conflict { .. })), "{new:?}");
    let moved = writer
        .put_tag(&app, &latest, &digests[2], Some(&first))
        .await
        .unwrap();
    assert_ne!(moved, first);
    let late = writer
        .put_tag(&app, &latest, &digests[3], Some(&first))
        .await;
    assert!(
        matches!(late, Err(BucketError::Conflict { .. })),
        "{late:?}"
    );
    let now = writer.tag(&app, &latest).await.unwrap().unwrap();
    assert_eq!(now.digest, digests[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_conditional_writes_still_takes_tags() {
    for fault in [Fault::Status(501), Fault::NoConditions] {
        let s3 = S3::start().await;
        s3.front.plan(move |asked| {
            let conditional = ["if-match", "if-none-match"];
            let conditional = conditional
                .iter()
                .any(|name| asked.headers.contains_key(*name));
            (conditional && asked.operation == "PUT").then_some(fault)
        });
        let writer = writer(&s3).await;
        let app = repository("app");
        for content in [b"one", b"two"] {
            let digest = Digest::of(Algorithm::Sha256, content);
            // Always as if it were new: nobody is fenced.
            writer
                .put_tag(&app, &tag("latest"), &digest, None)
                .await
                .unwrap();
            let now = writer.tag(&app, &tag("latest")).await.unwrap().unwrap();
            assert_eq!(now.digest, digest, "{fault:?}");
        }
        let probes = s3.keys().into_iter().filter(|key| key.contains("probe"));
        assert_eq!(probes.count(), 0, "the probe is removed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_pulled_and_lies_as_distribution_has_it() {
    let s3 = S3::start().await;
    let writer = writer(&s3).await;
    let folder = tempfile::tempdir().unwrap();
    let app = repository("team/app");
    let mut layers = Vec::new();
    // By one request, and in parts.
    for (size, seed) in [(0, 1), (100, 2), (40 * MIB + 3, 3)] {
        let bytes = bytes(size, seed);
        let digest = Digest::of(Algorithm::Sha256, &bytes);
        let file = folder.path().join(digest.hex());
        support::write_file(&file, &bytes);
        assert!(writer.put_blob(&file, &digest).await.unwrap());
        assert!(
            !writer.put_blob(&file, &digest).await.unwrap(),
            "sent twice"
        );
        writer.link_layer(&app, &digest).await.unwrap();
        assert!(read_blob(&writer, &digest, 0).await.unwrap() == bytes);
        layers.push(digest);
    }
    let manifest = image(&layers[2]);
    writer.put_manifest(&app, &manifest).await.unwrap();
    writer
        .put_tag(&app, &tag("1.0"), &manifest.digest, None)
        .await
        .unwrap();
    let read = writer.manifest(&app, &manifest.digest).await.unwrap();
    assert_eq!(read.unwrap().bytes, manifest.bytes);
    let v2 = "registry/docker/registry/v2";
    let app_folder = format!("{v2}/repositories/team/app");
    let data = |digest: &Digest| {
        let hex = digest.hex();
        format!("{v2}/blobs/sha256/{}/{hex}/data", &hex[..2])
    };
    let mut wanted = vec![
        data(&manifest.digest),
        format!(
            "{app_folder}/_manifests/revisions/sha256/{}/link",
            manifest.digest.hex()
        ),
        format!("{app_folder}/_manifests/tags/1.0/current/link"),
        format!(
            "{app_folder}/_manifests/tags/1.0/index/sha256/{}/link",
            manifest.digest.hex()
        ),
    ];
    for layer in &layers {
        wanted.push(data(layer));
        wanted.push(format!("{app_folder}/_layers/sha256/{}/link", layer.hex()));
    }
    wanted.sort();
    assert_eq!(s3.keys(), wanted);
    let link = std::fs::read(s3.file(&format!("{app_folder}/_manifests/tags/1.0/current/link")));
    assert_eq!(link.unwrap(), manifest.digest.as_str().as_bytes());

    writer
        .remove_manifest(&app, &manifest.digest)
        .await
        .unwrap();
    assert!(
        writer
            .manifest(&app, &manifest.digest)
            .await
            .unwrap()
            .is_none()
    );
    writer.remove_layer(&app, &layers[1]).await.unwrap();
    assert!(!writer.has_link(&app, &layers[1]).await.unwrap());
    writer.remove_blob(&layers[1]).await.unwrap();
    assert_eq!(writer.blob_size(&layers[1]).await.unwrap(), None);
    writer.remove_blob(&layers[1]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_fails_or_is_given_up_is_aborted() {
    let s3 = S3::start().await;
    let writer = writer(&s3).await;
    let folder = tempfile::tempdir().unwrap();
    let bytes = bytes(30 * MIB, 1);
    let digest = Digest::of(Algorithm::Sha256, &bytes);
    let file = folder.path().join("blob");
    support::write_file(&file, &bytes);
    let aborted = || s3.front.count("DELETE") == 1;

    // The third part is refused for good.
    s3.front.plan(|asked| {
        let third = asked.query.contains("partNumber=3");
        third.then_some(Fault::Status(400))
    });
    let error = writer.put_blob(&file, &digest).await.unwrap_err();
    assert!(matches!(error, BucketError::Status { .. }), "{error}");
    assert!(aborted(), "it was not aborted before the error was given");
    assert_eq!(writer.blob_size(&digest).await.unwrap(), None);

    // Nobody waits any longer.
    s3.front.take();
    s3.front
        .plan(|asked| asked.query.contains("partNumber=3").then_some(Fault::Hang));
    {
        let front = Arc::clone(&s3.front);
        let put = writer.put_blob(&file, &digest);
        let reached = async move {
            let third = |it: &server::Asked| it.query.contains("partNumber=3");
            until("the third part", || front.asked().iter().any(third)).await;
        };
        tokio::select! {
            _ = put => panic!("it can't be done"),
            () = reached => {}
        }
    }
    until("the abort", aborted).await;
    assert_eq!(writer.blob_size(&digest).await.unwrap(), None);
}

/// Waits until something holds.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let waited = tokio::time::timeout(support::PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "not in time: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_in_order_whatever_the_page_and_never_walk_the_bucket() {
    let s3 = S3::start().await;
    let link = Digest::of(Algorithm::Sha256, b"x");
    let tricky = [
        "a", "a-b", "a-b/c", "a.b", "a/b", "a/b/c", "a/b-c", "a0", "a_b", "b/a", "b/a-x",
    ];
    for name in tricky {
        let repository = repository(name);
        s3.lay(&key(&layout::revision_link(&repository, &link)), b"x");
        s3.lay(&key(&layout::layer_link(&repository, &link)), b"x");
    }
    let tags = [
        "1.36",
        "1.36-glibc",
        "1.36.1",
        "1",
        "1-x",
        "latest",
        "A",
        "a",
    ];
    let of = repository("a");
    for name in tags {
        s3.lay(
            &key(&layout::tag_link(&of, &tag(name))),
            link.as_str().as_bytes(),
        );
        s3.lay(&key(&layout::tag_index_link(&of, &tag(name), &link)), b"x");
    }
    let bucket = reader(&s3).await;
    let sorted = |names: &[&str]| -> Vec<String> {
        let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        names.sort();
        names
    };
    for limit in [1, 2, 3, 100] {
        let (mut all_tags, mut all_repositories) = (Vec::new(), Vec::new());
        loop {
            let after = all_tags.last().cloned().unwrap_or_default();
            let page = bucket.tags(&of, &Page { after, limit }).await.unwrap();
            if page.is_empty() {
                break;
            }
            all_tags.extend(page.iter().map(|tag| tag.as_str().to_owned()));
        }
        assert_eq!(all_tags, sorted(&tags), "by {limit}");
        loop {
            let after = all_repositories.last().cloned().unwrap_or_default();
            let page = bucket.repositories(&Page { after, limit }).await.unwrap();
            if page.is_empty() {
                break;
            }
            assert!(page.len() <= limit);
            all_repositories.extend(page.iter().map(ToString::to_string));
        }
        assert_eq!(all_repositories, sorted(&tricky), "by {limit}");
    }
    let lists = s3.front.asked();
    let lists = lists.iter().filter(|it| it.operation == "LIST");
    for list in lists {
        let flat = !list.query.contains("delimiter") && !list.query.contains("max-keys=1");
        assert!(!flat, "a flat walk: {}", list.query);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_more_than_one_answer_are_in_order_as_well() {
    let s3 = S3::start().await;
    let of = repository("many");
    let link = Digest::of(Algorithm::Sha256, b"x");
    // More than the thousand of one answer, which ends in the middle of what is after `v` and `v1`
    // by its key, and before them by... the other way round by its name.
    let mut names: Vec<String> = (0..1100).map(|n| format!("v1-{n:04}")).collect();
    names.extend(["v".to_owned(), "v1".to_owned(), "v1.0".to_owned()]);
    for name in &names {
        s3.lay(
            &key(&layout::tag_link(&of, &tag(name))),
            link.as_str().as_bytes(),
        );
    }
    names.sort();
    let bucket = reader(&s3).await;
    let (mut all, limit) = (Vec::new(), 400);
    loop {
        let after = all.last().cloned().unwrap_or_default();
        let page = bucket.tags(&of, &Page { after, limit }).await.unwrap();
        if page.is_empty() {
            break;
        }
        all.extend(page.iter().map(|tag| tag.as_str().to_owned()));
    }
    assert_eq!(all, names);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tags_take_few_requests_and_one_that_has_ended_is_none() {
    let s3 = S3::start().await;
    let link = Digest::of(Algorithm::Sha256, b"x");
    let lay = |of: &Repository, name: &str, manifests: u32| {
        let current = key(&layout::tag_link(of, &tag(name)));
        s3.lay(&current, link.as_str().as_bytes());
        for number in 0..manifests {
            let was = Digest::of(Algorithm::Sha256, &number.to_le_bytes());
            s3.lay(&key(&layout::tag_index_link(of, &tag(name), &was)), b"x");
        }
    };
    // Tags of one manifest each, and tags each of which was many.
    let (young, old) = (repository("young"), repository("old"));
    let names = |count: u32| -> Vec<String> { (0..count).map(|n| format!("v{n:03}")).collect() };
    for name in names(600) {
        lay(&young, &name, 1);
    }
    for name in names(40) {
        lay(&old, &name, 60);
    }
    let bucket = reader(&s3).await;
    // The folders, and then the keys, a thousand by a thousand: of the old ones that is the first 17
    // and the one that has ended, and each of the other 23 is asked for.
    for (of, count, lists, heads) in [(&young, 600, 1 + 2, 0), (&old, 40, 1 + 1, 23)] {
        // Deleted, but not all of it.
        let ended = layout::tag_index_link(of, &tag("v007x"), &link);
        s3.lay(&key(&ended), b"x");
        s3.front.take();
        let (after, limit) = (String::new(), 10_000);
        let tags = bucket.tags(of, &Page { after, limit }).await.unwrap();
        let tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        assert_eq!(tags, names(count));
        let asked = s3.front.take();
        let asked = ["LIST", "HEAD"].map(|it| asked.get(it).copied().unwrap_or_default());
        assert_eq!(asked, [lists, heads], "{of}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_to_list_what_is_not_there_is_not_there() {
    let s3 = S3::start().await;
    s3.front.no_list();
    let (digest, wanted) = lay_blob(&s3, 100, 1);
    let bucket = reader(&s3).await;
    let app = repository("app");
    let absent = Digest::of(Algorithm::Sha256, b"absent");
    assert!(bucket.tag(&app, &tag("latest")).await.unwrap().is_none());
    assert!(bucket.manifest(&app, &absent).await.unwrap().is_none());
    assert!(!bucket.has_link(&app, &absent).await.unwrap());
    assert_eq!(bucket.blob_size(&absent).await.unwrap(), None);
    assert!(bucket.blob(&absent, 0).await.unwrap().is_none());
    assert_eq!(read_blob(&bucket, &digest, 0).await.unwrap(), wanted);
    let all = Page {
        after: String::new(),
        limit: 10,
    };
    let error = bucket.tags(&app, &all).await.unwrap_err();
    assert!(error.to_string().contains("s3:ListBucket"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_what_to_do_and_no_secret() {
    let s3 = S3::start().await;
    let digest = Digest::of(Algorithm::Sha256, b"x");
    let ask = async |settings: &S3Settings| {
        let bucket = Bucket::open(settings, LIMITS).await.unwrap();
        let error = bucket.blob(&digest, 0).await.err().unwrap();
        let seen = format!("{error} {error:?} {settings:?} {bucket:?}");
        assert!(!seen.contains(SECRET_KEY), "{seen}");
        (error.to_string(), error)
    };

    let mut wrong = settings(&s3);
    wrong.bucket = "another".to_owned();
    let bucket = Bucket::open(&wrong, LIMITS).await.unwrap();
    let error = bucket.probe().await.unwrap_err();
    assert!(matches!(error, BucketError::NoBucket(_)), "{error:?}");

    let mut wrong = settings(&s3);
    wrong.keys.as_mut().unwrap().secret = Secret::new("another");
    let (text, error) = ask(&wrong).await;
    assert!(matches!(error, BucketError::Denied { .. }), "{error:?}");
    assert!(text.contains("credentials are not accepted"), "{text}");

    s3.front.plan(|_| Some(Fault::Elsewhere));
    let (text, error) = ask(&settings(&s3)).await;
    assert!(
        matches!(error, BucketError::WrongRegion { .. }),
        "{error:?}"
    );
    assert!(
        text.contains("set storage.s3.region to ap-southeast-2"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_are_keys_of_their_own() {
    let s3 = S3::start().await;
    let writer = writer(&s3).await;
    let app = repository("app");
    let subject = Digest::of(Algorithm::Sha256, b"subject");
    assert_eq!(writer.referrers(&app, &subject).await.unwrap().len(), 0);
    let mut wanted = Vec::new();
    for n in 0..5u8 {
        let referrer = Digest::of(Algorithm::Sha256, &[n]);
        let descriptor = serde_json::json!({ "digest": referrer.as_str(), "size": n });
        writer
            .put_referrer(&app, &subject, &referrer, &descriptor)
            .await
            .unwrap();
        wanted.push((referrer, descriptor));
    }
    wanted.sort_by(|one, other| one.0.cmp(&other.0));
    let removed = wanted.remove(2).0;
    writer
        .remove_referrer(&app, &subject, &removed)
        .await
        .unwrap();
    let read = writer.referrers(&app, &subject).await.unwrap();
    let wanted: Vec<_> = wanted
        .into_iter()
        .map(|(_, descriptor)| descriptor)
        .collect();
    assert_eq!(read, wanted);
    // It does not make it a repository.
    let all = Page {
        after: String::new(),
        limit: 10,
    };
    assert_eq!(writer.repositories(&all).await.unwrap().len(), 0);
}
