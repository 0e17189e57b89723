//! What all files and variables say together, and which of them said what.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::error::{KeyPath, Place, Remark};

/// Where a value was said, and under which key there.
#[derive(Clone)]
pub(super) struct Origin {
    pub place: Place,
    /// The key in the words of that place, if they differ from ours (`proxy.remoteurl`).
    pub key: Option<String>,
}

impl From<Place> for Origin {
    fn from(place: Place) -> Self {
        Self { place, key: None }
    }
}

/// Several documents as one: the last to name a key wins. It has no `Debug`: it holds secrets.
#[derive(Default)]
pub(super) struct Merged {
    members: Map<String, Value>,
    origins: BTreeMap<KeyPath, Origin>,
}

impl Merged {
    /// Lays a document over what was said before: mappings by key, lists and scalars as a whole.
    /// A key that is empty says nothing, and the keys of free mappings (header names, a variable's
    /// upper case) replace each other whatever their case.
    pub fn add(&mut self, members: Map<String, Value>, origin: &Origin) {
        overlay(
            &mut self.members,
            members,
            &KeyPath::default(),
            origin,
            &mut self.origins,
        );
    }

    /// Takes back all that was said of a key of the document, and within it.
    pub fn forget(&mut self, key: &str) {
        self.members.remove(key);
    }

    /// Notes where a value within a list was said.
    pub fn note(&mut self, path: KeyPath, origin: Origin) {
        self.origins.insert(path, origin);
    }

    /// Everything that was said.
    pub fn members(&self) -> &Map<String, Value> {
        &self.members
    }

    /// Where a value, or the nearest thing that it is in, was said.
    pub fn origin(&self, path: &KeyPath) -> Option<&Origin> {
        let mut path = path.clone();
        loop {
            if let Some(origin) = self.origins.get(&path) {
                return Some(origin);
            }
            path = path.parent()?;
        }
    }

    /// What there is to say about a value, in the words of the place that said it.
    pub fn remark(&self, path: &KeyPath, message: impl Into<String>) -> Remark {
        match self.origin(path) {
            Some(Origin {
                place,
                key: Some(key),
            }) => Remark::new(place, key, message),
            Some(Origin { place, key: None }) => Remark::new(place, path, message),
            None => Remark::new(&Place::Default, path, message),
        }
    }
}

fn overlay(
    below: &mut Map<String, Value>,
    above: Map<String, Value>,
    path: &KeyPath,
    origin: &Origin,
    origins: &mut BTreeMap<KeyPath, Origin>,
) {
    for (key, value) in above {
        let here = path.key(&key);
        match value {
            Value::Null => {}
            Value::Object(members) => {
                let below = below.entry(key).or_insert(Value::Null);
                if !below.is_object() {
                    *below = Value::Object(Map::new());
                    origins.insert(here.clone(), origin.clone());
                }
                if let Value::Object(below) = below {
                    overlay(below, members, &here, origin, origins);
                }
            }
            value => {
                below.retain(|said, _| !said.eq_ignore_ascii_case(&key));
                below.insert(key, value);
                origins.retain(|said, _| !said.is_within(&here));
                origins.insert(here, origin.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn merged(documents: &[(&str, Value)]) -> Merged {
        let mut merged = Merged::default();
        for (place, document) in documents {
            let Value::Object(members) = document.clone() else {
                panic!("a mapping")
            };
            merged.add(members, &Place::Variable((*place).to_owned()).into());
        }
        merged
    }

    #[test]
    fn mappings_merge_by_key_and_the_rest_is_replaced_whole() {
        let merged = merged(&[
            (
                "A",
                json!({"log": {"level": "info", "access": false}, "list": [1, 2], "drain": "1s"}),
            ),
            (
                "B",
                json!({"log": {"level": "debug"}, "list": [3], "drain": null}),
            ),
            ("C", json!({"log": null})),
        ]);
        let expected =
            json!({"log": {"level": "debug", "access": false}, "list": [3], "drain": "1s"});
        assert_eq!(Value::Object(merged.members().clone()), expected);
        let place = |path: &str| {
            merged
                .origin(&KeyPath::of(path))
                .map(|o| o.place.to_string())
        };
        assert_eq!(place("log.level").as_deref(), Some("B (environment)"));
        assert_eq!(place("log.access").as_deref(), Some("A (environment)"));
        assert_eq!(place("drain").as_deref(), Some("A (environment)"));
        assert_eq!(place("listen"), None);
        let item = KeyPath::of("list").item(0).key("url");
        assert_eq!(
            merged.remark(&item, "is wrong").to_string(),
            "B (environment): list[0].url: is wrong"
        );
    }

    #[test]
    fn a_header_replaces_itself_in_another_case() {
        let merged = merged(&[
            ("A", json!({"headers": {"X-One": "1", "X-Two": "2"}})),
            ("B", json!({"headers": {"x-one": "3"}})),
        ]);
        assert_eq!(
            merged.members()["headers"],
            json!({"x-one": "3", "X-Two": "2"})
        );
    }

    #[test]
    fn a_list_that_is_replaced_takes_its_notes_with_it() {
        let mut merged = merged(&[("A", json!({"upstreams": []}))]);
        let url = KeyPath::of("upstreams").item(0).key("url");
        let origin = Origin {
            place: Place::Default,
            key: Some("proxy.remoteurl".to_owned()),
        };
        merged.note(url.clone(), origin);
        assert_eq!(merged.remark(&url, "x").key, "proxy.remoteurl");
        merged.add(
            Map::from_iter([("upstreams".to_owned(), json!([]))]),
            &Place::Default.into(),
        );
        assert_eq!(merged.remark(&url, "x").key, "upstreams[0].url");
    }
}
