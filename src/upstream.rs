//! The registries that are mirrored: one client for each, with its tokens and limits.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, RANGE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;

mod challenge;
mod client;
mod token;

pub use client::{Timeouts, Upstream};

use crate::oci::{Digest, MANIFEST_LIMIT, Name, Reference};

/// Every form of manifest a client may want. Asking for all of them in one way makes the answer the
/// same for every client, as a cache needs it.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.v1+prettyjws, */*;q=0.1";

/// The largest page of tags that is read, in bytes.
const TAGS_LIMIT: usize = 16 * 1024 * 1024;

/// `Docker-Content-Digest`: the digest of a manifest that was asked for by tag.
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

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
    #[error("{registry} has no {what}")]
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
}

impl UpstreamError {
    /// Whether the upstream has said, as the authority, that this can't be pulled from it. Anything
    /// else may be different in a minute.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Denied { .. } | Self::NotFound { .. })
    }
}

/// A manifest as it came from the upstream, not yet checked against any digest.
#[derive(Debug)]
pub struct FetchedManifest {
    /// The body.
    pub bytes: Bytes,
    /// What the upstream says its digest is.
    pub digest: Option<Digest>,
}

/// A blob's body as it arrives.
#[derive(Debug)]
pub struct FetchedBlob {
    /// Where in the blob the body starts, in bytes: what was asked for, or 0 where the upstream
    /// ignores ranges.
    pub offset: u64,
    /// The size of the whole blob in bytes, where the upstream says it.
    pub total: Option<u64>,
    /// The body.
    pub body: Incoming,
}

/// A page of tags.
#[derive(Debug)]
pub struct FetchedTags {
    /// The tags, in the upstream's order.
    pub tags: Vec<String>,
    /// Whether there are more.
    pub more: bool,
}

impl Upstream {
    /// Asks for the digest of a manifest by HEAD, which counts against no pull limit. `None` where
    /// the upstream does not say it.
    pub async fn manifest_digest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<Option<Digest>, UpstreamError> {
        let path = format!("/v2/{name}/manifests/{reference}");
        let what = format!("{name}:{reference}");
        let response = self
            .get(Method::HEAD, &path, name, &what, accept(MANIFESTS))
            .await?;
        Ok(content_digest(&response))
    }

    /// Asks for a manifest: distribution-spec 1.1, end-3.
    pub async fn manifest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<FetchedManifest, UpstreamError> {
        let path = format!("/v2/{name}/manifests/{reference}");
        let what = format!("the manifest {reference} of {name}");
        let response = self
            .get(Method::GET, &path, name, &what, accept(MANIFESTS))
            .await?;
        let digest = content_digest(&response);
        Ok(FetchedManifest {
            bytes: self.collect(response, MANIFEST_LIMIT, &what).await?,
            digest,
        })
    }

    /// Asks whether a repository has a blob, and for its size in bytes: distribution-spec 1.1, end-2.
    pub async fn blob_size(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<u64>, UpstreamError> {
        let path = format!("/v2/{name}/blobs/{digest}");
        let what = format!("the blob {digest} of {name}");
        let response = self
            .get(Method::HEAD, &path, name, &what, HeaderMap::new())
            .await?;
        Ok(content_length(&response))
    }

    /// Asks for a blob from `offset` on: distribution-spec 1.1, end-2. `None` where nothing is left
    /// from there on (416).
    pub async fn blob(
        &self,
        name: &Name,
        digest: &Digest,
        offset: u64,
    ) -> Result<Option<FetchedBlob>, UpstreamError> {
        let path = format!("/v2/{name}/blobs/{digest}");
        let what = format!("the blob {digest} of {name}");
        let mut headers = HeaderMap::new();
        if offset > 0 {
            // An offset is decimal digits: always a valid header.
            if let Ok(range) = HeaderValue::try_from(format!("bytes={offset}-")) {
                headers.insert(RANGE, range);
            }
        }
        let response = match self.get(Method::GET, &path, name, &what, headers).await {
            Err(UpstreamError::Status {
                status: StatusCode::RANGE_NOT_SATISFIABLE,
                ..
            }) if offset > 0 => {
                return Ok(None);
            }
            other => other?,
        };
        if response.headers().contains_key(CONTENT_ENCODING) {
            return Err(self.protocol_error(&what, "a blob with a Content-Encoding"));
        }
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let (start, total) = content_range(&response)
                .ok_or_else(|| self.protocol_error(&what, "206 without a Content-Range"))?;
            if start != offset {
                return Err(self.protocol_error(&what, "206 for another range"));
            }
            return Ok(Some(FetchedBlob {
                offset,
                total,
                body: response.into_body(),
            }));
        }
        let total = content_length(&response);
        Ok(Some(FetchedBlob {
            offset: 0,
            total,
            body: response.into_body(),
        }))
    }

    /// Asks for a page of tags: distribution-spec 1.1, end-8.
    pub async fn tags(
        &self,
        name: &Name,
        limit: Option<usize>,
        last: Option<&str>,
    ) -> Result<FetchedTags, UpstreamError> {
        #[derive(serde::Deserialize)]
        struct Page {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let path = format!("/v2/{name}/tags/list{}", page_query(limit, last));
        let what = format!("the tags of {name}");
        let response = self
            .get(Method::GET, &path, name, &what, accept("application/json"))
            .await?;
        let more = response.headers().contains_key(http::header::LINK);
        let body = self.collect(response, TAGS_LIMIT, &what).await?;
        let page: Page = serde_json::from_slice(&body)
            .map_err(|e| self.protocol_error(&what, &format!("not a list of tags: {e}")))?;
        Ok(FetchedTags {
            tags: page.tags.unwrap_or_default(),
            more,
        })
    }

    async fn get(
        &self,
        method: Method,
        path: &str,
        name: &Name,
        what: &str,
        mut headers: HeaderMap,
    ) -> Result<Response<Incoming>, UpstreamError> {
        // What is stored must be the bytes that the digest is of.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let response = self.send(&method, path, name, what, &headers).await?;
        let (registry, what) = (self.registry().to_string(), what.to_owned());
        match response.status() {
            status if status.is_success() => Ok(response),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Err(UpstreamError::Denied {
                    registry,
                    what,
                    status,
                })
            }
            StatusCode::NOT_FOUND => Err(UpstreamError::NotFound { registry, what }),
            StatusCode::TOO_MANY_REQUESTS => Err(UpstreamError::Limited { registry, what }),
            status => Err(UpstreamError::Status {
                registry,
                what,
                status,
            }),
        }
    }

    /// Reads a whole body of at most `limit` bytes, giving up when nothing arrives for a while.
    async fn collect(
        &self,
        response: Response<Incoming>,
        limit: usize,
        what: &str,
    ) -> Result<Bytes, UpstreamError> {
        let mut body = Limited::new(response.into_body(), limit);
        let mut bytes = bytes::BytesMut::new();
        loop {
            let deadline = self.timeouts().idle;
            match tokio::time::timeout(deadline, body.frame()).await {
                Err(_) => return Err(self.timeout_error(what, deadline)),
                Ok(None) => return Ok(bytes.freeze()),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        bytes.extend_from_slice(&data);
                    }
                }
                Ok(Some(Err(e))) => {
                    let e: &(dyn std::error::Error + 'static) = &*e;
                    return Err(if e.is::<http_body_util::LengthLimitError>() {
                        self.protocol_error(what, &format!("more than {limit} bytes"))
                    } else {
                        self.transport_error(what, e)
                    });
                }
            }
        }
    }
}

/// `?n=..&last=..`, or nothing.
fn page_query(limit: Option<usize>, last: Option<&str>) -> String {
    let mut query = url::form_urlencoded::Serializer::new("?".to_owned());
    if let Some(limit) = limit {
        query.append_pair("n", &limit.to_string());
    }
    if let Some(last) = last {
        query.append_pair("last", last);
    }
    let query = query.finish();
    if query == "?" { String::new() } else { query }
}

fn accept(types: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(types))])
}

fn content_digest(response: &Response<Incoming>) -> Option<Digest> {
    response
        .headers()
        .get(CONTENT_DIGEST)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

fn content_length(response: &Response<Incoming>) -> Option<u64> {
    response
        .headers()
        .get(CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

/// `bytes 5-9/10` -> `(5, Some(10))`; the size may be `*`. Source: RFC 9110, 14.4.
fn content_range(response: &Response<Incoming>) -> Option<(u64, Option<u64>)> {
    let value = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.parse().ok()?, total.parse().ok()))
}
