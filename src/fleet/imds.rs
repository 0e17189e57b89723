//! The instance metadata service, by its second version alone (`IMDSv2`): every question shows a
//! token that a PUT has given.
//!
//! Not the SDK's own client: that repeats by its own times, and keeps a token that was refused.

use std::env;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

use super::aws::chain;
use crate::resolve::{self, Connector};

/// Where it is on every instance.
const ENDPOINT: &str = "http://169.254.169.254";
/// The same by IPv6.
const ENDPOINT_IPV6: &str = "http://[fd00:ec2::254]";
/// How long one question may take. The answer comes from the same machine.
const DEADLINE: Duration = Duration::from_secs(2);
/// For how long a token is asked for, the longest that there is.
const TOKEN_LIFE: Duration = Duration::from_hours(6);
/// A token is renewed so long before its end.
const TOKEN_MARGIN: Duration = Duration::from_mins(1);
/// What is read of an answer, in bytes.
const LIMIT: usize = 16 * 1024;
const TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TOKEN_TTL: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");

/// The metadata service did not say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImdsError {
    /// Somebody has turned it off for this process.
    #[error("the instance metadata service is turned off (AWS_EC2_METADATA_DISABLED)")]
    Disabled,
    /// The service refuses to be used.
    #[error(
        "the instance metadata service refuses to give a token ({0}): enable it for this instance \
         (HttpEndpoint)"
    )]
    NoToken(StatusCode),
    /// No answer in time.
    #[error(
        "the instance metadata service at {endpoint} did not answer {what} within 2s: is this an EC2 \
         instance? In a container, or behind a bridge, its hop limit has to be 2 \
         (HttpPutResponseHopLimit)"
    )]
    Late {
        /// Where it was asked.
        endpoint: String,
        /// What for.
        what: String,
    },
    /// The connection failed.
    #[error("the instance metadata service at {endpoint} can't be asked for {what}: {reason}")]
    Unreachable {
        /// Where it was asked.
        endpoint: String,
        /// What for.
        what: String,
        /// How.
        reason: String,
    },
    /// Any other answer than 200 and 404.
    #[error("the instance metadata service answered {what} with {status}")]
    Status {
        /// What was asked for.
        what: String,
        /// The answer.
        status: StatusCode,
    },
    /// Something that every instance has is not there.
    #[error("the instance metadata service has no {0}, which every instance has")]
    Absent(&'static str),
}

/// The service, and the token that it was last given.
pub struct Imds {
    endpoint: String,
    client: Client<Connector, Empty<Bytes>>,
    token: Mutex<Option<(HeaderValue, Instant)>>,
}

impl Imds {
    /// Where the standard variables say, or where it always is.
    pub fn from_environment() -> Result<Self, ImdsError> {
        let said = |name| env::var(name).ok().filter(|value| !value.is_empty());
        if said("AWS_EC2_METADATA_DISABLED").is_some_and(|it| it.eq_ignore_ascii_case("true")) {
            return Err(ImdsError::Disabled);
        }
        let ipv6 = said("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE")
            .is_some_and(|mode| mode.eq_ignore_ascii_case("ipv6"));
        let usual = if ipv6 { ENDPOINT_IPV6 } else { ENDPOINT };
        let endpoint = said("AWS_EC2_METADATA_SERVICE_ENDPOINT");
        Ok(Self::at(endpoint.as_deref().unwrap_or(usual)))
    }

    /// The service at this URL.
    pub fn at(endpoint: &str) -> Self {
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            client: Client::builder(TokioExecutor::new()).build(resolve::connector()),
            token: Mutex::default(),
        }
    }

    /// What is at `latest/meta-data/<path>`, without white space around it; nothing where there is
    /// none (404).
    pub async fn get(&self, path: &str) -> Result<Option<String>, ImdsError> {
        let what = format!("latest/meta-data/{path}");
        for renewed in [false, true] {
            let token = self.token().await?;
            let (status, body) = self.ask(Method::GET, &what, (TOKEN, token)).await?;
            match status {
                StatusCode::OK => {
                    let text = String::from_utf8_lossy(&body);
                    return Ok(Some(text.trim().to_owned()));
                }
                StatusCode::NOT_FOUND => return Ok(None),
                // An instance that was stopped, or its service, has forgotten it.
                StatusCode::UNAUTHORIZED if !renewed => self.keep(None),
                status => return Err(ImdsError::Status { what, status }),
            }
        }
        let status = StatusCode::UNAUTHORIZED;
        Err(ImdsError::Status { what, status })
    }

    /// What has to be there.
    pub async fn must(&self, path: &'static str) -> Result<String, ImdsError> {
        self.get(path).await?.ok_or(ImdsError::Absent(path))
    }

    fn keep(&self, token: Option<(HeaderValue, Instant)>) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }

    async fn token(&self) -> Result<HeaderValue, ImdsError> {
        let kept = self
            .token
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some((token, ends)) = kept
            && Instant::now() < ends
        {
            return Ok(token);
        }
        let life = HeaderValue::from(TOKEN_LIFE.as_secs());
        let (status, body) = self
            .ask(Method::PUT, "latest/api/token", (TOKEN_TTL, life))
            .await?;
        let token = HeaderValue::from_bytes(body.trim_ascii());
        match (status, token) {
            (StatusCode::OK, Ok(mut token)) => {
                token.set_sensitive(true);
                let ends = Instant::now() + TOKEN_LIFE.saturating_sub(TOKEN_MARGIN);
                self.keep(Some((token.clone(), ends)));
                Ok(token)
            }
            (status, _) => Err(ImdsError::NoToken(status)),
        }
    }

    async fn ask(
        &self,
        method: Method,
        what: &str,
        (name, value): (HeaderName, HeaderValue),
    ) -> Result<(StatusCode, Bytes), ImdsError> {
        let unreachable = |reason: String| ImdsError::Unreachable {
            endpoint: self.endpoint.clone(),
            what: what.to_owned(),
            reason,
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("{}/{what}", self.endpoint))
            .header(name, value)
            .body(Empty::new());
        let request = request.map_err(|error| unreachable(error.to_string()))?;
        let asked = async {
            let answer = self.client.request(request).await;
            let answer = answer.map_err(|error| unreachable(chain(&error)))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), LIMIT).collect().await;
            let body = body.map_err(|error| unreachable(error.to_string()))?;
            Ok((status, body.to_bytes()))
        };
        let late = || ImdsError::Late {
            endpoint: self.endpoint.clone(),
            what: what.to_owned(),
        };
        tokio::time::timeout(DEADLINE, asked)
            .await
            .map_err(|_| late())?
    }
}
