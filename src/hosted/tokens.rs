//! Tokens, by which a client shows what it may do without its password: distribution's "token
//! authentication specification". Clients ask for one wherever `/v2/` says where they are given,
//! also those that have no password, and so pull without one.
//!
//! A token says all of it itself, and is signed with a key that this process has made at its start:
//! nothing is kept, and none counts after a restart. A user's is signed together with the hash of
//! their password, so that it ends when their line in the users' file does. How long it counts is
//! told in seconds, and measured by the time that this process has run: nobody's clock matters.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use ring::rand::SystemRandom;
use serde::{Deserialize, Serialize};

use crate::oci::Name;

/// How long a token counts, as its client is told. docker takes anything below a minute for a minute.
pub const LIFETIME: Duration = Duration::from_mins(5);
/// So much longer it does: its client has counted from when it came, and needs time to ask.
const GRACE: Duration = Duration::from_secs(30);
/// A longer token is none of ours, in bytes; most HTTP implementations take no longer a header.
const TOKEN_LIMIT: usize = 16 * 1024;
/// Of how many things a token may speak: a push has one for each repository that it mounts from.
pub const SCOPES: usize = 32;

/// What may be done with something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actions {
    /// To read it.
    pub pull: bool,
    /// To add to it.
    pub push: bool,
    /// To remove from it.
    pub delete: bool,
}

impl Actions {
    /// To read alone.
    pub const PULL: Self = Self {
        pull: true,
        push: false,
        delete: false,
    };
    /// To add alone.
    pub const PUSH: Self = Self {
        pull: false,
        push: true,
        delete: false,
    };
    /// To remove alone.
    pub const DELETE: Self = Self {
        pull: false,
        push: false,
        delete: true,
    };
    /// Everything.
    pub const ALL: Self = Self {
        pull: true,
        push: true,
        delete: true,
    };

    /// What is in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            pull: self.pull && other.pull,
            push: self.push && other.push,
            delete: self.delete && other.delete,
        }
    }

    /// Whether it holds all of `other`.
    pub fn cover(self, other: Self) -> bool {
        self.and(other) == other
    }
}

/// What a token is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resource {
    /// `repository:<name>`
    Repository(String),
    /// `registry:catalog`
    Catalog,
}

/// Something, and what is to be done with it: `repository:mycompany/app:pull,push`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// What.
    pub resource: Resource,
    /// What may be done with it.
    pub actions: Actions,
}

impl Scope {
    /// Of a repository.
    pub fn of(name: &Name, actions: Actions) -> Self {
        Self {
            resource: Resource::Repository(name.as_str().to_owned()),
            actions,
        }
    }
}

/// A scope of which nothing is granted here.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownScope;

impl FromStr for Scope {
    type Err = UnknownScope;

    /// Actions that are unknown here are granted to nobody, and so are left out.
    fn from_str(text: &str) -> Result<Self, UnknownScope> {
        let (kind, rest) = text.split_once(':').ok_or(UnknownScope)?;
        let (name, said) = rest.rsplit_once(':').ok_or(UnknownScope)?;
        // A class may follow the type: `repository(plugin)`.
        let kind = kind.split('(').next().unwrap_or(kind);
        let resource = match (kind, name) {
            ("repository", name) => {
                let name = name.parse::<Name>().map_err(|_| UnknownScope)?;
                Resource::Repository(name.as_str().to_owned())
            }
            ("registry", "catalog") => Resource::Catalog,
            _ => return Err(UnknownScope),
        };
        let mut actions = Actions::default();
        for action in said.split(',') {
            match action {
                "*" => actions = Actions::ALL,
                "pull" => actions.pull = true,
                "push" => actions.push = true,
                "delete" => actions.delete = true,
                _ => {}
            }
        }
        Ok(Self { resource, actions })
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match &self.resource {
            Resource::Catalog => return f.write_str("registry:catalog:*"),
            Resource::Repository(name) => name,
        };
        let said = [
            (self.actions.pull, "pull"),
            (self.actions.push, "push"),
            (self.actions.delete, "delete"),
        ];
        let said: Vec<&str> = said
            .iter()
            .filter_map(|(has, action)| has.then_some(*action))
            .collect();
        write!(f, "repository:{name}:{}", said.join(","))
    }
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Whose it is; nobody's, who has no password.
    pub user: Option<String>,
    /// What it grants.
    pub scopes: Vec<Scope>,
    /// Until when, in seconds since this process has started.
    until: u64,
}

impl Claims {
    /// Whether all of this is granted.
    pub fn grant(&self, needed: &[Scope]) -> bool {
        needed.iter().all(|needed| {
            let mut granted = self.scopes.iter();
            granted.any(|it| it.resource == needed.resource && it.actions.cover(needed.actions))
        })
    }
}

/// Gives out tokens, and knows its own.
pub(super) struct Tokens {
    key: hmac::Key,
    started: Instant,
}

impl Tokens {
    /// With a key of its own.
    pub fn new() -> Result<Self, ring::error::Unspecified> {
        Ok(Self {
            key: hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())?,
            started: Instant::now(),
        })
    }

    /// The time that counts.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// A token; `hash` is that of its user's password.
    pub fn issue(
        &self,
        user: Option<(&str, &str)>,
        scopes: Vec<Scope>,
        now: Duration,
    ) -> Result<String, serde_json::Error> {
        let claims = Claims {
            user: user.map(|(user, _)| user.to_owned()),
            scopes,
            until: (now + LIFETIME + GRACE).as_secs(),
        };
        let payload = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims)?);
        let signed = signed(&payload, user.map(|(_, hash)| hash));
        let signature = hmac::sign(&self.key, &signed);
        let signature = URL_SAFE_NO_PAD.encode(signature.as_ref());
        Ok(format!("{payload}.{signature}"))
    }

    /// What a token says, if it is ours and counts; `hash_of` gives that of a user's password.
    pub fn check<'a>(
        &self,
        token: &str,
        hash_of: impl FnOnce(&str) -> Option<&'a str>,
        now: Duration,
    ) -> Option<Claims> {
        if token.len() > TOKEN_LIMIT {
            return None;
        }
        let (payload, signature) = token.split_once('.')?;
        let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()?;
        let hash = match &claims.user {
            Some(user) => Some(hash_of(user)?),
            None => None,
        };
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        hmac::verify(&self.key, &signed(payload, hash), &signature).ok()?;
        (now.as_secs() < claims.until).then_some(claims)
    }
}

/// The bytes that are signed: neither half can hold what stands between them.
fn signed(payload: &str, hash: Option<&str>) -> Vec<u8> {
    let parts = [payload, hash.unwrap_or_default()];
    parts.join("\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(text: &str) -> Scope {
        text.parse().unwrap()
    }

    #[test]
    fn scopes_are_read_as_the_specification_writes_them() {
        for (text, resource, actions) in [
            (
                "repository:mycompany/app:pull,push",
                Resource::Repository("mycompany/app".to_owned()),
                Actions {
                    delete: false,
                    ..Actions::ALL
                },
            ),
            (
                "repository(plugin):mycompany/app:*",
                Resource::Repository("mycompany/app".to_owned()),
                Actions::ALL,
            ),
            (
                "repository:mycompany/app:admin",
                Resource::Repository("mycompany/app".to_owned()),
                Actions::default(),
            ),
            ("registry:catalog:*", Resource::Catalog, Actions::ALL),
        ] {
            assert_eq!(scope(text), Scope { resource, actions }, "{text}");
        }
        for text in [
            "",
            "repository",
            "repository:a",
            "registry:other:*",
            "a:b:pull",
        ] {
            assert_eq!(text.parse::<Scope>(), Err(UnknownScope), "{text}");
        }
        let said = "repository:mycompany/app:pull,push";
        assert_eq!(scope(said).to_string(), said);
    }

    #[test]
    fn a_token_grants_what_it_says_and_nothing_else() {
        let tokens = Tokens::new().unwrap();
        let granted = vec![scope("repository:a:pull,push")];
        let token = tokens.issue(Some(("alice", "h1")), granted, Duration::ZERO);
        let token = token.unwrap();
        let claims = tokens
            .check(&token, |_| Some("h1"), Duration::ZERO)
            .unwrap();
        assert!(claims.grant(&[]));
        assert!(claims.grant(&[scope("repository:a:push")]));
        for more in [
            "repository:a:delete",
            "repository:a/b:pull",
            "registry:catalog:*",
        ] {
            assert!(
                !claims.grant(&[scope("repository:a:pull"), scope(more)]),
                "{more}"
            );
        }
    }

    #[test]
    fn a_token_ends_by_time_with_its_users_line_and_with_its_process() {
        let tokens = Tokens::new().unwrap();
        let check = |tokens: &Tokens, token: &str, hash: Option<&'static str>, now| {
            tokens.check(token, |_| hash, now).is_some()
        };
        let began = Duration::from_secs(100);
        let of_alice = tokens.issue(Some(("alice", "h1")), Vec::new(), began);
        let of_nobody = tokens.issue(None, Vec::new(), began).unwrap();
        let of_alice = of_alice.unwrap();
        for token in [&of_alice, &of_nobody] {
            assert!(check(&tokens, token, Some("h1"), began + LIFETIME));
            let late = began + LIFETIME + GRACE;
            assert!(!check(&tokens, token, Some("h1"), late));
            assert!(!check(&Tokens::new().unwrap(), token, Some("h1"), began));
        }
        assert!(
            !check(&tokens, &of_alice, Some("h2"), began),
            "a new password"
        );
        assert!(
            !check(&tokens, &of_alice, None, began),
            "gone from the file"
        );
        assert!(check(&tokens, &of_nobody, None, began));
    }

    #[test]
    fn what_is_changed_in_a_token_makes_it_none() {
        let tokens = Tokens::new().unwrap();
        let granted = vec![scope("repository:a:pull")];
        let token = tokens.issue(None, granted, Duration::ZERO).unwrap();
        let (payload, signature) = token.split_once('.').unwrap();
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap();
        let forged = text.replace("\"push\":false", "\"push\":true");
        assert_ne!(forged, text);
        let forged = URL_SAFE_NO_PAD.encode(forged);
        for token in [
            String::new(),
            ".".to_owned(),
            payload.to_owned(),
            format!("{payload}."),
            format!("{forged}.{signature}"),
            format!("{payload}.{}", &signature[1..]),
            format!("{payload}.{}", "A".repeat(TOKEN_LIMIT)),
        ] {
            let checked = tokens.check(&token, |_| Some("h"), Duration::ZERO);
            assert_eq!(checked, None, "{token}");
        }
    }
}
