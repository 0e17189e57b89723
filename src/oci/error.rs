//! Error codes and bodies.

use http::StatusCode;
use serde::Serialize;

/// Error codes of distribution-spec 1.1 ("Error codes"), those that a mirror has a use for, and two
/// that clients know from distribution: `PAGINATION_NUMBER_INVALID`, and `UNAVAILABLE` for a request
/// that can be answered later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The blob is not known to this registry or its upstream.
    BlobUnknown,
    /// The digest is not of a known form.
    DigestInvalid,
    /// The manifest or tag is not known to this registry or its upstream.
    ManifestUnknown,
    /// The manifest is too large.
    ManifestInvalid,
    /// The repository name does not fit the grammar.
    NameInvalid,
    /// The repository is not known.
    NameUnknown,
    /// The number of entries that a list is to have is none.
    PaginationNumberInvalid,
    /// This registry does not do that.
    Unsupported,
    /// The answer can't be had now: the upstream fails, hangs or limits.
    Unavailable,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    pub fn status(self) -> StatusCode {
        match self {
            Self::BlobUnknown | Self::ManifestUnknown | Self::NameUnknown => StatusCode::NOT_FOUND,
            Self::ManifestInvalid => StatusCode::PAYLOAD_TOO_LARGE,
            Self::DigestInvalid | Self::NameInvalid | Self::PaginationNumberInvalid => {
                StatusCode::BAD_REQUEST
            }
            Self::Unsupported => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// The body of an error answer: `{"errors": [{"code": ..., "message": ...}]}`.
#[derive(Debug, Serialize)]
pub struct ErrorBody<'a> {
    errors: [ErrorEntry<'a>; 1],
}

#[derive(Debug, Serialize)]
struct ErrorEntry<'a> {
    code: ErrorCode,
    message: &'a str,
}

impl<'a> ErrorBody<'a> {
    /// The body for one error; `message` is for people.
    pub fn new(code: ErrorCode, message: &'a str) -> Self {
        Self {
            errors: [ErrorEntry { code, message }],
        }
    }

    /// The message of the first error in a body, for the one who asked.
    pub fn message(body: &[u8]) -> Option<String> {
        let body: serde_json::Value = serde_json::from_slice(body).ok()?;
        let message = body.pointer("/errors/0/message")?.as_str()?;
        Some(message.to_owned())
    }
}
