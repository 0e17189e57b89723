//! One docker daemon: by its file, or by its flags where it has the mirror from there.

use std::path::{Path, PathBuf};

use super::super::context::{Context, version};
use super::super::daemon_json::{
    self, Broken, DaemonJson, EXPERIMENTAL, INSECURE, ListEdit, MIRRORS,
};
use super::super::dockerd::{self, Arguments, Origin, has, values};
use super::super::{Check, FileChange, Plan, PlanError, Proof, Verb, Wanted, hosts_toml};
use super::{CERTIFICATES, by_hosts_toml};
use crate::host::facts::{DockerFacts, FileFacts, UnitFacts};
use crate::host::verify;

const MIRROR_FLAG: &str = "--registry-mirror";
const INSECURE_FLAG: &str = "--insecure-registry";
const EXPERIMENTAL_FLAG: &str = "--experimental";
/// What a reload sets back to its default where it was set by a flag (moby `daemon/reload.go`).
const LOST_BY_RELOAD: [&str; 4] = [
    "--max-concurrent-downloads",
    "--max-concurrent-uploads",
    "--max-download-attempts",
    "--feature",
];

/// One daemon, and what it is told by.
pub(super) struct Daemon<'a> {
    pub context: &'a Context<'a>,
    pub docker: &'a DockerFacts,
    /// What its unit starts it with.
    pub configured: Arguments,
    /// Its `daemon.json`.
    pub file: PathBuf,
}

impl Daemon<'_> {
    /// Plans for the flags or for the file, whichever it is told by.
    pub fn wire(&self, plan: &mut Plan) -> Result<(), PlanError> {
        let text = self.context.text(&self.file)?.unwrap_or_default();
        let json = daemon_json::read(text).map_err(|broken| self.broken(&broken))?;
        match (self.conflict(&json), self.configured.origin(MIRROR_FLAG)) {
            (Some(flag), _) => {
                let key = key_of(flag);
                plan.refuse(
                    self.unit(),
                    format!(
                        "`{key}` is in {} and `{flag}` among dockerd's arguments, by {}: docker \
                         refuses to start and to reload with both",
                        self.file.display(),
                        self.origin(flag)
                    ),
                    format!(
                        "take one of the two away; `{key}` in the file is the better one to keep"
                    ),
                );
                Ok(())
            }
            (None, Some(origin)) => {
                self.by_flag(origin, plan);
                Ok(())
            }
            (None, None) => self.by_file(text, &json, plan),
        }
    }

    fn unit(&self) -> &str {
        &self.docker.unit.name
    }

    fn running(&self) -> &[String] {
        self.docker.command_line.as_deref().unwrap_or_default()
    }

    fn origin(&self, flag: &str) -> String {
        let unit = &self.docker.unit;
        match self.configured.origin(flag) {
            Some(origin) => dockerd::name(origin, &unit.name, &unit.fragment_path),
            None => "the command line of the daemon that runs".into(),
        }
    }

    fn broken(&self, broken: &Broken) -> PlanError {
        PlanError {
            subject: format!("{}:{}:{}", self.file.display(), broken.line, broken.column),
            message: format!(
                "{}. Correct it: nothing is changed until then",
                broken.message
            ),
        }
    }

    /// A flag whose key is in the file as well.
    fn conflict(&self, json: &DaemonJson) -> Option<&'static str> {
        let both = [
            (MIRROR_FLAG, json.mirrors.is_some()),
            (INSECURE_FLAG, json.insecure.is_some()),
            (EXPERIMENTAL_FLAG, json.experimental.is_some()),
        ];
        let mut both = both.into_iter().filter(|(_, in_file)| *in_file);
        both.find(|(flag, _)| has(&self.configured.words, flag))
            .map(|(flag, _)| flag)
    }

    /// The mirrors after the edit of a list of them.
    fn edited(&self, list: &[String]) -> Vec<String> {
        let context = self.context;
        let wired = context.wanted == Wanted::Wired && context.mirrors_docker_hub();
        daemon_json::edited_list(
            list,
            ListEdit {
                first: wired.then(|| context.mirror()),
                same: &|one| context.is_mirror(one),
                stale: &|one| context.is_previous(one),
            },
        )
    }

    fn by_flag(&self, origin: &Origin, plan: &mut Plan) {
        let unit = self.unit();
        let now = values(&self.configured.words, MIRROR_FLAG);
        let wanted = self.edited(&now);
        if self.context.wanted == Wanted::Withdrawn {
            if wanted != now {
                plan.keep_mirror.push(unit.to_owned());
                plan.note(format!(
                    "{unit} has the mirror by a flag, which only a restart could take away: it \
                     stays, and docker goes on to the registry itself where the mirror fails"
                ));
            }
            return;
        }
        let running = self
            .docker
            .command_line
            .as_deref()
            .unwrap_or(&self.configured.words);
        let runs_with_it = values(running, MIRROR_FLAG) == wanted || !active(&self.docker.unit);
        if wanted == now && runs_with_it {
            self.prove(wanted, plan);
            return;
        }
        let place = self.origin(MIRROR_FLAG);
        let why = format!("docker is given its mirrors by a flag, in {place}");
        let mut change = None;
        if wanted != now {
            change = match origin {
                Origin::File(path, variable) => self.change_flags(path, variable, &wanted),
                Origin::ExecStart | Origin::Environment(_) => None,
            };
            if change.is_none() {
                plan.refuse(
                    unit,
                    format!("{why}, which is not registry-agent's to edit"),
                    format!(
                        "make it `{MIRROR_FLAG}={}` there, or take the flag away, so that \
                         daemon.json is used; then `systemctl daemon-reload` and `systemctl \
                         restart {unit}`",
                        self.context.mirror()
                    ),
                );
                return;
            }
        }
        if active(&self.docker.unit) && !self.context.may_restart() {
            plan.refuse(
                unit,
                format!(
                    "{why}: changing it takes a restart of docker, which `host.docker.restart: \
                     never` forbids"
                ),
                format!(
                    "say `host.docker.restart: if-needed`; or take the flag out of {place} and \
                     restart docker yourself when it suits: from then on daemon.json is used, \
                     which needs no restart"
                ),
            );
            return;
        }
        plan.files.extend(change);
        if active(&self.docker.unit) {
            plan.act(
                unit,
                Verb::Restart,
                format!("{why}, and reads flags only when it starts"),
            );
        }
        self.prove(wanted, plan);
    }

    fn change_flags(&self, path: &Path, variable: &str, wanted: &[String]) -> Option<FileChange> {
        let text = self.context.known_text(path)?;
        let new = dockerd::set_flags(text, variable, MIRROR_FLAG, wanted)?;
        let why = format!("{} starts docker with the flags in {variable}", self.unit());
        self.context.change(path, &new, why).ok().flatten()
    }

    fn by_file(&self, text: &str, json: &DaemonJson, plan: &mut Plan) -> Result<(), PlanError> {
        let stale_flags = has(self.running(), MIRROR_FLAG) && active(&self.docker.unit);
        let edited = self.edited_file(text, json, plan)?;
        let change = self
            .context
            .change(&self.file, &edited.text, edited.why())?;
        // A key that is not there and was never told to the daemon is as good as an empty list.
        let mirrors = edited.mirrors.clone().or_else(|| json.mirrors.clone());
        self.say_unused_mirrors(mirrors.as_deref().unwrap_or_default(), plan);
        let info = self.docker.info.as_ref();
        let differs = match (&mirrors, info) {
            (Some(mirrors), Some(info)) => !verify::equal(mirrors, &info.mirrors),
            _ => false,
        };
        if !active(&self.docker.unit) {
            plan.files.extend(change.map(|change| self.checked(change)));
            self.prove(mirrors.unwrap_or_default(), plan);
            return Ok(());
        }
        if change.is_none() && !differs && !stale_flags {
            self.prove(mirrors.unwrap_or_default(), plan);
            return Ok(());
        }
        let restart = stale_flags || edited.restart || !self.docker.unit.can_reload;
        let unit = self.unit();
        if self.context.wanted == Wanted::Withdrawn && restart {
            plan.keep_mirror.push(unit.to_owned());
            plan.note(format!(
                "{unit} could only be told by a restart that the mirror is withdrawn, which is \
                 worse than the mirror: docker goes on to the registry itself where it fails"
            ));
            return Ok(());
        }
        if restart && self.context.may_restart() {
            plan.act(unit, Verb::Restart, self.restart_reason(stale_flags));
        } else if stale_flags || !self.docker.unit.can_reload {
            plan.refuse(
                unit,
                format!(
                    "{}, and `host.docker.restart: never` forbids it",
                    self.restart_reason(stale_flags)
                ),
                format!("say `host.docker.restart: if-needed`, or `systemctl restart {unit}` when it suits"),
            );
            return Ok(());
        } else {
            if edited.restart {
                plan.note(format!(
                    "`{EXPERIMENTAL}` takes effect when {unit} starts the next time"
                ));
            }
            plan.act(
                unit,
                Verb::Reload,
                "docker reads its mirrors again; containers go on",
            );
            self.say_lost_flags(plan);
        }
        plan.files.extend(change.map(|change| self.checked(change)));
        self.prove(mirrors.unwrap_or_default(), plan);
        Ok(())
    }

    fn restart_reason(&self, stale_flags: bool) -> String {
        if stale_flags {
            format!(
                "docker still runs with `{MIRROR_FLAG}`, which its unit no longer says: only a \
                 restart makes it read {}",
                self.file.display()
            )
        } else if self.docker.unit.can_reload {
            format!("docker reads `{EXPERIMENTAL}` only when it starts")
        } else {
            format!(
                "{} can't be reloaded, so only a restart makes docker read its file",
                self.unit()
            )
        }
    }

    /// The file as it should be.
    fn edited_file(
        &self,
        text: &str,
        json: &DaemonJson,
        plan: &mut Plan,
    ) -> Result<Edited, PlanError> {
        let broken = |broken: Broken| self.broken(&broken);
        let context = self.context;
        let mut edited = Edited {
            text: text.to_owned(),
            mirrors: None,
            keys: Vec::new(),
            restart: false,
        };
        let now = json.mirrors.clone().unwrap_or_default();
        let mirrors = self.edited(&now);
        let told = self.docker.info.iter().flat_map(|info| &info.mirrors);
        let mut told_ours = told.filter(|one| context.is_mirror(one) || context.is_previous(one));
        let needed = mirrors != now || (json.mirrors.is_none() && told_ours.next().is_some());
        if needed {
            edited.text = daemon_json::set_list(&edited.text, MIRRORS, &mirrors).map_err(broken)?;
            edited.keys.push(MIRRORS);
            edited.mirrors = Some(mirrors);
        }
        if context.wanted == Wanted::Withdrawn {
            return Ok(edited);
        }
        if let Some(name) = self.needs_insecure() {
            let mut list = json.insecure.clone().unwrap_or_default();
            let by_flag = values(&self.configured.words, INSECURE_FLAG);
            if by_flag.contains(&name) || list.contains(&name) {
                // It is there already.
            } else if has(&self.configured.words, INSECURE_FLAG) {
                plan.refuse(
                    self.unit(),
                    format!(
                        "{name} should be among the insecure registries, and those are given by a \
                         flag, in {}",
                        self.origin(INSECURE_FLAG)
                    ),
                    format!(
                        "add `{INSECURE_FLAG}={name}` there, or move them to {}",
                        self.file.display()
                    ),
                );
            } else {
                list.push(name);
                edited.text =
                    daemon_json::set_list(&edited.text, INSECURE, &list).map_err(broken)?;
                edited.keys.push(INSECURE);
            }
        }
        if let Some(wanted) = context.settings.docker.experimental
            && json.experimental != Some(wanted)
        {
            let flag = self.configured.words.iter().find_map(|word| {
                let value = word.strip_prefix(EXPERIMENTAL_FLAG)?;
                Some(value.is_empty() || value == "=true")
            });
            match flag {
                Some(said) if said == wanted => {}
                Some(said) => plan.refuse(
                    self.unit(),
                    format!(
                        "`host.docker.experimental` is {wanted}, and docker is started with \
                         `{EXPERIMENTAL_FLAG}={said}`, by {}",
                        self.origin(EXPERIMENTAL_FLAG)
                    ),
                    "change the flag, or take it away so that daemon.json is used".into(),
                ),
                None => {
                    let value = wanted.to_string();
                    edited.text =
                        daemon_json::set(&edited.text, EXPERIMENTAL, &value).map_err(broken)?;
                    edited.keys.push(EXPERIMENTAL);
                    edited.restart = true;
                }
            }
        }
        Ok(edited)
    }

    /// The host-local name, where this daemon would otherwise ask it for TLS.
    fn needs_insecure(&self) -> Option<String> {
        let old = version(self.docker.version.as_deref()).is_some_and(|it| it < (28, 0));
        let name = self.context.local_registry()?;
        (self.context.plain_http() && !old).then_some(name)
    }

    fn checked(&self, mut change: FileChange) -> FileChange {
        let words = &self.configured.words;
        let can = version(self.docker.version.as_deref()).is_some_and(|it| it >= (23, 0));
        if can && !words.is_empty() && matches!(change.after, FileFacts::Text { .. }) {
            let command = dockerd::validate_command(words);
            change.check = Some(Check::DockerdValidate { command });
        }
        change
    }

    fn say_lost_flags(&self, plan: &mut Plan) {
        let running = match &self.docker.command_line {
            Some(words) => words,
            None => &self.configured.words,
        };
        let lost: Vec<&str> = LOST_BY_RELOAD
            .into_iter()
            .filter(|flag| has(running, flag))
            .collect();
        if !lost.is_empty() {
            plan.note(format!(
                "a reload makes docker forget what it was given by {} until its next start: in {} \
                 it would stay",
                lost.join(", "),
                self.file.display()
            ));
        }
    }

    /// A `hosts.toml` of docker.io beats the whole list, for the image store that reads it.
    fn say_unused_mirrors(&self, mirrors: &[String], plan: &mut Plan) {
        let context = self.context;
        let others = mirrors.iter().any(|one| !context.is_mirror(one));
        if others && by_hosts_toml(context, self.docker).contains(&"docker.io") {
            plan.note(format!(
                "the containerd image store asks only the hosts in {}: the other mirrors of {} \
                 are for the classic store alone",
                hosts_toml::file(Path::new(CERTIFICATES), "docker.io").display(),
                self.file.display()
            ));
        }
    }

    /// Also of one that does not run: it may be about to start.
    fn prove(&self, mirrors: Vec<String>, plan: &mut Plan) {
        if self.docker.unit.load_state != "masked" {
            let unit = self.unit().to_owned();
            plan.proofs.push(Proof::DockerMirrors { unit, mirrors });
        }
    }
}

/// A `daemon.json` as it should be.
struct Edited {
    text: String,
    /// The mirrors, where they are changed.
    mirrors: Option<Vec<String>>,
    keys: Vec<&'static str>,
    /// Whether something in it is read only at a start.
    restart: bool,
}

impl Edited {
    fn why(&self) -> String {
        let keys: Vec<String> = self.keys.iter().map(|key| format!("`{key}`")).collect();
        format!("docker reads {} here", keys.join(" and "))
    }
}

fn key_of(flag: &str) -> &'static str {
    match flag {
        MIRROR_FLAG => MIRRORS,
        INSECURE_FLAG => INSECURE,
        _ => EXPERIMENTAL,
    }
}

fn active(unit: &UnitFacts) -> bool {
    unit.active_state == "active"
}
