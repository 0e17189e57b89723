//! The host-local name of this host's own registry, in `/etc/hosts` (hosts(5)).

use std::path::Path;

use super::context::Context;
use super::{Plan, PlanError};

pub(super) const FILE: &str = "/etc/hosts";
/// What ends the one line that is ours.
const OURS: &str = "# registry-agent";

/// Keeps one line for the name, in place, and leaves every other alone. The mirror being withdrawn
/// makes no difference: the name is this host's own.
pub(super) fn plan(context: &Context<'_>) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let name = context.settings.local_name.as_deref();
    if name.is_none() && !context.facts.files.contains_key(Path::new(FILE)) {
        return Ok(plan);
    }
    let text = context.text(Path::new(FILE))?.unwrap_or_default();
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let mut line = name.map(|name| format!("127.0.0.1 {name} {OURS}{newline}"));
    if let Some(name) = name {
        match address_of(text, name) {
            Some("127.0.0.1") => line = None,
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
        if is_ours(old) {
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

/// Whether the line is ours.
pub(super) fn is_ours(line: &str) -> bool {
    line.trim_end().ends_with(OURS)
}

/// The names that our lines give this host.
pub(super) fn our_names(text: &str) -> impl Iterator<Item = String> {
    let lines = text.lines().filter(|line| is_ours(line));
    let said = lines.filter_map(|line| line.split('#').next());
    said.flat_map(|said| said.split_ascii_whitespace().skip(1))
        .map(str::to_owned)
}

/// The first address that a line of somebody's own gives the name.
fn address_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().filter(|line| !is_ours(line)).find_map(|line| {
        let said = line.split('#').next()?;
        let mut words = said.split_ascii_whitespace();
        let address = words.next()?;
        words
            .any(|word| word.eq_ignore_ascii_case(name))
            .then_some(address)
    })
}
