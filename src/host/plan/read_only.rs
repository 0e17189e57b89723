//! What can't be written is refused before anything is touched, one engine at a time.
//!
//! `/etc` is not looked at: the service may write there, so where it can't, the whole host is read
//! only, which is apply's to say.

use std::path::Path;

use super::Plan;
use super::context::Context;

/// The part as it is; or, where it would change a file that whoever read the facts can't write,
/// nothing but the refusal to.
pub(super) fn refused(context: &Context<'_>, engine: &str, part: Plan) -> Plan {
    let outside = part.files.iter().filter(|change| {
        let folder = context.facts.read_only.get(&change.path);
        folder.is_some_and(|folder| !folder.starts_with("/etc"))
    });
    let paths: Vec<&Path> = outside.map(|change| change.path.as_path()).collect();
    let Some(folder) = paths
        .first()
        .and_then(|path| context.facts.read_only.get(*path))
    else {
        return part;
    };
    let list: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let folder = folder.display();
    let mut refused = Plan {
        refusals: part.refusals,
        notes: part.notes,
        ..Plan::default()
    };
    refused.refuse(
        engine,
        format!(
            "{} can't be written from here: {folder} is read-only to this process, as is all but \
             /etc to registry-agent-host.service",
            list.join(", ")
        ),
        format!(
            "`registry-agent install` lets the service write to {folder}, if that folder is \
             there; so does `systemctl edit registry-agent-host.service`, with \
             `ReadWritePaths={folder}` under `[Service]`, and `systemctl restart \
             registry-agent-host.service`. If the file system itself is mounted read-only \
             (`findmnt --target {folder}`), the file has to be in its image"
        ),
    );
    refused
}
