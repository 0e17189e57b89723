//! Patterns for repository names and tags (`mycompany/*`, `mycompany/*:v*`).

use std::fmt;
use std::str::FromStr;

use super::{Name, NameError, Tag};

/// A text that is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PatternError(#[from] NameError);

/// A pattern for repository names, or for names and tags with a `:` between them. `*` stands for any
/// characters, `/` among them, and for none; all else for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Box<str>);

impl Pattern {
    /// The pattern as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is for a name with a tag.
    pub fn has_tag(&self) -> bool {
        self.0.contains(':')
    }

    /// Whether `text` is what it stands for.
    pub fn matches(&self, text: &str) -> bool {
        let mut parts = self.0.split('*');
        // What is before the first `*` begins the text.
        let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
            return false;
        };
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        for part in parts {
            // The first place is as good as any: what follows it is the longest.
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let (name, tag) = match text.split_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (text, None),
        };
        // What it stands for has to be a name, as far as one can tell.
        let wrong = |error| match error {
            NameError::Name(_) => NameError::Name(name.chars().take(80).collect()),
            error => error,
        };
        name.replace('*', "a").parse::<Name>().map_err(wrong)?;
        if let Some(tag) = tag {
            let parsed = tag.replace('*', "a").parse::<Tag>();
            parsed.map_err(|_| NameError::Tag(tag.chars().take(80).collect()))?;
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Several patterns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patterns(Box<[Pattern]>);

impl Patterns {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The patterns, in their order.
    pub fn iter(&self) -> impl Iterator<Item = &Pattern> {
        self.0.iter()
    }

    /// Whether one of them stands for `text`.
    pub fn matches(&self, text: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(text))
    }
}

impl FromIterator<Pattern> for Patterns {
    fn from_iter<I: IntoIterator<Item = Pattern>>(patterns: I) -> Self {
        Self(patterns.into_iter().collect())
    }
}

impl fmt::Display for Patterns {
    /// `a/*, b`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, pattern) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            pattern.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, text, expected) in [
            ("mycompany/*", "mycompany/app", true),
            ("mycompany/*", "mycompany/team/app", true),
            ("mycompany/*", "mycompany", false),
            ("mycompany/*", "mycompanyx/app", false),
            ("app", "app", true),
            ("app", "app2", false),
            ("app", "library/app", false),
            ("a*/b*c", "a/bc", true),
            ("a*/b*c", "ax/bxxc", true),
            ("a*/b*c", "ax/bxxcd", false),
            ("a*a", "a", false),
            ("a*b*b", "ab", false),
            ("a*b*b", "abxb", true),
            ("m/*:v*", "m/app:v1", true),
            ("m/*:v*", "m/app:latest", false),
        ] {
            let parsed: Pattern = pattern.parse().unwrap();
            assert_eq!(parsed.matches(text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_pattern_stands_for_names() {
        for good in ["*", "a/*", "a-*/b", "a*", "a:*", "a/*:v1.*"] {
            assert!(good.parse::<Pattern>().is_ok(), "{good:?} is a pattern");
        }
        for bad in ["", "A/*", "/*", "a/", "a//*", "a b", "a:", "a:-*", "a:b:c"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad:?} is no pattern");
        }
    }
}
