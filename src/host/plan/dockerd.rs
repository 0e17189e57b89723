//! dockerd's arguments: which it runs with, which it will start with, and where each is said.

use std::path::{Path, PathBuf};

use super::context::{Context, argument};
use super::words::{self, Word};
use crate::host::docker_api;
use crate::host::facts::DockerFacts;

/// Where an argument is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// In `ExecStart=` itself.
    ExecStart,
    /// In a variable that `ExecStart=` expands, which `Environment=` sets.
    Environment(String),
    /// In a variable that `ExecStart=` expands, which this file sets.
    File(PathBuf, String),
}

/// The arguments that the unit starts dockerd with, each with its origin.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub words: Vec<String>,
    pub origins: Vec<Origin>,
}

impl Arguments {
    /// Expands the unit's command as systemd would (systemd.service(5), "Command lines"). Files
    /// that were not read yet, or can't be, count as empty: the plan itself asks for them by name.
    pub fn of_unit(context: &Context<'_>, docker: &DockerFacts) -> Self {
        let mut found = Self::default();
        for argument in docker.unit.exec_start.last().into_iter().flatten() {
            match argument.strip_prefix('$').filter(|name| is_name(name)) {
                Some(name) => {
                    let (words, origin) = expand(context, docker, name);
                    for word in words {
                        found.push(word, origin.clone());
                    }
                }
                None => found.push(braced(context, docker, argument), Origin::ExecStart),
            }
        }
        found
    }

    fn push(&mut self, word: String, origin: Origin) {
        self.words.push(word);
        self.origins.push(origin);
    }

    /// Where a flag is said first, by its name with both dashes.
    pub fn origin(&self, flag: &str) -> Option<&Origin> {
        let at = self.words.iter().position(|word| is_flag(word, flag))?;
        self.origins.get(at)
    }
}

/// Every value that a flag is given.
pub(super) fn values(words: &[String], flag: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (index, word) in words.iter().enumerate() {
        if word == flag {
            found.extend(words.get(index + 1).cloned());
        } else if is_flag(word, flag) {
            found.push(word[flag.len() + 1..].to_owned());
        }
    }
    found
}

/// Whether this variable of an environment file gives docker a mirror by its flag.
pub(super) fn has_mirrors(file: &str, variable: &str) -> bool {
    let words = words::variable(file, variable).unwrap_or_default();
    let words: Vec<String> = words.into_iter().map(|word| word.text).collect();
    has(&words, "--registry-mirror")
}

/// Whether a flag is there, with a value or without.
pub(super) fn has(words: &[String], flag: &str) -> bool {
    words.iter().any(|word| is_flag(word, flag))
}

fn is_flag(word: &str, flag: &str) -> bool {
    word.strip_prefix(flag)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The words of a variable. The last file that sets it wins, and any file over `Environment=`.
fn expand(context: &Context<'_>, docker: &DockerFacts, name: &str) -> (Vec<String>, Origin) {
    for file in docker.unit.environment_files.iter().rev() {
        let text = context.known_text(&file.path);
        if let Some(words) = text.and_then(|text| words::variable(text, name)) {
            let words = words.into_iter().map(|word| word.text).collect();
            return (words, Origin::File(file.path.clone(), name.to_owned()));
        }
    }
    let set = docker.unit.environment.iter().rev().find_map(|one| {
        let (key, value) = one.split_once('=')?;
        (key == name).then_some(value)
    });
    let words = set.map(words::split).unwrap_or_default();
    (words, Origin::Environment(name.to_owned()))
}

/// `${NAME}` within a word is replaced by the whole value.
fn braced(context: &Context<'_>, docker: &DockerFacts, word: &str) -> String {
    let Some((before, rest)) = word.split_once("${") else {
        return word.to_owned();
    };
    let Some((name, after)) = rest.split_once('}').filter(|(name, _)| is_name(name)) else {
        return word.to_owned();
    };
    let files = docker.unit.environment_files.iter().rev();
    let mut values = files.filter_map(|file| words::value(context.known_text(&file.path)?, name));
    let value = values.next().or_else(|| {
        let mut set = docker.unit.environment.iter().rev();
        set.find_map(|one| Some(one.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
    });
    format!(
        "{before}{}{}",
        value.unwrap_or_default(),
        braced(context, docker, after)
    )
}

/// Where this daemon's `daemon.json` is.
pub(super) fn config_file(context: &Context<'_>, docker: &DockerFacts) -> PathBuf {
    let configured = Arguments::of_unit(context, docker);
    let running = docker.command_line.as_ref();
    let words = running.unwrap_or(&configured.words);
    let default = docker_api::default_config_file(&docker.unit.name);
    argument(words, &["--config-file"]).map_or_else(|| default.into(), PathBuf::from)
}

/// The text of an environment file in which the variable's flags are these, in their order; every
/// other byte stays. `None` where the result would not read so (a value in odd quotes): nobody
/// should guess then.
pub(super) fn set_flags(
    file: &str,
    variable: &str,
    flag: &str,
    wanted: &[String],
) -> Option<String> {
    let words = words::variable(file, variable)?;
    let spans = spans(&words, flag);
    let rendered: Vec<String> = wanted
        .iter()
        .map(|value| format!("{flag}={value}"))
        .collect();
    let mut text = file.to_owned();
    // From the end, so that the places before it stay true.
    for (index, (range, value)) in spans.iter().enumerate().rev() {
        let first = index == 0;
        let new = match (first, wanted.contains(value)) {
            (true, _) => rendered.join(" "),
            (false, _) => String::new(),
        };
        let start = match (
            first,
            words.iter().rfind(|word| word.raw.end <= range.start),
        ) {
            (false, Some(before)) => before.raw.end,
            _ => range.start,
        };
        text.replace_range(start..range.end, &new);
    }
    let read = words::variable(&text, variable)?;
    let read: Vec<String> = read.into_iter().map(|word| word.text).collect();
    let others = |words: &[String]| -> Vec<String> {
        let mut skip = false;
        let keep = |word: &&String| {
            let value = std::mem::replace(&mut skip, *word == flag);
            !value && !is_flag(word, flag)
        };
        words.iter().filter(keep).cloned().collect()
    };
    let before: Vec<String> = words.into_iter().map(|word| word.text).collect();
    let sound = values(&read, flag) == wanted && others(&read) == others(&before);
    sound.then_some(text)
}

/// Each time that the flag is there: its bytes, with those of a value that stands apart.
fn spans(words: &[Word], flag: &str) -> Vec<(std::ops::Range<usize>, String)> {
    let mut found = Vec::new();
    for (index, word) in words.iter().enumerate() {
        if word.text == flag {
            if let Some(value) = words.get(index + 1) {
                found.push((word.raw.start..value.raw.end, value.text.clone()));
            }
        } else if is_flag(&word.text, flag) {
            found.push((word.raw.clone(), word.text[flag.len() + 1..].to_owned()));
        }
    }
    found
}

/// The unit's own command for checking a file, without the file.
pub(super) fn validate_command(words: &[String]) -> Vec<String> {
    let mut command: Vec<String> = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--config-file" {
            words.next();
        } else if !is_flag(word, "--config-file") {
            command.push(word.clone());
        }
    }
    command.insert(command.len().min(1), "--validate".into());
    command
}

/// How an origin is named to a person.
pub(super) fn name(origin: &Origin, unit: &str, fragment: &Path) -> String {
    match origin {
        Origin::ExecStart => format!(
            "`ExecStart=` of {unit} ({} or a drop-in)",
            fragment.display()
        ),
        Origin::Environment(variable) => format!("`Environment={variable}=` of {unit}"),
        Origin::File(path, variable) => format!("{variable} in {}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_changes_inside_the_quotes_that_are_there() {
        let mirror = "--registry-mirror";
        for (file, wanted, after) in [
            (
                "OPTIONS='--selinux-enabled --registry-mirror=http://old'\n",
                &["http://new"][..],
                "OPTIONS='--selinux-enabled --registry-mirror=http://new'\n",
            ),
            (
                "OPTIONS=\"--registry-mirror http://b --x\"",
                &["http://a", "http://b"],
                "OPTIONS=\"--registry-mirror=http://a --registry-mirror=http://b --x\"",
            ),
            (
                "OPTIONS=--registry-mirror=http://b   --x --registry-mirror=http://old\n",
                &["http://a", "http://b"],
                "OPTIONS=--registry-mirror=http://a --registry-mirror=http://b   --x\n",
            ),
        ] {
            let wanted: Vec<String> = wanted.iter().map(|&it| it.to_owned()).collect();
            let found = set_flags(file, "OPTIONS", mirror, &wanted);
            assert_eq!(found.as_deref(), Some(after), "{file}");
        }
    }

    #[test]
    fn the_check_runs_with_the_units_own_flags() {
        let words = [
            "/usr/bin/dockerd",
            "-H",
            "fd://",
            "--config-file",
            "/x",
            "--debug",
        ];
        let words = words.map(str::to_owned);
        let wanted = ["/usr/bin/dockerd", "--validate", "-H", "fd://", "--debug"];
        assert_eq!(validate_command(&words), wanted);
    }
}
