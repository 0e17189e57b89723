//! The SDK's clients, without their patience: an attempt is one request.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_autoscaling::config::SharedHttpClient;
use aws_sdk_autoscaling::config::retry::RetryConfig;
use aws_sdk_autoscaling::config::timeout::TimeoutConfig;
use aws_sdk_autoscaling::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use tokio::runtime::Runtime;

use crate::control_plane::{ControlPlane, access_key};

/// How long an answer may take that will come.
pub const ANSWERS: Duration = Duration::from_mins(1);

/// What all of them send by.
pub fn http() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .build_https()
}

/// One account's clients.
pub struct Clients {
    pub autoscaling: aws_sdk_autoscaling::Client,
    pub balancing: aws_sdk_elasticloadbalancingv2::Client,
    pub route53: aws_sdk_route53::Client,
    runtime: Runtime,
}

impl Clients {
    /// An operator's.
    pub fn new(url: &str) -> Self {
        let credentials = Credentials::new("AKIAOPERATOR", "secret", None, None, "the test");
        Self::with(url, credentials, ANSWERS)
    }

    /// An instance's, as its metadata service gives them.
    pub fn of_instance(plane: &ControlPlane, id: &str) -> Self {
        let token = Some(format!("session-token-of-{id}"));
        let credentials = Credentials::new(access_key(id), "secret", token, None, "the test");
        Self::with(&plane.url(), credentials, ANSWERS)
    }

    pub fn with(url: &str, credentials: Credentials, patience: Duration) -> Self {
        let runtime = Runtime::new().unwrap();
        let timeouts = TimeoutConfig::builder().operation_timeout(patience).build();
        let config = SdkConfig::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::from_static("us-east-1"))
            .endpoint_url(url)
            .credentials_provider(SharedCredentialsProvider::new(credentials))
            .http_client(http())
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .sleep_impl(aws_sdk_autoscaling::config::SharedAsyncSleep::new(Sleep))
            .build();
        Self {
            autoscaling: aws_sdk_autoscaling::Client::new(&config),
            balancing: aws_sdk_elasticloadbalancingv2::Client::new(&config),
            route53: aws_sdk_route53::Client::new(&config),
            runtime,
        }
    }

    /// The answer.
    pub fn run<T, E, R>(&self, call: impl Future<Output = Result<T, SdkError<E, R>>>) -> T
    where
        E: ProvideErrorMetadata + Debug,
        R: Debug,
    {
        self.runtime.block_on(call).unwrap()
    }

    /// The answer, or the refusal: code and message. No code: nothing that the SDK can read.
    pub fn attempt<T, E, R>(
        &self,
        call: impl Future<Output = Result<T, SdkError<E, R>>>,
    ) -> Result<T, [String; 2]>
    where
        E: ProvideErrorMetadata + Debug,
        R: Debug,
    {
        self.runtime.block_on(call).map_err(|error| {
            let (code, message) = (error.code(), error.message());
            [code, message].map(|text| text.unwrap_or_default().to_owned())
        })
    }

    /// The code and message with which it is refused.
    #[track_caller]
    pub fn refusal<T: Debug, E, R>(
        &self,
        call: impl Future<Output = Result<T, SdkError<E, R>>>,
    ) -> [String; 2]
    where
        E: ProvideErrorMetadata + Debug,
        R: Debug,
    {
        self.attempt(call).unwrap_err()
    }

    /// What it fails with, where there is no answer that says why.
    #[track_caller]
    pub fn failure<T: Debug, E, R>(
        &self,
        call: impl Future<Output = Result<T, SdkError<E, R>>>,
    ) -> SdkError<E, R>
    where
        E: Debug,
        R: Debug,
    {
        self.runtime.block_on(call).unwrap_err()
    }

    /// Where the group says that an instance is, and its health.
    pub fn state(&self, id: &str) -> Option<(String, String)> {
        let call = self.autoscaling.describe_auto_scaling_instances();
        let found = self.run(call.instance_ids(id).send());
        let instance = found.auto_scaling_instances().first()?;
        let [state, health] = [instance.lifecycle_state(), instance.health_status()];
        Some((state.unwrap().to_owned(), health.unwrap().to_owned()))
    }
}

#[derive(Debug)]
struct Sleep;

impl aws_sdk_autoscaling::config::AsyncSleep for Sleep {
    fn sleep(&self, duration: Duration) -> aws_sdk_autoscaling::config::Sleep {
        aws_sdk_autoscaling::config::Sleep::new(tokio::time::sleep(duration))
    }
}
