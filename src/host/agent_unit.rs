//! The configuration of this host's agent, as its unit gives it: `systemctl edit registry-agent` may
//! name another file, or set variables, and the engines are wired by what the agent really serves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::facts::{EnvironmentFile, FileFacts, UnitFacts};
use super::observe::command_line;
use super::plan::{argument, words};
use super::read;
use crate::config::Sources;

/// An `EnvironmentFile=` of the agent's unit can't be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("what {unit} is configured with can't be known: its EnvironmentFile= {} {why}", .file.display())]
pub struct EnvironmentError {
    /// The unit.
    pub unit: String,
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it, and what to do.
    pub why: String,
}

/// The sources of the agent that this unit starts, below this root (`/`); of the running one, where
/// it runs. A configuration that is named by `own` is used as it is.
///
/// The unit's variables are those of `Environment=` and `EnvironmentFile=` (systemd.exec(5)), and
/// `own` wins over them. What `PassEnvironment=` and `UnsetEnvironment=` do is not seen.
pub fn sources(root: &Path, unit: &UnitFacts, own: Sources) -> Result<Sources, EnvironmentError> {
    if own.config.is_some() || own.distribution.is_some() {
        return Ok(own.of_the_unit());
    }
    let mut environment = variables(root, unit)?;
    let started = || {
        let words = unit.exec_start.last().into_iter().flatten();
        words
            .flat_map(|word| expanded(word, &environment))
            .collect()
    };
    let words: Vec<String> = command_line(root, unit.main_pid).unwrap_or_else(started);
    // Where systemd starts a service.
    let file = |name| argument(&words, &[name]).map(|file| Path::new("/").join(file));
    let (config, distribution) = (file("--config"), file("--distribution-config"));
    environment.extend(own.environment);
    let sources = Sources {
        config,
        distribution,
        environment: environment.into_iter().collect(),
    };
    Ok(sources.of_the_unit())
}

type Variables = BTreeMap<String, String>;

fn variables(root: &Path, unit: &UnitFacts) -> Result<Variables, EnvironmentError> {
    let pair = |one: &String| {
        let (name, value) = one.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    let mut variables: Variables = unit.environment.iter().filter_map(pair).collect();
    for EnvironmentFile { path, optional } in &unit.environment_files {
        let error = |why: String| EnvironmentError {
            unit: unit.name.clone(),
            file: path.clone(),
            why,
        };
        if path.to_string_lossy().contains(['*', '?', '[']) {
            let why = "is a pattern, which is not followed here: name each file by itself";
            return Err(error(why.to_owned()));
        }
        match read::file(root, path) {
            FileFacts::Text { content, .. } => variables.extend(words::all(&content)),
            FileFacts::Absent if *optional => {}
            FileFacts::Absent => return Err(error("is not there".to_owned())),
            FileFacts::Unreadable(why) => return Err(error(format!("can't be read: {why}"))),
        }
    }
    Ok(variables)
}

/// A word of `ExecStart=` as systemd expands it (systemd.service(5), "Command lines").
fn expanded(word: &str, variables: &Variables) -> Vec<String> {
    let is_name = |text: &str| {
        !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let value = |name: &str| variables.get(name).map_or("", String::as_str);
    if let Some(name) = word.strip_prefix('$').filter(|name| is_name(name)) {
        return words::split(value(name));
    }
    let (mut done, mut rest) = (String::new(), word);
    while let Some((before, after)) = rest.split_once("${") {
        done.push_str(before);
        match after.split_once('}').filter(|(name, _)| is_name(name)) {
            Some((name, further)) => {
                done.push_str(value(name));
                rest = further;
            }
            None => {
                done.push_str("${");
                rest = after;
            }
        }
    }
    vec![done + rest]
}
