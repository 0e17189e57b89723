//! Tokens: distribution's token authentication, as the client of a registry does it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderValue;
use serde::Deserialize;
use url::Url;

use super::UpstreamError;

/// How long a token is good for when its issuer does not say.
/// Source: distribution, "Token Authentication Specification".
const DEFAULT_LIFETIME: Duration = Duration::from_mins(1);
/// How much of its life a token has behind it when it is replaced.
const REPLACED_AT: f32 = 0.8;
/// The least time between two attempts to replace a token that still serves.
const RETRY: Duration = Duration::from_secs(1);
/// The longest that a token is used; one too long for the clock is as good.
pub(super) const LONGEST: Duration = Duration::from_hours(24);
/// Tokens that are kept before those that have expired are thrown away.
const KEPT: usize = 1024;

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TokenKey {
    pub(super) realm: Url,
    pub(super) service: Option<String>,
    pub(super) scope: String,
}

impl TokenKey {
    /// Where the token is had.
    pub(super) fn url(&self) -> Url {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            query.append_pair("scope", &self.scope);
        }
        url
    }
}

/// A token, ready to be sent.
#[derive(Clone)]
pub(super) struct Token {
    /// `Bearer ...`, marked as sensitive.
    pub(super) header: HeaderValue,
    /// From when on it is to be replaced, while it still serves.
    replace: Instant,
    expires: Instant,
}

/// The token server's answer. Both names for the token are in use.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

impl Token {
    /// Reads a token server's answer; the error says what is wrong with it, never what is in it. It is
    /// used for `longest` at the most.
    pub(super) fn parse(
        body: &[u8],
        asked: Instant,
        longest: Duration,
    ) -> Result<Self, &'static str> {
        // serde's own messages quote what they stumble over.
        let answer: Answer = serde_json::from_slice(body).map_err(|_| "not a token's JSON")?;
        let token = answer
            .token
            .filter(|token| !token.is_empty())
            .or(answer.access_token)
            .ok_or("neither `token` nor `access_token`")?;
        let mut header = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| "a token that is no header")?;
        header.set_sensitive(true);
        let lifetime = answer
            .expires_in
            .map_or(DEFAULT_LIFETIME, Duration::from_secs);
        let lifetime = lifetime.min(longest);
        Ok(Self {
            header,
            replace: asked + lifetime.mul_f32(REPLACED_AT),
            expires: asked + lifetime,
        })
    }
}

/// A token, and how it was last not to be had.
#[derive(Default)]
struct Place {
    token: Option<Token>,
    failed: Option<(Instant, UpstreamError)>,
}

/// A token's place.
#[derive(Default)]
pub(super) struct Slot {
    place: Mutex<Place>,
    /// Held by the one who asks for the token; those who can't go on without one wait for it.
    asking: Arc<tokio::sync::Mutex<()>>,
}

/// The right to ask for a token, which one at a time has.
pub(super) type Asking = tokio::sync::OwnedMutexGuard<()>;

impl Slot {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token, while it can be used.
    pub(super) fn usable(&self) -> Option<HeaderValue> {
        let place = self.place();
        let token = place.token.as_ref();
        let token = token.filter(|token| Instant::now() < token.expires)?;
        Some(token.header.clone())
    }

    /// Waits until nobody else asks for the token.
    pub(super) async fn ask(&self) -> Asking {
        Arc::clone(&self.asking).lock_owned().await
    }

    /// Whether the token is to be replaced now, and nobody is doing so: then it is up to the caller.
    pub(super) fn ask_ahead(&self) -> Option<Asking> {
        let place = self.place();
        let token = place.token.as_ref()?;
        if Instant::now() < token.replace {
            return None;
        }
        Arc::clone(&self.asking).try_lock_owned().ok()
    }

    /// How it could not be had, where that was not before `since`.
    pub(super) fn failed(&self, since: Instant) -> Option<UpstreamError> {
        let place = self.place();
        let (at, error) = place.failed.as_ref()?;
        (*at >= since).then(|| error.clone())
    }

    /// Keeps what was asked for. One that could not be replaced serves on, and is tried again in
    /// half of the time that it has left: its end is never far off when the issuer is back.
    pub(super) fn keep(&self, answer: Result<Token, UpstreamError>) {
        let mut place = self.place();
        match answer {
            Ok(token) => place.token = Some(token),
            Err(error) => {
                let now = Instant::now();
                if let Some(token) = &mut place.token {
                    let left = token.expires.saturating_duration_since(now);
                    token.replace = now + (left / 2).max(RETRY);
                }
                place.failed = Some((now, error));
            }
        }
    }
}

/// The tokens of one upstream.
#[derive(Default)]
pub(super) struct Tokens {
    slots: Mutex<HashMap<TokenKey, Arc<Slot>>>,
}

impl Tokens {
    /// The place of a token.
    pub(super) fn slot(&self, key: &TokenKey) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= KEPT && !slots.contains_key(key) {
            slots.retain(|_, slot| slot.usable().is_some() || slot.asking.try_lock().is_err());
            // All of them good: what is forgotten is only asked for again.
            if slots.len() >= KEPT {
                slots.clear();
            }
        }
        Arc::clone(slots.entry(key.clone()).or_default())
    }
}

/// Whether credentials for `upstream` may be sent to `realm`: only to its own registrable domain,
/// and never in clear unless the upstream itself is asked in clear. Otherwise whoever can answer in
/// the upstream's name could have them sent anywhere.
pub(super) fn may_receive_credentials(realm: &Url, upstream: &Url) -> bool {
    if realm.scheme() != "https" && realm.scheme() != upstream.scheme() {
        return false;
    }
    match (realm.host(), upstream.host()) {
        (Some(realm), Some(upstream)) if realm == upstream => true,
        (Some(url::Host::Domain(realm)), Some(url::Host::Domain(upstream))) => {
            let domain = |host: &str| psl::domain_str(host).map(str::to_ascii_lowercase);
            domain(realm).is_some_and(|own| Some(own) == domain(upstream))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_go_to_the_upstreams_own_domain_only() {
        for (realm, upstream, may) in [
            (
                "https://auth.docker.io/token",
                "https://registry-1.docker.io",
                true,
            ),
            ("https://ghcr.io/token", "https://ghcr.io", true),
            ("http://127.0.0.1:1/token", "http://127.0.0.1:2", true),
            (
                "http://auth.docker.io/token",
                "https://registry-1.docker.io",
                false,
            ),
            (
                "https://auth.evil.io/token",
                "https://registry-1.docker.io",
                false,
            ),
            (
                "https://docker.io.evil.com/token",
                "https://registry-1.docker.io",
                false,
            ),
            ("https://evil.co.uk/token", "https://registry.co.uk", false),
            (
                "https://evil.github.io/token",
                "https://mine.github.io",
                false,
            ),
            ("http://127.0.0.2/token", "http://127.0.0.1", false),
            ("ftp://127.0.0.1/token", "http://127.0.0.1", false),
        ] {
            let (realm, upstream) = (realm.parse().unwrap(), upstream.parse().unwrap());
            assert_eq!(
                may_receive_credentials(&realm, &upstream),
                may,
                "{realm} for {upstream}"
            );
        }
    }

    #[test]
    fn an_answer_is_a_token_under_either_name() {
        let asked = Instant::now();
        for body in [
            r#"{"token":"t"}"#,
            r#"{"access_token":"t"}"#,
            r#"{"token":"","access_token":"t"}"#,
        ] {
            let token = Token::parse(body.as_bytes(), asked, LONGEST);
            assert_eq!(
                token.unwrap_or_else(|e| panic!("{body}: {e}")).header,
                "Bearer t"
            );
        }
        for body in ["{}", "[]", "secret", r#"{"token":"a\nb"}"#] {
            let error = Token::parse(body.as_bytes(), asked, LONGEST).err();
            assert!(error.is_some_and(|e| !e.contains("secret")), "{body}");
        }
    }

    #[test]
    fn a_token_serves_to_its_end_and_is_replaced_ahead_of_it() {
        let now = Instant::now();
        let issued = |seconds_ago| {
            let asked = now.checked_sub(Duration::from_secs(seconds_ago))?;
            let slot = Slot::default();
            slot.keep(Ok(Token::parse(
                br#"{"token":"t","expires_in":300}"#,
                asked,
                LONGEST,
            )
            .unwrap()));
            Some(slot)
        };
        for (seconds_ago, usable, due) in [
            (0, true, false),
            (230, true, false),
            (250, true, true),
            (300, false, true),
        ] {
            // Not where the clock itself is younger.
            let Some(slot) = issued(seconds_ago) else {
                continue;
            };
            assert_eq!(slot.usable().is_some(), usable, "{seconds_ago} s");
            let asking = slot.ask_ahead();
            assert_eq!(asking.is_some(), due, "{seconds_ago} s");
            assert!(asking.is_none() || slot.ask_ahead().is_none(), "two ask");
            drop(asking);
            slot.keep(Err(UpstreamError::Transport {
                registry: String::new(),
                what: String::new(),
                reason: String::new(),
            }));
            assert_eq!(slot.usable().is_some(), usable, "{seconds_ago} s, failed");
            assert!(slot.ask_ahead().is_none(), "it is tried again at once");
        }
        // The most a server can say does not overflow the clock.
        assert!(
            Token::parse(
                br#"{"token":"t","expires_in":18446744073709551615}"#,
                now,
                LONGEST
            )
            .is_ok()
        );
    }
}
