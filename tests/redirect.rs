//! `storage.s3.redirect`: clients get blobs from S3 itself, by URLs that are good for a while.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/cloud.rs"]
mod cloud;
#[path = "support/s3.rs"]
mod server;
mod support;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_sdk_s3::config::{BehaviorVersion, Region};
use aws_sdk_s3::presigning::PresigningConfig;
use cloud::Cloud;
use server::{ACCESS_KEY, BUCKET, SECRET_KEY};
use support::agent::{Agent, Setup};
use support::client::{Client, Reply};
use support::image::{Image, MIB};
use url::Url;

const NAME: &str = "mycompany/app";

fn target(digest: &str) -> String {
    format!("/v2/{NAME}/blobs/{digest}")
}

fn redirecting(setup: Setup) -> Setup {
    setup.set("storage.s3.redirect", true)
}

/// What a URL says for a key of its query.
fn said(url: &str, key: &str) -> Option<String> {
    let url = Url::parse(url).unwrap();
    let mut pairs = url.query_pairs();
    pairs.find_map(|(name, value)| (name == key).then(|| value.into_owned()))
}

/// Asks where a client is sent as the client does: with what is after the host.
fn follow(url: &str, headers: &[(&str, &str)]) -> Reply {
    let url = Url::parse(url).unwrap();
    let ip: Ipv4Addr = url.host_str().unwrap().parse().unwrap();
    let client = Client::Tcp(SocketAddr::from((ip, url.port().unwrap())));
    let target = format!("{}?{}", url.path(), url.query().unwrap());
    let host = url.authority();
    let mut request = client.request("GET", &target).header("Host", host);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    request.send()
}

#[track_caller]
fn sent_to(agent: &Agent, digest: &str) -> String {
    let reply = agent.get(&target(digest));
    assert_eq!(reply.status, 307, "{reply:?}");
    assert_eq!(reply.header("docker-content-digest"), Some(digest));
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    assert_eq!(reply.body, b"");
    reply.header("location").unwrap().to_owned()
}

#[test]
fn a_client_gets_a_blob_from_s3_itself() {
    let cloud = Cloud::start();
    let (image, other) = (Image::new(1, &[3 * MIB]), Image::small(2));
    cloud.push(NAME, "v1", &image);
    cloud.push("mycompany/other", "v1", &other);
    let setup = redirecting(cloud.reader()).set("log.level", "debug");
    let agent = setup.start();
    let layer = image.layer();
    let url = sent_to(&agent, &layer.digest);
    let place = format!(
        "http://{}/{BUCKET}/docker/registry/v2/blobs/",
        cloud.s3.address
    );
    assert!(url.starts_with(&place), "{url}");
    assert_eq!(said(&url, "X-Amz-Expires").as_deref(), Some("1200"));
    follow(&url, &[]).assert_is(&layer.bytes);
    let part = follow(&url, &[("Range", "bytes=10-19")]);
    assert_eq!((part.status, &part.body[..]), (206, &layer.bytes[10..20]));
    // It is good for this blob alone, and to read it.
    let hex = |digest: &str| digest.split_once(':').unwrap().1.to_owned();
    let theirs = hex(&other.layer().digest);
    let path = format!("/{}/{theirs}/", &theirs[..2]);
    let ours = hex(&layer.digest);
    let another = url.replace(&format!("/{}/{ours}/", &ours[..2]), &path);
    assert_ne!(another, url);
    assert_eq!(follow(&another, &[]).status, 403);
    // What the client needs no blob for is answered here, and so is who may not have it.
    let head = agent.head(&target(&layer.digest));
    assert_eq!(head.status, 200);
    assert_eq!(
        head.header("content-length"),
        Some(&*layer.len().to_string())
    );
    let manifest = agent.get(&format!("/v2/{NAME}/manifests/v1"));
    manifest.assert_is(&image.manifest.blob.bytes);
    let known = format!("\"{}\"", layer.digest);
    let unchanged = agent.request("GET", &target(&layer.digest));
    let unchanged = unchanged.header("If-None-Match", &known).send();
    assert_eq!(unchanged.status, 304);
    let foreign = agent.get(&target(&other.layer().digest));
    foreign.assert_error(404, "BLOB_UNKNOWN");
    let log = agent.log();
    assert!(
        log.contains(&layer.digest),
        "a log that says nothing proves nothing: {log}"
    );
    let signature = said(&url, "X-Amz-Signature").unwrap();
    for secret in [SECRET_KEY, "X-Amz-", &signature] {
        assert!(!log.contains(secret), "{secret} is in the log: {log}");
    }
}

#[test]
fn what_is_on_the_disk_is_served_from_there() {
    let cloud = Cloud::start();
    let (agent, image) = (redirecting(cloud.writer()).start(), Image::small(1));
    agent.push(NAME, "v1", &image);
    let layer = image.layer();
    cloud.s3.front.take();
    agent.get(&target(&layer.digest)).assert_is(&layer.bytes);
    assert_eq!(cloud.s3.front.take().get("GET"), None);
    let reader = redirecting(cloud.reader()).start();
    follow(&sent_to(&reader, &layer.digest), &[]).assert_is(&layer.bytes);
    // And without redirects a reader keeps what it has fetched.
    let plain = cloud.reader().start();
    plain.get(&target(&layer.digest)).assert_is(&layer.bytes);
}

/// Gives temporary credentials, as a task's role has them, that end so soon.
fn role_for(seconds: u64) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let end = SystemTime::now() + Duration::from_secs(seconds);
    let end = humantime::format_rfc3339_seconds(end);
    let body = format!(
        r#"{{"AccessKeyId":"{ACCESS_KEY}","SecretAccessKey":"{SECRET_KEY}","Token":"of-the-role","Expiration":"{end}"}}"#
    );
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    // It ends with the process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 4096];
            if stream.read(&mut head).is_ok_and(|read| read > 0) {
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    address
}

#[test]
fn a_url_is_good_no_longer_than_the_credentials_it_is_signed_by() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push(NAME, "v1", &image);
    let of_role = |seconds| {
        let role = format!("http://{}/credentials", role_for(seconds));
        let setup = redirecting(cloud.reader());
        let setup = setup.environment("AWS_ACCESS_KEY_ID", "");
        let setup = setup.environment("AWS_SECRET_ACCESS_KEY", "");
        setup
            .environment("AWS_CONTAINER_CREDENTIALS_FULL_URI", &role)
            .start()
    };
    let layer = image.layer();
    let agent = of_role(300);
    let url = sent_to(&agent, &layer.digest);
    let good: u64 = said(&url, "X-Amz-Expires").unwrap().parse().unwrap();
    assert!((200..=300).contains(&good), "{url}");
    assert_eq!(
        said(&url, "X-Amz-Security-Token").as_deref(),
        Some("of-the-role")
    );
    follow(&url, &[]).assert_is(&layer.bytes);
    assert!(!agent.log().contains("of-the-role"));
    // It would end before a client has come to it.
    let agent = of_role(45);
    agent.get(&target(&layer.digest)).assert_is(&layer.bytes);
}

#[test]
fn the_store_takes_no_url_that_has_expired() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push(NAME, "v1", &image);
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .endpoint_url(format!("http://{}", cloud.s3.address))
        .force_path_style(true)
        .credentials_provider(Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "test"))
        .build();
    let client = aws_sdk_s3::Client::from_conf(config);
    let key = cloud
        .s3
        .keys()
        .into_iter()
        .find(|key| key.ends_with("/data"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let signed_at = |at: SystemTime| {
        let config = PresigningConfig::builder();
        let config = config.start_time(at).expires_in(Duration::from_mins(20));
        let request = client.get_object().bucket(BUCKET).key(key.clone().unwrap());
        let signed = request.presigned(config.build().unwrap());
        runtime.block_on(signed).unwrap().uri().to_owned()
    };
    let now = SystemTime::now();
    assert_eq!(follow(&signed_at(now), &[]).status, 200);
    let old = follow(&signed_at(now - Duration::from_mins(21)), &[]);
    assert_eq!(old.status, 403, "{old:?}");
}
