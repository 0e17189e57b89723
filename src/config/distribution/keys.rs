//! Distribution's keys: what becomes of each. Source: distribution `configuration/configuration.go`
//! and its reference, versions 2.8 and 3.0.

use serde_json::Value;
use url::Url;

use super::super::convert::address;
use super::super::error::{KeyPath, quoted};
use super::{Leaf, Translation, text};

/// What becomes of a key.
pub(super) enum Rule {
    /// It is taken over.
    Honoured(fn(&mut Translation<'_>, &Leaf<'_>)),
    /// Something else is done, which is said once, unless it is what the value asks for.
    Instead {
        unless: &'static [&'static str],
        instead: &'static str,
    },
    /// To ignore it would be unsafe, or not what was meant.
    Refused(&'static str),
}

use Rule::{Honoured, Refused};

const fn instead(instead: &'static str) -> Rule {
    Rule::Instead {
        unless: &[],
        instead,
    }
}

const fn unless(unless: &'static [&'static str], instead: &'static str) -> Rule {
    Rule::Instead { unless, instead }
}

const NO_OTHER_STORAGE: Rule = Refused("this version stores only on a filesystem and in S3");

/// A key stands for all that is within it, except where a longer one says otherwise.
const KEYS: &[(&str, Rule)] = &[
    ("version", Honoured(version)),
    ("log.level", Honoured(log_level)),
    ("log.formatter", Honoured(log_formatter)),
    ("log.fields", Honoured(log_field)),
    ("log.accesslog.disabled", Honoured(log_access)),
    (
        "log.hooks",
        instead("no mail is sent: watch /metrics, or the log, from outside"),
    ),
    (
        "log.reportcaller",
        unless(
            &["false"],
            "the log names what was done, not the line of code",
        ),
    ),
    ("loglevel", Honoured(log_level)),
    (
        "storage.filesystem",
        instead("only rootdirectory has a meaning here"),
    ),
    ("storage.filesystem.rootdirectory", Honoured(root_directory)),
    (
        "storage.filesystem.maxthreads",
        instead("the agent limits its threads by itself"),
    ),
    (
        "storage.s3",
        instead(
            "only bucket, region, regionendpoint, rootdirectory, accesskey, secretkey, \
             forcepathstyle, encrypt, keyid, secure and storageclass have a meaning here",
        ),
    ),
    ("storage.s3.bucket", Honoured(s3_text)),
    ("storage.s3.region", Honoured(s3_text)),
    ("storage.s3.regionendpoint", Honoured(s3_endpoint)),
    ("storage.s3.rootdirectory", Honoured(s3_text)),
    ("storage.s3.accesskey", Honoured(s3_text)),
    ("storage.s3.secretkey", Honoured(s3_text)),
    ("storage.s3.storageclass", Honoured(s3_text)),
    ("storage.s3.forcepathstyle", Honoured(s3_path_style)),
    ("storage.s3.encrypt", Honoured(s3_encrypt)),
    ("storage.s3.keyid", Honoured(s3_key)),
    // It is part of the endpoint's URL.
    ("storage.s3.secure", Honoured(s3_secure)),
    ("storage.s3.skipverify", Honoured(s3_skip_verify)),
    (
        "storage.s3.v4auth",
        unless(&["true"], "requests are always signed by version 4"),
    ),
    (
        "storage.s3.chunksize",
        instead("the agent chooses the size of parts by itself"),
    ),
    (
        "storage.s3.redirectendpoint",
        instead("not used: clients are sent to the endpoint that the agent asks itself"),
    ),
    (
        "storage.s3aws",
        Refused("this version knows the driver as s3 only: rename the section"),
    ),
    ("storage.gcs", NO_OTHER_STORAGE),
    ("storage.azure", NO_OTHER_STORAGE),
    ("storage.swift", NO_OTHER_STORAGE),
    ("storage.oss", NO_OTHER_STORAGE),
    ("storage.inmemory", NO_OTHER_STORAGE),
    (
        "storage.cache",
        instead("not used: the kernel's page cache holds what is asked for often"),
    ),
    ("storage.delete", instead("only enabled has a meaning here")),
    ("storage.delete.enabled", Honoured(delete)),
    ("storage.redirect.disable", Honoured(redirect_disable)),
    (
        "storage.maintenance.uploadpurging",
        unless(
            &["false"],
            "uploads that were given up are removed after a day in any case",
        ),
    ),
    (
        "storage.maintenance.readonly",
        unless(
            &["false"],
            "a mirror takes no pushes, but goes on storing what it fetches",
        ),
    ),
    ("storage.maintenance.readonly.enabled", Honoured(read_only)),
    (
        "storage.tag",
        instead("the agent limits its concurrency by itself"),
    ),
    (
        "auth",
        Refused(
            "this version knows users by auth.htpasswd alone, where it takes pushes, and auth: none",
        ),
    ),
    ("auth.none", instead("takes no parameters")),
    (
        "auth.htpasswd",
        Refused("only realm and path are known here, and path is needed: a file of `htpasswd -B`"),
    ),
    ("auth.htpasswd.path", Honoured(users)),
    (
        "auth.htpasswd.realm",
        instead("passwords are asked for by the name of the registry"),
    ),
    (
        "middleware",
        instead("not used: the agent has no middleware"),
    ),
    (
        "reporting",
        instead("nothing is sent to Bugsnag or New Relic: watch the log and /metrics"),
    ),
    ("http.addr", Honoured(http_address)),
    ("http.net", Honoured(http_net)),
    (
        "http.prefix",
        unless(&["/"], "not used: the API is at /v2/"),
    ),
    (
        "http.host",
        instead(
            "used only as the name of the registry, with auth: every Location is relative, and right \
             behind any proxy",
        ),
    ),
    (
        "http.secret",
        instead("not needed: uploads carry no state that would be signed"),
    ),
    (
        "http.relativeurls",
        unless(&["true"], "every Location is relative in any case"),
    ),
    ("http.draintimeout", Honoured(drain)),
    ("http.headers", Honoured(header)),
    (
        "http.tls",
        instead("only certificate, key, clientcas and minimumtls have a meaning here"),
    ),
    ("http.tls.certificate", Honoured(tls_certificate)),
    ("http.tls.key", Honoured(tls_key)),
    ("http.tls.clientcas", Honoured(tls_client_authorities)),
    (
        "http.tls.clientauth",
        unless(
            &["require-and-verify-client-cert"],
            "with clientcas, every client must show a certificate of one of them",
        ),
    ),
    ("http.tls.minimumtls", Honoured(tls_minimum)),
    ("http.tls.letsencrypt", Honoured(tls_lets_encrypt)),
    ("http.debug.addr", Honoured(debug_address)),
    (
        "http.debug.prometheus",
        unless(
            &["true", "/metrics"],
            "metrics are always on, at /metrics of the admin listener",
        ),
    ),
    ("http.http2", unless(&["false"], "HTTP/2 is always offered")),
    (
        "http.h2c",
        unless(&["true"], "HTTP/2 is always offered, without TLS as well"),
    ),
    (
        "notifications",
        instead("no notification is sent to any endpoint"),
    ),
    ("redis", instead("not used: no Redis is needed")),
    (
        "health.storagedriver.enabled",
        unless(&["true"], "the storage is probed in any case"),
    ),
    ("health.storagedriver.interval", Honoured(health_interval)),
    ("health.storagedriver.threshold", Honoured(health_threshold)),
    (
        "health.file",
        instead("not used: /readyz of the admin listener says whether the agent is ready"),
    ),
    (
        "health.http",
        instead("not used: the agent's health does not depend on other servers"),
    ),
    (
        "health.tcp",
        instead("not used: the agent's health does not depend on other servers"),
    ),
    ("proxy.remoteurl", Honoured(proxy)),
    ("proxy.username", Honoured(proxy)),
    ("proxy.password", Honoured(proxy)),
    (
        "proxy.ttl",
        instead(
            "nothing is removed by its age; a tag is confirmed by the upstream after \
             freshness.window (REGISTRY_AGENT_FRESHNESS__WINDOW)",
        ),
    ),
    (
        "proxy.exec",
        Refused("the agent runs no credential helpers: use proxy.username and proxy.password"),
    ),
    (
        "compatibility",
        instead("not used: a mirror takes no pushes"),
    ),
    (
        "validation",
        instead("not used: a mirror serves what its upstream has, byte for byte"),
    ),
    (
        "policy",
        instead("not used: a mirror serves what its upstream has"),
    ),
    (
        "catalog",
        instead("not used: the agent has its own limit for /v2/_catalog"),
    ),
];

const PRIVATE: &str = "unlike in registry:2, images that only this account can pull are neither kept \
                       nor given out: see share_private of upstreams";

/// The rule for a value, by the longest key that leads to it.
pub(super) fn lookup(keys: &[&str]) -> Option<&'static (&'static str, Rule)> {
    (1..=keys.len()).rev().find_map(|depth| {
        let dotted = keys[..depth].join(".");
        KEYS.iter().find(|(key, _)| *key == dotted)
    })
}

/// Whether there are known keys within this one.
pub(super) fn is_section(keys: &[&str]) -> bool {
    let within = keys.join(".") + ".";
    KEYS.iter().any(|(key, _)| key.starts_with(&within))
}

const PROXY_GIVES_ALL: &str = "what a proxy or a reader has is given to everybody who reaches it: only \
                               pushes take a password";

fn version(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    if leaf.text().as_deref() != Some("0.1") {
        to.error(
            &leaf.path(),
            format!("{} is not known; must be 0.1", shown(leaf)),
        );
    }
}

fn log_level(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    // The old key, which the new one replaces.
    if leaf.keys == ["loglevel"] && to.has("log.level") {
        return;
    }
    let level = leaf.text().unwrap_or_default().to_lowercase();
    choose(
        to,
        leaf,
        &level,
        &["error", "warn", "info", "debug"],
        &["log", "level"],
    );
}

fn log_formatter(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    let mut formatter = leaf.text().unwrap_or_default();
    if formatter == "logstash" {
        to.warn(
            &leaf.path(),
            "the log is plain JSON: there is no logstash form",
        );
        "json".clone_into(&mut formatter);
    }
    choose(to, leaf, &formatter, &["text", "json"], &["log", "format"]);
}

fn choose(to: &mut Translation<'_>, leaf: &Leaf<'_>, text: &str, of: &[&str], ours: &[&str]) {
    if of.contains(&text) {
        to.set(ours, text.into(), &leaf.path());
    } else {
        let message = format!(
            "{} is not allowed; must be one of: {}",
            shown(leaf),
            of.join(", ")
        );
        to.error(&leaf.path(), message);
    }
}

fn log_field(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    // A variable's underscores separate keys, and a field may be a mapping: one name of all of them.
    let name = leaf.keys[2..].join("_");
    if name.is_empty() {
        return to.error(&leaf.path(), "must be a mapping of names to texts");
    }
    let value = leaf.text().unwrap_or_else(|| leaf.value.to_string());
    to.set(&["log", "fields", &name], value.into(), &leaf.path());
}

fn log_access(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.boolean() {
        Some(disabled) => to.set(&["log", "access"], (!disabled).into(), &leaf.path()),
        None => not_boolean(to, leaf),
    }
}

fn root_directory(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    set_text(to, leaf, &["storage", "filesystem", "root"], |text| text);
}

fn delete(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.boolean() {
        Some(true) if !to.takes_pushes() => to.warn(
            &KeyPath::of("storage.delete"),
            "clients can't delete from a mirror; registry:2 as a proxy refuses deletes as well",
        ),
        Some(allowed) if to.takes_pushes() => to.set(&["delete"], allowed.into(), &leaf.path()),
        Some(_) => {}
        None => not_boolean(to, leaf),
    }
}

/// registry:2 asks for a password for everything, pulls as well.
fn users(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    if !to.takes_pushes() {
        return to.error(&KeyPath::of("auth"), PROXY_GIVES_ALL);
    }
    set_text(to, leaf, &["auth", "htpasswd"], |text| text);
    to.set(&["auth", "pull"], "authenticated".into(), &leaf.path());
    let host = to.text_of("http.host");
    let host = host.and_then(|host| Some(Url::parse(&host).ok()?.host_str()?.to_owned()));
    if let Some(host) = host {
        to.set(&["auth", "name"], host.into(), &KeyPath::of("http.host"));
    } else if to.sources.variable("REGISTRY_AGENT_AUTH__NAME").is_none() {
        to.warn(
            &leaf.path(),
            "docker logs in only under a name that is known: say by http.host, or by \
             REGISTRY_AGENT_AUTH__NAME, how clients call this registry",
        );
    }
}

/// In front of a bucket it is what makes a reader (see [`Translation::upstream`]).
fn read_only(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.boolean() {
        Some(true) if to.takes_pushes() => to.error(
            &leaf.path(),
            "nothing is read from a disk alone: a reader has a bucket (storage.s3)",
        ),
        Some(true) if !to.has_bucket() || to.has("proxy.remoteurl") => to.warn(
            &KeyPath::of("storage.maintenance.readonly"),
            "a mirror takes no pushes, but goes on storing what it fetches",
        ),
        Some(_) => {}
        None => not_boolean(to, leaf),
    }
}

/// Texts that have the same meaning here, by another name.
fn s3_text(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    let ours = match leaf.keys.as_slice() {
        [_, _, "bucket"] => "bucket",
        [_, _, "region"] => "region",
        [_, _, "rootdirectory"] => "prefix",
        [_, _, "accesskey"] => "access_key",
        [_, _, "secretkey"] => "secret_key",
        [_, _, "storageclass"] => "storage_class",
        _ => return to.error(&leaf.path(), "is unknown here: the key above it is a text"),
    };
    set_text(to, leaf, &["storage", "s3", ours], |text| text);
}

fn s3_skip_verify(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    if leaf.text().as_deref() != Some("false") {
        let message = "the certificate of the S3 endpoint is always verified: trust its authority \
                       instead";
        to.error(&leaf.path(), message);
    }
}

fn s3_endpoint(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    // Without a scheme it is what `secure` says, which is true if nothing is said.
    let scheme = if to.is_false("storage.s3.secure") {
        "http"
    } else {
        "https"
    };
    set_text(to, leaf, &["storage", "s3", "endpoint"], |text| {
        if text.contains("://") {
            text
        } else {
            format!("{scheme}://{text}")
        }
    });
    // distribution does so in front of every endpoint but Amazon's own.
    if !to.has("storage.s3.forcepathstyle") {
        to.set(&["storage", "s3", "path_style"], true.into(), &leaf.path());
    }
}

fn s3_path_style(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.boolean() {
        Some(path) => to.set(&["storage", "s3", "path_style"], path.into(), &leaf.path()),
        None => not_boolean(to, leaf),
    }
}

/// What it does where it is not said is for `Translation::defaults`.
fn redirect_disable(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.boolean() {
        Some(true) => {}
        Some(false) if to.is_read_from_bucket() => {}
        Some(false) => to.warn(
            &leaf.path(),
            "blobs of a mirror or a disk are always served by the agent itself",
        ),
        None => not_boolean(to, leaf),
    }
}

fn s3_encrypt(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.boolean() {
        Some(true) => {
            let sse = if to.has("storage.s3.keyid") {
                "aws:kms"
            } else {
                "AES256"
            };
            to.set(
                &["storage", "s3", "encryption", "sse"],
                sse.into(),
                &leaf.path(),
            );
        }
        Some(false) => {}
        None => not_boolean(to, leaf),
    }
}

fn s3_key(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    if to.is_true("storage.s3.encrypt") {
        let ours = ["storage", "s3", "encryption", "kms_key"];
        set_text(to, leaf, &ours, |text| text);
    } else {
        to.warn(
            &leaf.path(),
            "not used without storage.s3.encrypt, by registry:2 neither",
        );
    }
}

fn s3_secure(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.boolean() {
        Some(false) if !to.has("storage.s3.regionendpoint") => to.error(
            &leaf.path(),
            "false without regionendpoint: Amazon is asked by https only",
        ),
        Some(_) => {}
        None => not_boolean(to, leaf),
    }
}

fn not_boolean(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    let message = format!("{} is neither true nor false", shown(leaf));
    to.error(&leaf.path(), message);
}

fn http_address(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    set_text(to, leaf, &["listen"], numeric);
}

fn http_net(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    if leaf.text().as_deref() != Some("tcp") {
        let message = format!(
            "{} is not served: the registry listens on tcp only",
            shown(leaf)
        );
        to.error(&leaf.path(), message);
    }
}

fn tls_certificate(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    set_text(to, leaf, &["tls", "certificate"], |text| text);
}

fn tls_key(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    set_text(to, leaf, &["tls", "key"], |text| text);
}

fn tls_client_authorities(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    let file = match leaf.value {
        Value::Array(files) => match files.as_slice() {
            [] => return,
            [file] => text(file),
            _ => None,
        },
        file => text(file),
    };
    match file {
        Some(file) => to.set(&["tls", "client_ca"], file.into(), &leaf.path()),
        None => to.error(
            &leaf.path(),
            "must be one file: put the certificates of all authorities into it",
        ),
    }
}

fn tls_minimum(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.text().as_deref() {
        Some("tls1.2") => {}
        Some("tls1.0" | "tls1.1") => {
            to.warn(&leaf.path(), "TLS 1.2 is the least that is served");
        }
        _ => to.error(
            &leaf.path(),
            format!("{} can't be had: TLS 1.2 and 1.3 are served", shown(leaf)),
        ),
    }
}

fn tls_lets_encrypt(to: &mut Translation<'_>, _: &Leaf<'_>) {
    let key = "http.tls.letsencrypt";
    let certificate = to.has("http.tls.certificate");
    to.once(key, |to| {
        if certificate {
            to.warn(&KeyPath::of(key), "no certificate is requested: that of http.tls.certificate is shown");
        } else {
            // Plain HTTP where TLS was meant would be unsafe.
            to.error(&KeyPath::of(key), "this version requests no certificates: name one by \
                http.tls.certificate and http.tls.key, or put a TLS proxy before it and remove the key");
        }
    });
}

fn debug_address(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    let said = leaf.text().map(numeric).and_then(|said| address(&said));
    if let Some(said) = said.filter(|said| !said.ip().is_loopback()) {
        let local = format!("127.0.0.1:{}", said.port());
        let message = format!(
            "/metrics and /healthz are at {local}, for this host alone: they ask nobody who they are"
        );
        to.warn(&leaf.path(), message);
        to.set(&["admin"], local.into(), &leaf.path());
    } else {
        set_text(to, leaf, &["admin"], numeric);
    }
}

/// Go looks up the name that every host has.
pub(super) fn numeric(address: String) -> String {
    match address.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => address,
    }
}

fn header(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    let name = leaf.keys[2..].join("_");
    let values: Option<Vec<String>> = match leaf.value {
        Value::Array(values) => values.iter().map(text).collect(),
        value => text(value).map(|value| vec![value]),
    };
    match values {
        Some(values) if !name.is_empty() => {
            to.set(&["headers", &name], values.into(), &leaf.path());
        }
        _ => to.error(
            &leaf.path(),
            "must be a mapping of header names to lists of texts",
        ),
    }
}

fn drain(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    set_duration(to, leaf, &["drain"]);
}

fn health_interval(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    // Zero is distribution's way to say "the default".
    if !matches!(leaf.text().as_deref(), Some("0" | "0s")) {
        set_duration(to, leaf, &["health", "interval"]);
    }
}

/// Go's durations are a subset of ours, but for the zero without a unit.
fn set_duration(to: &mut Translation<'_>, leaf: &Leaf<'_>, ours: &[&str]) {
    match leaf.value {
        Value::Number(number) if number.as_u64() == Some(0) => {
            to.set(ours, "0s".into(), &leaf.path());
        }
        Value::Number(number) => {
            to.error(
                &leaf.path(),
                format!("{number} has no unit: write {number}s for seconds"),
            );
        }
        _ => set_text(to, leaf, ours, |text| text),
    }
}

fn health_threshold(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    match leaf.text().and_then(|text| text.parse::<u32>().ok()) {
        // Zero is distribution's way to say "the default".
        Some(0) => {}
        Some(threshold) => to.set(&["health", "threshold"], threshold.into(), &leaf.path()),
        None => to.error(
            &leaf.path(),
            format!("{} is not a whole number", shown(leaf)),
        ),
    }
}

fn proxy(to: &mut Translation<'_>, leaf: &Leaf<'_>) {
    let key = match leaf.keys.as_slice() {
        [_, "remoteurl"] => &mut to.proxy.remoteurl,
        [_, "username"] => {
            to.warn(&leaf.path(), PRIVATE);
            &mut to.proxy.username
        }
        [_, "password"] => &mut to.proxy.password,
        // Something within one of them: none is a mapping.
        _ => return to.error(&leaf.path(), "is unknown here: the key above it is a text"),
    };
    match leaf.text() {
        Some(text) => *key = Some(text),
        None => to.error(&leaf.path(), "must be a text"),
    }
}

fn set_text(
    to: &mut Translation<'_>,
    leaf: &Leaf<'_>,
    ours: &[&str],
    change: impl Fn(String) -> String,
) {
    match leaf.text() {
        Some(text) => to.set(ours, change(text).into(), &leaf.path()),
        None => to.error(&leaf.path(), "must be a single value"),
    }
}

/// A value as an error may repeat it. Secrets are never asked for here.
fn shown(leaf: &Leaf<'_>) -> String {
    leaf.text()
        .map_or("a list".to_owned(), |text| quoted(&text))
}
