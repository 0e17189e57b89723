//! Paths and queries, parsed: the grammar of distribution-spec 1.1, "Endpoints".

use std::borrow::Cow;

use http::{HeaderValue, Uri};
use percent_encoding::percent_decode_str;

use crate::oci::{Digest, DigestError, Name, NameError, Reference, RegistryHost};

/// What a request is about.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// `/`
    Root,
    /// `/v2/` (end-1)
    Base,
    /// `/v2/<name>/blobs/<digest>` (end-2)
    Blob {
        name: Name,
        ns: Option<String>,
        digest: Digest,
    },
    /// `/v2/<name>/manifests/<reference>` (end-3)
    Manifest {
        name: Name,
        ns: Option<String>,
        reference: Reference,
        /// `tag=`, for a push by digest.
        tags: Vec<String>,
    },
    /// `/v2/<name>/tags/list` (end-8)
    Tags {
        name: Name,
        ns: Option<String>,
        page: Page,
    },
    /// `/v2/<name>/referrers/<digest>` (end-12)
    Referrers {
        name: Name,
        ns: Option<String>,
        digest: Digest,
        artifact_type: Option<String>,
        last: Option<String>,
    },
    /// `/v2/_catalog`
    Catalog { page: Page },
    /// `/v2/_token`: no name begins so.
    Token { scopes: Vec<String> },
    /// `/v2/<name>/blobs/uploads/...` (end-4 to end-6, end-11, end-13, end-14)
    Upload {
        name: Name,
        ns: Option<String>,
        /// Which; `None` for one that is to begin.
        id: Option<String>,
        wanted: Wanted,
    },
}

/// What an upload is to become, as it was said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) digest: Option<String>,
    pub(super) mount: Option<String>,
    pub(super) from: Option<String>,
    pub(super) algorithm: Option<String>,
}

/// Which part of a list is asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Page {
    /// At most so many.
    pub(super) limit: Option<usize>,
    /// Those after this one.
    pub(super) last: Option<String>,
}

/// A path or query that is none of these.
#[derive(Debug, thiserror::Error)]
pub(super) enum RouteError {
    #[error("{0}")]
    Name(NameError),
    #[error("{0}")]
    Digest(DigestError),
    #[error("{0}")]
    Tag(NameError),
    #[error(
        "no such path in the registry's API: see the endpoints of the OCI distribution specification"
    )]
    Nothing,
    #[error("n={0:?} is not a number of entries: a decimal number")]
    Page(String),
}

impl Route {
    /// The route's name in metrics.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Base => "base",
            Self::Blob { .. } => "blob",
            Self::Manifest { .. } => "manifest",
            Self::Tags { .. } => "tags",
            Self::Referrers { .. } => "referrers",
            Self::Catalog { .. } => "catalog",
            Self::Token { .. } => "token",
            Self::Upload { .. } => "upload",
        }
    }

    /// The repository that it is about, as it was named.
    pub(super) fn name(&self) -> Option<&Name> {
        match self {
            Self::Blob { name, .. }
            | Self::Manifest { name, .. }
            | Self::Tags { name, .. }
            | Self::Referrers { name, .. }
            | Self::Upload { name, .. } => Some(name),
            Self::Root | Self::Base | Self::Catalog { .. } | Self::Token { .. } => None,
        }
    }

    /// The registry that is meant, where that was said.
    pub(super) fn ns(&self) -> Option<&str> {
        match self {
            Self::Blob { ns, .. }
            | Self::Manifest { ns, .. }
            | Self::Tags { ns, .. }
            | Self::Referrers { ns, .. }
            | Self::Upload { ns, .. } => ns.as_deref(),
            Self::Root | Self::Base | Self::Catalog { .. } | Self::Token { .. } => None,
        }
    }

    pub(super) fn parse(uri: &Uri) -> Result<Self, RouteError> {
        let path = match uri.path() {
            path if !path.contains('%') => Cow::Borrowed(path),
            path => percent_decode_str(path)
                .decode_utf8()
                .map_err(|_| RouteError::Nothing)?,
        };
        let rest = match &*path {
            "/" => return Ok(Self::Root),
            "/v2" | "/v2/" => return Ok(Self::Base),
            path => path.strip_prefix("/v2/").ok_or(RouteError::Nothing)?,
        };
        let query = uri.query().map(Query::parse).unwrap_or_default();
        if rest == "_catalog" {
            return Ok(Self::Catalog {
                page: query.page()?,
            });
        }
        if rest == "_token" {
            return Ok(Self::Token {
                scopes: query.scopes,
            });
        }
        // Names may hold `blobs`, `manifests` and `tags` themselves: what counts is the end.
        let mut parts = rest.rsplitn(3, '/');
        let (last, verb, name) = (parts.next(), parts.next(), parts.next());
        let (Some(last), Some(verb), Some(name)) = (last, verb, name) else {
            return Err(RouteError::Nothing);
        };
        if let Some((name, id)) = upload(rest) {
            let (name, ns) = with_port(name, query.ns.as_deref());
            return Ok(Self::Upload {
                name: name.parse().map_err(RouteError::Name)?,
                ns,
                id: id.map(str::to_owned),
                wanted: query.wanted,
            });
        }
        let (name, ns) = with_port(name, query.ns.as_deref());
        let parse_name = || name.parse::<Name>().map_err(RouteError::Name);
        match (verb, last) {
            ("manifests", reference) => Ok(Self::Manifest {
                name: parse_name()?,
                ns,
                reference: reference.parse().map_err(|error| match error {
                    NameError::Digest(error) => RouteError::Digest(error),
                    error => RouteError::Tag(error),
                })?,
                tags: query.tags,
            }),
            ("blobs", digest) => Ok(Self::Blob {
                name: parse_name()?,
                ns,
                digest: digest.parse().map_err(RouteError::Digest)?,
            }),
            ("referrers", digest) => Ok(Self::Referrers {
                name: parse_name()?,
                ns,
                digest: digest.parse().map_err(RouteError::Digest)?,
                artifact_type: query.artifact_type,
                last: query.last,
            }),
            ("tags", "list") => {
                let page = query.page()?;
                Ok(Self::Tags {
                    name: parse_name()?,
                    ns,
                    page,
                })
            }
            _ => Err(RouteError::Nothing),
        }
    }
}

/// The name and the upload of `<name>/blobs/uploads/` and `<name>/blobs/uploads/<reference>`.
fn upload(rest: &str) -> Option<(&str, Option<&str>)> {
    let (before, last) = rest.rsplit_once('/')?;
    match last {
        "" => Some((before.strip_suffix("/blobs/uploads")?, None)),
        "uploads" => Some((before.strip_suffix("/blobs")?, None)),
        id => Some((before.strip_suffix("/blobs/uploads")?, Some(id))),
    }
}

/// The registry that a query names, as a header has it.
pub(super) fn namespace(query: &str) -> Option<HeaderValue> {
    if !query.contains("ns=") {
        return None;
    }
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    let (_, ns) = pairs.find(|(key, _)| key == "ns")?;
    ns.parse::<RegistryHost>().ok()?;
    HeaderValue::from_str(&ns).ok()
}

/// Takes a host with a port off the front of a name, which can't hold one, and makes it the registry
/// that is asked for.
fn with_port<'a>(name: &'a str, ns: Option<&str>) -> (&'a str, Option<String>) {
    let prefix = name.split_once('/').filter(|(host, _)| {
        ns.is_none() && host.contains(':') && host.parse::<RegistryHost>().is_ok()
    });
    match prefix {
        Some((host, rest)) => (rest, Some(host.to_owned())),
        None => (name, ns.map(str::to_owned)),
    }
}

#[derive(Default)]
struct Query {
    ns: Option<String>,
    limit: Option<String>,
    last: Option<String>,
    artifact_type: Option<String>,
    tags: Vec<String>,
    scopes: Vec<String>,
    wanted: Wanted,
}

impl Query {
    /// Other parameters are ignored, as HTTP has it.
    fn parse(query: &str) -> Self {
        let mut parsed = Self::default();
        for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let field = match &*key {
                "ns" => &mut parsed.ns,
                "n" => &mut parsed.limit,
                "last" => &mut parsed.last,
                "artifactType" => &mut parsed.artifact_type,
                "tag" => {
                    parsed.tags.push(value.into_owned());
                    continue;
                }
                "scope" => {
                    parsed.scopes.push(value.into_owned());
                    continue;
                }
                "digest" => &mut parsed.wanted.digest,
                "mount" => &mut parsed.wanted.mount,
                "from" => &mut parsed.wanted.from,
                "digest-algorithm" => &mut parsed.wanted.algorithm,
                _ => continue,
            };
            *field = Some(value.into_owned()).filter(|value| !value.is_empty());
        }
        parsed
    }

    fn page(&self) -> Result<Page, RouteError> {
        let limit = match &self.limit {
            None => None,
            Some(limit) => {
                let excerpt = || RouteError::Page(limit.chars().take(40).collect());
                Some(limit.parse().map_err(|_| excerpt())?)
            }
        };
        Ok(Page {
            limit,
            last: self.last.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &str) -> Result<Route, RouteError> {
        Route::parse(&path.parse().unwrap())
    }

    #[test]
    fn paths_of_the_spec_are_routes() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let name = |name: &str| name.parse::<Name>().unwrap();
        for (path, route) in [
            ("/".to_owned(), Route::Root),
            ("/v2".to_owned(), Route::Base),
            ("/v2/".to_owned(), Route::Base),
            (
                "/v2/_catalog?n=2&last=a".to_owned(),
                Route::Catalog {
                    page: Page {
                        limit: Some(2),
                        last: Some("a".to_owned()),
                    },
                },
            ),
            (
                format!("/v2/a/blobs/b/blobs/{digest}?ns=ghcr.io"),
                Route::Blob {
                    name: name("a/blobs/b"),
                    ns: Some("ghcr.io".to_owned()),
                    digest: digest.parse().unwrap(),
                },
            ),
            (
                format!("/v2/a/manifests/{}", digest.replace(':', "%3A")),
                Route::Manifest {
                    name: name("a"),
                    ns: None,
                    reference: digest.parse().unwrap(),
                    tags: Vec::new(),
                },
            ),
            (
                "/v2/manifests/manifests/manifests".to_owned(),
                Route::Manifest {
                    name: name("manifests"),
                    ns: None,
                    reference: "manifests".parse().unwrap(),
                    tags: Vec::new(),
                },
            ),
            (
                "/v2/_token?service=s&scope=a&scope=b%20c".to_owned(),
                Route::Token {
                    scopes: vec!["a".to_owned(), "b c".to_owned()],
                },
            ),
            (
                "/v2/a/b/tags/list".to_owned(),
                Route::Tags {
                    name: name("a/b"),
                    ns: None,
                    page: Page::default(),
                },
            ),
            (
                format!("/v2/a/referrers/{digest}?artifactType=b/c%2Bd"),
                Route::Referrers {
                    name: name("a"),
                    ns: None,
                    digest: digest.parse().unwrap(),
                    artifact_type: Some("b/c+d".to_owned()),
                    last: None,
                },
            ),
            (
                "/v2/localhost:5000/a/tags/list".to_owned(),
                Route::Tags {
                    name: name("a"),
                    ns: Some("localhost:5000".to_owned()),
                    page: Page::default(),
                },
            ),
            (
                format!("/v2/a/manifests/{digest}?tag=x&tag=y"),
                Route::Manifest {
                    name: name("a"),
                    ns: None,
                    reference: digest.parse().unwrap(),
                    tags: vec!["x".to_owned(), "y".to_owned()],
                },
            ),
            (
                "/v2/a/blobs/uploads/?mount=x&from=b".to_owned(),
                Route::Upload {
                    name: name("a"),
                    ns: None,
                    id: None,
                    wanted: Wanted {
                        mount: Some("x".to_owned()),
                        from: Some("b".to_owned()),
                        ..Wanted::default()
                    },
                },
            ),
            (
                "/v2/a/blobs/uploads".to_owned(),
                Route::Upload {
                    name: name("a"),
                    ns: None,
                    id: None,
                    wanted: Wanted::default(),
                },
            ),
            (
                "/v2/a/blobs/uploads/b/blobs/uploads/uuid?digest=d".to_owned(),
                Route::Upload {
                    name: name("a/blobs/uploads/b"),
                    ns: None,
                    id: Some("uuid".to_owned()),
                    wanted: Wanted {
                        digest: Some("d".to_owned()),
                        ..Wanted::default()
                    },
                },
            ),
        ] {
            assert_eq!(parse(&path).unwrap(), route, "{path}");
        }
    }

    #[test]
    fn other_paths_say_what_is_wrong_with_them() {
        for (path, fits) in [
            (
                "/v1/",
                (|e| matches!(e, RouteError::Nothing)) as fn(&RouteError) -> bool,
            ),
            ("/v2/a", |e| matches!(e, RouteError::Nothing)),
            ("/v2/a/tags/other", |e| matches!(e, RouteError::Nothing)),
            ("/v2/%ff/manifests/a", |e| matches!(e, RouteError::Nothing)),
            ("/v2/A/manifests/a", |e| matches!(e, RouteError::Name(_))),
            ("/v2/a:x/b/manifests/a", |e| {
                matches!(e, RouteError::Name(_))
            }),
            ("/v2/a:1/b/manifests/a?ns=c.d", |e| {
                matches!(e, RouteError::Name(_))
            }),
            ("/v2/../../etc/manifests/a", |e| {
                matches!(e, RouteError::Name(_))
            }),
            ("/v2/a%2f..%2fb/manifests/a", |e| {
                matches!(e, RouteError::Name(_))
            }),
            ("/v2/a/manifests/-", |e| matches!(e, RouteError::Tag(_))),
            ("/v2/a/manifests/sha256:1", |e| {
                matches!(e, RouteError::Digest(_))
            }),
            ("/v2/a/blobs/latest", |e| matches!(e, RouteError::Digest(_))),
            ("/v2/_catalog?n=-1", |e| matches!(e, RouteError::Page(_))),
        ] {
            let error = parse(path).unwrap_err();
            assert!(fits(&error), "{path}: {error:?}");
        }
    }
}
