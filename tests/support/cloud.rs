//! A bucket, and the agents in front of it.
#![allow(dead_code, reason = "every test target uses a part of it")]

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::server::{ACCESS_KEY, BUCKET, S3, SECRET_KEY};
use crate::support::agent::Setup;
use crate::support::image::Image;

/// A server with a runtime of its own: the tests block.
pub struct Cloud {
    pub s3: S3,
    _runtime: Runtime,
}

impl Cloud {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// The same by TLS.
    pub fn start_with(tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let runtime = Runtime::new().unwrap();
        Self {
            s3: runtime.block_on(S3::start_with(tls)),
            _runtime: runtime,
        }
    }

    /// Lays an image down as registry:2 does.
    pub fn push(&self, name: &str, tag: &str, image: &Image) {
        let v2 = "docker/registry/v2";
        let repository = format!("{v2}/repositories/{name}");
        let split = |digest: &str| digest.split_once(':').unwrap().1.to_owned();
        let manifest = &image.manifest.blob;
        for blob in image.blobs().chain([manifest]) {
            let hex = split(&blob.digest);
            let data = format!("{v2}/blobs/sha256/{}/{hex}/data", &hex[..2]);
            self.s3.lay(&data, &blob.bytes);
        }
        for blob in image.blobs() {
            let link = format!("{repository}/_layers/sha256/{}/link", split(&blob.digest));
            self.s3.lay(&link, blob.digest.as_bytes());
        }
        let hex = split(image.digest());
        for link in [
            format!("revisions/sha256/{hex}/link"),
            format!("tags/{tag}/index/sha256/{hex}/link"),
            format!("tags/{tag}/current/link"),
        ] {
            let link = format!("{repository}/_manifests/{link}");
            self.s3.lay(&link, image.digest().as_bytes());
        }
    }

    /// A reader of the bucket.
    pub fn reader(&self) -> Setup {
        self.setup("reader")
    }

    /// A writer of the bucket.
    pub fn writer(&self) -> Setup {
        self.setup("writer").set("delete", true)
    }

    fn setup(&self, role: &str) -> Setup {
        with_keys(self.without_keys(role))
    }

    /// One that has yet to find its credentials.
    pub fn without_keys(&self, role: &str) -> Setup {
        let setup = Setup::new().set("upstreams", Value::Null).set("role", role);
        self.of_bucket(setup)
    }

    /// The same agent with the bucket for its storage, and its folder for the cache in front of it.
    pub fn over_bucket(&self, setup: Setup) -> Setup {
        with_keys(self.of_bucket(setup))
    }

    fn of_bucket(&self, setup: Setup) -> Setup {
        let cache = setup.folder().join("store");
        let storage = json!({
            "s3": {
                "bucket": BUCKET,
                "region": "us-east-1",
                "endpoint": format!("http://{}", self.s3.address),
                "path_style": true,
            },
            "cache": { "root": cache, "limit": "100%" },
        });
        setup.set("storage", storage)
    }
}

/// The standard chain, by its first link.
fn with_keys(setup: Setup) -> Setup {
    setup
        .environment("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        .environment("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        .environment("AWS_EC2_METADATA_DISABLED", "true")
}
