//! docker: `daemon.json`, or the flags that stand in its way.
//!
//! dockerd refuses to start, and to reload, where a key is both a flag and in the file (moby 25471),
//! so a mirror that is given by a flag is changed where the flag is said. A mirror in the file is
//! live at a reload; a flag needs a restart, which stops containers unless `live-restore` is on.
//!
//! `insecure-registries`: a mirror with an http address needs no entry, its scheme is used as it is
//! (moby `registry/service_v2.go`). Pulling by the host-local name needs none either where docker
//! resolves it, for 127.0.0.0/8 is insecure by itself (`registry/config.go`, `isSecureIndex`). With
//! the containerd image store, from 28, that is only looked at while there is any mirror or insecure
//! registry (`daemon/hosts.go`, `RegistryHosts`): there the entry keeps the name working while the
//! mirror is withdrawn.
//!
//! `certs.d/<registry>/hosts.toml` is read from 28, by the containerd image store alone: for the
//! registries other than docker.io that `registry-mirrors` can't name, and for docker.io itself
//! where the mirror has an authority of its own, since that store looks for it under the registry's
//! name and not the mirror's (`mergeLegacyConfig`). Such a file stays while the mirror is
//! withdrawn: it falls back by itself, after its `dial_timeout`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use self::daemon::Daemon;
use super::context::{Context, version};
use super::dockerd::{self, Arguments};
use super::{Plan, PlanError, Wanted, hosts_toml};
use crate::host::facts::{DockerFacts, UnitFacts};

mod daemon;

const CERTIFICATES: &str = "/etc/docker/certs.d";

/// The files that docker's part looks at.
pub(super) fn paths(context: &Context<'_>, paths: &mut BTreeSet<PathBuf>) {
    for docker in &context.facts.engines.docker {
        paths.insert(dockerd::config_file(context, docker));
        paths.extend(
            docker
                .unit
                .environment_files
                .iter()
                .map(|file| file.path.clone()),
        );
        paths.extend(certificates(context));
        for registry in by_hosts_toml(context, docker) {
            paths.insert(hosts_toml::file(Path::new(CERTIFICATES), registry));
        }
    }
}

/// One daemon that can't be told keeps no other: what is in the way is in [`Plan::errors`].
pub(super) fn plan(context: &Context<'_>) -> Plan {
    let mut plan = Plan::default();
    for docker in &context.facts.engines.docker {
        plan.attempt(daemon(context, docker));
    }
    plan
}

fn daemon(context: &Context<'_>, docker: &DockerFacts) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    for file in &docker.unit.environment_files {
        context.text(&file.path)?;
    }
    say_state(&docker.unit, &mut plan);
    if context.wanted == Wanted::Wired {
        authorities(context, &mut plan)?;
        for registry in by_hosts_toml(context, docker) {
            hosts_toml::plan(
                context,
                Path::new(CERTIFICATES),
                registry,
                "docker",
                &mut plan,
            )?;
        }
    }
    let daemon = Daemon {
        context,
        docker,
        configured: Arguments::of_unit(context, docker),
        file: dockerd::config_file(context, docker),
    };
    daemon.wire(&mut plan)?;
    Ok(plan)
}

/// `ca.crt` for the mirror, and for this host's own name for it.
fn certificates(context: &Context<'_>) -> Vec<PathBuf> {
    if context.settings.ca.is_none() {
        return Vec::new();
    }
    let registries = std::iter::once(context.authority().to_owned());
    let registries = registries.chain(context.local_registry());
    let file = |host: String| Path::new(CERTIFICATES).join(host).join("ca.crt");
    registries.map(file).collect()
}

fn authorities(context: &Context<'_>, plan: &mut Plan) -> Result<(), PlanError> {
    let Some((from, text)) = context.ca()? else {
        return Ok(());
    };
    for path in certificates(context) {
        let why = format!(
            "the mirror's certificate comes from the authority in {}, which docker looks for here \
             at each pull",
            from.display()
        );
        plan.files.extend(context.change(&path, text, why)?);
    }
    Ok(())
}

/// The registries that this daemon is told of by a `hosts.toml`.
fn by_hosts_toml<'a>(context: &Context<'a>, docker: &DockerFacts) -> Vec<&'a str> {
    if version(docker.version.as_deref()).is_none_or(|version| version < (28, 0)) {
        return Vec::new();
    }
    let ca = context.settings.ca.is_some();
    let mirrored = context.settings.mirrored.iter();
    let wanted = mirrored.filter(|one| !one.is_docker_hub() || ca);
    wanted.map(crate::oci::RegistryHost::as_str).collect()
}

/// Says of a unit that is not running why, where it will not start by itself.
fn say_state(unit: &UnitFacts, plan: &mut Plan) {
    let name = &unit.name;
    if unit.load_state == "masked" || unit.unit_file_state == "masked" {
        plan.note(format!(
            "{name} is masked: its files are kept right, nothing is started. `systemctl unmask \
             {name}` makes it startable again"
        ));
    } else if unit.result == "start-limit-hit" {
        plan.note(format!(
            "{name} has failed too often and systemd starts it no more (start-limit-hit): its \
             files are kept right. `journalctl -u {name}` says why it failed; then `systemctl \
             reset-failed {name}` and `systemctl start {name}`"
        ));
    }
    if unit.need_daemon_reload {
        plan.note(format!(
            "the files of {name} were changed since systemd read them: what is planned here is \
             for the unit as it is loaded. `systemctl daemon-reload` loads them"
        ));
    }
}
