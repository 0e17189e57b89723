//! The host-local name of this host's own registry, in `/etc/hosts` (hosts(5)).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::context::Context;
use super::{Plan, PlanError};
use crate::host::facts::FileFacts;
use crate::host::journal::Original;

pub(super) const FILE: &str = "/etc/hosts";
/// What ends the one line that is ours.
const OURS: &str = "# registry-agent";
/// What the name means.
const ADDRESS: &str = "127.0.0.1";

/// Keeps one line for the name, in place, and leaves every other alone. The mirror being withdrawn
/// makes no difference: the name is this host's own.
pub(super) fn plan(context: &Context<'_>) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let name = context.settings.local_name.as_deref();
    let known = known_names(context);
    if known.is_empty() {
        return Ok(plan);
    }
    // The engines can be wired without it.
    if let FileFacts::Unreadable(why) = context.file(Path::new(FILE))? {
        plan.refuse(
            FILE,
            format!(
                "it can't be read: {why}. What it says of {} stays",
                known.join(" and ")
            ),
            match name {
                Some(name) => format!("put it right, or add `{ADDRESS} {name}` yourself"),
                None => format!(
                    "put it right, or take {} out of it yourself",
                    known.join(" and ")
                ),
            },
        );
        return Ok(plan);
    }
    let text = context.text(Path::new(FILE))?.unwrap_or_default();
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let mut line = name.map(|name| format!("{ADDRESS} {name} {OURS}{newline}"));
    if let Some(name) = name {
        match address_of(text, name, &known) {
            Some(ADDRESS) => line = None,
            Some(other) => {
                plan.refuse(
                    FILE,
                    format!("{name} is {other} there, by a line that is not registry-agent's"),
                    format!("remove that line, or leave `fleet.dns.hosts.name` ({name}) out"),
                );
                return Ok(plan);
            }
            None => {}
        }
    }
    let mut new = String::new();
    for old in text.split_inclusive('\n') {
        if is_ours(old, &known) {
            new.push_str(&line.take().unwrap_or_default());
        } else {
            new.push_str(old);
        }
    }
    if let Some(line) = line {
        if !new.is_empty() && !new.ends_with('\n') {
            new.push_str(newline);
        }
        new.push_str(&line);
    }
    let why = match name {
        Some(name) => format!("{name} is this host's own registry"),
        None => "the host's own registry has no name any more".into(),
    };
    plan.files
        .extend(context.change(Path::new(FILE), &new, why)?);
    Ok(plan)
}

/// The files that this part looks at: none where the name is nobody's concern.
pub(super) fn paths(context: &Context<'_>, paths: &mut BTreeSet<PathBuf>) {
    if !known_names(context).is_empty() {
        paths.insert(FILE.into());
    }
}

/// The names that our line may have: the one that it is to have, and those that it had.
fn known_names(context: &Context<'_>) -> Vec<String> {
    let originals = context.facts.originals.files.values();
    let mut known: Vec<String> = originals.flat_map(our_names).collect();
    known.extend(context.settings.local_name.clone());
    known.sort();
    known.dedup();
    known
}

/// Whether the line is ours: by its form, and by a name that we have given. A remark alone makes
/// nobody's line ours.
pub(super) fn is_ours(line: &str, known: &[String]) -> bool {
    name_of(line).is_some_and(|name| known.iter().any(|one| one == name))
}

/// The names that we gave this host in a file that was changed.
pub(super) fn our_names(original: &Original) -> impl Iterator<Item = String> {
    let lines = |facts: &FileFacts| -> Vec<String> {
        let FileFacts::Text { content, .. } = facts else {
            return Vec::new();
        };
        content
            .lines()
            .filter_map(name_of)
            .map(str::to_owned)
            .collect()
    };
    let theirs = lines(&original.before);
    let made = lines(&original.made).into_iter();
    made.filter(move |name| !theirs.contains(name))
}

/// The name on a line of the form that ours have.
fn name_of(line: &str) -> Option<&str> {
    let said = line.trim_end().strip_suffix(OURS)?;
    let mut words = said.split_ascii_whitespace();
    let name = (words.next() == Some(ADDRESS)).then(|| words.next())??;
    words.next().is_none().then_some(name)
}

/// The first address that a line of somebody's own gives the name.
fn address_of<'a>(text: &'a str, name: &str, known: &[String]) -> Option<&'a str> {
    let mut theirs = text.lines().filter(|line| !is_ours(line, known));
    theirs.find_map(|line| {
        let said = line.split('#').next()?;
        let mut words = said.split_ascii_whitespace();
        let address = words.next()?;
        words
            .any(|word| word.eq_ignore_ascii_case(name))
            .then_some(address)
    })
}
