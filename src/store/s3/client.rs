//! The AWS clients of one bucket: one pool of connections, one set of credentials.

use std::fmt;
use std::time::Duration;

use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    IdentityCache, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};

use super::credentials::{Ahead, Renewal};
use super::error::{Asker, BucketError};
use crate::config::S3Settings;
use crate::resolve::Resolver;

/// To accept a connection. S3 does so in a few milliseconds.
const CONNECT: Duration = Duration::from_secs(3);
/// From a request to the head of its answer.
const READ: Duration = Duration::from_secs(10);
/// For one attempt at a request whose answer is small.
const ATTEMPT: Duration = Duration::from_secs(12);
/// For such a request with all its attempts.
const OPERATION: Duration = Duration::from_secs(40);
/// For a request that sends a part: 16 MiB at 140 kB/s.
const SENDING: Duration = Duration::from_mins(2);
/// For a part with all its attempts.
const SENDING_OPERATION: Duration = Duration::from_mins(6);
/// To find out in which region a bucket is.
const DISCOVERY: Duration = Duration::from_secs(5);
/// The region that is asked where nothing says one: it knows where every bucket is.
const FIRST_REGION: &str = "us-east-1";
/// Idle connections are given back before S3 closes them.
const IDLE: Duration = Duration::from_secs(15);

/// The clients, which share everything but their patience.
#[derive(Debug, Clone)]
pub(super) struct Clients {
    /// For requests with small answers: the SDK repeats what failed.
    pub(super) small: Client,
    /// For pieces of blobs, which are repeated from the byte that was reached.
    pub(super) pieces: Client,
    /// For bodies that are sent.
    pub(super) sending: Client,
    /// Whose bodies need no signature of their own, since TLS protects them.
    pub(super) unsigned: bool,
    /// Where the requests go.
    pub(super) region: String,
    /// By what they are signed.
    pub(super) credentials: Ahead,
}

/// A single HTTP client for all requests, with rustls and ring. It trusts whom the system trusts, or
/// the authorities in the file that `SSL_CERT_FILE` names.
fn http() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .pool_idle_timeout(IDLE)
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .build_with_resolver(Names(Resolver::of_this_build()))
}

/// Finds hosts as the rest of the agent does, which a static binary has to.
#[derive(Clone)]
struct Names(Resolver);

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names")
    }
}

impl ResolveDns for Names {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        DnsFuture::new(async move {
            let found = self.0.addresses(name).await;
            found.map_err(ResolveDnsError::new)
        })
    }
}

/// Where a bucket is, by what `client` is answered of it; `None` where that does not say. The answer
/// says it also to who may not look at the bucket.
async fn region_of(client: &Client, bucket: &str) -> Result<Option<String>, BucketError> {
    let answer = client.head_bucket().bucket(bucket).send().await;
    let error = match answer {
        Ok(head) => return Ok(head.bucket_region),
        Err(error) => error,
    };
    if let Some(response) = error.raw_response() {
        let region = response.headers().get("x-amz-bucket-region");
        return Ok(region.map(str::to_owned));
    }
    let asker = Asker {
        bucket: bucket.to_owned(),
        region: FIRST_REGION.to_owned(),
    };
    let what = format!("HEAD of the bucket {bucket}");
    let refusal = asker.refusal(&what, &error);
    Err(asker.error(&what, "s3:ListBucket", refusal))
}

/// A client that does not wait for long.
fn discovering(config: aws_sdk_s3::config::Builder) -> Client {
    let patience = TimeoutConfig::builder()
        .connect_timeout(CONNECT)
        .operation_timeout(DISCOVERY)
        .build();
    let config = config.retry_config(RetryConfig::disabled());
    Client::from_conf(config.timeout_config(patience).build())
}

/// Finds out what the configuration leaves to the host: region, credentials, endpoint.
pub(super) async fn connect(settings: &S3Settings) -> Result<Clients, BucketError> {
    let version = BehaviorVersion::v2026_01_12();
    let mut defaults = aws_config::defaults(version).http_client(http());
    if let Some(region) = &settings.region {
        defaults = defaults.region(Region::new(region.clone()));
    }
    let shared = defaults.load().await;
    let chain = match &settings.keys {
        Some(keys) => {
            let (id, secret) = (keys.id.clone(), keys.secret.reveal());
            let fixed = Credentials::new(id, secret, None, None, "storage.s3.secret_key");
            SharedCredentialsProvider::new(fixed)
        }
        None => shared
            .credentials_provider()
            .ok_or_else(|| BucketError::NoCredentials {
                bucket: settings.bucket.clone(),
                reason: "the chain is empty".to_owned(),
            })?,
    };
    let credentials = Ahead::new(chain);
    let said = shared.region().cloned();
    let first = said.clone().unwrap_or(Region::from_static(FIRST_REGION));
    let mut config = aws_sdk_s3::config::Builder::from(&shared)
        .region(first.clone())
        .credentials_provider(credentials.clone())
        .retry_classifier(Renewal(credentials.clone()))
        // `Ahead` is the cache.
        .identity_cache(IdentityCache::no_cache())
        .force_path_style(settings.path_style)
        // What is read is checked against its digest.
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .retry_config(
            RetryConfig::standard()
                .with_max_attempts(4)
                .with_initial_backoff(Duration::from_millis(100))
                .with_max_backoff(Duration::from_secs(2)),
        )
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(CONNECT)
                .read_timeout(READ)
                .operation_attempt_timeout(ATTEMPT)
                .operation_timeout(OPERATION)
                .build(),
        );
    let mut secure = true;
    if let Some(endpoint) = &settings.endpoint {
        secure = endpoint.scheme() == "https";
        config = config
            .endpoint_url(endpoint.as_str().trim_end_matches('/'))
            // Many stores that speak S3 don't know Amazon's newer checksums.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired);
    } else if let Some(endpoint) = shared.endpoint_url() {
        secure = endpoint.starts_with("https:");
    }
    let region = match &settings.region {
        Some(_) => first,
        None => {
            let asked = discovering(config.clone());
            match (region_of(&asked, &settings.bucket).await, said) {
                (Ok(Some(region)), _) => Region::new(region),
                // It is asked there, and says what is wrong with that.
                (_, Some(said)) => said,
                // A store that is not Amazon's has no regions; the signature needs a name of one.
                (Ok(None), None) if settings.endpoint.is_some() => first,
                (Ok(None), None) => return Err(BucketError::NoRegion(settings.bucket.clone())),
                (Err(error), None) => return Err(error),
            }
        }
    };
    let config = config.region(region.clone()).build();
    let pieces = config
        .to_builder()
        .retry_config(RetryConfig::disabled())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(CONNECT)
                .read_timeout(READ)
                .operation_attempt_timeout(ATTEMPT)
                .build(),
        )
        .build();
    let sending = config
        .to_builder()
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(CONNECT)
                .read_timeout(SENDING)
                .operation_attempt_timeout(SENDING)
                .operation_timeout(SENDING_OPERATION)
                .build(),
        )
        .build();
    Ok(Clients {
        small: Client::from_conf(config),
        pieces: Client::from_conf(pieces),
        sending: Client::from_conf(sending),
        unsigned: secure,
        region: region.to_string(),
        credentials,
    })
}
