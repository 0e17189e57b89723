//! Who may do what: with `auth`, a push to a hosted name takes a password, and a pull of one where
//! the configuration says so. What is mirrored is given to everybody: a mirror that asked for a
//! password would be given those of Docker Hub.

use http::header::{HOST, WWW_AUTHENTICATE};
use http::{HeaderValue, Request};

use super::route::Route;
use super::{Refusal, Registry, reads};
use crate::config::{Pull, Settings};
use crate::hosted::users::Verdict;
use crate::oci::ErrorCode;

const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"registry-agent\"");

/// What a request has to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needed {
    Nothing,
    Password,
}

/// What a request has to show before it is answered.
pub(super) fn needed(
    settings: &Settings,
    request: &Request<()>,
    route: &Route,
    hosted: bool,
) -> Needed {
    let Some(auth) = settings.serving.as_ref().and_then(|it| it.auth.as_ref()) else {
        return Needed::Nothing;
    };
    let asks = match route {
        Route::Root => false,
        // By this, clients find out whether they need one, and `docker login` whether it is right.
        Route::Base => {
            let named = auth.name.as_deref();
            named.is_some_and(|name| host(request).is_some_and(|it| it.eq_ignore_ascii_case(name)))
                || request.headers().contains_key(http::header::AUTHORIZATION)
        }
        Route::Catalog { .. } => auth.pull == Pull::Authenticated,
        // How far an upload is, is for who pushes.
        Route::Upload { .. } => hosted,
        _ => hosted && (auth.pull == Pull::Authenticated || !reads(request.method())),
    };
    if asks {
        Needed::Password
    } else {
        Needed::Nothing
    }
}

/// The host that a request is for, without its port.
fn host(request: &Request<()>) -> Option<&str> {
    let authority = request.headers().get(HOST);
    let authority = authority.and_then(|host| host.to_str().ok());
    let authority = authority.or_else(|| Some(request.uri().authority()?.as_str()))?;
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) => Some(host),
        _ => Some(authority),
    }
}

impl Registry {
    /// Lets a request pass that shows what it has to.
    pub(super) async fn admit(&self, request: &Request<()>, needed: Needed) -> Result<(), Refusal> {
        if needed == Needed::Nothing {
            return Ok(());
        }
        match self.gate.ask(request.headers()).await {
            Verdict::User => Ok(()),
            Verdict::Stranger => {
                let message = "a user name and a password of this registry are needed for this \
                               (`docker login`)";
                let refusal = Refusal::new(ErrorCode::Unauthorized, message);
                Err(refusal.with_header(WWW_AUTHENTICATE, CHALLENGE))
            }
            Verdict::Busy => {
                let message = "too many passwords are being checked at once: try again";
                Err(Refusal::new(ErrorCode::Unavailable, message))
            }
        }
    }
}
