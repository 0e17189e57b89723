//! A docker daemon keeps the mirrors that it has when the key vanishes from its file
//! (`reloadRegistryConfig` in moby's `daemon/reload.go`; moby 36632). So that a file without the key
//! can come back, the daemon is first given a file with what it is to have, and then the file.

use std::path::{Path, PathBuf};

use crate::host::facts::FileFacts;
use crate::host::write;

const KEY: &str = "registry-mirrors";

/// A file, what it was and what it becomes.
pub(super) type Move<'a> = (&'a Path, &'a FileFacts, &'a FileFacts);

/// The files that lose the key, and those that stay without it, each with it once more.
pub(super) fn bridges(moves: &[Move<'_>], mirrors: &[String]) -> Vec<(PathBuf, FileFacts)> {
    let bridges = moves.iter().filter_map(|(path, from, to)| {
        let bridge = bridge(from, to, mirrors)?;
        Some(((*path).to_owned(), bridge))
    });
    bridges.collect()
}

fn bridge(from: &FileFacts, to: &FileFacts, mirrors: &[String]) -> Option<FileFacts> {
    let new;
    // A file that does not change is here for what its daemon remembers of it.
    if !write::same(from, to) {
        let FileFacts::Text { content, .. } = from else {
            return None;
        };
        object(content)?.get(KEY)?;
    }
    let (content, kept) = match to {
        FileFacts::Absent if *from == FileFacts::Absent => {
            new = of_root();
            ("", &new)
        }
        FileFacts::Absent => ("", from),
        FileFacts::Text { content, .. } => (content.as_str(), to),
        FileFacts::Unreadable(_) => return None,
    };
    let mut object = object(content)?;
    if object.contains_key(KEY) {
        return None;
    }
    object.insert(KEY.to_owned(), mirrors.into());
    let mut bridge = kept.clone();
    if let FileFacts::Text { content, .. } = &mut bridge {
        // It is there for a moment: how it looks is the concern of nobody.
        *content = serde_json::Value::Object(object).to_string();
    }
    Some(bridge)
}

/// What nobody has given an owner or rights.
fn of_root() -> FileFacts {
    FileFacts::Text {
        content: String::new(),
        mode: 0o644,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        selinux: None,
        link_to: None,
    }
}

fn object(content: &str) -> Option<serde_json::Map<String, serde_json::Value>> {
    // docker takes an empty file for one without keys.
    if content.trim().is_empty() {
        return Some(serde_json::Map::new());
    }
    serde_json::from_str(content).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(content: &str) -> FileFacts {
        FileFacts::Text {
            content: content.to_owned(),
            mode: 0o640,
            uid: 0,
            gid: 7,
            selinux: None,
            link_to: None,
        }
    }

    #[test]
    fn only_a_file_that_loses_the_key_needs_a_bridge() {
        let wired = text(r#"{"registry-mirrors": ["http://127.0.0.1:5000"]}"#);
        let plain = text(r#"{"debug": true}"#);
        for (from, to, expected) in [
            (
                &wired,
                &plain,
                Some(r#"{"debug":true,"registry-mirrors":["http://old"]}"#),
            ),
            (
                &wired,
                &FileFacts::Absent,
                Some(r#"{"registry-mirrors":["http://old"]}"#),
            ),
            (
                &wired,
                &text(" \n"),
                Some(r#"{"registry-mirrors":["http://old"]}"#),
            ),
            (&plain, &wired, None),
            (&wired, &wired, None),
            (&FileFacts::Absent, &wired, None),
            // Somebody has taken the key out, or the file away, and told nobody.
            (
                &plain,
                &plain,
                Some(r#"{"debug":true,"registry-mirrors":["http://old"]}"#),
            ),
            (&text("[registries]"), &text("[registries]"), None),
            // Files of others, which are no JSON.
            (&text("[registries]"), &FileFacts::Absent, None),
        ] {
            let bridge = bridge(from, to, &["http://old".to_owned()]);
            let content = bridge.map(|bridge| match bridge {
                FileFacts::Text {
                    content, mode, gid, ..
                } => {
                    assert_eq!((mode, gid), (0o640, 7));
                    let value: serde_json::Value = serde_json::from_str(&content).unwrap();
                    value.to_string()
                }
                other => panic!("{other:?}"),
            });
            assert_eq!(content.as_deref(), expected, "{to:?}");
        }
        let none = FileFacts::Absent;
        let Some(FileFacts::Text { content, mode, .. }) = bridge(&none, &none, &[]) else {
            panic!("a file that is not there has a bridge as well");
        };
        assert_eq!(
            (content.as_str(), mode),
            (r#"{"registry-mirrors":[]}"#, 0o644)
        );
    }
}
