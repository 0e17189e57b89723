//! User-data for an instance: one file, which cloud-init writes before the agent and the engines
//! start. Nothing is run, so nothing can fail halfway.

use std::fmt::Write as _;

use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::config::{self, Sources};

/// The role of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Role {
    /// Mirrors other registries for a fleet
    Mirror,
    /// Serves what is in a bucket to its own host
    Reader,
    /// Takes pushes, and puts them into a bucket
    Writer,
    /// Serves nothing: its engines use the mirror of a fleet
    Client,
}

/// What is to be configured.
#[derive(Debug, Clone, Args)]
pub(in crate::cli) struct Wanted {
    /// What the instance is for
    #[arg(long)]
    pub role: Role,
    /// The name by which clients find the fleet of mirrors: docker-mirror.example.com
    #[arg(long, value_name = "NAME", required_if_eq("role", "client"))]
    pub fleet_name: Option<String>,
    /// The Route 53 zone in which mirrors keep their records of that name
    #[arg(long, value_name = "ZONE", requires = "fleet_name")]
    pub zone: Option<String>,
    /// The autoscaling group that the instance is in
    #[arg(long, value_name = "NAME")]
    pub group: Option<String>,
    /// The bucket that readers read, and writers write
    #[arg(long, value_name = "NAME", required_if_eq_any([("role", "reader"), ("role", "writer")]))]
    pub bucket: Option<String>,
    /// The region of the bucket
    #[arg(long, value_name = "REGION", required_if_eq_any([("role", "reader"), ("role", "writer")]))]
    pub region: Option<String>,
    /// Names that a writer takes pushes for: mycompany/*; may be repeated
    #[arg(long, value_name = "PATTERN", required_if_eq("role", "writer"))]
    pub hosted: Vec<String>,
    /// The name by which a reader's host finds its own registry: docker-local.example.com
    #[arg(long, value_name = "NAME")]
    pub local_name: Option<String>,
    /// Another registry than docker.io that is mirrored; may be repeated
    #[arg(long, value_name = "REGISTRY")]
    pub upstream: Vec<String>,
    /// How much is kept on the disk: bytes (500GB) or a share of it (80%)
    #[arg(long, value_name = "LIMIT")]
    pub cache_limit: Option<String>,
}

/// User-data that configures it so, or why it can't be.
pub(in crate::cli) fn user_data(wanted: &Wanted) -> Result<String, String> {
    check_flags(wanted)?;
    let config = configuration(wanted);
    check(&config)?;
    let mut text = String::from(
        "#cloud-config\n\
         # For an image that has registry-agent in it. cloud-init writes this file before the agent\n\
         # and the engines start, so nothing is run here, and nothing is started again.\n\
         write_files:\n\
         - path: /etc/registry-agent/config.yaml\n  \
           content: |\n",
    );
    for line in config.lines() {
        let _ = writeln!(text, "    {line}");
    }
    Ok(text)
}

/// A flag that this role has no use for is a mistake.
fn check_flags(wanted: &Wanted) -> Result<(), String> {
    use Role::{Client, Mirror, Reader, Writer};
    let given: [(&str, bool, &[Role]); 9] = [
        (
            "--fleet-name",
            wanted.fleet_name.is_some(),
            &[Mirror, Client],
        ),
        ("--zone", wanted.zone.is_some(), &[Mirror]),
        ("--group", wanted.group.is_some(), &[Mirror]),
        (
            "--bucket",
            wanted.bucket.is_some(),
            &[Mirror, Reader, Writer],
        ),
        (
            "--region",
            wanted.region.is_some(),
            &[Mirror, Reader, Writer],
        ),
        ("--hosted", !wanted.hosted.is_empty(), &[Writer]),
        (
            "--local-name",
            wanted.local_name.is_some(),
            &[Reader, Writer],
        ),
        ("--upstream", !wanted.upstream.is_empty(), &[Mirror, Client]),
        (
            "--cache-limit",
            wanted.cache_limit.is_some(),
            &[Mirror, Reader, Writer],
        ),
    ];
    for (flag, is_given, roles) in given {
        if is_given && !roles.contains(&wanted.role) {
            let role = wanted.role.to_possible_value();
            let role = role.map_or(String::new(), |role| role.get_name().to_owned());
            return Err(format!("{flag} says nothing about a {role}: leave it out"));
        }
    }
    Ok(())
}

/// The configuration file.
fn configuration(wanted: &Wanted) -> String {
    let mut lines = Vec::new();
    match wanted.role {
        Role::Mirror => {
            lines.push("role: mirror".to_owned());
            lines.push(
                "listen: \":5000\"    # others of the network ask it, not only this host"
                    .to_owned(),
            );
        }
        Role::Reader => {
            lines.push("role: reader".to_owned());
            lines.push("listen: 127.0.0.1:5000    # for this host alone".to_owned());
        }
        Role::Writer => {
            lines.push("role: writer".to_owned());
            lines.push("listen: 127.0.0.1:5000    # whoever builds, builds here".to_owned());
        }
        Role::Client => {
            lines.push("role: client".to_owned());
            let name = wanted.fleet_name.as_deref().unwrap_or_default();
            let mirror = format!("http://{name}");
            lines.push(format!("host: {{ mirror: {} }}", quoted(&mirror)));
        }
    }
    if wanted.bucket.is_some() || wanted.cache_limit.is_some() {
        lines.push("storage:".to_owned());
    }
    if let Some(bucket) = &wanted.bucket {
        let region = match &wanted.region {
            Some(region) => format!(", region: {}", quoted(region)),
            None => String::new(),
        };
        lines.push(format!("  s3: {{ bucket: {}{region} }}", quoted(bucket)));
    }
    if let Some(limit) = &wanted.cache_limit {
        lines.push(format!("  cache: {{ limit: {} }}", quoted(limit)));
    }
    if !wanted.hosted.is_empty() {
        let patterns: Vec<_> = wanted
            .hosted
            .iter()
            .map(|pattern| quoted(pattern))
            .collect();
        lines.push(format!("hosted: [{}]", patterns.join(", ")));
    }
    if !wanted.upstream.is_empty() {
        lines.push("upstreams:".to_owned());
        let named = wanted.upstream.iter().map(String::as_str);
        let all = ["docker.io"].into_iter().chain(named);
        lines.extend(all.map(|registry| format!("- registry: {}", quoted(registry))));
    }
    lines.extend(fleet(wanted));
    lines.join("\n") + "\n"
}

fn fleet(wanted: &Wanted) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(group) = &wanted.group {
        lines.push(format!("  autoscaling: {{ group: {} }}", quoted(group)));
    }
    if let (Some(zone), Some(name)) = (&wanted.zone, &wanted.fleet_name) {
        let (zone, name) = (quoted(zone), quoted(name));
        lines.push(format!(
            "  dns: {{ route53: {{ zone: {zone}, name: {name} }} }}"
        ));
    }
    if let Some(name) = &wanted.local_name {
        lines.push(format!("  dns: {{ hosts: {{ name: {} }} }}", quoted(name)));
    }
    if !lines.is_empty() {
        lines.insert(0, "fleet:".to_owned());
    }
    lines
}

/// A value as YAML reads it again: plain where it can't be anything else, else as a JSON text.
fn quoted(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_/".contains(c);
    let letter = value.starts_with(|c: char| c.is_ascii_alphabetic());
    if letter && value.contains(['.', '-', '/']) && value.chars().all(plain) {
        value.to_owned()
    } else {
        Value::from(value).to_string()
    }
}

/// What is printed can be run: as the unit reads it, on a host that has nothing else.
fn check(config: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("can't check the configuration: {error}");
    let folder = tempfile::tempdir().map_err(failed)?;
    let file = folder.path().join("config.yaml");
    let mut written = tempfile::NamedTempFile::new_in(folder.path()).map_err(failed)?;
    std::io::Write::write_all(&mut written, config.as_bytes()).map_err(failed)?;
    written
        .persist(&file)
        .map_err(|error| failed(error.error))?;
    let sources = Sources {
        config: Some(file.clone()),
        distribution: None,
        environment: Vec::new(),
    };
    match config::load(&sources.of_the_unit()) {
        Ok(_) => Ok(()),
        Err(errors) => {
            let place = format!("{}: ", file.display());
            Err(errors.to_string().replace(&place, ""))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        wanted: Wanted,
    }

    fn of(flags: &str) -> Wanted {
        let words = ["test"].into_iter().chain(flags.split(' '));
        match Flags::try_parse_from(words) {
            Ok(flags) => flags.wanted,
            Err(error) => panic!("{flags}: {error}"),
        }
    }

    #[test]
    fn a_mirror_listens_to_others_and_a_client_is_told_of_it() {
        let mirror = user_data(&of(
            "--role mirror --fleet-name docker-mirror.local --cache-limit 70% --upstream ghcr.io",
        ));
        assert_eq!(
            mirror.unwrap(),
            "\
#cloud-config
# For an image that has registry-agent in it. cloud-init writes this file before the agent
# and the engines start, so nothing is run here, and nothing is started again.
write_files:
- path: /etc/registry-agent/config.yaml
  content: |
    role: mirror
    listen: \":5000\"    # others of the network ask it, not only this host
    storage:
      cache: { limit: \"70%\" }
    upstreams:
    - registry: docker.io
    - registry: ghcr.io
"
        );
        let client = user_data(&of("--role client --fleet-name docker-mirror.local")).unwrap();
        let file = client.split_once("content: |\n").unwrap().1;
        assert_eq!(
            file,
            "    role: client\n    host: { mirror: \"http://docker-mirror.local\" }\n"
        );
    }

    #[test]
    fn what_stands_in_s3_and_in_dns_has_its_keys() {
        for (flags, lines) in [
            (
                "--role reader --bucket images --region eu-west-1 --local-name docker-local.example.com",
                "role: reader\n\
                 listen: 127.0.0.1:5000    # for this host alone\n\
                 storage:\n  \
                   s3: { bucket: \"images\", region: eu-west-1 }\n\
                 fleet:\n  \
                   dns: { hosts: { name: docker-local.example.com } }\n",
            ),
            (
                "--role writer --bucket my.images --region us-east-1 --hosted mycompany/* --hosted a/b",
                "role: writer\n\
                 listen: 127.0.0.1:5000    # whoever builds, builds here\n\
                 storage:\n  \
                   s3: { bucket: my.images, region: us-east-1 }\n\
                 hosted: [\"mycompany/*\", a/b]\n",
            ),
            (
                "--role mirror --fleet-name m.example.com --zone Z123 --group mirrors",
                "role: mirror\n\
                 listen: \":5000\"    # others of the network ask it, not only this host\n\
                 fleet:\n  \
                   autoscaling: { group: \"mirrors\" }\n  \
                   dns: { route53: { zone: \"Z123\", name: m.example.com } }\n",
            ),
        ] {
            assert_eq!(configuration(&of(flags)), lines, "{flags}");
        }
    }

    #[test]
    fn what_can_not_be_configured_is_refused_with_its_key_or_flag() {
        for (flags, words) in [
            ("--role client --fleet-name a/b", "host.mirror"),
            ("--role mirror --cache-limit 200%", "storage.cache.limit"),
            ("--role mirror --upstream nodot", "upstreams[1].registry"),
            (
                "--role client --fleet-name m.local --cache-limit 1GB",
                "--cache-limit says nothing",
            ),
            (
                "--role mirror --hosted a/*",
                "--hosted says nothing about a mirror",
            ),
        ] {
            let error = user_data(&of(flags)).expect_err(flags);
            assert!(error.contains(words), "{flags}: {error}");
            assert!(!error.contains("/tmp"), "{error}");
        }
        for flags in [
            "--role client",
            "--role reader --bucket b",
            "--role mirror --zone Z",
        ] {
            let words = ["test"].into_iter().chain(flags.split(' '));
            assert!(Flags::try_parse_from(words).is_err(), "{flags}");
        }
    }

    #[test]
    fn a_value_can_not_be_taken_for_something_else() {
        for (value, written) in [
            ("m.example.com", "m.example.com"),
            ("yes", "\"yes\""),
            ("0x1.5", "\"0x1.5\""),
            ("a: b\n", "\"a: b\\n\""),
            ("null", "\"null\""),
            ("-", "\"-\""),
        ] {
            assert_eq!(quoted(value), written);
            let read: String = serde_yaml::from_str(&quoted(value)).unwrap();
            assert_eq!(read, value);
        }
    }
}
