//! Docker Hub's side of the protocol: the token flow, manifests, blobs, tags and limits.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde_json::{Value, json};

use super::fault::{Fault, Plan};
use super::{Content, Repository, Role};
use crate::support::client::find;

/// A request, taken apart.
pub(super) struct Request {
    pub role: Role,
    pub method: String,
    pub path: String,
    pub query: Vec<(String, String)>,
    pub headers: Vec<(String, String)>,
}

impl Request {
    pub fn new(role: Role, method: String, target: &str, headers: Vec<(String, String)>) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        // It may also be reached below a path.
        let path = path.strip_prefix("/below").unwrap_or(path);
        let query = url::form_urlencoded::parse(query.as_bytes())
            .into_owned()
            .collect();
        Self {
            role,
            method,
            path: path.to_owned(),
            query,
            headers,
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    fn asked(&self, name: &str) -> Option<&str> {
        find(&self.query, name)
    }
}

/// What is sent back.
pub(super) struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Answer {
    fn new(status: u16, media_type: &str, body: impl Into<Bytes>) -> Self {
        let answer = Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        };
        answer.with("Content-Type", media_type)
    }

    fn json(status: u16, body: &Value) -> Self {
        Self::new(status, "application/json", body.to_string())
    }

    fn error(status: u16, code: &str) -> Self {
        Self::json(
            status,
            &json!({"errors": [{"code": code, "message": "as the test wants it"}]}),
        )
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

impl Content {
    /// The answer to a request, but for what the plan does to its bytes on the wire.
    pub(super) fn answer(&mut self, request: &Request, plan: &Plan) -> Answer {
        let status = |fault: &Fault| match fault {
            Fault::Status(status) => Some(*status),
            _ => None,
        };
        if let Some(status) = plan.find(status) {
            return Answer::error(
                status,
                if status == 429 {
                    "TOOMANYREQUESTS"
                } else {
                    "UNKNOWN"
                },
            );
        }
        if plan.has(|fault| matches!(fault, Fault::LoginPage)) {
            return Answer::new(200, "text/html; charset=utf-8", "<form>Who are you?</form>");
        }
        let seconds = |fault: &Fault| match fault {
            Fault::RetryAfter(seconds) => Some(*seconds),
            _ => None,
        };
        if let Some(seconds) = plan.find(seconds) {
            return Answer::error(429, "TOOMANYREQUESTS").with("Retry-After", seconds.to_string());
        }
        let path: Vec<&str> = request.path.trim_start_matches('/').split('/').collect();
        match (request.role, path.as_slice()) {
            (_, ["token"]) => self.token(request),
            (Role::Cdn, ["cdn", digest]) => self.cdn(request, digest, plan),
            (Role::Registry, ["v2", ""]) => match self.grants(request) {
                Some(_) => Answer::json(200, &json!({})),
                None => self.challenge(None),
            },
            (Role::Registry, ["v2", name @ .., kind, what]) if !name.is_empty() => {
                self.repository(request, &name.join("/"), kind, what, plan)
            }
            _ => Answer::error(404, "UNSUPPORTED"),
        }
    }

    /// Source: distribution's "Token Authentication Specification".
    fn token(&mut self, request: &Request) -> Answer {
        let basic = request.header("authorization").map(|value| {
            let coded = value.strip_prefix("Basic ").unwrap_or_default();
            String::from_utf8_lossy(&BASE64.decode(coded).unwrap_or_default()).into_owned()
        });
        let known = basic.is_some() && basic == self.account;
        if basic.is_some() && !known {
            return Answer::error(401, "UNAUTHORIZED");
        }
        let scopes = request.query.iter().filter(|(name, _)| name == "scope");
        let granted = scopes.filter_map(|(_, scope)| {
            let name = scope.strip_prefix("repository:")?.strip_suffix(":pull")?;
            let repository = self.repositories.get(name)?;
            (known || !repository.private).then(|| name.to_owned())
        });
        let granted = granted.collect();
        let token = format!("token-{}-of-the-test", self.tokens.len());
        self.tokens.insert(token.clone(), granted);
        Answer::json(
            200,
            &json!({"token": token, "expires_in": self.token_lifetime}),
        )
    }

    /// The repositories that the request's token is for; nothing without a valid token.
    fn grants(&self, request: &Request) -> Option<&Vec<String>> {
        let token = request.header("authorization")?.strip_prefix("Bearer ")?;
        self.tokens.get(token)
    }

    /// Whether the request may see the content it asks for.
    pub(super) fn admits(&self, request: &Request) -> bool {
        let name = request.path.strip_prefix("/v2/").and_then(|path| {
            let end =
                ["/manifests/", "/blobs/", "/tags/", "/referrers/"].map(|kind| path.rfind(kind));
            Some(&path[..end.into_iter().flatten().max()?])
        });
        let granted = |name: &str| {
            self.grants(request)?
                .iter()
                .find(|granted| *granted == name)
        };
        self.open || name.is_none_or(|name| granted(name).is_some())
    }

    fn challenge(&self, name: Option<&str>) -> Answer {
        let scope = name.map(|name| format!(r#",scope="repository:{name}:pull""#));
        let (realm, scope) = (&self.realm, scope.unwrap_or_default());
        let bearer = format!(r#"Bearer realm="{realm}",service="registry.test"{scope}"#);
        Answer::error(401, "UNAUTHORIZED").with("WWW-Authenticate", bearer)
    }

    fn repository(
        &mut self,
        request: &Request,
        name: &str,
        kind: &str,
        what: &str,
        plan: &Plan,
    ) -> Answer {
        // As the Hub: what does not exist looks like what may not be seen.
        let granted = self
            .grants(request)
            .is_some_and(|names| names.iter().any(|n| n == name));
        if !self.open && !granted {
            return self.challenge(Some(name));
        }
        match kind {
            "manifests" => self.manifest(request, name, what, plan),
            "referrers" => self.referrers(request, name, what),
            "blobs" => self.blob(request, name, what, plan),
            "tags" if what == "list" => match self.repositories.get(name) {
                Some(repository) => tags(request, name, repository),
                None => Answer::error(404, "NAME_UNKNOWN"),
            },
            _ => Answer::error(404, "UNSUPPORTED"),
        }
    }

    fn referrers(&self, request: &Request, name: &str, subject: &str) -> Answer {
        let known = self.repositories.get(name);
        match known.map(|repository| &repository.referrers) {
            Some(referrers) if !referrers.is_empty() => {
                let manifests = referrers.get(subject).cloned().unwrap_or_default();
                let index = |listed: &[Value]| json!({"schemaVersion": 2, "manifests": listed});
                let Some(link) = &self.referrers_link else {
                    return Answer::json(200, &index(&manifests));
                };
                let page = request.asked("p").and_then(|page| page.parse().ok());
                let page: usize = page.unwrap_or(0);
                let Some(one) = manifests.get(page..=page) else {
                    return Answer::error(404, "UNKNOWN");
                };
                let answer = Answer::json(200, &index(one));
                if page + 1 == manifests.len() {
                    return answer;
                }
                let link = link.replace("{path}", &request.path);
                answer.with("Link", link.replace("{page}", &(page + 1).to_string()))
            }
            _ => Answer::error(404, "UNSUPPORTED"),
        }
    }

    fn manifest(&mut self, request: &Request, name: &str, what: &str, plan: &Plan) -> Answer {
        let Some(repository) = self.repositories.get(name) else {
            return Answer::error(404, "NAME_UNKNOWN");
        };
        let digest = repository.tags.get(what).map_or(what, String::as_str);
        let found = repository.manifests.get(digest).cloned();
        // Only a GET counts against the limit; what remains is told with every answer.
        if let Some(remaining) = &mut self.remaining
            && request.method == "GET"
        {
            if *remaining == 0 {
                return Answer::error(429, "TOOMANYREQUESTS")
                    .with("ratelimit-limit", "100;w=21600")
                    .with("ratelimit-remaining", "0;w=21600");
            }
            *remaining -= 1;
        }
        let answer = match found {
            None => Answer::error(404, "MANIFEST_UNKNOWN"),
            Some(manifest) => {
                let body = plan.content(&manifest.blob.bytes);
                let answer = encoded(request, Answer::new(200, &manifest.media_type, body));
                if plan.has(|fault| matches!(fault, Fault::NoDigest)) {
                    answer
                } else {
                    answer.with("Docker-Content-Digest", manifest.blob.digest)
                }
            }
        };
        match self.remaining {
            None => answer,
            Some(remaining) => answer
                .with("ratelimit-limit", "100;w=21600")
                .with("ratelimit-remaining", format!("{remaining};w=21600")),
        }
    }

    fn blob(&self, request: &Request, name: &str, digest: &str, plan: &Plan) -> Answer {
        let repository = self.repositories.get(name);
        let Some(bytes) = repository.and_then(|repository| repository.blobs.get(digest)) else {
            return Answer::error(404, "BLOB_UNKNOWN");
        };
        match &self.cdn {
            Some(cdn) => Answer::new(307, "text/html", "").with(
                "Location",
                format!("{cdn}/cdn/{digest}?verify=signature-of-the-test"),
            ),
            None => {
                ranged(request, &plan.content(bytes), plan).with("Docker-Content-Digest", digest)
            }
        }
    }

    /// A content delivery network with signed addresses: as with S3, a second kind of authorization
    /// beside the signature is an error.
    fn cdn(&self, request: &Request, digest: &str, plan: &Plan) -> Answer {
        if request.header("authorization").is_some() {
            return Answer::error(400, "INVALIDARGUMENT");
        }
        if request.asked("verify") != Some("signature-of-the-test") {
            return Answer::error(403, "DENIED");
        }
        let bytes = self
            .repositories
            .values()
            .find_map(|repository| repository.blobs.get(digest));
        match bytes {
            Some(bytes) => ranged(request, &plan.content(bytes), plan),
            None => Answer::error(404, "BLOB_UNKNOWN"),
        }
    }
}

/// Tags in order, `n` at a time after `last`. Source: distribution-spec 1.1, "Listing tags".
fn tags(request: &Request, name: &str, repository: &Repository) -> Answer {
    let last = request.asked("last").unwrap_or_default();
    let n = request
        .asked("n")
        .and_then(|n| n.parse().ok())
        .unwrap_or(usize::MAX);
    let left: Vec<&String> = repository
        .tags
        .keys()
        .filter(|tag| tag.as_str() > last)
        .collect();
    let page = &left[..n.min(left.len())];
    let answer = Answer::json(200, &json!({"name": name, "tags": page}));
    match page.last() {
        Some(last) if page.len() < left.len() => answer.with(
            "Link",
            format!(r#"</v2/{name}/tags/list?last={last}&n={n}>; rel="next""#),
        ),
        _ => answer,
    }
}

/// A blob's bytes, or the range of them that was asked for (`bytes=N-` and `bytes=N-M`).
fn ranged(request: &Request, content: &Bytes, plan: &Plan) -> Answer {
    let media_type = "application/octet-stream";
    let range = request
        .header("range")
        .filter(|_| !plan.has(|fault| matches!(fault, Fault::NoRanges)))
        .and_then(|range| {
            let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
            let end = end
                .parse()
                .map_or(content.len(), |end: usize| content.len().min(end + 1));
            Some((start.parse::<usize>().ok()?, end))
        });
    match range {
        None => encoded(request, Answer::new(200, media_type, content.clone())),
        Some((start, end)) if start < end => {
            let of = content.len();
            Answer::new(206, media_type, content.slice(start..end))
                .with("Content-Range", format!("bytes {start}-{}/{of}", end - 1))
        }
        Some(_) => Answer::error(416, "RANGE_INVALID")
            .with("Content-Range", format!("bytes */{}", content.len())),
    }
}

/// An upstream may compress for whoever does not say that it wants the bytes as they are.
fn encoded(request: &Request, mut answer: Answer) -> Answer {
    if request.header("accept-encoding") == Some("identity") {
        return answer;
    }
    answer.body = [b"\x1f\x8b", answer.body.as_ref()].concat().into();
    answer.with("Content-Encoding", "gzip")
}
