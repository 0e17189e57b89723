//! containerd: `certs.d`, and the `config_path` by which its CRI plugin finds it.
//!
//! Nothing is withdrawn here: containerd goes on to the registry itself by its own rules.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, TableLike, value};

use super::context::{Context, broken_toml, config_file, version};
use super::{Plan, PlanError, Proof, Verb, Wanted, hosts_toml};
use crate::config::Manage;
use crate::host::facts::ContainerdFacts;

pub(super) const CERTIFICATES: &str = "/etc/containerd/certs.d";
/// Its CRI plugin, as each version of the configuration names it.
pub(super) const PLUGINS: [&str; 3] = [
    "cri",
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
];

/// The files that containerd's part looks at.
pub(super) fn paths(context: &Context<'_>, paths: &mut BTreeSet<PathBuf>) {
    let Some(containerd) = &context.facts.engines.containerd else {
        return;
    };
    let config = file(containerd);
    let text = context.known_text(&config).unwrap_or_default();
    let folder = text.parse::<DocumentMut>().ok().and_then(|toml| {
        let registry = plugin(&toml, containerd).registry(&toml)?;
        certificates(registry.get("config_path")?.as_str()?)
    });
    let folder = folder.unwrap_or_else(|| CERTIFICATES.into());
    for registry in &context.settings.mirrored {
        paths.insert(hosts_toml::file(&folder, registry.as_str()));
    }
    paths.insert(config);
}

fn file(containerd: &ContainerdFacts) -> PathBuf {
    let (running, unit) = (containerd.command_line.as_ref(), containerd.unit.as_ref());
    config_file(
        running,
        unit,
        &["--config", "-c"],
        "/etc/containerd/config.toml",
    )
}

/// The first folder of a `config_path`, which may name several.
fn certificates(config_path: &str) -> Option<PathBuf> {
    let first = config_path.split(':').find(|one| !one.is_empty())?;
    Some(first.into())
}

/// Where a configuration of some version holds the CRI plugin's registries.
struct Plugin(&'static str);

impl Plugin {
    fn registry<'a>(&self, toml: &'a DocumentMut) -> Option<&'a dyn TableLike> {
        let plugins = toml.get("plugins")?.as_table_like()?;
        plugins
            .get(self.0)?
            .as_table_like()?
            .get("registry")?
            .as_table_like()
    }
}

/// A file that says no version is one of version 1 (containerd `docs/PLUGINS.md`).
fn plugin(toml: &DocumentMut, containerd: &ContainerdFacts) -> Plugin {
    let said = toml.get("version").and_then(Item::as_integer);
    Plugin(match said.unwrap_or(1) {
        _ if toml.is_empty() => new_plugin(containerd).1,
        1 => "cri",
        2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.images",
    })
}

/// The version that a new file is written in, and its plugin.
fn new_plugin(containerd: &ContainerdFacts) -> (i64, &'static str) {
    match version(containerd.version.as_deref()) {
        Some((2.., _)) => (3, "io.containerd.cri.v1.images"),
        _ => (2, "io.containerd.grpc.v1.cri"),
    }
}

pub(super) fn plan(context: &Context<'_>) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    let Some(containerd) = &context.facts.engines.containerd else {
        return Ok(plan);
    };
    if context.wanted == Wanted::Withdrawn {
        return Ok(plan);
    }
    let path = file(containerd);
    let text = context.text(&path)?;
    let beside_docker = !context.facts.engines.docker.is_empty();
    let by_itself = context.settings.containerd != Manage::Always;
    if text.is_none() && beside_docker && by_itself {
        plan.note(
            "containerd has no configuration of its own beside docker, which does not read its \
             certs.d: it is left alone. `host.containerd.manage: true` wires it",
        );
        return Ok(plan);
    }
    let text = text.unwrap_or_default();
    let toml: DocumentMut = text
        .parse()
        .map_err(|error| broken_toml(&path, text, &error))?;
    if without_cri(&toml) {
        if beside_docker && by_itself {
            return Ok(plan);
        }
        plan.note(
            "containerd runs without its CRI plugin: only tools that are told of certs.d use it",
        );
        certs_d(context, Path::new(CERTIFICATES), &mut plan)?;
        return Ok(plan);
    }
    let plugin = plugin(&toml, containerd);
    let registry = plugin.registry(&toml);
    let said = registry
        .and_then(|it| it.get("config_path"))
        .and_then(Item::as_str);
    if let Some(folder) = said.and_then(certificates) {
        certs_d(context, &folder, &mut plan)?;
        return Ok(plan);
    }
    let imports = toml.get("imports").and_then(Item::as_array);
    if imports.is_some_and(|imports| !imports.is_empty()) {
        plan.refuse(
            path.display().to_string(),
            "it sets no `config_path` and imports other files, which are not looked at: one of \
             them may have registries in the old way, and both together stop its CRI plugin"
                .into(),
            format!(
                "where none does, set `config_path = \"{CERTIFICATES}\"` under \
                 [plugins.\"{}\".registry] and restart containerd",
                plugin.0
            ),
        );
        return Ok(plan);
    }
    if let Some(old) = registry.and_then(old_style) {
        plan.refuse(
            path.display().to_string(),
            format!(
                "it has `{old}` in the old way, with which containerd allows no `config_path`: \
                 both together stop its CRI plugin"
            ),
            format!(
                "move what it says to {CERTIFICATES}/<registry>/hosts.toml, remove it and restart \
                 containerd"
            ),
        );
        return Ok(plan);
    }
    let name = "containerd.service";
    let unit = containerd.unit.as_ref();
    let name = unit.map_or(name, |unit| unit.name.as_str());
    let runs = unit.is_some_and(|unit| unit.active_state == "active");
    if runs && !context.may_restart() && beside_docker && by_itself {
        // Debian's docker.io brings it so: whoever does not use it by itself asks for nothing here.
        plan.note(format!(
            "containerd runs beside docker, and {} sets no `config_path`: it is left alone, since it \
             would have to be restarted. `host.containerd.manage: true` and `host.docker.restart: \
             if-needed` wire it",
            path.display()
        ));
        return Ok(plan);
    }
    if runs && !context.may_restart() {
        plan.refuse(
            name,
            format!(
                "{} sets no `config_path`, so containerd does not look into {CERTIFICATES}; it \
                 would have to be restarted for it, which `host.docker.restart: never` forbids for \
                 every engine",
                path.display()
            ),
            format!(
                "say `host.docker.restart: if-needed` (containers go on while containerd \
                 restarts); or set `config_path = \"{CERTIFICATES}\"` under [plugins.\"{}\".registry] \
                 and restart it yourself",
                plugin.0
            ),
        );
        return Ok(plan);
    }
    certs_d(context, Path::new(CERTIFICATES), &mut plan)?;
    let new = with_config_path(toml, containerd, &plugin);
    let why = format!("containerd looks into {CERTIFICATES} only where its configuration names it");
    plan.files.extend(context.change(&path, &new, why)?);
    if runs {
        plan.act(
            name,
            Verb::Restart,
            "containerd reads `config_path` only when it starts; containers go on",
        );
        plan.proofs.push(Proof::Active {
            unit: name.to_owned(),
        });
    }
    Ok(plan)
}

fn certs_d(context: &Context<'_>, folder: &Path, plan: &mut Plan) -> Result<(), PlanError> {
    context.ca()?;
    for registry in &context.settings.mirrored {
        hosts_toml::plan(context, folder, registry.as_str(), "containerd", plan)?;
    }
    Ok(())
}

/// docker's own package turns the plugin off.
fn without_cri(toml: &DocumentMut) -> bool {
    let disabled = toml.get("disabled_plugins").and_then(Item::as_array);
    disabled
        .into_iter()
        .flatten()
        .filter_map(|one| one.as_str())
        .any(|one| {
            matches!(
                one,
                "cri" | "io.containerd.grpc.v1.cri" | "io.containerd.cri.v1.images"
            )
        })
}

/// What is said in the way that `config_path` has replaced.
fn old_style(registry: &dyn TableLike) -> Option<&'static str> {
    let table = |key: &str| registry.get(key).and_then(Item::as_table_like);
    if table("mirrors").is_some_and(|mirrors| !mirrors.is_empty()) {
        return Some("registry.mirrors");
    }
    let configs = table("configs")?;
    let tls = configs.iter().any(|(_, one)| one.get("tls").is_some());
    tls.then_some("registry.configs.*.tls")
}

fn with_config_path(
    mut toml: DocumentMut,
    containerd: &ContainerdFacts,
    plugin: &Plugin,
) -> String {
    if toml.is_empty() {
        toml["version"] = value(new_plugin(containerd).0);
    }
    let mut table = toml.as_table_mut() as &mut dyn TableLike;
    for key in ["plugins", plugin.0, "registry"] {
        let item = table.entry(key).or_insert_with(|| {
            let mut table = toml_edit::Table::new();
            table.set_implicit(key != "registry");
            Item::Table(table)
        });
        match item.as_table_like_mut() {
            Some(next) => table = next,
            // A plugin that is not a table is none that containerd would start with.
            None => return toml.to_string(),
        }
    }
    table.insert("config_path", value(CERTIFICATES));
    toml.to_string()
}
