//! Error codes and bodies.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;

/// Error codes of distribution-spec 1.1 ("Error codes"), and two that clients know from distribution:
/// `PAGINATION_NUMBER_INVALID`, and `UNAVAILABLE` for a request that can be answered later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The blob is not known to this registry or its upstream.
    BlobUnknown,
    /// An upload can't go on as the request has it.
    BlobUploadInvalid,
    /// There is no such upload.
    BlobUploadUnknown,
    /// Who asks may not do that.
    Denied,
    /// The digest is not of a known form, or not that of what was sent.
    DigestInvalid,
    /// A manifest refers to what its repository does not have.
    ManifestBlobUnknown,
    /// The manifest or tag is not known to this registry or its upstream.
    ManifestUnknown,
    /// The manifest is none, or too large.
    ManifestInvalid,
    /// The repository name does not fit the grammar.
    NameInvalid,
    /// The repository is not known.
    NameUnknown,
    /// The number of entries that a list is to have is none.
    PaginationNumberInvalid,
    /// What was sent is not as long as was said.
    SizeInvalid,
    /// Nobody knows who asks.
    Unauthorized,
    /// This registry does not do that.
    Unsupported,
    /// The answer can't be had now: the upstream fails, hangs or limits.
    Unavailable,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    pub fn status(self) -> StatusCode {
        match self {
            Self::BlobUnknown
            | Self::BlobUploadUnknown
            | Self::ManifestUnknown
            | Self::NameUnknown => StatusCode::NOT_FOUND,
            Self::BlobUploadInvalid
            | Self::DigestInvalid
            | Self::ManifestBlobUnknown
            | Self::ManifestInvalid
            | Self::NameInvalid
            | Self::PaginationNumberInvalid
            | Self::SizeInvalid => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::FORBIDDEN,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Unsupported => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// The body of an error answer: `{"errors": [{"code": ..., "message": ..., "detail": ...}]}`.
#[derive(Debug, Serialize)]
pub struct ErrorBody<'a> {
    errors: Vec<ErrorEntry<'a>>,
}

#[derive(Debug, Serialize)]
struct ErrorEntry<'a> {
    code: ErrorCode,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a Value>,
}

impl<'a> ErrorBody<'a> {
    /// The body for one error, or for one that stands for several, each with a detail of its own;
    /// `message` is for people.
    pub fn new(code: ErrorCode, message: &'a str, details: &'a [Value]) -> Self {
        let entry = |detail| ErrorEntry {
            code,
            message,
            detail,
        };
        let errors = if details.is_empty() {
            vec![entry(None)]
        } else {
            details.iter().map(|detail| entry(Some(detail))).collect()
        };
        Self { errors }
    }

    /// The message of the first error in a body, for the one who asked.
    pub fn message(body: &[u8]) -> Option<String> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let message = body.pointer("/errors/0/message")?.as_str()?;
        Some(message.to_owned())
    }
}
