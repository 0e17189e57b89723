//! A `config.yml` of registry:2 or registry:3 and its `REGISTRY_*` variables, as they are.
//!
//! `keys` says for each key of distribution whether it is taken over, what is done instead, or why
//! it is refused. Here the file and the variables become one document, each value of which is
//! looked up there once.

mod keys;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use url::Url;

use super::convert::{DOCKER_HUB_URL, address as address_of};
use super::document;
use super::error::{KeyPath, Place, Remark};
use super::merge::{Merged, Origin};
use super::schema;
use super::source::{self, Sources};
use keys::Rule;

/// Where distribution stores if it isn't told.
const DEFAULT_ROOT: &str = "/var/lib/registry";

/// Sections whose one key is the name of a driver: the name says something even if it is empty, and
/// may stand alone (`storage: inmemory`).
const BY_DRIVER: &[&str] = &["auth", "storage"];

/// Translates the file, and the variables over it, into what our own file would say. What is wrong,
/// or is done otherwise, is remarked upon in distribution's own keys.
pub(super) fn read(
    file: &Path,
    sources: &Sources,
    read: &mut Vec<PathBuf>,
    warnings: &mut Vec<Remark>,
    errors: &mut Vec<Remark>,
) -> Merged {
    let place = Place::File(file.to_owned());
    let mut said = Merged::default();
    match source::read_text(file) {
        Ok(text) => {
            read.push(file.to_owned());
            let Some(mut members) = document::parse(&text, &place, errors) else {
                return Merged::default();
            };
            keep_exact_texts(&mut members, &text);
            said.add(drivers_as_mappings(members), &place.clone().into());
        }
        Err(message) => {
            errors.push(Remark::new(&place, "", message));
            return Merged::default();
        }
    }
    let theirs = |name: &str| name.starts_with("REGISTRY_") && !Sources::is_own(name);
    for (name, raw) in sources.variables(theirs, errors) {
        let members = variable(name, raw);
        // A driver that a variable names stands in the place of the file's, and of all beside it.
        for section in BY_DRIVER {
            let named = members.get(*section).and_then(Value::as_str);
            if named.is_some_and(|driver| !driver.is_empty()) {
                said.forget(section);
            }
        }
        said.add(
            drivers_as_mappings(members),
            &Place::Variable(name.to_owned()).into(),
        );
    }

    let mut translation = Translation {
        said: &said,
        ours: Merged::default(),
        proxy: Proxy::default(),
        sources,
        seen: BTreeSet::new(),
        warnings,
        errors,
    };
    translation.defaults(&place, sources);
    for leaf in leaves(said.members()) {
        translation.leaf(&leaf);
    }
    translation.upstream(&place);
    translation.ours
}

/// What one variable says: `REGISTRY_HTTP_ADDR=:5000` is `http: { addr: ":5000" }`.
fn variable(name: &str, raw: &str) -> Map<String, Value> {
    let suffix = name.strip_prefix("REGISTRY_").unwrap_or(name);
    let keys: Vec<String> = suffix.split('_').map(str::to_lowercase).collect();
    // A password is never anything but a text, whatever YAML makes of it.
    let bucket_keys = ["accesskey", "secretkey"];
    let of_bucket = keys
        .last()
        .is_some_and(|key| bucket_keys.contains(&key.as_str()));
    let text = (keys[0] == "proxy" && keys.len() > 1) || of_bucket;
    let yaml = if text { None } else { document::lenient(raw) };
    source::nested(
        &keys,
        yaml.unwrap_or_else(|| document::plain_text(raw).into()),
    )
}

/// Puts back what YAML takes for a number: `password: 0x10` is four characters, not 16.
fn keep_exact_texts(members: &mut Map<String, Value>, text: &str) {
    #[derive(Deserialize)]
    struct Exact {
        proxy: Option<Texts>,
    }
    #[derive(Deserialize)]
    struct ExactBucket {
        storage: Option<Storage>,
    }
    #[derive(Deserialize)]
    struct Storage {
        s3: Option<Keys>,
    }
    #[derive(Deserialize)]
    struct Keys {
        accesskey: Option<String>,
        secretkey: Option<String>,
    }
    #[derive(Deserialize)]
    struct Texts {
        username: Option<String>,
        password: Option<String>,
    }
    // Each for itself: one may have another shape (`storage: filesystem`).
    let proxy = serde_yaml::from_str::<Exact>(text).ok();
    let proxy = proxy.and_then(|exact| exact.proxy);
    let storage = serde_yaml::from_str::<ExactBucket>(text).ok();
    let storage = storage.and_then(|exact| exact.storage);
    let mut exact_texts = Vec::new();
    if let Some(texts) = proxy {
        exact_texts.push((["proxy", "username"].as_slice(), texts.username));
        exact_texts.push((["proxy", "password"].as_slice(), texts.password));
    }
    if let Some(keys) = storage.and_then(|storage| storage.s3) {
        exact_texts.push((["storage", "s3", "accesskey"].as_slice(), keys.accesskey));
        exact_texts.push((["storage", "s3", "secretkey"].as_slice(), keys.secretkey));
    }
    for (path, exact) in exact_texts {
        let mut said = members.get_mut(path[0]);
        for key in &path[1..] {
            said = said.and_then(|said| said.get_mut(*key));
        }
        if let (Some(said @ (Value::Number(_) | Value::Bool(_))), Some(exact)) = (said, exact) {
            *said = exact.into();
        }
    }
}

fn drivers_as_mappings(mut members: Map<String, Value>) -> Map<String, Value> {
    for section in BY_DRIVER {
        match members.get_mut(*section) {
            Some(Value::Object(drivers)) => {
                for parameters in drivers.values_mut().filter(|value| value.is_null()) {
                    *parameters = json!({});
                }
            }
            Some(section @ Value::String(_)) => {
                let driver = section.as_str().unwrap_or_default().to_lowercase();
                *section = json!({ driver: {} });
            }
            _ => {}
        }
    }
    members
}

/// One value, and the keys that lead to it.
struct Leaf<'a> {
    keys: Vec<&'a str>,
    value: &'a Value,
}

impl Leaf<'_> {
    fn path(&self) -> KeyPath {
        self.keys
            .iter()
            .fold(KeyPath::default(), |path, key| path.key(key))
    }

    /// Whether the value says nothing; that of a list says at least that it is one.
    fn is_empty(&self) -> bool {
        match self.value {
            Value::String(text) => text.is_empty(),
            Value::Object(members) => members.is_empty(),
            _ => false,
        }
    }

    /// Whether the last key alone says something: `storage: { inmemory: }`.
    fn is_driver(&self) -> bool {
        self.keys.len() > 1 && BY_DRIVER.contains(&self.keys[0])
    }

    /// The value as one text, if it is one; YAML 1.1's words for true and false are those.
    fn text(&self) -> Option<String> {
        text(self.value)
    }

    fn boolean(&self) -> Option<bool> {
        match self.text()?.to_lowercase().as_str() {
            "true" | "yes" | "on" => Some(true),
            "false" | "no" | "off" => Some(false),
            _ => None,
        }
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

fn leaves(members: &Map<String, Value>) -> Vec<Leaf<'_>> {
    let mut leaves = Vec::new();
    collect(members, &[], &mut leaves);
    leaves
}

fn collect<'a>(members: &'a Map<String, Value>, within: &[&'a str], leaves: &mut Vec<Leaf<'a>>) {
    for (key, value) in members {
        let mut keys = within.to_vec();
        keys.push(key);
        match value {
            Value::Object(members) if !members.is_empty() => collect(members, &keys, leaves),
            value => leaves.push(Leaf { keys, value }),
        }
    }
}

/// `proxy`, whose keys make one upstream together.
#[derive(Default)]
struct Proxy {
    remoteurl: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

/// Distribution's document on its way to ours.
struct Translation<'a> {
    said: &'a Merged,
    ours: Merged,
    proxy: Proxy,
    /// Our own variables, which are over distribution's.
    sources: &'a Sources,
    /// The rules that were remarked upon: one remark each, however many keys a section holds.
    seen: BTreeSet<String>,
    warnings: &'a mut Vec<Remark>,
    errors: &'a mut Vec<Remark>,
}

impl Translation<'_> {
    fn leaf(&mut self, leaf: &Leaf<'_>) {
        let path = leaf.path();
        if leaf
            .value
            .as_str()
            .is_some_and(|text| schema::unrendered(text).is_some())
        {
            return self.error(&path, "cloud-init left a template variable unrendered");
        }
        let Some((key, rule)) = keys::lookup(&leaf.keys) else {
            return self.unknown(leaf);
        };
        match rule {
            Rule::Refused(why) if !leaf.is_empty() || leaf.is_driver() => {
                self.once(key, |this| this.error(&KeyPath::of(key), *why));
            }
            Rule::Honoured(honour) if !leaf.is_empty() => honour(self, leaf),
            Rule::Instead { unless, instead } if !leaf.is_empty() => {
                let as_said = leaf
                    .boolean()
                    .map(|truth| truth.to_string())
                    .or(leaf.text());
                if as_said.is_none_or(|said| !unless.contains(&said.as_str())) {
                    self.once(key, |this| this.warn(&KeyPath::of(key), *instead));
                }
            }
            _ => {}
        }
    }

    fn unknown(&mut self, leaf: &Leaf<'_>) {
        let depth = (1..=leaf.keys.len()).find(|depth| !keys::is_section(&leaf.keys[..*depth]));
        let Some(depth) = depth else {
            if !leaf.value.is_object() {
                self.error(
                    &leaf.path(),
                    "is a single value or a list; must be a mapping of keys",
                );
            }
            return;
        };
        let path = Leaf {
            keys: leaf.keys[..depth].to_vec(),
            value: leaf.value,
        }
        .path();
        self.once(&path.to_string(), |this| {
            if leaf.keys[0] == "storage" {
                this.error(
                    &path,
                    "is no storage that this version knows: it has filesystem and s3",
                );
            } else {
                this.warn(&path, "is ignored: distribution does not know it either");
            }
        });
    }

    fn once(&mut self, key: &str, remark: impl FnOnce(&mut Self)) {
        if self.seen.insert(key.to_owned()) {
            remark(self);
        }
    }

    fn error(&mut self, path: &KeyPath, message: impl Into<String>) {
        self.errors.push(self.remark(path, message));
    }

    fn warn(&mut self, path: &KeyPath, message: impl Into<String>) {
        self.warnings.push(self.remark(path, message));
    }

    /// A remark at the place that said the key, or the first key within it.
    fn remark(&self, path: &KeyPath, message: impl Into<String>) -> Remark {
        let mut within = leaves(self.said.members())
            .into_iter()
            .map(|leaf| leaf.path());
        let leaf = within.find(|leaf| leaf.is_within(path));
        let origin = self.said.origin(leaf.as_ref().unwrap_or(path));
        let place = origin.map_or(Place::Default, |origin| origin.place.clone());
        Remark::new(&place, path, message)
    }

    /// Says one of our keys, as the key of theirs that it comes from.
    fn set(&mut self, ours: &[&str], value: Value, from: &KeyPath) {
        let keys: Vec<String> = ours.iter().map(|key| (*key).to_owned()).collect();
        let origin = self.origin(from);
        self.ours.add(source::nested(&keys, value), &origin);
    }

    fn origin(&self, from: &KeyPath) -> Origin {
        let place = self
            .said
            .origin(from)
            .map_or(Place::Default, |origin| origin.place.clone());
        Origin {
            place,
            key: Some(from.to_string()),
        }
    }

    fn has(&self, dotted: &str) -> bool {
        let is_said = |leaf: &Leaf<'_>| leaf.keys.join(".") == dotted && !leaf.is_empty();
        leaves(self.said.members()).iter().any(is_said)
    }

    /// Whether a key is said, and is true.
    fn is_true(&self, dotted: &str) -> bool {
        self.boolean(dotted) == Some(true)
    }

    /// Whether a key is said, and is false.
    fn is_false(&self, dotted: &str) -> bool {
        self.boolean(dotted) == Some(false)
    }

    fn boolean(&self, dotted: &str) -> Option<bool> {
        let mut leaves = leaves(self.said.members()).into_iter();
        leaves.find(|leaf| leaf.keys.join(".") == dotted)?.boolean()
    }

    /// A registry that takes pushes from whoever reaches it: perhaps a proxy was meant.
    fn refuse_everybody(&mut self, file: &Place) {
        let address = self.text_of("http.addr");
        let address = address.and_then(|said| address_of(&keys::numeric(said)));
        let own = ["REGISTRY_AGENT_LISTEN", "REGISTRY_AGENT_AUTH"];
        let own = own.iter().any(|name| self.sources.variable(name).is_some());
        let someone = self.has_section("auth")
            || self.has("http.tls.clientcas")
            || self
                .sources
                .variable("REGISTRY_AGENT_AUTH__HTPASSWD")
                .is_some();
        if own || someone || address.is_none_or(|address| address.ip().is_loopback()) {
            return;
        }
        let message = format!(
            "is missing: this is a registry of its own, to which everybody who can reach http.addr \
             could push. Say who may by auth.htpasswd or http.tls.clientcas, or that all of them may \
             by `auth: none`, or listen on 127.0.0.1; for a mirror, set proxy.remoteurl, or \
             REGISTRY_PROXY_REMOTEURL, such as {DOCKER_HUB_URL}"
        );
        self.errors.push(Remark::new(file, "auth", message));
    }

    /// What a key is said to be.
    fn text_of(&self, dotted: &str) -> Option<String> {
        let mut leaves = leaves(self.said.members()).into_iter();
        leaves.find(|leaf| leaf.keys.join(".") == dotted)?.text()
    }

    /// Whether there is such a mapping, be it empty.
    fn has_section(&self, dotted: &str) -> bool {
        let mut at = Some(self.said.members());
        let mut found = false;
        for key in dotted.split('.') {
            let next = at.and_then(|members| members.get(key));
            found = next.is_some_and(|next| !next.is_null());
            at = next.and_then(Value::as_object);
        }
        found
    }

    /// Whether this is a registry of its own: neither a proxy nor one that is only read.
    fn takes_pushes(&self) -> bool {
        let reader = self.has_bucket() && self.is_true("storage.maintenance.readonly.enabled");
        !self.has_section("proxy") && !reader
    }

    /// Whether the storage is a bucket.
    fn has_bucket(&self) -> bool {
        let storage = self.said.members().get("storage");
        storage.is_some_and(|storage| storage.get("s3").is_some())
    }

    /// Whether what is served is in a bucket, and not an upstream's.
    fn is_read_from_bucket(&self) -> bool {
        self.has_bucket() && self.said.members().get("proxy").is_none()
    }

    /// distribution sends its clients to S3 unless it is told not to.
    fn redirect(&mut self, file: &Place) {
        let disable = "storage.redirect.disable";
        if !self.is_read_from_bucket() || self.is_true(disable) {
            return;
        }
        let message = "is not true: clients get blobs from S3 itself, as from registry:2, and not \
                       from this host's disk";
        self.warnings.push(Remark::new(file, disable, message));
        let from = KeyPath::of("storage.s3.bucket");
        self.set(&["storage", "s3", "redirect"], true.into(), &from);
    }

    /// What distribution does where its file says nothing, and what we do differently there.
    fn defaults(&mut self, file: &Place, sources: &Sources) {
        self.redirect(file);
        if !self.has("version") {
            let message = "is missing: taken as 0.1, the only one there is";
            self.warnings.push(Remark::new(file, "version", message));
        }
        if !self.has("http.addr") && sources.variable("REGISTRY_AGENT_LISTEN").is_none() {
            let message = "is missing: listening on 127.0.0.1:5000, this host alone (:5000 is all \
                           interfaces)";
            self.warnings.push(Remark::new(file, "http.addr", message));
        }
        if !self.has("storage.filesystem.rootdirectory") && !self.has_bucket() {
            let key = "storage.filesystem.rootdirectory";
            let origin = Origin {
                place: file.clone(),
                key: Some(key.to_owned()),
            };
            let members = json!({ "filesystem": { "root": DEFAULT_ROOT } });
            self.ours
                .add(Map::from_iter([("storage".to_owned(), members)]), &origin);
        }
    }

    fn upstream(&mut self, file: &Place) {
        let Proxy {
            remoteurl,
            username,
            password,
        } = std::mem::take(&mut self.proxy);
        let from = |key: &str| KeyPath::of("proxy").key(key);
        let Some(url) = remoteurl else {
            if self.has_section("proxy") {
                if !self.errors.iter().any(|it| it.key == "proxy.remoteurl") {
                    let message = format!(
                        "is missing: set it, or REGISTRY_PROXY_REMOTEURL, to the registry to mirror, \
                         such as {DOCKER_HUB_URL}, or remove the section, to take pushes"
                    );
                    self.errors
                        .push(Remark::new(file, "proxy.remoteurl", message));
                }
                if self.has_bucket() {
                    // So that nothing follows from it that is not wrong.
                    self.set(&["role"], "writer".into(), &from("remoteurl"));
                }
                return;
            }
            // Not a proxy: it takes pushes, unless it was told not to.
            let role = if self.takes_pushes() {
                "writer"
            } else {
                "reader"
            };
            let storage = if self.has_bucket() {
                "storage.s3.bucket"
            } else {
                "storage.filesystem.rootdirectory"
            };
            self.set(&["role"], role.into(), &KeyPath::of(storage));
            if self.has_section("auth.none") {
                self.set(&["auth"], "none".into(), &KeyPath::of("auth.none"));
            }
            if role == "writer" {
                self.refuse_everybody(file);
            }
            return;
        };
        match (&username, &password) {
            (Some(_), None) => self.error(&from("username"), "stands without proxy.password"),
            (None, Some(_)) => self.error(&from("password"), "stands without proxy.username"),
            _ => {}
        }
        // A URL that can't be parsed is refused for itself, whatever the registry's name.
        let parsed = Url::parse(&url).ok();
        let host = parsed.as_ref().and_then(|url| {
            let host = url.host_str()?;
            // A name without a dot is a registry's only with its port.
            let port = match url.port() {
                None if !host.contains('.') => url.port_or_known_default(),
                port => port,
            };
            let port = port.map_or(String::new(), |port| format!(":{port}"));
            Some(format!("{host}{port}"))
        });
        let mut upstream =
            json!({ "registry": host.as_deref().unwrap_or("docker.io"), "url": url });
        let complete = username.is_some() && password.is_some();
        if complete {
            upstream["credentials"] = json!({ "username": username, "password": password });
        }
        self.set(&["upstreams"], json!([upstream]), &from("remoteurl"));
        if complete {
            let credentials = KeyPath::of("upstreams").item(0).key("credentials");
            for key in ["username", "password"] {
                let origin = self.origin(&from(key));
                self.ours.note(credentials.key(key), origin);
            }
        }
    }
}
