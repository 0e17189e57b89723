//! The policies that `generate iam-policy` prints, enforced by moto: the agent does all its work with
//! them, nothing else is allowed by them, and there is no action in one that it could do without.
//!
//! moto does not look at conditions (`s3:prefix`): those are for tests/s3.rs and tests/aws.rs.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

mod support;

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};

use aws_sdk_s3::Client as S3Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::primitives::ByteStream;
use serde_json::{Value, json};
use support::agent::{Agent, Setup};
use support::client::Client;
use support::cloud_tools;
use support::image::{Image, KIB, MIB};
use support::{PATIENCE, eventually};
use tokio::runtime::Runtime;

const NAME: &str = "mycompany/app";
const V2: &str = "docker/registry/v2";

/// moto in server mode; it ends with this.
struct Moto {
    process: Child,
    address: SocketAddr,
    runtime: Runtime,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An account's user, and its access key.
struct User {
    id: String,
    secret: String,
}

impl Moto {
    fn start() -> Self {
        // The port is taken a moment later by another process, which binds no other.
        let address = support::own_address();
        let free = TcpListener::bind((address, 0)).unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let process = Command::new(cloud_tools::python())
            .args(["-m", "moto.server", "--host", &address.ip().to_string()])
            .args(["--port", &address.port().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("moto");
        let moto = Self {
            process,
            address,
            runtime: Runtime::new().unwrap(),
        };
        eventually(PATIENCE, "moto answers", || {
            let asked = Client::Tcp(address).request("GET", "/moto-api/");
            asked.try_open().is_ok_and(|answer| answer.status == 200)
        });
        moto
    }

    /// From now on nothing is allowed that no policy allows.
    fn enforce(&self) {
        let reset = Client::Tcp(self.address).request("POST", "/moto-api/reset-auth");
        let reset = reset.header("Content-Type", "text/plain").body(b"0").send();
        assert_eq!(reset.status, 200, "{reset:?}");
    }

    /// Calls IAM as an account that may do everything, which is before anything is enforced.
    fn iam(&self, parameters: &[(&str, &str)]) -> String {
        let encode = |text: &str| {
            percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC)
                .to_string()
        };
        let mut form = "Version=2010-05-08".to_owned();
        for (name, value) in parameters {
            form.extend(["&", name, "=", &encode(value)]);
        }
        let reply = Client::Tcp(self.address)
            .request("POST", "/")
            .header("Content-Type", "application/x-www-form-urlencoded")
            .header(
                "Authorization",
                "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/iam/aws4_request, \
                 SignedHeaders=host, Signature=none",
            )
            .body(form.as_bytes())
            .send();
        let text = String::from_utf8(reply.body).unwrap();
        assert_eq!(reply.status, 200, "{text}");
        text
    }

    /// A user who may do what a policy says.
    fn user(&self, name: &str, policy: &Value) -> User {
        self.iam(&[("Action", "CreateUser"), ("UserName", name)]);
        self.iam(&[
            ("Action", "PutUserPolicy"),
            ("UserName", name),
            ("PolicyName", "only"),
            ("PolicyDocument", &policy.to_string()),
        ]);
        let key = self.iam(&[("Action", "CreateAccessKey"), ("UserName", name)]);
        let within = |tag: &str| {
            let (_, rest) = key.split_once(&format!("<{tag}>")).expect("an access key");
            rest.split_once('<').unwrap().0.to_owned()
        };
        User {
            id: within("AccessKeyId"),
            secret: within("SecretAccessKey"),
        }
    }

    /// A user who may do everything with S3.
    fn owner(&self) -> User {
        let all = json!({ "Effect": "Allow", "Action": "s3:*", "Resource": "*" });
        self.user(
            "owner",
            &json!({ "Version": "2012-10-17", "Statement": [all] }),
        )
    }

    fn client(&self, user: &User) -> S3Client {
        let keys = Credentials::new(&user.id, &user.secret, None, None, "test");
        let http = aws_smithy_http_client::Builder::new().build_http();
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .http_client(http)
            .credentials_provider(keys)
            .region(Region::from_static("us-east-1"))
            .endpoint_url(format!("http://{}", self.address))
            .force_path_style(true);
        S3Client::from_conf(config.build())
    }

    fn make_bucket(&self, owner: &S3Client, bucket: &str) {
        let made = owner.create_bucket().bucket(bucket).send();
        self.runtime.block_on(made).unwrap();
    }

    /// Begins an upload of a blob that nobody ends.
    fn begin_upload(&self, owner: &S3Client, bucket: &str) {
        let key = format!("{V2}/blobs/sha256/ab/ab12/data");
        let begun = owner.create_multipart_upload().bucket(bucket).key(key);
        self.runtime.block_on(begun.send()).unwrap();
    }

    fn uploads(&self, owner: &S3Client, bucket: &str) -> usize {
        let listed = owner.list_multipart_uploads().bucket(bucket).send();
        self.runtime.block_on(listed).unwrap().uploads().len()
    }

    /// An agent that has a user's rights, and no other.
    fn agent(&self, role: &str, bucket: &str, user: &User) -> Agent {
        let setup = Setup::new();
        let cache = setup.folder().join("store");
        let setup = setup
            .set("role", role)
            .set("upstreams", Value::Null)
            .set(
                "storage",
                json!({
                    "s3": {
                        "bucket": bucket,
                        "region": "us-east-1",
                        "endpoint": format!("http://{}", self.address),
                        "path_style": true,
                    },
                    "cache": { "root": cache, "limit": "100%" },
                }),
            )
            .set("freshness.window", "0s")
            .environment("AWS_ACCESS_KEY_ID", &user.id)
            .environment("AWS_SECRET_ACCESS_KEY", &user.secret)
            .environment("AWS_EC2_METADATA_DISABLED", "true");
        let setup = match role {
            "writer" => setup.set("delete", true),
            _ => setup,
        };
        setup.start()
    }
}

/// What `generate iam-policy` prints.
fn policy(role: &str, bucket: &str) -> Value {
    let printed = Command::new(env!("CARGO_BIN_EXE_registry-agent"))
        .args(["generate", "iam-policy", "--role", role, "--bucket", bucket])
        .output()
        .unwrap();
    assert!(printed.status.success(), "{printed:?}");
    serde_json::from_slice(&printed.stdout).unwrap()
}

/// The same policy short of one action of one statement; each such policy, and what it lacks.
fn lesser(policy: &Value) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for (at, statement) in policy["Statement"].as_array().unwrap().iter().enumerate() {
        for (index, action) in statement["Action"].as_array().unwrap().iter().enumerate() {
            let mut less = policy.clone();
            let actions = less["Statement"][at]["Action"].as_array_mut().unwrap();
            actions.remove(index);
            if actions.is_empty() {
                less["Statement"].as_array_mut().unwrap().remove(at);
            }
            let sid = statement["Sid"].as_str().unwrap();
            found.push((format!("{sid}: {}", action.as_str().unwrap()), less));
        }
    }
    found
}

/// What does not go well, in words; nothing if all does.
type Step = Option<String>;

fn step(what: &str, status: u16, wanted: u16) -> Step {
    (status != wanted).then(|| format!("{what}: {status}"))
}

/// All that a reader does; the image is in the bucket.
fn read(agent: &Agent, image: &Image) -> Vec<String> {
    let manifests = |reference: &str| agent.get(&format!("/v2/{NAME}/manifests/{reference}"));
    let blob = |digest: &str| agent.get(&format!("/v2/{NAME}/blobs/{digest}"));
    let mut steps = vec![
        step("the tag", manifests("v1").status, 200),
        step("the manifest", manifests(image.digest()).status, 200),
        step("an absent tag", manifests("absent").status, 404),
    ];
    for it in image.blobs() {
        let reply = blob(&it.digest);
        let whole = reply.status == 200 && reply.body == it.bytes;
        steps.push((!whole).then(|| format!("a blob: {}", reply.status)));
    }
    let tags = agent.get(&format!("/v2/{NAME}/tags/list"));
    steps.push(step("the tags", tags.status, 200));
    let catalog = agent.get("/v2/_catalog");
    steps.push(step("the catalog", catalog.status, 200));
    let referrers = agent.get(&format!("/v2/{NAME}/referrers/{}", image.digest()));
    steps.push(step("the referrers", referrers.status, 200));
    steps.into_iter().flatten().collect()
}

/// All that a writer does, by requests.
fn write(agent: &Agent, images: [&Image; 2]) -> Vec<String> {
    let mut steps = Vec::new();
    for (image, tag) in images.iter().zip(["v1", "moved"]) {
        for blob in image.blobs() {
            let target = format!("/v2/{NAME}/blobs/uploads/?digest={}", blob.digest);
            let reply = agent.request("POST", &target).body(&blob.bytes).send();
            steps.push(step("a blob", reply.status, 201));
        }
        for tag in [tag, "latest"] {
            let pushed = agent.push_manifest(NAME, tag, &image.manifest);
            steps.push(step("a manifest", pushed.status, 201));
        }
    }
    let mounted = format!(
        "/v2/other/app/blobs/uploads/?mount={}&from={NAME}",
        images[0].layer().digest
    );
    let mounted = agent.request("POST", &mounted).body(b"").send();
    steps.push(step("a mount", mounted.status, 201));
    for what in [
        "manifests/moved".to_owned(),
        format!("manifests/{}", images[1].digest()),
        format!("blobs/{}", images[1].layer().digest),
    ] {
        let target = format!("/v2/{NAME}/{what}");
        let deleted = agent.request("DELETE", &target).body(b"").send();
        steps.push(step("a delete", deleted.status, 202));
    }
    steps.into_iter().flatten().collect()
}

/// Whether a writer aborts what another one has left; it does so when it starts.
fn aborts(moto: &Moto, owner: &S3Client, bucket: &str, agent: &Agent) -> Step {
    let mut left = 1;
    eventually(PATIENCE, "what was left is looked for", || {
        left = moto.uploads(owner, bucket);
        left == 0 || agent.log().contains("could not be aborted")
    });
    (left > 0).then(|| "an abort".to_owned())
}

/// What S3 answers to a write with these keys: the status of a PUT, and of a DELETE.
fn direct_writes(moto: &Moto, user: &User, bucket: &str, key: &str) -> [u16; 2] {
    let client = moto.client(user);
    moto.runtime.block_on(async {
        let body = ByteStream::from_static(b"x");
        let put = client.put_object().bucket(bucket).key(key).body(body);
        let put = put.send().await;
        let deleted = client.delete_object().bucket(bucket).key(key).send().await;
        let refused = |status: Option<u16>| status.unwrap_or(200);
        [
            refused(
                put.err()
                    .and_then(|e| Some(e.raw_response()?.status().as_u16())),
            ),
            refused(
                deleted
                    .err()
                    .and_then(|e| Some(e.raw_response()?.status().as_u16())),
            ),
        ]
    })
}

#[test]
fn a_reader_needs_all_of_its_policy_and_can_change_nothing_by_it() {
    let moto = Moto::start();
    let (bucket, image) = ("images", Image::new(1, &[10 * KIB, 9 * MIB]));
    let policy = policy("reader", bucket);
    let owner = moto.owner();
    let reader = moto.user("reader", &policy);
    let lesser: Vec<(String, User)> = lesser(&policy)
        .into_iter()
        .enumerate()
        .map(|(number, (lacks, policy))| (lacks, moto.user(&format!("r{number}"), &policy)))
        .collect();
    assert_eq!(lesser.len(), 2);
    moto.enforce();
    moto.make_bucket(&moto.client(&owner), bucket);
    let writer = moto.agent("writer", bucket, &owner);
    writer.push(NAME, "v1", &image);

    let agent = moto.agent("reader", bucket, &reader);
    assert_eq!(read(&agent, &image), [""; 0]);
    assert!(!agent.log().contains("lacks"), "{}", agent.log());
    for key in [format!("{V2}/blobs/x"), "elsewhere".to_owned()] {
        assert_eq!(direct_writes(&moto, &reader, bucket, &key), [403, 403]);
    }
    for (lacks, user) in &lesser {
        let agent = moto.agent("reader", bucket, user);
        let failed = read(&agent, &image);
        assert!(!failed.is_empty(), "nothing needs {lacks}");
        // Whoever reads the log learns which right is missing.
        let action = lacks.rsplit(' ').next().unwrap();
        assert!(agent.log().contains(action), "{lacks}: {}", agent.log());
    }
}

#[test]
fn a_writer_needs_all_of_its_policy() {
    let moto = Moto::start();
    let images = [Image::new(1, &[10 * KIB]), Image::new(2, &[20 * KIB])];
    let images = [&images[0], &images[1]];
    let owner = moto.owner();
    let whole = moto.user("writer", &policy("writer", "images"));
    let lacking: Vec<(String, String, User)> = lesser(&policy("writer", "BUCKET"))
        .into_iter()
        .enumerate()
        .map(|(number, (lacks, policy))| {
            // Each has a bucket to itself, so that nothing is there from another one.
            let bucket = format!("bucket-{number}");
            let policy = policy.to_string().replace("BUCKET", &bucket);
            let policy = serde_json::from_str(&policy).unwrap();
            let user = moto.user(&format!("w{number}"), &policy);
            (lacks, bucket, user)
        })
        .collect();
    assert_eq!(lacking.len(), 8, "one for each action");
    moto.enforce();
    let owner = moto.client(&owner);

    moto.make_bucket(&owner, "images");
    moto.begin_upload(&owner, "images");
    let agent = moto.agent("writer", "images", &whole);
    assert_eq!(aborts(&moto, &owner, "images", &agent), None);
    assert_eq!(write(&agent, images), [""; 0]);
    assert_eq!(read(&agent, images[0]), [""; 0]);
    // In parts.
    agent.push(NAME, "large", &Image::new(3, &[17 * MIB]));
    let elsewhere = direct_writes(&moto, &whole, "images", "somebody/elses");
    assert_eq!(elsewhere, [403, 403]);

    for (lacks, bucket, user) in &lacking {
        moto.make_bucket(&owner, bucket);
        moto.begin_upload(&owner, bucket);
        let agent = moto.agent("writer", bucket, user);
        let mut failed: Vec<String> = aborts(&moto, &owner, bucket, &agent).into_iter().collect();
        failed.extend(write(&agent, images));
        failed.extend(read(&agent, images[0]));
        assert!(!failed.is_empty(), "nothing needs {lacks}");
    }
}

#[test]
fn a_mirror_deletes_nothing_that_is_stored() {
    let moto = Moto::start();
    let mirror = moto.user("mirror", &policy("mirror", "images"));
    let owner = moto.owner();
    moto.enforce();
    moto.make_bucket(&moto.client(&owner), "images");
    let content = format!("{V2}/blobs/x");
    assert_eq!(
        direct_writes(&moto, &mirror, "images", &content),
        [200, 403]
    );
    let probe = "registry-agent/probe/1";
    assert_eq!(direct_writes(&moto, &mirror, "images", probe), [200, 200]);
    let elsewhere = direct_writes(&moto, &mirror, "images", "somebody/elses");
    assert_eq!(elsewhere, [403, 403]);
}
