//! buildkitd: `buildkitd.toml`, edited in place.
//!
//! Source: BuildKit `docs/buildkitd.toml.md`. buildkitd reads it only when it starts, and a start
//! ends the builds that run: it is left alone unless `host.docker.restart` allows restarts, which
//! stands for every engine. Nothing is withdrawn here: buildkitd goes on to the registry itself.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use toml_edit::{Array, DocumentMut, Item, Table, TableLike, Value, value};

use super::context::{Context, broken_toml, config_file};
use super::{Plan, PlanError, Proof, Verb, Wanted};
use crate::host::facts::BuildkitFacts;

/// The file that buildkitd's part looks at.
pub(super) fn paths(context: &Context<'_>, paths: &mut BTreeSet<PathBuf>) {
    paths.extend(context.facts.engines.buildkit.as_ref().map(file));
}

fn file(buildkit: &BuildkitFacts) -> PathBuf {
    let (running, unit) = (buildkit.command_line.as_ref(), Some(&buildkit.unit));
    config_file(running, unit, &["--config"], "/etc/buildkit/buildkitd.toml")
}

pub(super) fn plan(context: &Context<'_>) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let Some(buildkit) = &context.facts.engines.buildkit else {
        return Ok(plan);
    };
    if context.wanted == Wanted::Withdrawn {
        return Ok(plan);
    }
    context.ca()?;
    let path = file(buildkit);
    let text = context.text(&path)?.unwrap_or_default();
    let mut toml: DocumentMut = text
        .parse()
        .map_err(|error| broken_toml(&path, text, &error))?;
    edit(context, &mut toml).map_err(|key| wrong_type(&path, key))?;
    let why = "buildkitd reads here which registries have mirrors";
    let Some(change) = context.change(&path, &toml.to_string(), why)? else {
        return Ok(plan);
    };
    let unit = &buildkit.unit;
    let runs = unit.active_state == "active";
    if runs && !context.may_restart() {
        plan.refuse(
            &unit.name,
            "buildkitd reads its configuration only when it starts, which ends the builds that \
             run, and `host.docker.restart: never` forbids it for every engine"
                .into(),
            "say `host.docker.restart: if-needed`".into(),
        );
        return Ok(plan);
    }
    plan.files.push(change);
    if runs {
        plan.act(
            &unit.name,
            Verb::Restart,
            "buildkitd reads its configuration only when it starts",
        );
        plan.proofs.push(Proof::Active {
            unit: unit.name.clone(),
        });
    }
    Ok(plan)
}

fn wrong_type(path: &Path, key: &'static str) -> PlanError {
    PlanError {
        subject: path.display().to_string(),
        message: format!("`{key}` is not what buildkitd takes: correct it, nothing is changed"),
    }
}

fn edit(context: &Context<'_>, toml: &mut DocumentMut) -> Result<(), &'static str> {
    let registries = child(toml.as_table_mut(), "registry").ok_or("registry")?;
    for registry in &context.settings.mirrored {
        let table = child(registries, registry.as_str()).ok_or("registry.<name>")?;
        let mirrors = table
            .entry("mirrors")
            .or_insert_with(|| value(Array::new()));
        mirrors_first(context, mirrors.as_array_mut().ok_or("mirrors")?);
    }
    if !context.plain_http() && context.settings.ca.is_none() {
        return Ok(());
    }
    let mirror = child(registries, context.authority()).ok_or("registry.<mirror>")?;
    if context.plain_http() && mirror.get("http").and_then(Item::as_bool) != Some(true) {
        mirror.insert("http", value(true));
    }
    if let Some(ca) = &context.settings.ca {
        let ca = ca.display().to_string();
        let list = mirror.entry("ca").or_insert_with(|| value(Array::new()));
        let list = list.as_array_mut().ok_or("ca")?;
        if !list.iter().any(|one| one.as_str() == Some(ca.as_str())) {
            list.push(ca);
        }
    }
    Ok(())
}

fn child<'a>(table: &'a mut dyn TableLike, key: &str) -> Option<&'a mut dyn TableLike> {
    let item = table.entry(key).or_insert_with(|| {
        let mut table = Table::new();
        table.set_implicit(true);
        Item::Table(table)
    });
    item.as_table_like_mut()
}

/// Ours comes first, and none that was ours before stays. Mirrors have no scheme here.
fn mirrors_first(context: &Context<'_>, list: &mut Array) {
    let scheme = context.settings.mirror.scheme();
    let address = |one: &Value| one.as_str().map(|one| format!("{scheme}://{one}"));
    let previous = |one: &Value| {
        let mut previous = context.facts.previous.iter();
        let said = one.as_str().map(|one| one.trim_end_matches('/').to_owned());
        previous.any(|it| {
            it.split_once("://").map(|(_, it)| it.trim_end_matches('/')) == said.as_deref()
        })
    };
    let ours = |one: &Value| address(one).is_some_and(|one| context.is_mirror(&one));
    let first = list.get(0).is_some_and(ours);
    let stale = list
        .iter()
        .enumerate()
        .any(|(at, one)| (at > 0 && ours(one)) || (previous(one) && !ours(one)));
    if first && !stale {
        return;
    }
    list.retain(|one| !ours(one) && !previous(one));
    list.insert(0, context.authority());
}
