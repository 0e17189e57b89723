//! Requests and answers on the wire: who calls what, and what comes back.

use std::collections::BTreeMap;
use std::fmt;

use http::HeaderMap;
use url::form_urlencoded;

use super::xml::{leaf, node};

/// One of the APIs, told apart by what a request is signed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    Autoscaling,
    LoadBalancing,
    Route53,
}

impl Service {
    fn namespace(self) -> &'static str {
        match self {
            Self::Autoscaling => "http://autoscaling.amazonaws.com/doc/2011-01-01/",
            Self::LoadBalancing => "http://elasticloadbalancing.amazonaws.com/doc/2015-12-01/",
            Self::Route53 => "https://route53.amazonaws.com/doc/2013-04-01/",
        }
    }

    /// The version that clients of the query protocol name.
    pub fn version(self) -> &'static str {
        match self {
            Self::Autoscaling => "2011-01-01",
            Self::LoadBalancing => "2015-12-01",
            Self::Route53 => "2013-04-01",
        }
    }
}

/// What a request says of who signed it (Signature Version 4). The signature itself is not computed
/// again: that is the SDK's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    pub access_key: String,
    pub service: Service,
    /// The token that temporary credentials come with.
    pub session_token: Option<String>,
}

impl Signed {
    /// Reads `Authorization: AWS4-HMAC-SHA256 Credential=<key>/<date>/<region>/<service>/aws4_request,
    /// SignedHeaders=..., Signature=...`.
    pub fn read(headers: &HeaderMap, region: &str) -> Result<Self, ApiError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let Some(authorization) = text("authorization") else {
            return Err(ApiError::new(
                403,
                "MissingAuthenticationToken",
                "Request is missing Authentication Token",
            ));
        };
        let wrong = |what: String| ApiError::new(403, "SignatureDoesNotMatch", what);
        let rest = authorization
            .strip_prefix("AWS4-HMAC-SHA256 ")
            .ok_or_else(|| wrong(format!("not Signature Version 4: {authorization}")))?;
        let part = |name: &str| {
            let mut parts = rest.split(',').map(str::trim);
            parts.find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
        };
        if part("SignedHeaders").is_none_or(|signed| !signed.split(';').any(|it| it == "host"))
            || part("Signature").is_none_or(|signature| signature.len() != 64)
            || text("x-amz-date").is_none()
        {
            return Err(wrong("an incomplete signature".to_owned()));
        }
        let scope: Vec<&str> = part("Credential").unwrap_or_default().split('/').collect();
        let &[access_key, _, signed_region, service, "aws4_request"] = scope.as_slice() else {
            return Err(wrong(format!("an incomplete scope: {scope:?}")));
        };
        let (service, wanted) = match service {
            "autoscaling" => (Service::Autoscaling, region),
            "elasticloadbalancing" => (Service::LoadBalancing, region),
            // It is in one region for the whole world.
            "route53" => (Service::Route53, "us-east-1"),
            _ => return Err(wrong(format!("signed for {service}, which is not here"))),
        };
        if signed_region != wanted {
            let what =
                format!("Credential should be scoped to a valid region, not '{signed_region}'.");
            return Err(wrong(what));
        }
        Ok(Self {
            access_key: access_key.to_owned(),
            service,
            session_token: text("x-amz-security-token").map(str::to_owned),
        })
    }
}

/// The parameters of a call.
#[derive(Debug, Clone, Default)]
pub struct Params(BTreeMap<String, String>);

impl Params {
    pub fn parse(text: &[u8]) -> Self {
        Self(form_urlencoded::parse(text).into_owned().collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub fn need(&self, name: &str) -> Result<&str, ApiError> {
        self.get(name).ok_or_else(|| {
            ApiError::validation(format!(
                "1 validation error detected: Value null at '{name}' failed to satisfy constraint: \
                 Member must not be null"
            ))
        })
    }

    pub fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let parse = |text: &str| {
            let wrong = |_| ApiError::validation(format!("'{text}' at '{name}' is not a number"));
            text.parse().map_err(wrong)
        };
        self.get(name).map(parse).transpose()
    }

    pub fn truth(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(text) => Err(ApiError::validation(format!(
                "'{text}' at '{name}' is neither true nor false"
            ))),
        }
    }

    /// `name.member.1`, `name.member.2` and so on.
    pub fn list(&self, name: &str) -> Vec<&str> {
        let item = |number: usize| self.get(&format!("{name}.member.{number}"));
        (1..).map_while(item).collect()
    }

    /// Refuses what this control plane does not know: a parameter that is ignored would make a test
    /// believe in it.
    pub fn only(&self, known: &[&str]) -> Result<(), ApiError> {
        let unknown = self.0.iter().find(|(name, value)| {
            let name = name.split('.').next().unwrap_or_default();
            !known.contains(&name) && !["Action", "Version"].contains(&name) && !value.is_empty()
        });
        match unknown {
            Some((name, _)) => Err(ApiError::new(
                501,
                "NotImplemented",
                format!("the control plane of the tests does not know {name}"),
            )),
            None => Ok(()),
        }
    }
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    pub status: u16,
    pub code: String,
    pub message: String,
}

impl ApiError {
    pub fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.to_owned(),
            message: message.into(),
        }
    }

    pub fn validation(message: impl Into<String>) -> Self {
        Self::new(400, "ValidationError", message)
    }

    pub fn throttled() -> Self {
        Self::new(400, "Throttling", "Rate exceeded")
    }

    /// The answer that says so. All three services write the same, but for the namespace.
    pub fn into_reply(self, service: Service, request: &str) -> Reply {
        let kind = if self.status < 500 {
            "Sender"
        } else {
            "Receiver"
        };
        let error = leaf("Type", kind) + &leaf("Code", self.code) + &leaf("Message", self.message);
        let inner = node("Error", error) + &leaf("RequestId", request);
        Reply {
            status: self.status,
            body: document("ErrorResponse", service, &inner),
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub body: String,
}

impl Reply {
    /// What a call of the query protocol is answered with. `None`: it answers nothing at all.
    pub fn query(service: Service, operation: &str, result: Option<&str>, request: &str) -> Self {
        let result = result.map(|result| node(&format!("{operation}Result"), result));
        let about = node("ResponseMetadata", leaf("RequestId", request));
        let inner = result.unwrap_or_default() + &about;
        Self {
            status: 200,
            body: document(&format!("{operation}Response"), service, &inner),
        }
    }

    /// What Route 53 answers.
    pub fn rest(operation: &str, inner: &str) -> Self {
        Self {
            status: 200,
            body: document(&format!("{operation}Response"), Service::Route53, inner),
        }
    }
}

fn document(root: &str, service: Service, inner: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?>\n<{root} xmlns=\"{}\">{inner}</{root}>",
        service.namespace()
    )
}
