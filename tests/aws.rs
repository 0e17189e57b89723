//! How a bucket is reached as AWS has it: credentials by every way of the chain and their renewal,
//! the region, TLS with an authority of one's own, and a role that may list below a prefix alone.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

#[path = "support/cloud.rs"]
mod cloud;
#[path = "support/s3.rs"]
mod server;
mod support;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use cloud::Cloud;
use registry_agent::config::{AccessKeys, S3Settings, Secret};
use registry_agent::store::s3::{Limits, Writer};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use server::{ACCESS_KEY, BUCKET, Fault, NEXT_ACCESS_KEY, NEXT_SECRET_KEY, SECRET_KEY, signer};
use support::agent::{Agent, Setup};
use support::image::{Image, KIB, MIB};
use support::responder::{Answer, Asked, Responder, answer};
use support::upstream::Authority;
use support::{PATIENCE, eventually};

const NAME: &str = "team/app";
const HOUR: Duration = Duration::from_hours(1);

/// What a role's credentials are, as the metadata service and STS say them.
#[derive(Clone)]
struct Keys {
    id: &'static str,
    secret: &'static str,
    good: Duration,
}

const FIRST: Keys = Keys {
    id: ACCESS_KEY,
    secret: SECRET_KEY,
    good: HOUR,
};
const NEXT: Keys = Keys {
    id: NEXT_ACCESS_KEY,
    secret: NEXT_SECRET_KEY,
    good: HOUR,
};

fn expiration(keys: &Keys) -> String {
    humantime::format_rfc3339_seconds(SystemTime::now() + keys.good).to_string()
}

/// The instance metadata service, version 2 alone: AWS, "Retrieve instance metadata".
fn metadata(asked: &Asked, keys: &Keys) -> Answer {
    let ttl = "x-aws-ec2-metadata-token-ttl-seconds";
    if asked.method == "PUT" && asked.target == "/latest/api/token" {
        let Some(seconds) = asked.header(ttl) else {
            return answer(400, "");
        };
        let header = (ttl.to_owned(), seconds.to_owned());
        return (200, vec![header], "a-token".to_owned());
    }
    if asked.header("x-aws-ec2-metadata-token") != Some("a-token") {
        return answer(401, "");
    }
    let path = asked.target.strip_prefix("/latest/meta-data/");
    match path.map(|path| path.trim_end_matches('/')) {
        Some("placement/region") => answer(200, "eu-west-9"),
        Some("iam/security-credentials") => answer(200, "mirror-role"),
        Some("iam/security-credentials/mirror-role") => answer(
            200,
            json!({
                "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2024-01-01T00:00:00Z",
                "AccessKeyId": keys.id, "SecretAccessKey": keys.secret, "Token": "a-session",
                "Expiration": expiration(keys),
            })
            .to_string(),
        ),
        _ => answer(404, ""),
    }
}

/// A metadata service whose role has these keys now.
fn imds(keys: &Keys) -> (Responder, Arc<Mutex<Keys>>) {
    let keys = Arc::new(Mutex::new(keys.clone()));
    let now = Arc::clone(&keys);
    let service = Responder::start(move |asked| metadata(asked, &now.lock().unwrap()));
    (service, keys)
}

/// A reader that asks the bucket for every tag, and finds its credentials at the metadata service.
fn on_an_instance(cloud: &Cloud, imds: &Responder) -> Setup {
    cloud
        .without_keys("reader")
        .set("freshness.window", "0s")
        .environment("AWS_EC2_METADATA_SERVICE_ENDPOINT", &imds.url())
}

fn tag(agent: &Agent, tag: &str) -> u16 {
    let reply = agent.get(&format!("/v2/{NAME}/manifests/{tag}"));
    // One that is stale was not confirmed by the bucket.
    if reply.header("warning").is_some() {
        return 0;
    }
    reply.status
}

/// The regions that requests to the bucket were signed for.
fn regions(cloud: &Cloud) -> Vec<String> {
    let asked = cloud.s3.front.asked();
    let signed = asked.iter().filter(|it| !it.key.is_empty()).map(|it| {
        let signed = it.headers.get("authorization").unwrap().to_str().unwrap();
        signed.split('/').nth(2).unwrap().to_owned()
    });
    let mut found: Vec<String> = signed.collect();
    found.dedup();
    found
}

#[test]
fn an_instance_role_gives_credentials_and_the_region() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push(NAME, "v1", &image);
    let (imds, _) = imds(&FIRST);
    let setup = on_an_instance(&cloud, &imds);
    let agent = setup.set("storage.s3.region", Value::Null).start();
    agent.pull(NAME, "v1", &image);
    assert_eq!(cloud.s3.front.signers(), [ACCESS_KEY]);
    assert_eq!(regions(&cloud), ["eu-west-9"]);
    let asked = cloud.s3.front.asked();
    let session = asked[0].headers.get("x-amz-security-token").unwrap();
    assert_eq!(session, "a-session");
    // By version 2 alone: nothing was asked without a token.
    let tokens = imds.asked().into_iter().filter(|it| it.method == "GET");
    let tokens: Vec<bool> = tokens
        .map(|it| it.header("x-aws-ec2-metadata-token").is_some())
        .collect();
    assert!(tokens.len() >= 3 && tokens.iter().all(|it| *it));
    for secret in [SECRET_KEY, "a-session", "a-token"] {
        assert!(!agent.log().contains(secret), "{}", agent.log());
    }
}

#[test]
fn what_expires_is_replaced_before_and_no_request_fails() {
    let cloud = Cloud::start();
    cloud.push(NAME, "v1", &Image::small(1));
    // Not signed with in its last ten seconds.
    let soon = Keys {
        good: Duration::from_secs(13),
        ..FIRST
    };
    let (imds, now) = imds(&soon);
    let agent = on_an_instance(&cloud, &imds).start();
    assert_eq!(tag(&agent, "v1"), 200);
    *now.lock().unwrap() = NEXT;
    eventually(PATIENCE, "the next ones are used", || {
        assert_eq!(tag(&agent, "v1"), 200);
        cloud
            .s3
            .front
            .signers()
            .contains(&NEXT_ACCESS_KEY.to_owned())
    });
    assert_eq!(cloud.s3.front.signers(), [ACCESS_KEY, NEXT_ACCESS_KEY]);
}

#[test]
fn credentials_that_s3_takes_for_expired_are_replaced() {
    let cloud = Cloud::start();
    let images = [Image::new(1, &[9 * MIB]), Image::new(2, &[9 * MIB])];
    cloud.push(NAME, "v1", &images[0]);
    cloud.push(NAME, "v2", &images[1]);
    let (imds, now) = imds(&FIRST);
    let agent = on_an_instance(&cloud, &imds).start();
    agent.pull(NAME, "v1", &images[0]);
    // They have hours to go by their date.
    *now.lock().unwrap() = NEXT;
    cloud.s3.front.plan(|asked| {
        let first = signer(&asked.headers) == ACCESS_KEY;
        first.then_some(Fault::Expired)
    });
    // Those that are seconds old are not given up.
    eventually(PATIENCE, "the next ones are used", || {
        tag(&agent, "v2") == 200
    });
    agent.pull(NAME, "v2", &images[1]);
    let log = agent.log();
    assert!(
        log.contains("takes the AWS credentials for expired"),
        "{log}"
    );
}

#[test]
fn an_expiry_is_noticed_by_a_blob_as_well() {
    let cloud = Cloud::start();
    let image = Image::new(1, &[20 * MIB]);
    cloud.push(NAME, "v1", &image);
    let (imds, now) = imds(&FIRST);
    let agent = on_an_instance(&cloud, &imds).start();
    assert_eq!(tag(&agent, "v1"), 200);
    *now.lock().unwrap() = NEXT;
    // Nothing but its ranges is refused.
    let data = image.layer().digest.split_once(':').unwrap().1.to_owned();
    cloud.s3.front.plan(move |asked| {
        let first = signer(&asked.headers) == ACCESS_KEY;
        (first && asked.key.contains(&format!("{data}/data"))).then_some(Fault::Expired)
    });
    let target = format!("/v2/{NAME}/blobs/{}", image.layer().digest);
    eventually(PATIENCE, "the blob", || {
        let reply = agent.get(&target);
        reply.status == 200 && reply.complete && reply.body == image.layer().bytes
    });
}

#[test]
fn a_metadata_service_that_is_away_is_not_noticed_while_credentials_are_good() {
    let cloud = Cloud::start();
    cloud.push(NAME, "v1", &Image::small(1));
    let away = Arc::new(AtomicBool::new(false));
    let is_away = Arc::clone(&away);
    // Every request has new ones asked for, as often as that may be.
    let soon = Keys {
        good: Duration::from_mins(5),
        ..FIRST
    };
    let imds = Responder::start(move |asked| {
        if is_away.load(Ordering::SeqCst) {
            return answer(503, "");
        }
        metadata(asked, &soon)
    });
    let agent = on_an_instance(&cloud, &imds).start();
    assert_eq!(tag(&agent, "v1"), 200);
    away.store(true, Ordering::SeqCst);
    for _ in 0..20 {
        assert_eq!(tag(&agent, "v1"), 200);
    }
}

#[test]
fn a_profile_gives_credentials_and_the_region() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push(NAME, "v1", &image);
    let setup = cloud
        .without_keys("reader")
        .set("storage.s3.region", Value::Null);
    let text = format!(
        "[default]\naws_access_key_id = wrong\naws_secret_access_key = wrong\n[team]\n\
         aws_access_key_id = {NEXT_ACCESS_KEY}\naws_secret_access_key = {NEXT_SECRET_KEY}\n"
    );
    let credentials = setup.file("credentials", text.as_bytes());
    let config = setup.file("config", b"[profile team]\nregion = eu-north-9\n");
    let agent = setup
        .environment("AWS_SHARED_CREDENTIALS_FILE", credentials.to_str().unwrap())
        .environment("AWS_CONFIG_FILE", config.to_str().unwrap())
        .environment("AWS_PROFILE", "team")
        .environment("AWS_EC2_METADATA_DISABLED", "true")
        .start();
    agent.pull(NAME, "v1", &image);
    assert_eq!(cloud.s3.front.signers(), [NEXT_ACCESS_KEY]);
    assert_eq!(regions(&cloud), ["eu-north-9"]);
}

#[test]
fn a_web_identity_is_exchanged_for_credentials() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push(NAME, "v1", &image);
    let sts = Responder::start(|asked| {
        let is = |part: &str| asked.body.contains(part);
        if !is("Action=AssumeRoleWithWebIdentity") || !is("WebIdentityToken=from-the-cluster") {
            return answer(400, "");
        }
        answer(
            200,
            format!(
                "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
                 <AssumeRoleWithWebIdentityResult><Credentials>\
                 <AccessKeyId>{NEXT_ACCESS_KEY}</AccessKeyId>\
                 <SecretAccessKey>{NEXT_SECRET_KEY}</SecretAccessKey>\
                 <SessionToken>a-session</SessionToken><Expiration>{}</Expiration>\
                 </Credentials></AssumeRoleWithWebIdentityResult>\
                 </AssumeRoleWithWebIdentityResponse>",
                expiration(&NEXT)
            ),
        )
    });
    let setup = cloud.without_keys("reader");
    let token = setup.file("token", b"from-the-cluster");
    let agent = setup
        .environment("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap())
        .environment("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
        .environment("AWS_ENDPOINT_URL_STS", &sts.url())
        .environment("AWS_EC2_METADATA_DISABLED", "true")
        .start();
    agent.pull(NAME, "v1", &image);
    assert_eq!(cloud.s3.front.signers(), [NEXT_ACCESS_KEY]);
    assert!(!agent.log().contains("from-the-cluster"), "{}", agent.log());
}

#[test]
fn a_bucket_says_itself_in_which_region_it_is() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push(NAME, "v1", &image);
    cloud.s3.front.plan(|asked| {
        let of_the_bucket = asked.operation == "HEAD" && asked.key.is_empty();
        of_the_bucket.then_some(Fault::Elsewhere)
    });
    // Neither the configuration nor the host says one, or the host says another.
    for host in [None, Some("eu-west-9")] {
        cloud.s3.front.take();
        let mut setup = cloud.reader().set("storage.s3.region", Value::Null);
        if let Some(region) = host {
            setup = setup.environment("AWS_REGION", region);
        }
        let agent = setup.start();
        agent.pull(NAME, "v1", &image);
        assert_eq!(regions(&cloud), ["ap-southeast-2"], "{host:?}");
        let asked = cloud.s3.front.asked();
        let looks = asked
            .iter()
            .filter(|it| it.key.is_empty() && it.operation == "HEAD");
        assert_eq!(looks.count(), 1, "{host:?}");
    }
}

#[test]
fn s3_by_tls_is_trusted_by_the_systems_authorities_or_those_of_ssl_cert_file() {
    let authority = Authority::new();
    let issued = authority.issue(&["127.0.0.1"], 2999);
    let chain = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let cloud = Cloud::start_with(Some(Arc::new(tls)));
    let image = Image::new(1, &[10 * KIB, 9 * MIB]);
    cloud.push(NAME, "v1", &image);
    let endpoint = format!("https://{}", cloud.s3.address);
    let setup = cloud.reader().set("storage.s3.endpoint", endpoint.clone());
    let file = setup.folder().join("ca.pem");
    authority.write(&file);
    let agent = setup
        .environment("SSL_CERT_FILE", file.to_str().unwrap())
        .start();
    agent.pull(NAME, "v1", &image);
    // An authority that nobody has named is not trusted.
    let other = cloud.reader().set("storage.s3.endpoint", endpoint);
    let strange = Authority::new();
    let file = other.folder().join("ca.pem");
    strange.write(&file);
    let agent = other
        .environment("SSL_CERT_FILE", file.to_str().unwrap())
        .start();
    let reply = agent.get(&format!("/v2/{NAME}/manifests/v1"));
    assert!(reply.status >= 500, "{reply:?}");
    assert!(agent.log().contains("certificate"), "{}", agent.log());
}

#[test]
fn a_role_that_may_list_below_its_prefix_alone_reads_all_of_it() {
    let cloud = Cloud::start();
    let image = Image::small(1);
    cloud.push(NAME, "v1", &image);
    let below = cloud.s3.file("team/docker");
    std::fs::create_dir(below.parent().unwrap()).unwrap();
    std::fs::rename(cloud.s3.file("docker"), below).unwrap();
    // As the policy of this prefix says it.
    let printed = Command::new(env!("CARGO_BIN_EXE_registry-agent"))
        .args([
            "generate",
            "iam-policy",
            "--role",
            "reader",
            "--bucket",
            BUCKET,
        ])
        .args(["--prefix", "team"])
        .output()
        .unwrap();
    let policy: Value = serde_json::from_slice(&printed.stdout).unwrap();
    let listed = &policy["Statement"][1]["Condition"]["StringLike"]["s3:prefix"][0];
    let listed = listed.as_str().unwrap().strip_suffix('*').unwrap();
    cloud.s3.front.list_only(listed);

    let agent = cloud.reader().set("storage.s3.prefix", "team").start();
    agent.pull(NAME, "v1", &image);
    assert_eq!(tag(&agent, "absent"), 404);
    let absent = Image::small(2);
    for target in [
        format!("/v2/{NAME}/blobs/{}", absent.layer().digest),
        format!("/v2/{NAME}/manifests/{}", absent.digest()),
    ] {
        assert_eq!(agent.get(&target).status, 404, "{target}");
    }
    let tags = agent.get(&format!("/v2/{NAME}/tags/list")).json();
    assert_eq!(tags["tags"], json!(["v1"]));
    let catalog = agent.get("/v2/_catalog").json();
    assert_eq!(catalog["repositories"], json!([NAME]));
    // No right is missing, and none is said to be.
    assert!(!agent.log().contains("lacks"), "{}", agent.log());

    // What is there and may not be read is no 404.
    let link = format!("{NAME}/_manifests/tags/v1/current/link");
    cloud.s3.front.plan(move |asked| {
        let refused = asked.operation == "GET" && asked.key.ends_with(&link);
        refused.then_some(Fault::Status(403))
    });
    let fresh = cloud.reader().set("storage.s3.prefix", "team").start();
    assert!(fresh.get(&format!("/v2/{NAME}/manifests/v1")).status >= 500);
    // What is logged is written by another thread.
    eventually(PATIENCE, "the log names the right", || {
        fresh.log().contains("needs s3:GetObject")
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_nobody_ended_are_aborted_by_their_age() {
    let of = |name: &str| format!("registry/docker/registry/v2/blobs/sha256/ab/{name}/data");
    let page = move |uploads: &[(String, &str, &str)], more: bool| {
        let of = |(key, id, begun): &(String, &str, &str)| {
            format!(
                "<Upload><Key>{key}</Key><UploadId>{id}</UploadId>\
                 <Initiated>{begun}</Initiated></Upload>"
            )
        };
        let uploads = uploads.iter().map(of).collect::<Vec<_>>().concat();
        let next = "<NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>u</NextUploadIdMarker>";
        answer(
            200,
            format!(
                "<ListMultipartUploadsResult><Bucket>{BUCKET}</Bucket>{}\
                 <IsTruncated>{more}</IsTruncated>{uploads}</ListMultipartUploadsResult>",
                if more { next } else { "" }
            ),
        )
    };
    let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let old = "2024-01-01T00:00:00.000Z";
    let store = Responder::start(move |asked| {
        if asked.method == "DELETE" {
            return answer(204, "");
        }
        let elsewhere = "registry/somebody/elses".to_owned();
        match asked.target.as_str() {
            target if !target.contains("uploads") || target.contains("sha512") => page(&[], false),
            target if target.contains("key-marker=k") && target.contains("upload-id-marker=u") => {
                page(
                    &[
                        (of("young"), "2", now.as_str()),
                        (elsewhere, "3", old),
                        (of("last"), "4", old),
                    ],
                    false,
                )
            }
            _ => page(&[(of("first"), "1", old)], true),
        }
    });
    let settings = S3Settings {
        bucket: BUCKET.to_owned(),
        region: Some("us-east-1".to_owned()),
        prefix: "registry".to_owned(),
        endpoint: Some(store.url().parse().unwrap()),
        path_style: true,
        redirect: false,
        storage_class: None,
        encryption: None,
        keys: Some(AccessKeys {
            id: ACCESS_KEY.to_owned(),
            secret: Secret::new(SECRET_KEY),
        }),
    };
    let writer = Writer::open(&settings, Limits::default()).await.unwrap();
    assert_eq!(writer.stale_uploads(HOUR, false).await.unwrap(), 2);
    let asked = store.asked();
    let aborted = asked.iter().filter(|it| it.method == "DELETE");
    let aborted: Vec<&str> = aborted
        .map(|it| it.target.split("uploadId=").nth(1).unwrap())
        .collect();
    assert_eq!(aborted, ["1", "4"]);
}
