//! The configuration's JSON Schema, and the walk of a document against it.
//!
//! The walk knows the part of JSON Schema that our own types generate. A validator for all of it
//! is seventy crates, and says less: not what was meant.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::error::{KeyPath, Place, Remark, nearest, quoted};
use super::fragment::Fragment;

/// What cloud-init writes where a template variable had no value.
const UNRENDERED: &str = "CI_MISSING_JINJA_VAR";

/// The JSON Schema (draft 2020-12) of a configuration file, for editors. The loader itself checks
/// every file and variable against it.
pub fn schema() -> Value {
    SchemaSettings::draft2020_12()
        .into_generator()
        .into_root_schema_for::<Fragment>()
        .to_value()
}

/// Whether the key takes a text and nothing else, so that a variable's value needs no quotes.
pub(super) fn takes_only_text(root: &Value, keys: &[String]) -> bool {
    let walk = Walk {
        root,
        place: &Place::Default,
        remarks: &mut Vec::new(),
    };
    let mut schema = root;
    for key in keys {
        schema = walk.branch(schema, "object").unwrap_or(schema);
        let Some(next) = schema["properties"]
            .get(key)
            .or(schema.get("additionalProperties"))
        else {
            return false;
        };
        schema = next;
    }
    let types = walk.types(schema);
    types.contains(&"string") && types.iter().all(|name| matches!(*name, "string" | "null"))
}

/// The part of a document that fits the schema; what doesn't is left out, with a remark each.
pub(super) fn accept(
    root: &Value,
    document: Map<String, Value>,
    place: &Place,
    remarks: &mut Vec<Remark>,
) -> Map<String, Value> {
    Walk {
        root,
        place,
        remarks,
    }
    .mapping(root, document, &KeyPath::default())
}

struct Walk<'a> {
    root: &'a Value,
    place: &'a Place,
    remarks: &'a mut Vec<Remark>,
}

impl<'a> Walk<'a> {
    fn value(&mut self, schema: &'a Value, value: Value, path: &KeyPath) -> Option<Value> {
        if let Some(variable) = value.as_str().and_then(unrendered) {
            let message = format!("cloud-init left a template variable unrendered ({variable})");
            // The rest of a secret could be in the same word.
            let secret = self.holds_secret(schema);
            let message = if secret {
                message.split(" (").next().unwrap_or_default()
            } else {
                &message
            };
            return self.refuse(path, message);
        }
        let Some(branch) = self.branch(schema, type_of(&value)) else {
            return self.wrong_type(schema, &value, path);
        };
        match value {
            Value::Object(members) => Some(Value::Object(self.mapping(branch, members, path))),
            Value::Array(items) => self.list(branch, items, path),
            value => self.scalar(branch, value, path),
        }
    }

    fn mapping(
        &mut self,
        schema: &'a Value,
        members: Map<String, Value>,
        path: &KeyPath,
    ) -> Map<String, Value> {
        for required in schema["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
        {
            if members.get(required).is_none_or(Value::is_null) {
                self.refuse::<()>(path, format!("`{required}` is missing"));
            }
        }
        let mut accepted = Map::new();
        for (key, value) in members {
            let here = path.key(&key);
            let known = schema["properties"]
                .get(&key)
                .or(schema.get("additionalProperties"));
            let member = match known {
                Some(member) if member.is_object() => self.value(member, value, &here),
                _ => self.unknown(schema, &key, &here),
            };
            if let Some(member) = member {
                accepted.insert(key, member);
            }
        }
        accepted
    }

    /// A list of mappings keeps a hole where an item was refused, so that its neighbours are still
    /// checked; any other list is refused as a whole.
    fn list(&mut self, schema: &'a Value, items: Vec<Value>, path: &KeyPath) -> Option<Value> {
        let of_mappings = self.types(&schema["items"]).contains(&"object");
        let mut accepted = Vec::with_capacity(items.len());
        let mut whole = true;
        for (index, item) in items.into_iter().enumerate() {
            let before = self.remarks.len();
            let item = self.value(&schema["items"], item, &path.item(index));
            let refused = self.remarks.len() > before;
            whole &= !refused;
            accepted.push(item.filter(|_| !refused).unwrap_or_default());
        }
        (whole || of_mappings).then_some(Value::Array(accepted))
    }

    fn scalar(&mut self, schema: &'a Value, value: Value, path: &KeyPath) -> Option<Value> {
        if let (Some(choices), Some(text)) = (choices(schema), value.as_str())
            && !choices.contains(&text)
        {
            let meant = nearest(text, &choices);
            let meant = meant.map_or(String::new(), |near| format!("did you mean `{near}`? "));
            let message = format!("{} is not allowed; {meant}must be one of: ", quoted(text));
            return self.refuse(path, message + &choices.join(", "));
        }
        // `format: uint32` is what a number's type can hold.
        let limit = (schema["format"] == "uint32").then_some(u64::from(u32::MAX));
        let least = schema["minimum"].as_u64().unwrap_or(0);
        let most = schema["maximum"].as_u64().or(limit).unwrap_or(u64::MAX);
        let fits = |number: &Value| number.as_u64().is_some_and(|n| (least..=most).contains(&n));
        if value.is_number() && !fits(&value) {
            return self.refuse(
                path,
                format!("{value} is not allowed; must be between {least} and {most}"),
            );
        }
        Some(value)
    }

    fn unknown(&mut self, schema: &Value, key: &str, path: &KeyPath) -> Option<Value> {
        let allowed: Vec<&str> = schema["properties"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, _)| &**key)
            .collect();
        let meant = nearest(key, &allowed);
        let meant = meant.map_or(".".to_owned(), |near| format!("; did you mean `{near}`?"));
        self.refuse(
            path,
            format!("unknown key{meant} Allowed here: {}", allowed.join(", ")),
        )
    }

    fn wrong_type(&mut self, schema: &'a Value, value: &Value, path: &KeyPath) -> Option<Value> {
        let shown = match value {
            // Someone may have written the secret one level too high.
            Value::String(_) | Value::Number(_) | Value::Bool(_) if self.holds_secret(schema) => {
                String::new()
            }
            Value::String(text) => quoted(text) + " ",
            Value::Number(_) | Value::Bool(_) => format!("{value} "),
            _ => String::new(),
        };
        let types = self.types(schema);
        let wanted: Vec<&str> = types
            .into_iter()
            .filter(|name| *name != "null")
            .map(article)
            .collect();
        let example = &schema["examples"][0];
        let example = if example.is_null() {
            String::new()
        } else {
            format!(" such as {example}")
        };
        let is = if value.is_boolean() {
            "a boolean"
        } else {
            article(type_of(value))
        };
        self.refuse(
            path,
            format!("{shown}is {is}; must be {}{example}", wanted.join(" or ")),
        )
    }

    /// Records what is wrong; there is nothing to go on with.
    fn refuse<T>(&mut self, path: &KeyPath, message: impl Into<String>) -> Option<T> {
        self.remarks.push(Remark::new(self.place, path, message));
        None
    }

    fn resolve(&self, schema: &'a Value) -> &'a Value {
        let target = schema["$ref"]
            .as_str()
            .and_then(|target| target.strip_prefix('#'));
        target
            .and_then(|pointer| self.root.pointer(pointer))
            .unwrap_or(schema)
    }

    /// The schema itself without its references, or each of those that it lets one choose from.
    fn branches(&self, schema: &'a Value) -> Vec<&'a Value> {
        let schema = self.resolve(schema);
        match schema["anyOf"].as_array() {
            Some(branches) => branches
                .iter()
                .flat_map(|branch| self.branches(branch))
                .collect(),
            None => vec![schema],
        }
    }

    /// The part of the schema that is about values of this type, if it allows any.
    fn branch(&self, schema: &'a Value, wanted: &str) -> Option<&'a Value> {
        self.branches(schema)
            .into_iter()
            .find(|branch| own_types(branch).contains(&wanted))
    }

    fn types(&self, schema: &'a Value) -> Vec<&'a str> {
        self.branches(schema)
            .into_iter()
            .flat_map(own_types)
            .collect()
    }

    /// Whether a value here is a secret, or something within it would be.
    fn holds_secret(&self, schema: &'a Value) -> bool {
        self.branches(schema).into_iter().any(|branch| {
            let members = branch["properties"].as_object().into_iter().flatten();
            branch["writeOnly"] == true
                || members
                    .map(|(_, member)| member)
                    .any(|member| self.holds_secret(member))
                || branch
                    .get("items")
                    .is_some_and(|items| self.holds_secret(items))
        })
    }
}

/// The types that a schema without references names; an enumeration is of texts.
fn own_types(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(name) => vec![name],
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        _ if choices(schema).is_some() => vec!["string"],
        _ => Vec::new(),
    }
}

/// The texts that an enumeration allows.
fn choices(schema: &Value) -> Option<Vec<&str>> {
    let variants = schema["oneOf"].as_array()?;
    Some(
        variants
            .iter()
            .filter_map(|variant| variant["const"].as_str())
            .collect(),
    )
}

/// A value's type by its name in JSON Schema.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn article(type_name: &str) -> &str {
    match type_name {
        "null" => "empty",
        "boolean" => "true or false",
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "a text",
        "array" => "a list",
        "object" => "a mapping",
        other => other,
    }
}

/// What a text holds of a template that cloud-init has not rendered, if it does: its mark for a
/// variable without a value (`CI_MISSING_JINJA_VAR/region`), or the template itself
/// (`{{ v1.region }}`), where the user-data did not say that it is one.
pub(super) fn unrendered(text: &str) -> Option<String> {
    if let Some((_, rest)) = text.split_once(UNRENDERED) {
        let word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '/' | '.');
        let variable = &rest[..rest.find(|c| !word(c)).unwrap_or(rest.len())];
        return Some(format!("{UNRENDERED}{variable}"));
    }
    let pairs = [("{{", "}}"), ("{%", "%}")];
    pairs.iter().find_map(|(open, close)| {
        let (_, rest) = text.split_once(open)?;
        let (inner, _) = rest.split_once(close)?;
        let inner: String = inner.chars().take(80).collect();
        Some(format!("{open}{}{close}", inner.escape_debug()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn remarks(document: Value) -> Vec<String> {
        let Value::Object(document) = document else {
            panic!("a document is a mapping")
        };
        let mut remarks = Vec::new();
        accept(&schema(), document, &Place::Default, &mut remarks);
        remarks
            .iter()
            .map(|remark| format!("{}: {}", remark.key, remark.message))
            .collect()
    }

    #[test]
    fn every_type_has_its_words() {
        for (document, expected) in [
            (
                json!({"listen": 5000}),
                "listen: 5000 is a whole number; must be a text such as \"127.0.0.1:5000\"",
            ),
            (json!({"log": []}), "log: is a list; must be a mapping"),
            (
                json!({"log": {"access": "yes"}}),
                "log.access: \"yes\" is a text; must be true or false",
            ),
            (
                json!({"headers": {"X": true}}),
                "headers.X: true is a boolean; must be a text or a list",
            ),
            (
                json!({"headers": {"X": ["a", 1.5]}}),
                "headers.X[1]: 1.5 is a number; must be a text",
            ),
            (
                json!({"health": {"threshold": 0}}),
                "health.threshold: 0 is not allowed; must be between 1 and 4294967295",
            ),
            (
                json!({"health": {"threshold": 4_294_967_296_u64}}),
                "health.threshold: 4294967296 is not allowed; must be between 1 and 4294967295",
            ),
            (
                json!({"health": {"threshold": 3.0}}),
                "health.threshold: 3.0 is a number; must be a whole number",
            ),
            (
                json!({"upstreams": [null]}),
                "upstreams[0]: is empty; must be a mapping",
            ),
            (
                json!({"upstreams": [{"registry": null}]}),
                "upstreams[0]: `registry` is missing",
            ),
        ] {
            assert_eq!(
                remarks(document).first().map(String::as_str),
                Some(expected)
            );
        }
    }

    #[test]
    fn empty_keys_are_allowed() {
        assert_eq!(
            remarks(json!({"listen": null, "storage": null, "log": {"level": null}})),
            [""; 0]
        );
    }

    #[test]
    fn what_is_refused_is_left_out_and_its_neighbours_stay() {
        let Value::Object(document) = json!({
            "lisen": "x",
            "log": {"level": "loud", "format": "json"},
            "upstreams": [{"registry": 5}, {"registry": "ghcr.io"}],
        }) else {
            panic!("a document is a mapping")
        };
        let accepted = accept(&schema(), document, &Place::Default, &mut Vec::new());
        let expected = json!({
            "log": {"format": "json"},
            "upstreams": [null, {"registry": "ghcr.io"}],
        });
        assert_eq!(Value::Object(accepted), expected);
    }

    #[test]
    fn a_variable_needs_no_quotes_where_only_a_text_is_taken() {
        let only_text = |dotted: &str| {
            let keys: Vec<String> = dotted.split('.').map(str::to_owned).collect();
            takes_only_text(&schema(), &keys)
        };
        for key in [
            "listen",
            "role",
            "storage.filesystem.root",
            "log.fields.build",
            "log.level",
        ] {
            assert!(only_text(key), "{key} takes a text");
        }
        for key in [
            "upstreams",
            "log",
            "log.access",
            "health.threshold",
            "headers.x",
            "nothing",
        ] {
            assert!(!only_text(key), "{key} takes something else as well");
        }
    }
}
