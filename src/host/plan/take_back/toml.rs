//! Out of files in TOML: whatever else is in them stays as it is written.

use std::path::Path;

use toml_edit::{Array, DocumentMut, Item, TableLike, Value};

use super::super::context::MARKER;
use super::super::{containerd, podman};
use super::{Kind, Ours, same_address};

/// What we made, where it is TOML.
pub(super) fn kind(path: &Path, made: &str) -> Option<Kind> {
    if path == Path::new(podman::DROP_IN) {
        return Some(Kind::PodmanDropIn);
    }
    let toml: DocumentMut = made.parse().ok()?;
    match toml.get("registry") {
        Some(Item::ArrayOfTables(_)) => Some(Kind::PodmanDropIn),
        Some(registry) if registry.is_table_like() => Some(Kind::BuildkitToml),
        _ => toml
            .contains_key("plugins")
            .then_some(Kind::ContainerdConfig),
    }
}

fn parse(text: &str) -> Result<DocumentMut, String> {
    let broken = |error: toml_edit::TomlError| format!("not TOML: {}", error.message());
    text.parse().map_err(broken)
}

/// What it was, for asking what was there already; what can't be read has nothing to say.
fn before(ours: &Ours<'_>) -> DocumentMut {
    ours.before().parse().unwrap_or_default()
}

/// A file that is not ours any more does not say that it is.
fn unmarked(text: &str) -> String {
    let rest = text.strip_prefix(MARKER).unwrap_or(text);
    rest.trim_start_matches('\n').to_owned()
}

fn table(item: Option<&Item>) -> Option<&dyn TableLike> {
    item?.as_table_like()
}

fn keys(table: &dyn TableLike) -> Vec<String> {
    table.iter().map(|(key, _)| key.to_owned()).collect()
}

/// `hosts.toml`, without the hosts that are ours. A file of ours that names no others goes.
pub(super) fn hosts(ours: &Ours<'_>, now: &str) -> Result<Option<String>, String> {
    let mut toml = parse(now)?;
    let before = before(ours);
    let known = table(before.get("host")).map(keys).unwrap_or_default();
    let mut taken = false;
    let mut left = false;
    if let Some(hosts) = toml.get_mut("host").and_then(Item::as_table_like_mut) {
        for host in keys(hosts) {
            let theirs = known.iter().any(|their| same_address(their, &host));
            if ours.is_told(&host) && !theirs {
                hosts.remove(&host);
                taken = true;
            }
        }
        left = !hosts.is_empty();
    }
    if !now.starts_with(MARKER) {
        let text = if taken {
            toml.to_string()
        } else {
            now.to_owned()
        };
        return Ok(Some(text));
    }
    let made: DocumentMut = ours.made().parse().unwrap_or_default();
    let server = |toml: &DocumentMut| toml.get("server").and_then(Item::as_str).map(str::to_owned);
    let others = toml
        .iter()
        .any(|(key, _)| !matches!(key, "host" | "server"));
    if !left && !others && server(&toml) == server(&made) {
        return Ok(None);
    }
    Ok(Some(unmarked(&toml.to_string())))
}

/// podman's drop-in, without the mirrors that are ours and the registries that nothing else is said
/// of.
pub(super) fn podman(ours: &Ours<'_>, now: &str) -> Result<Option<String>, String> {
    let mut toml = parse(now)?;
    let is_ours = |table: &dyn TableLike| {
        let location = table.get("location").and_then(Item::as_str);
        location.is_some_and(|location| ours.is_told_bare(location))
    };
    if let Some(registries) = toml
        .get_mut("registry")
        .and_then(Item::as_array_of_tables_mut)
    {
        for registry in registries.iter_mut() {
            let empty = match registry.get_mut("mirror") {
                Some(Item::ArrayOfTables(mirrors)) => {
                    mirrors.retain(|mirror| !is_ours(mirror));
                    mirrors.is_empty()
                }
                Some(Item::Value(Value::Array(mirrors))) => {
                    mirrors.retain(|one| !one.as_inline_table().is_some_and(|one| is_ours(one)));
                    mirrors.is_empty()
                }
                _ => false,
            };
            if empty {
                registry.remove("mirror");
            }
        }
        registries.retain(|registry| {
            let text = |key| registry.get(key).and_then(Item::as_str);
            let plain = registry
                .iter()
                .all(|(key, _)| matches!(key, "prefix" | "location"));
            !(plain && text("prefix") == text("location"))
        });
        if registries.is_empty() {
            toml.remove("registry");
        }
    }
    if toml.is_empty() {
        return Ok(None);
    }
    Ok(Some(unmarked(&toml.to_string())))
}

/// containerd's configuration, without the `config_path` that is ours.
pub(super) fn containerd(ours: &Ours<'_>, now: &str) -> Result<Option<String>, String> {
    let mut toml = parse(now)?;
    let before = before(ours);
    for plugin in containerd::PLUGINS {
        let path = ["plugins", plugin, "registry"];
        let there = descend(before.as_table(), &path);
        if there.is_some_and(|registry| registry.contains_key("config_path")) {
            continue;
        }
        let Some(registry) = descend_mut(toml.as_table_mut(), &path) else {
            continue;
        };
        let Some(said) = registry.get("config_path").and_then(Item::as_str) else {
            continue;
        };
        let folders: Vec<&str> = said.split(':').collect();
        let others: Vec<&str> = folders
            .iter()
            .copied()
            .filter(|folder| *folder != containerd::CERTIFICATES)
            .collect();
        if others.len() == folders.len() {
            continue;
        }
        if others.is_empty() {
            registry.remove("config_path");
            prune(toml.as_table_mut(), before.as_table(), &path);
        } else {
            let others = others.join(":");
            registry.insert("config_path", toml_edit::value(others));
        }
    }
    if ours.before().trim().is_empty() && toml.iter().all(|(key, _)| key == "version") {
        return Ok(None);
    }
    Ok(Some(toml.to_string()))
}

/// buildkitd's configuration, without the mirrors that are ours and what is said of them.
pub(super) fn buildkit(ours: &Ours<'_>, now: &str) -> Result<Option<String>, String> {
    let mut toml = parse(now)?;
    let before = before(ours);
    let made: DocumentMut = ours.made().parse().unwrap_or_default();
    let registries = table(toml.get("registry")).map(keys).unwrap_or_default();
    for registry in registries {
        let path = ["registry", registry.as_str()];
        let known = descend(before.as_table(), &path);
        let (then, now_has) = (
            descend(made.as_table(), &path),
            descend_mut(toml.as_table_mut(), &path),
        );
        let Some(said) = now_has else { continue };
        let theirs = texts(known, "mirrors");
        retain(said, known, "mirrors", &|one| {
            !ours.is_told_bare(one) || theirs.iter().any(|their| their == one)
        });
        if ours.is_told_bare(&registry) {
            let http = said.get("http").and_then(Item::as_bool) == Some(true);
            if http && !known.is_some_and(|known| known.contains_key("http")) {
                said.remove("http");
            }
            let (theirs, made) = (texts(known, "ca"), texts(then, "ca"));
            retain(said, known, "ca", &|one| {
                let one = one.to_owned();
                !made.contains(&one) || theirs.contains(&one)
            });
        }
        prune(toml.as_table_mut(), before.as_table(), &path);
    }
    if ours.before().trim().is_empty() && toml.is_empty() {
        return Ok(None);
    }
    Ok(Some(toml.to_string()))
}

fn texts(table: Option<&dyn TableLike>, key: &str) -> Vec<String> {
    let list = table.and_then(|table| table.get(key)?.as_array());
    let list = list.into_iter().flatten();
    list.filter_map(|one| one.as_str().map(str::to_owned))
        .collect()
}

/// Keeps these of a list; one that gets empty goes with its key, unless the key was there before.
fn retain(
    table: &mut dyn TableLike,
    before: Option<&dyn TableLike>,
    key: &str,
    keep: &dyn Fn(&str) -> bool,
) {
    let Some(list) = table.get_mut(key).and_then(Item::as_array_mut) else {
        return;
    };
    let length = list.len();
    list.retain(|one: &Value| one.as_str().is_none_or(keep));
    let emptied = list.len() < length && Array::is_empty(list);
    if emptied && !before.is_some_and(|before| before.contains_key(key)) {
        table.remove(key);
    }
}

fn descend<'a>(root: &'a dyn TableLike, path: &[&str]) -> Option<&'a dyn TableLike> {
    let mut table = root;
    for key in path {
        table = table.get(key)?.as_table_like()?;
    }
    Some(table)
}

fn descend_mut<'a>(root: &'a mut dyn TableLike, path: &[&str]) -> Option<&'a mut dyn TableLike> {
    let mut table = root;
    for key in path {
        table = table.get_mut(key)?.as_table_like_mut()?;
    }
    Some(table)
}

/// Removes the tables on this path, the innermost first, that are empty and were not there before.
fn prune(root: &mut dyn TableLike, before: &dyn TableLike, path: &[&str]) {
    for depth in (1..=path.len()).rev() {
        let path = &path[..depth];
        let empty = descend(root, path).is_some_and(TableLike::is_empty);
        if !empty || descend(before, path).is_some() {
            return;
        }
        let Some((last, above)) = path.split_last() else {
            return;
        };
        if let Some(above) = descend_mut(root, above) {
            above.remove(last);
        }
    }
}
