//! What S3 answered, in words that say what to do. No credential is ever part of them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use super::credentials::is_expired_code;

/// A bucket could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BucketError {
    /// The configuration names no region, nor does this host.
    #[error(
        "nothing says in which region the bucket {0} is: set storage.s3.region, or AWS_REGION, or a \
         region in the AWS profile (the instance metadata service did not say either)"
    )]
    NoRegion(String),
    /// No link of the credential chain has any.
    #[error(
        "no AWS credentials for the bucket {bucket}: give this host an instance role (IMDSv2), or \
         set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a web identity ({reason})"
    )]
    NoCredentials {
        /// The bucket.
        bucket: String,
        /// What the chain said.
        reason: String,
    },
    /// There is no such bucket.
    #[error(
        "S3 has no bucket {0}: check storage.s3.bucket, and that the endpoint is the right one"
    )]
    NoBucket(String),
    /// The bucket is in another region.
    #[error(
        "the bucket {bucket} is in the region {actual}, not in {asked}: set storage.s3.region to \
         {actual}"
    )]
    WrongRegion {
        /// The bucket.
        bucket: String,
        /// The region that was asked.
        asked: String,
        /// Where it is.
        actual: String,
    },
    /// The role lacks a right, or the credentials are not accepted.
    #[error("S3 refuses {what} ({code}): {advice}")]
    Denied {
        /// The request.
        what: String,
        /// S3's own word for it.
        code: String,
        /// What would cure it.
        advice: String,
    },
    /// The credentials have expired, whatever their date says.
    #[error(
        "S3 takes the credentials for {what} for expired, and new ones were not to be had: check \
         this host's clock, and where its credentials come from"
    )]
    Expired {
        /// The request.
        what: String,
    },
    /// What was to be written has been changed by somebody else since it was read.
    #[error("{key} was changed by another writer meanwhile")]
    Conflict {
        /// The key.
        key: String,
    },
    /// A blob is being removed because nobody needed it, and its bytes can't be written yet.
    #[error(
        "{key} is being removed by a `gc`: push again, in {} at the latest",
        humantime::format_duration(super::reuse::COLLECTING_STALE)
    )]
    Collecting {
        /// Its key.
        key: String,
    },
    /// An object is another than it was when its first bytes were read.
    #[error("{key} was replaced while it was being read")]
    Changed {
        /// The key.
        key: String,
    },
    /// S3 asks for fewer requests.
    #[error("S3 limits or fails {what} ({status} {code})")]
    Slow {
        /// The request.
        what: String,
        /// The HTTP status.
        status: u16,
        /// S3's own word for it.
        code: String,
    },
    /// No answer, or no byte of one, in time.
    #[error("S3 did not go on with {what} in time")]
    Timeout {
        /// The request.
        what: String,
    },
    /// The connection failed.
    #[error("S3 could not be reached for {what}: {error}")]
    Transport {
        /// The request.
        what: String,
        /// How.
        error: String,
    },
    /// Any other answer.
    #[error("S3 answered {what} with {status} {code}: {message}")]
    Status {
        /// The request.
        what: String,
        /// The HTTP status.
        status: u16,
        /// S3's own word for it.
        code: String,
        /// And its own explanation.
        message: String,
    },
    /// What is there is not what has to be there.
    #[error("{key} in the bucket {reason}")]
    Wrong {
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of this host could not be read.
    #[error("can't read {path}: {source}")]
    File {
        /// The file that was to be sent.
        path: PathBuf,
        /// What came back.
        source: Arc<io::Error>,
    },
}

impl BucketError {
    /// Whether the same request may well succeed a moment later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Slow { .. }
                | Self::Timeout { .. }
                | Self::Transport { .. }
                // By then there are new ones.
                | Self::Expired { .. }
        )
    }
}

/// What an unsuccessful request was answered, before it is known what that means here.
pub(super) enum Refusal {
    /// 404, of the key: the bucket is there.
    Absent,
    /// 403 without more: a key that is not there, for a role that may not list.
    Hidden,
    /// 304: it is what it was.
    Unchanged,
    /// 412, or 409 of two at the same time: it is not what it was.
    Conflict,
    /// 416: there is no such range; with the object's size in bytes where it was said.
    NoRange(Option<u64>),
    /// 501, or 400 that says the same: the store does not know a header of the request.
    NotImplemented,
    /// Anything else.
    Error(BucketError),
}

/// Who asks, for the words of errors.
#[derive(Debug)]
pub(super) struct Asker {
    pub(super) bucket: String,
    pub(super) region: String,
}

/// Codes that are about the credentials, and not about what was asked with them.
const OF_CREDENTIALS: &[&str] = &[
    "InvalidAccessKeyId",
    "NotSignedUp",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "AuthorizationHeaderMalformed",
    "RequestTimeTooSkewed",
];

impl Asker {
    /// What became of `what` (`GET key`).
    pub(super) fn refusal<E>(&self, what: &str, error: &SdkError<E, HttpResponse>) -> Refusal
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let what = what.to_owned();
        let answered = match error {
            SdkError::ServiceError(answered) => answered,
            SdkError::TimeoutError(_) => return Refusal::Error(BucketError::Timeout { what }),
            SdkError::DispatchFailure(failure) if failure.is_timeout() => {
                return Refusal::Error(BucketError::Timeout { what });
            }
            other => return Refusal::Error(self.unsent(what, other)),
        };
        let response = answered.raw();
        let status = response.status().as_u16();
        let code = answered.err().code().unwrap_or_default().to_owned();
        let message: String = answered.err().message().unwrap_or_default().into();
        if let Some(actual) = response.headers().get("x-amz-bucket-region")
            && matches!(status, 301 | 307 | 400)
            && actual != self.region
        {
            return self.wrong_region(actual);
        }
        if code == "AuthorizationHeaderMalformed"
            && let Some(actual) = expected_region(&message)
            && actual != self.region
        {
            return self.wrong_region(actual);
        }
        let error = match (status, code.as_str()) {
            (304, _) => return Refusal::Unchanged,
            (412, _) | (409, "ConditionalRequestConflict" | "OperationAborted") => {
                return Refusal::Conflict;
            }
            (416, _) => {
                let range = response.headers().get("content-range");
                return Refusal::NoRange(range.and_then(total));
            }
            (501, _) | (_, "NotImplemented") => return Refusal::NotImplemented,
            (_, "NoSuchBucket") => BucketError::NoBucket(self.bucket.clone()),
            (404, _) => return Refusal::Absent,
            (_, code) if is_expired_code(code) => BucketError::Expired { what },
            (_, code) if OF_CREDENTIALS.contains(&code) => BucketError::Denied {
                what,
                code: code.to_owned(),
                advice: "the credentials are not accepted: check them, the region, and this \
                         host's clock"
                    .to_owned(),
            },
            (403, "" | "AccessDenied" | "Forbidden") => return Refusal::Hidden,
            (429 | 500 | 502 | 503 | 504, _)
            | (_, "SlowDown" | "RequestTimeout" | "InternalError" | "Throttling") => {
                BucketError::Slow { what, status, code }
            }
            _ => BucketError::Status {
                what,
                status,
                code,
                message,
            },
        };
        Refusal::Error(error)
    }

    fn wrong_region(&self, actual: &str) -> Refusal {
        Refusal::Error(BucketError::WrongRegion {
            bucket: self.bucket.clone(),
            asked: self.region.clone(),
            actual: actual.to_owned(),
        })
    }

    /// A request that never had an answer that could be read.
    fn unsent<E>(&self, what: String, error: &SdkError<E, HttpResponse>) -> BucketError
    where
        E: std::error::Error + 'static,
    {
        let mut reasons = Vec::new();
        let mut next = std::error::Error::source(error);
        while let Some(reason) = next {
            if reason.is::<aws_credential_types::provider::error::CredentialsError>() {
                return BucketError::NoCredentials {
                    bucket: self.bucket.clone(),
                    reason: reason.to_string(),
                };
            }
            reasons.push(reason.to_string());
            next = reason.source();
        }
        // An outer reason often repeats an inner one.
        reasons.dedup();
        BucketError::Transport {
            what,
            error: reasons.join(": "),
        }
    }

    /// Says of a refusal that nothing here can be made of that it is an error.
    pub(super) fn error(&self, what: &str, right: &str, refusal: Refusal) -> BucketError {
        let status = |status, code: &str| BucketError::Status {
            what: what.to_owned(),
            status,
            code: code.to_owned(),
            message: "not what this request is answered with".to_owned(),
        };
        match refusal {
            Refusal::Error(error) => error,
            Refusal::Hidden => BucketError::Denied {
                what: what.to_owned(),
                code: "AccessDenied".to_owned(),
                advice: format!("the role needs {right} on the bucket {}", self.bucket),
            },
            Refusal::Absent => status(404, "NoSuchKey"),
            Refusal::Unchanged => status(304, "NotModified"),
            Refusal::Conflict => status(412, "PreconditionFailed"),
            Refusal::NoRange(_) => status(416, "InvalidRange"),
            Refusal::NotImplemented => status(501, "NotImplemented"),
        }
    }
}

/// The region in `...; the region 'us-east-1' is wrong; expecting 'eu-west-1'`.
fn expected_region(message: &str) -> Option<&str> {
    let (_, rest) = message.split_once("expecting '")?;
    Some(rest.split_once('\'')?.0)
}

/// The whole size in `bytes 0-9/100`, and in `bytes */100`.
pub(super) fn total(content_range: &str) -> Option<u64> {
    content_range.rsplit_once('/')?.1.parse().ok()
}
