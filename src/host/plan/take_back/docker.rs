//! Out of docker's files.

use super::super::daemon_json::{
    self, Broken, EXPERIMENTAL, INSECURE, ListEdit, MIRRORS, edited_list,
};
use super::super::{dockerd, words};
use super::{Ours, same_address};

const MIRROR_FLAG: &str = "--registry-mirror";

/// The list stays where it gets empty: docker keeps the mirrors that it has where the key is gone
/// (moby 36632). For the same reason it is put back, empty, where somebody has taken the key out of
/// the file and the daemon still has the mirror.
pub(super) fn daemon_json(
    ours: &Ours<'_>,
    now: &str,
    told: &[&str],
) -> Result<Option<String>, String> {
    let said = |broken: Broken| format!("line {}: {}", broken.line, broken.message);
    let json = daemon_json::read(now).map_err(said)?;
    let before = daemon_json::read(ours.before()).unwrap_or_default();
    let made = daemon_json::read(ours.made()).unwrap_or_default();
    let mut text = now.to_owned();
    let theirs = before.mirrors.unwrap_or_default();
    let stale =
        |one: &str| ours.is_told(one) && !theirs.iter().any(|their| same_address(their, one));
    let list = json.mirrors.clone().unwrap_or_default();
    let mirrors = without(&list, &stale);
    let remembered = json.mirrors.is_none() && told.iter().any(|one| ours.is_told(one));
    if mirrors != list || remembered {
        text = daemon_json::set_list(&text, MIRRORS, &mirrors).map_err(said)?;
    }
    let theirs = before.insecure.unwrap_or_default();
    let added = made.insecure.unwrap_or_default();
    let own_name = |one: &str| {
        let host = one.rsplit_once(':').map_or(one, |(host, _)| host);
        ours.names.iter().any(|name| name == host)
    };
    let stale = |one: &str| {
        let added = !ours.original.edited && added.iter().any(|it| it == one);
        (added || own_name(one)) && !theirs.iter().any(|their| their == one)
    };
    let list = json.insecure.unwrap_or_default();
    let insecure = without(&list, &stale);
    if insecure != list {
        text = daemon_json::set_list(&text, INSECURE, &insecure).map_err(said)?;
    }
    let switched = !ours.original.edited && made.experimental != before.experimental;
    if switched && json.experimental == made.experimental {
        let value = before.experimental.unwrap_or_default().to_string();
        text = daemon_json::set(&text, EXPERIMENTAL, &value).map_err(said)?;
    }
    Ok(Some(text))
}

fn without(list: &[String], stale: &dyn Fn(&str) -> bool) -> Vec<String> {
    let edit = ListEdit {
        first: None,
        same: &|_| false,
        stale,
    };
    edited_list(list, edit)
}

/// An environment file without the flags that are ours.
pub(super) fn without_flags(ours: &Ours<'_>, now: &str) -> Result<Option<String>, String> {
    let mut text = now.to_owned();
    for name in words::names(now) {
        let list = values(&text, &name);
        let theirs = values(ours.before(), &name);
        let stale =
            |one: &str| ours.is_told(one) && !theirs.iter().any(|their| same_address(their, one));
        let wanted = without(&list, &stale);
        if wanted != list {
            text = dockerd::set_flags(&text, &name, MIRROR_FLAG, &wanted)
                .ok_or_else(|| format!("how {name} is quoted is not understood"))?;
        }
    }
    Ok(Some(text))
}

/// Every mirror that an environment file gives docker by a flag.
pub(super) fn flags(text: &str) -> Vec<String> {
    let names = words::names(text).into_iter();
    names.flat_map(|name| values(text, &name)).collect()
}

fn values(text: &str, variable: &str) -> Vec<String> {
    let words = words::variable(text, variable).unwrap_or_default();
    let words: Vec<String> = words.into_iter().map(|word| word.text).collect();
    dockerd::values(&words, MIRROR_FLAG)
}
