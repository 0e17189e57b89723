//! Where tokens are given, under `auth.name` alone: by GET, with a password or without (distribution,
//! "Token Authentication Specification"), and by POST with a password in a form ("Authentication
//! using `OAuth2`"), which containerd and BuildKit try first. What may not be had is left out of a
//! token, as the specification has it, so that who has no password gets one to pull with.

use http::header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use serde_json::json;

use super::access::{BASIC, judge, named};
use super::{Body, Refusal, json_answer};
use crate::config::{AuthSettings, HostedSettings, Pull, Settings};
use crate::hosted::tokens::{Actions, LIFETIME, Resource, SCOPES, Scope};
use crate::hosted::users::{self, Gate};
use crate::hosted::{self, Payload, Unread};
use crate::oci::{ErrorCode, Name};

/// A larger form is none, in bytes.
const FORM_LIMIT: usize = 16 * 1024;

/// A token for who shows a password in the header, or for nobody.
pub(super) async fn get(
    gate: &Gate,
    request: &Request<()>,
    scopes: &[String],
    settings: &Settings,
) -> Result<Response<Body>, Refusal> {
    let here = Here::of(settings, request)?;
    let credentials = match users::credentials(request.headers()) {
        None if request.headers().contains_key(AUTHORIZATION) => {
            return Err(here.stranger());
        }
        credentials => credentials,
    };
    here.give(gate, credentials, scopes).await
}

/// A token for who sends a password in a form.
pub(super) async fn change(
    gate: &Gate,
    request: &Request<()>,
    payload: &mut Payload,
    settings: &Settings,
) -> Result<Response<Body>, Refusal> {
    let here = Here::of(settings, request)?;
    if request.method() != Method::POST {
        let message = "a token is asked for by GET or POST";
        let refusal = Refusal::new(ErrorCode::Unsupported, message);
        return Err(refusal.with_header(ALLOW, "GET, HEAD, POST"));
    }
    let form = payload
        .whole(FORM_LIMIT)
        .await
        .map_err(|error| match error {
            Unread::TooLarge => wrong(format!("a form has at most {FORM_LIMIT} bytes")),
            Unread::Broken(error) => wrong(format!("the request has broken off: {error}")),
        })?;
    let (mut grant, mut user, mut password) = (None, None, None);
    let mut scopes = Vec::new();
    for (key, value) in url::form_urlencoded::parse(&form) {
        match &*key {
            "grant_type" => grant = Some(value),
            "username" => user = Some(value),
            "password" => password = Some(value),
            "scope" => scopes.push(value.into_owned()),
            _ => {}
        }
    }
    match (grant.as_deref(), user, password) {
        (Some("password"), Some(user), Some(password)) => {
            let credentials = format!("{user}:{password}").into_bytes();
            here.give(gate, Some(credentials), &scopes).await
        }
        // None was ever given: it is another registry's.
        (Some("refresh_token"), ..) => Err(here.stranger()),
        _ => {
            let message = "the form has to say grant_type=password, username and password";
            Err(wrong(message))
        }
    }
}

fn wrong(message: impl Into<String>) -> Refusal {
    Refusal::new(ErrorCode::Unsupported, message).with_status(StatusCode::BAD_REQUEST)
}

/// The name that people push to, under which a request came.
struct Here<'a> {
    auth: &'a AuthSettings,
    hosted: &'a HostedSettings,
    authority: &'a str,
}

impl<'a> Here<'a> {
    /// By any other name there is nothing here.
    fn of(settings: &'a Settings, request: &'a Request<()>) -> Result<Self, Refusal> {
        let here = settings.serving.as_ref().and_then(|serving| {
            let auth = serving.auth.as_ref()?;
            Some(Self {
                auth,
                hosted: &serving.hosted,
                authority: named(auth, request)?,
            })
        });
        let message = "tokens are given under the name that people push to alone (`auth.name`)";
        here.ok_or_else(|| Refusal::new(ErrorCode::NameUnknown, message))
    }

    /// Who is told that a password is wrong is not given a token for nobody instead: `docker login`
    /// would take that for success.
    fn stranger(&self) -> Refusal {
        let message = format!(
            "no user of this registry has this password (`docker login {}`)",
            self.authority
        );
        let refusal = Refusal::new(ErrorCode::Unauthorized, message);
        refusal.with_header(WWW_AUTHENTICATE, BASIC)
    }

    async fn give(
        &self,
        gate: &Gate,
        credentials: Option<Vec<u8>>,
        said: &[String],
    ) -> Result<Response<Body>, Refusal> {
        let user = match credentials {
            None => None,
            Some(credentials) => {
                let at = credentials.iter().position(|c| *c == b':');
                let user = at.and_then(|at| str::from_utf8(&credentials[..at]).ok());
                let user = user.map(str::to_owned);
                let verdict = gate.ask_of(credentials).await;
                match verdict {
                    users::Verdict::Stranger => return Err(self.stranger()),
                    verdict => judge(verdict, Some(self.authority))?,
                }
                user
            }
        };
        let scopes: Vec<&str> = said.iter().flat_map(|it| it.split_whitespace()).collect();
        if scopes.len() > SCOPES {
            let message = format!("{} scopes: a token has at most {SCOPES}", scopes.len());
            return Err(wrong(message));
        }
        let scopes = scopes.into_iter().filter_map(|scope| {
            let mut scope = scope.parse::<Scope>().ok()?;
            scope.actions = scope.actions.and(self.may(user.is_some(), &scope.resource));
            (scope.actions != Actions::default()).then_some(scope)
        });
        let scopes: Vec<Scope> = scopes.collect();
        let granted: Vec<String> = scopes.iter().map(Scope::to_string).collect();
        let token = gate.token(user.as_deref(), scopes);
        let token = token.ok_or_else(|| self.stranger())?;
        // When it was issued is not said: clients would count from there, by a clock of their own.
        let answer = json!({
            "token": token,
            "access_token": token,
            "expires_in": LIFETIME.as_secs(),
            "scope": granted.join(" "),
        });
        let mut response = json_answer(answer.to_string().into());
        let no_store = HeaderValue::from_static("no-store");
        response.headers_mut().insert(CACHE_CONTROL, no_store);
        Ok(response)
    }

    /// What somebody may do with something.
    fn may(&self, user: bool, resource: &Resource) -> Actions {
        let name = match resource {
            Resource::Catalog => return Actions::ALL.and(self.reading(user)),
            Resource::Repository(name) => name.parse::<Name>().ok(),
        };
        let is_hosted =
            name.is_some_and(|name| hosted::repository(self.hosted, &name, None).is_some());
        match (is_hosted, user) {
            (true, true) => Actions::ALL,
            (true, false) => self.reading(false),
            // What is mirrored is given to everybody, and taken from nobody.
            (false, _) => Actions::PULL,
        }
    }

    fn reading(&self, user: bool) -> Actions {
        match self.auth.pull {
            Pull::Authenticated if !user => Actions::default(),
            _ if user => Actions::ALL,
            _ => Actions::PULL,
        }
    }
}
