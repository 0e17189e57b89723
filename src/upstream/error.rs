//! What can go wrong with an upstream.

use std::error::Error;
use std::time::Duration;

use http::StatusCode;

use crate::oci::RegistryHost;

/// An upstream did not give what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UpstreamError {
    /// 401 or 403: it is not there for us, or not there at all; registries don't tell.
    #[error("{registry} does not let us pull {what} ({status})")]
    Denied {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// Its answer.
        status: StatusCode,
    },
    /// 404.
    #[error("{registry} does not have {what}")]
    NotFound {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
    },
    /// 429: the upstream limits us.
    #[error("{registry} limits our pulls (429 for {what})")]
    Limited {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
    },
    /// An answer that is none of the above and no success.
    #[error("{registry} answered {status} for {what}")]
    Status {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// Its answer.
        status: StatusCode,
    },
    /// No answer: the connection could not be made, or broke.
    #[error("can't ask {registry} for {what}: {reason}")]
    Transport {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// What came back from the network.
        reason: String,
    },
    /// No answer in time.
    #[error("{registry} did not answer in {} for {what}", humantime::format_duration(*.deadline))]
    Timeout {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// How long it had.
        deadline: Duration,
    },
    /// An answer that breaks the protocol.
    #[error("{registry} gave a wrong answer for {what}: {reason}")]
    Protocol {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An answer that is larger than this agent takes.
    #[error("{registry} sent more than {limit} bytes for {what}")]
    TooLarge {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// How many bytes are taken.
        limit: usize,
    },
}

impl UpstreamError {
    /// Whether the upstream has said, as the authority, that this can't be pulled from it. Anything
    /// else may be different in a minute.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Denied { .. } | Self::NotFound { .. })
    }

    /// Whether the upstream does not answer requests of this method.
    pub fn is_of_method(&self) -> bool {
        let Self::Status { status, .. } = self else {
            return false;
        };
        *status == StatusCode::METHOD_NOT_ALLOWED
    }
}

/// What was asked of whom, for the errors that say so.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) registry: &'a RegistryHost,
    pub(crate) what: &'a str,
}

impl Question<'_> {
    fn parts(self) -> (String, String) {
        (self.registry.to_string(), self.what.to_owned())
    }

    /// The error that an unsuccessful status is.
    pub(super) fn status(self, status: StatusCode) -> UpstreamError {
        let (registry, what) = self.parts();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => UpstreamError::Denied {
                registry,
                what,
                status,
            },
            StatusCode::NOT_FOUND => UpstreamError::NotFound { registry, what },
            StatusCode::TOO_MANY_REQUESTS => UpstreamError::Limited { registry, what },
            status => UpstreamError::Status {
                registry,
                what,
                status,
            },
        }
    }

    pub(super) fn limited(self) -> UpstreamError {
        self.status(StatusCode::TOO_MANY_REQUESTS)
    }

    pub(crate) fn protocol(self, reason: impl Into<String>) -> UpstreamError {
        let (registry, what) = self.parts();
        UpstreamError::Protocol {
            registry,
            what,
            reason: reason.into(),
        }
    }

    pub(crate) fn too_large(self, limit: usize) -> UpstreamError {
        let (registry, what) = self.parts();
        UpstreamError::TooLarge {
            registry,
            what,
            limit,
        }
    }

    pub(crate) fn timeout(self, deadline: Duration) -> UpstreamError {
        let (registry, what) = self.parts();
        UpstreamError::Timeout {
            registry,
            what,
            deadline,
        }
    }

    pub(crate) fn transport(self, reason: impl Into<String>) -> UpstreamError {
        let (registry, what) = self.parts();
        UpstreamError::Transport {
            registry,
            what,
            reason: reason.into(),
        }
    }

    /// The error of a connection that failed, with its causes: the outermost says only "client error
    /// (Connect)".
    pub(crate) fn broken(self, error: &dyn Error) -> UpstreamError {
        let mut reason = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !reason.ends_with(&text) {
                reason = format!("{reason}: {text}");
            }
            cause = error.source();
        }
        self.transport(reason)
    }
}
