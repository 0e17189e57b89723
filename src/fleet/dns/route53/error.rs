//! What Route 53 answered, in words that say what to do. No credential is ever part of them.

use aws_sdk_route53::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use super::super::DnsError;

/// Codes that are about the credentials, and not about what was asked with them.
const OF_CREDENTIALS: &[&str] = &[
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "SignatureDoesNotMatch",
    "InvalidSignatureException",
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "MissingAuthenticationToken",
];
/// Codes of a missing right.
const OF_RIGHTS: &[&str] = &[
    "AccessDenied",
    "AccessDeniedException",
    "NotAuthorizedException",
];
/// Codes that ask for fewer requests. They come as HTTP 400, so no status says it.
const OF_THROTTLING: &[&str] = &[
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "TooManyRequestsException",
    "PriorRequestNotComplete",
];
/// What an exact DELETE is answered with if there is no such record, or another one.
const NOT_SO: &[&str] = &["but it was not found", "do not match the current values"];

/// Who asks, for the words of errors.
pub(super) struct Asker<'a> {
    what: &'a str,
    right: &'a str,
}

impl<'a> Asker<'a> {
    /// `what` is the request, and `right` what a role needs for it.
    pub(super) fn new(what: &'a str, right: &'a str) -> Self {
        Self { what, right }
    }

    pub(super) fn error<E>(&self, error: &SdkError<E, HttpResponse>) -> DnsError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let what = self.what.to_owned();
        let answered = match error {
            SdkError::ServiceError(answered) => answered,
            SdkError::TimeoutError(_) => return DnsError::Timeout { what },
            SdkError::DispatchFailure(failure) if failure.is_timeout() => {
                return DnsError::Timeout { what };
            }
            other => return unsent(what, other),
        };
        let status = answered.raw().status().as_u16();
        let code = answered.err().code().unwrap_or_default();
        if status == 429 || OF_THROTTLING.contains(&code) {
            let code = code.to_owned();
            return DnsError::Throttled { what, code };
        }
        let advice = if OF_CREDENTIALS.contains(&code) {
            Some("the credentials are not accepted: check them and this host's clock".to_owned())
        } else if OF_RIGHTS.contains(&code) {
            Some(format!(
                "the role needs {} for this name; see `registry-agent generate iam-policy`",
                self.right
            ))
        } else {
            None
        };
        if let Some(advice) = advice {
            let code = code.to_owned();
            return DnsError::Refused { what, code, advice };
        }
        let code = match code {
            "" => format!("HTTP {status}"),
            code => code.to_owned(),
        };
        let message = answered.err().message().unwrap_or("no message").to_owned();
        DnsError::Status {
            what,
            code,
            message,
        }
    }
}

/// A request that never had an answer that could be read.
fn unsent<E>(what: String, error: &SdkError<E, HttpResponse>) -> DnsError
where
    E: std::error::Error + 'static,
{
    let mut reasons = Vec::new();
    let mut next = std::error::Error::source(error);
    while let Some(reason) = next {
        if reason.is::<aws_credential_types::provider::error::CredentialsError>() {
            let reason = reason.to_string();
            return DnsError::NoCredentials { what, reason };
        }
        reasons.push(reason.to_string());
        next = reason.source();
    }
    // An outer reason often repeats an inner one.
    reasons.dedup();
    DnsError::Transport {
        what,
        error: reasons.join(": "),
    }
}

/// Whether an exact DELETE was refused because there is no record exactly like that.
pub(super) fn is_not_so(error: &DnsError) -> bool {
    matches!(error, DnsError::Status { code, message, .. }
        if code == "InvalidChangeBatch" && NOT_SO.iter().any(|not_so| message.contains(not_so)))
}
