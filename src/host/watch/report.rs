//! What the loop tells everybody of its work: a line for the service manager, a file for the rest.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::recover::NEXT_STEP;
use super::{Host, Watch, Word};
use crate::host::facts::FileFacts;
use crate::host::plan::Wanted;
use crate::host::write;

/// Where the state is that anybody may read.
pub const STATE_FILE: &str = "/run/registry-agent-host/state.json";
/// In few words, for a host of which nothing can be changed.
const BLOCKED: &str = "nothing can be changed: see `registry-agent status`";

/// After a withdrawal that was not proved.
const UNPROVED: &str = "not all engines are proved to do without the mirror";

/// What the loop tells everybody, in [`STATE_FILE`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// The engines that go on with a mirror that is withdrawn: only a restart could tell them.
    pub keep_mirror: Vec<String>,
    /// What is wired, in a few words, for the agent's own status line.
    pub summary: String,
    /// One line of it all.
    pub line: String,
    /// What the engines are told to use; none while it is withdrawn.
    pub mirror: Option<String>,
    /// What each daemon has proved, or that it does not run.
    pub engines: Vec<String>,
    /// The last change: when, in seconds since 1970, and what became of it.
    pub last_apply: Option<LastApply>,
    /// What somebody else has changed, and whether it is put right.
    pub drift: Option<String>,
    /// What was refused, and what to do about it.
    pub refusals: Vec<String>,
    /// What is worth knowing of a docker, and what can be done about it: that it is masked, for one.
    pub notes: Vec<String>,
    /// Why nothing of the host can be changed at all; none where it can.
    pub blocked: Option<String>,
    /// Why the configuration was not taken when it was last read again; none where it was.
    pub configuration: Option<String>,
    /// What a person is to do; none where all is well.
    pub next_step: Option<String>,
}

impl State {
    /// That an engine goes on with a mirror that is withdrawn; nothing where none does.
    fn kept(&self) -> Option<String> {
        let engines = self.keep_mirror.join(", ");
        let verb = if self.keep_mirror.len() == 1 {
            "keeps"
        } else {
            "keep"
        };
        (!engines.is_empty())
            .then(|| format!("{engines} {verb} the mirror, which only a restart takes away"))
    }

    /// A host of which nothing can be changed, and why.
    pub fn blocked(why: String) -> Self {
        Self {
            summary: BLOCKED.to_owned(),
            line: format!("nothing can be changed: {why}"),
            blocked: Some(why),
            next_step: Some(NEXT_STEP.to_owned()),
            ..Self::default()
        }
    }

    /// Has everybody see it, below this root.
    pub fn write(&self, root: &Path) -> Result<(), write::WriteError> {
        let content = serde_json::to_string_pretty(self).unwrap_or_default();
        let facts = FileFacts::Text {
            content: content + "\n",
            mode: 0o644,
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            selinux: None,
            link_to: None,
        };
        for folder in write::missing_folders(root, Path::new(STATE_FILE)) {
            write::make_folder(&write::under(root, &folder))?;
        }
        write::put(&write::under(root, Path::new(STATE_FILE)), &facts)
    }
}

/// The last change of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastApply {
    /// When, in seconds since 1970.
    pub at: u64,
    /// Why it failed; none where it was proved.
    pub failure: Option<String>,
}

impl<H: Host> Watch<'_, H> {
    /// Tells the service manager and everybody, where it is something new.
    pub(super) fn say(&mut self) {
        let kept = self.state.kept().unwrap_or_default();
        let told = match (&self.state.mirror, &self.state.last_apply) {
            (Some(mirror), _) => format!("engines wired to {mirror}"),
            (None, None) if self.left_to_others.is_some() => {
                "engines left as somebody else has them".to_owned()
            }
            (None, None) => "waiting for the mirror to serve".to_owned(),
            (None, Some(last)) if self.is_half_withdrawn(last) => {
                let and = if kept.is_empty() { "" } else { "; " };
                format!("{UNPROVED}{and}{kept}")
            }
            (None, _) if kept.is_empty() => {
                "engines not wired: they pull without the mirror".to_owned()
            }
            (None, _) => format!("other engines not wired: they pull without the mirror; {kept}"),
        };
        let engines = self
            .state
            .engines
            .iter()
            .map(|engine| format!("; {engine}"));
        let mut line = told + &engines.collect::<String>();
        if let Some(drift) = &self.state.drift {
            line = format!("{line}; {drift}");
        }
        if let Some(LastApply {
            failure: Some(why), ..
        }) = &self.state.last_apply
        {
            let first = why.lines().next().unwrap_or_default();
            line = format!("{line}; failed: {first}");
        }
        if let Some(blocked) = &self.state.blocked {
            let first = blocked.lines().next().unwrap_or_default();
            line = format!("{line}; nothing can be changed: {first}");
        }
        if let Some(broken) = &self.state.configuration {
            let first = broken.lines().next().unwrap_or_default();
            line = format!("{line}; {first}");
        }
        self.state.line = line;
        self.state.summary = self.summary();
        if self.said.as_ref() == Some(&self.state) {
            return;
        }
        self.host.tell(Word::Status(self.state.line.clone()));
        if let Err(error) = self.state.write(self.apply.root) {
            tracing::warn!("what this does can't be shown: {error}");
        }
        self.said = Some(self.state.clone());
    }

    /// Whether the mirror was to be taken away, and that is not proved.
    fn is_half_withdrawn(&self, last: &LastApply) -> bool {
        last.failure.is_some() && self.tried == Some(Wanted::Withdrawn)
    }

    /// `docker wired`, `docker, containerd wired`, `docker not wired`, `containerd wired; docker does
    /// not run`.
    fn summary(&self) -> String {
        let idle = |engine: &&String| {
            let unit = format!("{engine}.service");
            self.idle.contains(&unit)
        };
        let list = |of: Vec<&str>| of.join(", ");
        let (resting, running): (Vec<&String>, Vec<&String>) = self.engines.iter().partition(idle);
        let [resting, running] =
            [resting, running].map(|some| list(some.into_iter().map(String::as_str).collect()));
        let refused = list(self.refused.iter().map(String::as_str).collect());
        let failed = self
            .state
            .last_apply
            .as_ref()
            .is_some_and(|it| it.failure.is_some());
        let half = self.state.last_apply.as_ref();
        let half = half.is_some_and(|last| self.is_half_withdrawn(last));
        let others = !resting.is_empty() || !refused.is_empty();
        let engines = match running.as_str() {
            "" => "engines",
            running => running,
        };
        let mut parts = Vec::new();
        match &self.state.mirror {
            _ if half => parts.push(UNPROVED.to_owned()),
            _ if failed => parts.push(format!("{engines} could not be wired")),
            Some(_) if self.state.drift.is_some() => {
                parts.push(format!("{engines} wired, and changed since"));
            }
            // What needs no daemon is not worth the line.
            Some(_) if running.is_empty() && others => {}
            Some(_) => parts.push(format!("{engines} wired")),
            None if running.is_empty() && !self.state.keep_mirror.is_empty() => {}
            None => parts.push(format!("{engines} not wired")),
        }
        parts.extend(self.state.kept());
        if self.state.blocked.is_some() {
            parts.push(BLOCKED.to_owned());
        }
        if !resting.is_empty() {
            parts.push(format!("{resting} does not run"));
        }
        if !refused.is_empty() {
            parts.push(format!("{refused} refused: see `registry-agent status`"));
        }
        parts.join("; ")
    }
}
