//! XML as Amazon's query protocol and Route 53 write it.

use std::fmt::Display;
use std::time::{Duration, SystemTime};

/// An element with a text.
pub fn leaf(name: &str, text: impl Display) -> String {
    let text = text.to_string();
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            _ => escaped.push(character),
        }
    }
    format!("<{name}>{escaped}</{name}>")
}

/// The same, where there is one.
pub fn leaf_of(name: &str, text: Option<impl Display>) -> String {
    text.map_or_else(String::new, |text| leaf(name, text))
}

/// An element of elements.
pub fn node(name: &str, inner: impl AsRef<str>) -> String {
    format!("<{name}>{}</{name}>", inner.as_ref())
}

/// A list: `<name><member>...</member>...</name>`.
pub fn members(name: &str, items: impl IntoIterator<Item = String>) -> String {
    let items = items.into_iter().map(|item| node("member", item));
    node(name, items.collect::<String>())
}

/// A moment so long after the clock's zero, as all three services write it.
pub fn date(origin: SystemTime, at: Duration) -> String {
    humantime::format_rfc3339_millis(origin + at).to_string()
}

/// What is in the one child of that name.
pub fn text_of<'a>(node: roxmltree::Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name).map(|child| child.text().unwrap_or_default())
}

/// The first child of that name, in whatever namespace.
pub fn child<'a, 'input>(
    node: roxmltree::Node<'a, 'input>,
    name: &str,
) -> Option<roxmltree::Node<'a, 'input>> {
    node.children()
        .find(|child| child.tag_name().name() == name)
}
