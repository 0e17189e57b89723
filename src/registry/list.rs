//! Lists: tags (distribution-spec 1.1, end-8) and the catalog (distribution's own).

use http::header::{LINK, WARNING};
use http::{HeaderValue, Response};
use serde::Serialize;

use super::route::Page;
use super::{Body, Refusal, STALE, json_answer};
use crate::hosted::Hosted;
use crate::mirror::{Mirror, Source, TagPage};
use crate::oci::Name;
use crate::store;
use crate::store::layout::Repository;

/// The most tags that an answer has; the rest is on further pages. Each answer is in memory until its
/// client has read it, and there are repositories with a hundred thousand.
const TAGS_LIMIT: usize = 10_000;
/// How many repositories a page of the catalog has when the client does not say, as in distribution.
const CATALOG_PAGE: usize = 100;
/// And the most it has when it does.
const CATALOG_LIMIT: usize = 1000;

pub(super) async fn tags(
    mirror: &Mirror,
    source: &Source,
    name: &Name,
    ns: Option<&str>,
    page: &Page,
) -> Result<Response<Body>, Refusal> {
    let mut found = mirror
        .tags(source, page.limit, page.last.as_deref())
        .await?;
    if found.tags.len() > TAGS_LIMIT {
        found.tags.truncate(TAGS_LIMIT);
        found.more = true;
    }
    Ok(tags_answer(&found, name, ns, page))
}

/// The tags of a hosted name.
pub(super) async fn hosted_tags(
    hosted: &Hosted,
    of: &Repository,
    name: &Name,
    ns: Option<&str>,
    page: &Page,
) -> Result<Response<Body>, Refusal> {
    let limit = page.limit.unwrap_or(TAGS_LIMIT).min(TAGS_LIMIT);
    let (tags, more) = hosted.tags(of, limit, page.last.as_deref()).await?;
    let found = TagPage {
        tags,
        more,
        stale: false,
    };
    Ok(tags_answer(&found, name, ns, page))
}

fn tags_answer(found: &TagPage, name: &Name, ns: Option<&str>, page: &Page) -> Response<Body> {
    #[derive(Serialize)]
    struct Tags<'a> {
        name: &'a str,
        tags: &'a [String],
    }
    let body = serde_json::to_vec(&Tags {
        name: name.as_str(),
        tags: &found.tags,
    });
    let mut response = json_answer(body.unwrap_or_default().into());
    if found.more {
        next_page(
            &mut response,
            &format!("/v2/{name}/tags/list"),
            found.tags.last(),
            page.limit,
            ns,
        );
    }
    if found.stale {
        response.headers_mut().insert(WARNING, STALE);
    }
    response
}

/// What is cached here; the upstreams are not asked.
pub(super) async fn catalog(mirror: &Mirror, page: &Page) -> Result<Response<Body>, Refusal> {
    #[derive(Serialize)]
    struct Catalog {
        repositories: Vec<String>,
    }
    let limit = page.limit.unwrap_or(CATALOG_PAGE).min(CATALOG_LIMIT);
    let asked = store::Page {
        after: page.last.clone().unwrap_or_default(),
        // Whether there are more is told by one more.
        limit: limit + 1,
    };
    let found = mirror.repositories(asked).await?;
    let mut repositories: Vec<String> = found.iter().map(ToString::to_string).collect();
    let more = repositories.len() > limit;
    repositories.truncate(limit);
    let last = repositories.last().cloned();
    let body = serde_json::to_vec(&Catalog { repositories });
    let mut response = json_answer(body.unwrap_or_default().into());
    if more {
        next_page(
            &mut response,
            "/v2/_catalog",
            last.as_ref(),
            Some(limit),
            None,
        );
    }
    Ok(response)
}

/// `Link: </v2/...?last=..&n=..>; rel="next"`, as distribution-spec 1.1 has it for lists.
fn next_page(
    response: &mut Response<Body>,
    path: &str,
    last: Option<&String>,
    limit: Option<usize>,
    ns: Option<&str>,
) {
    let Some(last) = last else { return };
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.append_pair("last", last);
    if let Some(limit) = limit {
        query.append_pair("n", &limit.to_string());
    }
    if let Some(ns) = ns {
        query.append_pair("ns", ns);
    }
    // Percent-encoded: always a valid header.
    if let Ok(link) = HeaderValue::try_from(format!("<{path}?{}>; rel=\"next\"", query.finish())) {
        response.headers_mut().insert(LINK, link);
    }
}
