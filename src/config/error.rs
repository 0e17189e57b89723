//! What is wrong with a configuration: each error with its place, its key and what to do.

use std::fmt;
use std::path::PathBuf;

/// Everything that is wrong with a configuration, at once. Prints one error a line, never a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(pub(super) Vec<Remark>);

impl std::error::Error for Errors {}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

/// One line about one key: an error or a warning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remark {
    pub place: Place,
    /// The key as it is written at that place; empty if it is about the place as a whole.
    pub key: String,
    pub message: String,
}

impl Remark {
    pub fn new(place: &Place, key: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            place: place.clone(),
            key: key.into(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// Where something was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: it is what the agent does without being told.
    Default,
    File(PathBuf),
    /// An environment variable, by name.
    Variable(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("defaults"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => write!(f, "{name} (environment)"),
        }
    }
}

/// A path of keys, as people write it: `upstreams[0].url`.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyPath(Vec<Segment>);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Segment {
    Key(String),
    Item(usize),
}

impl KeyPath {
    /// Reads `a.b.c`, which holds no list items.
    pub fn of(dotted: &str) -> Self {
        Self(
            dotted
                .split('.')
                .map(|key| Segment::Key(key.to_owned()))
                .collect(),
        )
    }

    /// The path of `name` within the mapping that is here.
    pub fn key(&self, name: &str) -> Self {
        self.with(Segment::Key(name.to_owned()))
    }

    /// The path of an item of the list that is here.
    pub fn item(&self, index: usize) -> Self {
        self.with(Segment::Item(index))
    }

    fn with(&self, segment: Segment) -> Self {
        let mut path = self.clone();
        path.0.push(segment);
        path
    }

    /// The path of what this is in, if it is in anything.
    pub fn parent(&self) -> Option<Self> {
        let (_, parent) = self.0.split_last()?;
        Some(Self(parent.to_vec()))
    }

    /// Whether this is `other` or within it.
    pub fn is_within(&self, other: &Self) -> bool {
        self.0.starts_with(&other.0)
    }
}

impl From<&KeyPath> for String {
    fn from(path: &KeyPath) -> Self {
        path.to_string()
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Item(item) => write!(f, "[{item}]")?,
                // Escaped and cut: a key is input like any other, and an error is one line.
                Segment::Key(key) => {
                    let dot = if index > 0 { "." } else { "" };
                    let key: String = key.chars().take(80).collect();
                    write!(f, "{dot}{}", key.escape_debug())?;
                }
            }
        }
        Ok(())
    }
}

/// A text as an error may repeat it: quoted, on one line, and never the whole of a huge one.
pub(super) fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().take(80).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

/// The choice that someone who wrote `wrong` most likely meant.
pub(super) fn nearest<'a>(wrong: &str, choices: &[&'a str]) -> Option<&'a str> {
    let distance = |choice: &&str| strsim::damerau_levenshtein(&wrong.to_lowercase(), choice);
    let near = |choice: &&str| distance(choice) <= 1 + choice.len() / 4;
    choices.iter().copied().filter(near).min_by_key(distance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_path_reads_as_people_write_it() {
        let path = KeyPath::of("upstreams")
            .item(0)
            .key("credentials")
            .key("user\nname");
        assert_eq!(path.to_string(), r"upstreams[0].credentials.user\nname");
    }

    #[test]
    fn only_what_is_near_is_suggested() {
        let choices = ["listen", "log", "drain", "freshness"];
        for (wrong, expected) in [
            ("lisen", Some("listen")),
            ("Listen", Some("listen")),
            ("fershness", Some("freshness")),
            ("dran", Some("drain")),
            ("proxy", None),
            ("l", None),
        ] {
            assert_eq!(nearest(wrong, &choices), expected, "{wrong}");
        }
    }
}
