//! What configurations become, by golden folders: a bug report becomes a folder.
//!
//! `tests/config/<case>/` holds `config.yaml` (ours, with `config.d/`) or `config.yml`
//! (distribution's), and `environment` (lines `NAME=value`; without, systemd's folders). What is
//! expected: `expected.yaml` (the settings, as far as it names them; a `null` is nothing there) or
//! `expected-errors.txt`, and `expected-warnings.txt` (without: none). `$CASE` is the folder.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test may"
)]

use std::fs;
use std::path::{Path, PathBuf};

use registry_agent::config::{self, Sources};
use registry_agent::config::{DnsProvider, Encryption, FleetSettings, Serving, Settings, Storage};
use serde_json::{Value, json};
use url::Url;

/// What the test folders call their secrets: no message may hold it.
const SECRET: &str = "hunter2";

#[test]
fn every_case_loads_as_expected() {
    let mut failures = Vec::new();
    let cases = cases();
    assert!(cases.len() > 20, "the cases were not found");
    for case in &cases {
        let outcome = std::panic::catch_unwind(|| check(case));
        if outcome.is_err() {
            failures.push(case.file_name().unwrap_or_default());
        }
    }
    assert!(failures.is_empty(), "{failures:?} of {} cases", cases.len());
}

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config");
    let entries = fs::read_dir(folder).unwrap();
    let mut cases: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    cases
}

fn check(case: &Path) {
    let sources = sources(case);
    let expected = |name: &str| fs::read_to_string(case.join(name)).ok();
    match config::load(&sources) {
        Ok(loaded) => {
            let said = format!("{loaded:?}");
            assert!(!said.contains(SECRET), "a secret is seen: {said}");
            assert_eq!(
                expected("expected-errors.txt"),
                None,
                "{}: it loaded",
                case.display()
            );
            let warnings = loaded
                .warnings
                .join("\n")
                .replace(case.to_str().unwrap(), "$CASE");
            let wanted = expected("expected-warnings.txt").unwrap_or_default();
            assert_eq!(
                warnings.trim(),
                wanted.trim(),
                "{}: warnings",
                case.display()
            );
            let wanted: Value =
                serde_yaml::from_str(&expected("expected.yaml").expect("expected.yaml")).unwrap();
            let actual = shown(&loaded.settings);
            for (key, wanted) in wanted.as_object().expect("a mapping") {
                let files = json!(
                    loaded
                        .files
                        .iter()
                        .map(|file| relative(case, file))
                        .collect::<Vec<_>>()
                );
                let actual = if key == "files" { &files } else { &actual[key] };
                assert_eq!(actual, wanted, "{}: {key}", case.display());
            }
        }
        Err(errors) => {
            let said = errors.to_string().replace(case.to_str().unwrap(), "$CASE");
            assert!(
                !format!("{said}{errors:?}").contains(SECRET),
                "a secret is seen: {said}"
            );
            let wanted = expected("expected-errors.txt").unwrap_or_default();
            assert_eq!(said.trim(), wanted.trim(), "{}: errors", case.display());
        }
    }
}

fn relative<'a>(case: &Path, file: &'a Path) -> &'a str {
    file.strip_prefix(case).unwrap().to_str().unwrap()
}

fn sources(case: &Path) -> Sources {
    let present = |name: &str| Some(case.join(name)).filter(|file| file.exists());
    let distribution = present("config.yml");
    // A case without a file of either kind is about a file that is not there.
    let config = distribution.is_none().then(|| case.join("config.yaml"));
    let environment = fs::read_to_string(case.join("environment")).unwrap_or_else(|_| {
        "STATE_DIRECTORY=/var/lib/registry-agent\nRUNTIME_DIRECTORY=/run/registry-agent\n"
            .to_owned()
    });
    let environment = environment
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| {
            (
                name.to_owned(),
                value.replace("$CASE", case.to_str().unwrap()),
            )
        })
        .collect();
    Sources {
        config,
        distribution,
        environment,
    }
}

/// Settings in the words of the configuration file, with the password in the open.
fn shown(settings: &Settings) -> Value {
    let mut shown = json!({
        "role": settings.role().as_str(),
        "admin": settings.admin.to_string(),
        "interval": format!("{:?}", settings.health.interval),
        "threshold": settings.health.threshold,
        "level": format!("{:?}", settings.log.level),
        "format": format!("{:?}", settings.log.format),
        "access": settings.log.access,
        "fields": settings.log.fields.iter().cloned().collect::<Value>(),
        "host": {
            "mirror": settings.host.mirror.as_str(),
            "ca": settings.host.ca.as_ref().map(|ca| ca.file_name().unwrap().to_str()),
            "docker": format!("{:?}", settings.host.docker),
            "engines": [
                format!("{:?}", settings.host.containerd),
                format!("{:?}", settings.host.podman),
                format!("{:?}", settings.host.buildkit),
            ],
            "drift": format!("{:?}", settings.host.drift),
            "withdraw_after": format!("{:?}", settings.host.withdraw_after),
            "local_name": settings.host.local_name,
        },
        "fleet": shown_fleet(&settings.fleet),
    });
    if let Some(serving) = &settings.serving {
        let Value::Object(serving) = shown_serving(serving) else {
            unreachable!("a mapping")
        };
        shown.as_object_mut().unwrap().extend(serving);
    }
    shown
}

fn shown_bucket(serving: &Serving) -> Value {
    let Storage::S3 { bucket, .. } = &serving.storage else {
        return Value::Null;
    };
    let encryption = bucket.encryption.as_ref().map(|how| match how {
        Encryption::Aes256 => "AES256".to_owned(),
        Encryption::Kms { key } => format!("aws:kms {}", key.as_deref().unwrap_or_default()),
    });
    if let Some(keys) = &bucket.keys {
        assert_eq!(keys.secret.reveal(), SECRET);
    }
    json!({
        "bucket": bucket.bucket,
        "region": bucket.region,
        "prefix": bucket.prefix,
        "endpoint": bucket.endpoint.as_ref().map(Url::as_str),
        "path_style": bucket.path_style,
        "redirect": bucket.redirect,
        "storage_class": bucket.storage_class,
        "encryption": encryption,
        "access_key": bucket.keys.as_ref().map(|keys| &keys.id),
    })
}

fn shown_fleet(fleet: &FleetSettings) -> Value {
    if fleet.is_off() {
        assert_eq!(*fleet, FleetSettings::default());
        return Value::Null;
    }
    let mut shown = json!({
        "instances": fleet.instances,
        "warm": fleet.warm,
        "leave_on_stop": fleet.leave_on_stop,
        "enforce": fleet.enforce,
        "attach": fleet.attach,
        "members": format!("{:?}", fleet.members.as_ref().unwrap()),
        "target_group": fleet.load_balancer.as_ref().map(|one| &one.target_group),
    });
    if let Some(dns) = &fleet.dns {
        shown["dns"] = json!({
            "name": dns.name,
            "ttl": format!("{:?}", dns.ttl),
            "provider": format!("{:?}", dns.provider),
        });
        if let DnsProvider::Rfc2136 { tsig, .. } = &dns.provider {
            shown["dns"]["secret"] = tsig.secret.reveal().into();
        }
    }
    shown
}

fn shown_serving(serving: &Serving) -> Value {
    let upstreams: Vec<Value> = serving
        .upstreams
        .iter()
        .map(|upstream| {
            let mut shown = json!({
                "registry": upstream.registry.as_str(),
                "url": match &upstream.urls[..] {
                    [url] => json!(url.as_str()),
                    urls => urls.iter().map(Url::as_str).collect(),
                },
            });
            if upstream.share_private {
                shown["share_private"] = true.into();
            }
            if let Some(credentials) = &upstream.credentials {
                shown["username"] = credentials.username.as_str().into();
                shown["password"] = credentials.password.reveal().into();
            }
            shown
        })
        .collect();
    let headers: Vec<String> = serving
        .headers
        .iter()
        .map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()))
        .collect();
    json!({
        "listen": serving.listen.to_string(),
        "root": serving.storage.root(),
        "s3": shown_bucket(serving),
        "cache_limit": serving.cache_limit.to_string(),
        "upstreams": upstreams,
        "window": format!("{:?}", serving.freshness.window),
        "deadline": format!("{:?}", serving.freshness.deadline),
        "timeouts": [
            format!("{:?}", serving.timeouts.connect),
            format!("{:?}", serving.timeouts.headers),
            format!("{:?}", serving.timeouts.idle),
        ],
        "clients": format!("{:?}", serving.clients.idle),
        "headers": headers,
        "drain": format!("{:?}", serving.drain),
        "hosted": serving.hosted.names.to_string(),
        "adopt": serving.hosted.adopt.to_string(),
        "shard": serving.hosted.shard.as_ref().map(ToString::to_string),
        "immutable_tags": serving.hosted.immutable_tags.to_string(),
        "delete": serving.hosted.delete,
        "sparse": format!("{:?}", serving.hosted.sparse),
        "auth": serving.auth.as_ref().map(|auth| json!([
            auth.htpasswd.file_name().unwrap().to_str(),
            format!("{:?}", auth.pull),
            auth.name,
        ])),
    })
}

#[test]
fn the_schema_describes_every_key_and_allows_no_other() {
    let schema = config::schema();
    assert_eq!(
        schema["$schema"],
        "https://json-schema.org/draft/2020-12/schema"
    );
    let definitions = schema["$defs"].as_object().unwrap().values();
    let objects = definitions
        .chain([&schema])
        .filter(|schema| schema["properties"].is_object());
    let mut keys = 0;
    for object in objects {
        assert_eq!(object["additionalProperties"], json!(false), "{object}");
        for (key, property) in object["properties"].as_object().unwrap() {
            assert!(
                property["description"].is_string(),
                "{key} has no description"
            );
            keys += 1;
        }
    }
    assert!(keys > 20, "only {keys} keys");
}

#[test]
fn both_kinds_of_file_at_once_are_refused() {
    let sources = Sources {
        config: Some("/nowhere/a.yaml".into()),
        distribution: Some("/nowhere/b.yml".into()),
        environment: Vec::new(),
    };
    let errors = config::load(&sources).expect_err("both").to_string();
    assert!(errors.contains("only one can say what to do"), "{errors}");
}
