//! What was said, and where: the files in the order in which they count, and the environment.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::document;
use super::error::{KeyPath, Place, Remark};
use super::schema;

/// The file that is read if no other is named.
pub const DEFAULT_FILE: &str = "/etc/registry-agent/config.yaml";

/// The folder beside a configuration file whose `*.yaml` are merged over it.
const DROP_INS: &str = "config.d";

/// What is read of a configuration file, in bytes.
const LIMIT: u64 = 4 * 1024 * 1024;

/// The folder that the agent's own unit has while it runs, and keeps after that.
const UNIT_RUNTIME: &str = "/run/registry-agent";

/// What every variable of the agent's own begins with.
const PREFIX: &str = "REGISTRY_AGENT_";

/// Where a configuration comes from. It holds the environment, so it has no `Debug`: a variable
/// may be a password.
#[derive(Clone)]
pub struct Sources {
    /// The file that was named by `--config`; it must exist. Without, the default one, which need
    /// not.
    pub config: Option<PathBuf>,
    /// A `config.yml` of registry:2 or registry:3, named by `--distribution-config`. It stands
    /// instead of the agent's own file.
    pub distribution: Option<PathBuf>,
    /// All environment variables.
    pub environment: Vec<(String, String)>,
}

impl Sources {
    /// The named files, and this process's environment.
    pub fn from_process(config: Option<PathBuf>, distribution: Option<PathBuf>) -> Self {
        let text = |text: &OsStr| text.to_string_lossy().into_owned();
        let environment = env::vars_os()
            .map(|(name, value)| (text(&name), text(&value)))
            .collect();
        Self {
            config,
            distribution,
            environment,
        }
    }

    /// The same, with the folders that the agent's own unit gives it: for what speaks with that
    /// agent, or is another unit, which has folders of its own.
    #[must_use]
    pub fn of_the_unit(mut self) -> Self {
        for (name, folder) in [
            ("RUNTIME_DIRECTORY", UNIT_RUNTIME),
            ("STATE_DIRECTORY", "/var/lib/registry-agent"),
        ] {
            self.environment.retain(|(variable, _)| variable != name);
            self.environment.push((name.to_owned(), folder.to_owned()));
        }
        self
    }

    /// Those of the agent that its unit runs on this host, where it does and nobody named another
    /// configuration; for what looks at an agent's files.
    #[must_use]
    pub fn of_this_host(self) -> Self {
        let unnamed = self.config.is_none() && self.distribution.is_none();
        if unnamed && Path::new(UNIT_RUNTIME).is_dir() {
            self.of_the_unit()
        } else {
            self
        }
    }

    /// The folder that the unit keeps for this process (`StateDirectory=`), where it has one.
    pub fn unit_state_folder(&self) -> Option<PathBuf> {
        // Several are joined by colons: the first is the unit's own.
        let first = self.variable("STATE_DIRECTORY")?.split(':').next()?;
        let folder = Path::new(first);
        folder.is_absolute().then(|| folder.to_owned())
    }

    /// A variable's value; none if it is unset or empty.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        let named = self.environment.iter().find(|(key, _)| key == name);
        named
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    /// The variables whose names are accepted, in name order, without those that are empty, which
    /// say nothing.
    pub(super) fn variables<'a>(
        &'a self,
        accept: impl Fn(&str) -> bool,
        remarks: &mut Vec<Remark>,
    ) -> Vec<(&'a str, &'a str)> {
        let named = self
            .environment
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let mut variables: Vec<_> = named
            .filter(|(name, value)| accept(name) && !value.is_empty())
            .collect();
        variables.sort_unstable();
        variables.retain(|(name, value)| {
            let text = !value.contains(char::REPLACEMENT_CHARACTER);
            if !text {
                let place = Place::Variable((*name).to_owned());
                remarks.push(Remark::new(&place, "", "its value is not UTF-8 text"));
            }
            text
        });
        variables
    }

    /// Whether the variable is one of the agent's own.
    pub(super) fn is_own(name: &str) -> bool {
        name.starts_with(PREFIX)
    }
}

/// What one file or variable says.
pub(super) struct Layer {
    pub place: Place,
    pub members: Map<String, Value>,
}

/// The configuration file, and its drop-ins in name order.
///
/// Each file that is there is added to `read`. Returns what could be read, with a remark on what
/// could not, and on what a person may have thought would be read.
pub(super) fn files(
    main: &Path,
    must_exist: bool,
    read: &mut Vec<PathBuf>,
    warnings: &mut Vec<Remark>,
    remarks: &mut Vec<Remark>,
) -> Vec<Layer> {
    let mut layers = Vec::new();
    if must_exist || !is_absent(main) {
        layers.extend(file(main, read, remarks));
    }
    for path in drop_ins(&main.with_file_name(DROP_INS), warnings, remarks) {
        layers.extend(file(&path, read, remarks));
    }
    layers
}

fn is_absent(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn file(path: &Path, read: &mut Vec<PathBuf>, remarks: &mut Vec<Remark>) -> Option<Layer> {
    let place = Place::File(path.to_owned());
    let text = match read_text(path) {
        Ok(text) => text,
        Err(message) => {
            remarks.push(Remark::new(&place, "", message));
            return None;
        }
    };
    read.push(path.to_owned());
    let members = document::parse(&text, &place, remarks)?;
    Some(Layer { place, members })
}

/// A file's text, or why it can't be read.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(LIMIT + 1).read_to_end(&mut bytes));
    read.map_err(|error| format!("can't be read: {error}"))?;
    if bytes.len() as u64 > LIMIT {
        return Err(format!(
            "is larger than {LIMIT} bytes, which no configuration is"
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        format!("is not UTF-8 text: byte {offset} (from 0) does not belong there")
    })
}

fn drop_ins(folder: &Path, warnings: &mut Vec<Remark>, remarks: &mut Vec<Remark>) -> Vec<PathBuf> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => Err(error),
    };
    let entries = match entries {
        Ok(entries) => entries,
        Err(error) => {
            let place = Place::File(folder.to_owned());
            remarks.push(Remark::new(&place, "", format!("can't be read: {error}")));
            return Vec::new();
        }
    };
    let mut paths: Vec<PathBuf> = entries
        .into_iter()
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b"."))
        .map(|entry| entry.path())
        .collect();
    paths.sort_unstable();
    paths.retain(|path| {
        let ending = path.extension().unwrap_or_default();
        if ending == "yml" {
            let place = Place::File(path.clone());
            warnings.push(Remark::new(
                &place,
                "",
                "is not read: a drop-in's name ends in .yaml",
            ));
        }
        ending == "yaml"
    });
    paths
}

/// What the agent's own variables say, each as if a file had said it:
/// `REGISTRY_AGENT_FRESHNESS__WINDOW=5s` is `freshness: { window: 5s }`.
pub(super) fn variables(
    sources: &Sources,
    schema: &Value,
    remarks: &mut Vec<Remark>,
) -> Vec<Layer> {
    let mut layers = Vec::new();
    let is_key = |name: &str| Sources::is_own(name) && !is_for_tests(name);
    for (name, raw) in sources.variables(is_key, remarks) {
        let place = Place::Variable(name.to_owned());
        let suffix = name.strip_prefix(PREFIX).unwrap_or(name);
        let keys: Vec<String> = suffix.split("__").map(str::to_lowercase).collect();
        let path = keys
            .iter()
            .fold(KeyPath::default(), |path, key| path.key(key));
        let value = if schema::takes_only_text(schema, &keys) {
            Some(document::plain_text(raw).into())
        } else {
            document::parse_value(raw, &path, &place, remarks)
        };
        if let Some(value) = value {
            layers.push(Layer {
                place,
                members: nested(&keys, value),
            });
        }
    }
    layers
}

/// Whether a test says something to a debug build with this variable, and not to its configuration.
/// A released agent has none, and refuses it as any other key it does not know.
fn is_for_tests(name: &str) -> bool {
    #[cfg(debug_assertions)]
    return name == crate::failpoint::VARIABLE;
    #[cfg(not(debug_assertions))]
    return name.is_empty();
}

/// The value in a mapping in a mapping, by its keys from the outside in.
pub(super) fn nested(keys: &[String], value: Value) -> Map<String, Value> {
    let wrap = |value: Value, key: &String| Value::Object(Map::from_iter([(key.clone(), value)]));
    match keys.iter().rev().fold(value, wrap) {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_file_may_be_absent_and_its_drop_ins_still_count() {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("config.yaml");
        let load = |must_exist| {
            let (mut read, mut remarks) = (Vec::new(), Vec::new());
            let layers = files(&main, must_exist, &mut read, &mut Vec::new(), &mut remarks);
            (layers.len(), read.len(), remarks.len())
        };
        assert_eq!(load(false), (0, 0, 0));
        assert_eq!(load(true), (0, 0, 1));
        fs::create_dir(folder.path().join(DROP_INS)).unwrap();
        std::os::unix::fs::symlink("/dev/null", folder.path().join(DROP_INS).join("a.yaml"))
            .unwrap();
        assert_eq!(load(false), (1, 1, 0));
        std::os::unix::fs::symlink("/nowhere/at/all", &main).unwrap();
        assert_eq!(
            load(false),
            (1, 1, 1),
            "a link to nothing is not a file that is absent"
        );
    }

    #[test]
    fn a_file_that_does_not_end_is_refused() {
        let said = read_text(Path::new("/dev/zero")).unwrap_err();
        assert!(said.contains("larger than 4194304 bytes"), "{said}");
    }

    #[test]
    fn a_variable_that_is_not_text_is_refused() {
        let sources = Sources {
            config: None,
            distribution: None,
            environment: vec![("REGISTRY_AGENT_DRAIN".to_owned(), "5\u{fffd}".to_owned())],
        };
        let mut remarks = Vec::new();
        assert!(variables(&sources, &schema::schema(), &mut remarks).is_empty());
        assert_eq!(
            remarks[0].to_string(),
            "REGISTRY_AGENT_DRAIN (environment): its value is not UTF-8 text"
        );
    }
}
