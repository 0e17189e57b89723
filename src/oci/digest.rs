//! Digests: `sha256:<64 hex digits>` and `sha512:<128 hex digits>`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ring::digest::{Context, SHA256, SHA512};

/// A text that is not a digest this registry knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a digest: `sha256:` and 64, or `sha512:` and 128, lower-case hexadecimal digits"
)]
pub struct DigestError(String);

/// The hash algorithms that distribution-spec 1.1 registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// SHA-256, what everybody uses.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Sha256, Self::Sha512];

    /// The name before the colon.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// The one with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|it| it.as_str() == name)
    }

    fn ring(self) -> &'static ring::digest::Algorithm {
        match self {
            Self::Sha256 => &SHA256,
            Self::Sha512 => &SHA512,
        }
    }
}

/// The digest of a blob or a manifest. Source: image-spec 1.1, "Digests".
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: Algorithm,
    text: Arc<str>,
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(algorithm: Algorithm, bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(bytes);
        hasher.finish()
    }

    /// The algorithm it was made with.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// `algorithm:hex`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The part after the colon, lower-case hexadecimal.
    pub fn hex(&self) -> &str {
        &self.text[self.algorithm.as_str().len() + 1..]
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let error = || DigestError(text.chars().take(140).collect());
        let (name, hex) = text.split_once(':').ok_or_else(error)?;
        let (algorithm, length) = match name {
            "sha256" => (Algorithm::Sha256, 64),
            "sha512" => (Algorithm::Sha512, 128),
            _ => return Err(error()),
        };
        // No character is a reason to stop, so that they are looked at many at once.
        let hexadecimal = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
        let valid = hex.len() == length && hex.bytes().fold(true, |all, c| all & hexadecimal(c));
        if valid {
            Ok(Self {
                algorithm,
                text: text.into(),
            })
        } else {
            Err(error())
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Computes a digest from bytes that arrive one piece after another.
#[derive(Clone)]
pub struct Hasher {
    algorithm: Algorithm,
    context: Context,
}

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new(algorithm: Algorithm) -> Self {
        Self {
            algorithm,
            context: Context::new(algorithm.ring()),
        }
    }

    /// The algorithm that it computes.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
    }

    /// The digest of all bytes taken.
    pub fn finish(self) -> Digest {
        let name = self.algorithm.as_str();
        let hash = self.context.finish();
        let mut text = String::with_capacity(name.len() + 1 + hash.as_ref().len() * 2);
        text.push_str(name);
        text.push(':');
        for byte in hash.as_ref() {
            text.push(char::from(b"0123456789abcdef"[usize::from(byte >> 4)]));
            text.push(char::from(b"0123456789abcdef"[usize::from(byte & 15)]));
        }
        Digest {
            algorithm: self.algorithm,
            text: text.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_of_known_bytes() {
        // FIPS 180-4's example "abc", and the empty input.
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::of(Algorithm::Sha256, b"abc").as_str(), abc);
        assert!(
            Digest::of(Algorithm::Sha512, b"")
                .hex()
                .starts_with("cf83e1357eefb8bdf1542850d66d8007")
        );
    }

    #[test]
    fn only_well_formed_digests_parse() {
        let hex = "a".repeat(64);
        assert_eq!(
            format!("sha256:{hex}").parse::<Digest>().unwrap().hex(),
            hex
        );
        assert!(format!("sha512:{hex}{hex}").parse::<Digest>().is_ok());
        for bad in [
            String::new(),
            hex.clone(),
            format!("sha256:{}", &hex[1..]),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha512:{hex}"),
            format!("md5:{hex}"),
            format!("sha256:../{}", &hex[3..]),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad:?} is no digest");
        }
    }
}
