//! `certs.d/<registry>/hosts.toml`, which containerd and docker (from 28) read at every pull.
//!
//! Source: containerd `docs/hosts.md`, `core/remotes/docker/config/hosts.go`. The server comes last,
//! so a mirror that fails costs `dial_timeout` and no pull: without that, up to 30 s for each blob
//! (containerd 10660).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml_edit::DocumentMut;

use super::context::{Context, MARKER, broken_toml};
use super::{Plan, PlanError};

/// The file for a registry.
pub(super) fn file(certificates: &Path, registry: &str) -> PathBuf {
    certificates.join(registry).join("hosts.toml")
}

/// Has the file name the mirror first. A file of somebody's own is left to them: which of its hosts
/// come before which is theirs to say.
pub(super) fn plan(
    context: &Context<'_>,
    certificates: &Path,
    registry: &str,
    engine: &str,
    plan: &mut Plan,
) -> Result<(), PlanError> {
    let path = file(certificates, registry);
    if let Some(text) = context.text(&path)?
        && !text.starts_with(MARKER)
        && !text.trim().is_empty()
    {
        let toml: DocumentMut = text
            .parse()
            .map_err(|error| broken_toml(&path, text, &error))?;
        let hosts = toml.get("host").and_then(|hosts| hosts.as_table_like());
        let mut hosts = hosts.into_iter().flat_map(|hosts| hosts.iter());
        if !hosts
            .next()
            .is_some_and(|(host, _)| context.is_mirror(host))
        {
            plan.refuse(
                path.display().to_string(),
                format!("it is somebody's own, and does not name the mirror first for {registry}"),
                format!(
                    "put this above its other hosts, or remove the file:\n{}",
                    host_table(context)
                ),
            );
        }
        return Ok(());
    }
    let server = match registry {
        "docker.io" => "registry-1.docker.io",
        other => other,
    };
    let table = host_table(context);
    let new = format!("{MARKER}\nserver = \"https://{server}\"\n\n{table}");
    let why = format!("{engine} reads here where to pull images of {registry} from, at each pull");
    plan.files.extend(context.change(&path, &new, why)?);
    Ok(())
}

fn host_table(context: &Context<'_>) -> String {
    let mirror = context.mirror();
    let mut table = format!(
        "[host.\"{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\ndial_timeout = \"1s\"\n"
    );
    if let Some(ca) = &context.settings.ca {
        let ca = toml_edit::Value::from(ca.display().to_string());
        let _ = writeln!(table, "ca = {ca}");
    }
    table
}
