//! docker's `daemon.json`, edited in place.
//!
//! What dockerd can't read it does not start with (moby `daemon/config/config.go`,
//! `getConflictFreeConfiguration`), so a file that is broken already is an error here: nothing is
//! made worse, and the operator learns of it before the next reboot does it. An edit replaces the
//! bytes of one value at a time, so that every other byte stays as somebody left it.

use jsonc_parser::ast::{Array, Object, ObjectProp, ObjectPropName, Value};
use jsonc_parser::common::{Range, Ranged};
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};

/// The list of mirrors of docker.io.
pub(super) const MIRRORS: &str = "registry-mirrors";
/// Registries that may speak plain HTTP.
pub(super) const INSECURE: &str = "insecure-registries";
/// Whether experimental features are on.
pub(super) const EXPERIMENTAL: &str = "experimental";

/// What is wrong with a file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Broken {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    pub message: String,
}

/// The part of a `daemon.json` that is ours to look at; `None` is a key that is not there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DaemonJson {
    pub mirrors: Option<Vec<String>>,
    pub insecure: Option<Vec<String>>,
    pub experimental: Option<bool>,
}

const STRICT: ParseOptions = ParseOptions {
    allow_comments: false,
    allow_loose_object_property_names: false,
    allow_trailing_commas: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

/// Reads it; a file with nothing in it is one with no keys, as it is for dockerd.
pub(super) fn read(text: &str) -> Result<DaemonJson, Broken> {
    if text.trim().is_empty() {
        return Ok(DaemonJson::default());
    }
    let root = parse(text)?;
    let mut found = DaemonJson::default();
    for (index, property) in root.properties.iter().enumerate() {
        let name = property.name.as_str();
        if root.properties[..index]
            .iter()
            .any(|earlier| earlier.name.as_str() == name)
        {
            let message = format!("the key \"{name}\" is there twice");
            return Err(broken(text, property.range.start, message));
        }
        match name {
            MIRRORS => found.mirrors = Some(strings(text, property)?),
            INSECURE => found.insecure = Some(strings(text, property)?),
            EXPERIMENTAL => match &property.value {
                Value::BooleanLit(said) => found.experimental = Some(said.value),
                other => {
                    let message = format!("\"{name}\" is not true or false");
                    return Err(broken(text, other.start(), message));
                }
            },
            _ => {}
        }
    }
    Ok(found)
}

fn strings(text: &str, property: &ObjectProp<'_>) -> Result<Vec<String>, Broken> {
    let name = property.name.as_str();
    let Value::Array(list) = &property.value else {
        let message = format!("\"{name}\" is not a list of texts");
        return Err(broken(text, property.value.start(), message));
    };
    let one = |value: &Value<'_>| match value {
        Value::StringLit(one) => Ok(one.value.to_string()),
        other => {
            let message = format!("\"{name}\" holds something that is not a text");
            Err(broken(text, other.start(), message))
        }
    };
    list.elements.iter().map(one).collect()
}

/// The one object that the file is made of.
fn parse(text: &str) -> Result<Object<'_>, Broken> {
    if text.starts_with('\u{feff}') {
        let message = "it starts with a byte order mark, which docker before 23.0 can't read";
        return Err(broken(text, 0, message.into()));
    }
    let parsed = parse_to_ast(text, &CollectOptions::default(), &STRICT);
    let parsed = parsed.map_err(|error| {
        let message = match error.kind().to_string() {
            kind if kind.to_lowercase().contains("comment") => {
                "a comment, which JSON does not have: dockerd refuses it".to_owned()
            }
            kind => format!("not JSON: {}", lower_first(&kind)),
        };
        broken(text, error.range().start, message)
    })?;
    // A second opinion, from a parser that knows no dialects.
    if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(text) {
        return Err(Broken {
            line: error.line(),
            column: error.column(),
            message: format!("not JSON: {error}"),
        });
    }
    match parsed.value {
        Some(Value::Object(root)) => Ok(root),
        Some(other) => Err(broken(
            text,
            other.start(),
            "not an object: it has to be `{ ... }`".into(),
        )),
        None => Err(broken(text, 0, "there is no value in it".into())),
    }
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_lowercase().chain(chars).collect()
    })
}

fn broken(text: &str, at: usize, message: String) -> Broken {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Broken {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        message,
    }
}

/// How the list of a key is changed.
#[derive(Clone, Copy)]
pub(super) struct ListEdit<'a> {
    /// What has to be the first, exactly so where it has to be written.
    pub first: Option<&'a str>,
    /// Which entries mean the same as `first`: one that comes first already stays as it is written.
    pub same: &'a dyn Fn(&str) -> bool,
    /// Which other entries go.
    pub stale: &'a dyn Fn(&str) -> bool,
}

/// The list after the edit, without regard to its text.
pub(super) fn edited_list(list: &[String], edit: ListEdit<'_>) -> Vec<String> {
    let (same, stale) = (edit.same, edit.stale);
    let kept = list.iter().filter(|one| !same(one) && !stale(one)).cloned();
    match edit.first {
        None => kept.collect(),
        Some(first) => {
            let first = match list.first() {
                Some(there) if same(there) => there.clone(),
                _ => first.to_owned(),
            };
            std::iter::once(first).chain(kept).collect()
        }
    }
}

/// The text in which the key holds this list, changed as little as can be. The text is one that
/// [`read`] accepts.
pub(super) fn set_list(text: &str, key: &str, wanted: &[String]) -> Result<String, Broken> {
    let mut text = text.to_owned();
    // One edit at a time, each on a text that was parsed afresh: the file is a screenful.
    loop {
        let root = if text.trim().is_empty() {
            None
        } else {
            Some(parse(&text)?)
        };
        let property = root.as_ref().and_then(|root| find(root, key));
        let (range, new) = match property.map(|it| &it.value) {
            Some(Value::Array(list)) => match next_step(&text, list, wanted) {
                Some(step) => step,
                None => return Ok(text),
            },
            _ => return set(&text, key, &render(wanted)),
        };
        text.replace_range(range.start..range.end, &new);
    }
}

/// The text in which the key holds this JSON value.
pub(super) fn set(text: &str, key: &str, value: &str) -> Result<String, Broken> {
    if text.trim().is_empty() {
        return Ok(format!("{{\n  {}: {value}\n}}\n", quote(key)));
    }
    let root = parse(text)?;
    let mut new = text.to_owned();
    if let Some(property) = find(&root, key) {
        let range = property.value.range();
        new.replace_range(range.start..range.end, value);
        return Ok(new);
    }
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    match root.properties.split_last() {
        None => {
            let object = format!("{{{newline}  {}: {value}{newline}}}", quote(key));
            new.replace_range(root.range.start..root.range.end, &object);
        }
        // As the last one is written: its indentation, and how its colon is set.
        Some((last, before)) => {
            let from = before.last().map_or(root.range.start, |one| one.range.end);
            let gap = text[from..last.range.start].trim_start_matches(['{', ',', ' ', '\t']);
            let gap = if gap.is_empty() {
                let gap = &text[from..last.range.start];
                &gap[gap.rfind(['{', ',']).map_or(0, |at| at + 1)..]
            } else {
                gap
            };
            let colon = match &last.name {
                ObjectPropName::String(name) => &text[name.range.end..last.value.start()],
                ObjectPropName::Word(_) => ": ",
            };
            let property = format!(",{gap}{}{colon}{value}", quote(key));
            new.insert_str(last.range.end, &property);
        }
    }
    Ok(new)
}

fn find<'a, 'b>(root: &'a Object<'b>, key: &str) -> Option<&'a ObjectProp<'b>> {
    root.properties.iter().find(|one| one.name.as_str() == key)
}

/// The next edit that brings a list nearer to what it should be.
fn next_step(text: &str, list: &Array<'_>, wanted: &[String]) -> Option<(Range, String)> {
    let entries: Vec<&str> = list
        .elements
        .iter()
        .filter_map(|one| one.as_string_lit().map(|one| &*one.value))
        .collect();
    if entries == wanted {
        return None;
    }
    if entries.is_empty() || wanted.is_empty() {
        return Some((list.range, render(wanted)));
    }
    let range = |index: usize| list.elements[index].range();
    let common = entries.iter().zip(wanted).take_while(|(a, b)| a == b);
    let at = common.count();
    // The first that differs is one too many, one that is replaced, or the place of one too few.
    let needed_later = |entry: &str| {
        wanted[at.min(wanted.len())..]
            .iter()
            .any(|one| one == entry)
    };
    let missing = wanted
        .get(at)
        .filter(|one| !entries[at..].contains(&one.as_str()));
    Some(match (entries.get(at), missing) {
        (Some(there), Some(new)) if !needed_later(there) => (range(at), quote(new)),
        (Some(_), Some(new)) => {
            let start = range(at).start;
            let separator = separator(text, list);
            (
                Range::new(start, start),
                format!("{}{separator}", quote(new)),
            )
        }
        (None, Some(new)) => {
            let end = range(at - 1).end;
            (
                Range::new(end, end),
                format!("{}{}", separator(text, list), quote(new)),
            )
        }
        (Some(_), None) if at + 1 < entries.len() => (
            Range::new(range(at).start, range(at + 1).start),
            String::new(),
        ),
        (Some(_) | None, None) => {
            let end = entries.len() - 1;
            (
                Range::new(range(end - 1).end, range(end).end),
                String::new(),
            )
        }
    })
}

/// What stands between two entries of this list.
fn separator(text: &str, list: &Array<'_>) -> String {
    match list.elements.as_slice() {
        [first, second, ..] => text[first.end()..second.start()].to_owned(),
        [only] => {
            let gap = &text[list.range.start + 1..only.start()];
            let gap = if gap.contains('\n') { gap } else { " " };
            format!(",{gap}")
        }
        [] => ", ".into(),
    }
}

fn render(list: &[String]) -> String {
    let list: Vec<String> = list.iter().map(|one| quote(one)).collect();
    format!("[{}]", list.join(", "))
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
