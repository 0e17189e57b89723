//! What the calls to AWS have in common: where they go, how long they may take, and what failed.
//!
//! The SDK repeats nothing: the planner sees that an effect is missing, and knows how many others
//! call at the same time.

use std::fmt;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;

/// To accept a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// From a request to the whole answer, credentials included.
const OPERATION: Duration = Duration::from_secs(10);
/// To find region and credentials.
const LOAD: Duration = Duration::from_secs(15);
/// Idle connections are given back before AWS closes them.
const IDLE: Duration = Duration::from_secs(15);

/// Codes by which AWS asks for fewer requests. It says some of them with HTTP 400.
const THROTTLED: &[&str] = &[
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestLimitExceeded",
    "TooManyRequestsException",
    "PriorRequestNotComplete",
    "SlowDown",
];

/// A call failed. No credential is ever part of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AwsError {
    /// Nothing says where the group is.
    #[error(
        "nothing says in which region the fleet is: set AWS_REGION, or a region in the AWS profile \
         (the instance metadata service did not say either)"
    )]
    NoRegion,
    /// The API refused.
    #[error("{operation} of {subject} was refused ({code}): {message}")]
    Refused {
        /// The API's name for the call.
        operation: &'static str,
        /// The group, target group or instance.
        subject: String,
        /// Its code, or the HTTP status.
        code: String,
        /// What it says.
        message: String,
    },
    /// No answer, or not in time.
    #[error("{operation} of {subject} was not answered: {reason}")]
    Unanswered {
        /// The API's name for the call.
        operation: &'static str,
        /// The group, target group or instance.
        subject: String,
        /// Why.
        reason: String,
    },
    /// There is no such group.
    #[error(
        "the account has no autoscaling group {0} in this region: check fleet.autoscaling.group"
    )]
    NoGroup(String),
    /// An answer that can't be understood.
    #[error("{operation} of {subject} answered without {lacking}")]
    Lacking {
        /// The API's name for the call.
        operation: &'static str,
        /// The group.
        subject: String,
        /// What has to be there.
        lacking: &'static str,
    },
}

impl AwsError {
    /// Whether fewer requests are asked for.
    pub fn is_throttled(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if THROTTLED.contains(&code.as_str()) || code == "429")
    }

    /// Whether the API refused with this code, and said that.
    pub(super) fn says(&self, said_code: &str, said: &str) -> bool {
        matches!(self, Self::Refused { code, message, .. }
            if code == said_code && message.contains(said))
    }
}

/// Region, credentials and endpoints, as every AWS tool finds them: variables (`AWS_ENDPOINT_URL`
/// among them), the profile, the instance's role.
pub(super) async fn config() -> Result<SdkConfig, AwsError> {
    let http = aws_smithy_http_client::Builder::new()
        .pool_idle_timeout(IDLE)
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .build_https();
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT)
        .operation_timeout(OPERATION)
        .build();
    let load = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .http_client(http)
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts)
        .load();
    match tokio::time::timeout(LOAD, load).await {
        Ok(config) if config.region().is_some() => Ok(config),
        _ => Err(AwsError::NoRegion),
    }
}

/// What came of a call, in words.
pub(super) fn failure<E>(
    operation: &'static str,
    subject: impl fmt::Display,
    error: &SdkError<E, HttpResponse>,
) -> AwsError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let subject = subject.to_string();
    match error {
        SdkError::ServiceError(context) => {
            let status = context.raw().status().as_u16();
            let code = context.err().code();
            AwsError::Refused {
                operation,
                subject,
                code: code.map_or_else(|| status.to_string(), str::to_owned),
                message: context.err().message().unwrap_or("no reason").to_owned(),
            }
        }
        SdkError::TimeoutError(_) => AwsError::Unanswered {
            operation,
            subject,
            reason: format!(
                "it took longer than {}",
                humantime::format_duration(OPERATION)
            ),
        },
        other => AwsError::Unanswered {
            operation,
            subject,
            reason: chain(other),
        },
    }
}

/// An error with all that caused it.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(why) = next {
        text = format!("{text}: {why}");
        next = why.source();
    }
    text
}
