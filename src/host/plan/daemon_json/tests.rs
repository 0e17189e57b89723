//! Edits of files as people write them.

use super::*;

fn list(items: &[&str]) -> Vec<String> {
    items.iter().map(|&one| one.to_owned()).collect()
}

fn mirrors(text: &str, wanted: &[&str]) -> String {
    set_list(text, MIRRORS, &list(wanted)).unwrap()
}

#[test]
fn a_list_changes_where_it_has_to_and_keeps_its_form() {
    for (before, wanted, after) in [
        ("", &["a"][..], "{\n  \"registry-mirrors\": [\"a\"]\n}\n"),
        ("{}", &["a"], "{\n  \"registry-mirrors\": [\"a\"]\n}"),
        ("{}\n", &[], "{\n  \"registry-mirrors\": []\n}\n"),
        (r#"{"x":1}"#, &["a"], r#"{"x":1,"registry-mirrors":["a"]}"#),
        (
            r#"{ "x": 1, "y": 2 }"#,
            &["a"],
            r#"{ "x": 1, "y": 2, "registry-mirrors": ["a"] }"#,
        ),
        (
            "{\r\n\t\"x\" : 1\r\n}\r\n",
            &["a"],
            "{\r\n\t\"x\" : 1,\r\n\t\"registry-mirrors\" : [\"a\"]\r\n}\r\n",
        ),
        (
            r#"{"registry-mirrors": ["b"]}"#,
            &["a", "b"],
            r#"{"registry-mirrors": ["a", "b"]}"#,
        ),
        (
            r#"{"registry-mirrors":["b","c"]}"#,
            &["a", "b", "c"],
            r#"{"registry-mirrors":["a","b","c"]}"#,
        ),
        (
            "{\"registry-mirrors\": [\n    \"b\"\n  ]}",
            &["a", "b"],
            "{\"registry-mirrors\": [\n    \"a\",\n    \"b\"\n  ]}",
        ),
        (
            "{\"registry-mirrors\": [\n    \"a\",\n    \"b\"\n  ]}",
            &["b"],
            "{\"registry-mirrors\": [\n    \"b\"\n  ]}",
        ),
        (
            "{\"registry-mirrors\": [\n    \"a\",\n    \"b\"\n  ]}",
            &["a"],
            "{\"registry-mirrors\": [\n    \"a\"\n  ]}",
        ),
        (
            "{\"registry-mirrors\": [\n    \"a\"\n  ]}",
            &[],
            "{\"registry-mirrors\": []}",
        ),
        (
            r#"{"registry-mirrors": [ "old", "b" ]}"#,
            &["new", "b"],
            r#"{"registry-mirrors": [ "new", "b" ]}"#,
        ),
        (
            r#"{"registry-mirrors": ["b", "a"]}"#,
            &["a", "b"],
            r#"{"registry-mirrors": ["a", "b"]}"#,
        ),
        (
            r#"{"registry-mirrors": ["a", "a", "b"]}"#,
            &["a", "b"],
            r#"{"registry-mirrors": ["a", "b"]}"#,
        ),
    ] {
        assert_eq!(mirrors(before, wanted), after, "{before} -> {wanted:?}");
        assert_eq!(mirrors(after, wanted), after, "{after} is as it should be");
    }
}

#[test]
fn what_dockerd_could_not_read_is_named_with_its_place() {
    for (text, line, column, message) in [
        ("{\n  // why\n  \"a\": 1\n}", 2, 3, "a comment"),
        ("{\"a\": 1,}", 1, 8, "not JSON"),
        ("{\"a\": 1 \"b\": 2}", 1, 8, "expected comma"),
        (
            "{\n \"a\": 1,\n \"a\": 2}",
            3,
            2,
            "the key \"a\" is there twice",
        ),
        ("[]", 1, 1, "not an object"),
        ("{} {}", 1, 4, "not JSON"),
        (
            "{\"registry-mirrors\": \"http://a\"}",
            1,
            22,
            "not a list of texts",
        ),
        ("{\"registry-mirrors\": [\"a\", 1]}", 1, 28, "not a text"),
        ("{\"registry-mirrors\": null}", 1, 22, "not a list of texts"),
        ("{\"experimental\": \"yes\"}", 1, 18, "not true or false"),
        ("\u{feff}{}", 1, 1, "byte order mark"),
        ("{\"a\": 1", 1, 1, "not JSON"),
        ("{'a': 1}", 1, 2, "not JSON"),
        ("{a: 1}", 1, 2, "not JSON"),
        ("{\"a\": 0x1}", 1, 7, "not JSON"),
    ] {
        let error = read(text).expect_err(text);
        assert_eq!(
            (error.line, error.column),
            (line, column),
            "{text}: {error:?}"
        );
        assert!(error.message.contains(message), "{text}: {error:?}");
    }
}

#[test]
fn an_entry_that_comes_first_already_stays_as_it_is_written() {
    let same = |one: &str| one.trim_end_matches('/') == "http://m";
    let stale = |one: &str| one == "http://old";
    let edit = ListEdit {
        first: Some("http://m"),
        same: &same,
        stale: &stale,
    };
    for (before, after) in [
        (&["http://m/"][..], &["http://m/"][..]),
        (&["http://b", "http://m/"], &["http://m", "http://b"]),
        (&["http://old", "http://b"], &["http://m", "http://b"]),
        (
            &["http://m", "http://m/", "http://b"],
            &["http://m", "http://b"],
        ),
        (&[], &["http://m"]),
    ] {
        assert_eq!(edited_list(&list(before), edit), list(after), "{before:?}");
    }
    let gone = ListEdit {
        first: None,
        ..edit
    };
    assert_eq!(
        edited_list(&list(&["http://m/", "http://b"]), gone),
        list(&["http://b"])
    );
}

/// 2,000 files made of random keys, values and spacing: whatever the edit does, every other key
/// and the file's ends keep their bytes, and undoing it by hand gives the file back.
#[test]
fn an_edit_keeps_the_bytes_of_every_other_key() {
    let mut random = fastrand::Rng::with_seed(4);
    let blanks = ["", " ", "\n", "\n  ", "\r\n\t", "\t", "\n\n    "];
    let values = [
        "1",
        "-2.5e3",
        "true",
        "null",
        "\"\\u00e9 \\\"x\\\"\"",
        "[1, 2 ,3]",
        "{ \"n\" :{}}",
        "[]",
    ];
    for round in 0..2_000 {
        let mut blank = || blanks[random.usize(..blanks.len())];
        let (open, close, before, after) = (blank(), blank(), blank(), blank());
        let mut properties = Vec::new();
        for index in 0..random.usize(0..5) {
            let value = values[random.usize(..values.len())];
            let mut blank = || blanks[random.usize(..blanks.len())];
            properties.push(format!("\"key-{index}\"{}:{}{value}", blank(), blank()));
        }
        if random.bool() {
            let mirrors = [
                "[]",
                "[ ]",
                "[\"http://b\"]",
                "[\n\"http://b\" ,\t\"http://c\"\n]",
            ];
            let mirrors = mirrors[random.usize(..mirrors.len())];
            let at = random.usize(..=properties.len());
            properties.insert(at, format!("\"{MIRRORS}\" :{mirrors}"));
        }
        let mut text = format!("{before}{{{open}");
        for (index, property) in properties.iter().enumerate() {
            if index > 0 {
                text.push(',');
                text.push_str(blanks[random.usize(..blanks.len())]);
            }
            text.push_str(property);
        }
        text.push_str(close);
        text.push('}');
        text.push_str(after);

        let was = read(&text).unwrap();
        let mut wanted = was.mirrors.clone().unwrap_or_default();
        wanted.insert(0, "http://a".into());
        let new = set_list(&text, MIRRORS, &wanted).unwrap();
        assert_eq!(
            read(&new).unwrap().mirrors,
            Some(wanted),
            "round {round}: {new:?}"
        );
        for property in properties.iter().filter(|it| !it.contains(MIRRORS)) {
            assert!(
                new.contains(property.as_str()),
                "round {round}: {property} of {new:?}"
            );
        }
        assert!(
            new.starts_with(before) && new.ends_with(&format!("}}{after}")),
            "{new:?}"
        );
        if let Some(mirrors) = was.mirrors.filter(|list| !list.is_empty()) {
            assert_eq!(
                set_list(&new, MIRRORS, &mirrors).unwrap(),
                text,
                "round {round}"
            );
        }
    }
}
