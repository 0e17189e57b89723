//! YAML as a value: one mapping whose keys are texts.

use serde_json::{Map, Value};
use serde_yaml::Value as Yaml;

use super::error::{KeyPath, Place, Remark};

/// Reads a file's text. An empty document says nothing.
///
/// `None` if it can't be read at all; with a remark on what can't be read of it in any case.
pub(super) fn parse(
    text: &str,
    place: &Place,
    remarks: &mut Vec<Remark>,
) -> Option<Map<String, Value>> {
    let document = match yaml(text) {
        Ok(document) => document,
        Err(message) => {
            remarks.push(Remark::new(place, "", message));
            return None;
        }
    };
    match convert(document, &KeyPath::default(), place, remarks)? {
        Value::Null => Some(Map::new()),
        Value::Object(members) => Some(members),
        other => {
            let is = if other.is_array() {
                "a list"
            } else {
                "a single value"
            };
            let message = format!(
                "the file is {is}; must be a mapping of keys such as `listen: 127.0.0.1:5000`"
            );
            remarks.push(Remark::new(place, "", message));
            None
        }
    }
}

/// Reads a variable's value.
pub(super) fn parse_value(
    text: &str,
    path: &KeyPath,
    place: &Place,
    remarks: &mut Vec<Remark>,
) -> Option<Value> {
    match yaml(text) {
        Ok(value) => convert(value, path, place, remarks),
        Err(message) => {
            remarks.push(Remark::new(place, path, message));
            None
        }
    }
}

/// Reads a variable's value, if it is YAML that JSON has words for.
pub(super) fn lenient(text: &str) -> Option<Value> {
    convert(
        yaml(text).ok()?,
        &KeyPath::default(),
        &Place::Default,
        &mut Vec::new(),
    )
}

/// The text that a variable's value is where only a text is taken: what stands in YAML's quotes,
/// or, without quotes, every character (`[::]:5000`, `0123`).
pub(super) fn plain_text(raw: &str) -> String {
    serde_yaml::from_str(raw).unwrap_or_else(|_| raw.to_owned())
}

fn yaml(text: &str) -> Result<Yaml, String> {
    let mut document: Yaml = serde_yaml::from_str(text).map_err(|error| {
        let template = ["{{", "{%"].iter().any(|open| text.contains(open));
        syntax(&error) + if template { TEMPLATE } else { "" }
    })?;
    document.apply_merge().map_err(|error| syntax(&error))?;
    Ok(document)
}

/// What is most often wrong with a file that has templates in it.
const TEMPLATE: &str = "; it holds a template (`{{ ... }}`): has cloud-init rendered it? The first \
                        line of such user-data is `## template: jinja`";

/// The parser's message, with what people most often meant.
fn syntax(error: &serde_yaml::Error) -> String {
    let message = error.to_string();
    if message.contains("more than one document") {
        return "the file holds more than one YAML document: remove the `---` between them, or put \
                each into a file of its own in config.d"
            .to_owned();
    }
    if let Some((_, key)) = message.split_once("duplicate entry with key ") {
        let key = key.split(" at line ").next().unwrap_or(key);
        let place = error.location().map_or(String::new(), |location| {
            format!(" in the mapping that begins at line {}", location.line())
        });
        return format!("the key {key} stands twice{place}: keep one");
    }
    // The one message that repeats a value, which may be a secret.
    if message.contains("invalid type") {
        let line = error.location().map_or(0, |location| location.line());
        return format!(
            "not YAML: the number at line {line} is too large; is it a text? put it in quotes"
        );
    }
    let hint = if message.contains("while parsing a flow node") {
        ": a text with YAML's own characters in it, such as `[::]:5000`, must be in quotes"
    } else if message.contains("cannot start any token") {
        ": indent with spaces, not tabs, and put a text that begins with `@`, `%` or a backtick in \
         quotes"
    } else {
        ""
    };
    format!("not YAML: {message}{hint}")
}

/// YAML that JSON has no word for is refused: each with its key, and the rest goes on.
fn convert(value: Yaml, path: &KeyPath, place: &Place, remarks: &mut Vec<Remark>) -> Option<Value> {
    let mut refuse = |message: String| {
        remarks.push(Remark::new(place, path, message));
        None
    };
    Some(match value {
        Yaml::Null => Value::Null,
        Yaml::Bool(truth) => truth.into(),
        Yaml::String(text) => text.into(),
        Yaml::Number(number) => match serde_json::to_value(&number) {
            Ok(number @ Value::Number(_)) => number,
            _ => return refuse(format!("{number} is not a finite number")),
        },
        Yaml::Tagged(tagged) => {
            return refuse(format!(
                "the YAML tag {} has no meaning here: remove it",
                tagged.tag
            ));
        }
        Yaml::Sequence(items) => {
            let mut list = Vec::with_capacity(items.len());
            for (index, item) in items.into_iter().enumerate() {
                list.push(convert(item, &path.item(index), place, remarks)?);
            }
            Value::Array(list)
        }
        Yaml::Mapping(members) => {
            let mut mapping = Map::new();
            for (key, value) in members {
                let key = match key {
                    Yaml::String(key) => key,
                    other => {
                        remarks.push(Remark::new(place, path, not_a_key(&other)));
                        // The whole is a template then, and no mapping.
                        if other.is_mapping() {
                            return None;
                        }
                        continue;
                    }
                };
                if let Some(value) = convert(value, &path.key(&key), place, remarks) {
                    mapping.insert(key, value);
                }
            }
            Value::Object(mapping)
        }
    })
}

fn not_a_key(key: &Yaml) -> String {
    let key = match key {
        Yaml::Bool(truth) => format!("the key `{truth}` is a boolean"),
        Yaml::Number(number) => format!("the key `{number}` is a number"),
        Yaml::Null => "the key `null` is empty".to_owned(),
        // In YAML, `{{ name }}` is a mapping whose key is a mapping.
        Yaml::Mapping(_) => return format!("a key is a mapping; must be a text{TEMPLATE}"),
        _ => "a key is a list".to_owned(),
    };
    format!("{key}; must be a text: put it in quotes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Result<Value, String> {
        let mut remarks = Vec::new();
        let document = parse(text, &Place::Default, &mut remarks);
        match (document, remarks.first()) {
            (Some(document), None) => Ok(Value::Object(document)),
            (_, Some(remark)) => Err(format!("{}: {}", remark.key, remark.message)),
            (None, None) => panic!("a refusal without a remark: {text:?}"),
        }
    }

    #[test]
    fn a_document_is_a_mapping_or_nothing() {
        for (text, expected) in [
            ("", json!({})),
            ("# nothing\n", json!({})),
            ("---\n", json!({})),
            ("\u{feff}a: 1", json!({"a": 1})),
            ("a: 1\r\nb: x\r\n", json!({"a": 1, "b": "x"})),
            (
                "a: 0123\nb: yes\nc:",
                json!({"a": "0123", "b": "yes", "c": null}),
            ),
            (
                "x: &x {a: 1}\ny: {<<: *x, b: 2}",
                json!({"x": {"a": 1}, "y": {"a": 1, "b": 2}}),
            ),
        ] {
            assert_eq!(read(text), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn what_is_not_a_mapping_is_refused_with_its_line_or_key() {
        for (text, expected) in [
            ("- a", ": the file is a list; must be a mapping"),
            ("hunter2", ": the file is a single value; must be a mapping"),
            (
                "---\na: 1\n---\nb: 2\n",
                ": the file holds more than one YAML document",
            ),
            (
                "x:\n  a: 1\n  a: 2",
                ": the key \"a\" stands twice in the mapping that begins at line 2: keep one",
            ),
            (
                "a: 1\nlisten: [::]:5000",
                ": not YAML: did not find expected node content at line 2 column 10, while parsing a flow node: a text with YAML's own characters",
            ),
            (
                "a:\n\t- b",
                ": not YAML: found character that cannot start any token at line 2 column 1, while scanning for the next token: indent with spaces",
            ),
            (
                "a: {5: x}",
                "a: the key `5` is a number; must be a text: put it in quotes",
            ),
            (
                "a: {true: x}",
                "a: the key `true` is a boolean; must be a text",
            ),
            ("? [a]\n: b", ": a key is a list; must be a text"),
            ("a: !foo b", "a: the YAML tag !foo has no meaning here"),
            ("a: [1, .nan]", "a[1]: .nan is not a finite number"),
        ] {
            let message = read(text).expect_err(text);
            assert!(message.starts_with(expected), "{text:?} gave {message}");
        }
    }

    #[test]
    fn a_number_too_large_to_read_is_not_repeated_because_it_may_be_a_password() {
        let message = read("password: 99999999999999999999999").expect_err("too large");
        assert!(
            !message.contains("999") && message.contains("line 1"),
            "{message}"
        );
    }

    #[test]
    fn a_variable_that_is_a_text_needs_no_quotes() {
        for (raw, expected) in [
            ("[::]:5000", "[::]:5000"),
            ("\"a\"", "a"),
            ("0123", "0123"),
            ("a: b: c", "a: b: c"),
        ] {
            assert_eq!(plain_text(raw), expected);
        }
    }
}
