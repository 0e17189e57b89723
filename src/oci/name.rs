//! Repository names, tags, references and registry hosts.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{Digest, DigestError};

/// A value that does not fit the grammar of the distribution specification.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a repository name.
    #[error(
        "{0:?} is not a repository name: lower-case letters and digits, separated by one of `.`, \
         `_`, `__` or dashes, in components joined by `/`, 255 characters at most"
    )]
    Name(String),
    /// Not a tag.
    #[error(
        "{0:?} is not a tag: a letter, digit or `_`, then letters, digits, `_`, `.` or `-`, 128 \
         characters at most"
    )]
    Tag(String),
    /// Neither a tag nor a digest.
    #[error("{0}")]
    Digest(#[from] DigestError),
    /// Not a host name with an optional port.
    #[error(
        "{0:?} is not a registry host: a host name with a `.` or a port, or `localhost`, such as \
         `ghcr.io`"
    )]
    Host(String),
}

/// A repository name (`library/busybox`), without a registry host and without a tag.
///
/// Source: distribution-spec 1.1, "Pulling manifests":
/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*`, and at most 255
/// characters, as many clients demand.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// The longest name that is accepted, in characters.
    pub const LIMIT: usize = 255;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as text that others can hold.
    pub fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    /// The first component where more follow: `ghcr.io` of `ghcr.io/owner/app`.
    pub fn first(&self) -> Option<&str> {
        self.0.split_once('/').map(|(first, _)| first)
    }

    /// What follows the first component: `owner/app` of `ghcr.io/owner/app`.
    pub fn rest(&self) -> Option<Name> {
        self.0.split_once('/').map(|(_, rest)| Name(rest.into()))
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let valid = !text.is_empty() && text.len() <= Self::LIMIT && text.split('/').all(component);
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(NameError::Name(excerpt(text)))
        }
    }
}

/// One path component: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn component(text: &str) -> bool {
    let alphanumeric = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends = bytes.first().zip(bytes.last());
    ends.is_some_and(|(first, last)| alphanumeric(*first) && alphanumeric(*last))
        && bytes
            .split(|c| alphanumeric(*c))
            .all(|run| matches!(run, b"" | b"." | b"_" | b"__") || run.iter().all(|c| *c == b'-'))
}

/// A tag (`latest`, `1.36-glibc`). Source: distribution-spec 1.1: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(Box<str>);

impl Tag {
    /// The tag as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
        let valid = (1..=128).contains(&text.len())
            && word(text.as_bytes()[0])
            && text.bytes().all(|c| word(c) || c == b'.' || c == b'-');
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(NameError::Tag(excerpt(text)))
        }
    }
}

/// What a manifest is asked for by: a tag, or a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    /// A name that may move.
    Tag(Tag),
    /// The content itself.
    Digest(Digest),
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        // A tag can't hold a colon, a digest must.
        if text.contains(':') {
            Ok(Self::Digest(text.parse()?))
        } else {
            Ok(Self::Tag(text.parse()?))
        }
    }
}

/// A registry's host name with an optional port, lower case: `docker.io`, `localhost:5000`.
///
/// It has a `.` or a port, or is `localhost`: any other may be the first component of one of Docker
/// Hub's names, which would then be another registry's place in the store. Source:
/// distribution/reference, `splitDockerDomain`.
///
/// It is what clients send as `ns=`, what comes first in an image's name, and, for all but
/// docker.io, the first folder of its repositories in the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistryHost(Box<str>);

impl RegistryHost {
    /// Docker Hub, under the name that people and clients use for it.
    pub const DOCKER_HUB: &'static str = "docker.io";

    /// Docker Hub.
    pub fn docker_hub() -> Self {
        Self(Self::DOCKER_HUB.into())
    }

    /// Whether this is Docker Hub.
    pub fn is_docker_hub(&self) -> bool {
        &*self.0 == Self::DOCKER_HUB
    }

    /// The host as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RegistryHost {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let error = || NameError::Host(excerpt(text));
        let lower = text.to_ascii_lowercase();
        let (host, port) = match lower.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (lower.as_str(), None),
        };
        let label = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|c| c.is_ascii_alphanumeric() || c == b'-')
        };
        let distinct = port.is_some() || host.contains('.') || host == "localhost";
        let valid = distinct
            && host.len() <= 253
            && host.split('.').all(label)
            && port.is_none_or(|port| {
                port.bytes().all(|c| c.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0)
            });
        if !valid {
            return Err(error());
        }
        // All the names that Docker Hub goes by are one registry.
        Ok(match lower.as_str() {
            "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => {
                Self::docker_hub()
            }
            _ => Self(lower.into()),
        })
    }
}

/// What an error message may repeat of input that did not parse: never the whole of a huge one.
fn excerpt(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! display_as_text {
    ($($type:ty),+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    )+};
}
display_as_text!(Name, Tag, RegistryHost);

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_grammar_of_the_spec() {
        for good in [
            "a",
            "library/busybox",
            "a.b_c__d-e---f/0",
            "ghcr.io/owner/app",
            &"a".repeat(255),
        ] {
            assert!(good.parse::<Name>().is_ok(), "{good:?} is a name");
        }
        let long = "a".repeat(256);
        for bad in [
            "", "/", "a/", "/a", "a//b", "A", "a..b", "a___b", "a._b", "-a", "a-", "..", "a/../b",
            "a%2fb", "a b", "_uploads", "a\0b", "ä", &long,
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} is no name");
        }
    }

    #[test]
    fn tags_follow_the_grammar_of_the_spec() {
        for good in ["latest", "_x", "1.36-glibc", "A", &"t".repeat(128)] {
            assert!(good.parse::<Tag>().is_ok(), "{good:?} is a tag");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a:b", "a b", &"t".repeat(129)] {
            assert!(bad.parse::<Tag>().is_err(), "{bad:?} is no tag");
        }
    }

    #[test]
    fn a_reference_with_a_colon_is_a_digest_or_an_error() {
        assert!(matches!("latest".parse(), Ok(Reference::Tag(_))));
        assert!(matches!(
            "sha256:00".parse::<Reference>(),
            Err(NameError::Digest(_))
        ));
    }

    #[test]
    fn every_name_of_docker_hub_is_one_registry() {
        for name in [
            "docker.io",
            "Docker.IO",
            "index.docker.io",
            "registry-1.docker.io",
        ] {
            assert!(
                name.parse::<RegistryHost>()
                    .is_ok_and(|host| host.is_docker_hub()),
                "{name}"
            );
        }
        assert_eq!(
            "LOCALHOST:5000".parse::<RegistryHost>().unwrap().as_str(),
            "localhost:5000"
        );
        for good in ["localhost", "o:5000", "o.test"] {
            assert!(good.parse::<RegistryHost>().is_ok(), "{good:?} is one");
        }
        for bad in [
            "",
            "..",
            "a/b",
            "a:",
            "a:0",
            "a:70000",
            "a:+80",
            "-a",
            "a b",
            "[::1]:5000",
            // Docker Hub has such names.
            "o",
            "library",
        ] {
            assert!(
                bad.parse::<RegistryHost>().is_err(),
                "{bad:?} is no registry host"
            );
        }
    }
}
