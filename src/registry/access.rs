//! Who may do what: with `auth`, a push to a hosted name takes a password, or a token that was given
//! for one ([`super::token`]), and a pull of one where the configuration says so. What is mirrored is
//! given to everybody: a mirror that asked for a password would be given those of Docker Hub.

use std::fmt::Write as _;

use http::header::{AUTHORIZATION, HOST, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, Request};

use super::route::Route;
use super::{Refusal, Registry, reads};
use crate::config::{AuthSettings, Pull, Serving, Settings};
use crate::hosted;
use crate::hosted::tokens::{Actions, Resource, Scope};
use crate::hosted::users::Verdict;
use crate::oci::{ErrorCode, Name};

/// What a client is asked for where it knows of no other way.
pub(super) const BASIC: &str = "Basic realm=\"registry-agent\"";
/// Where tokens are given, under `auth.name`.
const TOKENS: &str = "/v2/_token";
/// By which scheme a client has reached the proxy that has passed its request on.
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What a request has to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Needed {
    Nothing,
    /// A password, or a token, whatever it grants.
    Login,
    /// A password, or a token that grants all of this.
    Scopes(Vec<Scope>),
}

/// What a request has to show before it is answered.
pub(super) fn needed(
    settings: &Settings,
    request: &Request<()>,
    route: &Route,
    hosted: bool,
) -> Needed {
    let Some(serving) = settings.serving.as_ref() else {
        return Needed::Nothing;
    };
    let Some(auth) = serving.auth.as_ref() else {
        return Needed::Nothing;
    };
    let asks = match route {
        // Who asks for a token shows what it is for there.
        Route::Root | Route::Token { .. } => false,
        // By this, clients find out whether they need one, and `docker login` whether it is right.
        Route::Base => {
            return if named(auth, request).is_some()
                || request.headers().contains_key(AUTHORIZATION)
            {
                Needed::Login
            } else {
                Needed::Nothing
            };
        }
        Route::Catalog { .. } => auth.pull == Pull::Authenticated,
        // How far an upload is, is for who pushes.
        Route::Upload { .. } => hosted,
        _ => hosted && (auth.pull == Pull::Authenticated || !reads(request.method())),
    };
    if asks {
        Needed::Scopes(scopes(serving, auth, request, route))
    } else {
        Needed::Nothing
    }
}

/// What a token has to grant for a request that takes a password otherwise.
fn scopes(
    serving: &Serving,
    auth: &AuthSettings,
    request: &Request<()>,
    route: &Route,
) -> Vec<Scope> {
    let Some(name) = route.name() else {
        return vec![Scope {
            resource: Resource::Catalog,
            actions: Actions::ALL,
        }];
    };
    let actions = match (route, request.method()) {
        (Route::Upload { .. }, _) => Actions::PUSH,
        (_, method) if reads(method) => Actions::PULL,
        (_, &http::Method::DELETE) => Actions::DELETE,
        _ => Actions::PUSH,
    };
    let mut scopes = vec![Scope::of(name, actions)];
    if let Route::Upload { wanted, .. } = route
        && auth.pull == Pull::Authenticated
        && let Some(Ok(from)) = wanted.from.as_deref().map(str::parse::<Name>)
        && hosted::repository(&serving.hosted, &from, None).is_some()
    {
        scopes.push(Scope::of(&from, Actions::PULL));
    }
    scopes
}

/// The host and port by which a request came, where that is the name which people push to.
pub(super) fn named<'a>(auth: &AuthSettings, request: &'a Request<()>) -> Option<&'a str> {
    let name = auth.name.as_deref()?;
    let authority = request.headers().get(HOST);
    let authority = authority.and_then(|host| host.to_str().ok());
    let authority = authority.or_else(|| Some(request.uri().authority()?.as_str()))?;
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) => host,
        _ => authority,
    };
    host.eq_ignore_ascii_case(name).then_some(authority)
}

/// What a client is asked for. Only under `auth.name` a token: docker offers its user's password of
/// Docker Hub to a mirror that asks for anything at `/v2/`.
fn challenge(
    serving: &Serving,
    auth: &AuthSettings,
    request: &Request<()>,
    needed: &Needed,
    wrong: Option<(&str, &str)>,
) -> String {
    let Some(authority) = named(auth, request) else {
        return BASIC.to_owned();
    };
    let scheme = if serving.tls.is_some() || came_by_https(request.headers()) {
        "https"
    } else {
        "http"
    };
    let service = auth.name.as_deref().unwrap_or_default();
    let mut challenge =
        format!("Bearer realm=\"{scheme}://{authority}{TOKENS}\",service=\"{service}\"");
    if let Needed::Scopes(scopes) = needed {
        let scopes: Vec<String> = scopes.iter().map(Scope::to_string).collect();
        let scopes = scopes.join(" ");
        let _ = write!(challenge, ",scope=\"{scopes}\"");
    }
    // docker shows its user no other words than these.
    if let Some((wrong, description)) = wrong {
        let _ = write!(
            challenge,
            ",error=\"{wrong}\",error_description=\"{description}\""
        );
    }
    challenge
}

/// Behind a proxy that ends TLS, a realm by plain http would have passwords sent without it. Who
/// says so of itself, and is not, can't reach its own realm: nobody else's.
fn came_by_https(headers: &HeaderMap) -> bool {
    let said = headers.get(FORWARDED_PROTO).and_then(|it| it.to_str().ok());
    let first = said.and_then(|said| said.split(',').next());
    first.is_some_and(|first| first.trim().eq_ignore_ascii_case("https"))
}

impl Registry {
    /// Whether a request shows what it has to, where that is known without computing anything dear.
    pub(super) fn recalls(&self, request: &Request<()>, needed: &Needed) -> bool {
        match needed {
            Needed::Nothing => true,
            _ => self.gate.recall(request.headers()) || self.shows_token(request, needed) == Ok(()),
        }
    }

    /// Whether a request has a token that grants what is needed; else what is wrong with it, in the
    /// words of RFC 6750, 3.1, where it has one.
    fn shows_token(
        &self,
        request: &Request<()>,
        needed: &Needed,
    ) -> Result<(), Option<&'static str>> {
        let headers = request.headers();
        let has_one = headers.get(AUTHORIZATION).is_some_and(|it| {
            let scheme = it.as_bytes().split(|c| *c == b' ').next();
            scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"bearer"))
        });
        match (self.gate.claims(headers), needed) {
            (None, _) => Err(has_one.then_some("invalid_token")),
            (Some(claims), Needed::Scopes(needed)) if !claims.grant(needed) => {
                Err(Some("insufficient_scope"))
            }
            (Some(_), _) => Ok(()),
        }
    }

    /// Lets a request pass that shows what it has to.
    pub(super) async fn admit(
        &self,
        request: &Request<()>,
        needed: &Needed,
        settings: &Settings,
    ) -> Result<(), Refusal> {
        if *needed == Needed::Nothing {
            return Ok(());
        }
        let Err(wrong) = self.shows_token(request, needed) else {
            return Ok(());
        };
        let verdict = self.gate.ask(request.headers()).await;
        let serving = settings.serving.as_ref();
        let auth = serving.and_then(|serving| Some((serving, serving.auth.as_ref()?)));
        judge(verdict, auth.and_then(|(_, auth)| named(auth, request))).map_err(
            |refusal| match auth {
                Some((serving, auth)) if verdict == Verdict::Stranger => {
                    let wrong = wrong.map(|wrong| (wrong, refusal.message.as_str()));
                    let challenge = challenge(serving, auth, request, needed, wrong);
                    refusal.with_header(WWW_AUTHENTICATE, challenge)
                }
                _ => refusal,
            },
        )
    }
}

/// Lets a user pass; others are told what to do, with the name under which they came.
pub(super) fn judge(verdict: Verdict, name: Option<&str>) -> Result<(), Refusal> {
    match verdict {
        Verdict::User => Ok(()),
        Verdict::Stranger => {
            let login = name.map_or("docker login".to_owned(), |it| format!("docker login {it}"));
            let message = format!(
                "a user name and a password of this registry are needed for this (`{login}`)"
            );
            Err(Refusal::new(ErrorCode::Unauthorized, message))
        }
        Verdict::Busy => {
            let message = "too many passwords are being checked at once: try again";
            Err(Refusal::new(ErrorCode::Unavailable, message))
        }
    }
}
