//! `registry-agent check`: whether the configuration can be run, and what would be.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::config::{
    self, FleetSettings, HostSettings, HostedSettings, Loaded, Manage, Members, Pull, Restart,
    Role, Serving, Sources, Sparse, Storage,
};
use crate::store::layout::Prefix;

/// Reads the configuration and starts nothing.
///
/// If it can be run, says on standard output what would be, and warnings on standard error: exit
/// code 0. If not, says everything that is wrong on standard error: exit code 2. 1 if the report
/// itself can't be written.
pub fn check(sources: &Sources) -> ExitCode {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr().lock());
    let written = match config::load(sources) {
        Ok(loaded) => warn(&mut err, &loaded)
            .and_then(|()| report(&mut out, &loaded))
            .map(|()| ExitCode::SUCCESS),
        Err(errors) => writeln!(err, "{errors}").map(|()| ExitCode::from(2)),
    };
    written.unwrap_or(ExitCode::FAILURE)
}

fn warn(err: &mut impl Write, loaded: &Loaded) -> io::Result<()> {
    loaded
        .warnings
        .iter()
        .try_for_each(|warning| writeln!(err, "warning: {warning}"))
}

fn report(out: &mut impl Write, loaded: &Loaded) -> io::Result<()> {
    let settings = &loaded.settings;
    if loaded.files.is_empty() {
        writeln!(out, "files: none ({} is not there)", config::DEFAULT_FILE)?;
    }
    for file in &loaded.files {
        writeln!(out, "file: {}", file.display())?;
    }
    writeln!(out, "role: {}", settings.role().as_str())?;
    if let Some(serving) = &settings.serving {
        report_serving(out, serving)?;
    }
    writeln!(out, "admin: {}", settings.admin)?;
    report_fleet(out, &settings.fleet)?;
    report_host(out, &settings.host)
}

/// The fleet that is taken part in, if any is.
fn report_fleet(out: &mut impl Write, fleet: &FleetSettings) -> io::Result<()> {
    match &fleet.members {
        Some(Members::Autoscaling(autoscaling)) => {
            writeln!(out, "fleet: the autoscaling group {}", autoscaling.group)?;
        }
        Some(Members::Static(peers)) => writeln!(out, "fleet: a list of {} mirrors", peers.len())?,
        None => return Ok(()),
    }
    if let Some(balancer) = &fleet.load_balancer {
        writeln!(out, "fleet: in the target group {}", balancer.target_group)?;
    }
    if let Some(dns) = &fleet.dns {
        writeln!(out, "fleet: in the name {}", dns.name)?;
    }
    Ok(())
}

/// What the engines are told, and those to which something else is done than to wire them where
/// they are.
fn report_host(out: &mut impl Write, host: &HostSettings) -> io::Result<()> {
    let mirror = host.mirror.as_str().trim_end_matches('/');
    writeln!(out, "engines: {mirror}")?;
    for (engine, manage) in [
        ("docker", host.docker.manage),
        ("containerd", host.containerd),
        ("podman", host.podman),
        ("buildkit", host.buildkit),
    ] {
        let restarted = engine == "docker" && host.docker.restart == Restart::IfNeeded;
        let wired = match manage {
            Manage::Auto if restarted => "wired where it is here",
            Manage::Auto => continue,
            Manage::Always => "has to be here",
            Manage::Never => "left alone",
            Manage::Report => "only looked at",
        };
        let restarted = if restarted && manage != Manage::Never {
            ", restarted where nothing else works"
        } else {
            ""
        };
        writeln!(out, "{engine}: {wired}{restarted}")?;
    }
    match &host.local_name {
        Some(name) => writeln!(out, "hosts: {name}"),
        None => Ok(()),
    }
}

fn report_serving(out: &mut impl Write, serving: &Serving) -> io::Result<()> {
    writeln!(out, "listen: {}", serving.listen)?;
    if let Some(tls) = &serving.tls {
        write!(out, "tls: {}", tls.certificate.display())?;
        match &tls.client_ca {
            Some(clients) => writeln!(out, ", for clients of {}", clients.display())?,
            None => writeln!(out)?,
        }
    }
    match &serving.storage {
        Storage::Filesystem { root } => writeln!(out, "storage: {}", root.display())?,
        Storage::S3 { bucket, cache } => {
            let prefix = Prefix::new(&bucket.prefix);
            let prefix = prefix.as_str();
            let bucket = &bucket.bucket;
            if serving.role == Role::Mirror {
                writeln!(out, "storage: {}", cache.display())?;
                writeln!(out, "shared by all mirrors: s3://{bucket}/{prefix}")?;
            } else {
                writeln!(out, "storage: s3://{bucket}/{prefix}")?;
                writeln!(out, "cached in: {}", cache.display())?;
            }
        }
    }
    writeln!(out, "cache: at most {}", serving.cache_limit)?;
    for upstream in &serving.upstreams {
        let urls = upstream.urls.iter();
        let urls: Vec<&str> = urls.map(|url| url.as_str().trim_end_matches('/')).collect();
        let urls = urls.join(", ");
        write!(out, "upstream: {} at {urls} ", upstream.registry)?;
        match &upstream.credentials {
            Some(credentials) => writeln!(out, "as {}", credentials.username)?,
            None => writeln!(out, "anonymously")?,
        }
    }
    report_hosted(out, serving)
}

/// What can be pushed, by whom, and what they can do.
fn report_hosted(out: &mut impl Write, serving: &Serving) -> io::Result<()> {
    let HostedSettings {
        names,
        adopt,
        immutable_tags,
        shard,
        delete,
        sparse,
    } = &serving.hosted;
    if names.is_empty() {
        return Ok(());
    }
    writeln!(out, "hosted: {names}")?;
    for (key, patterns) in [
        ("adopt", Some(adopt)),
        ("shard", shard.as_ref()),
        ("immutable_tags", Some(immutable_tags)),
    ] {
        if let Some(patterns) = patterns.filter(|patterns| !patterns.is_empty()) {
            writeln!(out, "{key}: {patterns}")?;
        }
    }
    if *delete {
        writeln!(out, "delete: allowed")?;
    }
    let sparse = match sparse {
        Sparse::Never => "must be whole",
        Sparse::Indexes => "must be whole, indexes need not",
        Sparse::Always => "need not be whole",
    };
    writeln!(out, "manifests: {sparse}")?;
    let certificates = serving
        .tls
        .as_ref()
        .is_some_and(|tls| tls.client_ca.is_some());
    match &serving.auth {
        Some(auth) => {
            let pull = match auth.pull {
                Pull::Anonymous => "anybody pulls",
                Pull::Authenticated => "and pull",
            };
            writeln!(
                out,
                "auth: users of {} push, {pull}",
                auth.htpasswd.display()
            )?;
            match &auth.name {
                Some(name) => writeln!(out, "auth: asked for at {name}"),
                None => writeln!(
                    out,
                    "auth: asked for at no name, so that docker, podman and skopeo send no \
                     password: set auth.name to the host that they push to"
                ),
            }
        }
        None if certificates => writeln!(out, "auth: clients with certificates push and pull"),
        None => writeln!(out, "auth: anybody who reaches {} pushes", serving.listen),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_fleet_can_be_joined() {
        let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config");
        for case in ["every-key", "fleet-autoscaling", "fleet-peers"] {
            let state = (
                "STATE_DIRECTORY".to_owned(),
                "/var/lib/registry-agent".to_owned(),
            );
            let checked = check(&Sources {
                config: Some(cases.join(case).join("config.yaml")),
                distribution: None,
                environment: vec![state],
            });
            assert_eq!(checked, ExitCode::SUCCESS, "{case}");
        }
    }

    #[test]
    fn the_report_says_what_would_run_and_no_password() {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/every-key");
        let sources = Sources {
            config: Some(case.join("config.yaml")),
            distribution: None,
            environment: Vec::new(),
        };
        let mut out = Vec::new();
        report(&mut out, &config::load(&sources).unwrap()).unwrap();
        let out = String::from_utf8(out)
            .unwrap()
            .replace(case.to_str().unwrap(), "$CASE");
        let expected = "\
            file: $CASE/config.yaml\n\
            role: mirror\n\
            listen: [::]:5000\n\
            storage: /srv/images\n\
            cache: at most 20.00 GB\n\
            upstream: docker.io at https://registry-1.docker.io as alice\n\
            upstream: ghcr.io at https://ghcr.example.com, https://ghcr.io anonymously\n\
            upstream: localhost:5500 at http://127.0.0.1:5500/cache as bob\n\
            hosted: mycompany/*, tool\n\
            adopt: mycompany/old/*\n\
            shard: mycompany/*\n\
            immutable_tags: mycompany/*:v*\n\
            delete: allowed\n\
            manifests: need not be whole\n\
            auth: users of $CASE/htpasswd push, and pull\n\
            auth: asked for at registry.example.com\n\
            admin: 127.0.0.1:5001\n\
            engines: https://docker-mirror.local\n\
            docker: has to be here, restarted where nothing else works\n\
            containerd: left alone\n\
            podman: only looked at\n\
            hosts: docker-local.example.com\n";
        assert_eq!(out, expected);
    }
}
