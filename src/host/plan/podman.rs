//! podman, buildah, skopeo and CRI-O: one drop-in of our own.
//!
//! Source: containers-registries.conf(5). A `[[registry]]` of a file that comes later replaces one
//! with the same prefix whole, so a prefix that somebody else has said something of is left to them.
//! Nothing is withdrawn here: the mirrors are tried in order, and the registry itself last.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, TableLike};

use super::context::{Context, MARKER, broken_toml};
use super::{Plan, PlanError, Proof, Verb, Wanted};

pub(super) const DROP_IN: &str = "/etc/containers/registries.conf.d/50-registry-agent.conf";
const CERTIFICATES: &str = "/etc/containers/certs.d";

/// The files that podman's part looks at.
pub(super) fn paths(context: &Context<'_>, paths: &mut BTreeSet<PathBuf>) {
    let Some(podman) = &context.facts.engines.podman else {
        return;
    };
    paths.insert(DROP_IN.into());
    paths.extend(podman.configuration.iter().cloned());
    if context.settings.ca.is_some() {
        paths.insert(certificate(context));
    }
}

fn certificate(context: &Context<'_>) -> PathBuf {
    Path::new(CERTIFICATES)
        .join(context.authority())
        .join("ca.crt")
}

pub(super) fn plan(context: &Context<'_>) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let Some(podman) = &context.facts.engines.podman else {
        return Ok(plan);
    };
    if context.wanted == Wanted::Withdrawn {
        return Ok(plan);
    }
    let mut others: Vec<(String, &Path)> = Vec::new();
    for path in podman
        .configuration
        .iter()
        .filter(|path| *path != Path::new(DROP_IN))
    {
        let Some(text) = context.text(path)? else {
            continue;
        };
        let toml: DocumentMut = text
            .parse()
            .map_err(|error| broken_toml(path, text, &error))?;
        if toml.get("registries").is_some_and(Item::is_table_like) {
            plan.refuse(
                path.display().to_string(),
                "it is in the first form of registries.conf, which knows no mirrors and can't be \
                 mixed with drop-ins"
                    .into(),
                "write it in the second form: containers-registries.conf(5)".into(),
            );
            return Ok(plan);
        }
        others.extend(
            prefixes(&toml)
                .into_iter()
                .map(|prefix| (prefix, path.as_path())),
        );
    }
    let mut new = MARKER.to_owned();
    new.push('\n');
    for registry in &context.settings.mirrored {
        let registry = registry.as_str();
        if let Some((_, path)) = others.iter().find(|(prefix, _)| prefix == registry) {
            plan.refuse(
                path.display().to_string(),
                format!(
                    "it has a [[registry]] for {registry} of its own, of which a drop-in would \
                     replace all"
                ),
                format!(
                    "remove it there, or put this under it:\n{}",
                    mirror(context, registry)
                ),
            );
            continue;
        }
        let _ = write!(
            new,
            "\n[[registry]]\nprefix = \"{registry}\"\nlocation = \"{registry}\"\n\n{}",
            mirror(context, registry)
        );
    }
    let nothing = !new.contains("[[registry]]");
    if nothing && context.text(Path::new(DROP_IN))?.is_none() {
        return Ok(plan);
    }
    let why = "podman, buildah, skopeo and CRI-O read here which registries have mirrors";
    let change = context.change(Path::new(DROP_IN), &new, why)?;
    if let Some((from, text)) = context.ca()? {
        let why = format!(
            "the mirror's certificate comes from the authority in {}",
            from.display()
        );
        plan.files
            .extend(context.change(&certificate(context), text, why)?);
    }
    let crio = podman
        .crio
        .as_ref()
        .filter(|unit| unit.active_state == "active");
    if let Some(unit) = crio.filter(|_| change.is_some()) {
        if unit.can_reload {
            plan.act(
                &unit.name,
                Verb::Reload,
                "CRI-O reads its registries again; containers go on",
            );
            plan.proofs.push(Proof::Active {
                unit: unit.name.clone(),
            });
        } else {
            plan.note(format!(
                "{} can't be reloaded: it uses the mirror from its next start",
                unit.name
            ));
        }
    }
    plan.files.extend(change);
    Ok(plan)
}

/// Images of Docker Hub are asked for by their names alone, others below their registry's name:
/// these clients send no `ns=`.
fn mirror(context: &Context<'_>, registry: &str) -> String {
    let mut location = context.authority().to_owned();
    if registry != "docker.io" {
        location = format!("{location}/{registry}");
    }
    let insecure = if context.plain_http() {
        "insecure = true\n"
    } else {
        ""
    };
    format!("[[registry.mirror]]\nlocation = \"{location}\"\n{insecure}")
}

/// What each `[[registry]]` is about: its prefix, or else its location.
fn prefixes(toml: &DocumentMut) -> Vec<String> {
    let tables = toml.get("registry").and_then(Item::as_array_of_tables);
    let text = |table: &dyn TableLike, key: &str| {
        table
            .get(key)
            .and_then(Item::as_str)
            .filter(|it| !it.is_empty())
            .map(str::to_owned)
    };
    let tables = tables.into_iter().flatten();
    tables
        .filter_map(|table| text(table, "prefix").or_else(|| text(table, "location")))
        .collect()
}
