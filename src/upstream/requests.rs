//! What an upstream is asked for: the endpoints of distribution-spec 1.1, as calls.

use std::error::Error;
use std::fmt;

use bytes::Bytes;
use http::header::{
    ACCEPT, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LINK, RANGE,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::Value;

use super::endpoint::{Asked, asks_for, collect};
use super::{CONTENT_DIGEST, Upstream, UpstreamError};
use crate::oci::{Digest, MANIFEST_LIMIT, Name, OCI_INDEX, Reference};
use crate::store::s3::BlobStream;

/// Every form of manifest a client may want. Asking for all of them in one way makes the answer the
/// same for every client, as a cache needs it.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.v1+prettyjws, */*;q=0.1";

/// Pages of referrers that are read, of up to 4 MiB each.
const REFERRER_PAGES: usize = 64;
/// And how large they may be in all, in bytes.
const REFERRERS_LIMIT: usize = 8 * 1024 * 1024;

/// The largest page of tags that is read, in bytes.
const TAGS_LIMIT: usize = 16 * 1024 * 1024;

/// A manifest as it came from the upstream, not yet checked against any digest.
#[derive(Debug)]
pub struct FetchedManifest {
    /// The body.
    pub bytes: Bytes,
    /// What the upstream says its digest is.
    pub digest: Option<Digest>,
}

/// What a manifest is, without its bytes.
#[derive(Debug, Clone)]
pub struct Description {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: HeaderValue,
    /// Its size in bytes.
    pub size: u64,
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
    pub body: BlobBody,
}

/// The bytes of a blob, from wherever they come.
pub enum BlobBody {
    /// The answer of a registry.
    Registry(Incoming),
    /// Ranges of an object.
    Bucket(Box<BlobStream>),
}

impl fmt::Debug for BlobBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Registry(_) => "Registry",
            Self::Bucket(_) => "Bucket",
        })
    }
}

impl BlobBody {
    /// The next bytes; `None` at the end. To stop waiting loses nothing.
    pub async fn next(&mut self) -> Option<Result<Bytes, Box<dyn Error + Send + Sync>>> {
        match self {
            Self::Registry(body) => loop {
                match body.frame().await? {
                    Ok(frame) => {
                        if let Ok(bytes) = frame.into_data() {
                            return Some(Ok(bytes));
                        }
                    }
                    Err(error) => return Some(Err(error.into())),
                }
            },
            Self::Bucket(stream) => Some(stream.next().await?.map_err(Into::into)),
        }
    }
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
    async fn collect(
        &self,
        response: Response<Incoming>,
        limit: usize,
        what: &str,
    ) -> Result<Bytes, UpstreamError> {
        collect(response, limit, self.timeouts.idle, self.question(what)).await
    }

    /// Asks for the digest of a manifest by HEAD, which counts against no pull limit. `None` where
    /// the upstream does not say it.
    pub async fn manifest_digest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<Option<Digest>, UpstreamError> {
        let path = format!("/v2/{name}/manifests/{reference}");
        let what = format!("{name}:{reference}");
        if let Some(bucket) = self.asking(&what) {
            return bucket.manifest_digest(name, reference).await;
        }
        let response = self
            .look(Method::HEAD, &path, name, &what, accept_manifests())
            .await?;
        Ok(content_digest(&response))
    }

    /// Asks what a manifest is by HEAD, which counts against no pull limit. `None` where the upstream
    /// does not say all of it.
    pub async fn describe(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<Option<Description>, UpstreamError> {
        let path = format!("/v2/{name}/manifests/{reference}");
        let what = format!("{name}:{reference}");
        // The manifest itself costs no more.
        if self.is_bucket() {
            return Ok(None);
        }
        let response = self
            .look(Method::HEAD, &path, name, &what, accept_manifests())
            .await?;
        let described = || {
            Some(Description {
                digest: content_digest(&response)?,
                media_type: response.headers().get(CONTENT_TYPE)?.clone(),
                size: content_length(&response)?,
            })
        };
        Ok(described())
    }

    /// Asks whether a manifest is shown to nobody.
    pub async fn shows_manifest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<(), UpstreamError> {
        let path = format!("/v2/{name}/manifests/{reference}");
        let what = format!("{name}:{reference}");
        if self.is_bucket() {
            return self.manifest_digest(name, reference).await.map(drop);
        }
        let shown = self.prove(Method::HEAD, &path, name, &what, accept_manifests());
        shown.await.map(drop)
    }

    /// Asks whether a blob is shown to nobody.
    pub async fn shows_blob(&self, name: &Name, digest: &Digest) -> Result<(), UpstreamError> {
        let path = format!("/v2/{name}/blobs/{digest}");
        let what = format!("the blob {digest} of {name}");
        if self.is_bucket() {
            return self.blob_size(name, digest).await.map(drop);
        }
        let shown = self.prove(Method::HEAD, &path, name, &what, HeaderMap::new());
        shown.await.map(drop)
    }

    /// Asks whether a list of tags is shown to nobody.
    pub async fn shows_tags(&self, name: &Name) -> Result<(), UpstreamError> {
        let path = format!("/v2/{name}/tags/list{}", page_query(Some(1), None));
        let what = format!("the tags of {name}");
        if self.is_bucket() {
            return self.tags(name, Some(1), None).await.map(drop);
        }
        let shown = self.prove(Method::GET, &path, name, &what, accept("application/json"));
        shown.await.map(drop)
    }

    /// Asks for a manifest: distribution-spec 1.1, end-3.
    pub async fn manifest(
        &self,
        name: &Name,
        reference: &Reference,
    ) -> Result<FetchedManifest, UpstreamError> {
        let path = format!("/v2/{name}/manifests/{reference}");
        let what = format!("the manifest {reference} of {name}");
        if let Some(bucket) = self.asking(&what) {
            return bucket.manifest(name, reference).await;
        }
        self.check_budget(&path, name, &what).await?;
        let response = self
            .get(Method::GET, &path, name, &what, accept_manifests())
            .await?;
        let digest = content_digest(&response);
        Ok(FetchedManifest {
            bytes: self.collect(response, MANIFEST_LIMIT, &what).await?,
            digest,
        })
    }

    /// Refuses to ask for a manifest where the upstream allows no more pulls: it would answer 429.
    /// Whether it allows some again is asked by HEAD, which is free, unless it has said when.
    async fn check_budget(&self, path: &str, name: &Name, what: &str) -> Result<(), UpstreamError> {
        if self.record.is_exhausted() && !self.record.is_pausing() {
            self.get(Method::HEAD, path, name, what, accept_manifests())
                .await?;
        }
        if self.record.is_exhausted() {
            return Err(self.question(what).limited());
        }
        Ok(())
    }

    /// Asks whether a repository has a blob, and for its size in bytes: distribution-spec 1.1, end-2.
    pub async fn blob_size(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<u64>, UpstreamError> {
        let path = format!("/v2/{name}/blobs/{digest}");
        let what = format!("the blob {digest} of {name}");
        if let Some(bucket) = self.asking(&what) {
            return bucket.blob_size(name, digest).await;
        }
        let response = self
            .look(Method::HEAD, &path, name, &what, HeaderMap::new())
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
        if let Some(bucket) = self.asking(&what) {
            return bucket.blob(name, digest, offset).await;
        }
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
                body: BlobBody::Registry(response.into_body()),
            }));
        }
        let total = content_length(&response);
        Ok(Some(FetchedBlob {
            offset: 0,
            total,
            body: BlobBody::Registry(response.into_body()),
        }))
    }

    /// Asks for the descriptors of what refers to a manifest: distribution-spec 1.1, end-12. `None`
    /// where the upstream does not know the request, as registries before 1.1 do not.
    pub async fn referrers(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<Vec<Value>>, UpstreamError> {
        let what = format!("the referrers of {digest} in {name}");
        if let Some(bucket) = self.asking(&what) {
            return bucket.referrers(name, digest).await;
        }
        let mut path = format!("/v2/{name}/referrers/{digest}");
        let mut descriptors = Vec::new();
        let mut left = REFERRERS_LIMIT;
        for page in 0..REFERRER_PAGES {
            let asked = self.look(Method::GET, &path, name, &what, accept(OCI_INDEX));
            let response = match asked.await {
                Ok(response) => response,
                Err(UpstreamError::NotFound { .. }) if page == 0 => return Ok(None),
                // Of a list that was there a moment ago: not an answer about all of it.
                Err(error) if page > 0 && error.is_final() => {
                    return Err(self.protocol_error(&what, &format!("no next page: {error}")));
                }
                Err(error) => return Err(error),
            };
            let next = next_page(&response).map_err(|reason| self.protocol_error(&what, reason))?;
            let body = self
                .collect(response, MANIFEST_LIMIT.min(left), &what)
                .await?;
            left -= body.len();
            let listed = descriptors_of(&body)
                .ok_or_else(|| self.protocol_error(&what, "not an image index"))?;
            descriptors.extend(listed);
            match next {
                Some(next) => path = next,
                None => return Ok(Some(descriptors)),
            }
        }
        Err(self.protocol_error(&what, "a list without an end"))
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
        if let Some(bucket) = self.asking(&what) {
            return bucket.tags(name, limit, last).await;
        }
        let response = self
            .look(Method::GET, &path, name, &what, accept("application/json"))
            .await?;
        let more = next_link(response.headers()).is_some();
        let body = self.collect(response, TAGS_LIMIT, &what).await?;
        let page: Page = serde_json::from_slice(&body)
            .map_err(|e| self.protocol_error(&what, &format!("not a list of tags: {e}")))?;
        Ok(FetchedTags {
            tags: page.tags.unwrap_or_default(),
            more,
        })
    }
}

/// The descriptors in an index; `None` for what is none.
pub fn descriptors_of(index: &[u8]) -> Option<Vec<Value>> {
    match serde_json::from_slice::<Value>(index).ok()?["manifests"].take() {
        Value::Array(descriptors) => Some(descriptors),
        _ => None,
    }
}

/// Where the next page of a list is, as a path of the API with its query: of the same endpoint, since
/// any other is nobody that we were told to ask. Source: RFC 8288, and RFC 3986, 5.2.
fn next_page(response: &Response<Incoming>) -> Result<Option<String>, &'static str> {
    let Some(target) = next_link(response.headers()) else {
        return Ok(None);
    };
    let elsewhere = "its next page is not on it";
    let Asked { endpoint, url } = response.extensions().get().ok_or(elsewhere)?;
    let next = url.join(&target).map_err(|_| elsewhere)?;
    let path = next
        .path()
        .strip_prefix(endpoint.path().trim_end_matches('/'));
    let path = path.filter(|path| path.starts_with("/v2/") && next.origin() == endpoint.origin());
    let path = path.ok_or(elsewhere)?;
    Ok(Some(match next.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    }))
}

/// The target of `Link: <target>; rel="next"`, which may stand among others.
fn next_link(headers: &HeaderMap) -> Option<String> {
    let mut links = headers.get_all(LINK).iter();
    // What is not ASCII is in a title; the target is.
    links.find_map(|links| {
        let links = String::from_utf8_lossy(links.as_bytes());
        let mut rest = &*links;
        while let Some((_, link)) = rest.split_once('<') {
            let (target, parameters) = link.split_once('>')?;
            // Up to the next link. What is quoted may hold a comma, and seldom one with a `<`.
            let end = parameters.find('<').unwrap_or(parameters.len());
            let relation = |parameter: &str| {
                let (key, value) = parameter.trim_matches([' ', ',']).split_once('=')?;
                let value = value.trim().trim_matches('"').to_ascii_lowercase();
                let next = value.split_ascii_whitespace().any(|it| it == "next");
                (next && key.trim().eq_ignore_ascii_case("rel")).then_some(())
            };
            if parameters[..end]
                .split(';')
                .any(|it| relation(it).is_some())
            {
                return Some(target.to_owned());
            }
            rest = &parameters[end..];
        }
        None
    })
}

/// `?n=..&last=..`, or nothing.
fn page_query(limit: Option<usize>, last: Option<&str>) -> String {
    let mut query = url::form_urlencoded::Serializer::for_suffix("?".to_owned(), 1);
    if let Some(limit) = limit {
        query.append_pair("n", &limit.to_string());
    }
    if let Some(last) = last {
        query.append_pair("last", last);
    }
    let query = query.finish();
    if query == "?" { String::new() } else { query }
}

/// Whether a path is one of a list of tags.
pub(super) fn asks_for_tags(path: &str) -> bool {
    asks_for(path, "tags")
}

/// Whether a success can be the answer to a request for this path, and not a page that anybody is
/// given instead, for one to log in by.
pub(super) fn is_what_was_asked_for(path: &str, headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let media_type = text(CONTENT_TYPE).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim();
    let media_type = media_type.to_ascii_lowercase();
    if asks_for(path, "blobs") {
        return media_type != "text/html";
    }
    let digest: Option<Digest> = text(CONTENT_DIGEST).and_then(|digest| digest.parse().ok());
    let wanted: Option<Digest> = path.rsplit('/').next().and_then(|last| last.parse().ok());
    match (digest, wanted) {
        (Some(digest), Some(wanted)) if asks_for(path, "manifests") => digest == wanted,
        (Some(_), _) if asks_for(path, "manifests") => true,
        _ => {
            let form = media_type.strip_prefix("application/").unwrap_or_default();
            form.ends_with("json") || form.ends_with("jws")
        }
    }
}

/// Accepts every form of manifest.
pub(super) fn accept_manifests() -> HeaderMap {
    accept(MANIFESTS)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_of_the_right_kind_is_what_was_asked_for() {
        let digests = ["0", "1"].map(|digit| format!("sha256:{}", digit.repeat(64)));
        let of_digest = format!("/v2/a/manifests/{}", digests[0]);
        let blob = format!("/v2/a/blobs/{}", digests[0]);
        for (path, media_type, digest, right) in [
            ("/v2/a/manifests/1", OCI_INDEX, None, true),
            ("/v2/a/manifests/1", "text/html", None, false),
            ("/v2/a/manifests/1", "", None, false),
            ("/v2/a/manifests/1", "text/plain", Some(1), true),
            (&of_digest, "", Some(0), true),
            (&of_digest, OCI_INDEX, Some(1), false),
            (&of_digest, OCI_INDEX, None, true),
            (&blob, "", None, true),
            (&blob, "application/octet-stream", None, true),
            (&blob, "Text/HTML; charset=utf-8", None, false),
            (
                "/v2/a/tags/list?n=1",
                "application/json; charset=utf-8",
                None,
                true,
            ),
            ("/v2/a/tags/list?n=1", "text/html", Some(0), false),
        ] {
            let mut headers = HeaderMap::new();
            if !media_type.is_empty() {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
            }
            if let Some(digest) = digest {
                let digest: &str = &digests[digest];
                headers.insert(CONTENT_DIGEST, digest.parse().unwrap());
            }
            assert_eq!(
                is_what_was_asked_for(path, &headers),
                right,
                "{path}: {headers:?}"
            );
        }
    }

    #[test]
    fn the_next_page_is_found_among_other_links() {
        for (links, next) in [
            (&[r#"</v2/a?p=1>; rel="next""#][..], Some("/v2/a?p=1")),
            (&["<?p=1>;rel=next"], Some("?p=1")),
            (
                &[r#"<a>; rel="first", <b>; title="c, d"; rel="last next""#],
                Some("b"),
            ),
            (&[r#"<a>; rel="first""#, "<b>; REL=Next"], Some("b")),
            (&[r#"<a>; rel="nextish"; title="next""#], None),
            (&["nothing"], None),
            (&["<a"], None),
            (&[], None),
        ] {
            let links = links
                .iter()
                .map(|link| (LINK, HeaderValue::from_static(link)));
            let mut headers = HeaderMap::new();
            for (name, link) in links {
                headers.append(name, link);
            }
            assert_eq!(next_link(&headers).as_deref(), next, "{headers:?}");
        }
    }

    #[test]
    fn a_page_is_asked_for_by_a_query() {
        for (limit, last, query) in [
            (None, None, ""),
            (Some(2), None, "?n=2"),
            (None, Some("a"), "?last=a"),
            (Some(2), Some("a&b"), "?n=2&last=a%26b"),
        ] {
            assert_eq!(page_query(limit, last), query);
        }
    }
}
